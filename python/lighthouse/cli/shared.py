"""What the commands print, check and write in the same way."""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
from pathlib import Path

from lighthouse.core.method import Method, text_of, written
from lighthouse.core.settings import RECOMMENDED


def add_method(group) -> None:
    """The method's settings as options of an argparse group; `Method.of` reads them from what is parsed."""
    for setting in Method.settings():
        default = getattr(RECOMMENDED, setting.name)
        kinds: dict = {"default": written(default), "metavar": setting.metadata.get("metavar")}
        if isinstance(default, tuple):
            kinds["nargs"] = "*"
        elif isinstance(default, bool):
            kinds |= {"nargs": "?", "const": True, "metavar": "true|false"}
        shown = text_of(default).lower()
        group.add_argument(f"--{setting.name}", help=f"{setting.metadata['help']} (default: {shown})", **kinds)


def say(line: str) -> None:
    """Progress, on standard error."""
    print(f"  {line}", file=sys.stderr, flush=True)


def mib(size: float) -> str:
    """Bytes as shown to the user."""
    return f"{size / 2**20:,.1f} MiB"


def check_folders(options: argparse.Namespace, *names: str) -> None:
    """Checks that files which are written at the end can be written. Raises `ValueError`."""
    for name in names:
        path = getattr(options, name)
        if path in (None, "-"):
            continue
        file = Path(path).absolute()
        if os.path.isdir(file):
            raise ValueError(f"{name}={path!r} is a folder: the name of a file is needed")
        if not os.path.isdir(file.parent):
            raise ValueError(f"{name}={path!r}: its folder does not exist")
        try:
            with open(file, "ab") if os.path.lexists(file) else tempfile.TemporaryFile(dir=file.parent):
                pass
        except OSError as error:
            raise ValueError(f"{name}={path!r} cannot be written to ({error.strerror}): name another place") from None


def write_json(found: dict, file: str | None) -> None:
    """To a file, to standard output if that is `-`, or nowhere."""
    if file is not None:
        write_text(json.dumps(found, indent=1) + "\n", file)


def write_text(text: str, file: str) -> None:
    """To a file, or to standard output if that is `-`."""
    if file == "-":
        sys.stdout.write(text)
    else:
        Path(file).write_text(text, encoding="utf-8")
