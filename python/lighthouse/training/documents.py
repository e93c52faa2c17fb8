"""Where text comes from: files, or a dataset of the `datasets` library, loaded or streamed. A document is UTF-8 pieces.

A document may be longer than memory: it comes in pieces of about 256 KiB that end with a line where they can, and a
tokenizer sees a piece at a time. The trap: whether a file is UTF-8 is known for its first 64 KiB only until it is read.
"""

from __future__ import annotations

import bz2
import codecs
import glob
import gzip
import hashlib
import lzma
import os
import re
import sysconfig
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path

import datasets
import numpy as np
import pyarrow as pa

HEAD = 2**16
PIECE = 2**18
MOST_IN_MEMORY = 2**26  # bytes of one document; a longer file is read twice, first to see whether all of it is text

COMPRESSED_TO = 4  # bytes of text that a compressed byte stands for, about
NOT_SOURCES = {"site-packages", "dist-packages", "__pycache__", "test", "tests", "idle_test"}
FORMATS = ("json", "parquet", "csv", "text", "arrow", "xml")

Documents = Iterator[tuple[int, Iterable[bytes]]]  # a number, by which the source names it, and its text


class NotText(ValueError):
    """A file that is not UTF-8 text, or cannot be decompressed."""


@dataclass(frozen=True)
class TextFile:
    """A file whose first 64 KiB are UTF-8 text."""

    path: str
    size: int  # bytes on disk
    modified: int  # nanoseconds
    head: str  # hash of the first 64 KiB of text
    named: bool = False  # by the user, and not found in a folder or by a pattern

    @property
    def compressed(self) -> bool:
        return Path(self.path).suffix in OPEN

    @property
    def bytes(self) -> int:
        """Of text; of a compressed file about."""
        return self.size * (COMPRESSED_TO if self.compressed else 1)


@dataclass
class Files:
    """Files, each one document, in the seed's order."""

    title: str
    files: tuple[TextFile, ...]
    seed: int
    left_out: list[str] = field(default_factory=list)  # paths of what is no text

    kind = "files"

    @property
    def exact(self) -> bool:
        return not any(file.compressed for file in self.files)

    @property
    def key(self) -> str:
        """Of what the files hold, as far as their state tells."""
        return repr([(file.path, file.size, file.modified) for file in self.files])

    @property
    def fingerprint(self) -> str:
        """As `key`, but the same for a copy of the files elsewhere."""
        root = os.path.commonpath([os.path.dirname(os.path.abspath(file.path)) for file in self.files])
        return repr([(os.path.relpath(os.path.abspath(f.path), root), f.size, f.head) for f in self.files])

    def __len__(self) -> int:
        return len(self.files)

    def name(self, number: int) -> str:
        return self.files[number].path

    def sizes(self) -> Iterator[tuple[int, int]]:
        """Candidates to hold out: number and size in bytes."""
        return ((number, file.bytes) for number, file in enumerate(self.files))

    def one(self, number: int) -> Iterator[bytes]:
        """A document's pieces, checked as they come: raises `NotText` where it stops to be text."""
        return _checked(self.files[number].path)

    def training(self, held_out: Iterable, round: int | None = None) -> Documents:
        """All but those held out; in the order of the `round`-th pass where there is one."""
        numbers = np.setdiff1d(np.arange(len(self.files)), np.array(sorted(held_out), dtype=int))
        if round is not None:
            np.random.default_rng([self.seed, round]).shuffle(numbers)
        for number in numbers.tolist():
            try:
                yield number, _whole(self.files[number].path)
            except NotText:
                if self.files[number].named:
                    raise
                if self.files[number].path not in self.left_out:
                    self.left_out.append(self.files[number].path)


@dataclass
class Table:
    """A dataset, each row one document. Loaded when it is first asked for documents, which may take long."""

    title: str
    builder: datasets.DatasetBuilder
    split: str
    column: str
    seed: int

    kind = "dataset"
    left_out = ()
    _rows = None

    @property
    def key(self) -> str:
        return f"{self.rows._fingerprint} {self.column}"

    @property
    def fingerprint(self) -> str:
        return repr([_builder_key(self.builder), self.split, self.column])

    @property
    def rows(self) -> datasets.Dataset:
        if self._rows is None:
            try:
                self.builder.download_and_prepare()
                rows = self.builder.as_dataset(split=self.split)
            except datasets.exceptions.DatasetGenerationError as error:
                raise ValueError(f"dataset={self.title!r} cannot be read: {error.__cause__ or error}") from error
            _check_column(self.title, rows.features, self.column)
            self._rows = rows.select_columns([self.column])
        return self._rows

    def __len__(self) -> int:
        return len(self.rows)

    def name(self, number: int) -> str:
        return f"{self.title}, row {number:,}"

    def sizes(self) -> Iterator[tuple[int, int]]:
        """Rows by chance, each once; all count as equally long."""
        chance, seen = np.random.default_rng([self.seed]), set()
        while len(seen) < len(self) // 2:
            number = int(chance.integers(len(self)))
            if number not in seen:
                seen.add(number)
                yield number, 1

    def one(self, number: int) -> Iterator[bytes]:
        return _pieces_of_text(self.rows[number][self.column])

    def training(self, held_out: Iterable, round: int | None = None) -> Documents:
        """All rows but those held out, in the dataset's order."""
        number = 0
        for batch in self.rows.with_format("arrow").iter(batch_size=256):
            for text in batch[self.column]:
                if number not in held_out:
                    yield number, _pieces_of_text(text.as_py())
                number += 1


@dataclass
class Stream:
    """A dataset read while training. Its documents have no numbers: one held out is known by its text."""

    title: str
    fingerprint: str
    rows: datasets.IterableDataset
    column: str
    seed: int

    kind = "stream"
    left_out = ()

    def name(self, number: int) -> str:
        return f"{self.title}, document {number:,} of the pass"

    def first(self) -> Iterator[tuple[str, Iterator[bytes]]]:
        """Candidates to hold out: the first documents, by hash."""
        for row in self.rows:
            if (text := row[self.column]) is not None:
                yield _hash(text.encode()), _pieces_of_text(text)

    def training(self, held_out: Iterable, round: int = 0) -> Documents:
        """A pass: the shards in an order of its own, without held-out documents, also where their text comes twice."""
        chance = np.random.default_rng([self.seed, round])
        rows = self.rows.shuffle(generator=chance, buffer_size=1) if self.rows.num_shards > 1 else self.rows
        for number, row in enumerate(rows):
            text = row[self.column]
            if text is not None and _hash(text.encode()) not in held_out:
                yield number, _pieces_of_text(text)


def open_source(options, seed: int) -> Files | Table | Stream:
    """What `options` (`data`, `dataset`, `dataset_config`, `dataset_split`, `text_column`, `stream`) ask for.

    Reads the first 64 KiB of each file, or a dataset's first row.

    Raises:
        FileNotFoundError: a path that does not exist, a pattern that matches no file, a dataset that is not there.
        OSError: a dataset that cannot be reached.
        ValueError: files without text, an unknown split or column, a dataset that cannot be read.
    """
    return _open_files(options.data, seed) if options.dataset is None else _open_dataset(options, seed)


def standard_library() -> Path:
    """The folder with the running Python's standard library."""
    return Path(sysconfig.get_path("stdlib"))


# Files -----------------------------------------------------------------------------------------------------------


def _open_files(data: list[str] | None, seed: int) -> Files:
    if data is None:
        title, found = str(standard_library()), dict.fromkeys(_python_sources(standard_library()), False)
    else:
        title, found = " ".join(data[:3]) + (f" and {len(data) - 3:,} more" if len(data) > 3 else ""), {}
        for entry in data:
            for path, named in _find(entry):
                found[path] = found.get(path, False) or named
    files, left_out = [], []
    for path in sorted(found):
        try:
            files.append(_text_file(path, found[path]))
        except NotText:
            if found[path]:
                raise
            left_out.append(path)
    if not files:
        raise ValueError(f"data={title!r} holds no text: none of its {len(found)} files is UTF-8 text")
    order = np.random.default_rng([seed]).permutation(len(files))
    return Files(title, tuple(files[number] for number in order), seed, left_out)


def _find(entry: str) -> Iterator[tuple[str, bool]]:
    """The files that an entry of `data` stands for, and whether it names the file itself."""
    path = os.path.expanduser(entry)
    if os.path.isfile(path):
        yield path, True
    elif os.path.isdir(path):
        for folder, folders, names in os.walk(path):
            folders[:] = [name for name in folders if not name.startswith(".")]
            found = (os.path.join(folder, name) for name in names if not name.startswith("."))
            yield from ((file, False) for file in found if os.path.isfile(file))
    elif glob.has_magic(path):
        found = [file for file in glob.iglob(path, recursive=True) if os.path.isfile(file)]
        if not found:
            raise FileNotFoundError(f"data={entry!r} matches no file")
        yield from ((file, False) for file in found)
    else:
        raise FileNotFoundError(f"data={entry!r} does not exist")


def _python_sources(root: Path) -> Iterator[str]:
    for folder, folders, names in os.walk(root):
        folders[:] = set(folders) - NOT_SOURCES
        yield from (os.path.join(folder, name) for name in names if name.endswith(".py"))


def _text_file(path: str, named: bool) -> TextFile:
    with _open(path) as stream:
        head = stream.read(HEAD)
    _check(path, head, 0, end=len(head) < HEAD)
    if not head.strip() and len(head) < HEAD:
        raise NotText(f"data={path!r} holds no text")
    state = os.stat(path)
    return TextFile(path, state.st_size, state.st_mtime_ns, _hash(head), named)


def _open_zstd(path: str, mode: str):
    try:
        from compression import zstd  # Python 3.14

        return zstd.open(path, mode)
    except ImportError:
        pass
    try:
        import zstandard
    except ImportError:
        raise ValueError(
            f"data={path!r} is compressed with zstd, which this Python reads with the package zstandard: "
            "pip install zstandard"
        ) from None
    # zstandard.open would stop behind the first of several frames.
    return zstandard.ZstdDecompressor().stream_reader(open(path, mode), read_across_frames=True, closefd=True)


OPEN = {".gz": gzip.open, ".bz2": bz2.open, ".xz": lzma.open, ".zst": _open_zstd}


class _open:
    """The text of a file, decompressed; what cannot be decompressed raises `NotText`."""

    def __init__(self, path: str):
        self.path = path
        self.stream = OPEN.get(Path(path).suffix, open)(path, "rb")

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.stream.close()

    def read(self, size: int) -> bytes:
        try:
            return self.stream.read(size)
        except Exception as error:
            compressed = Path(self.path).suffix in OPEN
            system = isinstance(error, OSError) and error.errno is not None  # a disk's fault, not the file's
            if not compressed or system:
                raise
            raise NotText(f"data={self.path!r} cannot be decompressed: {error}") from error


def _blocks(path: str) -> Iterator[bytes]:
    with _open(path) as stream:
        while block := stream.read(PIECE):
            yield block


def _pieces(blocks: Iterable[bytes]) -> Iterator[bytes]:
    """The same bytes in pieces that end behind a line, before a space, or at least behind a whole character."""
    rest = b""
    for block in blocks:
        rest += block
        if len(rest) >= PIECE:
            at = _seam(rest)
            yield rest[:at]
            rest = rest[at:]
    if rest:
        yield rest


def _seam(text: bytes) -> int:
    half = len(text) // 2
    if (at := text.rfind(b"\n", half)) >= 0:
        return at + 1
    if (at := text.rfind(b" ", half)) > 0:
        return at
    at = len(text) - 1
    while text[at] & 0xC0 == 0x80 and at > len(text) - 4:
        at -= 1
    return at


def _checked(path: str) -> Iterator[bytes]:
    offset = 0
    for piece in _pieces(_blocks(path)):
        _check(path, piece, offset, end=True)
        offset += len(piece)
        yield piece


def _whole(path: str) -> Iterable[bytes]:
    """A file's pieces, when all of it was found to be text."""
    pieces = _checked(path)
    first = list(islice(pieces, MOST_IN_MEMORY // PIECE))
    longer = False
    for _ in pieces:
        longer = True
    if longer:
        return _pieces(_blocks(path))
    return first if any(piece.strip() for piece in first) else ()


def _check(path: str, text: bytes, offset: int, end: bool) -> None:
    try:
        codecs.getincrementaldecoder("utf-8")().decode(text, final=end)
    except UnicodeDecodeError as error:
        raise NotText(
            f"data={path!r} is not UTF-8 text: byte {offset + error.start:,} is 0x{text[error.start]:02x}, "
            f"{error.reason}; convert the file to UTF-8"
        ) from None
    if (zero := text.find(b"\0")) >= 0:
        raise NotText(f"data={path!r} is not UTF-8 text: byte {offset + zero:,} is zero")


# Datasets --------------------------------------------------------------------------------------------------------


def _open_dataset(options, seed: int) -> Table | Stream:
    name, split, column = options.dataset, options.dataset_split, options.text_column
    if name in FORMATS and not options.data and not os.path.isdir(name):
        raise ValueError(f"dataset={name!r} is a format of files: name them with data")
    title = f"{name} {options.dataset_config or ''}".strip() + f", split {split}"
    try:
        builder = datasets.load_dataset_builder(name, options.dataset_config, data_files=options.data or None)
    except FileNotFoundError as error:
        raise FileNotFoundError(f"dataset={name!r} is not there: {error}") from error
    except OSError as error:
        raise OSError(f"dataset={name!r} cannot be loaded: {error}") from error
    except Exception as error:
        raise ValueError(f"dataset={name!r} cannot be loaded: {error}") from error
    rows, first = _first_row(builder, name, split, options.data, whole_splits=options.stream)
    _check_column(
        title, rows.features or datasets.Features.from_arrow_schema(pa.Table.from_pylist([first]).schema), column
    )
    if not options.stream:
        return Table(title, builder, split, column, seed)
    fingerprint = repr([_builder_key(builder), split, column])
    return Stream(title, fingerprint, rows.select_columns([column]), column, seed)


def _first_row(builder, name, split: str, data, whole_splits: bool) -> tuple[datasets.IterableDataset, dict]:
    """The split as a stream, and its first row."""
    part = re.split(r"[\[+]", split)[0].strip()
    if whole_splits and "[" in split:
        raise ValueError(f"dataset_split={split!r}: a streamed dataset has whole splits only, such as {part!r}")
    try:
        rows = builder.as_streaming_dataset(split=split if whole_splits else part)
        return rows, next(iter(rows))
    except StopIteration:  # also out of json's builder, which looks for columns
        files = f"; no file of data={data} is there, or they are empty" if data else ""
        raise ValueError(f"dataset={name!r}, split {split!r} has no rows{files}") from None
    except Exception as error:
        if "Bad split" in str(error):
            raise ValueError(f"dataset_split={split!r} is unknown to dataset={name!r}: {error}") from error
        raise ValueError(f"dataset={name!r} cannot be read: {error}") from error


def _check_column(title: str, features: dict, column: str) -> None:
    if column not in features:
        raise ValueError(f"text_column={column!r} is no column of {title}: there is {', '.join(features)}")
    held = getattr(features[column], "dtype", features[column])
    if held not in ("string", "large_string"):
        raise ValueError(f"text_column={column!r} of {title} holds {held}, and not text")


def _builder_key(builder) -> str:
    """Name, configuration, version and a hash of the files or of the commit, as `datasets` has it for its cache."""
    return os.path.relpath(builder.cache_dir, datasets.config.HF_DATASETS_CACHE)


def _pieces_of_text(text: str | None) -> Iterator[bytes]:
    if text is not None and text.strip():
        whole = text.encode("utf-8")
        yield from _pieces(whole[at : at + PIECE] for at in range(0, len(whole), PIECE))


def _hash(text: bytes) -> str:
    return hashlib.blake2b(text, digest_size=16).hexdigest()
