"""A run's options as a file: read, checked against the command line's names, and written with the run.

A file's values become command line arguments in front of the user's own, so both have the same names, types and errors,
and the command line wins.
"""

from __future__ import annotations

import argparse
import dataclasses
import difflib
import enum
import json
from collections.abc import Mapping, Sequence
from pathlib import Path

import yaml
from transformers import TrainingArguments

CONFIGURATION = "config.yaml"

# Of the Trainer's options: what says how a run goes on, secrets, what is derived from others or refused, and a former
# name.
LEFT_OUT = ("resume", "resume_from_checkpoint", "hub_token", "push_to_hub_token", "do_eval", "dataloader_pin_memory")
LEFT_OUT += ("num_train_epochs",)
if "activation_checkpointing" in {field.name for field in dataclasses.fields(TrainingArguments)}:
    LEFT_OUT += ("gradient_checkpointing", "gradient_checkpointing_kwargs")


def read(path: str | Path) -> dict:
    """The values of a YAML or JSON file, by option name.

    Raises `FileNotFoundError`, or `ValueError` if it is not a mapping of names to values.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"config={str(path)!r} does not exist")
    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8"))  # JSON is YAML
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ValueError(f"config={str(path)!r} is neither YAML nor JSON: {error}") from None
    if not isinstance(values, dict) or not all(isinstance(name, str) for name in values):
        raise ValueError(f"config={str(path)!r}: names with values are needed, such as 'context: 8192'")
    return values


def as_arguments(values: Mapping, parser: argparse.ArgumentParser, source: str) -> list[str]:
    """The values as command line arguments of `parser`. `None` leaves an option at its default.

    Raises `ValueError` for a name that the parser does not have, with the nearest that it has.
    """
    actions = {option: action for action in parser._actions for option in action.option_strings}
    arguments = []
    for name, value in values.items():
        action = actions.get(f"--{name}")
        if action is None or isinstance(action, (argparse._HelpAction, argparse._StoreTrueAction)):
            names = [option[2:] for option, action in actions.items() if action.nargs != 0]
            near = difflib.get_close_matches(name, names, n=1)
            raise ValueError(f"{source}: there is no option {name!r}" + (f"; nearest: {near[0]!r}" if near else ""))
        if value is None or (value is False and action.type is str):  # such as fsdp, which is text or a switch
            continue
        if isinstance(value, list):
            if action.nargs not in ("+", "*"):
                raise ValueError(f"{source}: {name} is a list: one value is needed")
            arguments += [f"--{name}", *map(_text, value)]
        elif value is True and action.const is True:
            arguments.append(f"--{name}")
        else:
            arguments.append(f"--{name}={_text(value)}")
    return arguments


def _text(value) -> str:
    return json.dumps(value) if isinstance(value, (dict, list)) else str(value)


def resolved(options, training) -> dict:
    """Every option of a run by name, as a file takes it: all of ours, and of the Trainer's those that were changed."""
    groups = type(options).__bases__  # model, data, Lighthouse
    values = {name: getattr(options, name) for group in groups for name in group.__annotations__}
    declared = vars(type(training))["__annotations__"]
    for field in dataclasses.fields(training):
        if not field.init or field.name in LEFT_OUT:
            continue
        value = _plain(getattr(training, field.name))
        if field.name in declared or (value is not None and value != _default(field, training)):
            values[field.name] = value
    return values


def changed(training, name: str) -> bool:
    """Whether an option of the Trainer is another than by default: our default, where we have one."""
    field = next((field for field in dataclasses.fields(training) if field.name == name), None)
    value = _plain(getattr(training, name, None))
    return field is not None and value is not None and value != _default(field, training)


def _default(field: dataclasses.Field, training):
    if field.default_factory is not dataclasses.MISSING:
        return _plain(field.default_factory())
    value = getattr(training, field.name, None)
    if field.default is None and dataclasses.is_dataclass(value):
        return _plain(type(value)())  # the Trainer makes one of None
    return _plain(field.default)


def _plain(value):
    """As YAML has it: numbers, text, lists and mappings of them; a list of one is that one."""
    if isinstance(value, enum.Enum):
        return value.value
    if isinstance(value, (list, tuple)):
        return _plain(value[0]) if len(value) == 1 else [_plain(item) for item in value] or None
    if isinstance(value, Mapping):
        return {name: _plain(item) for name, item in value.items()} or None
    if dataclasses.is_dataclass(value):
        return _plain(dataclasses.asdict(value))
    return value if value is None or isinstance(value, (bool, int, float, str)) else str(value)


def text_of(values: Mapping) -> str:
    """YAML of `resolved` values, in their order."""
    return yaml.safe_dump(dict(values), sort_keys=False, allow_unicode=True, default_flow_style=None, width=120)


def names_in(arguments: Sequence[str]) -> list[str]:
    """The files that `--config` names on a command line."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--config", action="append", default=[])
    return parser.parse_known_args(arguments)[0].config
