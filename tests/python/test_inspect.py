"""What a model's layers keep of a text: against the list of chosen entries, as a picture, as a page, by the command."""

from __future__ import annotations

import json
import os
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from matplotlib.image import imread
from safetensors.torch import load_file, save_file

import lighthouse
from cases import rand_qkv
from lighthouse import LighthouseWrapper
from lighthouse.cli import inspect as inspect_module
from lighthouse.cli import main
from lighthouse.huggingface.inspection import Choices, choices_in, choices_of, stretches
from lighthouse.report import choice
from lighthouse.training.model import new_model
from small_llama import MODELS, SETTINGS, ids, plain, wrapped

pytestmark = pytest.mark.usefixtures("one_thread")

CASES = [
    ("defaults", 300, {}),
    ("a_tail", 75, {"pool_ratios": (1 / 2, 1 / 8), "select_topk": 3}),
    ("one_level", 40, {"pool_ratios": ()}),
    ("shorter_than_a_window", 9, {"pool_ratios": (1 / 4, 1 / 16), "select_topk": 1}),
]


@pytest.mark.parametrize("tokens, settings", [c[1:] for c in CASES], ids=[c[0] for c in CASES])
def test_levels_are_those_of_the_chosen_entries(tokens, settings):
    query, key, _ = rand_qkv(tokens, query_heads=4, kv_heads=2)
    selection = lighthouse.select(query, key, **settings)
    choices = choices_in(selection)
    for head in range(2):
        finest = np.full(tokens, 255)
        for level, index in sorted(selection.entries(0, head), reverse=True):
            window = selection.windows[level]
            finest[index * window : (index + 1) * window] = level
        assert (choices.levels[0, head] == finest).all()
    assert choices.length == len(selection.entries(0, 0))


@pytest.mark.parametrize("model_class", MODELS)
def test_each_layer_that_lighthouse_acts_in(model_class):
    model = wrapped(model_class, eval="lighthouse").train()
    choices = choices_of(model, ids(rows=1))
    assert choices.layers == (1, 2) and choices.levels.shape[0] == 2 and choices.tokens == 64
    assert model.training
    assert choices.length == 32 and choices.windows == (1, 2, 4)
    again = choices_of(model, ids(rows=1))
    assert (again.levels == choices.levels).all()


REFUSED = [
    ("a_plain_model", plain, TypeError, "model is a plain LlamaForCausalLM"),
    ("dense_in_evaluation", wrapped, ValueError, "Lighthouse did not act on 64 tokens"),
    ("too_short", lambda: wrapped(eval="lighthouse", min_tokens=65), ValueError, "did not act on 64 tokens"),
    (
        "a_window_alone",
        lambda: wrapped(eval="lighthouse", select_topk=0, local_window=8),
        ValueError,
        "select_topk 0, local_window 8 chooses nothing, so there is no choice to show",
    ),
]


@pytest.mark.parametrize("make, error, message", [r[1:] for r in REFUSED], ids=[r[0] for r in REFUSED])
def test_models_without_a_choice(make, error, message):
    with pytest.raises(error, match=message):
        choices_of(make(), ids(rows=1))


def test_one_sequence_alone():
    with pytest.raises(ValueError, match=r"input_ids has shape \[2, 64\]"):
        choices_of(wrapped(eval="lighthouse"), ids(rows=2))


def some_choices(tokens=8, layers=(3, 5)):
    levels = np.full((2, 2, tokens), 1, dtype=np.uint8)
    levels[0, :, :4] = 0  # both heads of the first layer keep the first half
    levels[1, 0, 2:6] = 0
    return Choices(levels, layers, (1, 4), 6)


def test_shares_and_overlap():
    choices = some_choices()
    assert choices.kept_share(2).tolist() == [[1, 0], [0.25, 0.25]]
    overlap = choices.overlap()
    assert overlap[0, 1] == 1 and overlap[0, 2] == pytest.approx(2 / 6) and overlap[0, 3] == 0
    assert overlap[3, 3] == 1  # nothing and nothing
    numbers = choice.summary(choices)
    assert numbers["kept_share"] == {"3": 0.5, "5": 0.25}
    assert numbers["kept_by_every_head_share"] == 0 and numbers["kept_by_no_head_share"] == 2 / 8
    assert numbers["overlap_between_heads_of_a_layer"] == pytest.approx((1 + 0) / 2)


def test_a_place_in_a_picture_is_its_place_in_the_text():
    """The kept token stands at three quarters of the text, whatever the lengths of the stretches."""
    for tokens, count in ((2048, 1600), (100, 64), (64, 64), (9, 4)):
        levels = np.ones((1, 1, tokens), dtype=np.uint8)
        levels[0, 0, 3 * tokens // 4] = 0
        share = Choices(levels, (0,), (1, 4), 6).kept_share(count)[0]
        starts = stretches(tokens, count)
        assert share.shape == (count,) and np.flatnonzero(share).tolist() == [3 * count // 4]
        assert share.max() == 1 / np.diff(starts, append=tokens)[3 * count // 4]
        assert (np.flatnonzero(np.minimum.reduceat(levels[0, 0], starts) == 0) == 3 * count // 4).all()


def test_one_head_has_no_other_to_overlap_with():
    numbers = choice.summary(Choices(np.zeros((1, 1, 4), dtype=np.uint8), (0,), (1,), 4))
    assert numbers["overlap_between_layers"] is None and numbers["kept_share"] == {"0": 1.0}


def test_the_picture_shows_long_texts_too(tmp_path):
    choice.draw(some_choices(5000), tmp_path / "a.png")
    assert imread(tmp_path / "a.png").shape[1] == 1440


def test_the_page_holds_the_text_as_data(tmp_path):
    pieces = ["<b>", "&", "</script><script>alert(1)</script>", "ü", "\n", '"', "x", "y"]
    page = choice.page(some_choices(), pieces, "a <b> title")
    assert "a &lt;b&gt; title" in page and page.count("</script>") == 2 and "http" not in page.replace("http-equiv", "")
    data = json.loads(re.search(r'id="data">(.*?)</script>', page, re.DOTALL)[1])
    assert data["pieces"] == pieces and data["levels"][0] == "00001111" and data["names"][3] == "layer 5, head 1"


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    new_model("nano", 512, 0).save_pretrained(folder)
    return folder


def test_the_command(tmp_path, model_folder, capsys):
    text = tmp_path / "text.txt"
    text.write_text("The light of a house on the rock. Füße. " * 40)
    out = tmp_path / "out"
    command = ["inspect", str(model_folder), "--text", str(text), "--context", "300", "--output", str(out)]
    assert main([*command, "--select_topk", "4", "--device", "cpu"]) == 0
    said = capsys.readouterr().out
    assert "300 tokens, a sub-sequence of" in said
    assert "; beside it, exact attention to the last 256 tokens, kept or not\n" in said
    assert "attends exactly to the last 256 tokens (local_window)" in (out / "choice.html").read_text()
    assert {path.name for path in out.iterdir()} == {"choice.png", "choice.html", "choice.json"}
    assert main([*command, "--json", "-", "--dense_layers", "0", "--device", "cpu"]) == 0
    numbers = json.loads(capsys.readouterr().out)
    assert list(numbers["kept_share"]) == ["0", "1", "2", "3"] and numbers["local_window"] == 256
    assert main([*command, "--local_window", "0", "--device", "cpu"]) == 0
    assert "exact" not in capsys.readouterr().out + (out / "choice.html").read_text()


def test_of_a_text_much_longer_than_the_context_the_rest_is_not_read(tmp_path, model_folder):
    text = tmp_path / "text.txt"
    text.write_bytes(b"The light of a house on the rock. " * 2000 + b"\xff no UTF-8")
    command = ["inspect", str(model_folder), "--text", str(text), "--context", "100", "--output", str(tmp_path / "out")]
    assert main([*command, "--device", "cpu"]) == 0


def test_of_long_tokens_as_many_are_taken_as_of_short_ones(tmp_path):
    """A text of 100 tokens of 100 characters each."""
    text = tmp_path / "text.txt"
    text.write_text("x" * 10_000)
    for most, expected in ((10, 10), (99, 99), (100, 100), (200, 100)):
        ids = inspect_module._ids(lambda texts: [np.arange(len(texts[0]) // 100)], str(text), most)
        assert ids == list(range(expected))


def test_what_is_otherwise_than_one_may_think_is_said(tmp_path, model_folder, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("text.txt").write_text("some text " * 20)
    shutil.copytree(model_folder, "run/model")
    settings = {"pool_ratios": [1 / 8], "select_topk": 1 / 64, "dense_layers": 0, "dense_only": False}
    Path("run/run.json").write_text(json.dumps(settings))
    command = ["inspect", "run/model", "--text", "text.txt", "--device", "cpu", "--json", "-"]
    assert main([*command, "--context", "512"]) == 0
    said = capsys.readouterr()
    assert json.loads(said.out)["notes"] == [
        "the text has 200 tokens, fewer than the 512 asked for",
        "the model was trained with pool_ratios [0.125], not with the settings shown",
    ]
    assert "Note: the text has 200 tokens" in said.err
    Path("run/run.json").write_text(json.dumps(settings | {"dense_only": True}))
    assert main(command) == 0
    assert json.loads(capsys.readouterr().out)["notes"] == ["the model was trained with dense attention only"]


def lacking(folder):
    """A model without one of its weights."""
    shutil.copytree(folder, "../lacking")
    weights = load_file("../lacking/model.safetensors")
    del weights["model.layers.0.self_attn.q_proj.weight"]
    save_file(weights, "../lacking/model.safetensors", metadata={"format": "pt"})
    return ["../lacking"]


def damaged(folder):
    shutil.copytree(folder, "../damaged")
    os.truncate("../damaged/model.safetensors", 9999)
    return ["../damaged"]


WRONG = [
    ("no_model", lambda folder: ["/no/such/folder"], "model='/no/such/folder': the folder of a run, or of a model"),
    ("no_text", lambda folder: [str(folder), "--text", "/no/text"], "/no/text"),
    ("nothing_to_choose", lambda folder: [str(folder), "--select_topk", "0"], "select_topk=0 chooses nothing"),
    ("a_ratio", lambda folder: [str(folder), "--pool_ratios", "0.3"], r"pool_ratios[0]=0.3"),
    ("topk", lambda folder: [str(folder), "--select_topk", "many"], "select_topk=many"),
    ("layers", lambda folder: [str(folder), "--dense_layers", "2"], "dense_layers=2"),
    ("a_text_of_one_token", lambda folder: [str(folder), "--text", "one.txt"], "text='one.txt' has 1 tokens"),
    ("no_text_at_all", lambda folder: [str(folder), "--text", "none.txt"], "text='none.txt' has 0 tokens"),
    ("not_utf_8", lambda folder: [str(folder), "--text", "bytes.txt"], "text='bytes.txt' is not UTF-8 text"),
    ("context", lambda folder: [str(folder), "--context", "0"], "context=0: at least 2"),
    ("context_beyond_the_model", lambda folder: [str(folder), "--context", "513"], "context=513: the model allows at"),
    ("no_gpu", lambda folder: [str(folder), "--device", "cuda"], "finds no GPU here; use --device cpu"),
    ("output_is_a_file", lambda folder: [str(folder), "--output", "text.txt"], "output='text.txt' is a file"),
    ("no_folder_for_json", lambda folder: [str(folder), "--json", "no/a.json"], "its folder does not exist"),
    ("missing_weights", lacking, "weights are not in the folder, for example model.layers.0.self_attn.q_proj.weight"),
    (
        "a_text_too_short_for_the_choice",
        lambda folder: [str(folder), "--pool_ratios", "1/2", "1/4", "1/8", "--select_topk", "80"],
        "select_topk=80: for the text's 90 tokens this gives a sub-sequence of",
    ),
    ("damaged_weights", damaged, "its weights cannot be read, the file is damaged"),
    (
        "no_tokenizer_in_a_folder",
        lambda folder: [str(folder), "--tokenizer", "."],
        "tokenizer='.' is a folder without a tokenizer",
    ),
]


@pytest.mark.parametrize("arguments, message", [w[1:] for w in WRONG], ids=[w[0] for w in WRONG])
def test_wrong_options(tmp_path, model_folder, capsys, monkeypatch, arguments, message):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    texts = {"text.txt": b"some text " * 9, "one.txt": b"x", "none.txt": b"", "bytes.txt": b"\xff\xfe"}
    for name, text in texts.items():
        Path(name).write_bytes(text)
    words = arguments(model_folder)
    if "--text" not in words:
        words += ["--text", "text.txt"]
    assert main(["inspect", *words]) == 2
    said = capsys.readouterr().err
    assert message in said and "Traceback" not in said
    assert {path.name for path in Path().iterdir()} == texts.keys()


def test_a_text_shorter_than_a_window(tmp_path, model_folder, monkeypatch, capsys, caplog):
    monkeypatch.chdir(tmp_path)
    Path("text.txt").write_text("nine char")
    assert main(["inspect", str(model_folder), "--text", "text.txt", "--device", "cpu"]) == 0
    said = capsys.readouterr()
    assert "Note: 9 tokens are fewer than the coarsest window has, 16: this is dense attention" in said.out
    assert "9 tokens, a sub-sequence of 9 entries" in said.out and "9 tokens through the model" in said.err
    assert not caplog.text
    assert "keeps of text.txt" in Path("inspected/choice.html").read_text()


def test_a_full_disk(small_disk, model_folder, tmp_path, capsys):
    (tmp_path / "text.txt").write_text("some text " * 30)
    disk = small_disk(0.02)
    assert (
        main(["inspect", str(model_folder), "--text", str(tmp_path / "text.txt"), "--output", str(disk / "out")]) == 1
    )
    assert "No space left" in capsys.readouterr().err


def test_settings_of_the_wrapper_reach_the_choice():
    model = LighthouseWrapper(plain(), **{**SETTINGS, "select_topk": 2, "eval": "lighthouse"})
    assert choices_of(model, torch.arange(64)[None] % 61).length < 32
