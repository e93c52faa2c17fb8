"""`lighthouse pretrain`: the options, the checks, the run, and what is printed at the end."""

from __future__ import annotations

import argparse
import logging
import os
import sys
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from rich.console import Console
from torch.distributed import DistNetworkError
from transformers import HfArgumentParser
from transformers.hf_argparser import string_to_bool
from transformers.utils.logging import disable_progress_bar

from lighthouse import report
from lighthouse.cli.parser import OneLine
from lighthouse.training import (
    DataOptions,
    LighthouseOptions,
    ModelOptions,
    PretrainOptions,
    Refused,
    RunFailed,
    TrainingOptions,
    configuration,
    prepare,
)
from lighthouse.training.options import MethodOptions, field_names

EXAMPLE = """\
examples:
  lighthouse pretrain                                   the standard library's sources, 1,000 steps
  lighthouse pretrain --data books --model small --context 32768 --steps 5000 --share 0.6 --output_dir runs/books
  lighthouse pretrain --config runs/books/config.yaml --resume
  torchrun --nproc_per_node 8 -m lighthouse.cli pretrain --config books.yaml --fsdp full_shard --output_dir runs/books
"""

# Trainer options that accept a word or a switch; HfArgumentParser accepts only the switch.
WORD_OR_SWITCH = ("include_num_input_tokens_seen",)


class RunParser(OneLine, HfArgumentParser):
    """Transformers' parser of dataclasses, with errors of one line."""


def main(arguments: Sequence[str]) -> int:
    """Runs `lighthouse pretrain` and returns the exit status. Faults after the checks keep their traceback."""
    arguments = list(arguments)
    parser, _ = run_parser(
        "pretrain",
        "Pre-trains a Llama from scratch: a share of the steps with Lighthouse, the others dense. At the end the plain "
        "model and its tokenizer are saved as a Hugging Face folder.",
        EXAMPLE,
        whole_help="--help-all" in arguments,
    )
    logging.basicConfig(format="%(message)s")
    disable_progress_bar()  # of writing model files; the training's own bar is another
    try:
        options, training, _ = parse_run(parser, arguments)
        run = prepare(options, training)
    except (ValueError, TypeError, OSError) as error:
        print(f"lighthouse pretrain: error: {error}", file=sys.stderr)
        return 2
    try:
        result = run.train()
    except RunFailed as error:
        print(f"lighthouse pretrain: error: {error}", file=sys.stderr)
        return 2 if isinstance(error, Refused) else 1
    if training.process_index == 0:
        Console().print(report.table([result]))
        print(f"Plain model, for AutoModelForCausalLM and AutoTokenizer: {result.model_folder}")
    return 0


def run_parser(
    command: str, description: str, example: str, *, more: Sequence[type] = (), whole_help: bool = False
) -> tuple[RunParser, argparse._ArgumentGroup]:
    """The options of a run, for a command that trains, and their group "general", to which it may add.

    `more` are dataclasses of the command's own options.
    """
    kinds: Any = (*more, ModelOptions, DataOptions, LighthouseOptions, TrainingOptions)
    parser = RunParser(
        list(kinds),
        prog=f"lighthouse {command}",
        description=description,
        epilog=example,
        formatter_class=_Formatter,
        allow_abbrev=False,
        add_help=False,
    )
    general = parser.add_argument_group("general")
    general.add_argument("-h", "--help", action="help", help="show this help")
    general.add_argument("--help-all", action="help", help="show also every option of Transformers' TrainingArguments")
    general.add_argument(
        "--config",
        action="append",
        metavar="FILE",
        help="YAML or JSON file with options by the same names. The command line takes precedence, and a later file "
        "over an earlier one. Every run writes its own config.yaml into its folder.",
    )
    shown = field_names(*kinds, MethodOptions) | {"help", "help_all", "config"}
    for action in configuration.actions_of(parser):
        if action.dest in WORD_OR_SWITCH:
            action.type = _word_or_switch
        if action.const is False and action.nargs == 0:  # HfArgumentParser gives --no_x the help of --x
            action.help = f"The same as --{action.dest} false."
        if not whole_help and action.dest not in shown:
            action.help = argparse.SUPPRESS
    return parser, general


def _word_or_switch(text: str) -> str | bool:
    try:
        return string_to_bool(text)
    except argparse.ArgumentTypeError:
        return text


def parse_run(parser: RunParser, arguments: Sequence[str]) -> tuple[PretrainOptions, TrainingOptions, list]:
    """What `run_parser`'s parser reads on a command line and in the files that it names; at the end the command's own.

    Raises `ValueError`, `TypeError` or `OSError`; `SystemExit` as argparse does.
    """
    arguments = list(arguments)
    for name in configuration.names_in(arguments):
        configuration.set_defaults(configuration.read(name), parser, f"config={name!r}")
    try:
        *more, model, data, lighthouse, training, general = parser.parse_args_into_dataclasses(
            arguments, look_for_args_file=False
        )
    except ImportError as error:  # a package that an option needs is missing
        raise ValueError(str(error)) from error
    except DistNetworkError as error:
        port = f"{os.environ.get('MASTER_ADDR')}:{os.environ.get('MASTER_PORT')}"
        raise OSError(
            f"the processes could not connect at {port}: {error}\n"
            "Use another port: torchrun --master_port, or MASTER_PORT in the environment"
        ) from error
    return PretrainOptions(**asdict(model), **asdict(data), **asdict(lighthouse)), training, [*more, general]


class _Formatter(argparse.ArgumentDefaultsHelpFormatter):
    """Defaults after each option, the examples as they are written, one spelling of each option."""

    def _get_help_string(self, action):
        if action.default in (None, False, [], argparse.SUPPRESS):
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
