"""Whole runs: the switch at its step, the record, resuming in either stage, and the plain model at the end."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from dataclasses import fields, replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback, TrainingArguments

from lighthouse.core import attention as attention_module
from lighthouse.export.card import history_of_checkpoint
from lighthouse.huggingface.trainer_state import best_checkpoint
from lighthouse.training import PretrainResult, Refused, RunFailed, checkpoints, prepare, pretrain
from lighthouse.training import run as run_module
from lighthouse.training.model import new_model
from lighthouse.training.result import TextFailed
from lighthouse.training.resume import check_best, state_in, what_is_new
from lighthouse.training.trainer import rows_to_evaluate
from training_runs import CHECKPOINTING, CONTEXT, options, training, write_text

pytestmark = pytest.mark.usefixtures("one_thread")

TRAINERS = {f.name for f in fields(TrainingArguments)}


@pytest.fixture
def seen(monkeypatch):
    """After each step: (the step, whether a layer chose a sub-sequence in it)."""
    steps, calls = [], []
    gather = attention_module.choose

    def counted(*args, **kwargs):
        calls.append(1)
        return gather(*args, **kwargs)

    monkeypatch.setattr(attention_module, "choose", counted)

    class Watch(TrainerCallback):
        def on_step_end(self, args, state, control, model=None, **kwargs):
            steps.append((state.global_step, bool(calls)))
            calls.clear()

    before = run_module.RunTrainer.__init__

    def with_watch(self, **kwargs):
        before(self, **{**kwargs, "callbacks": [*kwargs["callbacks"], Watch()]})

    monkeypatch.setattr(run_module.RunTrainer, "__init__", with_watch)
    return steps


def losses_of(folder: Path) -> dict[int, float]:
    state = json.loads(max(folder.glob("checkpoint-*"), key=_step_of).joinpath("trainer_state.json").read_text())
    return {entry["step"]: entry["loss"] for entry in state["log_history"] if "loss" in entry}


def _step_of(checkpoint: Path) -> int:
    return int(checkpoint.name.split("-")[1])


SWITCHES = [
    ("six_tenths", {"share": 0.6}, 3),
    ("never", {"share": 1.0}, 5),
    ("one_step", {"share": 0.2}, 1),
    ("behind_a_step", {"switch_step": 2}, 2),
    ("behind_a_number_of_tokens", {"switch_tokens": 3 * CONTEXT + 1}, 4),
    ("lighthouse_alone", {"lighthouse_only": True}, 5),
]


@pytest.mark.parametrize("how, switch_step", [s[1:] for s in SWITCHES], ids=[s[0] for s in SWITCHES])
def test_lighthouse_runs_in_the_first_steps_and_no_others(tmp_path, text, seen, how, switch_step):
    result = pretrain(options(text, **how), training(tmp_path))
    assert seen == [(step, step <= switch_step) for step in range(1, 6)]
    assert result.switch_step == switch_step
    assert {name: stage.steps for name, stage in result.stages.items()} == {
        name: steps for name, steps in (("lighthouse", switch_step), ("dense", 5 - switch_step)) if steps
    }


def test_a_dense_run_is_the_plain_model_throughout(tmp_path, text, seen):
    result = pretrain(options(text, dense_only=True), training(tmp_path))
    assert not any(on for _, on in seen)
    assert result.name == "dense" and list(result.stages) == ["dense"]


def test_share_zero_is_the_dense_run_to_the_last_bit(tmp_path, text):
    dense = pretrain(options(text, dense_only=True), training(tmp_path / "a"))
    none = pretrain(options(text, share=0), training(tmp_path / "b"))
    assert [p.loss for p in dense.held_out] == [p.loss for p in none.held_out]


def test_the_record(tmp_path, text):
    result = pretrain(options(text), training(tmp_path))
    # Every second step, right before the switch, and at the end.
    assert [(p.step, p.stage) for p in result.held_out] == [
        (2, "lighthouse"),
        (3, "lighthouse"),
        (4, "dense"),
        (5, "dense"),
    ]
    seconds = [p.seconds for p in result.held_out]
    assert seconds == sorted(seconds) and seconds[-1] == pytest.approx(result.seconds)
    assert result.lighthouse.tokens == 3 * CONTEXT and result.lighthouse.tokens_per_second > 0
    assert PretrainResult.load(tmp_path / "results.json") == result


def plain_loss(folder: Path, text: Path, result: PretrainResult) -> float:
    """The held-out loss of the saved model, by Transformers alone."""
    run = prepare(options(text), training(folder / "other"))
    model = AutoModelForCausalLM.from_pretrained(result.model_folder).eval()
    _, rows = run_module.data.rows_of(run.corpus)
    losses = []
    for row in rows:
        ids = torch.as_tensor(row["input_ids"]).long()[None]
        with torch.no_grad():
            losses.append(model(input_ids=ids, labels=ids).loss.item())
    return sum(losses) / len(losses)


@pytest.mark.parametrize("smoothing", [0.0, 0.4], ids=["plain", "label_smoothing"])
def test_the_held_out_loss_is_the_plain_models_cross_entropy(tmp_path, text, smoothing):
    result = pretrain(options(text), training(tmp_path, label_smoothing_factor=smoothing))
    assert result.loss == pytest.approx(plain_loss(tmp_path, text, result), rel=1e-5)


@pytest.mark.parametrize("at", [1, 3, 4], ids=["before_the_switch", "at_the_switch", "behind_the_switch"])
def test_resuming_gives_the_same_losses(tmp_path, text, seen, at, capsys):
    """And no others: `eval_on_start` is of a run's first step, and not of the one that it goes on from."""
    every = {"save_strategy": "steps", "save_steps": 1, "save_total_limit": 9, "eval_on_start": at < 4}
    whole = training(tmp_path / "whole", **every)
    undisturbed = pretrain(options(text), whole)
    expected = losses_of(tmp_path / "whole")

    cut = tmp_path / "cut"
    (tmp_path / "whole").rename(cut)
    for checkpoint in cut.glob("checkpoint-*"):
        if _step_of(checkpoint) > at:
            _remove(checkpoint)
    seen.clear()
    capsys.readouterr()
    resumed = pretrain(options(text), training(cut, **every | {"eval_on_start": True}, resume=True))
    assert ("eval_on_start: this run began without it" in capsys.readouterr().out) == (at == 4)
    assert seen == [(step, step <= 3) for step in range(at + 1, 6)]
    assert losses_of(cut) == expected
    assert [(p.step, p.loss) for p in resumed.held_out] == [(p.step, p.loss) for p in undisturbed.held_out]
    assert {name: stage.steps for name, stage in resumed.stages.items()} == {"lighthouse": 3, "dense": 2}


LATER = [
    ("a_share", {"share": 0.6}, [False] * 3),
    ("a_step_that_was_reached", {"switch_step": 3}, [False] * 3),
    ("a_step_beyond_the_first_end", {"switch_step": 7}, [True, True, False]),
    ("tokens_beyond_the_first_end", {"switch_tokens": 6 * CONTEXT - 1}, [True, False, False]),
    ("never", {"lighthouse_only": True}, [True] * 3),
]


@pytest.mark.parametrize("how, on", [case[1:] for case in LATER], ids=[case[0] for case in LATER])
def test_more_steps_on_resuming_leave_the_switch_where_it_was(tmp_path, text, seen, capsys, how, on):
    pretrain(options(text, **how), training(tmp_path, save_strategy="steps", save_steps=5))
    first = [lighthouse for _, lighthouse in seen]
    seen.clear()
    pretrain(options(text, **how), training(tmp_path, max_steps=8, resume=True))
    assert seen == list(zip((6, 7, 8), on, strict=True))
    assert first == sorted(first, reverse=True) and (not on[0] or all(first))
    assert "max_steps was 5, is 8" in capsys.readouterr().out


SCHEDULES = {
    "cosine": {"warmup_steps": 1},
    "linear": {"warmup_steps": 0.5},
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
        rates.clear()
        made = prepare(options(text, dense_only=True), training(tmp_path / folder, **changes))
        made.train(callbacks=[Rates()], keep_model=False)
        return list(rates)

    rates = []
    undisturbed = run("undisturbed", max_steps=4)
    assert len(undisturbed) == 4
    run("resumed", max_steps=2, save_strategy="steps", save_steps=2)
    assert run("resumed", max_steps=4, resume=True) == undisturbed[2:] and 0 not in undisturbed[2:]
    said = "is the same" if schedule == "reduce_lr_on_plateau" else "is now that of so many"
    assert f"max_steps was 2, is 4: the learning rate {said}." in capsys.readouterr().out


def test_lighthouse_alone_is_said_to_be_no_model_for_use(tmp_path, text, caplog):
    result = pretrain(options(text, lighthouse_only=True), training(tmp_path))
    assert result.name == "lighthouse-only" and list(result.stages) == ["lighthouse"]
    assert "All 5 steps behind these weights used" in result.warnings[0] and result.warnings[0] in caplog.text
    assert PretrainResult.load(tmp_path / "results.json").warnings == result.warnings
    assert result.loss == pytest.approx(plain_loss(tmp_path, text, result), rel=1e-5)


def test_resuming_a_finished_run_only_finishes_it(tmp_path, text, seen):
    """As after a kill between the last checkpoint and the model."""
    first = pretrain(options(text), training(tmp_path, save_strategy="steps", save_steps=1))
    (tmp_path / "results.json").unlink()
    before = (tmp_path / "model" / "model.safetensors").read_bytes()
    (tmp_path / "model" / "model.safetensors").unlink()
    seen.clear()
    again = pretrain(options(text), training(tmp_path, resume=True))
    assert seen == [] and replace(again, settings={}) == replace(first, settings={})
    assert (tmp_path / "model" / "model.safetensors").read_bytes() == before


def test_fewer_steps_than_the_checkpoint_has_are_refused(tmp_path, text):
    pretrain(options(text), training(tmp_path, save_strategy="steps", save_steps=1))
    with pytest.raises(ValueError, match="max_steps=3: .*checkpoint-5' has 5 steps already"):
        prepare(options(text), training(tmp_path, max_steps=3, resume=True))


def test_a_checkpoint_not_written_to_its_end_is_passed_over(tmp_path, text, capsys):
    pretrain(options(text), training(tmp_path, save_strategy="steps", save_steps=1))
    (tmp_path / "checkpoint-5" / "trainer_state.json").unlink()
    run = prepare(options(text), training(tmp_path, resume=True))
    assert run.checkpoint.endswith("checkpoint-4")
    assert "checkpoint-5 is passed over: its trainer_state.json is missing" in capsys.readouterr().out


def test_a_checkpoint_of_another_run_does_not_write_over_this_one(tmp_path, text):
    for name in ("a", "b"):
        pretrain(options(text), training(tmp_path / name, save_strategy="steps", save_steps=1))
    other = str(tmp_path / "a" / "checkpoint-4")
    with pytest.raises(FileExistsError, match="holds another run than resume_from_checkpoint"):
        prepare(options(text), training(tmp_path / "b", resume_from_checkpoint=other))


def test_another_text_or_schedule_is_another_run(tmp_path):
    folder = write_text(tmp_path / "text")
    pretrain(options(folder), training(tmp_path / "run", save_strategy="steps", save_steps=1))
    with pytest.raises(ValueError, match="weight_decay was 0.1, is 0.9"):
        prepare(options(folder), training(tmp_path / "run", resume=True, weight_decay=0.9))
    (folder / "new.txt").write_text("more " * 500)
    with pytest.raises(ValueError, match="the text, its order, its tokenizer"):
        prepare(options(folder), training(tmp_path / "run", resume=True))


def test_with_the_best_model_its_loss_is_the_one_reported(tmp_path, text):
    best = {"load_best_model_at_end": True, "save_strategy": "steps", "save_steps": 1, "eval_steps": 1}
    result = pretrain(options(text), training(tmp_path, learning_rate=0.5, **best))
    losses = {point.step: point.loss for point in result.held_out}
    assert result.model_step == min(losses, key=losses.get) != result.steps
    assert result.loss == min(losses.values())


def test_a_best_model_from_before_the_switch_is_said_to_be_no_model_for_use(tmp_path, text, caplog):
    """A rate so high at the end that the dense stage makes it worse."""

    class Spoil(TrainerCallback):
        def on_step_begin(self, args, state, control, optimizer=None, **kwargs):
            for group in optimizer.param_groups:
                group["lr"] = 1e-3 if state.global_step < 3 else 2.0

    best = {"load_best_model_at_end": True, "save_strategy": "steps", "save_steps": 1, "eval_steps": 1}
    result = prepare(options(text), training(tmp_path, **best)).train(callbacks=[Spoil()])
    assert result.switch_step == 3 and result.model_step <= 3
    warning = f"All {result.model_step} steps behind these weights used Lighthouse"
    assert len(result.warnings) == 1 and warning in result.warnings[0] and warning in caplog.text
    assert history_of_checkpoint(tmp_path / "model").warnings() == result.warnings


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
    with pytest.raises(ValueError, match="best checkpoint so far was '.*moved/checkpoint-2', and it is not there"):
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


@pytest.mark.parametrize("order", ["random", "sequential"])
def test_every_step_is_whole_and_has_the_tokens_that_it_counts_for(tmp_path, monkeypatch, order):
    """Where rows, batches and accumulation do not divide: in each pass a part of a step's rows is left for the next."""
    seen, step = [], run_module.RunTrainer.training_step

    def counted(trainer, model, inputs, *args, **kwargs):
        seen.append((trainer.state.global_step + 1, inputs["input_ids"].numel(), trainer.state.epoch))
        return step(trainer, model, inputs, *args, **kwargs)

    monkeypatch.setattr(run_module.RunTrainer, "training_step", counted)
    rows = {"per_device_train_batch_size": 4, "gradient_accumulation_steps": 2}
    strategy = {"train_sampling_strategy": order} if "train_sampling_strategy" in TRAINERS else {}
    text = write_text(tmp_path / "text", files=4, words=250)
    result = pretrain(options(text), training(tmp_path / "run", max_steps=5, eval_strategy="no", **rows, **strategy))
    assert seen[-1][2] >= 1  # the second pass
    tokens = [sum(numel for at, numel, _ in seen if at == number) for number in range(1, 6)]
    assert tokens == [4 * 2 * CONTEXT] * 5
    assert sum(stage.tokens for stage in result.stages.values()) == sum(tokens)


def test_a_step_of_more_rows_than_the_text_has_is_refused(tmp_path, text):
    with pytest.raises(ValueError, match=r"a step has 64 rows .*, and the text \d\d: take fewer"):
        pretrain(options(text, context=512), training(tmp_path / "run", per_device_train_batch_size=64))
    assert not (tmp_path / "run").exists()


HELD_OUT = [
    ("one_process", 1, 5, 4, 4),
    ("divides", 2, 8, 2, 2),
    ("does_not", 2, 6, 4, 3),
    ("no_size_does", 2, 5, 4, 1),
]


@pytest.mark.parametrize("processes, rows, wanted, found", [h[1:] for h in HELD_OUT], ids=[h[0] for h in HELD_OUT])
def test_no_held_out_row_counts_twice(capsys, processes, rows, wanted, found):
    """Several processes would fill the last batch with rows again."""
    args = SimpleNamespace(per_device_eval_batch_size=wanted, world_size=processes, process_index=0)
    assert rows_to_evaluate(rows, args) == found
    assert (f"was {wanted}, is {found}" in capsys.readouterr().out) == (found != wanted)


def _remove(folder: Path) -> None:
    for path in folder.iterdir():
        path.unlink()
    folder.rmdir()


def test_the_saved_folder_needs_nothing_of_this_package(tmp_path, text):
    result = pretrain(options(text), training(tmp_path))
    program = f"""
import sys
class Absent:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] == "lighthouse":
            raise ModuleNotFoundError(name)
sys.meta_path.insert(0, Absent())
from transformers import AutoModelForCausalLM, AutoTokenizer
model = AutoModelForCausalLM.from_pretrained({result.model_folder!r})
tokenizer = AutoTokenizer.from_pretrained({result.model_folder!r})
ids = tokenizer("the light", return_tensors="pt", add_special_tokens=False).input_ids
print(type(model).__name__, model.config.use_cache, model(ids).logits.shape[-1], len(tokenizer))
print(model.generate(ids, max_new_tokens=3, min_new_tokens=3).shape[1] - ids.shape[1])
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == ["LlamaForCausalLM", "True", "384", "384", "3"]
    for path in Path(result.model_folder).iterdir():
        assert b"lighthouse" not in path.read_bytes().lower(), path


def test_the_tokenizer_is_saved_with_it(tmp_path, text):
    result = pretrain(options(text, dense_only=True), training(tmp_path))
    tokenizer = AutoTokenizer.from_pretrained(result.model_folder)
    assert tokenizer("Füße", add_special_tokens=False).input_ids == [byte + 3 for byte in "Füße".encode()]


def test_weights_depend_on_the_seed_alone():
    first, second, other = (new_model("nano", CONTEXT, seed).lm_head.weight for seed in (1, 1, 2))
    assert torch.equal(first, second) and not torch.equal(first, other)


def test_training_options_of_the_trainer_count(tmp_path, text):
    result = pretrain(
        options(text),
        training(
            tmp_path,
            gradient_accumulation_steps=2,
            per_device_train_batch_size=2,
            **{CHECKPOINTING: True},
            bf16=True,
        ),
    )
    assert result.dense.tokens == 2 * 4 * CONTEXT
    assert result.loss < 6.1


def test_it_learns(tmp_path, text):
    result = pretrain(options(text), training(tmp_path, max_steps=40, eval_steps=20, learning_rate=5e-3))
    assert result.held_out[0].loss > result.loss + 0.1 and result.loss < 3.5


def test_no_evaluation_but_the_last_when_none_is_asked_for(tmp_path, text):
    result = pretrain(options(text), training(tmp_path, eval_strategy="no"))
    assert [point.step for point in result.held_out] == [5]


REFUSED = [
    ("share_above_one", {"share": 1.5}, {}, "share=1.5: a share of the steps, 0 to 1"),
    ("share_below_zero", {"share": -0.1}, {}, "share=-0.1"),
    ("share_not_a_number", {"share": float("nan")}, {}, "share=nan"),
    ("no_steps", {}, {"max_steps": 0}, "max_steps=0: at least one step"),
    ("steps_left_to_epochs", {}, {"max_steps": -1}, "max_steps=-1"),
    ("unknown_size", {"model": "huge"}, {}, "model='huge': there is nano, tiny"),
    ("longer_than_the_model_allows", {"context": 65_537}, {}, "context=65537: model 'nano' allows at most 65536"),
    ("no_context", {"context": 1}, {}, "context=1: at least 2"),
    ("nothing_held_out", {"held_out": 0}, {}, "held_out=0"),
    ("a_ratio_that_is_none", {"pool_ratios": ["0.3"]}, {}, r"pool_ratios\[0\]=0.3"),
    ("a_ratio_that_is_no_number", {"pool_ratios": ["a quarter"]}, {}, "pool_ratios=a quarter: a number"),
    ("no_parents", {"select_topk": "0"}, {}, "select_topk=0"),
    ("all_layers_dense", {"dense_layers": 2}, {}, "dense_layers=2: .* none is left to Lighthouse"),
    ("a_folder_that_is_not_there", {"data": "/no/such/folder"}, {}, "data='/no/such/folder' does not exist"),
    (
        "more_memory_than_there_is",
        {"model": "llama-8b", "context": 1_000_000},
        {},
        "out of memory: a training step needs at least .* take a shorter --context, --gradient_checkpointing true",
    ),
    ("shards_on_a_cpu", {}, {"fsdp": "full_shard"}, "fsdp with 1 process on a cpu device"),
    ("workers_that_each_stream", {"stream": True}, {"dataloader_num_workers": 2}, "each would read all of the text"),
    ("a_streams_own_seed", {"stream": True}, {"data_seed": 1}, "data_seed=1 with stream: .* follows from seed"),
    ("a_stream_in_order", {"stream": True}, {"train_sampling_strategy": "sequential"}, "='sequential' with stream: "),
    ("nothing_to_resume", {}, {"resume": True}, "holds no checkpoint to resume from"),
    ("a_checkpoint_that_is_not_there", {}, {"resume_from_checkpoint": "/no/such"}, "'/no/such' is not a folder"),
    ("a_batch_size_that_changes", {}, {"auto_find_batch_size": True}, "auto_find_batch_size=True: the steps' tokens"),
    ("checkpoints_to_no_avail", {}, {"save_only_model": True}, "save_only_model=True: no run could go on"),
    ("another_hand_on_the_signal", {}, {"enable_jit_checkpoint": True}, "SIGTERM saves a checkpoint already"),
]


@pytest.mark.parametrize("run, trainer, message", [r[1:] for r in REFUSED], ids=[r[0] for r in REFUSED])
def test_refused_before_any_work(tmp_path, text, run, trainer, message):
    folder = tmp_path / "run"
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        prepare(options(text, **run), training(folder, **trainer))
    assert not folder.exists()


def test_a_folder_with_a_run_is_not_written_over(tmp_path, text):
    pretrain(options(text, dense_only=True), training(tmp_path, max_steps=1))
    before = (tmp_path / "results.json").read_text()
    with pytest.raises(FileExistsError, match="holds a run already: take another folder .* --resume, or delete"):
        prepare(options(text), training(tmp_path))
    assert (tmp_path / "results.json").read_text() == before


def test_two_runs_are_not_in_one_folder(tmp_path, text, monkeypatch):
    """Not at the same time, nor one after the other where the second was prepared before the first began."""
    monkeypatch.setattr(checkpoints, "WORKERS_END", 0.2)
    first, second = (prepare(options(text, dense_only=True), training(tmp_path / "run", max_steps=1)) for _ in range(2))
    with checkpoints.alone_in(tmp_path / "run"), pytest.raises(Refused, match="another process trains in this folder"):
        first.train()
    assert list((tmp_path / "run").iterdir()) == []
    result = first.train()
    with pytest.raises(Refused, match="holds a run that another process has begun"):
        second.train()
    assert PretrainResult.load(tmp_path / "run" / "results.json") == result


def test_a_file_is_no_output_folder(tmp_path, text):
    (tmp_path / "run").write_text("")
    with pytest.raises(FileExistsError, match="is a file: a folder is needed"):
        prepare(options(text), training(tmp_path / "run"))


def test_resuming_with_other_settings_lists_them(tmp_path, text):
    pretrain(options(text), training(tmp_path, save_strategy="steps", save_steps=1))
    with pytest.raises(ValueError, match=re.escape("select_topk was 4, is 8; seed was 42, is 1")):
        prepare(options(text, select_topk="8"), training(tmp_path, resume=True, seed=1))


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
    ("switch", {"switch_step": 2}, {}, "switch_step was None, is 2"),
    ("dense", {"dense_only": True}, {}, "dense_only was False, is True"),
]


@pytest.fixture(scope="module")
def saved(tmp_path_factory, text):
    folder = tmp_path_factory.mktemp("saved")
    pretrain(options(text), training(folder, save_strategy="steps", save_steps=2))
    return folder


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
    with pytest.raises(FileExistsError, match="there are later ones, checkpoint-5, .* or go on in a new output_dir"):
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


def test_what_a_run_says(tmp_path, text):
    said = str(prepare(options(text), training(tmp_path)))
    for part in (
        "5 steps of 128 tokens: 3 with Lighthouse (dense layers at each end: 1), 2 dense",
        "measured with dense",
    ):
        assert part in said
    assert "dense attention is as fast" in said  # at 128 tokens


@pytest.mark.parametrize("checkpointing, graphs", [(False, 3), (True, 4)], ids=["plain", "activation_checkpointing"])
def test_compiled_layers(tmp_path, text, monkeypatch, checkpointing, graphs):
    """Two graphs to train with, Lighthouse's and the dense one, for all layers and both stages, and what evaluates:
    with checkpointing the first layer's input asks for a gradient there too."""
    plain_compile = torch.nn.Module.compile
    quick = {"backend": "aot_eager"}
    monkeypatch.setattr(torch.nn.Module, "compile", lambda self, **options: plain_compile(self, **options, **quick))
    changes = {CHECKPOINTING: checkpointing}
    eager = pretrain(options(text), training(tmp_path / "eager", **changes))
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    compiled = pretrain(options(text, compile_layers=True), training(tmp_path / "compiled", **changes))
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == graphs
    assert [p.loss for p in compiled.held_out] == pytest.approx([p.loss for p in eager.held_out], rel=1e-4)
    model = AutoModelForCausalLM.from_pretrained(compiled.model_folder)
    assert list(model.state_dict()) == list(new_model("nano", CONTEXT, 0).state_dict())


def test_a_run_with_callbacks_of_the_callers_that_keeps_no_model(tmp_path, text):
    losses = []

    class Watch(TrainerCallback):
        def on_evaluate(self, args, state, control, metrics=None, **kwargs):
            losses.append(metrics["eval_loss"])

    result = prepare(options(text), training(tmp_path)).train(callbacks=[Watch()], keep_model=False)
    assert losses == [point.loss for point in result.held_out]
    assert result.model_folder is None and PretrainResult.load(tmp_path / "results.json") == result
    assert not (tmp_path / "model").exists()


@pytest.mark.parametrize("workers", [0, 1])
def test_a_run_whose_streamed_text_changes_says_where_it_can_go_on(tmp_path, workers):
    folder = write_text(tmp_path / "text", files=4, words=100)

    class Change(TrainerCallback):
        def on_step_begin(self, args, state, control, **kwargs):
            if state.global_step == 2:
                (folder / "00.txt").write_text("another text")

    run = prepare(
        options(folder, stream=True, held_out=1),
        training(tmp_path / "run", max_steps=99, save_strategy="steps", save_steps=1, dataloader_num_workers=workers),
    )
    said = (
        r"^data='[^\n]*00.txt' changed since this command found it: [^\n]* The last whole checkpoint is "
        r"[^\n]*/checkpoint-\d+: the same command with --resume goes on from there. It needs the text that [^\n]*$"
    )
    with pytest.raises(TextFailed, match=said) as ended:
        run.train(callbacks=[Change()])
    assert isinstance(ended.value, RunFailed)  # a sentence and exit status 1, and no traceback
