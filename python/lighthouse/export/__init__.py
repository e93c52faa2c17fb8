"""What is shipped: the plain model, checked in a process without this package, and its card."""
