"""Text to rows of token ids, each one context long: what is held out, how the rest is cut, and where a row came from.

Documents are tokenised without special tokens, joined with an end mark behind each, and cut. Rows are cut once, into a
memory-mapped file of `datasets`' cache, or, where the text is streamed, while training. The trap: everything that
changes rows must be in the cache's key, `_key`.
"""

from __future__ import annotations

import errno
import hashlib
import json
import logging
import os
import shutil
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import datasets
import numpy as np
import pyarrow as pa
import torch
from filelock import FileLock
from tqdm.auto import tqdm

from lighthouse.training import documents
from lighthouse.training.documents import NotText, standard_library  # noqa: F401
from lighthouse.training.tokenizer import Encoder, load_tokenizer  # noqa: F401

# Part of the cache's key: raise it when the same text is to give other rows.
ROWS_VERSION = 2

MOST_HELD_OUT = 0.1
BATCH = 2**22  # bytes tokenised at a time
BLOCK = 2**21  # tokens written at a time, or a row
SHUFFLED = 2**23  # tokens among which a streamed row is drawn, or 16 rows

ROWS, ENDS, ABOUT = "rows.arrow", "ends.i64", "about.json"

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class HeldOut:
    """Documents that are not trained on, and the rows cut from them."""

    documents: frozenset  # what the source names them by
    rows: np.ndarray  # [rows, context]
    tokens_per_byte: float


class Corpus:
    """The text of a run. `str()` tells what it is, `fingerprint` whether another is the same text and held-out part."""

    def __init__(self, source, *, streamed: bool, context: int, seed: int, held_out: int, encoder: Encoder):
        self.source = source
        self.streamed = streamed
        self.context = context
        self.seed = seed
        self.most_held_out = held_out
        self.encoder = encoder
        self._ends = None

    @cached_property
    def held_out(self) -> HeldOut:
        return _hold_out(self)

    @property
    def fingerprint(self) -> str:
        parts = [self.source.fingerprint, self.seed, self.most_held_out, self.encoder.identity]
        return _hash(parts)

    @property
    def train_tokens(self) -> int:
        """Of files; about, unless bytes are the tokens and no file is compressed."""
        train = [file for n, file in enumerate(self.source.files) if n not in self.held_out.documents]
        if self._exact:
            return sum(file.size + 1 for file in train)
        return int(sum(file.bytes for file in train) * self.held_out.tokens_per_byte) + len(train)

    @property
    def _exact(self) -> bool:
        return self.encoder.is_bytes and self.source.exact

    def describe(self, place: Iterable[int]) -> str:
        """Which documents a training row holds; `place` is what the batch says of the row.

        Of files and datasets cut before training this needs `rows_of` to have been called.
        """
        place = [int(number) for number in place]
        if self.streamed:
            row, round, number, offset = place
            return f"row {row:,} of pass {round:,}: from token {offset:,} of {self.source.name(number)} on"
        [row] = place
        start, stop = row * self.context, (row + 1) * self.context
        first, last = np.searchsorted(self._ends, [start, stop - 1], side="right").tolist()
        parts = []
        for number in range(first, last + 1):
            begin, end = int(self._ends[number - 1]) if number else 0, int(self._ends[number])
            if end > begin:
                span = f"{max(start, begin) - begin:,} to {min(stop, end) - begin:,} of {end - begin:,}"
                parts.append(f"{self.source.name(number)}, tokens {span}")
        more = [f"and {len(parts) - 5:,} documents more"] if len(parts) > 5 else []
        return f"row {row:,}: " + "; ".join(parts[:5] + more)

    def __str__(self) -> str:
        source, evaluated = self.source, f"{self.context:,} tokens of them evaluated"
        if source.kind == "dataset":
            return (
                f"{source.title}, column {source.column!r}: loaded and cut before training; "
                f"documents held out, up to {self.most_held_out} x {evaluated}"
            )
        held = self.held_out
        apart = f"{len(held.documents):,} {{}} held out, {len(held.rows)} x {evaluated}"
        if source.kind == "stream":
            return f"{source.title}, column {source.column!r}: streamed, its first {apart.format('documents')}"
        about = "" if self._exact else "about "
        return (
            f"{source.title}: {len(source) - len(held.documents):,} files of {about}{self.train_tokens:,} tokens to "
            f"train on{', streamed' if self.streamed else ''}, {apart.format('files')}"
            + (f"; {_left_out(source.left_out)}" if source.left_out else "")
        )


def find_corpus(options, *, context: int, seed: int, tokenizer=None) -> Corpus:
    """Finds the text, checks as much of it as is cheap, and holds documents out.

    Reads the first 64 KiB of each file, or a dataset's first row, and what is held out. A dataset that is not streamed
    is neither loaded nor held out yet: `rows_of` does that.

    Args:
        options: `data`, `dataset`, `dataset_config`, `dataset_split`, `text_column`, `stream` and `held_out`, as
            `DataOptions` has them. `data` None is the `.py` sources of the running Python's standard library, without
            its tests and installed packages.
        context: tokens in a row.
        seed: decides which documents are held out and the order of files; equal seeds and text, equal rows.
        tokenizer: as `load_tokenizer` returns it; bytes by default.

    Documents are held out until they hold `held_out` rows, up to a tenth of the text, or of a dataset's documents; of
    a stream its first.

    Raises:
        FileNotFoundError, OSError, ValueError: no such text, none in it, too little, too few documents to hold one out.
    """
    source = documents.open_source(options, seed)
    encoder = Encoder(tokenizer or load_tokenizer(None))
    corpus = Corpus(
        source, streamed=options.stream, context=context, seed=seed, held_out=options.held_out, encoder=encoder
    )
    if source.kind == "files" and corpus._exact:
        _check_enough(corpus, sum(file.size + 1 for file in source.files))
    if source.kind != "dataset":
        corpus.held_out  # noqa: B018  so that too little text is an error now
    return corpus


def rows_of(corpus: Corpus) -> tuple[datasets.Dataset | StreamedRows, datasets.Dataset]:
    """The rows to train on and those held out.

    A row to train on is `{"input_ids": [context], "place": what Corpus.describe takes}`; a held-out row has no place.
    Rows are cut by the first process that asks and found in the cache by the others.

    Raises:
        ValueError: a file that the user named is no text, or there is too little text.
        OSError: no space is left for the cache, or the dataset cannot be loaded.
    """
    features = datasets.Features({"input_ids": datasets.Sequence(_value(corpus), length=corpus.context)})
    held_out = datasets.Dataset.from_dict({"input_ids": corpus.held_out.rows}, features=features).with_format("numpy")
    if corpus.streamed:
        return StreamedRows(corpus), held_out
    folder = _cut_once(corpus)
    rows = datasets.Dataset.from_file(str(folder / ROWS)).with_format("numpy")
    corpus._ends = np.memmap(folder / ENDS, dtype=np.int64, mode="r")
    return rows, held_out


def collate(rows: list[dict]) -> dict:
    """Rows to a batch, int64: `input_ids` and, the same, `labels` `[B, context]`, which the model shifts; and `place`.

    `place` `[B, P]` is of training rows only, and not for the model: take it out before the model is called.
    """
    ids = torch.from_numpy(np.stack([np.asarray(row["input_ids"]).astype(np.int64) for row in rows]))
    batch = {"input_ids": ids, "labels": ids.clone()}
    if "place" in rows[0]:
        batch["place"] = torch.from_numpy(np.stack([np.asarray(row["place"], dtype=np.int64) for row in rows]))
    return batch


class StreamedRows(torch.utils.data.IterableDataset):
    """Rows cut while training, without end, in an order that depends on the seed alone.

    In each pass over the text each row comes once. Rows are drawn from a buffer of 8 Mi tokens, or 16 rows. Row k is
    the same in every iteration, so a resumed run that skips as many rows goes on where it was; it reads the text again
    up to there.
    """

    def __init__(self, corpus: Corpus):
        self.corpus = corpus
        self.buffer = max(16, SHUFFLED // corpus.context)

    def __iter__(self) -> Iterator[dict]:
        worker = torch.utils.data.get_worker_info()
        if worker is not None:
            if worker.num_workers > 1:
                raise ValueError(
                    f"dataloader_num_workers={worker.num_workers}: a stream is read in order, by one worker or none"
                )
            # The tokenizer's threads do not survive the fork; it would say so and go on without them.
            os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
        round = 0
        while True:
            yield from self._shuffled(round)
            round += 1

    def _shuffled(self, round: int) -> Iterator[dict]:
        chance = np.random.default_rng([self.corpus.seed, round, 1])
        buffer = []
        for row in self._pass(round):
            if len(buffer) < self.buffer:
                buffer.append(row)
                continue
            drawn = chance.integers(self.buffer)
            yield buffer[drawn]
            buffer[drawn] = row
        if not buffer:
            raise ValueError(_too_little(self.corpus))
        chance.shuffle(buffer)
        yield from buffer

    def _pass(self, round: int) -> Iterator[dict]:
        corpus = self.corpus
        text = corpus.source.training(corpus.held_out.documents, round)
        row, filled, place = 0, 0, None
        ids = np.empty(corpus.context, corpus.encoder.dtype)
        for number, offset, found in _tokens(text, corpus.encoder):
            at = 0
            while at < len(found):
                if filled == 0:
                    place = [row, round, number, offset + at]
                some = min(len(found) - at, corpus.context - filled)
                ids[filled : filled + some] = found[at : at + some]
                at, filled = at + some, filled + some
                if filled == corpus.context:
                    yield {"input_ids": ids.copy(), "place": place}
                    row, filled = row + 1, 0


def _tokens(text: documents.Documents, encoder: Encoder, batch: int = BATCH) -> Iterator[tuple[int, int, np.ndarray]]:
    """Of the documents in turn: number, tokens of the document before these, ids. The last of a document is its end."""
    waiting, size = [], 0  # (number, piece), None behind the last piece
    end = np.array([encoder.end], dtype=encoder.dtype)
    position = 0

    def encoded():
        nonlocal position
        ids_of = iter(encoder([piece for _, piece in waiting if piece is not None]))
        for number, piece in waiting:
            ids = end if piece is None else next(ids_of)
            yield number, position, ids
            position = 0 if piece is None else position + len(ids)
        waiting.clear()

    for number, pieces in text:
        some = False
        for piece in pieces:
            some = True
            waiting.append((number, piece))
            size += len(piece)
            if size >= batch:
                yield from encoded()
                size = 0
        if some:
            waiting.append((number, None))
    yield from encoded()


def _hold_out(corpus: Corpus) -> HeldOut:
    source, context, encoder = corpus.source, corpus.context, corpus.encoder
    wanted = corpus.most_held_out * context
    if source.kind == "stream":
        candidates, total = ((key, 0, pieces) for key, pieces in source.first()), 1
    else:
        total = sum(file.bytes for file in source.files) if source.kind == "files" else len(source)
        candidates = ((number, size, None) for number, size in source.sizes())
    chosen, found, tokens, spent, read = set(), [], 0, 0, 0

    def counted(pieces):
        nonlocal read
        for piece in pieces:
            read += len(piece)
            yield piece

    for key, size, pieces in candidates:
        if tokens >= wanted or (tokens >= context and spent >= total * MOST_HELD_OUT):
            break
        if spent + size > total / 2:
            continue
        here, length = [], 0
        try:
            pieces = source.one(key) if pieces is None else pieces
            for _, _, ids in _tokens([(key, counted(pieces))], encoder, batch=1):
                here.append(ids)
                length += len(ids)
                if tokens + length >= wanted:
                    break
        except NotText:
            if source.files[key].named:
                raise
            continue
        if length > 0:
            chosen.add(key)
            found += here
            tokens, spent = tokens + length, spent + size
    else:
        if source.kind == "stream":
            raise ValueError(
                f"{_what(corpus)} ends before {corpus.most_held_out} x {context:,} tokens are held out, with nothing "
                "left to train on: leave out stream, or lower held_out"
            )
    if tokens < context:
        if source.kind == "files" and read > 0:
            _check_enough(corpus, int(total * tokens / read), "about ")
        raise ValueError(_nothing_to_hold_out(corpus, tokens))
    rows = np.concatenate(found)[: tokens // context * context].reshape(-1, context)
    return HeldOut(frozenset(chosen), rows[: corpus.most_held_out], tokens / read)


def _cut_once(corpus: Corpus) -> Path:
    """The folder with the rows, their documents' ends, and what was left out; made whole or not at all."""
    key = [ROWS_VERSION, corpus.context, corpus.encoder.identity, corpus.source.key, sorted(corpus.held_out.documents)]
    folder = Path(datasets.config.HF_DATASETS_CACHE) / "lighthouse" / _hash(key)
    folder.parent.mkdir(parents=True, exist_ok=True)
    made = folder.with_suffix(".incomplete")
    with FileLock(folder.with_suffix(".lock")):
        if not folder.exists():
            shutil.rmtree(made, ignore_errors=True)  # of a process that was killed
            made.mkdir()
            try:
                _cut(corpus, made)
                made.rename(folder)
            except OSError as error:
                if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
                    raise
                written = sum(file.stat().st_size for file in made.iterdir())
                raise OSError(
                    error.errno,
                    f"no space for the cut text in {str(folder.parent)!r}, {written / 1e9:.3g} GB were written "
                    f"({error.strerror}): set HF_DATASETS_CACHE to a folder with more, or use stream",
                ) from error
            finally:
                shutil.rmtree(made, ignore_errors=True)
    about = json.loads((folder / ABOUT).read_text(encoding="utf-8"))
    if about["left_out"]:
        new = [path for path in about["left_out"] if path not in corpus.source.left_out]
        corpus.source.left_out += new
        if not (torch.distributed.is_initialized() and torch.distributed.get_rank() > 0):
            log.warning("Not all of the text could be used: %s.", _left_out(about["left_out"]))
    return folder


def _cut(corpus: Corpus, folder: Path) -> None:
    source, context, encoder = corpus.source, corpus.context, corpus.encoder
    known = set(source.left_out)
    width = pa.list_(pa.from_numpy_dtype(encoder.dtype), context)
    schema = pa.schema({"input_ids": width, "place": pa.list_(pa.int64(), 1)})
    text = source.training(corpus.held_out.documents)
    waiting, tokens, rows, total, documents_done = [], 0, 0, 0, 0
    with (
        open(folder / ROWS, "wb") as file,
        pa.ipc.new_stream(file, schema) as writer,
        open(folder / ENDS, "wb") as ends,
        _progress(source, corpus) as bar,
    ):

        def write(block):
            nonlocal rows
            numbers = pa.array(np.arange(rows, rows + len(block) // context))
            columns = [pa.FixedSizeListArray.from_arrays(pa.array(block), type=width)]
            columns += [pa.FixedSizeListArray.from_arrays(numbers, type=schema.field("place").type)]
            writer.write_batch(pa.record_batch(columns, schema=schema))
            rows += len(numbers)

        def end_documents(until):
            """Documents before `until` end here; those that were left out or held out are empty."""
            nonlocal documents_done
            ends.write(np.full(until - documents_done, total, np.int64).tobytes())
            documents_done = until

        for number, offset, ids in _tokens(bar(text), encoder):
            if offset == 0:
                end_documents(number)
            waiting.append(ids)
            tokens += len(ids)
            total += len(ids)
            if tokens >= max(BLOCK, context):
                joined = np.concatenate(waiting)
                whole = tokens // context * context
                write(joined[:whole])
                waiting, tokens = [joined[whole:]], tokens - whole
        end_documents(len(source))
        if tokens >= context:
            write(np.concatenate(waiting)[: tokens // context * context])
    if rows == 0:
        raise ValueError(_too_little(corpus))
    left_out = [path for path in source.left_out if path not in known]
    (folder / ABOUT).write_text(json.dumps({"rows": rows, "tokens": total, "left_out": left_out}), encoding="utf-8")


@contextmanager
def _progress(source, corpus: Corpus):
    """Yields a function that passes documents on and shows how far they are, when it takes more than two seconds."""
    files = source.kind == "files"
    total = sum(file.bytes for file in source.files) if files else len(source)
    unit = {"unit": "B", "unit_scale": True, "unit_divisor": 1000} if files else {"unit": " documents"}
    with tqdm(total=total, desc="cutting the text", delay=2, **unit) as bar:

        def counted(pieces):
            for piece in pieces:
                bar.update(len(piece))
                yield piece

        def watch(text):
            for number, pieces in text:
                if not files:
                    bar.update()
                yield number, counted(pieces) if files else pieces

        yield watch


def _value(corpus: Corpus) -> datasets.Value:
    return datasets.Value(str(corpus.encoder.dtype))


def _left_out(paths: list[str]) -> str:
    more = ", ..." if len(paths) > 3 else ""
    return f"{len(paths):,} files without UTF-8 text left out: {', '.join(paths[:3])}{more}"


def _check_enough(corpus: Corpus, total: int, about: str = "") -> None:
    if total < 2 * corpus.context:
        raise ValueError(
            f"{_what(corpus)} holds {about}{total:,} tokens, and {2 * corpus.context:,} are needed: one context of "
            f"{corpus.context:,} to train on and one held out"
        )


def _too_little(corpus: Corpus) -> str:
    return f"{_what(corpus)} holds less than a context of {corpus.context:,} tokens beside what is held out"


def _nothing_to_hold_out(corpus: Corpus, tokens: int) -> str:
    if corpus.source.kind == "files":
        largest = max(file.bytes for file in corpus.source.files)
        return (
            f"{_what(corpus)}: whole files are held out, and no choice of its {len(corpus.source)} files leaves a "
            f"context of {corpus.context:,} tokens held out and half of the text to train on: split the largest, "
            f"of {largest:,} bytes"
        )
    return (
        f"{_what(corpus)}: whole documents are held out, and those that may be, half of a dataset, hold {tokens:,} "
        f"tokens, less than a context of {corpus.context:,}"
    )


def _what(corpus: Corpus) -> str:
    return f"data={corpus.source.title!r}" if corpus.source.kind == "files" else f"dataset={corpus.source.title!r}"


def _hash(parts) -> str:
    return hashlib.sha256(repr(parts).encode()).hexdigest()[:32]
