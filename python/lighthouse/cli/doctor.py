"""`lighthouse doctor`: all of it is in `lighthouse.doctor`, which also runs where this package does not load."""

from lighthouse.doctor import main

__all__ = ["main"]
