"""`lighthouse doctor` where the package loads; where it does not, the `lighthouse` command never comes here."""

from lighthouse_doctor.command import main

__all__ = ["main"]
