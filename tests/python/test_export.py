"""`lighthouse export` and its function: what is written, what is refused, and what is left behind when it fails."""

from __future__ import annotations

import json
import logging
import os
import shutil
import signal
import subprocess
import sys

import pytest
import torch
from huggingface_hub import ModelCard
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer, ByT5Tokenizer, LlamaForCausalLM, LlamaModel

from lighthouse.cli import main
from lighthouse.core.method import Method
from lighthouse.export import card as card_of
from lighthouse.export import plain_process
from lighthouse.export import source as source_module
from lighthouse.export.card import History, history_of_checkpoint
from lighthouse.export.export import ExportFailed, export
from lighthouse.huggingface import LighthouseCallback, state
from lighthouse.training import pretrain
from small_llama import LIGHTHOUSE_LAYERS, Spy, ids, plain
from small_llama import wrapped as wrapped_llama
from test_huggingface_training import trainer
from training_runs import options, training, write_text
from training_tokenizers import save_letters

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A finished run of 4 steps, 2 with Lighthouse, whose every path names us."""
    folder = tmp_path_factory.mktemp("lighthouse") / "run"
    text = write_text(tmp_path_factory.mktemp("text"))
    pretrain(
        options(text, share=0.5),
        training(folder, max_steps=4, save_strategy="steps", save_steps=1, save_total_limit=9, eval_steps=1),
    )
    return folder


def names(folder) -> set[str]:
    return {path.name for path in folder.iterdir()}


@pytest.fixture
def plain_side_here(monkeypatch):
    """What the plain process does is done in this one, which has the package; the command's test has a real one."""
    monkeypatch.setattr(
        "lighthouse.export.export.in_plain_process", lambda task, request, **how: plain_process.TASKS[task](request)
    )


# What is written


def test_a_finished_run_by_the_command(run, tmp_path, capsys):
    out = tmp_path / "books"
    assert main(["export", str(run), "--output", str(out), "--json", "-"]) == 0
    said = capsys.readouterr()
    found = json.loads(said.out)
    assert found["folder"] == str(out) and found["source"] == str(run / "model")
    assert (found["step"], found["switch_step"], found["warnings"]) == (4, 2, [])
    assert "bit for bit: 64 x 384 numbers" in found["check"]
    assert names(tmp_path) == {"books"}
    for path in out.iterdir():
        assert ("lighthouse" in path.read_bytes().decode("latin-1").lower()) == (path.name == "README.md"), path
    assert {path.stat().st_mode & 0o444 for path in out.iterdir()} == {(out / "config.json").stat().st_mode & 0o444}
    config = json.loads((out / "config.json").read_text())
    assert config["use_cache"] is True and config["architectures"] == ["LlamaForCausalLM"]
    assert json.loads((out / "generation_config.json").read_text())["use_cache"] is True
    model, source = (AutoModelForCausalLM.from_pretrained(place) for place in (out, run / "model"))
    for weight, expected in zip(model.parameters(), source.parameters(), strict=True):
        assert torch.equal(weight, expected)
    assert AutoTokenizer.from_pretrained(out)("sea")["input_ids"] == ByT5Tokenizer()("sea")["input_ids"]

    card = ModelCard.load(out / "README.md")
    assert card.data.library_name == "transformers" and card.data.license is None
    results = json.loads((run / "results.json").read_text())
    rows = [f"| {point['step']} | {point['loss']:.4f} |" for point in results["held_out"]]
    assert len(rows) == 4
    stages = ["| Lighthouse | 2 | 256 |", "| dense | 2 | 256 |", "after step 2."]
    settings = [
        "| `pool_ratios` | 1/2, 1/4 |",
        "| `select_topk` | 4 |",
        "| `local_window` | 16 |",
        "| dense layers at each end | 0 |",
    ]
    for part in (*rows, *stages, *settings, "2605.06554", "bit for bit"):
        assert part in card.text, part
    assert "Warning" not in card.text
    said = " ".join(card.text.split())
    assert "beside that each token attends exactly to the last 16 tokens, and both outputs are summed" in said
    assert "except the dense layers" not in said


SAID_OF_THE_METHOD = [
    ("published", Method(), 1, ["except the dense layers at each end", "into a pyramid"], ["exactly"]),
    ("both", Method(local_window=256), 0, ["into a pyramid", "exactly to the last 256 tokens"], ["except the dense"]),
    ("window", Method(select_topk=0, local_window=2048), 0, ["exactly to the last 2,048 tokens"], ["pyramid"]),
    ("layers_not_known", Method(), None, ["except the dense layers at each end"], ["exactly"]),
]


@pytest.mark.parametrize("method, dense, there, not_there", [s[1:] for s in SAID_OF_THE_METHOD])
def test_what_a_card_says_of_the_method(method, dense, there, not_there):
    said = " ".join(card_of._method("LlamaModel", History(method=method, dense_layers=dense)).split())
    assert all(part in said for part in there) and not any(part in said for part in not_there)


def test_a_trainers_checkpoint_before_the_switch(plain_side_here, tmp_path, caplog):
    """Of a bare model, in bfloat16, without a tokenizer; its settings come from the callback."""
    run = trainer(
        wrapped_llama(LlamaModel),
        tmp_path / "run",
        [LighthouseCallback(switch_tokens=10**6)],
        max_steps=2,
        save_strategy="steps",
        save_steps=2,
        eval_strategy="steps",
        eval_steps=1,
        include_num_input_tokens_seen="all",
    )
    run.train()
    with caplog.at_level(logging.WARNING, "lighthouse"):
        done = export(tmp_path / "run" / "checkpoint-2", tmp_path / "out", dtype="bfloat16")
    assert any("All 2 steps of these weights used Lighthouse" in message for message in caplog.messages)
    assert done.model_class == "LlamaModel" and done.tokenizer is None
    assert "gives the hidden states of the source's weights in bfloat16 bit for bit" in done.check
    assert {weight.dtype for weight in load_file(tmp_path / "out" / "model.safetensors").values()} == {torch.bfloat16}
    card = (tmp_path / "out" / "README.md").read_text()
    evaluations = [entry for entry in run.state.log_history if "eval_loss" in entry]
    losses = [f"| {entry['step']} | {entry['eval_loss']:.4f} |" for entry in evaluations]
    assert "## Evaluation loss" in card and "Nats per token" not in card  # its Trainer's loss may be any
    for part in (*losses, "> **Warning.** All 2 steps", "The folder has no tokenizer", "| Lighthouse | 2 | 256 |"):
        assert part in card, part
    assert len(losses) == 2 and "after step" not in card


def test_a_wrapped_model_in_memory(plain_side_here, tmp_path):
    """Tied, with a tokenizer, over an older export and what a kill has left; it trains on as before."""
    settings = {"vocab_size": 384, "tie_word_embeddings": True, "use_cache": False}
    spy = Spy()
    model = wrapped_llama(spy=spy, config=settings)
    (tmp_path / "out.partial").mkdir()
    (tmp_path / "out.partial" / "model.safetensors").write_text("half")
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "config.json").write_text("{}")
    with pytest.raises(FileExistsError, match="--force"):
        export(model, tmp_path / "out")
    done = export(model, tmp_path / "out", tokenizer=ByT5Tokenizer(), force=True)
    assert names(tmp_path) == {"out"}
    assert len(done.warnings) == 1 and "still on" in done.warnings[0]
    assert done.warnings[0] in (tmp_path / "out" / "README.md").read_text()
    assert "lm_head.weight" not in load_file(tmp_path / "out" / "model.safetensors")
    assert model.lighthouse_enabled and model.config.use_cache is False
    assert spy.since(lambda: model({"input_ids": ids()})) == LIGHTHOUSE_LAYERS
    loaded = LlamaForCausalLM.from_pretrained(tmp_path / "out")
    never = plain(**settings)
    with torch.no_grad():
        assert torch.equal(loaded.eval()(ids()).logits, never.eval()(ids()).logits)


def test_what_a_checkpoint_knows(run):
    early, late = (history_of_checkpoint(run / f"checkpoint-{step}") for step in (2, 3))
    assert early.stages == [("lighthouse", 2, 256)] and len(early.warnings()) == 1
    assert late.stages == [("lighthouse", 2, 256), ("dense", 1, 128)] and not late.warnings()
    assert [step for step, _ in late.held_out] == [1, 2, 3] and late.losses_are_dense
    assert late.method == Method((0.5, 0.25), 4, local_window=16) and late.context == 128


def test_a_checkpoint_tells_of_its_own_run_wherever_it_lies(run, tmp_path):
    """Alone, and beside the settings of another run, which is said; one of an earlier version knows these alone."""
    alone = shutil.copytree(run / "checkpoint-3", tmp_path / "alone")
    expected = history_of_checkpoint(run / "checkpoint-3")
    assert history_of_checkpoint(alone) == expected and not expected.doubts
    settings = json.loads((run / "run.json").read_text()) | {"context": 999, "select_topk": 7, "seed": 1}
    (tmp_path / "run.json").write_text(json.dumps(settings))
    found = history_of_checkpoint(alone)
    assert (found.context, found.method, found.stages) == (128, expected.method, expected.stages)
    assert "a different run than the run.json beside it (different: select_topk, context, seed" in found.warnings()[0]
    state = json.loads((alone / "trainer_state.json").read_text())
    record = state["stateful_callbacks"]["Record"]
    del record["args"]["facts"], record["attributes"]["steps_used"]
    (alone / "trainer_state.json").write_text(json.dumps(state))
    earlier = history_of_checkpoint(alone)
    assert (earlier.context, earlier.lighthouse_steps, earlier.switch_step) == (999, 2, 2) and not earlier.doubts


def test_a_tokenizer_elsewhere_is_that_of_training_or_none(tmp_path):
    """Of a run that has no model yet its checkpoints lie without one; what has kept no identity is doubted."""
    place = save_letters(tmp_path / "tokenizer")
    text = write_text(tmp_path / "text")
    pretrain(
        options(text, tokenizer=place), training(tmp_path / "run", max_steps=1, save_strategy="steps", save_steps=1)
    )
    checkpoint = tmp_path / "run" / "checkpoint-1"
    shutil.rmtree(tmp_path / "run" / "model")

    def found():
        history = history_of_checkpoint(checkpoint)
        return source_module.tokenizer_of(checkpoint, history), history.doubts

    tokenizer, doubts = found()
    assert tokenizer("the")["input_ids"][0] == 257 and not doubts
    shutil.rmtree(place)
    save_letters(tmp_path / "tokenizer", th=258)
    with pytest.raises(
        ValueError, match=f"tokenizer='{place}', by the run.json .*, gives different ids than in training"
    ):
        found()
    for path, where in ((checkpoint / "trainer_state.json", "facts"), (tmp_path / "run" / "run.json", None)):
        told = json.loads(path.read_text())  # as earlier versions wrote them
        told_of = told if where is None else told["stateful_callbacks"]["Record"]["args"][where]
        del told_of["tokenizer_identity"]
        path.write_text(json.dumps(told))
        if where is not None:
            with pytest.raises(ValueError, match="gives different ids"):
                found()
    tokenizer, [doubt] = found()
    assert (
        tokenizer("the")["input_ids"][0] == 258 and "it is not recorded whether it is the training tokenizer" in doubt
    )


def test_a_runs_results_are_told_of_its_model_alone(run, tmp_path):
    """Not of a checkpoint whose state is missing, nor of other weights that lie in the run's folder."""
    for name in ("model", "checkpoint-2", "mine"):
        (tmp_path / name).mkdir()
    shutil.copy(run / "results.json", tmp_path)
    shutil.copytree(run / "model", tmp_path / "model", dirs_exist_ok=True)
    assert history_of_checkpoint(tmp_path / "model").step == 4
    shutil.copy(run / "checkpoint-2" / "model.safetensors", tmp_path / "model")
    others = history_of_checkpoint(tmp_path / "model")
    assert others.step is None and "not those that the run beside them saved" in others.warnings()[1]
    for name in ("checkpoint-2", "mine"):
        history = history_of_checkpoint(tmp_path / name)
        assert history.step is None and "not recorded" in history.warnings()[0] and not history.doubts


def test_a_run_that_has_gone_on_since_its_model_was_saved_is_said(run, tmp_path, caplog):
    for name in ("run.json", "results.json"):
        shutil.copy(run / name, tmp_path)
    (tmp_path / "model").mkdir()
    later = shutil.copytree(run / "checkpoint-4", tmp_path / "checkpoint-9")
    assert source_module.checkpoint_in(tmp_path) == tmp_path / "model"
    assert f"continued after its model was saved, after step 4; its last checkpoint: {later}" in caplog.text


def test_nothing_is_invented(tmp_path):
    plain().save_pretrained(tmp_path)
    history = history_of_checkpoint(tmp_path)
    assert history.stages == history.held_out == [] and history.method is None and history.step is None
    assert "not recorded" in history.warnings()[0]


# What fails


def test_other_logits_fail_it_and_leave_nothing(plain_side_here, monkeypatch, tmp_path):
    whole = LlamaForCausalLM.save_pretrained

    def damaged(self, folder, **kwargs):
        whole(self, folder, **kwargs)
        weights = load_file(folder / "model.safetensors")
        weights["model.norm.weight"][0] += 1e-6
        save_file(weights, folder / "model.safetensors", {"format": "pt"})

    monkeypatch.setattr(LlamaForCausalLM, "save_pretrained", damaged)
    with pytest.raises(ExportFailed, match="logits differ from the source's by up to"):
        export(plain(), tmp_path / "out")
    assert names(tmp_path) == set()


FULL = [("too_small_from_the_start", 0.5), ("full_within_the_weights", 0.9995), ("full_at_the_tokenizer", 1.003)]


@pytest.mark.parametrize("room", [f[1] for f in FULL], ids=[f[0] for f in FULL])
def test_a_full_disk_leaves_nothing(small_disk, capsys, run, room):
    size = (run / "model" / "model.safetensors").stat().st_size / 1e6
    disk = small_disk(room * size)
    assert main(["export", str(run), "--output", str(disk / "out")]) == 1
    said = capsys.readouterr().err
    assert "no space for the model: about 4.1 MB are needed" in said and "Traceback" not in said
    assert names(disk) == set()


def test_sigterm_leaves_nothing(monkeypatch, tmp_path, run):
    def killed(*args):
        assert names(tmp_path) == {"out.partial"}
        os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr("lighthouse.export.export._check", killed)
    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(SystemExit) as stop:
        main(["export", str(run), "--output", str(tmp_path / "out")])
    assert stop.value.code == 143 and names(tmp_path) == set() and signal.getsignal(signal.SIGTERM) is before


# What is refused


@pytest.fixture(scope="module")
def places(run, tmp_path_factory):
    """Folders by name that cannot be exported, or not be written to; a refusal leaves them as they are."""
    tmp_path = tmp_path_factory.mktemp("places")
    for name in ("empty", "fsdp", "deepspeed", "many", "no_config", "other", "no_class"):
        (tmp_path / name).mkdir()
    (tmp_path / "fsdp" / "pytorch_model_fsdp_0").mkdir()
    (tmp_path / "deepspeed" / "global_step4").mkdir()
    (tmp_path / "many" / "checkpoint-7").mkdir()
    (tmp_path / "file").write_text("x")
    for name in ("no_config", "other", "no_class"):
        shutil.copy(run / "model" / "model.safetensors", tmp_path / name)
    (tmp_path / "no_class" / "config.json").write_text("{}")
    (tmp_path / "other" / "config.json").write_text('{"architectures": ["GPT2LMHeadModel"], "model_type": "gpt2"}')
    shutil.copytree(run, tmp_path / "damaged", ignore=shutil.ignore_patterns("model", "runs"))
    (tmp_path / "damaged" / "checkpoint-4" / "optimizer.pt").unlink()
    shutil.copytree(run / "model", tmp_path / "cut")
    os.truncate(tmp_path / "cut" / "model.safetensors", 99_999)
    (tmp_path / "taken").mkdir()
    (tmp_path / "taken" / "notes.txt").write_text("mine")
    shutil.copytree(run / "model", tmp_path / "inside" / "model")
    return tmp_path


WRONG = [
    ("nothing_there", ["nowhere"], "checkpoint='nowhere' does not exist"),
    ("a_file", ["file"], "checkpoint='file' is a file"),
    ("not_a_checkpoint", ["empty"], "'empty' is not a checkpoint: it has no model.safetensors"),
    ("shards_of_fsdp", ["fsdp"], "accelerate merge-weights fsdp/pytorch_model_fsdp_0 fsdp"),
    ("shards_of_deepspeed", ["deepspeed"], "zero_to_fp32.py"),
    ("many_checkpoints", ["many"], "name one, such as 'many/checkpoint-7'"),
    ("no_config", ["no_config"], "has no config.json"),
    ("another_model", ["other"], "is of GPT2LMHeadModel: one of LlamaModel, LlamaForCausalLM"),
    ("no_class", ["no_class"], 'write "architectures": ["LlamaForCausalLM"] into it'),
    ("damaged_weights", ["cut"], "checkpoint='cut': its weights cannot be read, the file is damaged"),
    ("a_damaged_checkpoint", ["damaged/checkpoint-4"], "is not complete: its optimizer.pt is missing"),
    ("a_folder_in_use", ["inside/model", "--output", "taken"], "exists: use another folder, or replace it"),
    ("no_model_to_replace", ["inside/model", "--output", "taken", "--force"], "only a model's folder is replaced"),
    ("onto_itself", ["inside/model", "--output", "inside/model", "--force"], "holds what is to be exported"),
    ("onto_its_run", ["inside/model", "--output", "inside", "--force"], "holds what is to be exported"),
    ("a_file_there", ["inside/model", "--output", "file"], "is a file: use another name"),
    ("dtype", ["inside/model", "--dtype", "int8"], "'int8'"),
    ("tokenizer", ["inside/model", "--tokenizer", "empty"], "tokenizer='empty' is a folder without a tokenizer"),
    ("no_folder_for_json", ["inside/model", "--json", "no/a.json"], "json='no/a.json': its folder does not exist"),
    ("no_output", ["inside/model", "--output"], "expected one argument"),
]


@pytest.mark.parametrize("arguments, message", [w[1:] for w in WRONG], ids=[w[0] for w in WRONG])
def test_a_wrong_option_is_refused(places, monkeypatch, capsys, arguments, message):
    monkeypatch.chdir(places)
    before = sorted(str(path) for path in places.rglob("*"))
    arguments = arguments if "--output" in arguments else [*arguments, "--output", "out"]
    try:
        status = main(["export", *arguments])
    except SystemExit as stop:
        status = stop.code
    said = capsys.readouterr().err
    assert status == 2 and message in said and "Traceback" not in said
    assert sorted(str(path) for path in places.rglob("*")) == before


def test_a_run_not_at_its_end_gives_its_last_whole_checkpoint(places, caplog):
    found = source_module.checkpoint_in(places / "damaged")
    assert found == places / "damaged" / "checkpoint-3" and "optimizer.pt is missing" in caplog.text


def test_a_tokenizer_of_another_model(tmp_path):
    with pytest.raises(ValueError, match="ByT5Tokenizer gives the id .* vocabulary ends at 60"):
        export(plain(), tmp_path / "out", tokenizer=ByT5Tokenizer())
    assert names(tmp_path) == set()


WITHOUT = [("export", "rich"), ("inspect", "transformers")]


@pytest.mark.parametrize("command, package", WITHOUT)
def test_without_the_extra_it_is_named(monkeypatch, capsys, command, package):
    for name in [package, *(name for name in sys.modules if name.startswith(f"{package}."))]:
        monkeypatch.setitem(sys.modules, name, None)
    monkeypatch.delitem(sys.modules, f"lighthouse.cli.{command}", raising=False)
    assert main([command]) == 1
    said = capsys.readouterr().err
    assert package in said and 'pip install "lighthouse-attn[train]"' in said


@pytest.mark.slow
@pytest.mark.parametrize("command, package", WITHOUT)
def test_without_the_extra_it_is_named_before_anything_needs_it(command, package):
    code = (
        f"import sys; sys.modules['{package}'] = None; from lighthouse.cli import main; sys.exit(main(['{command}']))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 1 and "Traceback" not in done.stderr
    assert package in done.stderr and 'pip install "lighthouse-attn[train]"' in done.stderr


def test_help_has_an_example(capsys):
    with pytest.raises(SystemExit) as stop:
        main(["export", "--help"])
    assert stop.value.code == 0 and "lighthouse export runs/first --output first" in capsys.readouterr().out


# The forgotten unwrap: the plain thing is done, and said once


FORGOTTEN = [
    ("saved", lambda model, folder: model.save_pretrained(folder), "the plain model is saved"),
    (
        "generates",
        lambda model, folder: model.generate(ids(1), attention_mask=torch.ones_like(ids(1)), max_new_tokens=1),
        "generate runs with dense attention",
    ),
    ("evaluated", lambda model, folder: model.eval()(ids(), labels=ids()), "in eval() attention is dense"),
]


@pytest.mark.parametrize("do, message", [f[1:] for f in FORGOTTEN], ids=[f[0] for f in FORGOTTEN])
def test_a_forgotten_unwrap_is_said(monkeypatch, caplog, tmp_path, do, message):
    monkeypatch.setattr(state, "_said", set())
    spy = Spy()
    model, off = wrapped_llama(spy=spy), wrapped_llama(spy=spy).lighthouse(False)
    with caplog.at_level(logging.WARNING, "lighthouse"):
        do(off, tmp_path)
        assert not caplog.messages
        for _ in range(2):
            do(model, tmp_path)
    assert spy.calls == 0 and [message in said for said in caplog.messages] == [True]
    if (tmp_path / "config.json").exists():
        assert "lighthouse" not in (tmp_path / "config.json").read_text()
        assert list(load_file(tmp_path / "model.safetensors")) == sorted(plain().state_dict())


def test_an_evaluation_with_lighthouse_says_so(monkeypatch, caplog):
    monkeypatch.setattr(state, "_said", set())
    spy = Spy()
    model = wrapped_llama(spy=spy, eval="lighthouse").eval()
    with caplog.at_level(logging.WARNING, "lighthouse"), torch.no_grad():
        for _ in range(2):
            model({"input_ids": ids()})
    assert spy.calls == 2 * LIGHTHOUSE_LAYERS
    assert ["are not comparable with dense ones" in said for said in caplog.messages] == [True]
