"""A run's options as a file: read, checked against the command line's names, and written with the run.

A file's values become the command line's defaults: both have the same names, types and errors, and the command line
wins. The trap is YAML's own types: an unquoted `no` is false to it, 010 is 8 and 1.10 is 1.1. So a value is read as
text, which its option's type converts.

The command line is that of HfArgumentParser, Transformers' own for `TrainingArguments`. tyro takes a file's values as
options that are made before the command line is read, so `__post_init__`, which joins processes, would run twice;
jsonargparse has no second name of an option in a file, such as `steps`. Neither makes this file shorter.
"""

from __future__ import annotations

import argparse
import dataclasses
import difflib
import enum
import types
import typing
from collections.abc import Mapping, Sequence
from pathlib import Path

import yaml
from transformers import TrainingArguments
from transformers.hf_argparser import string_to_bool

from lighthouse.training.depends import NOTHING, on_which

CONFIGURATION = "config.yaml"

# Trainer options that are not written: how a run resumes, secrets, derived or refused ones, what the launcher sets,
# and a former name.
LEFT_OUT = {"resume", "resume_from_checkpoint", "hub_token", "push_to_hub_token", "do_eval", "num_train_epochs"}
LEFT_OUT |= {"local_rank"}
if "activation_checkpointing" in {field.name for field in dataclasses.fields(TrainingArguments)}:
    LEFT_OUT |= {"gradient_checkpointing", "gradient_checkpointing_kwargs"}

STANDARD = "tag:yaml.org,2002:"


def read(path: str | Path) -> dict:
    """The values of a YAML or JSON file, by option name.

    Each is the text that is written there, None for null, a list of these, or a mapping with YAML's types.

    Raises `FileNotFoundError`, or `ValueError` if it is not a mapping of names, each given once, to values.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"config={str(path)!r} does not exist")
    try:
        loader = yaml.SafeLoader(path.read_text(encoding="utf-8"))  # JSON is YAML
        root = loader.get_single_node()
        named = isinstance(root, yaml.MappingNode) and all(isinstance(name, yaml.ScalarNode) for name, _ in root.value)
        if not isinstance(root, yaml.MappingNode) or not named:
            raise ValueError(f"config={str(path)!r}: names with values are needed, such as 'context: 8192'")
        _check_once(root, f"config={str(path)!r}")
        loader.flatten_mapping(root)
        return {name.value: _written(node, loader) for name, node in root.value}
    except (yaml.YAMLError, UnicodeDecodeError, RecursionError) as error:
        raise ValueError(f"config={str(path)!r} is neither YAML nor JSON: {error}") from None


def _check_once(node: yaml.Node, source: str) -> None:
    """Raises `ValueError` for a name that a mapping has twice; YAML would use the last."""
    names = set()
    for item in node.value if isinstance(node, yaml.CollectionNode) else ():
        name, value = item if isinstance(node, yaml.MappingNode) else (None, item)
        if isinstance(name, yaml.ScalarNode):
            if name.value in names:
                line = name.start_mark.line + 1
                raise ValueError(f"{source}: {name.value!r} appears twice, again in line {line}; remove one of them")
            names.add(name.value)
        _check_once(value, source)


def _written(node: yaml.Node, loader: yaml.SafeLoader):
    if isinstance(node, yaml.SequenceNode):
        return [_written(item, loader) for item in node.value]
    if isinstance(node, yaml.ScalarNode) and node.tag.startswith(STANDARD) and node.tag != STANDARD + "null":
        return node.value
    return loader.construct_object(node, deep=True)


def set_defaults(values: Mapping, parser: argparse.ArgumentParser, source: str) -> None:
    """Makes the values, as `read` has them, the defaults of `parser`.

    Raises `ValueError` for a name that the parser does not have, with the nearest that it has, for a value that is not
    of its option's type, and for an option that is given by two names.
    """
    actions = {
        option[2:]: action
        for action in actions_of(parser)
        for option in action.option_strings
        if option.startswith("--") and action.nargs != 0 and action.dest != "config"
    }
    kinds: dict[str, set] = {}
    for options in getattr(parser, "dataclass_types", ()):
        kinds |= kinds_of(options)
    given: dict[str, str] = {}
    for name, value in values.items():
        action = actions.get(name)
        if action is None:
            near = difflib.get_close_matches(str(name), actions, n=1)
            raise ValueError(f"{source}: there is no option {name!r}" + (f"; nearest: {near[0]!r}" if near else ""))
        if action.dest in given:
            raise ValueError(f"{source}: {given[action.dest]!r} and {name!r} are the same option; remove one of them")
        given[action.dest] = name
        try:
            found = _converted(value, action, kinds.get(action.dest, {type(None)}))
        except ValueError as error:
            raise ValueError(f"{source}: {name}: {error}") from None
        parser.set_defaults(**{action.dest: found})


def actions_of(parser: argparse.ArgumentParser) -> list[argparse.Action]:
    """The options of a parser, which argparse lists nowhere else."""
    return parser._actions


def _converted(value, action: argparse.Action, kinds: set):
    """The value of an option from what is written for it. Raises `ValueError`."""
    many = action.nargs in ("+", "*")
    if value is None:
        if type(None) not in kinds:
            what = "it is null: a value is needed; leave it out for the default"
            raise ValueError(what if action.default is None else f"{what}, {action.default!r}")
        return None
    if isinstance(value, Mapping):
        if dict not in kinds:
            raise ValueError("it is a mapping: one value is needed")
        return dict(value)
    if isinstance(value, list):
        if not (many or list in kinds):
            raise ValueError("it is a list: one value is needed")
        return [_one(item, action) for item in value]
    return [_one(value, action)] if many else _one(value, action)


def _one(text, action: argparse.Action):
    if not isinstance(text, str):
        raise ValueError(f"{text!r} in a list: a value is needed")
    if action.type is string_to_bool:
        text = {"on": "true", "off": "false"}.get(text.lower(), text)  # YAML's, and not the command line's
    reader = argparse.ArgumentParser(add_help=False, exit_on_error=False)
    reader.add_argument("--value", type=action.type or str, choices=action.choices)
    try:
        return reader.parse_args([f"--value={text}"]).value
    except argparse.ArgumentError as error:
        raise ValueError(error.message) from None


def kinds_of(options: type) -> dict[str, set]:
    """The types that each option of a dataclass may have: a list and a dict without those of their items.

    An option that is declared once more keeps the types that it had: ours say what the command line takes.
    """
    found: dict[str, set] = {}
    for declares in options.__mro__[:-1]:
        for name, hint in typing.get_type_hints(declares).items():
            union = typing.get_origin(hint) in (typing.Union, types.UnionType)
            kinds = {typing.get_origin(kind) or kind for kind in (typing.get_args(hint) if union else (hint,))}
            found[name] = found.get(name, set()) | kinds
    return found


def resolved(options, training) -> dict:
    """Every option of a run by name, as a file takes it: all of ours, and of the Trainer's those that were changed."""
    groups = type(options).__bases__  # model, data, Lighthouse
    values = {field.name: getattr(options, field.name) for group in groups for field in dataclasses.fields(group)}
    values |= options.method.written()
    declared = vars(type(training))["__annotations__"]
    for field in dataclasses.fields(training):
        if not field.init or field.name in LEFT_OUT or _follows_from_the_device(field.name, training):
            continue
        value = _plain(getattr(training, field.name))
        if field.name in declared or value != _default(field, training):
            values[field.name] = value
    reports = values["report_to"]  # the Trainer has a list, empty for none
    values["report_to"] = "none" if not reports else reports[0] if len(reports) == 1 else reports
    return values


def given(options, training) -> list[str]:
    """Of the `resolved` options those that somebody chose; not the text's and the folder's, which are said besides."""
    usual = resolved(type(options)(), training)
    ours = {field.name for field in dataclasses.fields(options)}
    apart = on_which(NOTHING) | {"data", "output_dir", "disable_tqdm"}
    return [
        f"{name} {' '.join(map(str, value)) if isinstance(value, list) else value}"
        for name, value in resolved(options, training).items()
        if name not in apart and (value != usual[name] if name in ours else changed(training, name))
    ]


def _follows_from_the_device(name: str, training) -> bool:
    return name == "dataloader_pin_memory" and training.device.type == "cpu"


def changed(training, name: str) -> bool:
    """Whether an option of the Trainer differs from its default: ours, where we have one."""
    field = next((field for field in dataclasses.fields(training) if field.name == name), None)
    if field is None:
        return False
    value, usual = _plain(getattr(training, name, None)), _default(field, training)
    if usual is None and value is False:
        return False  # which the Trainer makes of it
    return value not in (usual, [usual])  # and of one name a list


def _default(field: dataclasses.Field, training):
    if field.default_factory is not dataclasses.MISSING:
        return _plain(field.default_factory())
    value = getattr(training, field.name, None)
    if field.default is None and dataclasses.is_dataclass(value) and not isinstance(value, type):
        return _plain(type(value)())  # the Trainer makes one of None
    if field.default == "" and value == []:
        return []  # and an empty list of no text
    return _plain(field.default)


def _plain(value):
    """As YAML has it: numbers, text, lists and mappings of them."""
    if isinstance(value, enum.Enum):
        return value.value
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    if isinstance(value, Mapping):
        return {name: _plain(item) for name, item in value.items()}
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
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
