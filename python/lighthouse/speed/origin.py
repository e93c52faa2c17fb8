"""What a result records about its origin: the command and the versions."""

from __future__ import annotations

import os
import platform
from collections.abc import Sequence

import torch

from lighthouse.core.version import VERSION


def command(program: str, arguments: Sequence[str]) -> str:
    """The command line, paths from the root shortened to their last part."""
    return " ".join([program, *(os.path.basename(word) if word.startswith("/") else word for word in arguments)])


def versions(device: torch.device | str) -> dict[str, str]:
    found = {"lighthouse": VERSION, "torch": str(torch.__version__), "python": platform.python_version()}
    if torch.device(device).type == "cuda":
        found |= {"cuda": str(torch.version.cuda), "cudnn": str(torch.backends.cudnn.version())}
    return found
