"""Whole studies: what is tried and what is skipped, what is left in the folder, going on, and the command."""

from __future__ import annotations

import json
import sqlite3
import sys
from importlib.machinery import PathFinder

import optuna
import pytest
import yaml

from lighthouse.cli import main
from lighthouse.cli.pretrain import parse_run, run_parser
from lighthouse.core.method import Method
from lighthouse.training import run as run_module
from lighthouse.training.callbacks import Record
from lighthouse.training.result import Stopped
from training_runs import write_text
from tune_studies import CONTEXT, GRID, many_small_trials, quiet, study_of

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module", autouse=True)
def few_steps():
    with many_small_trials():
        yield


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
    assert any("parents per level were asked for" in trial.why for trial in skipped)
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
    assert Method.of(found["settings"]) == Method.of(result.best.options)


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


def test_a_study_on_other_text_is_an_error_before_any_work(by_tpe, tmp_path):
    other = write_text(tmp_path, seed=1)
    with pytest.raises(ValueError, match="the text, its order, its tokenizer or how it is split into rows has changed"):
        study_of(other, by_tpe[0].folder, {"evaluations": 2, "topk": ["4", "64"]}, resume=True)


def test_a_folder_with_a_study_and_one_without(by_tpe, text, tmp_path):
    with pytest.raises(FileExistsError, match="holds a study already"):
        study_of(text, by_tpe[0].folder)
    with pytest.raises(FileNotFoundError, match="holds no study to resume"):
        study_of(text, tmp_path, resume=True)


def test_a_grid_is_trained_to_its_end(monkeypatch, text, tmp_path):
    """Also where one of its settings fails: the loss of (1/16) is not finite."""
    study = study_of(text, tmp_path / "study", GRID)
    fails = [setting.method.windows for setting in study._first()].index((1, 16))
    before = Record.on_evaluate

    def evaluated(self, args, state, control, metrics=None, **kwargs):
        if args.output_dir.endswith(f"{fails:04}"):
            metrics["eval_loss"] = float("nan")
        before(self, args, state, control, metrics=metrics, **kwargs)

    monkeypatch.setattr(Record, "on_evaluate", evaluated)
    result = study.run(quiet)
    tried = {tuple(trial.options["pool_ratios"]): trial.state for trial in result.trials}
    assert tried == {
        ("1/4", "1/16"): "complete",
        ("1/4",): "complete",
        ("1/16",): "failed",
        ("1/16", "1/256"): "skipped",
    }
    assert "loss is nan" in result.trials[fails].why


def test_windows_with_and_without_a_pyramid_are_trained(text, tmp_path):
    tuning = GRID | {"fixed": ["pool_ratios", "share", "learning_rate", "batch"], "levels": None, "level_ratio": None}
    study = study_of(text, tmp_path, tuning | {"topk": ["0", "8"], "local_windows": [0, 16]})
    result = study.run(quiet)
    tried = {
        (trial.options["local_window"], trial.options["select_topk"], trial.options["dense_layers"]): trial
        for trial in result.of("complete")
    }
    assert tried.keys() == {(16, 8, 0), (0, 8, 1), (16, 0, 0)} and tried[16, 8, 0] is result.given
    assert len({trial.loss for trial in tried.values()}) == 3
    assert tried[16, 0, 0].setting == "window alone  local_window 16  share 0.5  rate 0.002  batch 1"
    report = (tmp_path / "report.md").read_text()
    assert "| trial | loss | select_topk | local_window | dense_layers | time | steps | state |" in report
    assert "The same in all trials: pool_ratios 1/4 1/16, cover_start True, share 0.5, learning_rate 0.002" in report
    best = yaml.safe_load((tmp_path / "best.yaml").read_text())
    assert {name: best[name] for name in ("local_window", "select_topk", "dense_layers", "share")} == {
        name: result.best.options[name] for name in ("local_window", "select_topk", "dense_layers", "share")
    }


def test_shares_are_those_of_their_trials(text, tmp_path):
    fixed = ["pool_ratios", "select_topk", "local_window", "learning_rate", "batch"]
    tuning = {"sampler": "grid", "trials": None, "fixed": fixed, "shares": [0.25, 0.5]}
    result = study_of(text, tmp_path, tuning, steps=8).run(quiet)
    used = {trial.options["share"]: trial.stages for trial in result.of("complete")}
    assert {share: stages["lighthouse"]["steps"] for share, stages in used.items()} == {0.25: 2, 0.5: 4}
    assert {share: stages["dense"]["steps"] for share, stages in used.items()} == {0.25: 6, 0.5: 4}


def test_a_study_of_a_version_without_windows_and_shares_goes_on(text, tmp_path):
    """Its trials are read with what they had, and it searches nothing new."""
    run, then = {"local_window": "0"}, {"fixed": ["local_window", "share"], "trials": 2}
    study_of(text, tmp_path, then, **run).run(quiet)
    earlier = json.loads((tmp_path / "study.json").read_text())
    earlier = {
        name: value for name, value in earlier.items() if name not in ("local_window", "local_windows", "shares")
    }
    (tmp_path / "study.json").write_text(json.dumps(earlier | {"fixed": []}))
    with sqlite3.connect(tmp_path / "study.db") as database:
        rows = database.execute(
            "select trial_id, value_json from trial_user_attributes where key = 'options'"
        ).fetchall()
        for trial, written in rows:
            options = json.loads(written)
            for name in ("local_window", "share", "dense_layers"):
                del options[name]
            database.execute(
                "update trial_user_attributes set value_json = ? where key = 'options' and trial_id = ?",
                (json.dumps(options), trial),
            )
    with pytest.raises(ValueError, match="local_window was 0, is 16"):
        study_of(text, tmp_path, {"trials": 3}, resume=True)
    study = study_of(text, tmp_path, {"trials": 3}, resume=True, **run)
    result = study.run(quiet)
    assert len(result.of("complete")) == 3 and not {"local_window", "share"} & set(study.space.searched)
    for trial in result.of("complete"):
        assert (trial.texts["local_window"], trial.texts["share"], trial.texts["dense_layers"]) == ("0", "0.5", "1")
    assert "local_window 0, dense_layers 1, share 0.5" in (tmp_path / "report.md").read_text()


# The command line

SMALL = (
    "--model nano --context 512 --held_out 1 --steps 4 --share 0.5 --logging_steps 4 --select_topk 8 --use_cpu "
    "--judge tokens --evaluations 1 --trials 1 --pruner none --report_to none"
).split()


def test_the_command_and_its_going_on(text, tmp_path, capsys):
    folder = tmp_path / "study"
    assert main(["tune", *SMALL, "--data", str(text), "--output_dir", str(folder)]) == 0
    said = capsys.readouterr()
    assert "(given)" in said.out and "Best: trial" in said.out and f"Report: {folder}" in said.out
    assert "rate 2e-03" not in said.err and "{'loss'" not in said.out + said.err
    assert yaml.safe_load((folder / "study.yaml").read_text())["trials"] == 1
    assert main(["tune", "--config", str(folder / "study.yaml"), "--resume", "--trials", "2", "--json", "-"]) == 0
    numbers = json.loads(capsys.readouterr().out)
    assert sum(trial["state"] == "complete" for trial in numbers["trials"]) == 2


INTERRUPTED = [("ctrl_c", KeyboardInterrupt(), 130), ("sigterm", Stopped("Stopped by a signal."), 143)]


@pytest.mark.parametrize("error, code", [i[1:] for i in INTERRUPTED], ids=[i[0] for i in INTERRUPTED])
def test_an_interruption_says_how_to_go_on(text, tmp_path, capsys, monkeypatch, error, code):
    def step(trainer, *args, **kwargs):
        raise error

    monkeypatch.setattr(run_module.RunTrainer, "training_step", step)
    assert main(["tune", *SMALL, "--data", str(text), "--output_dir", str(tmp_path / "study")]) == code
    command = f"lighthouse tune --config {tmp_path / 'study' / 'study.yaml'} --resume"
    assert f"ontinue with `{command}`" in capsys.readouterr().err


WRONG = [
    ("sampler", ["--sampler", "cma"], "there is no 'cma'"),
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
