"""Studies: what is tried and what is skipped, how trials end, processes that are killed or share one, what is left.

The models are the smallest, at the shortest context from which on Lighthouse is worth it. Processes are forked
from a server which has imported Transformers once; one that is to die really does.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import signal
import sqlite3
import sys
from importlib.machinery import PathFinder
from pathlib import Path
from types import SimpleNamespace

import optuna
import pytest
import torch
import yaml

from lighthouse.cli import main
from lighthouse.cli.pretrain import parse_run, run_parser
from lighthouse.core.method import Method
from lighthouse.report import studied as study_module
from lighthouse.studies import storage as storage_module
from lighthouse.report.studied import StudyResult, Trial, judged
from lighthouse.report.study import nothing_known, of_the_given, page_of
from lighthouse.studies import search
from lighthouse.studies import trial as trial_module
from lighthouse.studies import tune as tune_module
from lighthouse.studies.search import Setting, Space
from lighthouse.studies.trial import Judge
from lighthouse.studies.tune import Study, TuneOptions, prepare_study
from lighthouse.training import RunFailed
from lighthouse.training import run as run_module
from lighthouse.training.callbacks import Record, StopOnSignal
from lighthouse.training.result import HeldOut, Stopped
from test_training_cache import change_the_middle, write_long
from training_runs import options, status, training, write_text

pytestmark = pytest.mark.usefixtures("one_thread")

CONTEXT = 512
server = multiprocessing.get_context("forkserver")
server.set_forkserver_preload(["lighthouse.studies.tune", "transformers.models.llama.modeling_llama", "pytest"])


@pytest.fixture(scope="module", autouse=True)
def few_steps():
    """Trials of 4 steps count here, and of any time: how fast this machine is just now is not what is tested."""
    with pytest.MonkeyPatch.context() as patch:
        count_few_steps(patch)
        yield


def count_few_steps(patch):
    patch.setattr(study_module, "LEAST_STEPS", 4)
    patch.setattr(study_module, "LEAST_DENSE", 2)
    for module in (study_module, tune_module):
        patch.setattr(module, "TOLERANCE", float("inf"))


def asked(text: Path, folder: Path, tuning: dict | None = None, steps: int = 4, **changes):
    """Options of a study of a few steps of a few milliseconds; `changes` are to those of the run."""
    ours = {"context": CONTEXT, "share": 0.5, "held_out": 1, "pool_ratios": ["1/4", "1/16"], "select_topk": "8"}
    names = changes.keys() & run_module.PretrainOptions.__dataclass_fields__.keys()
    ours |= {name: changes.pop(name) for name in names}
    tuning = {"judge": "tokens", "pruner": "none", "evaluations": 1, "trials": 3, **(tuning or {})}
    return options(text, **ours), training(folder, max_steps=steps, **changes), TuneOptions(**tuning)


def study_of(text: Path, folder: Path, tuning: dict | None = None, **changes) -> Study:
    return prepare_study(*asked(text, folder, tuning, **changes))


def space_of(text: Path, tuning: dict | None = None, **changes) -> Space:
    return Space.of(*asked(text, Path("unused"), tuning, **changes))


# What is searched


def test_the_ranges_of_the_given_setting(text):
    space = space_of(text, context=98_304, model="tiny", select_topk="1024", per_device_train_batch_size=5)
    assert (space.levels, space.factors, space.topk, space.batches) == ((2, 5), (2, 10), (512, 4096), (5, 7))
    assert space.rates == pytest.approx((1.8e-3, 2.2e-3)) and not space.notes


RANGES = [
    ("shorter_contexts_keep_the_share_of_parents", {"context": 49_152, "select_topk": "512"}, {}, "topk", (256, 2048)),
    ("the_given_number_of_parents_widens_it", {"select_topk": "30"}, {}, "topk", (3, 30)),
    ("the_given_ratios_widen_it", {"pool_ratios": ["1/16"]}, {}, "factors", (2, 16)),
    ("a_range_of_parents_as_shares", {}, {"topk": ["1/128", "1/32"]}, "topk", (4, 16)),
    ("a_range_of_ratios", {}, {"level_ratio": ["1/8", "0.25"]}, "factors", (4, 8)),
    ("a_single_value", {}, {"levels": [3]}, "levels", (3, 3)),
    ("accumulation_where_rows_are_few", {"gradient_accumulation_steps": 5}, {}, "batches", (5, 7)),
    ("another_part_of_the_batch", {"gradient_accumulation_steps": 5}, {"batch_up_to": 1}, "batches", (1, 2)),
]


@pytest.mark.parametrize("run, tuning, name, expected", [r[1:] for r in RANGES], ids=[r[0] for r in RANGES])
def test_ranges(text, run, tuning, name, expected):
    assert getattr(space_of(text, tuning, **run), name) == expected


def test_a_batch_too_small_for_a_larger_one_is_left_out_and_that_is_said(text):
    space = space_of(text, per_device_train_batch_size=2)
    assert "batch" not in space.searched
    assert "per_device_train_batch_size=2" in str(space) and "left out" in str(space)


POINTLESS = [
    ("more_parents_than_entries", (4, 16), 64, "64 parents per level are asked, and the coarsest level has 32"),
    (
        "a_window_longer_than_the_context",
        (10, 100, 1000),
        1,
        "dense attention: the coarsest window, 1,000 tokens, is longer",
    ),
    ("as_slow_as_dense", (2, 4), 100, "dense attention is as fast"),
    ("a_good_one", (4, 16), 8, None),
]


@pytest.mark.parametrize("windows, parents, why", [p[1:] for p in POINTLESS], ids=[p[0] for p in POINTLESS])
def test_what_the_plan_shows_to_be_pointless(text, windows, parents, why):
    method = Method([1 / window for window in windows], parents)
    found = space_of(text).pointless(Setting(method, 1e-3, 1))
    assert found is None if why is None else why in found


def test_a_grid_has_the_given_setting_first_and_every_combination_once(text):
    space = space_of(text, {"levels": [2, 3], "level_ratio": ["1/8", "1/2"], "topk": ["4", "16"]})
    points = space.grid(3, seed=0)
    assert points[0] == space.given
    assert len(points) == 2 * 3 * 3 * 3 == len({str(space.parameters(point)) for point in points})
    assert {point.method.windows[1:] for point in points} == {(2,), (4,), (8,), (2, 4), (4, 16), (8, 64)}
    assert sorted({point.learning_rate for point in points}) == pytest.approx([1.8e-3, 2e-3, 2.2e-3])
    assert points != space.grid(3, seed=1) and points == space.grid(3, seed=0)


def test_the_given_learning_rate_is_one_of_a_grids_to_the_last_bit(text):
    space = space_of(text, {"fixed": ["pool_ratios", "select_topk", "batch"]}, learning_rate=3e-4)
    assert len(space.grid(3, seed=0)) == 3 and 3e-4 not in [point.learning_rate for point in space.grid(3, seed=0)[1:]]


def test_ranges_of_more_pyramids_than_there_is_time_for(text, monkeypatch):
    wide = {"levels": [2, 8], "level_ratio": ["1/64", "1/2"]}
    assert space_of(text, wide).levels == (2, 8)
    monkeypatch.setattr(search, "LOOKED_AT", 100)
    assert space_of(text, {**wide, "topk": ["60"]}, select_topk="60").topk == (60, 60)


# What is refused

REFUSED = [
    ("dense_only", {"dense_only": True}, {}, "both stages are needed"),
    (
        "no_dense_stage",
        {"share": 1.0},
        {},
        "max_steps=4: 4 steps, 4 with Lighthouse and 0 dense; a trial needs at least",
    ),
    (
        "few_dense_steps",
        {"share": 0.75},
        {},
        "max_steps=4: 4 steps, 3 with Lighthouse and 1 dense; a trial needs at least",
    ),
    ("few_steps", {"steps": 3}, {}, "needs at least 4, one with Lighthouse and 2 dense; take more --max_steps"),
    ("a_checkpoint", {"resume_from_checkpoint": "there"}, {}, "resume_from_checkpoint='there'"),
    ("short_contexts", {"context": 128}, {}, "context=128: below 512 tokens dense attention is as fast on cpu"),
    ("nothing_sensible", {"select_topk": "60"}, {"topk": ["60", "4096"]}, "no setting is worth training"),
    ("given_outside_a_range", {}, {"topk": ["16", "32"]}, "has 8, outside 16 to 32: give another with --select_topk"),
    ("given_ratio_outside", {}, {"level_ratio": ["1/3", "1/2"]}, "has 1/4, outside 1/2 to 1/3"),
    ("ratio_above_a_half", {}, {"level_ratio": ["0.9"]}, "level_ratio=0.9: ratios above 0 and up to 1/2"),
    ("a_range_backwards", {}, {"levels": [5, 2]}, "levels=5 2: one value, or the lower and the higher end"),
    ("too_many_levels", {}, {"levels": [2, 9]}, "levels=[2, 9]: 2 to 8 levels"),
    ("all_fixed", {}, {"fixed": ["pool_ratios", "select_topk", "learning_rate", "batch"]}, "nothing is left to search"),
    ("fixed_with_a_range", {}, {"fixed": ["learning_rate"], "rate_within": 0.2}, "rate_within is a range of learning"),
    ("fixed_unknown", {}, {"fixed": ["rate"]}, "fixed=rate: any of pool_ratios"),
    ("no_trials", {}, {"trials": 0}, "trials=0: at least one"),
    ("no_time", {}, {"judge": "time", "seconds": 0}, "seconds=0: a time above 0"),
    ("time_with_tokens", {}, {"seconds": 3.0}, "seconds=3.0 with judge='tokens'"),
    ("a_sampler_that_is_none", {}, {"sampler": "cma"}, "sampler='cma': tpe or grid"),
    ("rate_within", {}, {"rate_within": 1.5}, "rate_within=1.5"),
    ("a_text_too_short", {"context": 32_768}, {}, "65,536 are needed"),
]


@pytest.mark.parametrize("run, tuning, message", [r[1:] for r in REFUSED], ids=[r[0] for r in REFUSED])
def test_refused_before_any_work(text, tmp_path, run, tuning, message):
    with pytest.raises(ValueError) as refused:
        study_of(text, tmp_path / "study", tuning, **run)
    assert message in str(refused.value)
    assert not (tmp_path / "study").exists()


def test_more_than_one_process_by_torchrun_is_refused(text, tmp_path, monkeypatch):
    monkeypatch.setattr(run_module.TrainingOptions, "world_size", 2)
    with pytest.raises(ValueError, match="2 processes by torchrun"):
        study_of(text, tmp_path)


# Whole studies


@pytest.fixture(scope="module")
def by_tpe(text, tmp_path_factory):
    """A study of five trials, and what was said."""
    folder, said = tmp_path_factory.mktemp("tpe") / "study", []
    study = study_of(text, folder, {"trials": 5, "evaluations": 2, "topk": ["4", "64"]})
    return study, study.run(said.append), said


def test_the_given_setting_is_the_first_trial(by_tpe):
    study, result, _ = by_tpe
    assert [trial.number for trial in result.trials if trial.given] == [0]
    assert result.trials[0].options["pool_ratios"] == ["1/4", "1/16"] and result.given is result.trials[0]


def test_trials_are_complete_and_judged_at_equal_tokens(by_tpe):
    study, result, said = by_tpe
    complete = result.of("complete")
    assert len(complete) == 5 and {trial.tokens for trial in complete} == {4 * CONTEXT} == {result.budget}
    assert all([point.step for point in trial.held_out] == [3, 4] for trial in complete)
    assert all(trial.held_out[-1].loss == trial.loss > 0 for trial in complete)
    assert sum(line.startswith("trial") for line in said) == 5 and "best so far" in said[0]


def test_pointless_settings_are_skipped_with_the_reason_and_listed(by_tpe):
    study, result, said = by_tpe
    skipped = result.of("skipped")
    assert skipped and all(trial.why and trial.seconds is None for trial in skipped)
    assert any("parents per level are asked" in trial.why for trial in skipped)
    assert not any((study.folder / "trials" / f"{trial.number:04}.log").exists() for trial in skipped)
    stored = optuna.load_study(storage=f"sqlite:///{study.folder / 'study.db'}", study_name="lighthouse")
    assert stored.trials[skipped[0].number].user_attrs["skipped"] == skipped[0].why
    assert skipped[0].why in (study.folder / "report.md").read_text().replace("\u00a0", " ")
    assert any(line.startswith("skipped") for line in said)


def test_the_report(by_tpe):
    study, result, _ = by_tpe
    numbers = json.loads((study.folder / "results.json").read_text())
    assert numbers["best"] == result.best.number and numbers["front"] == [trial.number for trial in result.front]
    assert result.importance and sum(result.importance.values()) == pytest.approx(1)
    page, markdown = (study.folder / "report.html").read_text(), (study.folder / "report.md").read_text()
    for part in ("The best setting", "Loss against time", "What mattered", "Every trial", "equal tokens", "best.yaml"):
        assert part in page and part in markdown
    for name in ("loss-against-time.png", "importance.png", "parameters.png"):
        assert (study.folder / name).stat().st_size > 5000 and name in markdown


def test_no_model_is_kept_and_what_a_trial_says_is_in_its_log(by_tpe):
    study, result, said = by_tpe
    assert not list(study.folder.rglob("*.safetensors"))
    assert "dense held-out loss" in (study.folder / "trials" / "0000.log").read_text()
    assert not any("held-out loss" in line for line in said)


def test_pretrain_takes_the_best_setting_and_ends_at_its_loss(by_tpe, tmp_path):
    study, result, _ = by_tpe
    file = study.folder / "best.yaml"
    parser, _ = run_parser("pretrain", "", "", whole_help=True)
    _, run, _ = parse_run(parser, ["--config", str(file)])
    assert run.learning_rate == result.best.options["learning_rate"] and run.max_steps == result.best.steps
    assert main(["pretrain", "--config", str(file), "--output_dir", str(tmp_path / "run")]) == 0
    found = json.loads((tmp_path / "run" / "results.json").read_text())
    assert found["loss"] == result.best.loss
    assert found["settings"]["select_topk"] == result.best.options["select_topk"]


def test_a_study_that_is_done_trains_nothing_more_until_more_are_asked_for(by_tpe, text):
    study, before, _ = by_tpe
    resumed = {"evaluations": 2, "topk": ["4", "64"]}
    assert study_of(text, study.folder, resumed | {"trials": 5}, resume=True).run(print).trials == before.trials
    after = study_of(text, study.folder, resumed | {"trials": 6}, resume=True).run(print)
    assert len(after.of("complete")) == 6 and after.trials[: len(before.trials)] == before.trials


OTHERS = [
    ("options_of_the_run", {"share": 0.25}, {}, "share was 0.5, is 0.25"),
    ("the_learning_rate", {"learning_rate": 1e-3}, {}, "learning_rate was 0.002, is 0.001"),
    ("steps", {"steps": 6}, {}, "max_steps was 4, is 6"),
    ("ranges_and_judge", {}, {"rate_within": 0.2, "judge": "time"}, "judge was 'tokens', is 'time'; rate_within was"),
]


@pytest.mark.parametrize("run, tuning, message", [o[1:] for o in OTHERS], ids=[o[0] for o in OTHERS])
def test_a_study_with_other_options_is_an_error_that_lists_them(by_tpe, text, run, tuning, message):
    tuning = {"evaluations": 2, "topk": ["4", "64"], **tuning}
    with pytest.raises(ValueError) as refused:
        study_of(text, by_tpe[0].folder, tuning, resume=True, **run)
    assert message in str(refused.value) and "another --output_dir" in str(refused.value)


def test_a_folder_with_a_study_and_one_without(by_tpe, text, tmp_path):
    with pytest.raises(FileExistsError, match="holds a study already"):
        study_of(text, by_tpe[0].folder)
    with pytest.raises(FileNotFoundError, match="holds no study to resume"):
        study_of(text, tmp_path, resume=True)


GRID = {
    "sampler": "grid",
    "trials": None,
    "grid_values": 2,
    "fixed": ["learning_rate", "batch"],
    "levels": [2, 3],
    "level_ratio": ["1/16", "1/4"],
    "topk": ["8"],
}


def test_a_grid_is_trained_to_its_end(text, tmp_path):
    result = study_of(text, tmp_path / "study", GRID).run(lambda line: None)
    tried = {tuple(trial.options["pool_ratios"]): trial.state for trial in result.trials}
    assert tried == {
        ("1/4", "1/16"): "complete",
        ("1/4",): "complete",
        ("1/16",): "complete",
        ("1/16", "1/256"): "skipped",
    }


# How trials end


def ends(monkeypatch, text, folder, when, error, **changes):
    """A grid whose step fails where `when(trainer)` holds."""
    before = run_module.RunTrainer.training_step

    def step(trainer, *args, **kwargs):
        if when(trainer):
            raise error
        return before(trainer, *args, **kwargs)

    monkeypatch.setattr(run_module.RunTrainer, "training_step", step)
    return study_of(text, folder, {**GRID, **changes.pop("tuning", {})}, **changes).run(lambda line: None)


OUT_OF_MEMORY = [
    ("of_a_gpu", torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB."), True),
    ("of_a_cpu", RuntimeError("[enforce fail at a.cpp:1] DefaultCPUAllocator: can't allocate memory"), True),
    ("of_python", MemoryError(), True),
    ("another_fault", RuntimeError("mat1 and mat2 shapes cannot be multiplied"), False),
]


@pytest.mark.parametrize("error, expected", [o[1:] for o in OUT_OF_MEMORY], ids=[o[0] for o in OUT_OF_MEMORY])
def test_what_is_out_of_memory(error, expected):
    assert trial_module.out_of_memory(error) is expected


def test_out_of_memory_is_a_failed_value_and_not_the_end(monkeypatch, text, tmp_path):
    """Two rows do not fit: more than what failed once are not tried."""
    result = ends(
        monkeypatch,
        text,
        tmp_path,
        lambda trainer: trainer.args.per_device_train_batch_size > 1,
        OUT_OF_MEMORY[0][1],
        tuning={
            "fixed": ["pool_ratios", "select_topk", "learning_rate"],
            "levels": None,
            "level_ratio": None,
            "topk": None,
            "batch_up_to": 4.0,
            "grid_values": 5,
        },
        steps=20,
    )
    failed, skipped = result.of("failed"), result.of("skipped")
    assert {trial.options["per_device_train_batch_size"] for trial in result.of("complete")} == {1}
    assert len(result.of("complete")) == 1 and len(failed) + len(skipped) == 4
    assert failed and all(trial.why.startswith("out of memory: ") and trial.loss is None for trial in failed)
    assert skipped and all("needs no less memory than trial" in trial.why for trial in skipped)


def test_a_loss_that_is_not_finite_is_a_failed_value(monkeypatch, text, tmp_path):
    before = Record.on_evaluate

    def evaluated(self, args, state, control, metrics=None, **kwargs):
        if "0001" in args.output_dir:
            metrics["eval_loss"] = float("nan")
        before(self, args, state, control, metrics=metrics, **kwargs)

    monkeypatch.setattr(Record, "on_evaluate", evaluated)
    result = study_of(text, tmp_path, GRID | {"trials": 2}).run(lambda line: None)
    failed = [trial for trial in result.trials if trial.number == 1 and trial.state != "skipped"]
    assert all(trial.state == "failed" and "loss is nan" in trial.why for trial in failed)
    assert len(result.of("complete", "failed")) == 2 and len(result.of("complete")) >= 1


def test_another_error_ends_the_study_and_its_setting_is_tried_again(monkeypatch, text, tmp_path):
    with monkeypatch.context() as patch, pytest.raises(RuntimeError, match="a bug"):
        ends(patch, text, tmp_path, lambda trainer: True, RuntimeError("a bug"))
    result = study_of(text, tmp_path, GRID, resume=True).run(lambda line: None)
    assert result.trials[0].state == "interrupted" and result.given.number > 0
    assert len(result.of("complete")) == 3


def test_trials_are_pruned_by_the_losses_behind_the_switch(monkeypatch, text, tmp_path):
    """Behind one complete trial; the later ones are made worse."""
    before = Record.on_evaluate

    def evaluated(self, args, state, control, metrics=None, **kwargs):
        metrics["eval_loss"] += 10 if int(Path(args.output_dir).name) > 0 else 0
        before(self, args, state, control, metrics=metrics, **kwargs)

    monkeypatch.setattr(Record, "on_evaluate", evaluated)
    monkeypatch.setattr(tune_module, "NOT_PRUNED", 1)
    tuning = {"pruner": "median", "evaluations": 4, "trials": 3, "fixed": ["pool_ratios", "select_topk", "batch"]}
    result = study_of(text, tmp_path, tuning, steps=10).run(lambda line: None)
    pruned = result.of("pruned")
    assert [trial.number for trial in pruned] == [1, 2] and len(result.of("complete")) == 1
    for trial in pruned:
        # The switch is at step 5; evaluations at 7, 8, 9 and 10, and the first of them prunes nothing.
        assert [point.step for point in trial.held_out] == [7, 8] and trial.steps == 8
        assert "at step 8 of 10" in trial.why


def test_equal_time(text, tmp_path, monkeypatch):
    """Steps follow from the time that steps take: what is said of them is what was measured."""
    monkeypatch.setattr(study_module, "LEAST_STEPS", 2)
    monkeypatch.setattr(study_module, "LEAST_DENSE", 1)
    for module in (study_module, tune_module):
        monkeypatch.setattr(module, "TOLERANCE", 99)  # a third of a second on a busy machine
    tuning = {"judge": "time", "seconds": 0.3, "trials": 2}
    result = study_of(text, tmp_path, tuning).run(lambda line: None)
    for trial in result.of("complete"):
        per_step = trial.seconds_per_step
        expected = trial.steps * 0.5 * (per_step["lighthouse"] + per_step["dense"])
        assert abs(expected - 0.3) <= max(per_step.values())
        assert trial.tokens == trial.steps * CONTEXT * trial.options["per_device_train_batch_size"]
        assert {name: stage["steps"] for name, stage in trial.stages.items()} == {
            "lighthouse": trial.switch_step,
            "dense": trial.steps - trial.switch_step,
        }
    assert len(result.of("complete")) == 2 and "At equal time: 0.3 s" in (tmp_path / "report.md").read_text()
    assert not list(tmp_path.rglob("timing"))

    # With a machine that is slower than when steps were timed.
    with pytest.MonkeyPatch.context() as patch:
        for module in (study_module, tune_module):
            patch.setattr(module, "TOLERANCE", -0.99)
        after = study_of(text, tmp_path, tuning | {"trials": 3}, resume=True).run(lambda line: None)
    unequal = after.of("not comparable")
    assert len(unequal) == 3 and after.best is None and not (tmp_path / "best.yaml").exists()
    assert "became slower than when they were timed" in unequal[-1].why and unequal[-1].loss is None
    assert "No trial is comparable" in (tmp_path / "report.md").read_text()


def test_the_time_of_the_given_settings_steps_is_each_trials(text, tmp_path):
    result = study_of(text, tmp_path, {"judge": "time", "trials": 1}, steps=6).run(lambda line: None)
    per_step = result.given.seconds_per_step
    assert result.given.steps == 6 and result.budget == pytest.approx(3 * sum(per_step.values()))


def test_seconds_too_few_for_the_given_switch_end_the_study_before_a_trial(text, tmp_path):
    study = study_of(text, tmp_path, {"judge": "time", "seconds": 0.3}, switch_step=1000, steps=1100)
    with pytest.raises(RunFailed, match=r"seconds=0.3: 0.3 s are .* and 0 dense; .*take more --seconds"):
        study.run(lambda line: None)
    assert not list((tmp_path / "trials").glob("0*"))
    study_of(text, tmp_path, {"judge": "time", "seconds": 30.0})  # other options may begin there
    assert not study.begun and not (tmp_path / "study.db").exists()


def test_a_batch_that_leaves_too_few_steps_is_not_trained(text, tmp_path):
    """Of 4 steps of a row, 2 of them with Lighthouse, two of two rows are left."""
    tuning = {"batch_up_to": 1.0, "fixed": ["pool_ratios", "select_topk", "learning_rate"], "sampler": "grid"}
    result = study_of(text, tmp_path, tuning, switch_step=2).run(lambda line: None)
    [unequal] = result.of("not comparable")
    assert "2,048 tokens are 2 steps, 2 with Lighthouse and 0 dense" in unequal.why and unequal.steps is None
    assert result.best.given


def test_trials_on_other_text_end_the_study(text, tmp_path):
    study = study_of(text, tmp_path)
    study.fixed["text"] = "another"
    with pytest.raises(RunFailed, match="The text is not the one that the study began with: it was 'another'"):
        study.run(lambda line: None)


def test_trials_on_text_that_looks_alike_end_the_study(tmp_path):
    text = write_long(write_text(tmp_path / "text"))
    said = []

    def say(line: str) -> None:
        said.append(line)
        if line.startswith("trial   0"):
            change_the_middle(text)

    with pytest.raises(RunFailed, match="The text is not the one that the study began with"):
        study_of(text, tmp_path / "study").run(say)
    assert [line[:9] for line in said if line.startswith("trial")] == ["trial   0"]


def test_equal_time_on_another_machine_is_another_study(text, tmp_path, monkeypatch):
    tuning = {"judge": "time", "seconds": 0.1}
    study = study_of(text, tmp_path, tuning)
    (tmp_path / "study.json").write_text(json.dumps(study.fixed | {"machine": "a faster one"}))
    with pytest.raises(ValueError, match="machine was 'a faster one', is "):
        study_of(text, tmp_path, tuning, resume=True)
    assert "machine" not in study_of(text, tmp_path / "other").fixed  # equal tokens are equal anywhere


def trial_of(number=0, state="complete", seconds=10.0, lighthouse=60, dense=40, acted=None, timed=0.1, **more) -> Trial:
    """100 steps of 100 tokens in ten seconds, each timed at a tenth of a second before."""
    acted = lighthouse if acted is None else acted
    steps = lighthouse + dense
    options = {"pool_ratios": ["1/4"], "select_topk": 8, "learning_rate": 1e-3, "per_device_train_batch_size": 1}
    fields = {
        "number": number,
        "state": state,
        "setting": f"setting {number}",
        "options": options,
        "parameters": {},
        "given": number == 0,
        "why": None,
        "loss": 3.0 - number / 10,
        "seconds": seconds,
        "steps": steps,
        "tokens": 100 * steps,
        "held_out": [HeldOut(steps, seconds, "dense", 3.0)],
        "seconds_per_step": {"lighthouse": timed, "dense": timed},
        "switch_step": lighthouse,
        "stages": {"lighthouse": {"steps": acted}, "dense": {"steps": steps - acted}},
    }
    return Trial(**fields | more)


JUDGED = [
    ("as_much_as_each_has", "time", {}, None),
    ("within_a_tenth", "time", {"seconds": 10.9}, None),
    ("more_time", "time", {"seconds": 27.0}, "it had 27.0 s where each has 10.0 (+170%; 10% are allowed)"),
    ("less_time", "time", {"seconds": 7.0}, "it had 7.0 s where each has 10.0 (-30%"),
    ("more_tokens", "tokens", {"lighthouse": 100}, "it had 14,000 tokens of 10,000 (+40%"),
    ("time_does_not_count_at_equal_tokens", "tokens", {"seconds": 27.0, "timed": 0.9}, None),
    (
        "three_steps",
        "time",
        {"lighthouse": 2, "dense": 1},
        "3 steps, 2 with Lighthouse and 1 dense; a trial needs",
    ),
    (
        "few_dense_steps",
        "time",
        {"lighthouse": 98, "dense": 2},
        "98 with Lighthouse and 2 dense; a trial needs",
    ),
    ("lighthouse_did_not_act", "time", {"acted": 0}, "Lighthouse acted in 0 of the 60 steps"),
    ("timed_on_a_busy_machine", "time", {"timed": 0.2}, "the machine was not as fast: a dense step"),
    ("of_an_earlier_version", "time", {"switch_step": None, "stages": {}}, None),
    ("pruned", "time", {"state": "pruned", "seconds": 3.0, "loss": None}, None),
]


@pytest.mark.parametrize("judge, changes, why", [j[1:] for j in JUDGED], ids=[j[0] for j in JUDGED])
def test_a_trial_that_did_not_have_what_each_has_cannot_win(judge, changes, why):
    trials = [trial_of(0), trial_of(1), trial_of(2), trial_of(3, **changes)]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(study_module, "LEAST_STEPS", 10)
        patch.setattr(study_module, "LEAST_DENSE", 3)
        patch.setattr(study_module, "TOLERANCE", 0.1)
        found = judged(trials, judge, 10.0 if judge == "time" else 10_000)
    result = StudyResult("study", judge, 10.0, "tpe", "a device", found, {}, [])
    assert [trial.state for trial in found[:3]] == ["complete"] * 3
    assert (found[3].state == "not comparable") == (why is not None)
    if why is not None:
        assert why in found[3].why and result.best.number == 2 and found[3] not in result.front
        text = page_of(result, Path("best.yaml")).markdown()
        assert "3 complete, 1 not comparable" in text and found[3].why[:60] in text.replace("\u00a0", " ")


def test_where_nothing_is_comparable_and_where_the_given_setting_is_not():
    trials = [trial_of(0, state="not comparable", why="it had 27.0 s where each has 10.0"), trial_of(1)]
    result = StudyResult("study", "time", 10.0, "tpe", "a device", trials, {}, [])
    assert "better than the given setting is not known: not comparable: it had 27.0 s" in of_the_given(result)
    assert of_the_given(result) in page_of(result, Path("best.yaml")).markdown()
    none = StudyResult("study", "time", 10.0, "tpe", "a device", trials[:1], {}, [])
    assert none.best is None and nothing_known(none) in page_of(none, None).markdown()
    assert "take --judge tokens" in nothing_known(none)


class DenseModel:
    """Says of each step that its forwards were dense."""

    def take_used(self):
        return SimpleNamespace(lighthouse=0, dense=1)


def test_the_clock_waits_for_the_device_where_a_trial_is_evaluated(monkeypatch):
    waited = []
    monkeypatch.setattr(torch.cuda, "synchronize", waited.append)
    judge = Judge(None, switch_step=2, steps=4, evaluations=1, status=lambda line: None, what="")
    args, state = SimpleNamespace(device=torch.device("cuda")), SimpleNamespace(stateful_callbacks={}, max_steps=4)
    state.global_step = 0
    judge.on_train_begin(args, state, None)
    for state.global_step in (3, 4):
        control = SimpleNamespace(should_log=False, should_evaluate=False, should_save=False)
        judge.on_step_end(args, state, control, model=DenseModel())
        assert len(waited) == control.should_evaluate == (state.global_step == 4)


# Processes


def _process(text: Path, folder: Path, tuning: dict, resume: bool, kill_in: int | None):
    with open(f"{folder}.{os.getpid()}.log", "a") as log:
        os.dup2(log.fileno(), 1), os.dup2(log.fileno(), 2)
    torch.set_num_threads(1)
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
    process = server.Process(target=_process, args=(text, folder, tuning, resume, kill_in))
    process.start()
    return process


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


def test_a_setting_that_always_ends_its_process_is_given_up(text, tmp_path, monkeypatch):
    monkeypatch.setattr(storage_module, "INTERRUPTIONS", 2)
    before = run_module.RunTrainer.training_step

    def step(trainer, *args, **kwargs):
        if trainer.options.pool_ratios == [1 / 4, 1 / 16]:
            raise KeyboardInterrupt
        return before(trainer, *args, **kwargs)

    for resume in (False, True):
        with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
            patch.setattr(run_module.RunTrainer, "training_step", step)
            study_of(text, tmp_path, GRID, resume=resume).run(lambda line: None)
    said = []
    result = study_of(text, tmp_path, GRID, resume=True).run(said.append)
    assert result.given is None and len(result.of("interrupted")) == 2 and len(result.of("complete")) == 2
    assert any("interrupted 2 times by now, its setting is not tried again" in line for line in said)


def test_a_trial_that_ends_while_it_is_looked_at_was_not_interrupted(text, tmp_path, monkeypatch):
    study = study_of(text, tmp_path, GRID)
    (tmp_path / "trials").mkdir()
    stored = study._open(StopOnSignal(), print, print)
    trial, before = stored.ask(), storage_module.take_lock

    def lock(path):
        stored.tell(trial, 1.0)
        return before(path)

    monkeypatch.setattr(storage_module, "take_lock", lock)
    study.files.sweep(stored, print)
    states = [found.state for found in stored.get_trials()]
    assert states == [optuna.trial.TrialState.COMPLETE] + 3 * [optuna.trial.TrialState.WAITING]


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


# The command line

SMALL = (
    "--model nano --context 512 --held_out 1 --steps 4 --share 0.5 --logging_steps 4 --select_topk 8 --use_cpu "
    "--judge tokens --evaluations 1 --trials 2 --pruner none --report_to none"
).split()


def test_the_command_and_its_going_on(text, tmp_path, capsys):
    folder = tmp_path / "study"
    assert main(["tune", *SMALL, "--data", str(text), "--output_dir", str(folder)]) == 0
    said = capsys.readouterr()
    assert "(given)" in said.out and "Best: trial" in said.out and f"Report: {folder}" in said.out
    assert "rate 2e-03" not in said.err and "{'loss'" not in said.out + said.err
    assert yaml.safe_load((folder / "study.yaml").read_text())["trials"] == 2
    assert main(["tune", "--config", str(folder / "study.yaml"), "--resume", "--trials", "3", "--json", "-"]) == 0
    numbers = json.loads(capsys.readouterr().out)
    assert sum(trial["state"] == "complete" for trial in numbers["trials"]) == 3


INTERRUPTED = [("ctrl_c", KeyboardInterrupt(), 130), ("sigterm", Stopped("Stopped by a signal."), 143)]


@pytest.mark.parametrize("error, code", [i[1:] for i in INTERRUPTED], ids=[i[0] for i in INTERRUPTED])
def test_an_interruption_says_how_to_go_on(text, tmp_path, capsys, monkeypatch, error, code):
    def step(trainer, *args, **kwargs):
        raise error

    monkeypatch.setattr(run_module.RunTrainer, "training_step", step)
    assert main(["tune", *SMALL, "--data", str(text), "--output_dir", str(tmp_path / "study")]) == code
    assert f"`lighthouse tune --config {tmp_path / 'study' / 'study.yaml'} --resume` goes on" in capsys.readouterr().err


def test_a_signal_in_the_last_step_of_a_trial_ends_the_study_behind_it(text, tmp_path, monkeypatch):
    before = run_module.RunTrainer.training_step

    def step(trainer, *args, **kwargs):
        if trainer.state.global_step + 1 == trainer.state.max_steps:
            os.kill(os.getpid(), signal.SIGTERM)
        return before(trainer, *args, **kwargs)

    with monkeypatch.context() as patch, pytest.raises(Stopped):
        patch.setattr(run_module.RunTrainer, "training_step", step)
        study_of(text, tmp_path, GRID).run(lambda line: None)
    result = study_of(text, tmp_path, GRID | {"trials": 1}, resume=True).run(lambda line: None)
    assert [trial.state for trial in result.trials if trial.state != "waiting"] == ["complete"]


def test_a_signal_in_the_last_step_that_is_timed_ends_the_study(text, tmp_path, monkeypatch):
    before = run_module.RunTrainer.training_step

    def step(trainer, *args, **kwargs):
        if trainer.folder.name == "given" and trainer.state.global_step + 1 == trainer.state.max_steps:
            os.kill(os.getpid(), signal.SIGTERM)
        return before(trainer, *args, **kwargs)

    monkeypatch.setattr(run_module.RunTrainer, "training_step", step)
    with pytest.raises(Stopped):
        study_of(text, tmp_path, GRID | {"judge": "time"}).run(lambda line: None)
    assert (tmp_path / "study.db").exists() and not list((tmp_path / "trials").glob("0*"))


WRONG = [
    ("sampler", ["--sampler", "cma"], "invalid choice: 'cma'"),
    ("trials", ["--trials", "0"], "trials=0: at least one is needed"),
    ("topk", ["--topk", "many"], "topk=many: a number such as 512, 0.25 or 1/64"),
    ("share", ["--share", "2"], "share=2.0"),
    ("no_study", ["--resume"], "holds no study to resume"),
    ("json", ["--json", "nowhere/x.json"], "json='nowhere/x.json': its folder does not exist"),
    ("no_config", ["--config", "no.yaml"], "config='no.yaml' does not exist"),
]


@pytest.mark.parametrize("arguments, message", [w[1:] for w in WRONG], ids=[w[0] for w in WRONG])
def test_a_wrong_option_is_an_error_of_one_line(tmp_path, monkeypatch, capsys, text, arguments, message):
    monkeypatch.chdir(tmp_path)
    try:
        ended = main(["tune", *SMALL, "--data", str(text), *arguments])
    except SystemExit as stop:
        ended = stop.code
    said = capsys.readouterr().err
    assert ended == 2 and message in said and "Traceback" not in said
    assert not list(tmp_path.iterdir())


def test_help_has_the_options_and_examples(capsys):
    with pytest.raises(SystemExit) as stop:
        main(["tune", "--help"])
    said = capsys.readouterr().out
    assert stop.value.code == 0 and "--fsdp" not in said
    for part in ("tuning:", "--sampler", "--judge", "--level_ratio", "examples:", "study.yaml --resume"):
        assert part in said


def test_without_the_extra_it_names_what_to_install(monkeypatch, capsys):
    whole = PathFinder.find_spec
    for name in ("lighthouse.cli.tune", "lighthouse.studies.tune", "optuna"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    monkeypatch.setattr(PathFinder, "find_spec", lambda name, *rest: None if name == "optuna" else whole(name, *rest))
    monkeypatch.setattr(sys, "meta_path", [PathFinder])
    assert main(["tune"]) == 1
    said = capsys.readouterr().err
    assert "tuning needs optuna" in said and 'pip install "lighthouse-attn[tune]"' in said
