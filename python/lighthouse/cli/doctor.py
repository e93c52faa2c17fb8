"""`lighthouse doctor`: all of it is `lighthouse.doctor`, which also runs as a file, where this package does not load."""

from lighthouse.doctor import main

__all__ = ["main"]
