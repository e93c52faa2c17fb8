"""The device that is measured, and what a result records about its origin: command, device, versions."""

from __future__ import annotations

import sys

from lighthouse.core.devices import device_name  # noqa: F401
from lighthouse.speed import origin
from lighthouse.speed.measure import synchronize  # noqa: F401
from lighthouse.speed.origin import versions  # noqa: F401


def command() -> str:
    return origin.command("python", sys.argv)
