"""Text to rows: what is found, what is held out, how it is cut and cached, where a row came from, what is refused."""

from __future__ import annotations

import gzip
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from training_runs import CONTEXT, write_text

pytest.importorskip("transformers")


from lighthouse.text import (
    data,  # noqa: E402
    documents,  # noqa: E402
    files,  # noqa: E402
    tokenizer,  # noqa: E402
)
from lighthouse.training.options import DataOptions  # noqa: E402
from training_tokenizers import save_bpe  # noqa: E402

TEXT = "the light of a house on the rock by the sea "


def find(*paths, context=CONTEXT, seed=0, tokens=None, held_out=2, **changes):
    options = DataOptions(data=[str(path) for path in paths] or None, held_out=held_out, **changes)
    return data.find_corpus(options, context=context, seed=seed, tokenizer=tokens)


def write_json(folder: Path, documents: int = 60, shards: int = 3, column: str = "text") -> str:
    """Documents that begin with their number; returns the pattern of their files."""
    for shard in range(shards):
        numbers = range(shard, documents, shards)
        lines = (json.dumps({column: f"{number} " + TEXT * (1 + number % 7), "number": number}) for number in numbers)
        (folder / f"{shard}.jsonl").write_text("\n".join(lines) + "\n")
    return str(folder / "*.jsonl")


def joined(corpus, part) -> list[int]:
    """The ids of a part's documents, an end mark after each: by file, read and tokenised whole."""
    ids = []
    for file in part:
        [found] = corpus.encoder([Path(file.path).read_bytes()])
        ids += [*found.tolist(), corpus.encoder.end]
    return ids


def parts(corpus):
    files = list(enumerate(corpus.source.files))
    held_out = corpus.held_out.documents
    return [f for n, f in files if n not in held_out], [f for n, f in files if n in held_out]


# Files -----------------------------------------------------------------------------------------------------------


def test_no_file_is_in_both_parts_and_none_is_lost(tmp_path):
    train, held_out = ({file.path for file in part} for part in parts(find(write_text(tmp_path))))
    assert not train & held_out
    assert train | held_out == {str(path) for path in tmp_path.rglob("*.txt")}
    assert held_out


def test_a_seed_decides_the_order_and_what_is_held_out(tmp_path):
    write_text(tmp_path)
    one, same, other = find(tmp_path, seed=3), find(tmp_path, seed=3), find(tmp_path, seed=4)
    assert one.source.files == same.source.files and one.fingerprint == same.fingerprint
    assert one.source.files != other.source.files and one.fingerprint != other.fingerprint


@pytest.mark.parametrize(
    "context", [CONTEXT, 100, 2000], ids=["a_power_of_two", "no_power_of_two", "longer_than_files"]
)
@pytest.mark.parametrize("tokens", ["bytes", "bpe"])
def test_rows_are_the_joined_files_with_an_end_mark_after_each(tmp_path, tokens, context):
    tokens = tokenizer.load_tokenizer(None if tokens == "bytes" else save_bpe(tmp_path / "bpe"))
    corpus = find(write_text(tmp_path / "text"), context=context, tokens=tokens)
    train, held_out = data.rows_of(corpus)
    of_train, of_held_out = (joined(corpus, part) for part in parts(corpus))
    rows = np.stack([row["input_ids"] for row in train])
    assert rows.shape == (len(of_train) // context, context)
    assert train.features["input_ids"].feature.dtype == "uint16"  # as small on the disk as its ids allow
    assert rows.reshape(-1).tolist() == of_train[: rows.size]
    assert 1 <= len(held_out) <= 2
    rows = np.stack([row["input_ids"] for row in held_out])
    assert rows.reshape(-1).tolist() == of_held_out[: rows.size]


def test_a_long_document_is_cut_in_pieces_and_loses_nothing(tmp_path, monkeypatch):
    """Pieces end at a line, a space or a whole character; a document longer than memory is read twice."""
    monkeypatch.setattr(documents, "PIECE", 64)
    monkeypatch.setattr(files, "MOST_IN_MEMORY", 1024)
    monkeypatch.setattr(tokenizer, "BATCH", 256)
    long = "灯台" * 200 + " a b\n" * 100 + "x" * 500
    for name in "abc":
        (tmp_path / name).write_text(long + name, encoding="utf-8")
    corpus = find(tmp_path)
    train, _ = data.rows_of(corpus)
    rows = np.stack([row["input_ids"] for row in train]).reshape(-1)
    assert rows.tolist() == joined(corpus, parts(corpus)[0])[: rows.size]


def test_a_batch_predicts_its_own_tokens():
    batch = data.collate([{"input_ids": np.arange(5, dtype=np.uint16), "place": [7]}] * 2)
    assert batch["input_ids"].dtype == torch.int64 and batch["input_ids"].shape == (2, 5)
    assert torch.equal(batch["input_ids"], batch["labels"])
    assert batch["place"].tolist() == [[7], [7]]
    assert set(data.collate([{"input_ids": np.arange(5)}])) == {"input_ids", "labels"}


# Datasets --------------------------------------------------------------------------------------------------------


def test_a_dataset_is_split_by_row_and_cut(tmp_path):
    corpus = find(write_json(tmp_path), dataset="json")
    train, held_out = data.rows_of(corpus)
    documents = corpus.source.rows["text"]
    assert len(documents) == 60 and 1 <= len(corpus.held_out.documents) <= 6
    ids = []
    for number, document in enumerate(documents):
        if number not in corpus.held_out.documents:
            ids += [byte + 3 for byte in document.encode()] + [1]
    rows = np.stack([row["input_ids"] for row in train]).reshape(-1)
    assert rows.tolist() == ids[: rows.size] and len(ids) - rows.size < CONTEXT
    assert len(held_out) == 2


@pytest.mark.parametrize("kind", ["rows", "files", "compressed"])
def test_a_document_that_is_most_of_the_text_is_trained_on(tmp_path, kind):
    """Of ten documents one is nearly all of the text. Its share of them, or its compressed size, does not tell so."""
    folder, texts = tmp_path / "text", [f"{n} " + TEXT * (600 if n == 3 else 3) for n in range(10)]
    folder.mkdir()
    for n, content in enumerate(texts):
        if kind == "files":
            text(folder, f"{n}.txt", content=content.encode())
        if kind == "compressed":  # the large one to fewer bytes than two of the others
            text(folder, f"{n}.gz", content=gzip.compress(content.encode(), 9 if n == 3 else 0))
    path, options = folder, {}
    if kind == "rows":
        lines = [json.dumps({"text": content}) for content in texts]
        path, options = text(folder, "rows.jsonl", content="\n".join(lines).encode()), {"dataset": "json"}
    for seed in range(12):  # with some of them the large one comes first
        corpus = find(path, seed=seed, **options)
        train, _ = data.rows_of(corpus)
        assert len(train) * CONTEXT > 600 * len(TEXT), seed
        held = len(corpus.held_out.documents)
        tokens = held * len(f"0 {TEXT * 3}\0")
        assert f" {held} {'document' if kind == 'rows' else 'file'}s of {tokens:,} tokens held out, 2 x 128 " in (
            corpus.passes(10, CONTEXT) if kind == "rows" else str(corpus)
        )


def test_a_dataset_may_have_another_column_and_part_of_a_split(tmp_path):
    pattern = write_json(tmp_path, column="body")
    corpus = find(pattern, dataset="json", text_column="body", dataset_split="train[:50%]")
    data.rows_of(corpus)
    assert len(corpus.source.rows) == 30


def test_rows_of_a_dataset_without_text_are_passed_over_and_said(tmp_path, caplog):
    lines = [json.dumps({"text": text}) for text in [None, "", "  \n", *(f"{n:02} {TEXT}" for n in range(20))]]
    (tmp_path / "a.jsonl").write_text("\n".join(lines))
    corpus = find(tmp_path / "a.jsonl", dataset="json", context=64)
    train, _ = data.rows_of(corpus)
    rows = np.stack([row["input_ids"] for row in train]).reshape(-1)
    assert (rows == 1).sum() == rows.size // (len(TEXT) + 4)
    assert "left out: 3 without text (json, split train, row 0, ...)" in caplog.text


@pytest.mark.parametrize("stream", [False, True], ids=["cut", "streamed"])
def test_a_column_may_begin_with_gaps(tmp_path, stream):
    rows = "".join(f'{n},"{n} {TEXT * 5}"\n' for n in range(30))
    (tmp_path / "a.csv").write_text('id,text\n-2,\n-1,""\n' + rows)
    corpus = find(tmp_path / "a.csv", dataset="csv", stream=stream)
    assert len(next(iter(data.rows_of(corpus)[0]))["input_ids"]) == CONTEXT


def test_a_dataset_that_lies_elsewhere_is_the_same_text(tmp_path):
    corpora = []
    for name in "ab":
        (tmp_path / name).mkdir()
        corpora.append(find(write_json(tmp_path / name), dataset="json"))
        data.rows_of(corpora[-1])
    assert corpora[0].fingerprint == corpora[1].fingerprint
    assert corpora[0].rows_fingerprint == corpora[1].rows_fingerprint
    write_json(tmp_path / "b", documents=57)
    assert find(str(tmp_path / "b" / "*.jsonl"), dataset="json").fingerprint != corpora[0].fingerprint


# Places ----------------------------------------------------------------------------------------------------------


def test_a_row_is_found_again_in_its_files(tmp_path):
    for name, size in (("a", 100), ("b", 60), ("c", 30), ("d", 300)):
        (tmp_path / name).write_text("x" * size)
    corpus = find(tmp_path, held_out=1, context=64)
    train, _ = data.rows_of(corpus)
    of = {file.path: file.size + 1 for file in parts(corpus)[0]}
    starts = dict(zip(of, np.cumsum([0, *of.values()]).tolist(), strict=False))
    for row in train:
        said = corpus.describe(data.collate([row])["place"][0])
        at, told = int(row["place"][0]) * 64, said.split(": ", 1)[1].split("; ")
        expected = []
        for path, size in of.items():
            begin, stop = max(at, starts[path]), min(at + 64, starts[path] + size)
            if begin < stop:
                expected.append(f"{path}, tokens {begin - starts[path]:,} to {stop - starts[path]:,} of {size:,}")
        assert told == expected


def test_a_row_is_found_again_in_its_dataset(tmp_path):
    corpus = find(write_json(tmp_path), dataset="json")
    train, _ = data.rows_of(corpus)
    for row in train:
        text = bytes((row["input_ids"] - 3).clip(0).astype(np.uint8).tolist()).decode()
        told = ""
        for part in corpus.describe(row["place"]).split("; "):
            number = int(part.split(", row ")[1].split(",")[0])
            begin, end = (int(n) for n in part.split("tokens ")[1].split(" of ")[0].split(" to "))
            told += (corpus.source.rows[number]["text"] + "\0")[begin:end]
        assert told == text


# What is refused -------------------------------------------------------------------------------------------------


def text(folder, name="a.txt", size=9999, content=None):
    (folder / name).write_bytes(b"x" * size if content is None else content)
    return folder / name


REFUSED = [
    ("a_missing_folder", lambda f: find(f / "nowhere"), FileNotFoundError, "nowhere' does not exist"),
    ("a_pattern_without_files", lambda f: find(f / "*.txt"), FileNotFoundError, r"\*.txt' matches no file"),
    ("an_empty_folder", find, ValueError, "holds no text: there are no files"),
    (
        "no_text_in_it",
        lambda f: text(f, content=b"\0\xff") and find(f),
        ValueError,
        r"holds no text; left out: 1 not UTF-8 text \(.*a.txt\)",
    ),
    (
        "a_named_file_of_another_encoding",
        lambda f: find(text(f, content=b"caf\xe9 ole")),
        ValueError,
        "a.txt' is not UTF-8 text: byte 3 is 0xe9, .*; convert the file to UTF-8",
    ),
    (
        "a_named_file_with_a_zero_byte",
        lambda f: find(text(f, content=b"ab\0")),
        ValueError,
        "not UTF-8 text: byte 2 is zero",
    ),
    ("a_named_file_of_blanks", lambda f: find(text(f, content=b" \n" * 9)), ValueError, "a.txt' holds no text"),
    (
        "a_named_file_that_goes_wrong_late",
        lambda f: data.rows_of(find(text(f, content=b"light " * 20_000 + b"\xe9x"), text(f, "b"), text(f, "c"))),
        ValueError,
        "a.txt' is not UTF-8 text: byte 120,000 is 0xe9",
    ),
    (
        "a_broken_archive",
        lambda f: find(text(f, "a.gz", content=gzip.compress(b"light" * 999)[:-9])),
        ValueError,
        "a.gz' cannot be decompressed: Compressed file ended",
    ),
    (
        "too_little_text",
        lambda f: find(text(f, size=99)),
        ValueError,
        "holds 100 tokens, but 256 are needed: one context of 128 to train on and one held out",
    ),
    (
        "too_little_compressed_text",
        lambda f: find(*(text(f, f"{n}.gz", content=gzip.compress(b"x" * (99 + n))) for n in range(3))),
        ValueError,
        "neither a choice of its 3 files nor the end of the largest",
    ),
    (
        "a_format_without_files",
        lambda f: find(dataset="json"),
        ValueError,
        "'json' is a file format: give the files",
    ),
    ("no_such_dataset_here", lambda f: find(dataset=f"{f}/nowhere"), (ValueError, OSError), "nowhere' "),
    (
        "no_such_files_of_a_dataset",
        lambda f: find(f / "*.jsonl", dataset="json"),
        ValueError,
        "dataset='json', split 'train' has no rows",
    ),
    (
        "a_dataset_that_cannot_be_read",
        lambda f: find(text(f, "a.jsonl"), dataset="json"),
        ValueError,
        "dataset='json' cannot be read: ",
    ),
    (
        "an_unknown_split",
        lambda f: find(write_json(f), dataset="json", dataset_split="test"),
        ValueError,
        r"dataset_split='test' is unknown to dataset='json': .*Available splits: \['train'\]",
    ),
    (
        "an_unknown_column",
        lambda f: find(write_json(f), dataset="json", text_column="body"),
        ValueError,
        "text_column='body' is not a column of json, split train; columns: text, number",
    ),
    (
        "a_column_of_numbers",
        lambda f: find(write_json(f), dataset="json", text_column="number"),
        ValueError,
        "text_column='number' of json, split train has int64 instead of text",
    ),
    (
        "a_column_of_nothing",
        lambda f: find(text(f, "a.jsonl", content=b'{"text": null, "body": "a"}\n' * 9), dataset="json"),
        ValueError,
        "text_column='text' of json, split train is empty in the first rows .*; columns: text, body",
    ),
    (
        "a_column_that_turns_to_numbers",
        lambda f: find(text(f, "a.csv", content=b"text\n" + b"a\n" * 10_000 + b"7\n" * 9), dataset="csv", stream=True),
        ValueError,
        "document 10,000 of the pass has int instead of text: 7",
    ),
    (
        "a_folder_for_a_format",
        lambda f: find(f, dataset="json"),
        ValueError,
        r"is a folder, but dataset='json' needs files: name them, such as '.*\*.json', or read .* with --dataset",
    ),
    (
        "an_option_of_datasets_for_files",
        lambda f: find(text(f), text_column="body"),
        ValueError,
        "text_column='body' is for datasets: name one with dataset",
    ),
    (
        "a_file_of_rows",
        lambda f: find(text(f, "a.jsonl"), text(f)),
        ValueError,
        r"a.jsonl' is a file with rows \(.jsonl\), not a text: read a column .* with --dataset json --data '.*a.jsonl'",
    ),
    (
        "a_compressed_file_of_rows",
        lambda f: find(text(f, "a.csv.xz")),
        ValueError,
        "with --dataset csv --data '.*a.csv.xz'; to train",
    ),
    ("a_table_in_parquet", lambda f: find(text(f, "a.parquet")), ValueError, "--dataset parquet --data"),
    ("a_table_with_tabs", lambda f: find(text(f, "a.tsv")), ValueError, "a.tsv' is a file with rows .*--dataset '/"),
    (
        "nothing_but_rows",
        lambda f: text(f, "a.jsonl") and find(f),
        ValueError,
        r"holds no text; left out: 1 with rows, to be read with --dataset json \(",
    ),
    (
        "too_little_text_beside_what_is_left_out",
        lambda f: text(f, size=99) and text(f, "b", content=b"caf\xe9") and find(f),
        ValueError,
        r"holds 100 tokens, .*; left out: 1 not UTF-8 text \(.*/b\)",
    ),
    (
        "a_pipe",
        lambda f: os.mkfifo(f / "pipe") or find(f / "pipe"),
        ValueError,
        "pipe' is not a regular file: .*; save it as a file first",
    ),
    (
        "a_link_to_nothing",
        lambda f: (f / "link").symlink_to("nowhere") or find(f / "link"),
        FileNotFoundError,
        "link' is a broken link",
    ),
    (
        "an_unknown_configuration",
        lambda f: write_json(f) and find(dataset=str(f), dataset_config="large"),
        ValueError,
        "cannot be loaded: BuilderConfig 'large' not found",
    ),
    (
        "part_of_a_streamed_split",
        lambda f: find(write_json(f), dataset="json", dataset_split="train[:9]", stream=True),
        ValueError,
        "a streamed dataset has whole splits only, such as 'train'",
    ),
    (
        "a_stream_that_is_all_held_out",
        lambda f: find(write_json(f), dataset="json", stream=True, held_out=99),
        ValueError,
        "has fewer than the 99 x 128 tokens to hold out",
    ),
    (
        "a_dataset_of_one_row",
        lambda f: data.rows_of(find(write_json(f, documents=1, shards=1), dataset="json")),
        ValueError,
        "whole documents are held out, but no choice of them holds out a context of 128 tokens .*found: 0 tokens",
    ),
    (
        "a_dataset_with_too_little_text",
        lambda f: data.rows_of(find(write_json(f, documents=4), dataset="json", context=400)),
        ValueError,
        "no choice of them holds out a context of 400 tokens and leaves half of the text to train on",
    ),
]


@pytest.mark.parametrize("do, error, message", [r[1:] for r in REFUSED], ids=[r[0] for r in REFUSED])
def test_refused(tmp_path, do, error, message):
    with pytest.raises(error, match=message):
        do(tmp_path)


def test_a_dataset_that_cannot_be_reached_is_an_error():
    program = (
        "from lighthouse.text import data; from lighthouse.training.options import DataOptions\n"
        "data.find_corpus(DataOptions(dataset='nobody/nothing'), context=128, seed=0)"
    )
    offline = {**os.environ, "HF_HUB_OFFLINE": "1"}
    done = subprocess.run([sys.executable, "-c", program], env=offline, capture_output=True, text=True, timeout=60)
    assert (
        "OSError: dataset='nobody/nothing' cannot be loaded: Couldn't reach 'nobody/nothing' on the Hub" in done.stderr
    )
