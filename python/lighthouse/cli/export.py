"""`lighthouse export`: a checkpoint becomes a plain Hugging Face folder."""

from __future__ import annotations

import logging
import signal
import sys
from collections.abc import Sequence
from dataclasses import asdict

from rich.console import Console
from rich.table import Table
from transformers.utils.logging import disable_progress_bar

from lighthouse.cli.parser import Parser
from lighthouse.cli.shared import check_folders, write_json
from lighthouse.export.export import DTYPES, Exported, ExportFailed, export
from lighthouse.training.result import STOPPED

EXAMPLE = """\
examples:
  lighthouse pretrain --model tiny --context 2048 --steps 60 --save_steps 30 --output_dir runs/first
  lighthouse export runs/first --output first
  lighthouse export runs/first/checkpoint-30 --output early --dtype bfloat16 --json -
"""


def main(arguments: Sequence[str]) -> int:
    """Runs `lighthouse export` and returns the exit status."""
    options = _parser().parse_args(list(arguments))
    logging.basicConfig(format="%(message)s")
    disable_progress_bar()
    console = Console(stderr=options.json == "-")
    before = signal.signal(signal.SIGTERM, _stop)  # else a half-written folder would stay
    try:
        check_folders(options, "json")
        with console.status("") as status:
            exported = export(
                options.checkpoint,
                options.output,
                tokenizer=options.tokenizer,
                dtype=options.dtype,
                force=options.force,
                say=lambda what: status.update(f"{what} ..."),
            )
    except (ValueError, TypeError, FileNotFoundError, FileExistsError, NotADirectoryError, PermissionError) as error:
        print(f"lighthouse export: error: {error}", file=sys.stderr)
        return 2
    except (ExportFailed, OSError) as error:
        print(f"lighthouse export: error: {error}", file=sys.stderr)
        return 2 if isinstance(error, OSError) and error.errno is None else 1  # without a number: not the system's
    finally:
        signal.signal(signal.SIGTERM, before)
    assert exported is not None  # None is for the other processes
    console.print(_table(exported))
    try:
        write_json(asdict(exported), options.json)
    except OSError as error:
        print(f"lighthouse export: error: json={options.json!r}: {error}", file=sys.stderr)
        return 1
    return 0


def _stop(number, frame):
    raise SystemExit(STOPPED)


def _table(exported: Exported) -> Table:
    table = Table(show_header=False, title="Exported", title_justify="left")
    table.add_column(no_wrap=True)
    table.add_column(overflow="fold")
    steps = "not recorded" if exported.step is None else f"{exported.step:,}"
    if exported.step is not None and exported.switch_step is not None:
        steps += f", of which {exported.lighthouse_steps:,} with Lighthouse"
    rows = [
        ("folder", exported.folder),
        ("from", exported.source),
        ("model", f"{exported.model_class}, {exported.parameters:,} parameters, {exported.dtype}"),
        ("size", f"{exported.bytes / 1e6:,.1f} MB"),
        ("tokenizer", exported.tokenizer or "none"),
        ("steps", steps),
        ("checked", exported.check),
        *(("warning", warning) for warning in exported.warnings),
    ]
    for row in rows:
        table.add_row(*row)
    return table


def _parser() -> Parser:
    parser = Parser(
        prog="lighthouse export",
        description="Writes a plain Hugging Face folder (safetensors, tokenizer, model card) from a checkpoint, and "
        "checks it in a process that cannot import lighthouse.",
        epilog=EXAMPLE,
    )
    parser.add_argument(
        "checkpoint",
        metavar="CHECKPOINT",
        help="folder of a run of lighthouse pretrain (its model, or its last complete checkpoint), or a checkpoint of "
        "any Trainer, of either stage",
    )
    parser.add_argument("--output", "-o", required=True, metavar="FOLDER", help="folder to write")
    parser.add_argument(
        "--tokenizer",
        metavar="NAME",
        help="folder or name of the tokenizer (default: the one beside the checkpoint or of its run)",
    )
    parser.add_argument("--dtype", choices=DTYPES, help="of the weights (default: the checkpoint's)")
    parser.add_argument("--force", action="store_true", help="replace a model that the folder holds")
    parser.add_argument("--json", metavar="FILE", help="write what was exported as JSON to FILE; - is standard output")
    return parser
