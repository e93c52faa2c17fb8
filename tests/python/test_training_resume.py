"""Going on with a run: to the same losses, in either stage, with more steps; and what may not be another then."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
from transformers import TrainerCallback

from lighthouse.huggingface.trainer_state import best_checkpoint, step_of
from lighthouse.training import PretrainResult, checkpoints, prepare, pretrain
from lighthouse.training import run as run_module
from lighthouse.training.resume import check_best, differences, state_in, what_is_new
from training_runs import CONTEXT, options, training, watch

pytestmark = pytest.mark.usefixtures("one_thread")

EVERY = {"save_strategy": "steps", "save_steps": 1, "save_total_limit": 9}


@pytest.fixture
def seen(monkeypatch):
    return watch(monkeypatch)


@pytest.fixture(scope="module")
def saved(tmp_path_factory, text):
    """The folder of a run that is at its end, with a checkpoint of each step. It is not to be changed."""
    folder = tmp_path_factory.mktemp("saved")
    pretrain(options(text), training(folder, eval_on_start=True, **EVERY))
    return folder


def losses_of(folder: Path) -> dict[int, float]:
    state = json.loads(max(folder.glob("checkpoint-*"), key=step_of).joinpath("trainer_state.json").read_text())
    return {entry["step"]: entry["loss"] for entry in state["log_history"] if "loss" in entry}


@pytest.mark.parametrize("at", [1, 3, 4], ids=["before_the_switch", "at_the_switch", "after_the_switch"])
def test_resuming_gives_the_same_losses(tmp_path, text, saved, seen, at, capsys):
    """And no others: `eval_on_start` is of a run's first step, and not of the one that it goes on from."""
    whole, cut = saved, tmp_path / "cut"
    if at == 4:
        whole = tmp_path / "whole"
        pretrain(options(text), training(whole, **EVERY))
    undisturbed, expected = PretrainResult.load(whole / "results.json"), losses_of(whole)
    later = [path.name for path in checkpoints.checkpoints_in(whole) if step_of(path) > at]
    shutil.copytree(whole, cut, ignore=shutil.ignore_patterns(*later))
    seen.clear()
    capsys.readouterr()
    resumed = pretrain(options(text), training(cut, eval_on_start=True, resume=True, **EVERY))
    assert ("eval_on_start: this run began without it" in capsys.readouterr().out) == (at == 4)
    assert seen == [(step, step <= 3) for step in range(at + 1, 6)]
    assert losses_of(cut) == expected
    assert [(p.step, p.loss) for p in resumed.held_out] == [(p.step, p.loss) for p in undisturbed.held_out]
    assert {name: stage.steps for name, stage in resumed.stages.items()} == {"lighthouse": 3, "dense": 2}


def test_what_a_kill_left_is_cleared_and_the_results_come_last(tmp_path, text, saved, monkeypatch):
    cut = tmp_path / "cut"
    shutil.copytree(saved, cut, ignore=shutil.ignore_patterns("checkpoint-[345]", "model", "results.json"))
    half = cut / "checkpoint-2"
    (half / "model.safetensors").write_bytes(b"half")
    left = [cut / name for name in ("checkpoint-3.partial", "model.partial", "run.json.1.partial")]
    left[0].mkdir(), left[1].mkdir(), left[2].write_text("{")
    write, begun = PretrainResult.save, []

    def save(result, path):
        begun.append((cut / "model" / "config.json").is_file())
        return write(result, path)

    monkeypatch.setattr(PretrainResult, "save", save)
    there = []
    monkeypatch.setattr(
        run_module.RunTrainer, "train", lambda *args, **kwargs: there.extend(p for p in (half, *left) if p.exists())
    )
    monkeypatch.setattr(run_module.Run, "_finish", lambda *args, **kwargs: None)
    pretrain(options(text), training(cut, resume=True, **EVERY))
    assert not there
    monkeypatch.undo()
    monkeypatch.setattr(PretrainResult, "save", save)
    pretrain(options(text), training(cut, resume=True, **EVERY))
    assert begun == [True]


# Of a run of 5 steps and of the same that goes on to 8, how many are with Lighthouse.
LATER = [
    ("a_share", {"share": 0.6}, 3, 3),
    ("a_step_that_was_reached", {"switch_step": 3}, 3, 3),
    ("a_step_beyond_the_first_end", {"switch_step": 7}, 5, 7),
    ("tokens_beyond_the_first_end", {"switch_tokens": 6 * CONTEXT - 1}, 5, 6),
    ("never", {"lighthouse_only": True}, 5, 8),
]


@pytest.mark.parametrize("how, first, then", [case[1:] for case in LATER], ids=[case[0] for case in LATER])
def test_more_steps_on_resuming_leave_the_switch_where_it_was(tmp_path, text, saved, how, first, then):
    began = prepare(options(text, **how), training(tmp_path))
    shutil.copytree(saved / "checkpoint-5", tmp_path / "checkpoint-5")
    (tmp_path / "run.json").write_text(json.dumps(began.settings()))
    run = prepare(options(text, **how), training(tmp_path, max_steps=8, resume=True))
    assert (began.switch_step, run.switch_step) == (first, then) and run.settings()["lighthouse_steps"] == then
    assert "max_steps was 5, is now 8" in str(run)


def test_more_steps_are_with_lighthouse_up_to_the_switch(tmp_path, text, seen):
    pretrain(options(text, switch_step=7), training(tmp_path, save_strategy="steps", save_steps=5))
    pretrain(options(text, switch_step=7), training(tmp_path, max_steps=8, resume=True))
    assert seen == [(step, step <= 7) for step in range(1, 9)]


SCHEDULES = {
    "cosine": {"warmup_steps": 1},
    "linear": {"warmup_steps": 0.25},
    "constant_with_warmup": {"warmup_steps": 0.75},
    "reduce_lr_on_plateau": {"eval_strategy": "steps", "eval_steps": 1, "lr_scheduler_kwargs": {"patience": 0}},
}


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_with_more_steps_the_rates_are_those_of_so_many_from_the_first_on(tmp_path, text, schedule, capsys):
    class Rates(TrainerCallback):
        def on_step_begin(self, args, state, control, optimizer=None, **kwargs):
            rates.append(optimizer.param_groups[0]["lr"])

    def run(folder, **changes):
        changes = {"lr_scheduler_type": schedule, "eval_strategy": "no", **SCHEDULES[schedule], **changes}
        changes |= {"accelerator_config": {"gradient_accumulation_kwargs": {"sync_each_batch": True}}}
        made = prepare(options(text, dense_only=True), training(tmp_path / folder, **changes))
        made.train(callbacks=[Rates()], keep_model=False)

    rates = []
    run("undisturbed", max_steps=4)
    run("resumed", max_steps=2, save_strategy="steps", save_steps=2)
    run("resumed", max_steps=4, resume=True)
    undisturbed, resumed = rates[:4], rates[6:]
    assert resumed == undisturbed[2:] and 0 not in resumed
    said = "is the same" if schedule == "reduce_lr_on_plateau" else "now follows the schedule of 4 steps"
    assert f"max_steps was 2, is now 4: the learning rate {said}." in capsys.readouterr().out


def test_resuming_a_finished_run_only_finishes_it(tmp_path, text, saved, seen):
    """As after a kill between the last checkpoint and the model."""
    first = PretrainResult.load(saved / "results.json")
    shutil.copytree(saved, tmp_path / "run")
    (tmp_path / "run" / "results.json").unlink()
    weights = tmp_path / "run" / "model" / "model.safetensors"
    before = weights.read_bytes()
    weights.unlink()
    again = pretrain(options(text), training(tmp_path / "run", resume=True))
    assert seen == [] and weights.read_bytes() == before
    assert again == replace(first, settings=again.settings, model_folder=str(weights.parent))


def test_fewer_steps_than_the_checkpoint_has_are_refused(text, saved):
    with pytest.raises(ValueError, match="max_steps=3: .*checkpoint-5' already has 5 steps"):
        prepare(options(text), training(saved, max_steps=3, resume=True))


def test_a_checkpoint_not_written_to_its_end_is_passed_over(tmp_path, text, saved, capsys):
    shutil.copytree(saved, tmp_path / "run")
    (tmp_path / "run" / "checkpoint-5" / "trainer_state.json").unlink()
    run = prepare(options(text), training(tmp_path / "run", resume=True))
    assert run.checkpoint.endswith("checkpoint-4")
    assert "checkpoint-5 is skipped: its trainer_state.json is missing" in capsys.readouterr().out


def test_a_checkpoint_of_another_run_does_not_write_over_this_one(tmp_path, text, saved):
    shutil.copytree(saved, tmp_path / "run")
    with pytest.raises(FileExistsError, match="holds a different run from resume_from_checkpoint"):
        prepare(options(text), training(tmp_path / "run", resume_from_checkpoint=str(saved / "checkpoint-4")))


def test_another_text_is_another_run(tmp_path, text, saved):
    shutil.copytree(text, tmp_path / "text")
    assert prepare(options(tmp_path / "text"), training(saved, resume=True)).checkpoint  # at another place
    (tmp_path / "text" / "new.txt").write_text("more " * 500)
    with pytest.raises(ValueError, match="the text, its order, its tokenizer"):
        prepare(options(tmp_path / "text"), training(saved, resume=True))


def test_a_best_checkpoint_that_is_not_there_is_not_taken_for_the_best(tmp_path, saved):
    """The run's folder was moved, say: its last checkpoint names a best one where it was."""
    found = shutil.copytree(saved / "checkpoint-4", tmp_path / "checkpoint-4")
    state = json.loads((found / "trainer_state.json").read_text()) | {"best_metric": 0.0}
    best = training(tmp_path / "run", load_best_model_at_end=True, save_strategy="steps", save_steps=2)
    for there in (True, False):
        state["best_model_checkpoint"] = str(found if there else tmp_path / "moved" / "checkpoint-2")
        (found / "trainer_state.json").write_text(json.dumps(state))
        assert best_checkpoint(state_in(found), best) == (found if there else None)
        if there:
            check_best(found, best)
    with pytest.raises(ValueError, match="best checkpoint so far, '.*moved/checkpoint-2', does not exist"):
        check_best(found, best)
    check_best(found, training(tmp_path / "run"))


MEASURED = [
    # the best loss that a checkpoint knows, those that were measured, whether another is lower
    ("without_the_option", None, [(0, 1.0), (2, 3.0), (4, 2.5)], True),
    ("before_the_option_was_given_again", 3.0, [(2, 3.0), (4, 2.5)], True),
    ("with_it", 2.5, [(0, 1.0), (2, 2.5), (4, 3.0)], False),
    ("before_the_first_step_alone", None, [(0, 1.0)], False),
    ("not_yet", None, [], False),
]


@pytest.mark.parametrize("best, measured, refused", [m[1:] for m in MEASURED], ids=[m[0] for m in MEASURED])
def test_the_best_of_losses_that_were_measured_without_the_option_is_not_known(
    tmp_path, saved, text, best, measured, refused
):
    shutil.copytree(saved, tmp_path / "run")
    path = tmp_path / "run" / "checkpoint-5" / "trainer_state.json"
    state = json.loads(path.read_text()) | {"best_metric": best}
    points = [{"step": step, "seconds": 0.0, "stage": "dense", "loss": loss} for step, loss in measured]
    state["stateful_callbacks"]["Record"]["attributes"]["held_out"] = points
    path.write_text(json.dumps(state))
    checkpoints.seal(path.parent)
    keeps = {"save_strategy": "steps", "save_steps": 2}
    prepare(options(text), training(tmp_path / "run", resume=True, **keeps))
    again = training(tmp_path / "run", resume=True, load_best_model_at_end=True, **keeps)
    if not refused:
        prepare(options(text), again)
        return
    with pytest.raises(ValueError, match="held-out loss so far, 2.5000 after step 4, was measured without the option"):
        prepare(options(text), again)


FREE = {"save_steps": 3, "logging_steps": 2, "eval_steps": 1, "save_total_limit": 5, "dataloader_num_workers": 1}
FIXED = [
    ("batch_size", {}, {"per_device_train_batch_size": 2}, "per_device_train_batch_size was 1, is 2; tokens_per_step"),
    ("accumulation", {}, {"gradient_accumulation_steps": 2}, "gradient_accumulation_steps was 1, is 2"),
    ("optimizer", {}, {"optim": "sgd"}, "optim was '.*', is 'sgd'"),
    ("schedule", {}, {"lr_scheduler_type": "linear"}, "lr_scheduler_type was 'cosine', is 'linear'"),
    ("precision", {}, {"bf16": True}, "bf16 was False, is True"),
    ("beta", {}, {"adam_beta1": 0.8}, "adam_beta1 was 0.9, is 0.8"),
    ("order_of_the_text", {}, {"data_seed": 3}, "data_seed was None, is 3"),
    ("compiled", {}, {"torch_compile": True}, "torch_compile was False, is True"),
    ("context", {"context": 64}, {}, "context was 128, is 64"),
    ("model", {"model": "tiny"}, {}, "model was 'nano', is 'tiny'"),
    ("weight_decay", {}, {"weight_decay": 0.9}, "weight_decay was 0.1, is 0.9"),
    ("several", {"select_topk": "8"}, {"seed": 1}, "select_topk was 4, is 8; seed was 42, is 1"),
    ("switch", {"switch_step": 2}, {}, "switch_step was None, is 2"),
    ("dense", {"dense_only": True}, {}, "dense_only was False, is True"),
]


@pytest.mark.parametrize("run, trainer, message", [f[1:] for f in FIXED], ids=[f[0] for f in FIXED])
def test_what_decides_the_losses_may_not_change(saved, text, run, trainer, message):
    with pytest.raises(ValueError, match=message):
        prepare(options(text, **run), training(saved, resume=True, **trainer))


def test_what_decides_no_loss_may_change(saved, text):
    run = prepare(options(text), training(saved, resume=True, max_steps=9, **FREE))
    assert run.checkpoint == str(saved / "checkpoint-5") and run.switch_step == 3


def test_what_may_differ_in_the_last_digits_is_said():
    """Versions and the device: a sentence, and no refusal."""
    earlier = {"device_name": "a CPU", "versions": {"torch": "2.10", "python": "3.11"}, "seed": 1}
    now = {"device_name": "a CPU", "versions": {"torch": "2.11", "python": "3.11"}, "seed": 2}
    assert what_is_new(earlier, now) == [
        "Since this run began torch was 2.10, is 2.11: losses may differ in their last digits."
    ]
    assert what_is_new(earlier, earlier) == what_is_new({}, now) == []


def test_a_model_that_is_another_now_is_refused(saved, text, monkeypatch, tmp_path):
    before = run_module.model_of
    monkeypatch.setattr(run_module, "model_of", lambda *args: _with(before(*args), rms_norm_eps=0.5))
    with pytest.raises(ValueError, match="rms_norm_eps was 1e-06, is 0.5"):
        prepare(options(text), training(saved, resume=True, max_steps=9)).train()


def _with(model, **changes):
    model.config.update(changes)
    return model


def test_an_earlier_checkpoint_is_not_mixed_with_later_ones(saved, text):
    earlier = str(saved / "checkpoint-4")
    with pytest.raises(
        FileExistsError, match="folder has later checkpoints, checkpoint-5, .* or resume in a new output_dir"
    ):
        prepare(options(text), training(saved, resume_from_checkpoint=earlier))


def test_an_earlier_checkpoint_goes_on_in_another_folder(saved, text, tmp_path, seen):
    earlier = str(saved / "checkpoint-4")
    pretrain(options(text), training(tmp_path / "new", resume_from_checkpoint=earlier))
    assert seen == [(5, False)]


def test_a_checkpoint_of_something_else_is_not_resumed(tmp_path, text):
    (tmp_path / "checkpoint-3").mkdir()
    (tmp_path / "checkpoint-3" / "trainer_state.json").write_text("{}")
    checkpoints.seal(tmp_path / "checkpoint-3")
    with pytest.raises(FileNotFoundError, match="is not from a run of lighthouse pretrain"):
        prepare(options(text), training(tmp_path, resume=True))


def test_a_setting_that_a_run_of_an_earlier_version_lacks_was_as_by_default():
    earlier = {"pool_ratios": [0.25], "seed": 1}
    assert not differences(earlier, {"pool_ratios": [0.25], "cover_start": True, "seed": 1})
    assert differences(earlier, {"pool_ratios": [0.25], "cover_start": False, "seed": 1}) == [
        "cover_start was True, is False"
    ]
