"""Text read while training: the same rows from row k on, each once per pass, in one process or several."""

from __future__ import annotations

import json
from itertools import islice

import numpy as np
import pytest

pytest.importorskip("transformers")

from accelerate import Accelerator, skip_first_batches  # noqa: E402
from accelerate.utils import DataLoaderConfiguration  # noqa: E402
from torch.utils.data import DataLoader  # noqa: E402

import forked  # noqa: E402
from lighthouse.text import data, tables  # noqa: E402
from lighthouse.text.documents import TextLost  # noqa: E402
from lighthouse.text.tokenizer import load_tokenizer  # noqa: E402
from lighthouse.training.options import DataOptions  # noqa: E402
from test_training_data import write_json  # noqa: E402
from training_runs import status, write_text  # noqa: E402
from training_tokenizers import save_bpe  # noqa: E402

CONTEXT = 64


@pytest.fixture(params=["a_dataset_of_bytes", "files_of_bytes", "files_of_bpe"])
def find(request, tmp_path, monkeypatch):
    monkeypatch.setattr(data, "SHUFFLED", 32 * CONTEXT)
    tokenizer = load_tokenizer(save_bpe(tmp_path / "bpe") if "bpe" in request.param else None)
    if "dataset" in request.param:
        options = {"data": [write_json(tmp_path, documents=60)], "dataset": "json"}
    else:
        options = {"data": [str(write_text(tmp_path / "text"))]}

    def find(seed=0, stream=True):
        found = DataOptions(**options, stream=stream, held_out=2)
        return data.find_corpus(found, context=CONTEXT, seed=seed, tokenizer=tokenizer)

    return find


def take(rows, count) -> list[tuple]:
    return [(tuple(row["place"]), tuple(row["input_ids"].tolist())) for row in islice(rows, count)]


def one_pass(corpus, number: int = 0) -> list[tuple]:
    rows = data.rows_of(corpus)[0]
    return take(rows._shuffled(number), None)


def documents_of(corpus, rows) -> list[tuple]:
    """The documents that a pass has whole, each as its ids, sorted: its rows in the order in which they were cut."""
    ids = [token for _, row in sorted(rows) for token in row]
    cuts = [n + 1 for n, token in enumerate(ids) if token == corpus.encoder.end]
    return sorted(tuple(ids[a:b]) for a, b in zip([0, *cuts], cuts, strict=False))


CHANGES = {
    "rewritten": lambda path: path.write_bytes(path.read_bytes() + b" \n"),
    "gone": lambda path: path.unlink(),
    "cut_off": lambda path: path.write_bytes(path.read_bytes()[:100]),
    "no_text_any_more": lambda path: path.write_bytes(b"\xff\0" * 2**18),
    "a_folder": lambda path: (path.unlink(), path.mkdir()),
}


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("kind", ["files", "dataset"])
def test_text_that_changes_while_it_is_streamed_ends_the_run(tmp_path, monkeypatch, kind, change):
    monkeypatch.setattr(data, "SHUFFLED", 16 * CONTEXT)
    monkeypatch.setattr(tables, "CHECKED", 1)
    path = tmp_path / "rows.jsonl"
    if kind == "dataset":
        write_json(tmp_path, documents=60, shards=1)
        path = tmp_path / "0.jsonl"
        options = {"data": [str(path)], "dataset": "json"}
    else:
        write_text(tmp_path / "text", files=6, words=2000)
        path = tmp_path / "text" / "03.txt"
        options = {"data": [str(tmp_path / "text")]}
    corpus = data.find_corpus(DataOptions(**options, stream=True, held_out=2), context=CONTEXT, seed=0)
    rows = iter(data.rows_of(corpus)[0])
    next(rows)
    CHANGES[change](path)
    with pytest.raises(TextLost, match=f"{path.name}' changed since this command found it"):
        for _ in range(3000):
            next(rows)


def test_a_stream_that_can_be_read_no_further_is_said_in_a_line(tmp_path, monkeypatch):
    monkeypatch.setattr(data, "SHUFFLED", 16 * CONTEXT)
    write_json(tmp_path, documents=400, shards=2)
    (tmp_path / "1.jsonl").write_text((tmp_path / "1.jsonl").read_text() + "{no json\n")
    options = DataOptions(data=[str(tmp_path / "*.jsonl")], dataset="json", stream=True, held_out=2)
    rows = data.rows_of(data.find_corpus(options, context=CONTEXT, seed=0))[0]
    with pytest.raises(TextLost, match=r"^json, split train cannot be read after \d+ rows of the pass: [^\n]+$"):
        take(rows, 3000)


def test_what_a_stream_holds_out_is_no_copy(tmp_path):
    """Its held-out documents come by once more in each pass; only what has their text besides is a copy."""
    write_json(tmp_path, documents=60, shards=1)
    path = tmp_path / "0.jsonl"
    for copies in (0, 3):
        path.write_text(path.read_text() + "".join(path.read_text().splitlines(True)[:copies]))
        options = DataOptions(data=[str(path)], dataset="json", stream=True, held_out=2)
        corpus = data.find_corpus(options, context=CONTEXT, seed=0)
        one_pass(corpus)
        assert sum(count for count, _ in corpus.source.passed_over.found.values()) == copies


def test_a_seed_gives_the_same_rows_and_another_others(find):
    rows, again, other = (take(data.rows_of(find(seed))[0], 200) for seed in (1, 1, 2))
    assert rows == again and [ids for _, ids in rows] != [ids for _, ids in other]


def test_a_pass_has_each_row_once_and_the_next_another_order(find):
    corpus = find()
    first, second = one_pass(corpus, 0), one_pass(corpus, 1)
    count = len(first)
    assert sorted(place[0] for place, _ in first) == list(range(count))
    assert [place[0] for place, _ in first] != list(range(count))
    assert abs(len(second) - count) <= 1
    stream = take(data.rows_of(corpus)[0], 2 * count)
    assert stream[:count] == first and stream[count:] == second[:count]
    # The last row of a pass, which is not full, is left out: some documents of a pass may miss their end.
    one, two = (set(documents_of(corpus, rows)) for rows in (first, second))
    assert len(one ^ two) <= 4 and len(one) > 4


def test_held_out_documents_are_not_trained_on(find):
    corpus = find()
    held_out = np.stack([row["input_ids"] for row in data.rows_of(corpus)[1]])
    assert held_out.shape == (2, CONTEXT)
    text = held_out.reshape(-1).tolist()
    end = corpus.encoder.end
    first = tuple(text[: text.index(end) + 1]) if end in text else tuple(text)
    trained = [ids for number in range(2) for ids in documents_of(corpus, one_pass(corpus, number))]
    assert trained and not any(ids[: len(first)] == first for ids in trained)


def load(corpus, workers: int) -> DataLoader:
    return DataLoader(data.rows_of(corpus)[0], batch_size=2, collate_fn=data.collate, num_workers=workers)


def test_a_worker_reads_the_same_rows(find):
    plain, worker = ([b["input_ids"].tolist() for b in islice(load(find(), workers), 50)] for workers in (0, 1))
    assert plain == worker


def test_two_workers_are_refused(tmp_path):
    options = DataOptions(data=[str(write_text(tmp_path))], stream=True, held_out=2)
    with pytest.raises(ValueError, match="dataloader_num_workers=2: a stream is read in order"):
        next(iter(load(data.find_corpus(options, context=CONTEXT, seed=0), 2)))


def test_a_row_is_found_again(find):
    corpus = find()
    for row in islice(data.rows_of(corpus)[0], 9):
        number, round, document, token = row["place"]
        said = corpus.describe(data.collate([row])["place"][0])
        assert said == f"row {number:,} of pass {round}: from token {token:,} of {corpus.source.name(document)} on"


def test_the_text_is_said_to_be_streamed(find):
    assert "streamed" in str(find()) and "2 x 64 tokens of them evaluated" in str(find())


def read_as_one_of_several(text, folder):
    """What a process reads of a stream, and what it is told where the other has another text."""
    corpus = data.find_corpus(DataOptions(data=[str(text)], stream=True, held_out=2), context=CONTEXT, seed=0)
    rows, _ = data.rows_of(corpus)
    found = {}
    for dispatch in (None, False):
        accelerator = Accelerator(cpu=True, dataloader_config=DataLoaderConfiguration(dispatch_batches=dispatch))
        loader = accelerator.prepare(DataLoader(rows, batch_size=2, collate_fn=data.collate))
        for skip in (0, 3):
            batches = islice(skip_first_batches(loader, skip) if skip else loader, 6)
            found[f"{type(loader).__name__} {skip}"] = [batch["place"][:, :2].tolist() for batch in batches]
    for stream in (False, True):  # another text on each machine
        options = DataOptions(data=[f"{text}{accelerator.process_index}"], stream=stream, held_out=2)
        try:
            data.rows_of(data.find_corpus(options, context=CONTEXT, seed=0))
        except ValueError as error:
            found[f"refused {stream}"] = str(error)
    (folder / f"{accelerator.process_index}.json").write_text(json.dumps(found))
    accelerator.end_training()


def test_two_processes_share_the_rows_skip_alike_and_have_one_text(tmp_path):
    """Read by the first process for both, as accelerate does by default, and by each process for itself."""
    text = write_text(tmp_path / "text")
    for rank in range(2):
        write_text(tmp_path / f"text{rank}", seed=rank)
    log = tmp_path / "log"
    processes = [
        forked.start(read_as_one_of_several, text, tmp_path, log=log, environment=rank) for rank in forked.two_ranks()
    ]
    assert [status(process) for process in processes] == [0, 0], log.read_text()
    first, second = (json.loads((tmp_path / f"{rank}.json").read_text()) for rank in (0, 1))
    corpus = data.find_corpus(DataOptions(data=[str(text)], stream=True, held_out=2), context=CONTEXT, seed=0)
    expected = [list(row["place"][:2]) for row in islice(data.rows_of(corpus)[0], 36)]
    for name in ("DataLoaderDispatcher", "DataLoaderShard"):
        for skip in (0, 3):
            pairs = zip(first[f"{name} {skip}"], second[f"{name} {skip}"], strict=True)
            assert [place for a, b in pairs for place in [*a, *b]] == expected[4 * skip : 4 * skip + 24], (name, skip)
    for stream in (False, True):
        for found in (first, second):
            assert "the text on process 1 differs from that on process 0" in found[f"refused {stream}"]


def test_the_end_of_a_pass_is_said(find, caplog):
    corpus = find()
    count = len(one_pass(corpus))
    take(data.rows_of(corpus)[0], count)
    assert not caplog.records
    take(data.rows_of(corpus)[0], count + 1)
    assert "The streamed text was read to its end, and pass 2 begins" in caplog.text
