"""`lighthouse compare` and its functions: three arms of two seeds, gone on with, failed, refused."""

from __future__ import annotations

import gc
import json
import os
import re
import shutil
import signal
import subprocess
import sys
from dataclasses import replace
from functools import partial

import pytest
from transformers import AutoModelForCausalLM

from lighthouse.cli import main
from lighthouse.export import plain_process
from lighthouse.export.export import ExportFailed
from lighthouse.export.plain import inference
from lighthouse.report import standings
from lighthouse.report.checklist import checklist, passing, recovery
from lighthouse.report.compared import ARMS as ARMS_THERE_ARE
from lighthouse.studies.arms import options_of
from lighthouse.studies.compare import compare, compare_defaults, prepare_comparison
from lighthouse.training import PretrainOptions, PretrainResult, Run, checkpoints
from lighthouse.training import run as run_module
from lighthouse.training.result import Stopped
from training_runs import CHECKPOINTING, options, training, write_text

pytestmark = pytest.mark.usefixtures("one_thread")

compare_module = sys.modules["lighthouse.studies.compare"]

SEEDS = [0, 1]
ARMS = ["dense", "window", "lighthouse"]  # by default
EVERY = {"save_strategy": "steps", "save_steps": 2, "save_total_limit": 1, "eval_on_start": True}


@pytest.fixture(scope="module", autouse=True)
def quick():
    """Of the two plain processes the one that times is a real one, for a few rounds; test_export.py has the other."""
    gc.freeze()  # the Trainer collects garbage
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(compare_module, "inference", partial(inference, rounds=2))
        patch.setattr(
            "lighthouse.export.export.in_plain_process", lambda task, request, **how: plain_process.TASKS[task](request)
        )
        yield
    gc.unfreeze()


@pytest.fixture(scope="module")
def done(tmp_path_factory, text, quick):
    """A whole comparison of two seeds: (its folder, what was found)."""
    folder, found = tmp_path_factory.mktemp("compare") / "both", []
    before = run_module.data.find_corpus
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(run_module.data, "find_corpus", lambda *args, **how: found.append(1) or before(*args, **how))
        comparison = compare(options(text), training(folder, **EVERY), seeds=SEEDS)
    assert len(found) == len(SEEDS)  # the text of a seed is found once
    return folder, comparison


@pytest.fixture
def again(done, tmp_path, monkeypatch):
    """A copy of its folder that may be damaged. What comes behind the runs is not done twice."""
    monkeypatch.setattr(compare_module, "strip", lambda *args: done[1].stripped)
    return shutil.copytree(done[0], tmp_path / "again")


def command(text, folder, *more) -> list[str]:
    """The same as arguments."""
    small = "--model nano --context 128 --held_out 2 --steps 5 --eval_steps 2 --logging_steps 1 --report_to none"
    rest = "--pool_ratios 1/2 1/4 --select_topk 4 --local_window 16 --dense_layers 0 --share 0.6 --max_grad_norm 1.0"
    every = (
        "--use_cpu --disable_tqdm true --save_strategy steps --save_steps 2 --save_total_limit 1 --eval_on_start true"
    )
    return ["compare", *f"{small} {rest} {every}".split(), "--data", str(text), "--output_dir", str(folder), *more]


# What is found and written


def test_the_folder(done):
    folder, found = done
    assert {path.name for path in folder.iterdir()} == {
        *("seed-0", "seed-1", "model", "results.json", "report.html", "report.md"),
        *("loss-time.png", "loss-steps.png", "loss-position.png"),
    }
    numbers = json.loads((folder / "results.json").read_text())
    assert [seed["seed"] for seed in numbers["seeds"]] == SEEDS
    assert [run["name"] for seed in numbers["seeds"] for run in seed["runs"]] == ARMS * 2 == numbers["arms"] * 2
    assert [pair["arm"] for seed in numbers["seeds"] for pair in seed["pairs"]] == ARMS[1:] * 2
    assert numbers["shipped"] == "lighthouse" and numbers["standings"]["said"] == standings.said(found)
    assert [check["what"].split(" on ")[0] for check in numbers["checklist"]] == [
        "Wrapper integrated",
        "Speed-up verified",
        "Final held-out loss matches or improves the baseline",
        "Stripped and inference benchmarked",
        "Model card updated",
    ]
    for seed in found.seeds:
        for arm, run in seed.runs.items():
            stored = PretrainResult.load(folder / f"seed-{seed.seed}" / arm / "results.json")
            assert replace(stored, name=arm) == run and stored.settings["seed"] == seed.seed


def test_all_runs_of_a_seed_begin_alike_and_only_those(done):
    first = [[run.held_out[0] for run in seed.runs.values()] for seed in done[1].seeds]
    assert all(point.step == 0 for seed in first for point in seed)
    losses = [{point.loss for point in seed} for seed in first]
    assert len(losses[0]) == len(losses[1]) == 1 and losses[0] != losses[1]
    assert len({run.loss for run in done[1].seeds[0].runs.values()}) == len(ARMS)  # and end otherwise


def test_what_differs_between_arms_is_attention_alone(done):
    settings = {arm: run.settings for arm, run in done[1].seeds[0].runs.items()}
    assert settings["window"]["select_topk"] == 0 and settings["window"]["local_window"] == 16
    assert settings["lighthouse"]["select_topk"] == 4 and settings["lighthouse"]["local_window"] == 16
    assert settings["dense"]["dense_only"] and settings["dense"]["lighthouse_steps"] == 0
    assert settings["window"]["lighthouse_steps"] == settings["lighthouse"]["lighthouse_steps"] == 3
    assert not [pair.differences for seed in done[1].seeds for pair in seed.pairs.values() if pair.differences]


def test_each_model_is_evaluated_with_the_loss_of_its_run(done):
    for seed in done[1].seeds:
        assert list(seed.evaluations) == ARMS
        for arm, found in seed.evaluations.items():
            assert found.loss.loss == pytest.approx(seed.runs[arm].loss, rel=1e-5)
            assert found.loss.stretches[-1].stop == 128 and found.copy is None  # of so short a context
    numbers = json.loads((done[0] / "results.json").read_text())["seeds"][1]["evaluations"]["window"]
    assert numbers == done[1].seeds[1].evaluations["window"].to_json()


def test_the_stripped_model_is_plain(done):
    folder, found = done
    inference = found.stripped.inference
    assert inference.same_outputs and not inference.imported and set(inference.modules) == {"torch", "transformers"}
    assert (inference.exported.prompt, inference.new_tokens) == (96, 32) and inference.rounds == 2
    for speed in (inference.exported, inference.plain):
        assert speed.prefill_tokens_per_second > 0 and speed.decode_tokens_per_second > 0
    best = min(found.pairs, key=lambda pair: pair.other.loss)
    assert found.stripped.seed == best.seed and found.stripped.failure is None
    model, source = (
        AutoModelForCausalLM.from_pretrained(place)
        for place in (folder / "model", folder / f"seed-{best.seed}" / "lighthouse" / "model")
    )
    for weight, expected in zip(model.parameters(), source.parameters(), strict=True):
        assert weight.equal(expected)
    for path in (folder / "model").iterdir():
        assert ("lighthouse" in path.read_bytes().decode("latin-1").lower()) == (path.name == "README.md"), path


def test_the_page_says_what_was_found(done):
    folder, found = done
    text, markdown = (folder / "report.html").read_text(), (folder / "report.md").read_text()
    assert not re.search(r'(src|href)="(?!data:)', text) and text.count("data:image/png") == 3
    for pair in (pair for seed in found.seeds for pair in seed.pairs.values()):
        for part in (passing(pair), recovery(pair), *(f"{run.loss:.4f}" for run in pair.runs)):
            assert part in markdown, part
    for line in standings.said(found):
        assert line in markdown, line
    for check in checklist(found):
        assert f"- [{'x' if check.passed else ' '}] **{check.what}" in markdown and check.evidence in markdown
    assert "2 of the lighthouse run" in checklist(found)[1].evidence  # dense steps, which are too few to tell of time
    assert "on 48 entries in place of 128 tokens and a local window of 16" in checklist(found)[0].evidence
    assert "a local window of 16 in place of 128 tokens in 4 of 4 layers" in markdown
    assert all(f"<code>{arm}</code>" in text for arm in ARMS) and found.device in text


def test_peak_memory_of_each_stage(done):
    for run in (run for seed in done[1].seeds for run in seed.runs.values()):
        for stage in run.stages.values():
            assert stage.peak_memory is None or 2**20 < stage.peak_memory < 2**40


def test_an_export_that_fails_is_a_failed_check(done, tmp_path, monkeypatch, text):
    def fail(*args, **kwargs):
        raise ExportFailed("the exported model's logits differ from the source's by up to 0.25")

    folder = shutil.copytree(done[0], tmp_path / "again")
    monkeypatch.setattr(compare_module, "export", fail)
    found = compare(options(text), training(folder, **EVERY, resume=True), seeds=SEEDS)
    stripped = checklist(found)[3]
    assert not stripped.passed and "Not exported: the exported model's logits differ" in stripped.evidence
    assert "by up to 0.25" in (folder / "report.html").read_text()


def test_a_model_that_cannot_be_evaluated_is_said_so_and_the_rest_is_done(again, done, text, monkeypatch):
    def fail(*args, **kwargs):
        raise ValueError("the model's losses are not finite in torch.float32: it needs another dtype")

    for path in again.glob("*/window/evaluation.json"):
        path.unlink()
    monkeypatch.setattr("lighthouse.studies.evaluated.evaluate", fail)
    found = compare(options(text), training(again, **EVERY, resume=True), seeds=SEEDS)
    said = "Seed 1, window: not evaluated, the model's losses are not finite in torch.float32: it needs another dtype."
    assert said in found.not_evaluated and said in (again / "report.md").read_text()
    assert [list(seed.evaluations) for seed in found.seeds] == [["dense", "lighthouse"]] * 2
    assert found.seeds[0].evaluations["dense"] == done[1].seeds[0].evaluations["dense"]  # which were read


# Going on


def to_train(plan) -> list[bool]:
    return [isinstance(planned.run, Run) for planned in plan.runs]


def test_between_runs(again, done, text):
    shutil.rmtree(again / "seed-1" / "lighthouse")
    plan = prepare_comparison(options(text), training(again, **EVERY, resume=True), seeds=SEEDS)
    assert to_train(plan) == [False] * 5 + [True]
    said = []
    found = plan.run(said.append)
    assert [line for line in said if "already finished" in line] == said[:5] and "seed 1, lighthouse" in said[5]
    for one, two in zip(found.seeds, done[1].seeds, strict=True):
        assert [one.runs[arm] for arm in ARMS[:2]] == [two.runs[arm] for arm in ARMS[:2]]
        its, before = (seed.runs["lighthouse"].held_out for seed in (one, two))
        assert [(p.step, p.loss) for p in its] == [(p.step, p.loss) for p in before]
        assert one.evaluations == two.evaluations


def test_what_was_evaluated_is_read_and_what_was_evaluated_otherwise_is_not(again, done, text, monkeypatch):
    evaluated, measured = sys.modules["lighthouse.studies.evaluated"], []
    whole = evaluated.evaluate
    monkeypatch.setattr(evaluated, "evaluate", lambda *args, **how: measured.append(1) or whole(*args, **how))
    other = again / "seed-1" / "window" / "evaluation.json"
    other.write_text(other.read_text().replace('"passages": 16', '"passages": 15'))
    said = []
    found = compare(options(text), training(again, **EVERY, resume=True), seeds=SEEDS, say=said.append)
    assert [line for line in said if line.startswith("Evaluating")] == [
        "Evaluating seed 1, window: loss by position, copies by distance ..."
    ]
    assert len(measured) == 1 and [s.evaluations for s in found.seeds] == [s.evaluations for s in done[1].seeds]
    assert '"passages": 16' in other.read_text()


def test_within_a_run_by_the_command(done, tmp_path, monkeypatch, capsys, text):
    monkeypatch.setattr(compare_module, "strip", lambda *args: done[1].stripped)
    before, calls = run_module.RunTrainer.training_step, []

    def interrupted(trainer, *args, **kwargs):
        calls.append(1)
        if len(calls) == 9:  # the fourth step of the second run
            raise KeyboardInterrupt
        return before(trainer, *args, **kwargs)

    monkeypatch.setattr(run_module.RunTrainer, "training_step", interrupted)
    folder = tmp_path / "run"
    assert main(command(text, folder, "--seed", "0")) == 130
    said = capsys.readouterr()
    assert f"comparison in {folder} is not finished. The same command with --resume" in said.err
    assert "Traceback" not in said.err and "Run 2 of 3: seed 0, window" in said.out
    assert checkpoints.last_whole(folder / "seed-0" / "window").name == "checkpoint-2"
    assert main(command(text, folder, "--seed", "0", "--resume", "--json", "-")) == 0
    numbers = json.loads(capsys.readouterr().out)
    assert numbers == json.loads((folder / "results.json").read_text()) and len(calls) == 9 + 3 + 5
    for stored, run in zip(numbers["seeds"][0]["runs"], done[1].seeds[0].runs.values(), strict=True):
        assert [p["loss"] for p in stored["held_out"]] == [p.loss for p in run.held_out]


def test_a_signal_in_the_last_step_of_a_run_ends_it_before_the_next(tmp_path, text, monkeypatch):
    before = run_module.RunTrainer.training_step

    def stopped(trainer, *args, **kwargs):
        if trainer.state.global_step == 4:
            os.kill(os.getpid(), signal.SIGTERM)
        return before(trainer, *args, **kwargs)

    monkeypatch.setattr(run_module.RunTrainer, "training_step", stopped)
    with pytest.raises(Stopped, match="after run 1 of 3: seed 42, dense"):
        compare(options(text), training(tmp_path / "run"))
    assert (tmp_path / "run" / "seed-42" / "dense" / "results.json").is_file()
    assert not (tmp_path / "run" / "seed-42" / "window").exists()


def test_of_several_processes_the_first_alone_reports_also_where_all_runs_are_finished(done, text, monkeypatch):
    monkeypatch.setattr(run_module.TrainingOptions, "process_index", 1)
    before = {path: path.stat().st_mtime_ns for path in done[0].rglob("*")}
    plan = prepare_comparison(options(text), training(done[0], **EVERY, resume=True), seeds=SEEDS)
    assert plan.run() is None
    assert {path: path.stat().st_mtime_ns for path in done[0].rglob("*")} == before


def test_a_run_that_was_killed_while_its_folder_was_marked_begins_again(tmp_path, text):
    begun = tmp_path / "run" / "seed-42" / "dense"
    begun.mkdir(parents=True)
    (begun / "run.json.partial").write_text("{")
    plan = prepare_comparison(options(text), training(tmp_path / "run", resume=True))
    assert to_train(plan) == [True] * 3


def test_more_seeds_go_on_with_those_there(again, text):
    shutil.rmtree(again / "seed-1")
    plan = prepare_comparison(options(text), training(again, **EVERY, resume=True), seeds=[0, 7])
    assert to_train(plan) == [False] * 3 + [True] * 3
    assert not (again / "seed-7").exists()


def test_an_arm_more_goes_on_with_those_there_and_two_are_enough(again, text):
    """A report of two arms; the best of the other arms is shipped where there is no lighthouse."""
    more = prepare_comparison(
        options(text), training(again, **EVERY, resume=True), arms=["lighthouse", "published", "dense"], seeds=SEEDS
    )
    assert [planned.arm for planned in more.runs] == ["dense", "published", "lighthouse"] * 2
    assert to_train(more) == [False, True, False] * 2
    published = more.runs[1].run.settings()
    assert (published["local_window"], published["dense_layers"], published["select_topk"]) == (0, 1, 4)
    found = compare(options(text), training(again, **EVERY, resume=True), arms=["dense", "window"], seeds=SEEDS)
    assert (found.arms, found.shipped) == (["dense", "window"], "window")
    assert "on a local window of 16 in place of 128 tokens" in checklist(found)[0].evidence
    assert "lighthouse run" not in (again / "report.md").read_text()


@pytest.mark.parametrize("resume", [False, True])
def test_a_comparison_of_an_earlier_version_is_refused(again, text, resume):
    """It had two arms, of which the second was called two-stage."""
    (again / "seed-1" / "lighthouse").rename(again / "seed-1" / "two-stage")
    before = sorted(again.rglob("*"))
    message = (
        "of an earlier version, with seed-1/two-stage, which is not an arm: use another" if resume else "already: use"
    )
    with pytest.raises(FileExistsError, match=message):
        prepare_comparison(options(text), training(again, **EVERY, resume=resume), seeds=SEEDS)
    assert sorted(again.rglob("*")) == before


def test_the_default_folder(tmp_path):
    base = tmp_path / "runs"
    for taken, free, latest in (((), "runs", "runs"), (("runs",), "runs-2", "runs"), (("runs-2",), "runs-3", "runs-2")):
        for name in taken:
            (tmp_path / name).mkdir()
        assert compare_defaults(base)["output_dir"] == str(tmp_path / free)
        assert compare_defaults(base, resume=True)["output_dir"] == str(tmp_path / latest)


def test_what_the_arms_of_the_small_case_are():
    """The recommended settings, with one dense layer at each end in the arms that have a pyramid."""
    small = {
        name: value for name, value in compare_defaults("x").items() if name in ("model", "context", "dense_layers")
    }
    arms = options_of(PretrainOptions(**small), ARMS_THERE_ARE)
    assert {arm: (its.select_topk, its.local_window, its.dense_layers) for arm, its in arms.items()} == {
        "dense": (1 / 64, 256, 1),
        "window": (0, 256, 0),
        "published": (1 / 64, 0, 1),
        "lighthouse": (1 / 64, 256, 1),
    }
    assert [arm for arm, its in arms.items() if its.dense_only] == ["dense"]


# What is refused, before any work

REFUSED = [
    ("dense_only", {"dense_only": True}, {}, "a comparison needs steps with Lighthouse"),
    ("lighthouse_only", {"lighthouse_only": True}, {}, "a comparison needs dense steps"),
    ("no_dense_steps", {"share": 1.0}, {}, "5 of 5 steps would use Lighthouse"),
    ("no_step_with_it", {"share": 0.01}, {}, "0 of 5 steps would use Lighthouse"),
    ("no_evaluation", {}, {"eval_strategy": "no"}, "eval_strategy='no'"),
    ("the_same_seed_twice", {}, {"seeds": [3, 3]}, "seeds=[3, 3]: one seed or several different ones"),
    ("no_seed", {}, {"seeds": [-1]}, "seeds=[-1]: -1 is not a seed"),
    ("nothing_to_resume", {}, {"resume": True}, "holds no comparison to resume"),
    ("a_checkpoint", {}, {"resume_from_checkpoint": "x"}, "a comparison has several runs"),
    ("a_text_shorter_than_a_context", {"context": 8192}, {}, "holds 181 tokens, but 16,384 are needed"),
    ("a_missing_text", {"data": "/no/such/folder"}, {}, "'/no/such/folder' does not exist"),
    (
        "an_unknown_arm",
        {},
        {"arms": ["dense", "windows"]},
        "arms='windows': one of dense, window, published, lighthouse",
    ),
    ("an_arm_like_another", {}, {"arms": ["dense", "windows"]}, "is needed; nearest: window"),
    ("no_such_arm", {}, {"arms": ["dense", "xyz"]}, "lighthouse is needed"),
    ("an_arm_twice", {}, {"arms": ["dense", "window", "window"]}, "arms='dense window window': each arm can be"),
    ("no_baseline", {}, {"arms": ["window", "lighthouse"]}, "arms='window lighthouse': dense, the baseline, and at"),
    ("one_arm", {}, {"arms": ["dense"]}, "arms='dense': dense, the baseline, and at least one other of window"),
    ("no_window", {"local_window": 0}, {}, "the arm window of the comparison: local_window=0 leaves it nothing"),
    (
        "no_pyramid",
        {"select_topk": 0},
        {"arms": ["dense", "published"]},
        "the arm published of the comparison: select_topk=0 leaves it nothing",
    ),
    ("two_arms_alike", {"select_topk": 0}, {}, "with select_topk=0, local_window=16 lighthouse is the same as window"),
    ("a_window_over_all", {"local_window": 128}, {}, "the arm window of the comparison: context=128: local_window=128"),
]


@pytest.mark.parametrize("change, how, message", [r[1:] for r in REFUSED], ids=[r[0] for r in REFUSED])
def test_what_cannot_be_compared_is_refused(tmp_path, text, change, how, message):
    short = write_text(tmp_path / "short", files=2, words=20) if "context" in change else text
    folder, own = tmp_path / "run", {name: how[name] for name in ("seeds", "arms") if name in how}
    how = {name: value for name, value in how.items() if name not in own}
    with pytest.raises((ValueError, OSError)) as refused:
        prepare_comparison(options(short, **change), training(folder, **how), **own)
    assert message in str(refused.value) and not folder.exists()


@pytest.mark.parametrize("given, steps", [({"switch_step": 2}, 2), ({"switch_tokens": 128 * 4}, 4)], ids=str)
def test_a_switch_by_step_or_tokens_is_of_the_arms_that_switch(tmp_path, text, given, steps):
    plan = prepare_comparison(options(text, **given), training(tmp_path / "run"))
    assert [planned.run.switch_step for planned in plan.runs] == [0, steps, steps]


@pytest.mark.parametrize("resume", [False, True])
def test_a_run_in_the_folder_is_not_written_over(done, text, resume):
    folder = done[0] / "seed-0" / "lighthouse"
    before = sorted(folder.rglob("*"))
    with pytest.raises(FileExistsError, match="holds something else, a run or its results: use another folder"):
        prepare_comparison(options(text), training(folder, **EVERY, resume=resume))
    assert sorted(folder.rglob("*")) == before


OTHER = [
    ("steps", {}, {"max_steps": 6}, "max_steps was 5, is 6"),
    ("schedule", {}, {"learning_rate": 0.5}, "learning_rate was 0.002, is 0.5"),
    ("evaluations", {}, {"eval_steps": 1}, "eval_steps was 2, is 1"),
    ("what_a_step_takes", {}, {CHECKPOINTING: True}, f"{CHECKPOINTING} was False, is True"),
    ("settings", {"select_topk": "8", "share": 0.4}, {}, "select_topk was 4, is 8; share was 0.6, is 0.4"),
]


@pytest.mark.parametrize("change, how, message", [o[1:] for o in OTHER], ids=[o[0] for o in OTHER])
def test_another_comparison_in_the_folder_is_refused_with_the_differences(done, text, change, how, message):
    folder = done[0]
    before = sorted(folder.rglob("*"))
    with pytest.raises(ValueError, match=f"seed-0/dense belongs to another comparison: .*{re.escape(message)}"):
        prepare_comparison(options(text, **change), training(folder, **{**EVERY, **how, "resume": True}), seeds=SEEDS)
    with pytest.raises(FileExistsError, match="holds a comparison already: .*--resume"):
        prepare_comparison(options(text, **change), training(folder, **how), seeds=[9])
    assert sorted(folder.rglob("*")) == before


WRONG = [
    ("unknown_option", ["--nonsense", "1"], "--nonsense"),
    ("seeds", ["--seeds", "one"], "'one' is not a whole number"),
    ("steps", ["--steps", "0"], "max_steps=0"),
    ("json", ["--json", "nowhere/x.json"], "json='nowhere/x.json': its folder does not exist"),
    ("no_config", ["--config", "no.yaml"], "config='no.yaml' does not exist"),
    ("dense_only", ["--dense_only"], "a comparison needs steps with Lighthouse"),
    ("an_arm", ["--arms", "dense", "lighthose"], "arms='lighthose': one of dense, window, published, lighthouse"),
]


@pytest.mark.parametrize("arguments, message", [w[1:] for w in WRONG], ids=[w[0] for w in WRONG])
def test_a_wrong_option_is_an_error_of_one_line(tmp_path, monkeypatch, capsys, arguments, message):
    monkeypatch.chdir(tmp_path)
    try:
        status = main(["compare", *arguments])
    except SystemExit as stop:
        status = stop.code
    said = capsys.readouterr().err
    assert status == 2 and message in said and "Traceback" not in said
    assert not list(tmp_path.iterdir())


def test_the_help_has_examples_and_the_options_of_a_run(capsys):
    with pytest.raises(SystemExit) as stop:
        main(["compare", "--help"])
    text = capsys.readouterr().out
    assert stop.value.code == 0
    for part in (
        "examples:",
        "--arms ARM",
        "(default: dense window lighthouse)",
        "--seeds",
        "--json",
        "--resume",
        "--share",
        "--max_steps, --steps",
        "--config",
    ):
        assert part in text, part


# No space, nothing to write to


def test_a_disk_full_at_the_end_leaves_nothing_half_written(small_disk, text, capsys):
    """There is room for the three runs' models of 4 MB and not for the exported one."""
    disk = small_disk(15.0)
    one = command(text, disk / "run", "--save_strategy", "no")
    assert main(one) == 1
    said = capsys.readouterr().err
    assert "no space for the model" in said and "with --resume continues" in said and "Traceback" not in said
    assert {path.name for path in (disk / "run").iterdir()} == {"seed-42"}
    small_disk(40.0)
    plan = prepare_comparison(options(text), training(disk / "run", eval_on_start=True, resume=True))
    assert to_train(plan) == [False] * 3


def test_a_folder_that_cannot_be_written_to_is_refused(small_disk, text, capsys):
    disk = small_disk(1.0)
    subprocess.run(["mount", "-o", "remount,ro", str(disk)], check=True)
    assert not os.access(disk, os.W_OK)
    assert main(command(text, disk / "run")) == 2
    said = capsys.readouterr().err
    assert f"{str(disk)!r} cannot be written to" in said and "Traceback" not in said
