"""Whether a text is the same: what is cut again, what a run goes on with, and a cut that was interrupted."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from training_runs import CONTEXT, options, training, write_text

pytest.importorskip("transformers")

import datasets  # noqa: E402

from lighthouse.text import (
    cutting,  # noqa: E402
    data,  # noqa: E402
    tokenizer,  # noqa: E402
)
from lighthouse.training import Refused, prepare  # noqa: E402
from test_training_data import TEXT, find, write_json  # noqa: E402
from training_tokenizers import save_bpe  # noqa: E402


def cached() -> set[str]:
    return {path.name for path in (Path(datasets.config.HF_DATASETS_CACHE) / "lighthouse").glob("*")}


def test_the_same_text_is_cut_once(tmp_path):
    data.rows_of(find(write_text(tmp_path)))
    before = cached()
    data.rows_of(find(tmp_path))
    assert cached() == before and not any(name.endswith(".incomplete") for name in before)


def touch(folder):
    os.utime(folder / "deep" / "01.txt", ns=(1, 1))


def put_another_in_its_place(folder):
    """Of the same size and time."""
    path = folder / "deep" / "01.txt"
    state, content = os.stat(path), path.read_bytes()
    path.write_bytes(content.replace(b"e", b"E"))
    os.utime(path, ns=(state.st_atime_ns, state.st_mtime_ns))


CHANGES = [
    ("another_context", {"context": 64}, None),
    ("another_seed", {"seed": 1}, None),
    ("a_file_more", {}, lambda folder: (folder / "new.txt").write_text(TEXT * 9)),
    ("a_file_changed", {}, lambda folder: write_text(folder, seed=1)),
    ("a_file_written_again", {}, touch),
    ("a_file_changed_and_its_time_set_back", {}, put_another_in_its_place),
]


@pytest.mark.parametrize("options, change", [c[1:] for c in CHANGES], ids=[c[0] for c in CHANGES])
def test_text_is_cut_again_after(tmp_path, options, change):
    data.rows_of(find(write_text(tmp_path)))
    before = cached()
    if change is not None:
        change(tmp_path)
    data.rows_of(find(tmp_path, **options))
    assert cached() > before


def test_another_folder_of_the_same_name_is_another_text(tmp_path, monkeypatch):
    """A relative path, and files of the same sizes and times."""
    rows = []
    for seed in (0, 1):
        (tmp_path / str(seed)).mkdir()
        monkeypatch.chdir(tmp_path / str(seed))
        for n, path in enumerate(sorted(write_text(Path("text"), seed=seed).rglob("*.txt"))):
            path.write_text(path.read_text()[:1500])
            os.utime(path, ns=(n, n))
        rows.append([row["input_ids"].tolist() for row in data.rows_of(find("text"))[0]])
    assert rows[0] != rows[1]


def test_a_cut_that_is_not_whole_is_made_again(tmp_path):
    write_text(tmp_path)
    expected = [row["input_ids"].tolist() for row in data.rows_of(find(tmp_path))[0]]
    for rows in (Path(datasets.config.HF_DATASETS_CACHE) / "lighthouse").glob(f"*/{cutting.ROWS}"):
        os.truncate(rows, 100)  # as after a power failure
    assert [row["input_ids"].tolist() for row in data.rows_of(find(tmp_path))[0]] == expected


def test_another_tokenizer_is_another_text(tmp_path):
    write_text(tmp_path / "text")
    bpe = tokenizer.load_tokenizer(save_bpe(tmp_path / "bpe"))
    corpora = [find(tmp_path / "text"), find(tmp_path / "text", tokens=bpe)]
    assert corpora[0].fingerprint != corpora[1].fingerprint
    assert len(data.rows_of(corpora[0])[0]) > len(data.rows_of(corpora[1])[0])


def test_another_way_to_cut_is_another_text(tmp_path, monkeypatch):
    before = find(write_text(tmp_path)).fingerprint
    monkeypatch.setattr(cutting, "ROWS_VERSION", cutting.ROWS_VERSION + 1)
    assert find(tmp_path).fingerprint != before


def test_a_copy_of_the_files_is_the_same_text(tmp_path):
    corpora = [find(write_text(tmp_path / "a")), find(write_text(tmp_path / "b"))]
    for corpus in corpora:
        data.rows_of(corpus)
    assert corpora[0].fingerprint == corpora[1].fingerprint
    assert corpora[0].rows_fingerprint == corpora[1].rows_fingerprint
    assert find(write_text(tmp_path / "b", seed=1)).fingerprint != corpora[0].fingerprint


def write_long(folder: Path) -> Path:
    """A file of which not all is looked at before it is read, beside others."""
    write_text(folder)
    (folder / "long.txt").write_text("".join(f"{n} {TEXT}\n" for n in range(12_000)))
    return folder


def change_the_middle(folder: Path) -> None:
    """Of the long file; its size stays."""
    with open(folder / "long.txt", "r+b") as file:
        file.seek(100_000)
        file.write(b"X")


def test_a_change_in_the_middle_is_seen_once_the_text_is_cut(tmp_path):
    before, after = find(write_long(tmp_path)), change_the_middle(tmp_path) or find(tmp_path)
    assert before.fingerprint == after.fingerprint and before.rows_fingerprint is None
    with pytest.raises(ValueError, match="long.txt' changed since this command found it"):
        data.rows_of(before)
    fingerprints = []
    for _ in range(2):
        data.rows_of(after)
        fingerprints.append(after.rows_fingerprint)
        change_the_middle(tmp_path)
        with open(tmp_path / "long.txt", "r+b") as file:
            file.seek(100_000)
            file.write(b"Y")
        after = find(tmp_path)
    assert fingerprints[0] != fingerprints[1]


def test_a_run_goes_on_where_its_text_lies_elsewhere_and_not_where_it_changed(tmp_path):
    def run(text, **changes):
        saving = training(tmp_path / "run", save_strategy="steps", save_steps=2, max_steps=4, **changes)
        return prepare(options(text), saving).train()

    def interrupted():
        shutil.rmtree(tmp_path / "run" / "model")
        shutil.rmtree(tmp_path / "run" / "checkpoint-4")
        (tmp_path / "run" / "results.json").unlink()

    first = run(write_long(tmp_path / "text"), save_total_limit=None)
    interrupted()
    moved = (tmp_path / "text").rename(tmp_path / "moved")
    again = run(f"{moved}//", save_total_limit=None, resume=True)
    assert [point.loss for point in again.held_out] == [point.loss for point in first.held_out]
    interrupted()
    change_the_middle(moved)
    with pytest.raises(Refused, match="the text has changed, although its files have the same sizes"):
        run(moved, resume=True)
    write_text(moved, seed=1)
    changed = "data was .*the text, its order, its tokenizer or how it is split into rows has changed"
    with pytest.raises(ValueError, match=changed):
        run(moved, resume=True)


def test_how_often_the_text_is_read_and_what_is_not_is_said(tmp_path):
    corpus = find(write_text(tmp_path), held_out=99)
    assert " (99 were asked for, but at most a tenth of the text is held out)" in str(corpus)
    rows, _ = data.rows_of(corpus)
    rest = corpus.train_tokens - len(rows) * CONTEXT
    assert corpus.passes(len(rows) // 2 * 3, 2 * CONTEXT) == (
        f"The run reads the {len(rows):,} training rows 3 times; the last {rest:,} tokens do not fill a row."
    )
    corpus = find(write_json(tmp_path), dataset="json", held_out=99)
    data.rows_of(corpus)
    assert " tokens held out, " in corpus.passes(10, CONTEXT) and "(99 were asked for" in corpus.passes(10, CONTEXT)


CUT_SLOWLY = """
import sys, time
import datasets
from lighthouse.text import cutting
from lighthouse.text import data
from lighthouse.text import tokenizer
from lighthouse.training.options import DataOptions
datasets.config.HF_DATASETS_CACHE = sys.argv[2]
tokenizer.BATCH = cutting.BLOCK = 64
tokens = cutting.tokens_of
def slowly(*arguments, **keywords):
    for count, found in enumerate(tokens(*arguments, **keywords)):
        if count == 8:
            print("half", flush=True)
            {then}
        yield found
cutting.tokens_of = slowly
corpus = data.find_corpus(DataOptions(data=[sys.argv[1]], held_out=2), context=128, seed=0)
data.rows_of(corpus)
"""


def a_process_cutting(folder, cache, then):
    program = [sys.executable, "-c", CUT_SLOWLY.replace("{then}", then), str(folder), str(cache)]
    return subprocess.Popen(program, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def test_a_cut_that_was_killed_is_begun_again(tmp_path, monkeypatch):
    write_text(tmp_path / "text")
    process = a_process_cutting(tmp_path / "text", tmp_path / "cache", "time.sleep(100)")
    assert process.stdout.readline() == "half\n"
    [half] = (tmp_path / "cache" / "lighthouse").glob("*.incomplete")
    assert (half / cutting.ROWS).stat().st_size > 0
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    expected = [row["input_ids"].tolist() for row in data.rows_of(find(tmp_path / "text"))[0]]
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    train, _ = data.rows_of(find(tmp_path / "text"))
    assert [row["input_ids"].tolist() for row in train] == expected
    assert not half.exists()


def test_a_disk_without_space_is_an_error_that_leaves_nothing(tmp_path):
    """Here a limit on the size of a file does what a full disk would."""
    limit = "import resource; resource.setrlimit(resource.RLIMIT_FSIZE, (2000, 2000))"
    process = a_process_cutting(write_text(tmp_path / "text"), tmp_path / "cache", limit)
    _, said = process.communicate(timeout=60)
    assert process.returncode == 1
    assert f"no space for the tokenized text in '{tmp_path}/cache/lighthouse', " in said
    assert "set HF_DATASETS_CACHE to a folder with more space, or use stream" in said
    assert not list((tmp_path / "cache" / "lighthouse").glob("*.incomplete"))
