"""`--order`: shuffled files are joined as ever; by path a folder's files stand together, in training and held out."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from training_runs import CONTEXT, options, training, write_text

pytest.importorskip("transformers")

from lighthouse.text import data  # noqa: E402
from lighthouse.training import PretrainOptions, prepare  # noqa: E402
from lighthouse.training.depends import FREE_BETWEEN_RUNS, FREE_ON_RESUME  # noqa: E402
from test_training_data import TEXT, find, joined, parts  # noqa: E402


def names(corpus) -> list[str]:
    """Of the files in their order, below the folder with the text."""
    return [Path(file.path).relative_to(corpus.source.title).as_posix() for file in corpus.source.files]


def tree(folder: Path, files: list[str], words: int = 30) -> Path:
    for name in files:
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(f"{name} " + TEXT * words)
    return folder


def test_without_the_option_the_rows_are_those_of_earlier_versions(tmp_path):
    """Numbers of the version before the option: a run that began with it resumes on the same rows."""
    corpus = find(write_text(tmp_path))
    assert corpus.fingerprint == "36e6499bb51e54dd08bacd1118c26134"
    data.rows_of(corpus)
    assert corpus.rows_fingerprint == "18125c5eac89713dbd5e77046cd75f44"


PATHS = [
    ("a_folders_own_files_come_before_its_folders", ["a/z.c", "a/lib/m.c", "a/b.c"], ["a/b.c", "a/z.c", "a/lib/m.c"]),
    ("a_name_with_a_dash_parts_no_folder", ["a/1", "a-b/1", "a.txt", "a/2"], ["a.txt", "a/1", "a/2", "a-b/1"]),
    ("one_folder", ["2", "10", "1"], ["1", "10", "2"]),
]


@pytest.mark.parametrize("files, order", [p[1:] for p in PATHS], ids=[p[0] for p in PATHS])
def test_by_path(tmp_path, files, order):
    for seed in range(3):
        assert names(find(tree(tmp_path, files), order="path", seed=seed)) == order


def test_rows_by_path_are_the_files_joined_in_that_order(tmp_path):
    tree(tmp_path, [f"{folder}/{file}" for folder in "abcd" for file in "1234"], words=3)
    corpus = find(tmp_path, order="path")
    train, _ = data.rows_of(corpus)
    rows = np.stack([row["input_ids"] for row in train]).reshape(-1)
    kept, _ = parts(corpus)
    assert [file.path for file in kept] == sorted(file.path for file in kept)
    assert rows.tolist() == joined(corpus, kept)[: rows.size]
    assert "in the order of their paths" in str(corpus)


def test_neighbours_are_held_out_together_and_from_several_folders(tmp_path):
    """Eight contexts in runs of about two, of files of a third of a context."""
    tree(tmp_path, [f"{folder:02}/{file:02}" for folder in range(20) for file in range(40)], words=1)
    found = set()
    for seed in range(3):
        corpus = find(tmp_path, order="path", held_out=8, seed=seed)
        places = [tuple(map(int, names(corpus)[number].split("/"))) for number in corpus.held_out.documents]
        ends = [i for i, (a, b) in enumerate(zip(places, places[1:], strict=False)) if b != (a[0], a[1] + 1)]
        assert len(places) > 12 and len(ends) in (2, 3, 4), places
        assert len({folder for folder, _ in places}) >= 2
        assert len(corpus.held_out.rows) == 8
        found.add(tuple(places))
    assert len(found) == 3  # the seed decides


def test_a_stream_goes_through_the_folders_in_another_order_in_each_pass(tmp_path):
    corpus = find(
        tree(tmp_path, [f"{a}/{b}" for a in "abcdef" for b in "123"], words=2), order="path", stream=True, held_out=1
    )
    passes = []
    for round in range(2):
        text = corpus.source.training(corpus.held_out.documents, round)
        passes.append([names(corpus)[number] for number, _ in text])
    for each in passes:
        folders = list(dict.fromkeys(name[0] for name in each))
        assert each == sorted(each, key=lambda name: (folders.index(name[0]), name))
    assert passes[0] != passes[1] and sorted(passes[0]) == sorted(passes[1])
    assert len(passes[0]) == 18 - len(corpus.held_out.documents)


def test_the_order_is_part_of_the_text(tmp_path):
    """Also where the seed happens to shuffle the files into the order of their paths."""
    tree(tmp_path, ["a/1", "b/1"])
    made = {find(tmp_path, order=order, seed=seed).fingerprint for order in ("shuffled", "path") for seed in range(8)}
    assert len(made) == 16


def test_a_dataset_keeps_its_own_order(tmp_path):
    lines = [json.dumps({"text": f"{n} {TEXT}"}) for n in range(30)]
    (tmp_path / "a.jsonl").write_text("\n".join(lines))
    rows = []
    for order in ("shuffled", "path"):
        train, _ = data.rows_of(find(tmp_path / "a.jsonl", dataset="json", order=order))
        rows.append([row["input_ids"].tolist() for row in train])
    assert rows[0] == rows[1]


def test_a_run_has_it_in_its_settings_and_keeps_it(tmp_path):
    text = write_text(tmp_path / "text")
    shuffled, by_path = (
        prepare(options(text, order=order), training(tmp_path / order)).settings() for order in ("shuffled", "path")
    )
    assert (shuffled["order"], by_path["order"]) == ("shuffled", "path")
    assert shuffled["text"] != by_path["text"]
    assert "order" not in FREE_ON_RESUME | FREE_BETWEEN_RUNS


def test_a_corpus_of_the_other_order_is_not_taken_over(tmp_path):
    text = write_text(tmp_path / "text")
    first = prepare(options(text), training(tmp_path / "a"))
    second = prepare(options(text, order="path"), training(tmp_path / "b"), corpus=first.corpus)
    assert second.corpus is not first.corpus and second.corpus.source.by_path


def test_another_word_is_refused(tmp_path):
    with pytest.raises(ValueError, match="order='size': one of shuffled, path is needed"):
        PretrainOptions(model="nano", context=CONTEXT, data=str(tmp_path), order="size")
