"""`lighthouse evaluate`: what a model makes of a long context: loss by position, copies by distance, passkeys."""

from __future__ import annotations

import argparse
import shlex
import sys
from collections.abc import Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

from lighthouse.training.extra import require_train_extra

require_train_extra()

import torch  # noqa: E402
from transformers.utils.logging import disable_progress_bar  # noqa: E402

from lighthouse.cli.parser import Parser  # noqa: E402
from lighthouse.cli.plan import chosen_device  # noqa: E402
from lighthouse.cli.shared import check_folders, say, write_json  # noqa: E402
from lighthouse.core.devices import device_name  # noqa: E402
from lighthouse.core.files import write_whole  # noqa: E402
from lighthouse.evaluation import EvaluationSettings, evaluate  # noqa: E402
from lighthouse.evaluation.found import Found, find_model, weights_digest  # noqa: E402
from lighthouse.evaluation.kept import Kept  # noqa: E402
from lighthouse.evaluation.results import PARTS  # noqa: E402
from lighthouse.evaluation.text import Text, text_of_data, text_of_run  # noqa: E402
from lighthouse.export.source import checkpoint_in  # noqa: E402
from lighthouse.report.evaluated import figures, summary  # noqa: E402
from lighthouse.report.page import png_of  # noqa: E402
from lighthouse.training.options import DataOptions  # noqa: E402
from lighthouse.training.result import versions  # noqa: E402
from lighthouse.training.resume import SETTINGS  # noqa: E402
from lighthouse.training.space import check_writable  # noqa: E402

EXAMPLE = """\
examples:
  lighthouse pretrain --model tiny --context 2048 --steps 60 --save_steps 30 --output_dir runs/first
  lighthouse evaluate runs/first --output_dir evaluated                    on what the run held out
  lighthouse evaluate runs/first/checkpoint-30 --data docs --order path --parts loss copy --output_dir early
"""

DTYPES = ("float32", "bfloat16", "float16")
TEXT = ("data", "order", "dataset", "dataset_config", "dataset_split", "text_column", "stream")


def main(arguments: Sequence[str]) -> int:
    """Runs `lighthouse evaluate` and returns the exit status."""
    arguments = list(arguments)
    options = _parser().parse_args(arguments)
    disable_progress_bar()
    try:
        kept = _measured(options, shlex.join(["lighthouse", "evaluate", *arguments]))
    except (OSError, ValueError, TypeError) as error:
        print(f"lighthouse evaluate: error: {error}", file=sys.stderr)
        return 2
    except torch.OutOfMemoryError as error:
        print(
            f"lighthouse evaluate: error: {error}; a shorter --context, --dtype bfloat16, or --device cpu; what was "
            "measured is kept",
            file=sys.stderr,
        )
        return 1
    except KeyboardInterrupt:
        print("The evaluation is not finished; the same command continues with the next part.", file=sys.stderr)
        raise
    found = kept.evaluation()
    try:
        paths = []
        for part, figure in figures({Path(options.model).name: found}).items():
            paths.append(kept.folder / f"{part}.png")
            write_whole(paths[-1], png_of(figure))
        write_json(kept.to_json(), options.json)
    except OSError as error:
        print(f"lighthouse evaluate: error: {error}", file=sys.stderr)
        return 1
    if options.json != "-":
        print("\n".join([*summary(found), f"Numbers:  {kept.file}", f"Pictures: {', '.join(map(str, paths))}"]))
    return 0


def _measured(options: argparse.Namespace, command: str) -> Kept:
    """All that was asked for, measured or found in the folder. Raises if options, model or text do not fit."""
    device = chosen_device(options)
    check_folders(options, "json")
    check_writable("output_dir", options.output_dir, weights=False)
    settings = EvaluationSettings(
        **{field.name: getattr(options, field.name) for field in fields(EvaluationSettings) if field.name != "parts"},
        parts=tuple(options.parts),
    )
    if options.rows < 1:
        raise ValueError(f"rows={options.rows}: at least one is needed")
    model_found = _model(options)
    text = _text(options, model_found, settings)
    say(str(text))
    say("reading the model")
    model = model_found.load(options.dtype, device)
    kept = Kept(
        Path(options.output_dir),
        same={
            "weights": weights_digest(model),
            "tokenizer": model_found.encoder.identity,
            "text": text.digest,
            "context": text.rows.shape[1],
            "rows": len(text.rows),
            "dtype": str(model.dtype).removeprefix("torch."),
            "device": device,
            **settings.of_parts(),
        },
        about={
            "model": options.model,
            "text": text.title,
            "command": command,
            "device": device_name(device),
            "versions": versions(),
        },
    )
    there = [part for part in settings.parts if part in kept.parts]
    if there:
        say(f"already measured, in {kept.file}: {', '.join(there)}")
    evaluate(model, text.rows, model_found.tokenizer, settings, known=kept.parts, found=kept.add, progress=True)
    return kept


def _model(options: argparse.Namespace) -> Found:
    path = Path(options.model)
    is_run = path.is_dir() and ((path / SETTINGS).is_file() or not (path / "config.json").is_file())
    if not path.is_dir() and (path.exists() or options.model.startswith((".", "/", "~"))):
        raise ValueError(f"model={options.model!r} is not a folder: the folder of a model or of a run is needed")
    return find_model(options.model, checkpoint_in(path) if is_run else options.model, options.tokenizer)


def _text(options: argparse.Namespace, model: Found, settings: EvaluationSettings) -> Text:
    """The text asked for, or that which the model's run held out. Raises `ValueError` where it does not fit."""
    of_run = options.data is None and options.dataset is None
    for name in TEXT:
        if of_run and getattr(options, name) != DataOptions.__dataclass_fields__[name].default:
            raise ValueError(f"{name}={getattr(options, name)!r}: it is for text that data or dataset names")
    if of_run and model.run is None:
        raise ValueError(
            f"data: model={options.model!r} is not in the folder of a run, whose held-out text could be taken: name "
            "text that it was not trained on, with data or dataset"
        )
    context = (model.run or {}).get("context") or model.most_tokens if options.context is None else options.context
    if context is None:
        raise ValueError(f"context: the configuration of model={options.model!r} names no length: give one")
    if model.most_tokens is not None and context > model.most_tokens:
        raise ValueError(f"context={context}: the model allows at most {model.most_tokens:,} (max_position_embeddings)")
    settings.check_context(context)
    if of_run:
        return text_of_run(model.run or {}, context, options.rows)
    data = DataOptions(**{name: getattr(options, name) for name in TEXT})
    return text_of_data(data, model.encoder, context, options.rows, options.seed, model.begin)


def _parser() -> Parser:
    parser = Parser(
        prog="lighthouse evaluate",
        description="Measures what a model makes of a long context, with dense attention: the held-out loss by "
        "position in the context, the loss on a random passage that appears twice by the distance between the two, and "
        "the retrieval of a passkey by length and depth. Writes numbers and a picture of each. If it is interrupted, "
        "the same command continues.",
        epilog=EXAMPLE,
    )
    parser.add_argument(
        "model",
        metavar="MODEL",
        help="folder of a run, a checkpoint or an export, or a folder or name of any causal language model of "
        "Transformers",
    )
    text = parser.add_argument_group("text (default: what the model's run held out)")
    for field in fields(DataOptions):
        if field.name in TEXT:
            _add(text, field)
    text.add_argument(
        "--tokenizer", metavar="NAME", help="folder or name (default: the model's or its run's, else bytes)"
    )
    text.add_argument(
        "--context", type=int, help="tokens in a row (default: the run's, else all that the model allows)"
    )
    text.add_argument("--rows", type=int, default=16, help="rows of text, at most, from its beginning (default: 16)")
    measures = parser.add_argument_group("measures")
    defaults = EvaluationSettings()
    measures.add_argument("--parts", nargs="+", choices=list(PARTS), default=list(PARTS), help="default: all three")
    for name, what in {
        "passages": "passages that are planted, for each distance",
        "depths": "depths at which a key is hidden",
        "trials": "keys that are hidden at each length and depth",
        "seed": "of passages, keys, their places and the order of shuffled files",
    }.items():
        default = getattr(defaults, name)
        measures.add_argument(f"--{name}", type=int, default=default, metavar="N", help=f"{what} (default: {default})")
    parser.add_argument("--device", choices=["cpu", "cuda"], help="default: cuda where there is one")
    parser.add_argument("--dtype", choices=DTYPES, help="of the weights (default: the one they are saved in)")
    parser.add_argument(
        "--output_dir", default="evaluated", metavar="FOLDER", help="for the files (default: evaluated)"
    )
    parser.add_argument("--json", metavar="FILE", help="write the numbers as JSON to FILE too; - is standard output")
    return parser


def _add(group, field) -> None:
    """An option of a text, as pretrain has it."""
    kinds: dict[str, Any] = {"default": field.default, "help": field.metadata["help"]}
    if field.name == "data":
        kinds |= {"nargs": "+", "metavar": "PATH"}
        kinds["help"] = kinds["help"].replace(" Default: the sources of the running Python's standard library.", "")
    elif field.name == "order":
        kinds["choices"] = ["shuffled", "path"]
    elif field.name == "stream":
        kinds["action"] = "store_true"
    group.add_argument(f"--{field.name}", **kinds)
