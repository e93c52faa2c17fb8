"""Atomic writes of files and folders: a reader sees the old or the complete new content, whenever a process is killed.

Until it is on the disk, the new content has another name.
"""

from __future__ import annotations

import errno
import os
import shutil
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

PARTIAL = ".partial"  # suffix of what is being written
REPLACED = ".replaced"  # suffix of the old folder until it is removed
NO_SPACE = (errno.ENOSPC, errno.EDQUOT)


def write_whole(path: Path, content: str | bytes) -> None:
    """Writes a file atomically, text as UTF-8. Several processes may do so at once."""
    partial = path.with_name(f"{path.name}.{os.getpid()}{PARTIAL}")
    try:
        with open(partial, "wb") as file:
            file.write(content.encode() if isinstance(content, str) else content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, path)
    except BaseException:
        with suppress(OSError):
            partial.unlink(missing_ok=True)
        raise
    sync(path.parent)


def write_whole_folder(path: Path, write: Callable[[Path], None]) -> None:
    """Has `write` fill a folder, which then replaces `path` as a whole.

    A kill between the two renames leaves no folder of that name; nothing else is lost.
    """
    partial, replaced = path.with_name(path.name + PARTIAL), path.with_name(path.name + REPLACED)
    remove(partial)
    remove(replaced)
    try:
        write(partial)
        sync_all(partial)
    except BaseException:
        remove(partial)
        raise
    if path.exists():
        os.rename(path, replaced)  # a folder with files in it cannot be renamed onto
    os.rename(partial, path)
    sync(path.parent)
    remove(replaced)


def remove(path: Path) -> None:
    """Removes a file or a folder, if it exists."""
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def free_bytes(folder: Path) -> int:
    """Free space where `folder` is, or will be."""
    there = next(path for path in (folder.absolute(), *folder.absolute().parents) if path.is_dir())
    return shutil.disk_usage(there).free


def sync_all(folder: Path) -> None:
    """Flushes all files and folders below, and the folder itself, to the disk."""
    for path in folder.rglob("*"):
        sync(path)
    sync(folder)


def sync(path: Path) -> None:
    """Flushes a file, or a folder's list of names, to the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
