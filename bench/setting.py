"""The device that is measured, and what a result says about where it comes from: command, device, versions."""

from __future__ import annotations

import os
import platform
import re
import sys
from pathlib import Path

import torch

import lighthouse


def command() -> str:
    """The command line, paths from the root shortened to their last part."""
    return " ".join(["python", *(os.path.basename(word) if word.startswith("/") else word for word in sys.argv)])


def device_name(device: str) -> str:
    return torch.cuda.get_device_name() if device == "cuda" else f"{processor()}, {torch.get_num_threads()} threads"


def processor() -> str:
    for text in Path("/proc/cpuinfo").read_text().splitlines():
        if text.startswith("model name"):
            return text.split(":")[1].strip()
    return platform.processor()


def lighthouse_version() -> str:
    """The package's, also where its sources are used without an installation."""
    if not lighthouse.__version__.startswith("0+"):
        return lighthouse.__version__
    project = (Path(__file__).parents[1] / "pyproject.toml").read_text()
    return re.search(r'^version = "(.+)"', project, re.MULTILINE)[1]


def versions(device: str) -> dict[str, str]:
    found = {
        "lighthouse": lighthouse_version(),
        "torch": torch.__version__,
        "python": platform.python_version(),
    }
    if device == "cuda":
        found["cuda"] = torch.version.cuda
        found["cudnn"] = str(torch.backends.cudnn.version())
    return found


def synchronize(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()
