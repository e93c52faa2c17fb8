"""Which documents are held out, and their rows.

Whole documents are, so that no part of one is trained on: random ones of files and loaded datasets, random runs of
neighbours of files in the order of their paths, the first of a stream. They are recognized by their content, not by
their names: no copy of one is trained on either.

The trap: one document may be most of the text. Shares are of bytes and never of documents, and what a compressed file
holds is known only when it was read.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from lighthouse.text.documents import BLANK, NotText, TextDigest
from lighthouse.text.tokenizer import tokens_of

MOST = 0.1  # of the text, once there is a context
MOST_AT_ALL = 0.5
BYTES_PER_TOKEN = 4  # roughly, where bytes are not the tokens


@dataclass(frozen=True)
class HeldOut:
    """Documents that are not trained on, and the rows cut from them."""

    documents: dict[int | str, bytes]  # the source's name of each, and its `TextDigest`
    rows: np.ndarray  # [rows, context]
    bytes: int  # of these documents, whole
    tokens_per_byte: float
    unknown: float  # share of the tokens that are the tokenizer's unknown one


def hold_out(corpus) -> HeldOut:
    """Documents of a `Corpus`, until they hold as many rows as it wants, or a tenth of the text and one row.

    Raises `ValueError` if no choice of whole documents holds a row and leaves half of the text.
    """
    source, context, encoder = corpus.source, corpus.context, corpus.encoder
    wanted = corpus.most_held_out * context
    if source.kind == "stream":
        candidates, total = ((key, 0, pieces) for key, pieces in source.first()), math.inf
    else:
        total = source.total_bytes
        run = 2 * context * (1 if encoder.is_bytes else BYTES_PER_TOKEN)
        candidates = ((number, size, None) for number, size in source.sizes(run))
    chosen: dict = {}
    found, tokens, spent, read = [], 0, 0, 0

    def counted(pieces):
        nonlocal read
        for piece in pieces:
            read += len(piece)
            yield piece

    for key, size, pieces in candidates:
        if tokens >= wanted or (tokens >= context and spent >= total * MOST):
            break
        if spent + size > total * MOST_AT_ALL:
            continue
        here, length, digest = [], 0, TextDigest()
        try:
            pieces = digest.reading(source.one(key) if pieces is None else pieces)
            for _, _, ids in tokens_of(iter([(key, counted(pieces))]), encoder, batch=1):
                here.append(ids)
                length += len(ids)
                if tokens + length >= wanted:
                    break
            for _ in pieces:  # its digest is that of the whole document
                pass
        except NotText:
            if source.kind == "files" and source.files[key].named:
                raise
            continue
        total += digest.bytes - size
        if spent + digest.bytes > total * MOST_AT_ALL:
            continue
        if digest.digest() != BLANK and digest.digest() not in chosen.values():
            chosen[key] = digest.digest()
            found += here
            tokens, spent = tokens + length, spent + digest.bytes
    else:
        if source.kind == "stream":
            raise ValueError(
                f"{corpus.name} has fewer than the {corpus.most_held_out} x {context:,} tokens to hold out, so nothing "
                "is left to train on: leave out stream, or lower held_out"
            )
    if tokens < context:
        if source.kind == "files" and read > 0:
            corpus.check_enough(int(total * tokens / read), "about ")
        raise ValueError(_nothing_to_hold_out(corpus, tokens))
    ids = np.concatenate(found)
    rows = ids[: tokens // context * context].reshape(-1, context)[: corpus.most_held_out]
    unknown = 0.0 if encoder.unknown is None else float((ids == encoder.unknown).mean())
    return HeldOut(chosen, rows, spent, tokens / read, unknown)


def _nothing_to_hold_out(corpus, tokens: int) -> str:
    if corpus.source.kind == "files":
        largest = max(file.bytes for file in corpus.source.files)
        return (
            f"{corpus.name}: whole files are held out, but no choice of its {len(corpus.source)} files holds out a "
            f"context of {corpus.context:,} tokens and leaves half of the text to train on: split the largest, "
            f"of {largest:,} bytes{corpus.but_for}"
        )
    return (
        f"{corpus.name}: whole documents are held out, but no choice of them holds out a context of {corpus.context:,} "
        f"tokens and leaves half of the text to train on (found: {tokens:,} tokens); split the largest documents"
    )
