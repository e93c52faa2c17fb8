"""Runs that are killed, stopped, out of space or not finite: what is left, and that they go on to the same bits.

Each run that is killed or stopped is a process of its own, which really dies.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import sys
import time
from pathlib import Path

import pytest
import torch

import forked
from forked import AtChange
from lighthouse.cli import main
from lighthouse.training import checkpoints, prepare, pretrain
from lighthouse.training import run as run_module
from lighthouse.training.callbacks import StopOnSignal
from lighthouse.training.result import DiskFull, NotFinite
from training_runs import CONTEXT, options, status, training

pytestmark = pytest.mark.usefixtures("one_thread")

# A log of two steps and a checkpoint of three: a checkpoint may lie in the middle of what a log is the mean of.
EVERY = {"logging_steps": 2, "save_strategy": "steps", "save_steps": 3, "save_total_limit": 1}


# What a run of two steps leaves behind.
WHOLE = {"checkpoint-2", "config.yaml", "model", "results.json", "run.json"}


def start(do, text: Path, folder: Path, *, environment=None, **changes):
    """A process that runs `do()` and then trains; `changes` are to the training's options."""
    log = Path(f"{folder}.{(environment or {}).get('RANK', 0)}.log")
    return forked.start(_run, do, text, folder, {**EVERY, **changes}, log=log, environment=environment)


def _run(do, text, folder, changes):
    do()
    pretrain(options(text), training(folder, **changes))


def said(folder: Path, rank: int = 0) -> str:
    return Path(f"{folder}.{rank}.log").read_text()


class AtStep:
    """Sends the process the signals in the forward of its `call`-th step."""

    def __init__(self, call: int, *signals: int):
        self.call, self.signals, self.calls = call, signals, 0

    def __call__(self):
        before = run_module.RunTrainer.training_step
        StopOnSignal.SAME = 0.0
        signal.signal(signal.SIGINT, signal.default_int_handler)  # ignored where the tests run in the background

        def step(trainer, *args, **kwargs):
            self.calls += 1
            if self.calls == self.call:
                for number in self.signals:
                    os.kill(os.getpid(), number)
            return before(trainer, *args, **kwargs)

        run_module.RunTrainer.training_step = step


def in_cutting():
    """Kills the process while its text is cut."""
    run_module.data.cutting._cut = lambda *args: os.kill(os.getpid(), signal.SIGKILL)


def nothing():
    pass


def losses(folder: Path) -> dict:
    """All losses that were logged, in training and held out, and the bytes of the model at the end."""
    state = json.loads((checkpoints.last_whole(folder) / "trainer_state.json").read_text())
    results = json.loads((folder / "results.json").read_text())
    return {
        "training": [(entry["step"], entry["loss"]) for entry in state["log_history"] if "loss" in entry],
        "held_out": [(point["step"], point["loss"]) for point in results["held_out"]],
        "model": (folder / "model" / "model.safetensors").read_bytes(),
    }


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory, text):
    """By the number of steps."""
    found = {}

    def of(steps: int, **changes):
        if steps not in found:
            folder = tmp_path_factory.mktemp("undisturbed") / "run"
            assert status(start(nothing, text, folder, max_steps=steps, **changes)) == 0, said(folder)
            found[steps] = losses(folder)
        return found[steps]

    return of


KILLED = [
    ("before_the_first_checkpoint", 2, None),
    ("in_the_stage_with_lighthouse", 5, "checkpoint-3"),
    ("in_the_dense_stage", 9, "checkpoint-6"),
]


@pytest.mark.parametrize("call, left", [k[1:] for k in KILLED], ids=[k[0] for k in KILLED])
def test_a_killed_run_goes_on_to_the_same_bits(tmp_path, text, undisturbed, call, left):
    folder = tmp_path / "run"
    assert status(start(AtStep(call, signal.SIGKILL), text, folder, max_steps=10)) == -signal.SIGKILL
    last = checkpoints.last_whole(folder)
    assert (last and last.name) == left
    assert status(start(nothing, text, folder, max_steps=10, resume=True)) == 0, said(folder)
    assert losses(folder) == undisturbed(10)
    assert (f"Continuing from {last}" if last else "it starts again") in said(folder)


def test_a_run_killed_before_its_first_step_begins_again(tmp_path, text, undisturbed):
    folder = tmp_path / "run"
    assert status(start(in_cutting, text, folder, max_steps=10)) == -signal.SIGKILL
    assert {path.name for path in folder.iterdir()} == {"config.yaml", "run.json"}
    assert status(start(nothing, text, folder, max_steps=10, resume=True)) == 0, said(folder)
    assert losses(folder) == undisturbed(10) and "it starts again" in said(folder)


@pytest.mark.slow
def test_killed_at_every_change_of_the_folder(tmp_path, text, undisturbed):
    """With a whole checkpoint and half of the next: while this is cleared away, a checkpoint is written, the one before
    removed, and the model and the results are written at the end. What is left goes on each time to the same bits.
    """
    folder, base, every = tmp_path / "run", tmp_path / "base", {"max_steps": 2, "save_steps": 1}
    assert status(start(AtStep(2, signal.SIGKILL), text, folder, **every)) == -signal.SIGKILL
    shutil.copytree(
        folder / "checkpoint-1", folder / "checkpoint-2", ignore=lambda *_: ["manifest.json", "config.json"]
    )
    folder.rename(base)
    last, unfinished = 1, set()
    for number in range(1, 200):
        shutil.copytree(base, folder)
        ended = status(start(AtChange(folder, number), text, folder, resume=True, **every))
        whole = checkpoints.last_whole(folder)
        assert whole is not None and checkpoints.step_of(whole) >= last, number
        last = checkpoints.step_of(whole)
        unfinished.update((whole.name, path.name) for path in checkpoints.checkpoints_in(folder) if path != whole)
        if ended != 0:
            assert ended == -signal.SIGKILL, said(folder)
            assert status(start(nothing, text, folder, resume=True, **every)) == 0, said(folder)
        assert losses(folder) == undisturbed(2, save_steps=1)
        assert {path.name for path in folder.iterdir()} == WHOLE
        if ended == 0:
            break
        shutil.rmtree(folder)
    assert number > 40 and last == 2
    assert unfinished == {("checkpoint-1", "checkpoint-2"), ("checkpoint-2", "checkpoint-1")}


STOPPED = [
    ("sigterm", [signal.SIGTERM], 143, "checkpoint-5"),
    ("sigusr1", [signal.SIGUSR1], 143, "checkpoint-5"),
    ("sigusr1_then_sigterm", [signal.SIGUSR1, signal.SIGTERM], 143, "checkpoint-5"),
    ("sigterm_twice", [signal.SIGTERM, signal.SIGTERM], -signal.SIGTERM, "checkpoint-3"),
    ("interrupt", [signal.SIGINT], 1, "checkpoint-5"),
    ("interrupt_twice", [signal.SIGINT, signal.SIGINT], 1, "checkpoint-3"),
]


@pytest.mark.parametrize("signals, expected, left", [s[1:] for s in STOPPED], ids=[s[0] for s in STOPPED])
def test_a_signal(tmp_path, text, undisturbed, signals, expected, left):
    folder = tmp_path / "run"
    assert status(start(AtStep(5, *signals), text, folder, max_steps=10)) == expected, said(folder)
    assert checkpoints.last_whole(folder).name == left
    if expected != -signal.SIGTERM:
        what = "Interrupted" if signal.SIGINT in signals else "Stopped by a signal"
        what += f" after step {4 if left == 'checkpoint-3' else 5}"
        assert f"{what}. The last whole checkpoint is {folder / left}: the same command with --resume" in said(folder)
    if left == "checkpoint-5":
        assert status(start(nothing, text, folder, max_steps=10, resume=True)) == 0, said(folder)
        assert losses(folder) == undisturbed(10)


def both(text, folder, *do, ddp_timeout=60, **changes) -> list[int]:
    """The statuses of one run's two processes, each with its own `do`."""
    changes = {"max_steps": 8, "ddp_backend": "gloo", "ddp_timeout": ddp_timeout, **changes}
    processes = [start(do[n], text, folder, environment=rank, **changes) for n, rank in enumerate(forked.two_ranks())]
    return [status(process) for process in processes]


def test_two_processes_stop_behind_the_same_step(tmp_path, text):
    """The signal reaches one of them only."""
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    assert both(text, whole, nothing, nothing) == [0, 0], said(whole) + said(whole, 1)
    assert both(text, cut, nothing, AtStep(4, signal.SIGTERM)) == [143, 143], said(cut) + said(cut, 1)
    names = {path.name for path in checkpoints.last_whole(cut).iterdir()}
    assert checkpoints.last_whole(cut).name == "checkpoint-4" and {"rng_state_0.pth", "rng_state_1.pth"} <= names
    assert both(text, cut, nothing, nothing, resume=True) == [0, 0], said(cut) + said(cut, 1)
    expected, found = losses(whole), losses(cut)
    assert found["model"] == expected["model"] and found["held_out"] == expected["held_out"]
    assert found["training"] == [(step, pytest.approx(loss, rel=1e-6)) for step, loss in expected["training"]]


def cut_slowly():
    cut = run_module.data.cutting._cut
    run_module.data.cutting._cut = lambda *args: (time.sleep(6), cut(*args))


def test_two_processes_may_cut_for_longer_than_they_may_wait_for_each_other(tmp_path, text):
    folder = tmp_path / "run"
    ended = both(text, folder, cut_slowly, cut_slowly, ddp_timeout=4, max_steps=1)
    assert ended == [0, 0], said(folder) + said(folder, 1)


def megabytes(folder: Path) -> float:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file()) / 1e6


@pytest.fixture(scope="module")
def checkpoint_size(tmp_path_factory, text):
    folder = tmp_path_factory.mktemp("size")
    pretrain(options(text), training(folder, save_strategy="steps", save_steps=5))
    return megabytes(folder / "checkpoint-5")


FULL = [("at_the_weights", 1.05), ("at_the_optimizer", 1.5), ("at_the_last_files", 1.998)]


@pytest.mark.parametrize("room", [f[1] for f in FULL], ids=[f[0] for f in FULL])
def test_a_full_disk(text, small_disk, checkpoint_size, caplog, room):
    """There is room for so many checkpoints, and a second is to be written."""
    folder = small_disk(room * checkpoint_size) / "run"
    every = {"save_strategy": "steps", "save_steps": 2, "save_total_limit": 1}
    with pytest.raises(DiskFull) as full:
        pretrain(options(text), training(folder, **every))
    for part in ("no space for checkpoint-4", "MB are free now", f"checkpoint is {folder / 'checkpoint-2'}: the same"):
        assert part in str(full.value)
    assert "will not fit" in caplog.text
    assert [path.name for path in checkpoints.checkpoints_in(folder)] == ["checkpoint-2"]
    assert checkpoints.fault_of(folder / "checkpoint-2") is None
    small_disk(3 * checkpoint_size)
    assert pretrain(options(text), training(folder, resume=True, **every)).steps == 5


def test_a_disk_full_at_the_end_keeps_the_checkpoint(text, small_disk, checkpoint_size):
    folder = small_disk(1.2 * checkpoint_size) / "run"
    every = {"save_strategy": "steps", "save_steps": 5}
    with pytest.raises(DiskFull, match="no space for the model"):
        pretrain(options(text), training(folder, **every))
    assert checkpoints.last_whole(folder).name == "checkpoint-5" and not list(folder.glob("model*"))
    small_disk(3 * checkpoint_size)
    assert pretrain(options(text), training(folder, resume=True, **every)).steps == 5


def test_a_disk_too_small_for_one_checkpoint_is_refused(text, small_disk, checkpoint_size):
    folder = small_disk(0.9 * checkpoint_size) / "run"
    with pytest.raises(DiskFull, match="a checkpoint needs about .* MB and the model .* MB, but .* MB are free there"):
        pretrain(options(text), training(folder, save_strategy="steps"))
    assert not folder.exists()


def test_a_disk_too_small_for_the_cut_text(tmp_path, text, small_disk, monkeypatch):
    monkeypatch.setattr(run_module.data.datasets.config, "HF_DATASETS_CACHE", small_disk(0.02))
    with pytest.raises(DiskFull, match="no space for the tokenized text in .* set HF_DATASETS_CACHE"):
        pretrain(options(text), training(tmp_path / "run"))
    assert not (tmp_path / "run").exists()


def bad_loss(trainer, loss):
    return loss * float("nan") if trainer.state.global_step == 3 else loss


def bad_gradient(trainer, loss):
    if trainer.state.global_step == 3:
        loss.register_hook(lambda grad: grad * float("inf"))
    return loss


def bad_weight(trainer, loss):
    def spoil(*step):
        if trainer.state.global_step == 3:
            trainer.model.model.norm.weight.data.fill_(float("inf"))

    if trainer.state.global_step == 3:
        trainer.optimizer.optimizer.register_step_post_hook(spoil)
    return loss


BAD = [
    ("loss", bad_loss, "step 4: the loss is not finite, on row "),
    ("gradient", bad_gradient, "step 4: the gradient norm is not finite, on row "),
    ("weight", bad_weight, "step 4: a weight is not finite after this step"),
]


@pytest.mark.parametrize("spoil, message", [b[1:] for b in BAD], ids=[b[0] for b in BAD])
def test_what_is_not_finite_ends_the_run_and_is_never_saved(tmp_path, text, monkeypatch, spoil, message):
    batches = {}

    class Spoiled(run_module.RunTrainer):
        def compute_loss(self, model, inputs, *args, **kwargs):
            batches.setdefault(self.state.global_step + 1, []).append(inputs["input_ids"])
            return spoil(self, super().compute_loss(model, inputs, *args, **kwargs))

    monkeypatch.setattr(run_module, "RunTrainer", Spoiled)
    every = {"save_strategy": "steps", "save_steps": 2, "logging_steps": 10, "eval_strategy": "no"}
    rows = {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 2}
    with pytest.raises(NotFinite) as stopped:
        pretrain(options(text), training(tmp_path, **every, **rows))
    said = str(stopped.value)
    assert message in said and f"The last whole checkpoint is {tmp_path / 'checkpoint-2'}:" in said
    assert [path.name for path in checkpoints.checkpoints_in(tmp_path)] == ["checkpoint-2"]
    if "row" in message:
        numbers = [int(number.replace(",", "")) for number in re.findall(r"row ([\d,]+):", said)]
        run = prepare(options(text), training(tmp_path / "other"))
        train_rows, _ = run_module.data.rows_of(run.corpus)
        assert [train_rows[number]["input_ids"].tolist() for number in numbers] == torch.cat(batches[4]).tolist()


def command(do, text, folder):
    do()
    small = f"--model nano --context {CONTEXT} --held_out 2 --use_cpu --select_topk 4 --pool_ratios 1/2 1/4"
    often = "--report_to none --save_steps 2 --steps 10000"
    sys.exit(main(["pretrain", "--data", str(text), "--output_dir", str(folder), *small.split(), *often.split()]))


def test_an_interrupted_command(tmp_path, text):
    folder, log = tmp_path / "run", tmp_path / "log"
    assert status(forked.start(command, AtStep(4, signal.SIGINT), text, folder, log=log)) == 130, log.read_text()
    assert checkpoints.last_whole(folder).name == "checkpoint-4"
    said = log.read_text()
    assert "Ctrl-C: the run will save a checkpoint after this step" in said and "Traceback" not in said
    assert f"Interrupted after step 4. The last whole checkpoint is {folder / 'checkpoint-4'}" in said


def test_a_stopped_command(tmp_path, text):
    """As a batch system does it: from outside, and looks at the status."""
    folder, log = tmp_path / "run", tmp_path / "log"
    run = forked.start(command, nothing, text, folder, log=log)
    while checkpoints.last_whole(folder) is None and run.is_alive():
        time.sleep(0.05)
    os.kill(run.pid, signal.SIGTERM)
    assert status(run) == 143, log.read_text()
    said = log.read_text()
    assert "the same command with --resume continues from there" in said and "Traceback" not in said
