"""Text to rows of token ids, each one context long: what there is of it, and where a row came from.

Documents are tokenized without special tokens, joined with an end token after each, and cut into rows: before training
(`cutting`) or, if the text is streamed, while training. Where text comes from: `files` and `tables`; what
is held out: `held_out`.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Iterable, Iterator
from functools import cached_property

import datasets
import numpy as np
import torch

from lighthouse.text import cutting
from lighthouse.text.cutting import first_process, hash_of
from lighthouse.text.documents import LeftOut, TextLost, shown
from lighthouse.text.files import open_files
from lighthouse.text.held_out import HeldOut, hold_out
from lighthouse.text.tables import open_dataset
from lighthouse.text.tokenizer import Encoder, load_tokenizer, tokens_of

SHUFFLED = 2**23  # tokens among which a streamed row is drawn, or 16 rows
MANY_UNKNOWN = 0.001  # share of the tokens

OF_DATASETS = {"dataset_config": None, "dataset_split": "train", "text_column": "text"}  # options and their defaults

log = logging.getLogger(__name__)


class Corpus:
    """The text of a run. `str()` describes it; equal `fingerprint`s mean the same text and held-out part."""

    def __init__(
        self, source, *, streamed: bool, context: int, seed: int, held_out: int, encoder: Encoder, key: str = ""
    ):
        self.source = source
        self.streamed = streamed
        self.context = context
        self.seed = seed
        self.most_held_out = held_out
        self.encoder = encoder
        self.key = key  # `key_of` its options
        self._ends: np.ndarray | None = None
        self._cut: dict | None = None  # what `cutting` noted of the rows

    @cached_property
    def held_out(self) -> HeldOut:
        return hold_out(self)

    @property
    def name(self) -> str:
        """Its name in errors."""
        option = "data" if self.source.kind == "files" else "dataset"
        return f"{option}={self.source.title!r}"

    @property
    def fingerprint(self) -> str:
        """Known before the text is tokenized: it changes with file sizes and with the text in the sampled parts."""
        parts = [cutting.ROWS_VERSION, self.source.fingerprint, self.seed, self.most_held_out, self.encoder.identity]
        return hash_of(parts)

    @property
    def rows_fingerprint(self) -> str | None:
        """A hash of the ids of all rows, in order. None before `rows_of`; of a stream, of the held-out rows alone."""
        if self._cut is None and not self.streamed:
            return None
        return hash_of([self._cut and self._cut["digest"], self.held_out.rows.tobytes()])

    @property
    def train_tokens(self) -> int:
        """Training tokens of files; an estimate, unless bytes are the tokens and no file is compressed."""
        train = [file for n, file in enumerate(self.source.files) if n not in self.held_out.documents]
        if self._exact:
            return sum(file.bytes + 1 for file in train)
        return int(sum(file.bytes for file in train) * self.held_out.tokens_per_byte) + len(train)

    @property
    def held_out_tokens(self) -> int:
        """Tokens of all held-out documents, evaluated or not; an estimate, unless bytes are the tokens."""
        held = self.held_out
        return len(held.documents) + (held.bytes if self.encoder.is_bytes else int(held.bytes * held.tokens_per_byte))

    @property
    def left_out(self) -> LeftOut:
        """The text that is not used, as far as it was read."""
        return self.source.left_out + self.source.passed_over

    @property
    def but_for(self) -> str:
        """For the end of an error's sentence."""
        return f"; {self.left_out}" if self.left_out else ""

    @property
    def too_little(self) -> str:
        return (
            f"{self.name} holds less than {self.context:,} tokens, one context, besides the held-out text{self.but_for}"
        )

    @property
    def _exact(self) -> bool:
        return self.encoder.is_bytes and self.source.exact

    def check_enough(self, total: int, about: str = "") -> None:
        """Raises `ValueError` if `total` tokens are too few for a row to train on and one held out."""
        if total < 2 * self.context:
            raise ValueError(
                f"{self.name} holds {about}{total:,} tokens, but {2 * self.context:,} are needed: one context of "
                f"{self.context:,} to train on and one held out{self.but_for}"
            )

    def describe(self, place: Iterable[int]) -> str:
        """Which documents a training row holds; `place` is what the batch says of the row.

        Unless the text is streamed, `rows_of` must have been called.
        """
        place = [int(number) for number in place]
        if self.streamed:
            row, round, number, offset = place
            return f"row {row:,} of pass {round:,}: from token {offset:,} of {self.source.name(number)} on"
        if self._ends is None:
            raise ValueError("the rows are not made yet: call rows_of(corpus) first")
        [row] = place
        start, stop = row * self.context, (row + 1) * self.context
        first, last = np.searchsorted(self._ends, [start, stop - 1], side="right").tolist()
        parts = []
        for number in range(first, last + 1):
            begin, end = int(self._ends[number - 1]) if number else 0, int(self._ends[number])
            if end > begin:
                span = f"{max(start, begin) - begin:,} to {min(stop, end) - begin:,} of {end - begin:,}"
                parts.append(f"{self.source.name(number)}, tokens {span}")
        more = [f"and {len(parts) - 5:,} more documents"] if len(parts) > 5 else []
        return f"row {row:,}: " + "; ".join(parts[:5] + more)

    def passes(self, steps: int, tokens_per_step: int) -> str:
        """What `rows_of` made of the text, and how often a run reads it; empty if that is not known."""
        if self.streamed:
            if self.source.kind != "files":
                return ""
            return f"The run reads the training text about {steps * tokens_per_step / self.train_tokens:.3g} times."
        if self._cut is None:
            return ""
        rows, rows_per_step = self._cut["rows"], tokens_per_step // self.context
        if rows < rows_per_step:
            return ""
        rest = self._cut["tokens"] - rows * self.context
        said = f"The run reads the {rows:,} training rows {steps / (rows // rows_per_step):.3g} times"
        said += f"; the last {rest:,} tokens do not fill a row." if rest else "."
        return f"{said} {self._held_out_said.capitalize()}." if self.source.kind == "dataset" else said

    @property
    def _held_out_said(self) -> str:
        held, what = self.held_out, "file" if self.source.kind == "files" else "document"
        documents, rows = len(held.documents), len(held.rows)
        about = "" if self.encoder.is_bytes else "about "
        asked = f" ({self.most_held_out} were asked for, but at most a tenth of the text is held out)"
        which = f"{documents:,} {what}{'s' if documents > 1 else ''}"
        if self.source.kind == "files" and any(self.source.files[number].part for number in held.documents):
            [number] = held.documents
            which = f"{self.source.name(number)} (no whole file can be held out)"
        return (
            f"{which} of {about}{self.held_out_tokens:,} tokens held out, "
            f"{rows} x {self.context:,} tokens of them evaluated{asked if rows < self.most_held_out else ''}"
        )

    def __str__(self) -> str:
        source = self.source
        if source.kind == "dataset":
            return (
                f"{source.title}, column {source.column!r}: loaded and tokenized before training; documents held out, "
                f"up to {self.most_held_out} x {self.context:,} tokens of them evaluated"
            ) + self._notes
        if source.kind == "stream":
            said = f"{source.title}, column {source.column!r}: streamed, its first {self._held_out_said}"
            return said + self._notes
        about = "" if self._exact else "about "
        files = len(source) - len(self.held_out.documents)
        return (
            f"{shown(source.title)}: {files:,} file{'' if files == 1 else 's'} of {about}{self.train_tokens:,} tokens "
            f"to train on{', in the order of their paths' if source.by_path else ''}"
            f"{', streamed' if self.streamed else ''}, {self._held_out_said}{self.but_for}"
        ) + self._notes

    @property
    def _notes(self) -> str:
        """Lines about what the tokenizer loses of the text."""
        notes = [self.encoder.loses]
        if self.source.kind != "dataset" and self.held_out.unknown > MANY_UNKNOWN:
            token = self.encoder.tokenizer.unk_token
            notes.append(f"Note: {self.held_out.unknown:.1%} of the held-out tokens are the unknown token {token!r}.")
        return "".join(f"\n{note}" for note in notes if note)


def key_of(options, *, context: int, seed: int) -> str:
    """The options of a run that decide its `Corpus`: if they are equal, `find_corpus` finds the same one."""
    names = ("data", "order", "dataset", *OF_DATASETS, "stream", "held_out", "tokenizer")
    return repr([{name: getattr(options, name, None) for name in names}, context, seed])


def find_corpus(options, *, context: int, seed: int, tokenizer=None) -> Corpus:
    """Finds the text, checks as much of it as is cheap, and holds documents out.

    Reads the first 64 KiB of each file and a few blocks of the rest, or a dataset's first row with text, and what is
    held out. A dataset that is not streamed is neither loaded nor held out yet: `rows_of` does that.

    Args:
        options: `data`, `order`, `dataset`, `dataset_config`, `dataset_split`, `text_column`, `stream` and `held_out`,
            as `DataOptions` has them. `data` None is the `.py` sources of the running Python's standard library,
            without its tests and installed packages.
        context: tokens in a row.
        seed: decides which documents are held out and the order of shuffled files; equal seeds and text, equal rows.
        tokenizer: as `load_tokenizer` returns it; bytes by default.

    Documents are held out until they hold `held_out` rows, or one row and a tenth of the text, and never more than half
    of it, by bytes; of a stream, whose length is not known, its first. Of files in the order of their paths, neighbours
    are held out together, so that a held-out row is like the others. Of documents whose text is the same, white space
    apart, one is used.

    Raises:
        FileNotFoundError: a path that does not exist, a pattern that matches no file, a dataset that does not exist.
        OSError: a dataset that cannot be reached, a file or folder without read permission.
        ValueError: no text, or too little; too few documents to hold one out; files with rows among texts; an unknown
            split or column, or a dataset that cannot be read.
    """
    source = open_source(options, seed)
    encoder = Encoder(tokenizer or load_tokenizer(None))
    corpus = Corpus(
        source,
        streamed=options.stream,
        context=context,
        seed=seed,
        held_out=options.held_out,
        encoder=encoder,
        key=key_of(options, context=context, seed=seed),
    )
    if source.kind == "files" and corpus._exact:
        corpus.check_enough(sum(file.size + 1 for file in source.files))
    if source.kind != "dataset":
        corpus.held_out  # noqa: B018  so that too little text is an error now
    return corpus


def open_source(options, seed: int):
    """The files or the dataset that `options` ask for, as `find_corpus` has them: `Files`, `Table` or `Stream`."""
    if options.dataset is not None:
        return open_dataset(options, seed)
    for name, default in OF_DATASETS.items():
        if getattr(options, name) != default:
            raise ValueError(
                f"{name}={getattr(options, name)!r} is for datasets: name one with dataset, or leave it out"
            )
    return open_files(options.data, seed, options.order)


def rows_of(corpus: Corpus) -> tuple[datasets.Dataset | StreamedRows, datasets.Dataset]:
    """The rows to train on and those held out.

    A row to train on is `{"input_ids": [context], "place": what Corpus.describe takes}`; a held-out row has no place.
    The first process that asks makes the rows, and the others find them in the cache.

    Raises:
        ValueError: a file that the user named is not text, text changed meanwhile, there is too little, or it is not
            the same on all processes.
        OSError: no space is left for the cache, or the dataset cannot be loaded.
    """
    value = datasets.Value(str(corpus.encoder.dtype))
    features = datasets.Features({"input_ids": datasets.Sequence(value, length=corpus.context)})
    held_out = datasets.Dataset.from_dict({"input_ids": corpus.held_out.rows}, features=features).with_format("numpy")
    if corpus.streamed:
        _check_same_everywhere(corpus)
        return StreamedRows(corpus), held_out
    folder, corpus._cut = cutting.cut_once(corpus)
    rows = datasets.Dataset.from_file(str(folder / cutting.ROWS)).with_format("numpy")
    corpus._ends = np.memmap(folder / cutting.ENDS, dtype=np.int64, mode="r")
    _check_same_everywhere(corpus)
    return rows, held_out


def _check_same_everywhere(corpus: Corpus) -> None:
    """Each process finds its text itself, and machines may have different texts at the same path."""
    if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
        return
    found: list = [None] * torch.distributed.get_world_size()
    torch.distributed.all_gather_object(found, (corpus.fingerprint, corpus.rows_fingerprint))
    others = [rank for rank, text in enumerate(found) if text != found[0]]
    if others:
        raise ValueError(
            f"{corpus.name}: the text on process {others[0]} differs from that on process 0: all need the same files "
            "and the same tokenizer; put them where every machine reads them, or copy them to each"
        )


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
    """Rows made while training, without end, in an order that depends on the seed alone.

    In each pass over the text each row comes once; what is left at its end and fills no row is not used. Rows are drawn
    from a buffer of 8 Mi tokens, or 16 rows. Row k is the same in every iteration, so a resumed run that skips as many
    rows continues where it was; it reads the text again up to there.
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
            # The tokenizer's threads do not survive the fork; it would warn and continue without them.
            os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
        round = 0
        while True:
            try:
                yield from self._shuffled(round)
            except (ValueError, OSError) as error:
                raise TextLost(" ".join(str(error).splitlines())) from error
            round += 1
            if first_process():
                passed_over = self.corpus.source.passed_over
                said = f"; {passed_over}" if passed_over and round == 1 else ""
                log.warning("The streamed text was read to its end, and pass %d begins%s.", round + 1, said)

    def _shuffled(self, round: int) -> Iterator[dict]:
        chance = np.random.default_rng([self.corpus.seed, round, 1])
        buffer: list[dict] = []
        for row in self._pass(round):
            if len(buffer) < self.buffer:
                buffer.append(row)
                continue
            drawn = chance.integers(self.buffer)
            yield buffer[drawn]
            buffer[drawn] = row
        if not buffer:
            raise ValueError(self.corpus.too_little)
        chance.shuffle(buffer)
        yield from buffer

    def _pass(self, round: int) -> Iterator[dict]:
        corpus = self.corpus
        text = corpus.source.training(corpus.held_out.documents, round)
        row, filled, place = 0, 0, None
        ids = np.empty(corpus.context, corpus.encoder.dtype)
        for number, offset, found in tokens_of(text, corpus.encoder):
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
