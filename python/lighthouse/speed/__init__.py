"""How fast a layer, a step and a run are: measured, and estimated."""
