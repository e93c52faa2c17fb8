"""Values that may be missing in general but exist where they are used, such as the loss of a complete trial."""

from __future__ import annotations

from typing import TypeVar

T = TypeVar("T")


def known(value: T | None) -> T:
    """The value. Raises `ValueError` where it is missing after all."""
    if value is None:
        raise ValueError("a number that a finished run has is missing in its results")
    return value
