"""Text files to rows of token ids, each one context long.

Bytes become ids directly, byte + 3, as ByT5Tokenizer has it. The tokenizer itself does under a megabyte a second, and
it reads text such as "</s>" in a file as its own end mark.
"""

from __future__ import annotations

import hashlib
import os
import random
import sysconfig
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from datasets import Dataset, Features, Sequence, Value

from lighthouse.training.model import byte_tokenizer

# Part of the cache's key: raise it when the same files are to give other rows.
ROWS_VERSION = 1

MOST_HELD_OUT = 0.1
NOT_SOURCES = {"site-packages", "dist-packages", "__pycache__", "test", "tests", "idle_test"}


@dataclass(frozen=True)
class TextFile:
    """A file of UTF-8 text; `tokens` counts its bytes and the end mark."""

    path: str
    tokens: int
    modified: int  # nanoseconds


@dataclass(frozen=True)
class Corpus:
    """The files of a run, in the order in which they are joined. No file is in both parts."""

    root: str
    context: int
    train: tuple[TextFile, ...]
    held_out: tuple[TextFile, ...]
    held_out_rows: int
    skipped: int  # files that hold no UTF-8 text

    @property
    def train_tokens(self) -> int:
        return sum(file.tokens for file in self.train)

    @property
    def fingerprint(self) -> str:
        """Of the files, their sizes and their order: another text is another run."""
        parts = [[(file.path, file.tokens) for file in part] for part in (self.train, self.held_out)]
        return hashlib.sha256(repr(parts).encode()).hexdigest()[:16]

    def __str__(self) -> str:
        skipped = f"; {self.skipped} files without UTF-8 text left out" if self.skipped else ""
        return (
            f"{self.root}: {len(self.train):,} files of {self.train_tokens:,} tokens to train on, "
            f"{len(self.held_out):,} files held out, {self.held_out_rows} x {self.context:,} tokens of them evaluated"
            + skipped
        )


def standard_library() -> Path:
    """The folder with the running Python's standard library."""
    return Path(sysconfig.get_path("stdlib"))


def find_corpus(folder: str | None, *, context: int, held_out: int, seed: int) -> Corpus:
    """Finds the text files below `folder`, or the standard library's sources, and holds some out.

    Args:
        folder: text files in any depth; hidden ones and those without UTF-8 text are left out. None is the `.py`
            sources of the running Python's standard library, without its tests and installed packages.
        context: tokens in a row.
        held_out: rows wanted for evaluation; files are held out until they hold as many, up to a tenth of the text.
        seed: decides which files are held out and the order of the others; equal seeds and files, equal result.

    Raises:
        FileNotFoundError: `folder` does not exist.
        ValueError: it holds no text, too little, or so few files that none can be held out.
    """
    root = standard_library() if folder is None else Path(folder)
    if not root.exists():
        raise FileNotFoundError(f"data={str(root)!r} does not exist")
    paths = _python_sources(root) if folder is None else _all_files(root)
    files = [file for path in paths if (file := _read_text_file(path)) is not None]
    if not files:
        raise ValueError(f"data={str(root)!r} holds no text: none of its {len(paths)} files is UTF-8 text")
    total = sum(file.tokens for file in files)
    if total < 2 * context:
        raise ValueError(
            f"data={str(root)!r} holds {total:,} tokens, and {2 * context:,} are needed: one context of {context:,} "
            "to train on and one held out"
        )

    random.Random(seed).shuffle(files)
    wanted = max(context, min(held_out * context, int(total * MOST_HELD_OUT)))
    apart, train, tokens_apart = [], [], 0
    for file in files:
        if tokens_apart < wanted and total - tokens_apart - file.tokens >= max(context, total // 2):
            apart.append(file)
            tokens_apart += file.tokens
        else:
            train.append(file)
    if tokens_apart < context:
        raise ValueError(
            f"data={str(root)!r}: whole files are held out, and no choice of its {len(files)} files leaves a context "
            f"of {context:,} tokens held out and half of the text to train on: split the largest, "
            f"of {max(file.tokens for file in files):,} tokens"
        )
    rows = min(held_out, tokens_apart // context)
    return Corpus(str(root), context, tuple(train), tuple(apart), rows, len(paths) - len(files))


def rows_of(corpus: Corpus) -> tuple[Dataset, Dataset]:
    """The rows to train on and those held out, `{"input_ids": int32 [context]}`, as cached datasets."""
    train = _dataset("train", corpus.train, corpus.context)
    held_out = _dataset("held_out", corpus.held_out, corpus.context)
    # Spread over the held-out files, since a file tells about itself only.
    spread = np.linspace(0, len(held_out) - 1, corpus.held_out_rows).round().astype(int)
    return train, held_out.select(spread)


def collate(rows: list[dict]) -> dict:
    """Rows to a batch: `input_ids` and, the same, `labels`, int64 `[B, context]`; the model shifts the labels."""
    import torch

    ids = torch.from_numpy(np.stack([np.asarray(row["input_ids"], dtype=np.int64) for row in rows]))
    return {"input_ids": ids, "labels": ids.clone()}


def _python_sources(root: Path) -> list[Path]:
    found = []
    for folder, folders, names in os.walk(root):
        folders[:] = sorted(set(folders) - NOT_SOURCES)
        found += [Path(folder, name) for name in sorted(names) if name.endswith(".py")]
    return found


def _all_files(root: Path) -> list[Path]:
    if root.is_file():
        return [root]
    found = []
    for folder, folders, names in os.walk(root):
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        found += [Path(folder, name) for name in sorted(names) if not name.startswith(".")]
    return [path for path in found if path.is_file()]


def _read_text_file(path: Path) -> TextFile | None:
    """The file if it holds UTF-8 text; a zero byte is not text."""
    text = path.read_bytes()
    try:
        text.decode("utf-8")
    except UnicodeDecodeError:
        return None
    if not text.strip() or b"\0" in text:
        return None
    return TextFile(str(path), len(text) + 1, path.stat().st_mtime_ns)


def _dataset(name: str, files: tuple[TextFile, ...], context: int) -> Dataset:
    key = repr((ROWS_VERSION, context, files)).encode()
    features = Features({"input_ids": Sequence(Value("int32"), length=context)})
    rows = Dataset.from_generator(
        _rows,
        features=features,
        # A tuple: of a list, datasets would make shards, and each file would be cut by itself.
        gen_kwargs={"paths": tuple(file.path for file in files), "context": context},
        split=name,
        fingerprint=hashlib.sha256(key).hexdigest()[:32],
    )
    return rows.with_format("numpy")


def _rows(paths: tuple[str, ...], context: int) -> Iterator[dict]:
    """The files joined, with an end mark behind each, and cut; the rest that fills no row is left out."""
    tokenizer = byte_tokenizer()
    end = np.array([tokenizer.eos_token_id], dtype=np.int32)
    waiting, tokens = [], 0
    for path in paths:
        ids = np.frombuffer(Path(path).read_bytes(), dtype=np.uint8).astype(np.int32) + tokenizer.offset
        waiting += [ids, end]
        tokens += len(ids) + 1
        if tokens >= context:
            joined = np.concatenate(waiting)
            cut = tokens // context * context
            for row in joined[:cut].reshape(-1, context):
                yield {"input_ids": row}
            waiting, tokens = [joined[cut:]], tokens - cut
