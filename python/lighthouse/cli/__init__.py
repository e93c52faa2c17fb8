"""The `lighthouse` command. Each subcommand is a module here with `main(arguments) -> exit status`.

A module is imported when its subcommand is called, so that `lighthouse --help` does not wait for Transformers.
"""

from __future__ import annotations

import argparse
import importlib
import io
import sys
from collections.abc import Sequence

import lighthouse
from lighthouse.cli.parser import Parser

COMMANDS = {
    "pretrain": "pre-train a Llama from scratch, first with Lighthouse, then dense",
    "compare": "train dense, with a local window alone and with Lighthouse, compare, and check the model to ship",
    "plan": "show what a length and settings give: S, work, memory, estimated speed-up",
    "bench": "time a layer, or a training step, on this device, dense and with Lighthouse",
    "doctor": "check whether Lighthouse can train on this machine, and say how to fix what is wrong",
    "tune": "try settings, each in a short run, and keep the one with the lowest dense held-out loss",
    "inspect": "show which tokens of a text each layer and head keeps, and at which level",
    "evaluate": "measure what a model makes of a long context: loss by position, copies by distance, passkeys",
    "export": "write a plain Hugging Face folder from a checkpoint, with a model card, and check it",
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command line and returns the exit status: 0 done, 1 failed, 2 wrong arguments, 130 interrupted.

    A signal that asks a run to end raises SystemExit(143).
    """
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # else the name of a file that is not UTF-8 could not be printed
            stream.reconfigure(errors="backslashreplace")
    options = _parser().parse_args(arguments[:1])
    if options.command is None:
        _parser().print_help()
        return 0
    try:
        command = importlib.import_module(f"lighthouse.cli.{options.command}")
    except ImportError as error:
        print(f"lighthouse {options.command}: error: {_missing(error)}", file=sys.stderr)
        return 1
    try:
        return command.main(arguments[1:])
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130


def _missing(error: ImportError) -> str:
    """Names the extra that has a missing package."""
    package = (error.name or "").partition(".")[0]
    if not isinstance(error, ModuleNotFoundError) or package == "lighthouse":
        return str(error)
    extra = "tune" if package == "optuna" else "train"
    return f'{package} is needed but not installed: pip install "lighthouse-attn[{extra}]"'


def _parser() -> argparse.ArgumentParser:
    parser = Parser(
        prog="lighthouse",
        description="Lighthouse attention: training-only attention for very long sequences.",
        epilog="lighthouse COMMAND --help describes a command.",
    )
    parser.add_argument("--version", action="version", version=f"lighthouse {lighthouse.__version__}")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", title="commands")
    for name, what in COMMANDS.items():
        commands.add_parser(name, help=what, add_help=False)
    return parser
