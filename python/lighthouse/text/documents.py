"""What a document is, wherever it comes from: UTF-8 text in pieces, recognized by its content.

A document may be longer than memory: it comes in pieces of about 256 KiB that end with a line where they can, and a
tokenizer sees a piece at a time. The trap: the same text may come twice, under two names, and one copy would be held
out and the other trained on. So every source checks its documents with `Seen`.
"""

from __future__ import annotations

import codecs
import hashlib
import os
from collections.abc import Iterable, Iterator

import numpy as np

PIECE = 2**18
WHITE_SPACE = b" \t\n\r\f\v"

# Why a document is not used.
WITHOUT_TEXT = "without text"
NOT_UTF8 = "not UTF-8 text"
SAME_TEXT = "with the same text as another"

Documents = Iterator[tuple[int, Iterable[bytes]]]  # a number, by which the source names it, and its text


class NotText(ValueError):
    """A document that cannot be trained on, and the `reason` under which it is counted."""

    def __init__(self, message: str, reason: str):
        super().__init__(message)
        self.reason = reason


class TextLost(ValueError):
    """Text that is read while training changed, or can be read no further."""


class LeftOut:
    """What is not used: how many by reason, and the first of each. `str()` is a line, `found` fits into JSON."""

    def __init__(self, found: dict[str, list] | None = None):
        self.found = {reason: list(entry) for reason, entry in (found or {}).items()}  # reason: [how many, the first]

    def add(self, reason: str, name: str) -> None:
        self.found.setdefault(reason, [0, name])[0] += 1

    def __add__(self, other: LeftOut) -> LeftOut:
        both = LeftOut(self.found)
        for reason, (count, first) in other.found.items():
            both.found.setdefault(reason, [0, first])[0] += count
        return both

    def __bool__(self) -> bool:
        return bool(self.found)

    def __str__(self) -> str:
        parts = []
        for reason, (count, first) in self.found.items():
            example = shown(first) if count == 1 else f"{shown(first)}, ..."
            parts.append(f"{count:,} {reason} ({example})")
        return "left out: " + "; ".join(parts)


class TextDigest:
    """16 bytes that two documents share if they differ in white space at most, as line ends, or a byte order mark."""

    def __init__(self):
        self._hash = hashlib.sha256()
        self.bytes = 0  # of all pieces, white space and marks too

    def update(self, piece: bytes) -> None:
        self.bytes += len(piece)
        self._hash.update(piece.removeprefix(codecs.BOM_UTF8).translate(None, WHITE_SPACE))

    def digest(self) -> bytes:
        return self._hash.digest()[:16]

    def reading(self, pieces: Iterable[bytes]) -> Iterator[bytes]:
        """The same pieces; the digest is theirs once all were read."""
        for piece in pieces:
            self.update(piece)
            yield piece


BLANK = TextDigest().digest()


class Seen:
    """A set of digests, which keeps 8 bytes of each: 10^8 documents need 0.8 GB.

    The chance that two of so many texts share them, and one is left out in error, is 1 in 3,000.
    """

    RECENT = 2**17

    def __init__(self, digests: Iterable[bytes] = ()):
        self._recent: set[int] = set()
        self._sorted: list[np.ndarray] = []  # arrays, each more than twice as long as the next
        for digest in digests:
            self.add(digest)

    def add(self, digest: bytes) -> bool:
        """Whether it is new."""
        number = int.from_bytes(digest[:8], "little")
        if number in self._recent:
            return False
        key = np.uint64(number)
        for array in self._sorted:
            at = array.searchsorted(key)
            if at < len(array) and array[at] == key:
                return False
        self._recent.add(number)
        if len(self._recent) >= self.RECENT:
            self._settle()
        return True

    def _settle(self) -> None:
        self._sorted.append(np.sort(np.fromiter(self._recent, np.uint64, len(self._recent))))
        self._recent.clear()
        while len(self._sorted) > 1 and len(self._sorted[-2]) <= 2 * len(self._sorted[-1]):
            last = self._sorted.pop()
            self._sorted[-1] = np.sort(np.concatenate([self._sorted[-1], last]))


def pieces_of(blocks: Iterable[bytes]) -> Iterator[bytes]:
    """The same bytes in pieces that end with a line, before a space, or at least with a whole character."""
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


def changed(path: str) -> str:
    """The error for a file that has changed, or is gone, while a command uses it."""
    return f"data={path!r} changed since this command found it: text must stay as it is until the command ends"


def shown(name: str) -> str:
    r"""A file's name as it can be printed anywhere: bytes that are not UTF-8 as \xe9."""
    return os.fsencode(name).decode("utf-8", "backslashreplace")
