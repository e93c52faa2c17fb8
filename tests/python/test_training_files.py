"""Which files a text is made of: what is found, what is left out and said, and texts that come twice."""

from __future__ import annotations

import bz2
import gzip
import importlib.util
import json
import lzma
import os
import sys
from pathlib import Path

import numpy as np
import pytest

from training_runs import write_text

pytest.importorskip("transformers")

from lighthouse.text import (
    data,  # noqa: E402
    documents,  # noqa: E402
    files,  # noqa: E402
    finding,  # noqa: E402
)
from lighthouse.training.options import DataOptions  # noqa: E402
from test_training_data import TEXT, find, joined, parts  # noqa: E402


def test_what_is_left_out_is_counted_by_reason_and_named(tmp_path, monkeypatch):
    text = write_text(tmp_path / "text")
    (text / "picture.bin").write_bytes(bytes(range(256)))
    (text / "latin.txt").write_bytes(b"caf\xe9 " * 100)
    (text / "zero.txt").write_bytes(b"a\0b" * 100)
    (text / "empty.txt").write_bytes(b"")
    (text / "broken.gz").write_bytes(b"no gzip")
    (text / ".git").mkdir()
    (text / ".hidden").write_text(TEXT)
    (text / "gone.txt").symlink_to("nowhere")
    (text / "round.txt").symlink_to("round.txt")
    (text / "locked").mkdir()
    os.mkfifo(text / "pipe")
    (text / "rows.jsonl").write_text('{"text": "a"}\n')
    (text / "more.JSONL.gz").write_bytes(gzip.compress(b"{}"))
    (text / "table.csv").write_text("id,text\n")
    (text / "copy.txt").write_bytes((text / "00.txt").read_bytes())
    scandir, opened = os.scandir, files._open

    def locked(path):  # as for a user who is not root
        if str(path).endswith("locked"):
            raise PermissionError(13, "Permission denied")
        return scandir(path)

    def closed(path):
        if path.endswith("03.txt"):
            raise PermissionError(13, "Permission denied")
        return opened(path)

    monkeypatch.setattr(finding.os, "scandir", locked)
    monkeypatch.setattr(files, "_open", closed)
    found = find(text)
    assert {reason: (count, Path(first).name) for reason, (count, first) in found.left_out.found.items()} == {
        "hidden": (2, ".git"),
        "broken links": (2, "gone.txt"),
        "special files": (1, "pipe"),
        "without read permission": (2, "locked"),
        "with rows, to be read with --dataset json": (2, "more.JSONL.gz"),
        "with rows, to be read with --dataset csv": (1, "table.csv"),
        "not UTF-8 text": (3, "latin.txt"),
        "without text": (1, "empty.txt"),
        "that cannot be decompressed": (1, "broken.gz"),
        "with the same text as another": (1, "copy.txt"),
    }
    for said in (f"; left out: 2 hidden ({text}/.git, ...); ", f"; 1 without text ({text}/empty.txt)"):
        assert said in str(found)


def test_text_that_ends_late_is_left_out_when_it_is_cut_and_said(tmp_path, caplog):
    write_text(tmp_path)
    late = tmp_path / "late.txt"
    late.write_bytes(b"light " * 20_000 + b"\xff")
    corpus = find(tmp_path)
    assert "left out" not in str(corpus)
    train, _ = data.rows_of(corpus)
    rows = np.stack([row["input_ids"] for row in train]).reshape(-1)
    assert rows.tolist() == joined(corpus, [f for f in parts(corpus)[0] if f.path != str(late)])[: rows.size]
    for _ in range(2):  # cut, and then found in the cache
        assert f"left out: 1 not UTF-8 text ({late})" in caplog.text
        assert f"left out: 1 not UTF-8 text ({late})" in str(corpus)
        caplog.clear()
        corpus = find(tmp_path)
        data.rows_of(corpus)


def test_names_that_are_not_utf8_can_be_printed(tmp_path):
    folder = tmp_path / os.fsdecode(b"caf\xe9")
    write_text(folder)
    (folder / os.fsdecode(b"\xe9.bin")).write_bytes(b"\xff")
    corpus = find(folder)
    train, _ = data.rows_of(corpus)
    for said in (str(corpus), corpus.describe(train[0]["place"])):
        assert "caf\\xe9" in said and said.encode("utf-8", "strict")
    assert "caf\\xe9/\\xe9.bin" in str(corpus)


def test_the_standard_library_is_text_enough():
    corpus = find(context=8192, held_out=4)
    assert corpus.train_tokens > 5_000_000 and len(corpus.held_out.rows) == 4
    assert not any("site-packages" in file.path for file in corpus.source.files)


PATHS = [
    ("a_folder", ["."], "a.txt b.md deep/c.txt"),
    ("a_file", ["a.txt"], "a.txt"),
    ("two_files", ["a.txt", "deep/c.txt"], "a.txt deep/c.txt"),
    ("a_pattern", ["*.txt"], "a.txt"),
    ("a_deep_pattern", ["**/*.txt"], "a.txt deep/c.txt"),
    ("a_pattern_that_matches_a_folder", ["d*"], "deep/c.txt"),
    ("each_once", [".", "a.txt", "**/*"], "a.txt b.md deep/c.txt"),
    ("a_folder_and_a_pattern_that_matches_it", ["deep", "de*"], "deep/c.txt"),
    ("a_hidden_folder_that_is_named", [".hidden"], ".hidden/d.txt"),
]


@pytest.mark.parametrize("given, found", [p[1:] for p in PATHS], ids=[p[0] for p in PATHS])
def test_paths(tmp_path, given, found):
    for name in ("a.txt", "b.md", "deep/c.txt", ".hidden/d.txt", "deep/.e.txt"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(name + TEXT * 9)
    source = data.open_source(DataOptions(data=[str(tmp_path / path) for path in given]), 0)
    names = sorted(os.path.relpath(file.path, tmp_path) for file in source.files)
    assert names == found.split()


def test_linked_folders_are_searched_and_loops_end(tmp_path):
    write_text(tmp_path / "elsewhere")
    text = tmp_path / "text"
    (text / "a" / "b").mkdir(parents=True)
    (text / "a" / "c.txt").write_text(TEXT)
    (text / "0").symlink_to("a")  # found before a, by its name
    (text / "linked").symlink_to("../elsewhere")
    for loop in ("self", "a/up", "a/b/up"):
        (text / loop).symlink_to(text)
    found = sorted(os.path.relpath(file.path, text) for file in find(text).source.files)
    there = sorted(os.path.relpath(file, tmp_path / "elsewhere") for file in (tmp_path / "elsewhere").rglob("*.txt"))
    assert found == ["a/c.txt", *(f"linked/{name}" for name in there)]


def spelled(change):
    """Options of the same files, written in two ways."""
    return lambda text: {"data": [str(text), change(str(text))]}


def a_second(write):
    """Of each file another beside it."""

    def add(text: Path) -> dict:
        for path in sorted(text.rglob("*.txt")):
            write(path)
        return {"data": [str(text)]}

    return add


def rows_twice(text: Path) -> dict:
    texts = [path.read_text() for path in sorted(text.rglob("*.txt"))]
    rows = text.parent / "rows.jsonl"
    rows.write_text("".join(json.dumps({"text": each}) + "\n" for each in [*texts, *(each + "\n" for each in texts)]))
    return {"dataset": "json", "data": [str(rows)]}


TWICE = [
    ("a_dot", spelled(lambda text: f"{os.path.dirname(text)}/./text")),
    ("slashes", spelled(lambda text: f"{text}//")),
    ("a_relative_path", spelled(os.path.relpath)),
    ("the_way_up", spelled(lambda text: f"{text}/deep/..")),
    ("links", a_second(lambda path: path.with_suffix(".md").symlink_to(path.name))),
    ("hard_links", a_second(lambda path: path.with_suffix(".md").hardlink_to(path))),
    ("copies", a_second(lambda path: path.with_suffix(".md").write_bytes(path.read_bytes()))),
    ("copies_without_a_last_line_end", a_second(lambda p: p.with_suffix(".md").write_bytes(p.read_bytes().strip()))),
    ("copies_with_other_line_ends", a_second(lambda p: p.with_suffix(".md").write_bytes(p.read_bytes() + b"\r\n"))),
    ("copies_with_a_mark", a_second(lambda p: p.with_suffix(".md").write_bytes(b"\xef\xbb\xbf" + p.read_bytes()))),
    ("compressed_copies", a_second(lambda path: path.with_suffix(".gz").write_bytes(gzip.compress(path.read_bytes())))),
    ("rows", rows_twice),
]


@pytest.mark.parametrize("stream", [False, True], ids=["cut", "streamed"])
@pytest.mark.parametrize("twice", [t[1] for t in TWICE], ids=[t[0] for t in TWICE])
def test_a_text_that_comes_twice_is_used_once_and_not_in_both_parts(tmp_path, twice, stream):
    text = write_text(tmp_path / "text")
    texts = [path.read_text() for path in sorted(text.rglob("*.txt"))]
    corpus = data.find_corpus(DataOptions(**twice(text), held_out=3, stream=stream), context=600, seed=0)
    trained = [b"".join(p).decode() for _, p in corpus.source.training(corpus.held_out.documents)]
    held = "".join(chr(max(0, token - 3)) for token in corpus.held_out.rows.reshape(-1).tolist())
    assert held.strip()[:500] not in "".join(trained)
    words = sorted(" ".join(each.strip("\ufeff").split()) for each in trained)
    assert len(words) == len(set(words)) == len(texts) - len(corpus.held_out.documents) and set(words) < {
        " ".join(each.split()) for each in texts
    }
    files_twice = len({os.path.realpath(path) for path in text.rglob("*.*")}) > len(texts)
    assert ("with the same text as another" in str(corpus.left_out)) == (files_twice or twice is rows_twice)


def test_of_large_files_only_those_that_look_alike_are_read_whole(tmp_path, monkeypatch):
    same, middle = b"light " * 60_000, 100_000
    other = same[:middle] + b"LIGHT" + same[middle + 5 :]
    for name, content in {"a": same, "b": same, "c": other, "d": same + b"x"}.items():
        (tmp_path / name).write_bytes(content)
    whole, digest = [], files._digest
    monkeypatch.setattr(files, "_digest", lambda path: whole.append(Path(path).name) or digest(path))
    corpus = find(tmp_path)
    assert {Path(file.path).name for file in corpus.source.files} == set("acd")
    assert {"a", "b"} <= set(whole) <= set("abc")
    assert str(corpus.left_out) == f"left out: 1 with the same text as another ({tmp_path}/b)"


def test_compressed_files_that_begin_alike_are_two(tmp_path):
    for letter in "abc":
        (tmp_path / f"{letter}.gz").write_bytes(gzip.compress(b"light " * 20_000 + letter.encode() * 500, mtime=0))
    assert len({path.stat().st_size for path in tmp_path.iterdir()}) == 1
    assert len(find(tmp_path).source.files) == 3


def test_no_text_is_held_out_twice(tmp_path):
    rows = [f"{number} " + "the light of a house " * 3 for number in range(4)] + ["the sea by the rock " * 4] * 36
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps({"text": row}) + "\n" for row in rows))
    held = find(tmp_path / "rows.jsonl", dataset="json", context=32, held_out=9).held_out
    assert len(held.documents) > 1 and len(set(held.documents.values())) == len(held.documents)


@pytest.mark.parametrize("recent", [1, 3, 1000])
def test_what_was_seen_is_known_again(monkeypatch, recent):
    monkeypatch.setattr(documents.Seen, "RECENT", recent)
    seen, known = documents.Seen([b"\0" * 16]), {b"\0" * 16}
    for number in np.random.default_rng(0).integers(0, 200, 600).tolist():
        digest = documents.TextDigest()
        digest.update(str(number).encode())
        assert seen.add(digest.digest()) == (digest.digest() not in known)
        known.add(digest.digest())
    assert not seen.add(b"\0" * 16)


def compress_zstd(text: bytes) -> bytes:
    zstandard = pytest.importorskip("zstandard")
    half = len(text) // 2
    return b"".join(zstandard.compress(part) for part in (text[:half], text[half:]))  # two frames


COMPRESSIONS = [("gz", gzip.compress), ("bz2", bz2.compress), ("xz", lzma.compress), ("zst", compress_zstd)]


@pytest.mark.parametrize("suffix, compress", COMPRESSIONS, ids=[c[0] for c in COMPRESSIONS])
def test_a_compressed_file_gives_the_rows_of_the_plain_one(tmp_path, suffix, compress):
    plain, packed = write_text(tmp_path / "plain"), tmp_path / "packed"
    for path in plain.rglob("*.txt"):
        there = packed / path.relative_to(plain).with_name(f"{path.name}.{suffix}")
        there.parent.mkdir(parents=True, exist_ok=True)
        there.write_bytes(compress(path.read_bytes()))
    rows = [[row["input_ids"].tolist() for row in data.rows_of(find(folder))[0]] for folder in (plain, packed)]
    assert rows[0] == rows[1]
    assert "about" in str(find(packed)) and "about" not in str(find(plain))


@pytest.mark.skipif(
    importlib.util.find_spec("zstandard") is not None or sys.version_info >= (3, 14), reason="zstd can be read"
)
def test_a_package_for_zstd_is_named_where_it_is_missing(tmp_path):
    (tmp_path / "a.zst").write_bytes(b"")
    with pytest.raises(ValueError, match="needs|pip install zstandard"):
        find(tmp_path)
