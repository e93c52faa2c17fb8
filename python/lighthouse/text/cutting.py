"""Rows made before training, once, in a memory-mapped file of `datasets`' cache.

The trap: everything that changes rows must be in the cache's key. The rows also have a digest of their ids, by which a
resumed run sees whether they are those that it began with.
"""

from __future__ import annotations

import errno
import hashlib
import json
import logging
import os
import shutil
from contextlib import contextmanager
from pathlib import Path

import datasets
import numpy as np
import pyarrow as pa
import torch
from filelock import FileLock
from tqdm.auto import tqdm

from lighthouse.text.documents import LeftOut
from lighthouse.text.tokenizer import tokens_of

# Part of the cache's key and of a text's fingerprint: raise it if the same text is to give other rows, or a stream
# another order.
ROWS_VERSION = 4

BLOCK = 2**21  # tokens written at a time, or a row

ROWS, ENDS, ABOUT = "rows.arrow", "ends.i64", "about.json"

log = logging.getLogger(__name__)


def cut_once(corpus) -> tuple[Path, dict]:
    """The folder with the rows and their documents' ends, and what was noted of them; made whole or not at all.

    The first process that asks makes it, and the others find it in the cache.
    """
    key = [ROWS_VERSION, corpus.context, corpus.encoder.identity, corpus.source.key]
    key += [sorted(corpus.held_out.documents.items())]
    folder = Path(datasets.config.HF_DATASETS_CACHE) / "lighthouse" / hash_of(key)
    _check_cache(folder.parent)
    made = folder.with_suffix(".incomplete")
    with FileLock(folder.with_suffix(".lock")):
        if not _is_whole(folder):
            shutil.rmtree(folder, ignore_errors=True)
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
                    f"no space for the tokenized text in {str(folder.parent)!r}, {written / 1e9:.3g} GB were written "
                    f"({error.strerror}): set HF_DATASETS_CACHE to a folder with more space, or use stream",
                ) from error
            finally:
                shutil.rmtree(made, ignore_errors=True)
    about = json.loads((folder / ABOUT).read_text(encoding="utf-8"))
    corpus.source.passed_over = LeftOut(about["left_out"])
    if about["left_out"] and first_process():
        log.warning("Not all of the text is used; %s.", corpus.source.passed_over)
    return folder, about


def _check_cache(folder: Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if not os.access(folder, os.W_OK):
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))
    except OSError as error:
        raise OSError(
            error.errno,
            f"the tokenized text cannot be kept in {str(folder)!r} ({error.strerror}): set HF_DATASETS_CACHE to a "
            "folder of yours, or use stream",
        ) from error


def hash_of(parts) -> str:
    return hashlib.sha256(repr(parts).encode()).hexdigest()[:32]


def first_process() -> bool:
    return not (torch.distributed.is_initialized() and torch.distributed.get_rank() > 0)


def _is_whole(folder: Path) -> bool:
    """After a loss of power a renamed folder may lack files that were not written yet."""
    try:
        sizes = json.loads((folder / ABOUT).read_text(encoding="utf-8"))["sizes"]
        return all((folder / name).stat().st_size == size for name, size in sizes.items())
    except (OSError, ValueError):
        return False


def _cut(corpus, folder: Path) -> None:
    source, context, encoder = corpus.source, corpus.context, corpus.encoder
    width = pa.list_(pa.from_numpy_dtype(encoder.dtype), context)
    schema = pa.schema({"input_ids": width, "place": pa.list_(pa.int64(), 1)})
    text = source.training(corpus.held_out.documents)
    waiting, tokens, rows, total, documents_done, digest = [], 0, 0, 0, 0, hashlib.sha256()
    with (
        open(folder / ROWS, "wb") as file,
        pa.ipc.new_stream(file, schema) as writer,
        open(folder / ENDS, "wb") as ends,
        _progress(source) as bar,
    ):

        def write(block):
            nonlocal rows
            digest.update(block.tobytes())
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

        for number, offset, ids in tokens_of(bar(text), encoder):
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
        raise ValueError(corpus.too_little)
    about = {"rows": rows, "tokens": total, "digest": digest.hexdigest()[:32], "left_out": source.passed_over.found}
    about["sizes"] = {name: (folder / name).stat().st_size for name in (ROWS, ENDS)}
    (folder / ABOUT).write_text(json.dumps(about), encoding="utf-8")


@contextmanager
def _progress(source):
    """Yields a function that passes documents on and shows the progress, if it takes more than two seconds."""
    files = source.kind == "files"
    total = sum(file.bytes for file in source.files) if files else len(source)
    unit = {"unit": "B", "unit_scale": True, "unit_divisor": 1000} if files else {"unit": " documents"}
    with tqdm(total=total, desc="tokenizing the text", delay=2, **unit) as bar:

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
