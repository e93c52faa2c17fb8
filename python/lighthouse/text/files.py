"""Text from files, each one document: UTF-8, also compressed.

Until a file is read, only its first 64 KiB are known to be text. The trap: the rows of a file that changes while a
command runs would not match the cache's key and the run's settings; each reading checks that it did not.
"""

from __future__ import annotations

import bz2
import codecs
import gzip
import hashlib
import lzma
import math
import os
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace

import numpy as np

from lighthouse.text import documents, finding
from lighthouse.text.documents import (
    BLANK,
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
    shown,
)

HEAD = 2**16
ORDERS = ("shuffled", "path")
SAMPLES, SAMPLE = 16, 2**12  # blocks of a file that are sampled after its head, and their bytes
MOST_IN_MEMORY = 2**26  # bytes of one document; a longer file is read twice, first to see whether all of it is text

COMPRESSED_TO = 4  # bytes of text per compressed byte, roughly
BROKEN = "that cannot be decompressed"


@dataclass(frozen=True)
class TextFile:
    """A file whose first 64 KiB are UTF-8 text, or a part of one: two parts have no byte in common."""

    path: str
    real: str  # path without links
    size: int  # bytes on disk
    modified: int  # nanoseconds
    changed: int  # the same, of its state too: nobody can set it back
    sample: str  # hash of the first 64 KiB of text and of blocks from all over the file
    named: bool = False  # by the user, and not found in a folder or by a pattern
    part: tuple[int, int] | None = None  # of its text, decompressed: the first byte, and the first behind it

    @property
    def compressed(self) -> bool:
        return _compression(self.path) is not None

    @property
    def bytes(self) -> int:
        """Of text; of a whole compressed file about."""
        if self.part is not None:
            return self.part[1] - self.part[0]
        return self.size * (COMPRESSED_TO if self.compressed else 1)


@dataclass
class Files:
    """Files, each one document, in the seed's order or in that of their paths."""

    title: str
    files: tuple[TextFile, ...]
    seed: int
    left_out: LeftOut  # files that were found but are not text
    by_path: bool = False  # a folder's own files by name, then its folders
    passed_over: LeftOut = field(default_factory=LeftOut)  # files that the latest `training` did not use

    kind = "files"

    @property
    def exact(self) -> bool:
        return not any(file.compressed for file in self.files)

    @property
    def key(self) -> str:
        """Identifies the files' content, as far as their state shows."""
        return repr([(file.real, file.size, file.modified, file.changed, *_sample(file)) for file in self.files])

    @property
    def fingerprint(self) -> str:
        """The same for files of any name and place: it depends on their order, sizes and samples."""
        return repr([(file.size, *_sample(file)) for file in self.files]) + (" by path" if self.by_path else "")

    def __len__(self) -> int:
        return len(self.files)

    @property
    def total_bytes(self) -> int:
        """Of text; of compressed files about."""
        return sum(file.bytes for file in self.files)

    def name(self, number: int) -> str:
        file = self.files[number]
        return f"the end of {shown(file.path)}" if file.part and file.part[0] else shown(file.path)

    def length(self, number: int) -> int:
        """Bytes of a file's text. A compressed one is read for it."""
        file = self.files[number]
        return sum(map(len, _blocks(file))) if file.compressed else file.bytes

    def seam(self, number: int, at: int, before: int) -> tuple[int, int]:
        """Where a file's text can be parted, at byte `at` or less before: at a line's start, and between characters.

        A line is looked for in the `before` bytes before; where none starts, the two are the same.
        """
        low = max(0, at - max(before, 4))
        text = b"".join(_blocks(replace(self.files[number], part=(low, at + 1))))[: at + 1 - low]
        line, character = low + text.rfind(b"\n", 0, at - low) + 1, at
        while character > low and text[character - low] & 0xC0 == 0x80:
            character -= 1
        return (line if line > low else character), character

    def parted(self, number: int, at: int, length: int) -> Files:
        """The same, with one file as two: its first `at` bytes of text keep the number, the rest has the next."""
        first, rest = (replace(self.files[number], part=part) for part in ((0, at), (at, length)))
        return replace(self, files=(*self.files[:number], first, rest, *self.files[number + 1 :]))

    def sizes(self, run: int) -> Iterator[tuple[int, int]]:
        """Candidates to hold out, in random order: number and size in bytes. By path, runs of `run` bytes."""
        numbers = self._runs(run, [self.seed]) if self.by_path else range(len(self.files))
        return ((number, self.files[number].bytes) for number in numbers)

    def _runs(self, size: float, seed: list[int]) -> list[int]:
        """The numbers of all files: runs of neighbours in one folder, each of `size` bytes, in random order."""
        runs: list[list[int]] = []
        folder, left = None, 0.0
        for number, file in enumerate(self.files):
            if os.path.dirname(file.path) != folder or left <= 0:
                folder, left = os.path.dirname(file.path), size
                runs.append([])
            runs[-1].append(number)
            left -= file.bytes
        order = np.random.default_rng(seed).permutation(len(runs))
        return [number for run in order for number in runs[run]]

    def one(self, number: int) -> Iterator[bytes]:
        """A document's pieces, checked as they come: raises `NotText` where it stops being text."""
        return _checked(self.files[number])

    def training(self, held_out: Mapping[int, bytes], round: int | None = None) -> Documents:
        """All but those held out, by number and digest, each text once; in the order of the `round`-th pass if any.

        By path, a pass goes through the folders in an order of its own.
        """
        self.passed_over = LeftOut()
        if round is not None and self.by_path:
            numbers = [number for number in self._runs(math.inf, [self.seed, round]) if number not in held_out]
        else:
            left = np.setdiff1d(np.arange(len(self.files)), np.array(sorted(held_out), dtype=int))
            if round is not None:
                np.random.default_rng([self.seed, round]).shuffle(left)
            numbers = left.tolist()
        seen = Seen(held_out.values())
        for number in numbers:
            file = self.files[number]
            try:
                digest, pieces = _whole(file)
            except NotText as error:
                if file.named:
                    raise
                self.passed_over.add(error.reason, file.path)
                continue
            if seen.add(digest):
                yield number, pieces
            else:
                self.passed_over.add(SAME_TEXT, file.path)


def open_files(data: list[str] | None, seed: int, order: str = ORDERS[0]) -> Files:
    """The files that `data` selects, in one of `ORDERS`; reads the first 64 KiB and a few blocks of each."""
    left_out = LeftOut()
    if data is None:
        title, found = str(finding.standard_library()), finding.python_sources(finding.standard_library())
    else:
        title = " ".join(data[:3]) + (f" and {len(data) - 3:,} more" if len(data) > 3 else "")
        found = finding.find(data, left_out)
    files = []
    for path, real, named in found:
        try:
            files.append(_text_file(path, real, named))
        except NotText as error:
            if named:
                raise
            left_out.add(error.reason, path)
        except PermissionError as error:
            if named:
                raise PermissionError(f"data={path!r} cannot be read: {error.strerror}") from error
            left_out.add(finding.UNREADABLE, path)
    files = _without_copies(files, left_out)
    if not files:
        raise ValueError(f"data={title!r} holds no text" + (f"; {left_out}" if left_out else ": there are no files"))
    if order == "path":
        return Files(title, tuple(sorted(files, key=_place)), seed, left_out, by_path=True)
    shuffled = np.random.default_rng([seed]).permutation(len(files))
    return Files(title, tuple(files[number] for number in shuffled), seed, left_out)


def _sample(file: TextFile) -> tuple:
    return (file.sample,) if file.part is None else (file.sample, file.part)


def _place(file: TextFile) -> tuple[list[str], str]:
    folder, name = os.path.split(os.path.abspath(file.path))
    return folder.split(os.sep), name


def sample_of(path: str, size: int, head: bytes, start: int) -> str:
    """A hash of `head`, and of blocks spread over the file from byte `start` to its last: all of up to 64 KiB there."""
    digest = hashlib.sha256(head)
    if size > start:
        with open(path, "rb") as file:
            for offset in np.linspace(start, max(start, size - SAMPLE), SAMPLES, dtype=np.int64).tolist():
                file.seek(offset)
                digest.update(file.read(SAMPLE))
    return digest.hexdigest()[:32]


def _text_file(path: str, real: str, named: bool) -> TextFile:
    state = os.stat(path)
    with _open(path) as stream:
        head = stream.read(HEAD)
    _check(path, head, 0, end=len(head) < HEAD)
    if not head.strip() and len(head) < HEAD:
        raise NotText(f"data={path!r} holds no text", WITHOUT_TEXT)
    sample = sample_of(path, state.st_size, head, 0 if _compression(path) else HEAD)
    return TextFile(path, real, state.st_size, state.st_mtime_ns, state.st_ctime_ns, sample, named)


def _without_copies(files: list[TextFile], left_out: LeftOut) -> list[TextFile]:
    """Keeps the first of byte-identical files; reads only those whole whose sizes and samples match."""
    alike = Counter((file.size, file.sample) for file in files)
    kept, contents = [], set()
    for file in files:
        if alike[file.size, file.sample] > 1:
            content = file.size, file.sample, _digest(file.path) if file.size > HEAD else None
            if content in contents:
                left_out.add(SAME_TEXT, file.path)
                continue
            contents.add(content)
        kept.append(file)
    return kept


def _digest(path: str) -> bytes:
    with open(path, "rb") as file:
        digest = hashlib.sha256()
        while block := file.read(documents.PIECE):
            digest.update(block)
        return digest.digest()


# Reading ---------------------------------------------------------------------------------------------------------


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
    # zstandard.open would stop after the first of several frames.
    return zstandard.ZstdDecompressor().stream_reader(open(path, mode), read_across_frames=True, closefd=True)


OPEN: dict[str, Callable] = dict(zip(finding.COMPRESSED, (gzip.open, bz2.open, lzma.open, _open_zstd), strict=True))


def _compression(path: str) -> str | None:
    suffix = os.path.splitext(path)[1].lower()
    return suffix if suffix in OPEN else None


class _open:
    """The text of a file, decompressed; what cannot be decompressed raises `NotText`."""

    def __init__(self, path: str):
        self.path = path
        self.stream = OPEN.get(_compression(path) or "", open)(path, "rb")

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.stream.close()

    def skip(self, size: int) -> None:
        if _compression(self.path) is None:
            self.stream.seek(size)
        while _compression(self.path) and size > 0 and (block := self.read(min(documents.PIECE, size))):
            size -= len(block)

    def read(self, size: int) -> bytes:
        try:
            return self.stream.read(size)
        except Exception as error:
            system = isinstance(error, OSError) and error.errno is not None  # a disk's fault, not the file's
            if _compression(self.path) is None or system:
                raise
            raise NotText(f"data={self.path!r} cannot be decompressed: {error}", BROKEN) from error


def _blocks(file: TextFile) -> Iterator[bytes]:
    try:
        with _open(file.path) as stream:
            start, stop = file.part or (0, None)
            stream.skip(start)
            left = math.inf if stop is None else stop - start
            while left > 0 and (block := stream.read(int(min(documents.PIECE, left)))):
                left -= len(block)
                yield block
    except (NotText, OSError):
        _check_unchanged(file)
        raise
    _check_unchanged(file)


def _check_unchanged(file: TextFile) -> None:
    """Called also before a file is rejected as not text: an archive that is still being written is incomplete."""
    state = os.stat(file.path) if os.path.exists(file.path) else None
    if state is None or (state.st_size, state.st_mtime_ns) != (file.size, file.modified):
        raise ValueError(changed(file.path))


def _checked(file: TextFile) -> Iterator[bytes]:
    offset = file.part[0] if file.part else 0
    for piece in pieces_of(_blocks(file)):
        try:
            _check(file.path, piece, offset, end=True)
        except NotText:
            _check_unchanged(file)
            raise
        offset += len(piece)
        yield piece


def _whole(file: TextFile) -> tuple[bytes, Iterable[bytes]]:
    """A file's digest and its pieces, after checking that all of it is text."""
    digest, first, size = TextDigest(), [], 0
    for piece in digest.reading(_checked(file)):
        size += len(piece)
        if size <= MOST_IN_MEMORY:
            first.append(piece)
        else:
            first.clear()
    if digest.digest() == BLANK:
        raise NotText(f"data={file.path!r} holds no text", WITHOUT_TEXT)
    return digest.digest(), first if size <= MOST_IN_MEMORY else pieces_of(_blocks(file))


def _check(path: str, text: bytes, offset: int, end: bool) -> None:
    try:
        codecs.getincrementaldecoder("utf-8")().decode(text, final=end)
    except UnicodeDecodeError as error:
        raise NotText(
            f"data={path!r} is not UTF-8 text: byte {offset + error.start:,} is 0x{text[error.start]:02x}, "
            f"{error.reason}; convert the file to UTF-8",
            NOT_UTF8,
        ) from None
    if (zero := text.find(b"\0")) >= 0:
        raise NotText(f"data={path!r} is not UTF-8 text: byte {offset + zero:,} is zero", NOT_UTF8)
