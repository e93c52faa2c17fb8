"""What the commands say, check and write alike."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

from lighthouse.core.method import SWITCHES, Method, text_of, written


def add_method(group) -> None:
    """The method's settings as options of an argparse group; `Method.of` reads them from what is parsed."""
    for setting in Method.settings():
        kinds: dict = {"default": written(setting.default)}
        if isinstance(setting.default, tuple):
            kinds["nargs"] = "+"
        elif isinstance(setting.default, bool):
            kinds |= {"nargs": "?", "const": True, "type": string_to_bool}
        shown = text_of(setting.default)
        group.add_argument(
            f"--{setting.name}",
            help=f"{setting.metadata['help']} (default: {shown})",
            metavar=setting.metadata.get("metavar"),
            **kinds,
        )


def string_to_bool(text: str) -> bool:
    """`true` or `false`, as the options of pretrain take it."""
    if text.lower() not in SWITCHES:
        raise argparse.ArgumentTypeError(f"{text!r}: true or false is needed")
    return SWITCHES[text.lower()]


def say(line: str) -> None:
    """Progress, on standard error."""
    print(f"  {line}", file=sys.stderr, flush=True)


def check_folders(options: argparse.Namespace, *names: str) -> None:
    """Files and folders that are written at the end can be made: their parents are there. Raises `ValueError`."""
    for name in names:
        path = getattr(options, name)
        if path not in (None, "-") and not Path(path).absolute().parent.is_dir():
            raise ValueError(f"{name}={path!r}: its folder does not exist")


def write_json(found: dict, file: str | None) -> None:
    """To a file, to standard output where that is `-`, or nowhere."""
    if file is not None:
        write_text(json.dumps(found, indent=1) + "\n", file)


def write_text(text: str, file: str) -> None:
    """To a file, or to standard output where that is `-`."""
    if file == "-":
        sys.stdout.write(text)
    else:
        Path(file).write_text(text, encoding="utf-8")
