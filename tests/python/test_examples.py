"""Training in a loop of one's own: `LighthouseCallback` in a Trainer, and the examples as they are started."""

from __future__ import annotations

import importlib.util
import json
import os
import runpy
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaForCausalLM

from lighthouse.huggingface import LighthouseCallback
from small_llama import LIGHTHOUSE_LAYERS, TOKENS, Spy, one_thread, plain, wrapped  # noqa: F401
from test_huggingface_training import trainer

EXAMPLES = Path(__file__).parents[2] / "examples" / "python"
STEP = 2 * TOKENS  # tokens of an optimizer step
COUNTED = {"include_num_input_tokens_seen": "all"}


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
    with pytest.raises(ValueError, match="the Trainer's LlamaForCausalLM is not wrapped: model = LighthouseWrapper"):
        trainer(plain(), tmp_path, [LighthouseCallback(switch_step=1)]).train()


def test_tokens_that_nobody_counts(tmp_path):
    with pytest.raises(ValueError, match="switch_tokens=9: .*include_num_input_tokens_seen"):
        run(tmp_path, switch_tokens=9)
    run(tmp_path, switch_step=9, save_strategy="steps", save_steps=2, max_steps=2)
    with pytest.raises(ValueError, match="the 2 steps of the checkpoint were made without counting"):
        run(tmp_path, str(tmp_path / "checkpoint-2"), switch_tokens=9, **COUNTED)


def test_the_callback_needs_transformers_alone():
    """Not what `lighthouse.training` asks for."""
    code = "import sys; sys.modules['datasets'] = None; from lighthouse.huggingface import LighthouseCallback\n"
    code += "assert 'lighthouse.training' not in sys.modules; LighthouseCallback(switch_share=0.6)"
    subprocess.run([sys.executable, "-c", code], check=True)


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


def test_accelerate_with_fsdp2(tmp_path):
    """The example itself makes sure that the model is in shards."""
    said = start("accelerate_fsdp2.py", tmp_path, "--steps", "6", "--tokens", "256", "--cpu")
    assert_two_stages(said, 6, 0.3)
    assert "2 processes end with a plain FSDPLlamaForCausalLM" in said


@pytest.mark.skipif(importlib.util.find_spec("deepspeed") is None, reason="deepspeed is not installed")
def test_deepspeed_zero2(tmp_path):
    on = {} if torch.cuda.is_available() else {"DS_ACCELERATOR": "cpu"}
    said = start("deepspeed_zero2.py", tmp_path, "--steps", "6", "--tokens", "256", **on)
    assert_two_stages(said, 6, 0.1)
    assert "2 processes end with a plain LlamaForCausalLM" in said
