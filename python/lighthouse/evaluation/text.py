"""The text that a model is evaluated on, as rows of ids: what its run held out, or any other text."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, fields

import numpy as np
import torch

from lighthouse.text.data import find_corpus, open_source
from lighthouse.text.documents import shown
from lighthouse.text.tokenizer import Encoder, load_tokenizer, tokens_of
from lighthouse.training.options import DataOptions


@dataclass(frozen=True)
class Text:
    """Rows of ids `[R, N]`, and what they are of."""

    title: str
    rows: torch.Tensor

    @property
    def digest(self) -> str:
        return hashlib.sha256(self.rows.numpy().tobytes()).hexdigest()[:32]

    def __str__(self) -> str:
        rows, context = self.rows.shape
        return f"{self.title}: {rows:,} x {context:,} tokens"


def text_of_run(run: dict, context: int, most: int) -> Text:
    """What a run held out, found again by the run's settings and cut anew, into at most `most` rows of `context`.

    Raises:
        ValueError: the text is not where it was, has changed, or what is held out of it is shorter than a context.
    """
    options = DataOptions(**{field.name: run[field.name] for field in fields(DataOptions) if field.name in run})
    way = "name held-out text with data or dataset"
    try:
        tokenizer = load_tokenizer(run["tokenizer"])
        corpus = find_corpus(options, context=run["context"], seed=run["seed"], tokenizer=tokenizer)
    except (OSError, ValueError) as error:
        raise ValueError(f"the text of the model's run cannot be found again, {error}: {way}") from error
    if corpus.fingerprint != run["text"]:
        raise ValueError(f"{corpus.name}, the text of the model's run, has changed since: {way}")
    return _cut(f"held out of {shown(corpus.source.title)}", corpus.held_out.rows.reshape(-1), context, most, None)


def text_of_data(
    options: DataOptions, encoder: Encoder, context: int, most: int, seed: int, begin: int | None = None
) -> Text:
    """The first tokens of a text in its order, in at most `most` rows of `context`; `begin` is each row's first token.

    `seed` is of the order of shuffled files.

    Raises:
        ValueError, OSError: as `open_source` does, or the text is shorter than a context.
    """
    source = open_source(options, seed)
    parts: list[np.ndarray] = []
    tokens, wanted = 0, most * context
    for _, _, ids in tokens_of(source.training({}), encoder):
        parts.append(ids)
        tokens += len(ids)
        if tokens >= wanted:
            break
    ids = np.concatenate(parts) if parts else np.empty(0, encoder.dtype)
    return _cut(shown(source.title), ids, context, most, begin)


def _cut(title: str, ids: np.ndarray, context: int, most: int, begin: int | None) -> Text:
    own = context if begin is None else context - 1  # tokens of the text in a row
    if len(ids) < own:
        raise ValueError(f"{title} has {len(ids):,} tokens: at least one context of {context:,} is needed")
    rows = torch.from_numpy(ids[: min(most, len(ids) // own) * own].astype(np.int64)).view(-1, own)
    if begin is not None:
        rows = torch.cat([torch.full((len(rows), 1), begin), rows], 1)
    return Text(title, rows)
