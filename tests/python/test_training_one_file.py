"""One large file as the only text: its end is held out, and no byte of that is trained on."""

from __future__ import annotations

import bz2
import gzip
import itertools
import shutil
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("transformers")

from lighthouse.evaluation.text import text_of_run  # noqa: E402
from lighthouse.text import data, documents  # noqa: E402
from lighthouse.text.tokenizer import load_tokenizer  # noqa: E402
from lighthouse.training import PretrainResult, prepare, pretrain  # noqa: E402
from lighthouse.training.options import DataOptions  # noqa: E402
from training_runs import CONTEXT, WORDS, options, training  # noqa: E402
from training_tokenizers import save_bpe  # noqa: E402

pytestmark = pytest.mark.usefixtures("one_thread")


def book(size: int, line: int = 9, word: str = "") -> bytes:
    """Numbered words, so that no two stretches are alike; a line break after each `line`-th, or none for 0."""
    text = ""
    for number in itertools.count():
        text += f"{number} {word or WORDS[number % len(WORDS)]}" + ("\n" if line and number % line == 0 else " ")
        if len(text.encode()) >= size:
            return text.encode()[:size].decode(errors="ignore").encode()


def find(*paths, held_out=2, context=CONTEXT, tokens=None, **changes):
    chosen = DataOptions(data=[str(path) for path in paths], held_out=held_out, **changes)
    return data.find_corpus(chosen, context=context, seed=0, tokenizer=tokens)


def text_in(rows, encoder) -> str:
    """Of rows of ids, without what marks the end of a document."""
    return encoder.tokenizer.decode([n for n in rows.reshape(-1).tolist() if n != encoder.end])


FILES = [
    # the text, how it is kept, how many contexts are asked for
    ("lines", book(20_000), None, 2),
    ("no_line_in_it", book(20_000, line=0), None, 2),
    ("letters_of_three_bytes", "灯台の光".encode() * 1500, None, 2),
    ("more_than_a_tenth_is_asked_for", book(9_000), None, 100),
    ("just_two_contexts", book(2 * CONTEXT), None, 2),
    ("two_contexts_and_a_half", book(5 * CONTEXT // 2), None, 2),
    ("gzip", book(20_000), gzip.compress, 2),
    ("bzip2", book(20_000), bz2.compress, 2),
]


@pytest.mark.parametrize("bpe", [False, True], ids=["bytes", "bpe"])
@pytest.mark.parametrize("text, pack, held_out", [f[1:] for f in FILES], ids=[f[0] for f in FILES])
def test_its_end_is_held_out_and_the_rest_is_trained_on(tmp_path, monkeypatch, text, pack, held_out, bpe):
    monkeypatch.setattr(documents, "PIECE", 1000)
    path = tmp_path / ("a.txt" if pack is None else "a.gz" if pack is gzip.compress else "a.bz2")
    path.write_bytes(text if pack is None else pack(text))
    tokens, context = (load_tokenizer(save_bpe(tmp_path / "bpe")), CONTEXT // 3) if bpe else (None, CONTEXT)
    corpus = find(path, held_out=held_out, tokens=tokens, context=context)
    [(number, _)] = corpus.held_out.documents.items()
    first = b"".join(b"".join(pieces) for _, pieces in corpus.source.training(corpus.held_out.documents))
    end = b"".join(corpus.source.one(number))
    assert first + end == text and first.decode() and end.decode()
    assert 0 < len(end) <= len(text) / 2 and len(end) == corpus.held_out.bytes
    held = corpus.held_out.rows
    assert 1 <= len(held) <= held_out
    if not bpe:
        assert len(end) <= max(0.1 * len(text), CONTEXT) * 9 / 8 + 1
    rows, held_again = data.rows_of(corpus)
    assert len(rows) >= 1 and np.asarray(held_again["input_ids"][:]).tolist() == held.tolist()
    if text.isascii():
        assert end.decode().startswith(text_in(held, corpus.encoder))
        assert text_in(np.asarray(rows["input_ids"][:]), corpus.encoder) in first.decode()
    assert f"the end of {path} (no whole file can be held out) of " in str(corpus) and ": 1 file of" in str(corpus)


def test_beside_small_files_it_is_the_largest(tmp_path):
    for name, size in (("a", 50), ("b", 30_000), ("c", 40)):
        (tmp_path / name).write_bytes(book(size, word=name))
    corpus = find(tmp_path)
    assert f"3 files of {len(book(30_000, word='b')) + 50 + 40 - corpus.held_out.bytes + 3:,} tokens" in str(corpus)
    assert f"the end of {tmp_path / 'b'}" in str(corpus)


@pytest.mark.parametrize("changes", [{}, {"stream": True}, {"order": "path"}], ids=["cut", "streamed", "by_path"])
def test_the_same_text_elsewhere_is_the_same_and_another_end_is_not(tmp_path, changes):
    one, copy, other = (tmp_path / name for name in ("one.txt", "copy.txt", "other.txt"))
    one.write_bytes(book(20_000))
    copy.write_bytes(book(20_000))
    other.write_bytes(book(20_000)[:-9] + b"the end.\n")
    its = [find(path, **changes).fingerprint for path in (one, copy, other)]
    assert its[0] == its[1] != its[2]
    assert find(one, held_out=1, **changes).fingerprint != its[0]


def test_a_stream_of_it_has_nothing_of_its_end(tmp_path):
    (tmp_path / "a.txt").write_bytes(book(9_000))
    corpus = find(tmp_path / "a.txt", stream=True)
    rows, _ = data.rows_of(corpus)
    streamed = list(itertools.islice(iter(rows), 3 * (9_000 - corpus.held_out.bytes) // CONTEXT))
    first = b"".join(b"".join(pieces) for _, pieces in corpus.source.training(corpus.held_out.documents)).decode()
    assert all(text_in(row["input_ids"], corpus.encoder) in first for row in streamed)


def test_a_run_on_it_goes_on_where_it_lies_elsewhere_and_is_evaluated(tmp_path):
    (tmp_path / "book.txt").write_bytes(book(20_000))
    often = {"save_strategy": "steps", "save_steps": 1}
    whole = pretrain(options(tmp_path / "book.txt"), training(tmp_path / "whole", **often))
    shutil.copytree(tmp_path / "whole", tmp_path / "cut", ignore=shutil.ignore_patterns("model", "results.json", "*-5"))
    (tmp_path / "book.txt").rename(tmp_path / "moved.txt")
    again = pretrain(options(tmp_path / "moved.txt"), training(tmp_path / "cut", resume=True, **often))
    assert [p.loss for p in again.held_out] == [p.loss for p in whole.held_out]
    its = prepare(options(tmp_path / "moved.txt"), training(tmp_path / "new")).corpus.held_out.rows
    settings = PretrainResult.load(tmp_path / "cut" / "results.json").settings
    assert text_of_run(settings, CONTEXT, 16).rows.tolist() == its.tolist()
    changed = (tmp_path / "moved.txt").read_bytes()
    (tmp_path / "moved.txt").write_bytes(changed[:-9] + b"the end.\n")
    shutil.rmtree(tmp_path / "cut" / "model")
    with pytest.raises(ValueError, match="the text, its order, .* has changed"):
        prepare(options(tmp_path / "moved.txt"), training(tmp_path / "cut", resume=True, **often))


REFUSED = [
    ("too_short", book(2 * CONTEXT - 2), {}, "holds 255 tokens, but 256 are needed"),
    (
        "too_short_compressed",
        gzip.compress(book(CONTEXT)),
        {"name": "a.gz"},
        "holds 131 tokens, but 256 are needed",
    ),
    (
        "a_blank_end",
        book(20_000) + b"\n" * 20_000,
        {},
        "a.txt: its end is held out, but has blanks and line ends alone",
    ),
    ("an_end_that_is_no_text", book(20_000) + b"\xe9 x", {}, "is not UTF-8 text: byte 20,0.. is 0xe9"),
]


@pytest.mark.parametrize("content, how, said", [r[1:] for r in REFUSED], ids=[r[0] for r in REFUSED])
def test_refused(tmp_path, content, how, said):
    path = Path(tmp_path / how.get("name", "a.txt"))
    path.write_bytes(content)
    with pytest.raises(ValueError, match=said):
        find(path)


def test_a_copy_of_the_file_whose_end_is_held_out_is_refused(tmp_path):
    """The same text but for a line end, as whole documents are compared."""
    for name, content in (
        ("one.txt", book(20_000)),
        ("other.txt", book(20_000) + b"\n"),
        ("small.txt", b"a few words"),
    ):
        (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match="have the same text, and the end of one is held out.* leave one of them out"):
        find(tmp_path)
