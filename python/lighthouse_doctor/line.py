"""What one check found, as a line; and what all lines together say."""

from __future__ import annotations

import shutil
import textwrap
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

OK, NOTE, FAILED = "ok", "note", "failed"

# Fixes of more than one check.
REINSTALL = "pip install --force-reinstall --no-deps lighthouse-attn (in a checkout: `.` for the name)"
NO_GPU_WANTED = "to train on the CPU instead: CUDA_VISIBLE_DEVICES= lighthouse doctor"


@dataclass(frozen=True)
class Line:
    """What one check found. `needed`: Lighthouse cannot train here if it failed."""

    check: str
    status: str
    found: str
    fix: str | None = None
    needed: bool = True
    device: str | None = None

    @property
    def stops(self) -> bool:
        return self.status == FAILED and self.needed

    def __str__(self) -> str:
        name = self.check if self.device is None else f"{self.check} {self.device}"
        width = max(60, min(shutil.get_terminal_size((120, 24)).columns, 120))
        indent = " " * 31
        wrapper = textwrap.TextWrapper(width, f"{self.status:8}{name:23}", indent)
        wrapper.break_long_words = wrapper.break_on_hyphens = False
        text = wrapper.fill(self.found)
        if self.fix is None:
            return text
        wrapper.initial_indent = indent
        return text + "\n" + wrapper.fill(f"-> {self.fix}")


def can_train(lines: Iterable[Line]) -> bool:
    """Whether Lighthouse can train here: nothing that it needs has failed.

    A machine without a GPU can, slowly. One with GPUs of which Lighthouse can use none cannot: a run there would not do
    what its owner expects.
    """
    return not any(line.stops for line in lines)


def verdict(lines: Sequence[Line]) -> str:
    """The last line."""
    stopping = [line for line in lines if line.stops]
    if stopping:
        names = dict.fromkeys(line.check for line in stopping)
        return f"Lighthouse cannot train here: {', '.join(names)} failed."
    places = [line.device for line in lines if line.check == "self-test" and line.status == OK and line.device]
    text = f"Lighthouse can train here, on {' and '.join(places)}"
    if places == ["cpu"]:
        text += " only, slowly"
    others = dict.fromkeys(line.check for line in lines if line.status == FAILED)
    return f"{text}. Failed, but not needed: {', '.join(others)}." if others else f"{text}."
