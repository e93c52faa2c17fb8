"""The files that `--data` selects, and what is left out.

Links are followed, to folders too, and loops of them end. A file that is reached in two ways is one file.
"""

from __future__ import annotations

import glob
import os
import sysconfig
from collections import deque
from collections.abc import Iterator
from pathlib import Path

from lighthouse.text.documents import LeftOut

HIDDEN = "hidden"
DANGLING = "broken links"
UNREADABLE = "without read permission"
SPECIAL = "special files"

COMPRESSED = (".gz", ".bz2", ".xz", ".zst")
# Files with rows, whose text is in one field, and how to read them: as text they would be trained on with all their
# marks and fields.
ROWS = {
    ".json": "--dataset json",
    ".jsonl": "--dataset json",
    ".ndjson": "--dataset json",
    ".csv": "--dataset csv",
    ".tsv": "--dataset FOLDER",
    ".parquet": "--dataset parquet",
    ".arrow": "--dataset arrow",
}
NOT_SOURCES = {"site-packages", "dist-packages", "__pycache__", "test", "tests", "idle_test"}


def find(entries: list[str], left_out: LeftOut) -> list[tuple[str, str, bool]]:
    """Each file once, sorted: its path, its real path, and whether an entry names the file itself.

    Raises:
        FileNotFoundError: an entry that does not exist, or a pattern without files.
        PermissionError: a folder that was named cannot be read.
        ValueError: an entry that is neither file nor folder, or is a file with rows.
    """
    found: list[tuple[str, str, bool]] = []
    walked: set[str] = set()
    for entry in entries:
        found += _find(entry, left_out, walked)
    named = {real for _, real, by_name in found if by_name}
    once: dict[str, tuple[str, str, bool]] = {}
    for path, real, _ in sorted(found, key=lambda file: os.path.abspath(file[0])):
        once.setdefault(real, (path, real, real in named))
    return [file for file in once.values() if file[2] or not _is_of_rows(file[0], left_out)]


def standard_library() -> Path:
    """The folder with the running Python's standard library."""
    return Path(sysconfig.get_path("stdlib"))


def python_sources(root: Path) -> list[tuple[str, str, bool]]:
    """As `find`: the `.py` files of a Python's library, without its tests and installed packages."""
    found: list[str] = []
    for folder, folders, names in os.walk(root):
        folders[:] = set(folders) - NOT_SOURCES
        found += (os.path.join(folder, name) for name in names if name.endswith(".py"))
    return [(path, os.path.realpath(path), False) for path in sorted(found)]


def suffix_of_rows(path: str) -> str | None:
    """The suffix of a file, compressed or not, if it means that it has rows; None if it may be text."""
    name = path.lower()
    for suffix in COMPRESSED:
        name = name.removesuffix(suffix)
    suffix = os.path.splitext(name)[1]
    return suffix if suffix in ROWS else None


def _is_of_rows(path: str, left_out: LeftOut) -> bool:
    suffix = suffix_of_rows(path)
    if suffix is not None:
        left_out.add(f"with rows, to be read with {ROWS[suffix]}", path)
    return suffix is not None


def _find(entry: str, left_out: LeftOut, walked: set[str]) -> Iterator[tuple[str, str, bool]]:
    path = os.path.expanduser(entry)
    if os.path.isfile(path):
        _refuse_rows(entry, path)
        yield path, os.path.realpath(path), True
    elif os.path.isdir(path):
        yield from _files_below(path, left_out, walked, entry)
    elif os.path.exists(path):
        raise ValueError(f"data={entry!r} is not a regular file: text is read more than once; save it as a file first")
    elif os.path.lexists(path):
        raise FileNotFoundError(f"data={entry!r} is a broken link")
    elif glob.has_magic(path):
        some = False
        for match in sorted(glob.iglob(path, recursive=True)):
            if os.path.isdir(match):  # as where a shell resolves the pattern
                some = True
                yield from _files_below(match, left_out, walked)
            elif os.path.isfile(match):
                some = True
                yield match, os.path.realpath(match), False
            else:
                left_out.add(_why_no_file(match), match)
        if not some:
            raise FileNotFoundError(f"data={entry!r} matches no file")
    else:
        raise FileNotFoundError(f"data={entry!r} does not exist")


def _refuse_rows(entry: str, path: str) -> None:
    suffix = suffix_of_rows(path)
    if suffix is not None:
        way = ROWS[suffix]
        way = (
            way.replace("FOLDER", repr(os.path.dirname(path) or ".")) if "FOLDER" in way else f"{way} --data {entry!r}"
        )
        raise ValueError(
            f"data={entry!r} is a file with rows ({suffix}), not a text: read a column of it (--text_column) with "
            f"{way}; to train on all its marks and fields, give it another suffix"
        )


def _files_below(top: str, left_out: LeftOut, walked: set[str], entry: str = "") -> Iterator[tuple[str, str, bool]]:
    """The regular files of a folder, recursively. Linked folders come last: the plain path of a file counts."""
    folders, links = deque([top]), deque[str]()
    while folders or links:
        folder = folders.popleft() if folders else links.popleft()
        real = os.path.realpath(folder)
        if real in walked:
            continue
        walked.add(real)
        try:
            with os.scandir(folder) as found:
                entries = sorted(found, key=lambda entry: entry.name)
        except PermissionError as error:
            if entry and folder == top:
                raise PermissionError(f"data={entry!r} cannot be read: {error.strerror}") from error
            left_out.add(UNREADABLE, folder)
            continue
        for each in entries:
            if each.name.startswith("."):
                left_out.add(HIDDEN, each.path)
            elif os.path.isdir(each.path):
                (links if each.is_symlink() else folders).append(each.path)
            elif os.path.isfile(each.path):
                path = os.path.realpath(each.path) if each.is_symlink() else os.path.join(real, each.name)
                yield each.path, path, False
            else:
                left_out.add(_why_no_file(each.path), each.path)


def _why_no_file(path: str) -> str:
    if os.path.exists(path):
        return SPECIAL
    return DANGLING if os.path.islink(path) else UNREADABLE
