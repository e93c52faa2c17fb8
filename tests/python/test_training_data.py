"""Text to rows: what is found, what is held out, how it is cut, and what is refused."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from training_runs import CONTEXT, write_text

pytest.importorskip("transformers")

from lighthouse.training import data  # noqa: E402
from lighthouse.training.model import byte_tokenizer  # noqa: E402


def find(folder, **changes):
    return data.find_corpus(str(folder), **{"context": CONTEXT, "held_out": 2, "seed": 0, **changes})


def test_no_file_is_in_both_parts_and_none_is_lost(tmp_path):
    corpus = find(write_text(tmp_path))
    train, held_out = ({file.path for file in part} for part in (corpus.train, corpus.held_out))
    assert not train & held_out
    assert train | held_out == {str(path) for path in tmp_path.rglob("*.txt")}
    assert held_out


def test_a_seed_decides_the_order_and_what_is_held_out(tmp_path):
    write_text(tmp_path)
    assert find(tmp_path, seed=3) == find(tmp_path, seed=3)
    assert find(tmp_path, seed=3).train != find(tmp_path, seed=4).train


def test_rows_are_the_joined_files_with_an_end_mark_behind_each(tmp_path):
    corpus = find(write_text(tmp_path))
    train, held_out = data.rows_of(corpus)
    end = byte_tokenizer().eos_token_id
    joined = []
    for file in corpus.train:
        joined += [byte + 3 for byte in Path(file.path).read_bytes()] + [end]
    rows = np.stack([row["input_ids"] for row in train])
    assert rows.shape == (len(joined) // CONTEXT, CONTEXT)
    assert rows.reshape(-1).tolist() == joined[: rows.size]
    assert len(held_out) == corpus.held_out_rows == 2


def test_ids_are_the_tokenizers(tmp_path):
    text = "naïve façade, 灯台 and\ttabs\n" * 40
    for name in "ab":
        (tmp_path / name).write_text(text, encoding="utf-8")
    train, _ = data.rows_of(find(tmp_path))
    row = train[0]["input_ids"].tolist()
    assert row == byte_tokenizer()(text, add_special_tokens=False)["input_ids"][:CONTEXT]


def test_a_batch_predicts_its_own_tokens():
    batch = data.collate([{"input_ids": np.arange(5, dtype=np.int32)}] * 2)
    assert batch["input_ids"].dtype == torch.int64 and batch["input_ids"].shape == (2, 5)
    assert torch.equal(batch["input_ids"], batch["labels"])


def test_a_changed_file_is_read_again(tmp_path):
    write_text(tmp_path)
    before = data.rows_of(find(tmp_path))[0][0]["input_ids"]
    write_text(tmp_path, seed=1)
    assert not np.array_equal(before, data.rows_of(find(tmp_path))[0][0]["input_ids"])


def test_files_without_text_are_left_out_and_counted(tmp_path):
    write_text(tmp_path)
    (tmp_path / "picture.bin").write_bytes(bytes(range(256)))
    (tmp_path / "latin.txt").write_bytes(b"caf\xe9 " * 100)
    (tmp_path / "zero.txt").write_bytes(b"a\0b" * 100)
    (tmp_path / "empty.txt").write_bytes(b"")
    (tmp_path / ".hidden").write_text("not looked at", encoding="utf-8")
    corpus = find(tmp_path)
    assert corpus.skipped == 4
    assert "4 files without UTF-8 text left out" in str(corpus)


def test_the_standard_library_is_text_enough():
    corpus = data.find_corpus(None, context=8192, held_out=4, seed=0)
    assert corpus.train_tokens > 5_000_000 and corpus.held_out_rows == 4
    assert not any("site-packages" in file.path for file in corpus.train)


REFUSED = [
    ("a_missing_folder", lambda folder: folder / "nowhere", FileNotFoundError, "nowhere' does not exist"),
    ("an_empty_folder", lambda folder: folder, ValueError, "holds no text: none of its 0 files"),
    (
        "no_text_in_it",
        lambda folder: (folder / "a.bin").write_bytes(b"\0\xff") and folder,
        ValueError,
        "holds no text: none of its 1 files",
    ),
    (
        "too_little_text",
        lambda folder: (folder / "a.txt").write_text("x" * 99) and folder,
        ValueError,
        "holds 100 tokens, and 256 are needed: one context of 128 to train on and one held out",
    ),
    (
        "a_single_file",
        lambda folder: (folder / "a.txt").write_text("x" * 9999) and folder,
        ValueError,
        "no choice of its 1 files .* split the largest, of 10,000 tokens",
    ),
]


@pytest.mark.parametrize("folder, error, message", [r[1:] for r in REFUSED], ids=[r[0] for r in REFUSED])
def test_refused(tmp_path, folder, error, message):
    with pytest.raises(error, match=message):
        find(folder(tmp_path))
