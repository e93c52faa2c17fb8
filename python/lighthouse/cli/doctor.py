"""`lighthouse doctor` if the package loads; if it does not, the `lighthouse` command never imports this."""

from lighthouse_doctor.command import main

__all__ = ["main"]
