"""Text from datasets of the `datasets` library, each row one document: loaded, or streamed while training.

The traps: the library identifies a dataset by the paths and times of its local files, so a copy elsewhere is another
dataset to it. Runs are compared by the files' content instead. And it never checks whether a file changed since it was
found.
"""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from itertools import count, islice

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from lighthouse.text import documents
from lighthouse.text.documents import (
    NOT_UTF8,
    SAME_TEXT,
    WITHOUT_TEXT,
    Documents,
    LeftOut,
    NotText,
    Seen,
    TextDigest,
    changed,
    pieces_of,
)
from lighthouse.text.files import sample_of

FORMATS = ("json", "parquet", "csv", "text", "arrow", "xml")
LOOKED_AT = 1000  # rows, for one with text
CHECKED = 2**23  # bytes of a stream's text after which its files are checked again
OF_A_PLACE = {"name", "version", "data_dir", "data_files", "description"}  # of a builder's configuration: not its text


@dataclass
class Table:
    """A dataset, each row one document. Loaded when it is first asked for documents, which may take long."""

    title: str
    fingerprint: str
    local: LocalFiles
    builder: datasets.DatasetBuilder
    split: str
    column: str
    seed: int
    left_out: LeftOut = field(default_factory=LeftOut)
    passed_over: LeftOut = field(default_factory=LeftOut)  # rows that the latest `training` did not use

    kind = "dataset"
    _rows = None

    @property
    def key(self) -> str:
        return f"{self.rows._fingerprint} {self.column}"

    @property
    def rows(self) -> datasets.Dataset:
        if self._rows is None:
            try:
                self.builder.download_and_prepare()
                rows = self.builder.as_dataset(split=self.split)
            except datasets.exceptions.DatasetGenerationError as error:
                self.local.check()
                raise ValueError(f"dataset={self.title!r} cannot be read: {error.__cause__ or error}") from error
            self.local.check()  # else the library would cache a later text under the name of the one that was found
            _check_column(self.title, rows.features, self.column)
            self._rows = rows.select_columns([self.column])
        return self._rows

    def __len__(self) -> int:
        return len(self.rows)

    def name(self, number: int) -> str:
        return f"{self.title}, row {number:,}"

    @property
    def total_bytes(self) -> int:
        """Of text in all rows. Their lengths are read, not the text."""
        return sum(pc.sum(pc.binary_length(chunk)).as_py() or 0 for chunk in self.rows.data.column(self.column).chunks)

    def sizes(self, run: int) -> Iterator[tuple[int, int]]:
        """Candidates to hold out, in random order, each once: number and size in bytes. Rows have no neighbours."""
        chance, rows = np.random.default_rng([self.seed]), self.rows.with_format("arrow")
        seen: set[int] = set()
        while len(seen) < len(self):
            number = int(chance.integers(len(self)))
            if number not in seen:
                seen.add(number)
                yield number, pc.sum(pc.binary_length(rows[number][self.column])).as_py() or 0

    def one(self, number: int) -> Iterator[bytes]:
        """A document's pieces; raises `NotText` where there are none."""
        return iter(_pieces(self.rows[number][self.column], self.name(number)))

    def training(self, held_out: Mapping[int, bytes], round: int | None = None) -> Documents:
        """All rows but those held out, by number and digest, each text once, in the dataset's order."""
        self.passed_over = LeftOut()

        def texts():
            number = 0
            for batch in self.rows.with_format("arrow").iter(batch_size=256):
                for text in batch[self.column]:
                    if number not in held_out:
                        yield number, text.as_py()
                    number += 1

        return _each_once(self, texts(), held_out.values())


@dataclass
class Stream:
    """A dataset read while training. Its documents have no lasting numbers: one held out is recognized by its text."""

    title: str
    fingerprint: str
    local: LocalFiles
    rows: datasets.IterableDataset
    column: str
    seed: int
    left_out: LeftOut = field(default_factory=LeftOut)
    passed_over: LeftOut = field(default_factory=LeftOut)  # rows that the latest `training` did not use

    kind = "stream"

    def name(self, number: int) -> str:
        return f"{self.title}, document {number:,} of the pass"

    def first(self) -> Iterator[tuple[str, Iterable[bytes]]]:
        """Candidates to hold out: the first documents, by hash."""
        for number, text in self._read(self.rows):
            try:
                pieces = _pieces(text, self.name(number))
            except NotText:
                continue
            yield hashlib.blake2b(b"".join(pieces), digest_size=16).hexdigest(), pieces

    def training(self, held_out: Mapping[str, bytes], round: int = 0) -> Documents:
        """A pass: the shards in an order of its own, each text once, and none that is held out."""
        self.passed_over = LeftOut()
        chance = np.random.default_rng([self.seed, round])
        rows = self.rows.shuffle(generator=chance, buffer_size=1) if self.rows.num_shards > 1 else self.rows
        return _each_once(self, self._read(rows), held_out.values(), among=True)

    def _read(self, rows: datasets.IterableDataset) -> Iterator[tuple[int, str | None]]:
        """Texts and their numbers. A file that changed is an error, if it can be before the text is passed on."""
        rows, unchecked = iter(rows), 0
        for number in count():
            try:
                text = next(rows)[self.column]
            except StopIteration:
                break
            except Exception as error:  # of the format, of what compressed it, or of the network: each has its own
                self.local.check()
                raise ValueError(
                    f"{self.title} cannot be read after {number:,} rows of the pass: {type(error).__name__}: {error}"
                ) from error
            unchecked += len(text) if isinstance(text, str) else 0
            if unchecked >= CHECKED:
                self.local.check()
                unchecked = 0
            yield number, text
        self.local.check()


class LocalFiles:
    """The files on this machine that a dataset is read from, as they were when it was opened."""

    def __init__(self, builder: datasets.DatasetBuilder):
        parts = (builder.config.data_files or {}).values()
        paths = [path.rpartition("::")[2] for part in parts for path in part]  # of an archive's member, the archive
        self._states = {path: self._state(path) for path in paths if os.path.isfile(path)}

    def check(self) -> None:
        """Raises `ValueError` if one of them changed since."""
        for path, state in self._states.items():
            if self._state(path) != state:
                raise ValueError(changed(path))

    @staticmethod
    def _state(path: str) -> tuple[int, int] | None:
        try:
            state = os.stat(path)
        except FileNotFoundError:
            return None
        return state.st_size, state.st_mtime_ns


def open_dataset(options, seed: int) -> Table | Stream:
    """The dataset that `options` name; reads its first rows, up to one with text."""
    name, split, column = options.dataset, options.dataset_split, options.text_column
    if name in FORMATS and not os.path.isdir(name):
        _check_files(name, options.data)
    title = f"{name} {options.dataset_config or ''}".strip() + f", split {split}"
    try:
        builder = datasets.load_dataset_builder(name, options.dataset_config, data_files=options.data or None)
    except FileNotFoundError as error:
        raise FileNotFoundError(f"dataset={name!r} does not exist: {error}") from error
    except OSError as error:
        raise OSError(f"dataset={name!r} cannot be loaded: {error}") from error
    except Exception as error:
        raise ValueError(f"dataset={name!r} cannot be loaded: {error}") from error
    local = LocalFiles(builder)
    rows, row = _first_row(builder, name, split, column, options.data, whole_splits=options.stream)
    features = rows.features
    if features is None or getattr(features.get(column), "dtype", None) == "null":
        features = datasets.Features.from_arrow_schema(pa.Table.from_pylist([row]).schema)
    if row.get(column, "") is None:
        raise ValueError(
            f"text_column={column!r} of {title} is empty in the first rows (up to {LOOKED_AT:,}): give the column that "
            f"has the text; columns: {', '.join(features)}"
        )
    _check_column(title, features, column)
    found = title, fingerprint(builder, split, column), local
    if not options.stream:
        return Table(*found, builder, split, column, seed)
    return Stream(*found, rows.select_columns([column]), column, seed)


def fingerprint(builder: datasets.DatasetBuilder, split: str, column: str) -> str:
    """Made without reading everything: how files are read, and of each the commit or, if local, size and samples."""
    config = {name: value for name, value in vars(builder.config).items() if name not in OF_A_PLACE}
    files = builder.config.data_files or {}
    return repr([builder.name, config, split, column, {str(part): _states(files[part]) for part in files}])


def _states(files: list[str]) -> list:
    here = [os.path.isfile(path) for path in files]
    states = [
        (os.path.getsize(path), sample_of(path, os.path.getsize(path), b"", 0)) if local else path
        for path, local in zip(files, here, strict=True)
    ]
    return states if all(here) else [*states, getattr(files, "origin_metadata", None)]


def _check_files(name: str, data: list[str] | None) -> None:
    if not data:
        raise ValueError(f"dataset={name!r} is a file format: give the files with data")
    for entry in data:
        if os.path.isdir(entry):
            raise ValueError(
                f"data={entry!r} is a folder, but dataset={name!r} needs files: name them, such as "
                f"{os.path.join(entry, '*.' + name)!r}, or read the folder with --dataset {entry}"
            )


def _first_row(
    builder, name: str, split: str, column: str, data, whole_splits: bool
) -> tuple[datasets.IterableDataset, dict]:
    """The split as a stream, and its first row that holds something in the column, or the last that was read."""
    part = re.split(r"[\[+]", split)[0].strip()
    if whole_splits and "[" in split:
        raise ValueError(f"dataset_split={split!r}: a streamed dataset has whole splits only, such as {part!r}")
    row = None
    try:
        rows = builder.as_streaming_dataset(split=split if whole_splits else part)
        for row in islice(rows, LOOKED_AT):
            if row.get(column, "") is not None:
                break
    except StopIteration:  # out of json's builder, which looks for columns
        pass
    except Exception as error:
        if "Bad split" in str(error):
            raise ValueError(f"dataset_split={split!r} is unknown to dataset={name!r}: {error}") from error
        raise ValueError(f"dataset={name!r} cannot be read: {error}") from error
    if row is None:
        files = f"; no file of data={data} exists, or all are empty" if data else ""
        raise ValueError(f"dataset={name!r}, split {split!r} has no rows{files}")
    return rows, row


def _check_column(title: str, features: dict, column: str) -> None:
    if column not in features:
        raise ValueError(f"text_column={column!r} is not a column of {title}; columns: {', '.join(features)}")
    held = getattr(features[column], "dtype", features[column])
    if held not in ("string", "large_string"):
        raise ValueError(f"text_column={column!r} of {title} has {held} instead of text")


def _each_once(
    source: Table | Stream, texts: Iterable[tuple[int, str | None]], held_out: Collection[bytes], among: bool = False
) -> Documents:
    """The first of documents with the same text, and none that is held out, even if those are `among` the texts."""
    seen, themselves = Seen(held_out), set(held_out if among else ())
    for number, text in texts:
        try:
            pieces = _pieces(text, source.name(number))
        except NotText as error:
            source.passed_over.add(error.reason, source.name(number))
            continue
        digest = TextDigest()
        for piece in pieces:
            digest.update(piece)
        if seen.add(digest.digest()):
            yield number, pieces
        elif digest.digest() in themselves:
            themselves.remove(digest.digest())  # the next is a copy
        else:
            source.passed_over.add(SAME_TEXT, source.name(number))


def _pieces(text: str | None, name: str) -> list[bytes]:
    if text is not None and not isinstance(text, str):
        raise ValueError(f"{name} has {type(text).__name__} instead of text: {text!r:.60}")
    try:
        whole = (text or "").encode("utf-8")
    except UnicodeEncodeError as error:
        raise NotText(f"{name} is not UTF-8 text: {error}", NOT_UTF8) from None
    if not whole.strip():
        raise NotText(f"{name} holds no text", WITHOUT_TEXT)
    return list(pieces_of(whole[at : at + documents.PIECE] for at in range(0, len(whole), documents.PIECE)))
