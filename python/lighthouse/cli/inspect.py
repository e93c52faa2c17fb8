"""`lighthouse inspect`: which tokens of a text each layer and head of a model keeps, and at which level."""

from __future__ import annotations

import argparse
import logging
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lighthouse.training.extra import require_train_extra

require_train_extra()

import torch  # noqa: E402
from safetensors import SafetensorError  # noqa: E402
from transformers import AutoModelForCausalLM  # noqa: E402
from transformers.utils.logging import disable_progress_bar  # noqa: E402

from lighthouse import LighthouseWrapper  # noqa: E402
from lighthouse.cli.parser import Parser  # noqa: E402
from lighthouse.cli.plan import chosen_device  # noqa: E402
from lighthouse.cli.shared import add_method, check_folders, say, write_json  # noqa: E402
from lighthouse.core.method import Method  # noqa: E402
from lighthouse.export.source import checkpoint_in  # noqa: E402
from lighthouse.huggingface.inspection import Choices, choices_of  # noqa: E402
from lighthouse.report import choice  # noqa: E402
from lighthouse.text.tokenizer import Encoder, load_tokenizer  # noqa: E402
from lighthouse.training.result import read_json  # noqa: E402
from lighthouse.training.resume import SETTINGS  # noqa: E402
from lighthouse.training.space import check_writable  # noqa: E402

EXAMPLE = """\
example:
  lighthouse pretrain --model tiny --context 2048 --steps 60 --save_steps 30 --output_dir runs/first
  lighthouse inspect runs/first/model --text README.md --output inspected
"""


LONGEST_TOKEN = 64  # characters, of most tokens: of a text much longer than the context the rest is not even read


def main(arguments: Sequence[str]) -> int:
    """Runs `lighthouse inspect` and returns the exit status."""
    options = _parser().parse_args(arguments)
    disable_progress_bar()
    try:
        choices, pieces, notes = _choices(options)
    except (OSError, ValueError, TypeError) as error:
        print(f"lighthouse inspect: error: {error}", file=sys.stderr)
        return 2
    except torch.OutOfMemoryError as error:
        print(f"lighthouse inspect: error: {error}; a shorter --context, or --device cpu", file=sys.stderr)
        return 1
    say("drawing")
    model, text = Path(options.model).resolve(), Path(options.text)
    numbers = choice.summary(choices) | {"notes": notes}
    try:
        paths = choice.save(
            choices, pieces, f"What {model.parent.name}/{model.name} keeps of {text.name}", options.output
        )
        write_json(numbers, options.json)
    except OSError as error:
        print(f"lighthouse inspect: error: {error}", file=sys.stderr)
        return 1
    for note in notes:
        print(f"Note: {note}.", file=sys.stderr if options.json == "-" else sys.stdout)
    if options.json != "-":
        window = numbers["local_window"]
        beside = f"; beside it, exact attention to the last {window:,} tokens, kept or not" if window else ""
        print(f"{numbers['tokens']:,} tokens, a sub-sequence of {numbers['sub_length']:,} entries{beside}")
        print(f"kept as tokens by every head: {numbers['kept_by_every_head_share']:.2%}; by none: ", end="")
        print(f"{numbers['kept_by_no_head_share']:.2%}")
        print(f"Picture: {paths['png']}\nPage:    {paths['html']}")
    return 0


def _choices(options: argparse.Namespace) -> tuple[Choices, list[str], list[str]]:
    """The choices, the text of each token, and notes on what a user may not expect.

    Raises if options, model or text do not fit.
    """
    device = chosen_device(options)
    folder = Path(options.model)
    if (folder / SETTINGS).is_file():  # of a run
        folder = checkpoint_in(folder)
    if not (folder / "config.json").is_file():
        raise ValueError(
            f"model={options.model!r}: the folder of a run, or of a model of Transformers (config.json), is needed"
        )
    check_folders(options, "json")
    check_writable("output", options.output, weights=False)
    if options.context is not None and options.context < 2:
        raise ValueError(f"context={options.context}: at least 2 tokens are needed")
    _text(options.text, 1)  # a missing text is reported before the model is read
    say("reading the model")
    tokenizer_folder = options.tokenizer or (str(folder) if (folder / "tokenizer_config.json").is_file() else None)
    tokenizer = load_tokenizer(tokenizer_folder)
    try:
        loaded: Any = AutoModelForCausalLM.from_pretrained(folder, local_files_only=True, output_loading_info=True)
    except SafetensorError as error:
        raise ValueError(f"model={options.model!r}: its weights cannot be read, the file is damaged: {error}") from None
    model, loading = loaded
    missing = sorted(loading["missing_keys"])
    if missing:
        raise ValueError(
            f"model={options.model!r}: {len(missing)} of its weights are not in the folder, for example "
            f"{missing[0]}: they would be random numbers; give a complete model"
        )
    most = model.config.max_position_embeddings
    if options.context is not None and options.context > most:
        raise ValueError(f"context={options.context}: the model allows at most {most}")
    most = options.context or most
    ids = _ids(Encoder(tokenizer), options.text, most)
    if len(ids) < 2:
        raise ValueError(f"text={options.text!r} has {len(ids)} tokens: at least 2 are needed")
    LighthouseWrapper(
        model,
        **Method.of(options).values(),
        dense_layers=options.dense_layers,
        eval="lighthouse",
        min_tokens=0,
        max_share=1.0,
    )
    settings = model.lighthouse_settings
    if not settings.method.chooses:
        raise ValueError("select_topk=0 chooses nothing, so there is no choice to show: use a select_topk above 0")
    made = settings.method.plan(len(ids))
    if made.length > made.tokens:
        raise ValueError(
            f"select_topk={options.select_topk}: for the text's {made.tokens:,} tokens this gives a sub-sequence "
            f"of {made.length:,} entries, so the model stays dense; use a smaller --select_topk or a longer text"
        )
    notes = []
    if options.context is not None and len(ids) < options.context:
        notes.append(f"the text has {len(ids):,} tokens, fewer than the {options.context:,} asked for")
    if not made.entries[-1]:
        notes.append(
            f"{made.tokens:,} tokens are fewer than the coarsest window has, {made.windows[-1]:,}: this is dense "
            "attention, and all are kept"
        )
    notes += _trained_otherwise(folder.resolve(), settings)
    say(f"{len(ids):,} tokens through the model")
    logging.disable(logging.WARNING)  # that losses are not comparable: there are none here
    try:
        choices = choices_of(model.to(device), torch.tensor([ids], device=device))
    finally:
        logging.disable(logging.NOTSET)
    return choices, [str(tokenizer.decode([i])) or "\ufffd" for i in ids], notes  # a byte alone may be no character


def _ids(encode: Encoder, name: str, most: int) -> list[int]:
    """Of the first `most` tokens of a text: more of it is read only if these are not in what was read."""
    characters = most * LONGEST_TOKEN
    while True:
        text = _text(name, characters)
        ids = encode([text.encode()])[0]
        if len(ids) > most or len(text) < characters:
            return ids[:most].tolist()
        characters *= 8


def _trained_otherwise(folder: Path, settings) -> list[str]:
    """The settings that the model's run was trained with, if they are not those shown."""
    file = folder.parent / SETTINGS
    if not file.is_file():
        return []
    run = read_json(file)
    if run.get("dense_only"):
        return ["the model was trained with dense attention only"]
    shown = settings.method.values() | {"dense_layers": settings.dense_layers}
    other = [f"{name} {run[name]}" for name, value in shown.items() if name in run and run[name] != value]
    return [f"the model was trained with {', '.join(other)}, not with the settings shown"] if other else []


def _text(name: str, characters: int) -> str:
    """The first of them."""
    if not Path(name).is_file():
        raise ValueError(f"text={name!r} " + ("is no file" if Path(name).exists() else "does not exist"))
    try:
        with open(name, encoding="utf-8") as file:
            return file.read(characters)
    except UnicodeDecodeError as error:
        raise ValueError(f"text={name!r} is not UTF-8 text: {error}") from None


def _parser() -> Parser:
    parser = Parser(
        prog="lighthouse inspect",
        description="Shows which tokens of a text each layer and head of a model keeps, and at which level: a picture, "
        "a page with the text, and numbers.",
        epilog=EXAMPLE,
    )
    parser.add_argument("model", metavar="MODEL", help="folder of a run, a checkpoint or another model of Transformers")
    parser.add_argument("--text", required=True, metavar="FILE", help="UTF-8 text")
    parser.add_argument(
        "--context", type=int, help="tokens of the text, from its start (default: as many as the model allows)"
    )
    parser.add_argument("--tokenizer", help="folder or name of a tokenizer (default: the model's, else bytes)")
    add_method(parser)
    parser.add_argument(
        "--dense_layers", type=int, help="layers at each end that stay dense (default: by the rule of pretrain)"
    )
    parser.add_argument("--device", choices=["cpu", "cuda"], help="default: cuda where there is one")
    parser.add_argument("--output", default="inspected", metavar="FOLDER", help="for the files (default: inspected)")
    parser.add_argument("--json", metavar="FILE", help="write the numbers as JSON to FILE; - is standard output")
    return parser
