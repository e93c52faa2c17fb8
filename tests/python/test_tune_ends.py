"""How the trials of a study end: by an error, a signal, a kill, too much time or too little, and what is tried again.

A process that is to die really does.
"""

from __future__ import annotations

import json
import os
import signal
import sqlite3
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch._dynamo as dynamo
from optuna.distributions import IntDistribution
from optuna.trial import TrialState, create_trial

import forked
from lighthouse.report import page, studied
from lighthouse.studies import storage
from lighthouse.studies import tune as tune_module
from lighthouse.studies.trial import out_of_memory
from lighthouse.training import RunFailed
from lighthouse.training import run as run_module
from lighthouse.training.callbacks import Record, StopOnSignal
from lighthouse.training.result import Stopped
from test_training_cache import change_the_middle, write_long
from training_runs import status, write_text
from tune_studies import CONTEXT, GRID, count_few_steps, many_small_trials, quiet, study_of

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module", autouse=True)
def few_steps():
    with many_small_trials() as patch:
        patch.setattr(page, "png_of", lambda figure: b"")  # what pictures show is not looked at here
        yield


# How trials end


def ends(monkeypatch, text, folder, when, error, **changes):
    """A grid whose step fails where `when(trainer)` holds."""
    before = run_module.RunTrainer.training_step

    def step(trainer, *args, **kwargs):
        if when(trainer):
            raise error
        return before(trainer, *args, **kwargs)

    monkeypatch.setattr(run_module.RunTrainer, "training_step", step)
    return study_of(text, folder, {**GRID, **changes.pop("tuning", {})}, **changes).run(quiet)


OUT_OF_MEMORY = [
    ("of_a_gpu", torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB."), True),
    ("of_a_cpu", RuntimeError("[enforce fail at a.cpp:1] DefaultCPUAllocator: can't allocate memory"), True),
    ("of_python", MemoryError(), True),
    ("another_fault", RuntimeError("mat1 and mat2 shapes cannot be multiplied"), False),
]


@pytest.mark.parametrize("error, expected", [o[1:] for o in OUT_OF_MEMORY], ids=[o[0] for o in OUT_OF_MEMORY])
def test_what_is_out_of_memory(error, expected):
    assert out_of_memory(error) is expected


def test_out_of_memory_is_a_failed_value_and_not_the_end(monkeypatch, text, tmp_path):
    """Two rows do not fit: more than what failed once are not tried."""
    result = ends(
        monkeypatch,
        text,
        tmp_path,
        lambda trainer: trainer.args.per_device_train_batch_size > 1,
        OUT_OF_MEMORY[0][1],
        tuning={
            "fixed": ["pool_ratios", "select_topk", "local_window", "share", "learning_rate"],
            "levels": None,
            "level_ratio": None,
            "topk": None,
            "batch_up_to": 3.0,
            "grid_values": 4,
        },
        steps=16,
    )
    failed, skipped = result.of("failed"), result.of("skipped")
    assert {trial.options["per_device_train_batch_size"] for trial in result.of("complete")} == {1}
    assert len(result.of("complete")) == 1 and len(failed) + len(skipped) == 3
    assert failed and all(trial.why.startswith("out of memory: ") and trial.loss is None for trial in failed)
    assert skipped and all("needs no less memory than trial" in trial.why for trial in skipped)


MEMORY = [
    # of a trial that ran out of memory and of a setting: select_topk, local_window, rows
    ("a_longer_sub_sequence", (8, 16, 1), (9, 16, 1), True),
    ("a_shorter_one", (8, 16, 1), (7, 16, 1), False),
    ("more_rows", (8, 16, 1), (8, 16, 2), True),
    ("more_rows_of_less", (8, 16, 1), (7, 16, 2), False),
    ("a_window_beside_it", (8, 0, 1), (8, 16, 1), True),
    ("a_window_beside_a_shorter_one", (8, 0, 1), (1, 16, 1), True),
    ("a_window_of_another_length", (8, 16, 1), (8, 128, 1), True),
    ("no_window", (8, 16, 1), (16, 0, 1), False),
    ("the_window_alone", (8, 16, 1), (0, 16, 1), False),
    ("more_than_the_window_alone", (0, 16, 1), (1, 16, 1), True),
]


@pytest.mark.parametrize("failed, setting, expected", [m[1:] for m in MEMORY], ids=[m[0] for m in MEMORY])
def test_what_needs_no_less_memory_than_what_ran_out_of_it(text, tmp_path, failed, setting, expected):
    study = study_of(text, tmp_path, {"batch_up_to": 1.0})

    def of(topk, window, rows):
        method = replace(study.space.given.method, select_topk=topk, local_window=window)
        return replace(study.space.given, method=method, batch=rows)

    attributes = {"failed": "out of memory: CUDA", "options": study.space.values(of(*failed))}
    earlier = create_trial(state=TrialState.FAIL, user_attrs=attributes)
    trial = create_trial(state=TrialState.RUNNING, params={"batch": 1}, distributions={"batch": IntDistribution(1, 2)})
    why = study._known(of(*setting), trial, [earlier])
    assert (why is not None) == expected and (why is None or why.startswith("needs no less memory than trial"))


def test_trials_are_pruned_by_the_losses_behind_the_switch(monkeypatch, text, tmp_path):
    """After one complete trial; the later one is made worse."""
    before = Record.on_evaluate

    def evaluated(self, args, state, control, metrics=None, **kwargs):
        metrics["eval_loss"] += 10 if int(Path(args.output_dir).name) > 0 else 0
        before(self, args, state, control, metrics=metrics, **kwargs)

    monkeypatch.setattr(Record, "on_evaluate", evaluated)
    monkeypatch.setattr(tune_module, "NOT_PRUNED", 1)
    tuning = {"pruner": "median", "evaluations": 3, "trials": 2, "fixed": ["pool_ratios", "select_topk", "batch"]}
    result = study_of(text, tmp_path, tuning, steps=6).run(quiet)
    pruned = result.of("pruned")
    assert [trial.number for trial in pruned] == [1] and len(result.of("complete")) == 1
    # The switch is at step 3; evaluations at 4, 5 and 6, and the first of them prunes nothing.
    assert [point.step for point in pruned[0].held_out] == [4, 5] and pruned[0].steps == 5
    assert "at step 5 of 6" in pruned[0].why


def test_equal_time(text, tmp_path, monkeypatch):
    """Steps follow from the time that steps take: what is said of them is what was measured."""
    monkeypatch.setattr(studied, "LEAST_STEPS", 2)
    monkeypatch.setattr(studied, "LEAST_DENSE", 1)
    for module in (studied, tune_module):
        monkeypatch.setattr(module, "TOLERANCE", 99)  # a third of a second on a busy machine
    found, before = [], run_module.data.find_corpus
    monkeypatch.setattr(run_module.data, "find_corpus", lambda *args, **how: found.append(1) or before(*args, **how))
    tuning = {"judge": "time", "trials": 2}
    result = study_of(text, tmp_path, tuning, steps=12).run(quiet)
    assert len(found) == 1  # the text, for what is timed and for all trials
    per_step = result.given.seconds_per_step
    assert result.given.steps == 12 and result.budget == pytest.approx(6 * sum(per_step.values()))
    for trial in result.of("complete"):
        per_step = trial.seconds_per_step
        expected = trial.steps * 0.5 * sum(per_step.values())
        assert abs(expected - result.budget) <= max(per_step.values())
        assert trial.tokens == trial.steps * CONTEXT * trial.options["per_device_train_batch_size"]
        assert {name: stage["steps"] for name, stage in trial.stages.items()} == {
            "lighthouse": trial.switch_step,
            "dense": trial.steps - trial.switch_step,
        }
    assert (
        len(result.of("complete")) == 2
        and f"At equal time: {result.budget:,.1f} s" in (tmp_path / "report.md").read_text()
    )
    assert not list(tmp_path.rglob("timing"))

    # With a machine that is slower than when steps were timed.
    with pytest.MonkeyPatch.context() as patch:
        for module in (studied, tune_module):
            patch.setattr(module, "TOLERANCE", -0.99)
        after = study_of(text, tmp_path, tuning | {"trials": 3}, steps=12, resume=True).run(quiet)
    unequal = after.of("not comparable")
    assert len(unequal) == 3 and after.best is None and not (tmp_path / "best.yaml").exists()
    assert "became slower than when they were timed" in unequal[-1].why and unequal[-1].loss is None
    assert "No trial is comparable" in (tmp_path / "report.md").read_text()


def test_each_trial_may_compile_its_own_layers(text, tmp_path, monkeypatch):
    """The first has three: in training with Lighthouse and without, and in evaluation. One more would be refused."""
    plain = torch.nn.Module.compile
    monkeypatch.setattr(torch.nn.Module, "compile", lambda self, **how: plain(self, **how, backend="eager"))
    with dynamo.config.patch(recompile_limit=3):
        result = study_of(text, tmp_path, GRID | {"trials": 2}, compile_layers=True).run(quiet)
    torch.compiler.reset()
    assert len(result.of("complete")) == 2


def test_seconds_too_few_for_the_given_switch_end_the_study_before_a_trial(text, tmp_path):
    study = study_of(text, tmp_path, {"judge": "time", "seconds": 0.3}, switch_step=1000, steps=1100)
    with pytest.raises(RunFailed, match=r"seconds=0.3: 0.3 s are .* and 0 dense; .*use more --seconds"):
        study.run(quiet)
    assert not list((tmp_path / "trials").glob("0*"))
    study_of(text, tmp_path, {"judge": "time", "seconds": 30.0})  # other options may begin there
    assert not study.begun and not (tmp_path / "study.db").exists()


def test_trials_on_text_that_looks_alike_end_the_study(tmp_path):
    text = write_long(write_text(tmp_path / "text"))
    study_of(text, tmp_path / "study", {"trials": 1}).run(quiet)
    change_the_middle(text)
    said = []
    with pytest.raises(RunFailed, match="The text is not the one that the study began with"):
        study_of(text, tmp_path / "study", {"trials": 2}, resume=True).run(said.append)
    assert not any(line.startswith("trial") for line in said)


def test_equal_time_on_another_machine_is_another_study(text, tmp_path, monkeypatch):
    tuning = {"judge": "time", "seconds": 0.1}
    study = study_of(text, tmp_path, tuning)
    (tmp_path / "study.json").write_text(json.dumps(study.fixed | {"machine": "a faster one"}))
    with pytest.raises(ValueError, match="machine was 'a faster one', is "):
        study_of(text, tmp_path, tuning, resume=True)
    assert "machine" not in study_of(text, tmp_path / "other").fixed  # equal tokens are equal anywhere


# Processes that end


def _process(text: Path, folder: Path, tuning: dict, resume: bool, kill_in: int | None):
    count_few_steps(pytest.MonkeyPatch())
    if kill_in is not None:
        before = run_module.RunTrainer.training_step

        def step(trainer, *args, **kwargs):
            if trainer.folder.name == f"{kill_in:04}" and trainer.state.global_step == 2:
                os.kill(os.getpid(), signal.SIGKILL)
            return before(trainer, *args, **kwargs)

        run_module.RunTrainer.training_step = step
    study_of(text, folder, tuning, resume=resume).run(print)


def start(text: Path, folder: Path, tuning: dict, resume: bool = False, kill_in: int | None = None):
    log = Path(f"{folder}.{'second' if resume else 'first'}.log")
    return forked.start(_process, text, folder, tuning, resume, kill_in, log=log)


@pytest.mark.slow
def test_a_killed_study_goes_on(text, tmp_path):
    folder = tmp_path / "study"
    assert status(start(text, folder, GRID, kill_in=1)) == -signal.SIGKILL
    with sqlite3.connect(folder / "study.db") as database:
        states = dict(database.execute("select number, state from trials"))
    assert states[0] == "COMPLETE" and states[1] == "RUNNING"
    said = []
    result = study_of(text, folder, GRID, resume=True).run(said.append)
    assert result.trials[1].state == "interrupted" and "trial 1: was interrupted, its setting is tried again" in said
    again = [trial for trial in result.of("complete") if trial.parameters == result.trials[1].parameters]
    assert len(again) == 1 and len(result.of("complete")) == 3 and not result.of("running", "waiting")


def test_a_setting_that_ends_its_process_is_tried_again_and_then_given_up(text, tmp_path, monkeypatch):
    monkeypatch.setattr(storage, "INTERRUPTIONS", 2)
    for resume, error in ((False, RuntimeError("a bug")), (True, KeyboardInterrupt())):
        with monkeypatch.context() as patch, pytest.raises(type(error)):
            given = lambda trainer: trainer.options.pool_ratios == [1 / 4, 1 / 16]  # noqa: E731
            ends(patch, text, tmp_path, given, error, resume=resume)
    said = []
    result = study_of(text, tmp_path, GRID, resume=True).run(said.append)
    first, again = result.of("interrupted")
    assert first.number == 0 and again.parameters == first.parameters and again.given
    assert result.given is None and len(result.of("complete")) == 2
    assert any("interrupted 2 times, its setting is not tried again" in line for line in said)


def test_what_a_dead_process_was_at_is_lined_up_again_and_what_a_living_one_is_at_is_not(text, tmp_path):
    study, said = study_of(text, tmp_path, GRID), []
    (tmp_path / "trials").mkdir()
    stored = study._open(StopOnSignal(), print, print)
    dead, alive = (study._claim(stored, stored.sampler, print) for _ in range(2))
    dead.log.close()
    with alive.log:
        for _ in range(2):
            study.files.sweep(stored, said.append)
    first, second, *_, again = stored.get_trials()
    assert (first.state, second.state, again.state) == (TrialState.FAIL, TrialState.RUNNING, TrialState.WAITING)
    assert again.user_attrs == {"interruptions": 1, "given": True, "parameters": first.params}
    assert said == ["trial 0: was interrupted, its setting is tried again"]


def test_a_trial_that_ends_while_it_is_looked_at_was_not_interrupted(text, tmp_path, monkeypatch):
    study = study_of(text, tmp_path, GRID)
    (tmp_path / "trials").mkdir()
    stored = study._open(StopOnSignal(), print, print)
    trial, before = stored.ask(), storage.take_lock

    def lock(path):
        stored.tell(trial, 1.0)
        return before(path)

    monkeypatch.setattr(storage, "take_lock", lock)
    study.files.sweep(stored, print)
    states = [found.state for found in stored.get_trials()]
    assert states == [TrialState.COMPLETE] + 3 * [TrialState.WAITING]


@pytest.mark.slow
def test_two_processes_share_a_study(text, tmp_path):
    folder, tuning = tmp_path / "study", {"trials": 5, "topk": ["4", "16"]}
    first = start(text, folder, tuning)
    while not (folder / "study.json").exists():
        first.join(0.05)
        assert first.exitcode is None
    second = start(text, folder, tuning, resume=True)
    assert status(first) == status(second) == 0, [path.read_text() for path in tmp_path.glob("*.log")]
    result = json.loads((folder / "results.json").read_text())
    complete = [trial for trial in result["trials"] if trial["state"] == "complete"]
    assert len(complete) == 5 and not any(trial["state"] == "interrupted" for trial in result["trials"])
    by_each = [
        path.read_text().count("\ntrial") + path.read_text().startswith("trial") for path in tmp_path.glob("*.log")
    ]
    assert sum(by_each) == 5 and len(by_each) == 2 and min(by_each) >= 1


def test_a_signal_in_the_last_step_of_a_trial_ends_the_study_behind_it(text, tmp_path, monkeypatch):
    before = run_module.RunTrainer.training_step

    def step(trainer, *args, **kwargs):
        if trainer.state.global_step + 1 == trainer.state.max_steps:
            os.kill(os.getpid(), signal.SIGTERM)
        return before(trainer, *args, **kwargs)

    with monkeypatch.context() as patch, pytest.raises(Stopped):
        patch.setattr(run_module.RunTrainer, "training_step", step)
        study_of(text, tmp_path, GRID).run(quiet)
    result = study_of(text, tmp_path, GRID | {"trials": 1}, resume=True).run(quiet)
    assert [trial.state for trial in result.trials if trial.state != "waiting"] == ["complete"]


def test_a_signal_in_the_last_step_that_is_timed_ends_the_study(text, tmp_path, monkeypatch):
    before = run_module.RunTrainer.training_step

    def step(trainer, *args, **kwargs):
        if trainer.folder.name == "given" and trainer.state.global_step + 1 == trainer.state.max_steps:
            os.kill(os.getpid(), signal.SIGTERM)
        return before(trainer, *args, **kwargs)

    monkeypatch.setattr(run_module.RunTrainer, "training_step", step)
    with pytest.raises(Stopped):
        study_of(text, tmp_path, GRID | {"judge": "time"}).run(quiet)
    assert (tmp_path / "study.db").exists() and not list((tmp_path / "trials").glob("0*"))
