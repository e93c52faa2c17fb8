"""Checkpoints that are whole or skipped.

The Trainer writes a checkpoint's files one after the other into its final folder, and a process can be killed between
any two bytes. So the last file is ours: a manifest with the size of each file, written when all of them are on the disk
and before older checkpoints are removed. A folder is a whole checkpoint if it has what its manifest says.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from time import monotonic, sleep

from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR, rotate_checkpoints

from lighthouse.core.files import PARTIAL, REPLACED, remove, sync, sync_all, write_whole
from lighthouse.huggingface.trainer_state import step_of

MANIFEST = "manifest.json"
WORKERS_END = 10.0  # seconds


@contextmanager
def alone_in(folder: Path) -> Iterator[None]:
    """Holds the folder, which is made, against other runs. Raises `FileExistsError` if one is in it.

    The system releases the lock when the process ends, however it does. Workers that load data may live on for some
    seconds, so this waits for them. Where the file system has no locks nothing is held.

    The folder itself is locked: `filelock` would leave a file in it, where there may be nothing yet, and without locks
    of the system a mark that a killed process does not take away.
    """
    folder.mkdir(parents=True, exist_ok=True)
    handle, until = os.open(folder, os.O_RDONLY), monotonic() + WORKERS_END
    try:
        while True:
            try:
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                if monotonic() < until:
                    sleep(0.1)
                    continue
                raise FileExistsError(
                    f"output_dir={str(folder)!r}: another process is training in this folder; wait until it ends, or "
                    "use another folder"
                ) from None
            except OSError:
                pass
            break
        yield
    finally:
        os.close(handle)


def seal(checkpoint: Path) -> None:
    """Makes a written folder a whole checkpoint: its files go to the disk, then the manifest does."""
    files = {str(path.relative_to(checkpoint)): path for path in sorted(checkpoint.rglob("*")) if path.is_file()}
    files.pop(MANIFEST, None)
    sync_all(checkpoint)
    sizes = {name: path.stat().st_size for name, path in files.items()}
    write_whole(checkpoint / MANIFEST, json.dumps({"files": sizes}, indent=2) + "\n")
    sync(checkpoint.parent)


def fault_of(checkpoint: Path) -> str | None:
    """What keeps a folder from being a whole checkpoint; None if it is one."""
    try:
        sizes = json.loads((checkpoint / MANIFEST).read_text(encoding="utf-8"))["files"]
    except FileNotFoundError:
        return f"it is incomplete (it has no {MANIFEST})"
    except (ValueError, KeyError, TypeError):
        return f"its {MANIFEST} is damaged"
    for name, size in sizes.items():
        path = checkpoint / name
        if not path.is_file():
            return f"its {name} is missing"
        if path.stat().st_size != size:
            return f"its {name} has {path.stat().st_size:,} bytes instead of {size:,}"
    return None


def checkpoints_in(folder: Path) -> list[Path]:
    """The checkpoint folders, whole or not, by step."""
    found = [path for path in folder.glob(f"{PREFIX_CHECKPOINT_DIR}-*") if path.is_dir() and step_of(path) >= 0]
    return sorted(found, key=step_of)


def last_whole(folder: Path, say: Callable[[str], None] = lambda message: None) -> Path | None:
    """The last whole checkpoint. `say` gets a message for each later folder that is skipped, with the reason."""
    for checkpoint in reversed(checkpoints_in(folder)):
        fault = fault_of(checkpoint)
        if fault is None:
            return checkpoint
        say(f"{checkpoint} is skipped: {fault}.")
    return None


def remove_unfinished(folder: Path) -> None:
    """Removes what a kill left half written or half removed, so that nothing of it gets into what comes next."""
    for path in [*checkpoints_in(folder), *folder.glob(f"*{PARTIAL}"), *folder.glob(f"*{REPLACED}")]:
        if path.suffix in (PARTIAL, REPLACED) or fault_of(path) is not None:
            remove(path)


def rotate(folder: Path, limit: int | None, best: str | None) -> None:
    """Removes the oldest checkpoints above `limit`, by step. Call it when the newest is whole."""
    rotate_checkpoints(str(folder), save_total_limit=limit, best_model_checkpoint=best, use_mtime=False)


def weights_in(folder: Path) -> str:
    """A digest of the folder's safetensors, by which the same weights are recognized."""
    digest = hashlib.blake2b(digest_size=16)
    for path in sorted(folder.glob("*.safetensors")):
        with open(path, "rb") as file:
            while part := file.read(2**24):
                digest.update(part)
    return digest.hexdigest()
