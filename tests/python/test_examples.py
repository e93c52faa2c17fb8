"""Training in a loop of one's own: `LighthouseCallback` in a Trainer, and the examples as they are started."""

from __future__ import annotations

import importlib.util
import json
import os
import re
import runpy
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM, LlamaModel, TrainerCallback, TrainerState

from lighthouse.export.card import history_of_checkpoint, history_of_model
from lighthouse.huggingface import LighthouseCallback, state
from lighthouse.huggingface.steps import Steps
from lighthouse.huggingface.wrapped import WrappedModel
from small_llama import LIGHTHOUSE_LAYERS, TOKENS, VOCABULARY, Spy, ids, plain, wrapped
from test_huggingface_training import trainer

pytestmark = pytest.mark.usefixtures("one_thread")

EXAMPLES = Path(__file__).parents[2] / "examples" / "python"
STEP = 2 * TOKENS  # tokens of an optimizer step
COUNTED = {"include_num_input_tokens_seen": "all"}
NOT_COUNTED = {"include_num_input_tokens_seen": "no"}


def run(folder, resume=None, **arguments):
    """(callback, Trainer, Lighthouse's steps) after a training of 4 steps, or of `max_steps`."""
    of_callback = {name: arguments.pop(name) for name in list(arguments) if name.startswith("switch_")}
    spy, callback = Spy(), LighthouseCallback(**of_callback)
    found = trainer(wrapped(spy=spy), folder, [callback], **arguments)
    found.train(resume_from_checkpoint=resume)
    return callback, found, spy.calls // LIGHTHOUSE_LAYERS


SWITCHES = [
    ("at_a_share", {"switch_share": 0.6}, 2),
    ("at_a_share_of_nothing", {"switch_share": 0.0}, 0),
    ("never", {"switch_share": 1.0}, 4),
    ("at_a_step", {"switch_step": 3}, 3),
    ("behind_the_end", {"switch_step": 9}, 4),
    ("at_whole_steps_of_tokens", {"switch_tokens": 2 * STEP, **COUNTED}, 2),
    ("within_a_step_by_tokens", {"switch_tokens": 2 * STEP + 1, **COUNTED}, 3),
    ("at_no_tokens", {"switch_tokens": 0, **COUNTED}, 0),
]


@pytest.mark.parametrize("arguments, steps", [s[1:] for s in SWITCHES], ids=[s[0] for s in SWITCHES])
def test_the_switch(tmp_path, caplog, arguments, steps):
    callback, found, used = run(tmp_path, **arguments)
    assert used == steps and found.model.lighthouse_enabled == (steps == 4)
    assert ("had no dense stage" in caplog.text) == (steps == 4)
    assert not any("eval_loss" in entry for entry in found.state.log_history)  # evaluation is off


def test_it_evaluates_right_before_the_switch(tmp_path):
    _, found, _ = run(tmp_path, switch_step=2, eval_strategy="steps", eval_steps=3)  # and at the end
    assert [entry["step"] for entry in found.state.log_history if "eval_loss" in entry] == [2, 3, 4]


def dense_steps(folder, **more):
    """A run of which every step is dense, since its sequences are shorter than `min_tokens`."""
    callback = LighthouseCallback(switch_step=2)
    found = trainer(wrapped(min_tokens=TOKENS + 1), folder, [callback], **more)
    found.train()
    return callback, found


def test_a_run_whose_sequences_are_too_short_is_a_dense_one(tmp_path, caplog):
    callback, _ = dense_steps(tmp_path, save_strategy="steps", save_steps=4)
    assert callback.steps == Steps(dense=4)
    assert "Lighthouse never acted: it was on in 2 steps" in caplog.text and "no dense stage" not in caplog.text
    history = history_of_checkpoint(tmp_path / "checkpoint-4")
    assert history.stages == [("dense", 4, None)] and history.method is None and not history.warnings()


class Lengths(torch.utils.data.Dataset):
    """A row in two is so short that it runs dense."""

    def __len__(self):
        return 8

    def __getitem__(self, index):
        row = torch.arange(TOKENS if index % 2 else TOKENS // 2) % VOCABULARY
        return {"input_ids": row, "labels": row}


def test_a_step_of_short_and_long_batches_is_lighthouses_and_its_dense_forwards_are_said(tmp_path, caplog):
    callback = LighthouseCallback(switch_step=3)
    rows = {"per_device_train_batch_size": 1, "gradient_accumulation_steps": 4}
    trainer(wrapped(min_tokens=TOKENS), tmp_path, [callback], Lengths(), seed=1, **rows).train()
    assert callback.steps.lighthouse == 3 and callback.steps.mixed > 0
    assert f"In {callback.steps.mixed} of the 3 steps with Lighthouse some forwards were dense" in caplog.text


class Spoil(TrainerCallback):
    """The dense stage makes the model worse."""

    def on_step_begin(self, args, state, control, optimizer=None, **kwargs):
        for group in optimizer.param_groups:
            group["lr"] = 1e-3 if state.global_step < 2 else 5.0


def test_a_best_model_from_before_the_switch_is_said(tmp_path, caplog, monkeypatch):
    """At the end of training, by `unwrap`, and by `export` of the model and of the checkpoint."""
    monkeypatch.setattr(state, "_said", set())
    every = {"eval_strategy": "steps", "eval_steps": 1, "save_strategy": "steps", "save_steps": 1}
    callbacks = [LighthouseCallback(switch_step=2), Spoil()]
    run = trainer(wrapped(), tmp_path / "run", callbacks, load_best_model_at_end=True, **every)
    run.train()
    best = run.state.best_global_step
    assert best <= 2 and f"the best checkpoint's weights, of step {best}, from before the dense stage" in caplog.text
    assert f"All {best} steps of these weights used Lighthouse" in caplog.text
    assert "No dense step has followed" in history_of_model(run.model).warnings()[0]
    assert len(history_of_checkpoint(Path(run.state.best_model_checkpoint)).warnings()) == 1
    caplog.clear()
    run.model.unwrap()
    assert "no step of dense attention after it" in caplog.text


def test_a_resumed_run_goes_on_counting(tmp_path, caplog):
    """A checkpoint of an earlier version has no counts: none are then made up. Other settings are said."""
    whole, *_ = run(tmp_path, switch_step=2, **SAVED)
    assert whole.steps == Steps(lighthouse=2, dense=2, last=2)
    again, *_ = run(tmp_path, str(tmp_path / "checkpoint-1"), switch_step=2, **SAVED)
    assert again.steps == whole.steps and "since step" not in caplog.text

    written = tmp_path / "checkpoint-3" / "trainer_state.json"
    earlier = json.loads(written.read_text())
    attributes = earlier["stateful_callbacks"]["LighthouseCallback"]["attributes"]
    assert attributes.pop("steps") == {"lighthouse": 2, "dense": 1, "mixed": 0, "last": 2}
    attributes["settings"]["select_topk"] = 3
    written.write_text(json.dumps(earlier))
    again, *_ = run(tmp_path, str(written.parent), switch_step=2, **SAVED)
    assert again.steps is None and "since step 3 of this run select_topk was 3, is 4" in caplog.text
    assert history_of_checkpoint(tmp_path / "checkpoint-4").stages == [("lighthouse", 2, None), ("dense", 2, None)]


def test_processes_that_are_strangers_are_said(tmp_path, monkeypatch, caplog):
    monkeypatch.setenv("OMPI_COMM_WORLD_SIZE", "2")
    callback, found = LighthouseCallback(switch_step=1), SimpleNamespace(world_size=1, max_steps=2, **NOT_COUNTED)
    callback.on_train_begin(found, TrainerState(), None, model=wrapped())
    assert "OMPI_COMM_WORLD_SIZE=2: a launcher has started 2 processes, but they are not joined" in caplog.text


SAVED = {"save_strategy": "steps", "save_steps": 1, "max_steps": 4}
RESUMED = [
    ("a_share_stays_when_the_run_gets_longer", {"switch_share": 0.5}, {}, 1, 8, 1),
    ("another_share_is_a_new_wish", {"switch_share": 0.5}, {"switch_share": 0.75}, 1, 4, 2),
    ("a_step", {"switch_step": 2}, {}, 1, 4, 1),
    ("from_behind_the_switch", {"switch_step": 2}, {}, 3, 4, 0),
    ("tokens_to_come", {"switch_tokens": 3 * STEP, **COUNTED}, {}, 1, 4, 2),
    ("tokens_that_were", {"switch_tokens": STEP + 1, **COUNTED}, {}, 3, 4, 0),
]


@pytest.mark.parametrize("first, then, step, last, steps", [r[1:] for r in RESUMED], ids=[r[0] for r in RESUMED])
def test_a_resumed_run_switches_where_the_first_would_have(tmp_path, first, then, step, last, steps):
    _, whole, _ = run(tmp_path, **SAVED, **first)
    arguments = {**SAVED, **first, **then, "max_steps": last}
    callback, found, used = run(tmp_path, str(tmp_path / f"checkpoint-{step}"), **arguments)
    assert used == steps
    if last == SAVED["max_steps"] and not then:
        assert found.losses == {at: loss for at, loss in whole.losses.items() if at > step}


WRONG = [
    ("none", {}, ValueError, "nothing given: exactly one of switch_share, switch_step, switch_tokens"),
    ("two", {"switch_share": 0.5, "switch_step": 3}, ValueError, "switch_share and switch_step given: exactly one"),
    ("share_above_one", {"switch_share": 1.5}, ValueError, "switch_share=1.5"),
    ("share_not_a_number", {"switch_share": float("nan")}, ValueError, "switch_share=nan"),
    ("share_as_text", {"switch_share": "0.5"}, TypeError, "switch_share='0.5'"),
    ("step_negative", {"switch_step": -1}, ValueError, "switch_step=-1"),
    ("step_a_fraction", {"switch_step": 0.6}, TypeError, "switch_step=0.6: a whole number"),
    ("tokens_bool", {"switch_tokens": True}, TypeError, "switch_tokens=True"),
]


@pytest.mark.parametrize("arguments, error, message", [w[1:] for w in WRONG], ids=[w[0] for w in WRONG])
def test_a_wrong_switch(arguments, error, message):
    with pytest.raises(error, match=message):
        LighthouseCallback(**arguments)


def test_a_model_that_is_not_wrapped(tmp_path):
    with pytest.raises(ValueError, match="the Trainer's LlamaForCausalLM is not wrapped: call LighthouseWrapper"):
        trainer(plain(), tmp_path, [LighthouseCallback(switch_step=1)]).train()


def test_tokens_that_nobody_counts(tmp_path):
    with pytest.raises(ValueError, match="switch_tokens=9: .*include_num_input_tokens_seen"):
        run(tmp_path, switch_tokens=9)
    run(tmp_path, switch_step=9, save_strategy="steps", save_steps=2, max_steps=2)
    with pytest.raises(ValueError, match="the 2 steps of the checkpoint were made without counting"):
        run(tmp_path, str(tmp_path / "checkpoint-2"), switch_tokens=9, **COUNTED)


@pytest.mark.slow
def test_the_callback_needs_transformers_alone():
    """Not what `lighthouse.training` asks for. That it imports nothing of it, test_rooms.py sees too."""
    code = "import sys; sys.modules['datasets'] = None; from lighthouse.huggingface import LighthouseCallback\n"
    code += "assert 'lighthouse.training' not in sys.modules; LighthouseCallback(switch_share=0.6)"
    subprocess.run([sys.executable, "-c", code], check=True)


# What the README shows


def test_the_readmes_own_training_loop(monkeypatch, caplog):
    """As it stands, with a model, batches and a step of the switch: one step with Lighthouse, one dense, and plain."""
    readme = (Path(__file__).parents[2] / "README.md").read_text()
    [code] = re.findall(r"```python\n(.*?LighthouseWrapper.*?)```", readme, re.DOTALL)
    length = 13_056  # from about here on its settings keep less than `max_share`
    tiny = {"vocab_size": VOCABULARY, "hidden_size": 8, "intermediate_size": 8, "num_attention_heads": 1}
    used, unwrap = [], WrappedModel.unwrap

    def batches():
        for _ in range(2):
            yield {"input_ids": ids(1, length)}
            used.append(names["model"].take_used())

    def unwrapped(model):
        used.append(model.lighthouse_enabled)
        return unwrap(model)

    monkeypatch.setattr(WrappedModel, "unwrap", unwrapped)
    names = {
        "config": LlamaConfig(**tiny, num_hidden_layers=3, max_position_embeddings=length),
        "dataloader": batches(),
        "switch_step": 1,
    }
    exec(code, names)
    assert used == [(True, False), (False, True), False] and type(names["model"]) is LlamaModel
    assert names["model"] is names["base_model"] and "not ready" not in caplog.text


# The examples, as files


def start(name, folder, *arguments, **environment) -> str:
    """On two processes, as torchrun does it."""
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", **environment}
    command = [*launcher, str(EXAMPLES / name), *arguments]
    done = subprocess.run(command, env=environment, cwd=folder, capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def start_here(monkeypatch, capsys, name, *arguments) -> str:
    """On one process, which is this one."""
    monkeypatch.setattr(sys, "argv", [name, *arguments])
    runpy.run_path(str(EXAMPLES / name), run_name="__main__")
    return capsys.readouterr().out


def assert_two_stages(said: str, steps: int, least: float) -> None:
    lines = [line.split() for line in said.splitlines() if line.startswith("step ")]
    stages = [line[2] for line in lines]
    assert stages == sorted(stages, key=("Lighthouse", "dense").index) and set(stages) == {"Lighthouse", "dense"}
    assert lines[-1][1] == str(steps)
    assert float(lines[-1][-1]) < float(lines[0][-1]) - least


def test_the_plain_loop(monkeypatch, capsys):
    said = start_here(monkeypatch, capsys, "plain_loop.py", "--steps", "10", "--tokens", "256")
    assert_two_stages(said, 10, 0.5)
    assert "ends with a plain LlamaForCausalLM" in said


def test_the_trainer(tmp_path, monkeypatch, capsys):
    arguments = ["--tokens", "256", "--output", str(tmp_path)]
    said = start_here(monkeypatch, capsys, "trainer.py", "--steps", "4", *arguments)
    assert "ends with a plain LlamaForCausalLM" in said and said.count("'eval_loss'") == 4
    assert type(AutoModelForCausalLM.from_pretrained(tmp_path / "checkpoint-4")) is LlamaForCausalLM
    said = start_here(monkeypatch, capsys, "trainer.py", "--steps", "6", "--resume", *arguments)
    assert "ends with a plain LlamaForCausalLM" in said
    assert LighthouseCallback(switch_share=0.6).given == saved(tmp_path / "checkpoint-6")["args"]
    assert saved(tmp_path / "checkpoint-6")["attributes"]["step"] == 2  # of 4, kept


def saved(checkpoint) -> dict:
    state = json.loads((checkpoint / "trainer_state.json").read_text())
    return state["stateful_callbacks"]["LighthouseCallback"]


@pytest.mark.slow
def test_accelerate_with_fsdp2(tmp_path):
    """The example itself makes sure that the model is in shards."""
    said = start("accelerate_fsdp2.py", tmp_path, "--steps", "6", "--tokens", "256", "--cpu")
    assert_two_stages(said, 6, 0.3)
    assert "2 processes end with a plain FSDPLlamaForCausalLM" in said


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("deepspeed") is None, reason="deepspeed is not installed")
def test_deepspeed_zero2(tmp_path):
    on = {} if torch.cuda.is_available() else {"DS_ACCELERATOR": "cpu"}
    said = start("deepspeed_zero2.py", tmp_path, "--steps", "6", "--tokens", "256", **on)
    assert_two_stages(said, 6, 0.1)
    assert "2 processes end with a plain LlamaForCausalLM" in said
