"""`lighthouse pretrain`: the options, the checks, the run, and what is said at the end."""

from __future__ import annotations

import argparse
import logging
import os
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

from rich.console import Console
from torch.distributed import DistNetworkError
from transformers import HfArgumentParser
from transformers.utils.logging import disable_progress_bar

from lighthouse import report
from lighthouse.training import (
    DataOptions,
    LighthouseOptions,
    ModelOptions,
    PretrainOptions,
    PretrainResult,
    Run,
    RunFailed,
    TrainingOptions,
    configuration,
    demo_defaults,
    prepare,
    prepare_both,
)
from lighthouse.training.options import field_names

EXAMPLE = """\
examples:
  lighthouse pretrain                                   the standard library's sources, 1,000 steps
  lighthouse pretrain --demo                            dense and two-stage, compared, in minutes
  lighthouse pretrain --data books --model small --context 32768 --steps 5000 --share 0.6 --output_dir runs/books
  lighthouse pretrain --config runs/books/config.yaml --resume
  torchrun --nproc_per_node 8 -m lighthouse.cli pretrain --config books.yaml --fsdp full_shard --output_dir runs/books
"""

PICTURE = "comparison.png"


def main(arguments: Sequence[str]) -> int:
    """Runs `lighthouse pretrain` and returns the exit status. Faults after the checks keep their traceback."""
    arguments = list(arguments)
    parser = _parser(whole_help="--help-all" in arguments)
    demo = "--demo" in arguments
    if demo:
        parser.set_defaults(**demo_defaults())
    logging.basicConfig(format="%(message)s")
    disable_progress_bar()  # of writing model files; the training's own bar is another
    try:
        for name in reversed(configuration.names_in(arguments)):
            arguments = configuration.as_arguments(configuration.read(name), parser, f"config={name!r}") + arguments
        model, data, lighthouse, training, _ = parser.parse_args_into_dataclasses(arguments, look_for_args_file=False)
        options = PretrainOptions(**asdict(model), **asdict(data), **asdict(lighthouse))
        runs = prepare_both(options, training) if demo else prepare(options, training)
    except DistNetworkError as error:
        port = f"{os.environ.get('MASTER_ADDR')}:{os.environ.get('MASTER_PORT')}"
        print(f"lighthouse pretrain: error: the processes could not meet at {port}: {error}", file=sys.stderr)
        print("another port: torchrun --master_port, or MASTER_PORT in the environment", file=sys.stderr)
        return 2
    except (ValueError, TypeError, OSError) as error:
        print(f"lighthouse pretrain: error: {error}", file=sys.stderr)
        return 2
    try:
        if demo:
            _compare(runs, Path(training.output_dir))
        else:
            _single(runs)
    except RunFailed as error:
        print(f"lighthouse pretrain: error: {error}", file=sys.stderr)
        return 1
    return 0


def _single(run: Run) -> None:
    result = run.train()
    if run.training.process_index == 0:
        console = Console()
        console.print(report.table([result]))
        _say_where(result)


def _compare(runs: list[Run], folder: Path) -> None:
    results = []
    for number, run in enumerate(runs, 1):
        print(f"\nRun {number} of {len(runs)}: {run.folder.name}", flush=True)
        results.append(run.train())
    if runs[0].training.process_index != 0:
        return
    picture = folder / PICTURE
    report.draw(results, picture)
    print()
    Console().print(report.table(results))
    if line := report.same_time(results):
        print(line)
    print(f"Picture: {picture}")
    _say_where(results[-1])


def _say_where(result: PretrainResult) -> None:
    print(f"Plain model, for AutoModelForCausalLM and AutoTokenizer: {result.model_folder}")


def _parser(whole_help: bool) -> HfArgumentParser:
    parser, general = run_parser(
        "pretrain",
        "Pre-trains a Llama from scratch: a share of the steps with Lighthouse, the others dense. At the end the plain "
        "model and its tokenizer are a Hugging Face folder.",
        EXAMPLE,
        whole_help=whole_help,
    )
    general.add_argument(
        "--demo",
        action="store_true",
        help="two small runs from the same weights, dense and two-stage, compared; other options still count",
    )
    return parser


def run_parser(
    command: str, description: str, example: str, *, more: Sequence[type] = (), whole_help: bool = False
) -> tuple[HfArgumentParser, argparse._ArgumentGroup]:
    """The options of a run, for a command that trains, and their group "general", to which it may add.

    `more` are dataclasses of the command's own options.
    """
    kinds = (*more, ModelOptions, DataOptions, LighthouseOptions, TrainingOptions)
    parser = HfArgumentParser(
        list(kinds),
        prog=f"lighthouse {command}",
        description=description,
        epilog=example,
        formatter_class=_Formatter,
        allow_abbrev=False,
        add_help=False,
    )
    general = parser.add_argument_group("general")
    general.add_argument("-h", "--help", action="help", help="this help")
    general.add_argument("--help-all", action="help", help="with every option of Transformers' TrainingArguments")
    general.add_argument(
        "--config",
        action="append",
        metavar="FILE",
        help="YAML or JSON with options by the same names; what the command line says wins, and of several files the "
        "last. Every run writes its own, config.yaml, into its folder.",
    )
    if not whole_help:
        shown = field_names(*kinds)
        for action in parser._actions:
            if action.dest not in shown and action not in general._group_actions:
                action.help = argparse.SUPPRESS
    return parser, general


class _Formatter(argparse.ArgumentDefaultsHelpFormatter):
    """Defaults behind each option, the examples as they are written, one spelling of each option."""

    def _get_help_string(self, action):
        if action.default in (None, False, argparse.SUPPRESS):
            return action.help
        if isinstance(action.default, list):
            return f"{action.help} (default: {' '.join(action.default)})"
        return super()._get_help_string(action)

    def _fill_text(self, text, width, indent):
        return text if text.startswith("example") else super()._fill_text(text, width, indent)

    def _format_action_invocation(self, action):
        if not action.option_strings:
            return super()._format_action_invocation(action)
        names = [name for name in action.option_strings if "_" in name or not self._has_twin(name, action)]
        value = self._format_args(action, self._get_default_metavar_for_optional(action))
        return ", ".join(names) + (f" {value}" if action.nargs != 0 else "")

    @staticmethod
    def _has_twin(name, action):
        return "--" + name[2:].replace("-", "_") in action.option_strings and "-" in name[2:]
