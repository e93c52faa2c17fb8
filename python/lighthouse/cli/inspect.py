"""`lighthouse inspect`: which tokens of a text each layer and head of a model keeps, and at which level."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path

from lighthouse.training.extra import require_train_extra

require_train_extra()

import torch  # noqa: E402
from transformers import AutoModelForCausalLM  # noqa: E402
from transformers.utils.logging import disable_progress_bar  # noqa: E402

from lighthouse import LighthouseWrapper  # noqa: E402
from lighthouse.huggingface.inspection import choices_of  # noqa: E402
from lighthouse.report import choice  # noqa: E402
from lighthouse.training.options import number  # noqa: E402
from lighthouse.training.tokenizer import Encoder, load_tokenizer  # noqa: E402

EXAMPLE = """\
example:
  lighthouse inspect runs/books/model --text book.txt --output inspected
"""


def main(arguments: Sequence[str]) -> int:
    options = _parser().parse_args(arguments)
    disable_progress_bar()
    try:
        paths = _inspect(options)
    except (OSError, ValueError, TypeError) as error:
        print(f"lighthouse inspect: error: {error}", file=sys.stderr)
        return 2
    if options.json == "-":
        print(Path(paths["json"]).read_text(), end="")
        return 0
    if options.json:
        Path(options.json).write_text(Path(paths["json"]).read_text())
    numbers = json.loads(Path(paths["json"]).read_text())
    print(f"{numbers['tokens']:,} tokens, a sub-sequence of {numbers['sub_length']:,} entries")
    print(f"kept as tokens by every head: {numbers['kept_by_every_head_share']:.2%}; by none: ", end="")
    print(f"{numbers['kept_by_no_head_share']:.2%}")
    print(f"Picture: {paths['png']}\nPage:    {paths['html']}")
    return 0


def _inspect(options) -> dict:
    folder = Path(options.model)
    if not (folder / "config.json").is_file():
        raise ValueError(f"model={options.model!r}: a folder with a model of Transformers (config.json) is needed")
    tokenizer_folder = options.tokenizer or (options.model if (folder / "tokenizer_config.json").is_file() else None)
    tokenizer = load_tokenizer(tokenizer_folder)
    model = AutoModelForCausalLM.from_pretrained(folder)
    most = options.context or model.config.max_position_embeddings
    text = _text(options.text)
    ids = Encoder(tokenizer)([text.encode()])[0][:most].tolist()
    if len(ids) < 2:
        raise ValueError(f"text={options.text!r} has {len(ids)} tokens: at least 2 are needed")
    LighthouseWrapper(
        model,
        pool_ratios=[number("pool_ratios", ratio) for ratio in options.pool_ratios],
        select_topk=number("select_topk", options.select_topk),
        dense_layers=options.dense_layers,
        eval="lighthouse",
        min_tokens=0,
        max_share=1.0,
    )
    device = options.device or ("cuda" if torch.cuda.is_available() else "cpu")
    choices = choices_of(model.to(device), torch.tensor([ids], device=device))
    pieces = [tokenizer.decode([i]) or "\ufffd" for i in ids]  # a byte alone may be no character
    title = f"What {folder.parent.name}/{folder.name} keeps of {Path(options.text).name}"
    return choice.save(choices, pieces, title, options.output)


def _text(name: str) -> str:
    try:
        return Path(name).read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"text={name!r} is no UTF-8 text: {error}") from None


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="lighthouse inspect",
        description="Shows which tokens of a text each layer and head of a model keeps, and at which level: a picture, "
        "a page with the text, and numbers.",
        epilog=EXAMPLE,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("model", metavar="MODEL", help="folder with a model of Transformers, a checkpoint say")
    parser.add_argument("--text", required=True, metavar="FILE", help="UTF-8 text")
    parser.add_argument(
        "--context", type=int, help="tokens of the text, from its start (default: what the model allows)"
    )
    parser.add_argument("--tokenizer", help="folder or name of a tokenizer (default: the model's, else bytes)")
    parser.add_argument("--pool_ratios", nargs="+", default=["1/4", "1/16"], metavar="RATIO", help="default: 1/4 1/16")
    parser.add_argument("--select_topk", default="1/64", help="parents per level, a number or a share (default 1/64)")
    parser.add_argument("--dense_layers", type=int, help="layers at each end that stay dense (default: as in training)")
    parser.add_argument("--device", help="default: cuda where there is a GPU, else cpu")
    parser.add_argument("--output", default="inspected", metavar="FOLDER", help="for the files (default: inspected)")
    parser.add_argument("--json", metavar="FILE", help="write the numbers there too; - is standard output")
    return parser
