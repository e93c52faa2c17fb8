"""`lighthouse evaluate`: which model, tokenizer and text it takes, what it writes, how it goes on, what it refuses."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from matplotlib.image import imread
from safetensors.torch import load_file, save_file
from tokenizers.processors import TemplateProcessing
from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

from lighthouse.cli import main
from lighthouse.evaluation import measure as module
from lighthouse.evaluation.found import find_model
from lighthouse.evaluation.text import text_of_data, text_of_run
from lighthouse.text import data
from lighthouse.text.tokenizer import byte_tokenizer
from lighthouse.training import prepare
from lighthouse.training.model import new_model
from lighthouse.training.options import DataOptions
from small_llama import config
from training_runs import options, training, write_text
from training_tokenizers import END, save_bpe

pytestmark = pytest.mark.usefixtures("one_thread")

CONTEXT = 256
QUICK = ["--passages", "2", "--trials", "2", "--depths", "2", "--rows", "2", "--device", "cpu"]


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Path:
    """A run of three steps with a checkpoint after the second; 2 x 256 tokens of its text are held out."""
    folder = tmp_path_factory.mktemp("evaluated")
    text = write_text(folder / "text")
    changes = {"max_steps": 3, "save_strategy": "steps", "save_steps": 2}
    prepare(options(text, context=CONTEXT), training(folder / "run", **changes)).train()
    return folder / "run"


@pytest.fixture
def here(tmp_path, monkeypatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def evaluate(*arguments) -> int:
    return main(["evaluate", *map(str, arguments), *(QUICK if "--rows" not in arguments else QUICK[:6])])


def numbers(folder: Path = Path("evaluated")) -> dict:
    return json.loads((folder / "evaluation.json").read_text())


# What it takes, and what it writes ----------------------------------------------------------------------------------


def test_a_run_on_what_it_held_out(run, here, capsys):
    """The loss is the one that the run measured at its end."""
    assert evaluate(run) == 0
    found, results = numbers(), json.loads((run / "results.json").read_text())
    assert found["evaluation"]["loss"]["loss"] == pytest.approx(results["loss"], abs=1e-5)
    assert found["settings"]["context"] == CONTEXT and found["settings"]["rows"] == 2
    assert found["command"].startswith(f"lighthouse evaluate {run}")
    assert found["device"] and found["versions"]["torch"] == torch.__version__ and "held out of" in found["text"]
    printed, said = capsys.readouterr()
    lines = printed.splitlines()
    assert [line.split(":")[0] for line in lines] == ["Loss", "Copies", "Passkeys", "Numbers", "Pictures"]
    assert "2 x 256 tokens" in said and "copy: 100%" in said
    for part in ("loss", "copy", "passkey"):
        assert imread(f"evaluated/{part}.png").std() > 0


def test_a_checkpoint_has_the_tokenizer_of_its_run(run, here):
    assert evaluate(run / "checkpoint-2", "--output_dir", "early", "--parts", "loss", "--json", "out.json") == 0
    assert evaluate(run / "model", "--parts", "loss") == 0
    early, late = numbers(here / "early"), numbers()
    assert json.loads(Path("out.json").read_text()) == early
    assert early["evaluation"]["loss"]["loss"] > late["evaluation"]["loss"]["loss"]
    assert early["settings"]["tokenizer"] == late["settings"]["tokenizer"]
    assert early["settings"]["weights"] != late["settings"]["weights"]
    assert early["evaluation"]["copy"] is None and not (here / "early" / "copy.png").exists()


def test_another_text_and_context(run, here, text, capsys):
    """Of a dataset, of files in the order of their paths, and with standard output for the numbers alone."""
    Path("a.jsonl").write_text("\n".join(json.dumps({"text": f"{n} words " * 40}) for n in range(9)))
    table = ["--dataset", "json", "--data", "a.jsonl", "--output_dir", "table"]
    assert evaluate(run, "--context", 64, "--parts", "loss", "--rows", 3, *table) == 0
    assert numbers(here / "table")["settings"]["rows"] == 3 and numbers(here / "table")["settings"]["context"] == 64
    capsys.readouterr()
    by_path = ["--data", text, "--order", "path", "--parts", "loss"]
    assert evaluate(run, *by_path, "--dtype", "bfloat16", "--json", "-") == 0
    found = json.loads(capsys.readouterr().out)
    assert found["text"] == str(text) and found["settings"]["dtype"] == "bfloat16"


def test_a_plain_folder_of_bytes(here, text):
    new_model("nano", CONTEXT, seed=0).save_pretrained("plain")
    assert evaluate("plain", "--data", text, "--parts", "loss") == 0
    assert numbers()["settings"]["context"] == CONTEXT  # all that the model allows


def test_rows_are_the_text_in_its_order(text):
    options = DataOptions(data=[str(text)], order="path")
    encoder = data.Encoder(byte_tokenizer())
    found = text_of_data(options, encoder, context=100, most=50, seed=0)
    files = sorted(text.rglob("*.txt"), key=lambda path: (path.parent.parts, path.name))
    ids = [i for path in files for i in [*(byte + 3 for byte in path.read_bytes()), 1]]
    assert found.rows.shape == (50, 100) and found.rows.flatten().tolist() == ids[:5000]
    begun = text_of_data(options, encoder, context=100, most=50, seed=0, begin=2)
    assert begun.rows[:, 0].tolist() == [2] * 50 and begun.rows[:, 1:].flatten().tolist() == ids[: 50 * 99]
    assert begun.digest != found.digest
    whole = text_of_data(options, encoder, context=len(ids), most=50, seed=0)
    assert whole.rows.shape == (1, len(ids))


def test_rows_of_a_run_are_those_it_measured(run):
    settings = json.loads((run / "run.json").read_text())
    its = prepare(options(settings["data"][0], context=CONTEXT), training(run.parent / "same")).corpus.held_out.rows
    assert text_of_run(settings, CONTEXT, 16).rows.tolist() == its.tolist()
    assert text_of_run(settings, CONTEXT, 1).rows.tolist() == its[:1].tolist()
    assert text_of_run(settings, 128, 16).rows.tolist() == its.reshape(-1, 128).tolist()


def test_the_text_of_a_run_that_is_not_there_any_more(run, here, capsys):
    moved = Path(shutil.copytree(run.parent, here / "moved"))
    settings = json.loads((moved / "run" / "run.json").read_text())
    (moved / "run" / "run.json").write_text(json.dumps(settings | {"data": [str(moved / "text")]}))
    assert evaluate(moved / "run", "--parts", "loss") == 0  # the same text elsewhere
    next((moved / "text").rglob("*.txt")).write_text("another text " * 50)
    assert evaluate(moved / "run", "--parts", "loss", "--output_dir", "b") == 2
    assert "the text of the model's run, has changed since: name held-out text with data" in capsys.readouterr().err
    shutil.rmtree(moved / "text")
    assert evaluate(moved / "run", "--parts", "loss", "--output_dir", "b") == 2
    assert "the text of the model's run cannot be found again" in capsys.readouterr().err
    assert not Path("b").exists()


def test_a_text_begins_as_the_tokenizer_has_it(here):
    """With the begin token that it adds by itself; runs of this package train without one."""
    tokenizer = PreTrainedTokenizerFast.from_pretrained(save_bpe(here / "bpe"))
    for name, adds in (("adds", True), ("does_not", False)):
        tokenizer.bos_token = END
        template = TemplateProcessing(single=f"{END} $A", special_tokens=[(END, tokenizer.bos_token_id)])
        if adds:
            tokenizer.backend_tokenizer.post_processor = template
        LlamaForCausalLM(config(vocab_size=300)).save_pretrained(name)
        tokenizer.save_pretrained(name)
        tokenizer = PreTrainedTokenizerFast.from_pretrained(here / "bpe")
        assert find_model(name, name).begin == (0 if adds else None)
    (here / "run.json").write_text(json.dumps({"tokenizer": None}))  # as if both lay in a run's folder
    assert find_model("adds", "adds").begin is None


# Going on -----------------------------------------------------------------------------------------------------------


def test_an_interrupted_evaluation_goes_on(run, here, monkeypatch, capsys):
    assert evaluate(run, "--output_dir", "whole") == 0

    def interrupted(*arguments):
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(module, "copy_loss", interrupted)
        assert evaluate(run) == 130
    assert "the same command continues" in capsys.readouterr().err
    assert numbers()["evaluation"]["loss"] and not numbers()["evaluation"]["copy"]
    assert not Path("evaluated/loss.png").exists()
    measured, measure = [], module._measure
    monkeypatch.setattr(module, "_measure", lambda name, *rest: measured.append(name) or measure(name, *rest))
    capsys.readouterr()
    assert evaluate(run) == 0
    assert measured == ["copy", "passkey"] and "already measured" in capsys.readouterr().err
    assert numbers()["evaluation"] == numbers(Path("whole"))["evaluation"]
    assert evaluate(run, "--parts", "copy") == 0 and measured == ["copy", "passkey"]
    assert numbers()["evaluation"] == numbers(Path("whole"))["evaluation"]  # no part is lost


OTHERS = [
    ("passages", ["--passages", "3"], "passages was 2, is 3"),
    ("seed", ["--seed", "1"], "seed was 0, is 1"),
    ("dtype", ["--dtype", "bfloat16"], "dtype was 'float32', is 'bfloat16'"),
    ("context", ["--context", "128"], "context was 256, is 128"),
]


@pytest.mark.parametrize("changes, message", [o[1:] for o in OTHERS], ids=[o[0] for o in OTHERS])
def test_a_folder_with_another_evaluation_is_refused(run, here, capsys, changes, message):
    assert evaluate(run, "--parts", "loss") == 0
    before = numbers()
    assert main(["evaluate", str(run), "--parts", "loss", *QUICK, *changes]) == 2
    said = capsys.readouterr().err
    assert "output_dir='evaluated' holds an evaluation with other settings" in said and message in said
    assert numbers() == before


# What is refused ----------------------------------------------------------------------------------------------------

FILE = ["plain", "--data", "file.txt"]
LONG = ["plain", "--data", "long.txt"]
REFUSED = [
    ("no_such_folder", ["./none"], "model='./none' is not a folder"),
    ("a_file", ["file.txt"], "model='file.txt' is not a folder"),
    ("no_model", ["empty"], "empty' is not a checkpoint"),
    ("no_text", ["plain"], "data: model='plain' is not in the folder of a run"),
    ("a_context_beyond_the_model", [*FILE, "--context", "512"], "context=512: the model allows at most 256"),
    ("a_short_text", FILE, "file.txt has 61 tokens: at least one context of 256 is needed"),
    ("a_text_that_is_not_there", ["plain", "--data", "gone.txt"], "data='gone.txt' does not exist"),
    ("too_short_for_copies", [*LONG, "--context", "32"], "context=32: the part 'copy' needs at least 256"),
    ("no_tokenizer", ["words", "--data", "long.txt"], "vocabulary of 2,000 and no tokenizer beside it"),
    ("a_larger_tokenizer", ["small", "--data", "long.txt"], "tokenizer='bytes' has ids up to 383, but the vocabulary"),
    (
        "missing_weights",
        ["torn", "--data", "long.txt"],
        "model='torn': 1 of its weights are missing, for example model",
    ),
    ("damaged_weights", ["damaged", "--data", "long.txt"], "the file is damaged"),
    ("no_rows", [*LONG, "--rows", "0"], "rows=0: at least one"),
    ("an_odd_number_of_keys", [*LONG, "--trials", "3"], "trials=3: an even number"),
    ("no_folder_for_the_numbers", [*LONG, "--json", "none/a.json"], "json='none/a.json': its folder"),
    ("a_file_as_folder", [*LONG, "--output_dir", "file.txt"], "output_dir='file.txt' is a file"),
]


@pytest.fixture(scope="module")
def models(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("models")
    (folder / "empty").mkdir()
    (folder / "file.txt").write_text("the light of a house on the rock by the sea, turns and turns")
    (folder / "long.txt").write_text("the light of a house on the rock by the sea " * 20)
    new_model("nano", CONTEXT, seed=0).save_pretrained(folder / "plain")
    for name, size in (("words", 2000), ("small", 300)):
        LlamaForCausalLM(config(vocab_size=size, max_position_embeddings=CONTEXT)).save_pretrained(folder / name)
    for name in ("torn", "damaged"):
        shutil.copytree(folder / "plain", folder / name)
    weights = load_file(folder / "torn" / "model.safetensors")
    del weights["model.norm.weight"]
    save_file(weights, folder / "torn" / "model.safetensors", metadata={"format": "pt"})
    (folder / "damaged" / "model.safetensors").write_bytes(b"no weights")
    return folder


@pytest.mark.parametrize("arguments, message", [r[1:] for r in REFUSED], ids=[r[0] for r in REFUSED])
def test_refused_before_any_work(models, monkeypatch, capsys, arguments, message):
    monkeypatch.chdir(models)
    monkeypatch.setattr(module, "_measure", lambda *_: pytest.fail("something is measured"))
    assert main(["evaluate", *arguments]) == 2
    said = capsys.readouterr().err
    assert said.splitlines()[-1].startswith("lighthouse evaluate: error: ") and message in said
    assert not (models / "evaluated").exists()


def test_the_help_has_an_example(capsys):
    with pytest.raises(SystemExit) as ended:
        main(["evaluate", "--help"])
    said = capsys.readouterr().out
    assert ended.value.code == 0 and "lighthouse evaluate runs/first --output_dir evaluated" in said
    for option in ("--data", "--order", "--parts", "--dtype", "--trials", "--output_dir"):
        assert option in said
