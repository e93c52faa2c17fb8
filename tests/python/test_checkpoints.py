"""Checkpoints are whole or passed over, whichever change of the folder is the last one before a kill.

A few small files stand for a model; `test_training_interrupted.py` kills whole runs.
"""

from __future__ import annotations

import os
import shutil
import signal
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from transformers import Trainer

import forked
from lighthouse.core.files import write_whole, write_whole_folder
from lighthouse.training import checkpoints
from lighthouse.training.trainer import RunTrainer
from training_runs import status

FAULTS = [
    ("no_manifest", lambda folder: (folder / "manifest.json").unlink(), "it is incomplete"),
    ("a_cut_off_manifest", lambda folder: os.truncate(folder / "manifest.json", 40), "manifest.json is damaged"),
    ("a_missing_file", lambda folder: (folder / "scheduler.pt").unlink(), "its scheduler.pt is missing"),
    ("a_cut_off_file", lambda folder: os.truncate(folder / "optimizer.pt", 7), "optimizer.pt has 7 bytes instead of 9"),
]


@pytest.mark.parametrize("damage, fault", [f[1:] for f in FAULTS], ids=[f[0] for f in FAULTS])
def test_a_folder_that_is_no_whole_checkpoint(tmp_path, damage, fault):
    for step in (3, 20):
        folder = tmp_path / f"checkpoint-{step}"
        folder.mkdir()
        for name in ("optimizer.pt", "scheduler.pt"):
            (folder / name).write_text("123456789")
        checkpoints.seal(folder)
    passed_over = []
    assert checkpoints.last_whole(tmp_path, passed_over.append) == folder and not passed_over
    damage(folder)
    assert fault in checkpoints.fault_of(folder)
    assert checkpoints.last_whole(tmp_path, passed_over.append).name == "checkpoint-3"
    assert len(passed_over) == 1 and "checkpoint-20 is skipped" in passed_over[0]
    checkpoints.remove_unfinished(tmp_path)
    assert [path.name for path in checkpoints.checkpoints_in(tmp_path)] == ["checkpoint-3"]


class Files(Trainer):
    """Saves a checkpoint of two files and a folder, in Transformers' place."""

    def _save_checkpoint(self, model, trial):
        write_files(self.folder / f"checkpoint-{self.state.global_step}")


class Saves(RunTrainer, Files):
    """All that a run's trainer needs to save a checkpoint, and no model."""

    def __init__(self, folder: Path, step: int, limit: int):
        self.folder, self.model = folder, torch.nn.Linear(1, 1)
        self.state = SimpleNamespace(global_step=step, best_model_checkpoint=None)
        self.args = SimpleNamespace(save_total_limit=limit, should_save=True, optim="sgd")
        self.open_loss = SimpleNamespace(take=lambda: None)
        self.accelerator = SimpleNamespace(wait_for_everyone=lambda: None)


def write_files(folder: Path) -> None:
    (folder / "deep").mkdir(parents=True)
    torch.save(torch.arange(99.0), folder / "optimizer.pt")
    (folder / "deep" / "state.json").write_text(folder.name)


def write_model(folder: Path) -> None:
    folder.mkdir()
    torch.save(torch.ones(9), folder / "model.pt")


def save(folder: Path) -> None:
    Saves(folder, step=2, limit=1)._save_checkpoint(None, None)


def begin(folder: Path) -> None:
    """As a run that goes on does."""
    checkpoints.remove_unfinished(folder)
    checkpoints.rotate(folder, 1, None)


def end(folder: Path) -> None:
    write_whole_folder(folder / "model", write_model)
    write_whole(folder / "results.json", "the new results")


def whole(folder: Path, *steps: int) -> None:
    for step in steps:
        write_files(folder / f"checkpoint-{step}")
        checkpoints.seal(folder / f"checkpoint-{step}")


def half_written(folder: Path) -> None:
    """After a whole checkpoint: a half one, and what else a kill leaves."""
    whole(folder, 1)
    write_files(folder / "checkpoint-2")
    for name in ("model.partial", "model.replaced"):
        write_model(folder / name)
    (folder / "run.json.123.partial").write_text("{")


def ended_before(folder: Path) -> None:
    whole(folder, 1)
    end(folder)
    (folder / "model" / "model.pt").write_text("the old model")
    (folder / "results.json").write_text("the old results")


# What is there, what changes it, the step of the last whole checkpoint at the end, and at least so many changes.
CHANGES = [
    ("the_first_checkpoint_is_written", lambda folder: None, save, 2, 6),
    ("a_checkpoint_takes_the_place_of_an_older", lambda folder: whole(folder, 1), save, 2, 11),
    ("what_a_kill_left_is_cleared_away", half_written, begin, 1, 9),
    ("the_older_of_two_is_removed", lambda folder: whole(folder, 1, 2), begin, 2, 5),
    ("a_model_and_results_take_the_place_of_older_ones", ended_before, end, 1, 8),
]


def content(folder: Path) -> dict[str, bytes]:
    found = sorted(folder.rglob("*"))
    return {str(path.relative_to(folder)): path.read_bytes() if path.is_file() else b"" for path in found}


def killed(change, folder: Path, number: int) -> None:
    forked.AtChange(folder, number)()
    change(folder)


@pytest.mark.parametrize("there, change, step, least", [c[1:] for c in CHANGES], ids=[c[0] for c in CHANGES])
def test_killed_at_every_change(tmp_path, there, change, step, least):
    """No whole checkpoint or file is lost, and what goes on clears up and does the rest."""
    base, folder, done, log = (tmp_path / name for name in ("base", "run", "done", "log"))
    base.mkdir()
    there(base)
    shutil.copytree(base, done)
    change(done)
    before, after, steps, number, ended = content(base), content(done), [], 0, -signal.SIGKILL
    while ended != 0:
        number += 1
        shutil.copytree(base, folder)
        ended = status(forked.start(killed, change, folder, number, log=log))
        assert ended in (0, -signal.SIGKILL), log.read_text()
        last = checkpoints.last_whole(folder)
        steps.append(checkpoints.step_of(last) if last else 0)
        left = content(folder)
        for name in before.keys() & {"results.json", "model/model.pt"}:
            kept = left.get(name) or left[name.replace("/", ".replaced/")]  # between two renames
            assert kept in (before[name], after[name]), (number, name)
        begin(folder)
        if change is not save or steps[-1] != step:
            change(folder)
        assert content(folder) == after, number
        shutil.rmtree(folder)
    last = checkpoints.last_whole(base)
    assert steps[0] == (checkpoints.step_of(last) if last else 0) and steps == sorted(steps) and steps[-1] == step
    assert number > least
