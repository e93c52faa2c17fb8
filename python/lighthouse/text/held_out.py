"""Which documents are held out, and their rows.

Whole documents are, so that no part of one is trained on: random ones of files and loaded datasets, random runs of
neighbours of files in the order of their paths, the first of a stream. Where no whole file can be, as of a single one,
it is the end of the largest, which is then a document of its own. They are recognized by their content, not by
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
        if source.kind == "files":
            if read > 0:
                corpus.check_enough(int(total * tokens / read), "about ")
            return _hold_out_an_end(corpus)
        raise ValueError(_nothing_to_hold_out(corpus, tokens))
    ids = np.concatenate(found)
    rows = ids[: tokens // context * context].reshape(-1, context)[: corpus.most_held_out]
    unknown = 0.0 if encoder.unknown is None else float((ids == encoder.unknown).mean())
    return HeldOut(chosen, rows, spent, tokens / read, unknown)


def _hold_out_an_end(corpus) -> HeldOut:
    """The end of the largest file, where no whole one can be held out; the corpus has it as a document of its own.

    As long as whole documents would be. Raises `ValueError` if it holds no context, or too little is left.
    """
    source, context, encoder = corpus.source, corpus.context, corpus.encoder
    number = max(range(len(source)), key=lambda number: source.files[number].bytes)
    _check_that_none_is_a_copy(corpus, number)
    length = source.length(number)
    total = source.total_bytes - source.files[number].bytes + length
    wanted, of_a_token = corpus.most_held_out * context, 1 if encoder.is_bytes else BYTES_PER_TOKEN
    tenth, half = int(MOST * total), min(int(MOST_AT_ALL * total), length - 1)
    size = min(wanted * of_a_token, max(tenth, context * of_a_token), half)
    while True:
        line, character = source.seam(number, length - size, size // 8)
        parted = source.parted(number, line if length - line <= half else character, length)
        digest = TextDigest()
        found = [ids for _, _, ids in tokens_of(iter([(number + 1, digest.reading(parted.one(number + 1)))]), encoder)]
        tokens = sum(map(len, found))
        if tokens >= wanted or size >= half or (tokens >= context and size >= tenth):
            break
        size = min(2 * size, half if tokens < context else tenth)
    corpus.check_enough(int(total * tokens / digest.bytes) + 1, "" if encoder.is_bytes else "about ")
    if tokens < context:
        raise ValueError(_nothing_to_hold_out(corpus, tokens))
    if digest.digest() == BLANK:
        raise ValueError(
            f"{source.files[number].path}: its end is held out, but has blanks and line ends alone: cut them off"
        )
    ids = np.concatenate(found)
    rows = ids[: tokens // context * context].reshape(-1, context)[: corpus.most_held_out]
    unknown = 0.0 if encoder.unknown is None else float((ids == encoder.unknown).mean())
    corpus.source = parted
    return HeldOut({number + 1: digest.digest()}, rows, digest.bytes, tokens / digest.bytes, unknown)


def _check_that_none_is_a_copy(corpus, number: int) -> None:
    """Raises `ValueError` where another file has the text of the one whose end is held out: it would be trained on."""

    def digest_of(other: int) -> bytes | None:
        digest = TextDigest()
        try:
            for _ in digest.reading(corpus.source.one(other)):
                pass
        except NotText:
            return None
        return digest.digest()

    own = digest_of(number)
    copy = next((other for other in range(len(corpus.source)) if other != number and digest_of(other) == own), None)
    if copy is not None:
        paths = [corpus.source.files[each].path for each in (number, copy)]
        raise ValueError(
            f"{paths[0]} and {paths[1]} have the same text, and the end of one is held out while the other would be "
            "trained on: leave one of them out"
        )


def _nothing_to_hold_out(corpus, tokens: int) -> str:
    if corpus.source.kind == "files":
        return (
            f"{corpus.name}: neither a choice of its {len(corpus.source)} files nor the end of the largest holds out a "
            f"context of {corpus.context:,} tokens and leaves half of the text to train on: use a shorter context, or "
            f"more text{corpus.but_for}"
        )
    return (
        f"{corpus.name}: whole documents are held out, but no choice of them holds out a context of {corpus.context:,} "
        f"tokens and leaves half of the text to train on (found: {tokens:,} tokens); split the largest documents"
    )
