"""Several runs that are compared or searched: `lighthouse compare` and `lighthouse tune`."""
