"""What a run adds to the Trainer, each by itself; and what it writes to TensorBoard and the terminal."""

from __future__ import annotations

import os
import signal
import time
from types import SimpleNamespace

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from transformers import TrainerState

from lighthouse.plan import plan
from lighthouse.training import pretrain
from lighthouse.training.callbacks import FirstNotFinite, Record, StopOnSignal, SwitchToDense, memory
from lighthouse.training.result import DENSE, LIGHTHOUSE, NotFinite
from small_llama import one_thread  # noqa: F401
from training_runs import CONTEXT, options, training, write_text


def test_tensorboard_has_what_the_run_logs(tmp_path):
    result = pretrain(
        options(write_text(tmp_path / "text")), training(tmp_path / "run", report_to="tensorboard", max_steps=4)
    )
    (events,) = (tmp_path / "run" / "runs").rglob("events.*")
    log = EventAccumulator(str(events)).Reload()
    values = {tag: {event.step: event.value for event in log.Scalars(tag)} for tag in log.Tags()["scalars"]}
    settings = plan(CONTEXT, pool_ratios=[0.5, 0.25], select_topk=4)  # as in training_runs
    # The switch is behind step 2 of 4.
    assert values["train/lighthouse"] == {1: 1, 2: 1, 3: 0, 4: 0}
    assert values["train/sub_length"] == {1: settings.length, 2: settings.length, 3: CONTEXT, 4: CONTEXT}
    assert values["train/kept_share"] == pytest.approx({1: settings.kept_share, 2: settings.kept_share, 3: 1, 4: 1})
    assert values["eval/loss"] == pytest.approx({point.step: point.loss for point in result.held_out})
    for tag in ("train/loss", "train/tokens_per_second", "train/resident_memory_gib", "train/learning_rate"):
        assert list(values[tag]) == [1, 2, 3, 4] and all(torch.isfinite(torch.tensor(list(values[tag].values()))))


@pytest.mark.parametrize("bar", [True, False], ids=["above_the_bar", "without_a_bar"])
def test_a_line_per_log(tmp_path, capsys, bar):
    pretrain(options(write_text(tmp_path / "text")), training(tmp_path / "run", max_steps=2, disable_tqdm=not bar))
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("step ")]
    kept = plan(CONTEXT, pool_ratios=[0.5, 0.25], select_topk=4)
    parts = [
        ("step 1/2  Lighthouse  loss ", " tokens/s", "resident ", f"kept {kept.kept_share:.1%}  S {kept.length}"),
        ("step 1/2  dense held-out loss ",),
        ("step 2/2  dense       loss ", " tokens/s", " GiB"),
        ("step 2/2  dense held-out loss ",),
    ]
    assert len(lines) == len(parts)
    for line, wanted in zip(lines, parts, strict=True):
        assert line.startswith(wanted[0]) and all(part in line for part in wanted), line


def model_in(stage: str):
    return SimpleNamespace(lighthouse_enabled=stage == LIGHTHOUSE)


def test_a_step_counts_for_what_the_model_did_in_it_and_not_for_what_was_planned():
    record, state = Record(switch_step=2), SimpleNamespace(global_step=0, stateful_callbacks={})
    args = SimpleNamespace(device=torch.device("cpu"))
    record.on_train_begin(args, state, None)
    for state.global_step, stage in enumerate((LIGHTHOUSE, DENSE, DENSE), 1):
        record.on_step_end(args, state, None, model=model_in(stage))
    assert {name: stage["steps"] for name, stage in record.stages.items()} == {LIGHTHOUSE: 1, DENSE: 2}


def test_compiling_is_not_training():
    import torch._dynamo

    def slowly(graph, inputs):
        time.sleep(0.5)
        return graph.forward

    record, state = Record(), TrainerState(global_step=1)
    args = SimpleNamespace(device=torch.device("cpu"))
    start = time.perf_counter()
    record.on_train_begin(args, TrainerState(), None)
    torch.compile(lambda x: 2 * x, backend=slowly)(torch.ones(1))
    record.on_step_end(args, state, None, model=model_in(DENSE))
    assert 0 <= record.seconds <= time.perf_counter() - start - 0.5


def test_memory_is_what_the_process_holds():
    before = memory()["resident_memory_gib"]
    held = torch.ones(2**26)  # a quarter of a GiB
    assert memory()["resident_memory_gib"] - before == pytest.approx(held.nbytes / 2**30, abs=0.1)


def test_the_peak_of_a_stage_is_of_its_steps_alone():
    record, state = Record(switch_step=1), SimpleNamespace(global_step=0, stateful_callbacks={})
    args = SimpleNamespace(device=torch.device("cpu"))
    record.on_train_begin(args, state, None)
    if not record._peaks:
        pytest.skip("the kernel does not let a process reset its peak")

    def step(number: int, mib: int) -> int:
        torch.ones(mib * 2**18)  # freed at once
        state.global_step = number
        record.on_step_end(args, state, None, model=model_in(record.stage_of(number)))
        return record.stages[record.stage_of(number)]["peak_memory"] / 2**20

    first = step(1, 300)
    torch.ones(900 * 2**18)
    record.on_evaluate(args, state, None, metrics={"eval_loss": 1.0})
    second = step(2, 100)
    assert first - second == pytest.approx(200, abs=40)
    assert step(3, 600) - first == pytest.approx(300, abs=40) and step(4, 1) == step(3, 1)


def steps(*values, what="loss") -> FirstNotFinite:
    first = FirstNotFinite("cpu")
    for step, value in enumerate(values, 1):
        first.note(what, value, step)
    return first


NAN, INF = torch.tensor(float("nan")), torch.tensor(float("inf"))
NOT_FINITE = [
    ("none", steps(torch.tensor(1.0), torch.tensor(-2.0)), None),
    ("the_first_of_two", steps(torch.tensor(1.0), NAN, torch.tensor(1.0), INF), (2, "loss")),
    ("a_gradient", steps(torch.tensor(1.0), INF, what="gradient norm"), (2, "gradient norm")),
    ("a_plain_number", steps(1.0, float("-inf"), what="gradient norm"), (2, "gradient norm")),
]


@pytest.mark.parametrize("first, expected", [n[1:] for n in NOT_FINITE], ids=[n[0] for n in NOT_FINITE])
def test_the_first_step_that_is_not_finite(first, expected):
    assert first.found() == expected


def test_the_first_in_any_process_counts():
    first, other = steps(torch.tensor(1.0), torch.tensor(1.0), NAN), steps(torch.tensor(1.0), INF)
    assert first.found(lambda mine: torch.cat([mine, other.steps[None]])) == (2, "loss")


def test_a_held_out_loss_that_is_not_finite_ends_the_run():
    with pytest.raises(NotFinite, match="step 7: the held-out loss is nan"):
        Record().on_evaluate(None, SimpleNamespace(global_step=7), None, metrics={"eval_loss": float("nan")})


ARGS = SimpleNamespace(world_size=1)


def at_step(stop: StopOnSignal, step: int, last: int = 5):
    control = SimpleNamespace(should_save=False)
    stop.on_step_end(ARGS, SimpleNamespace(global_step=step, max_steps=last), control)
    return stop.agreed, control.should_save


@pytest.mark.parametrize("number", StopOnSignal.SIGNALS, ids=lambda number: number.name)
def test_a_signal_saves_behind_the_step(number, capfd):
    before = signal.getsignal(number)
    with StopOnSignal() as stop:
        assert at_step(stop, 1) == (False, False)
        os.kill(os.getpid(), number)
        assert at_step(stop, 2) == (True, True)
    assert signal.getsignal(number) is before
    assert f"{number.name}: saves a checkpoint behind this step" in capfd.readouterr().err


def test_a_signal_in_the_last_step_lets_the_run_end():
    with StopOnSignal() as stop:
        os.kill(os.getpid(), signal.SIGTERM)
        assert at_step(stop, 5) == (False, False)


def test_the_same_signal_twice_at_once_is_one():
    with StopOnSignal() as stop:
        for _ in range(2):
            os.kill(os.getpid(), signal.SIGTERM)
        assert at_step(stop, 1) == (True, True)


def test_the_switch_goes_by_the_step_alone():
    class Model:
        lighthouse_enabled = True

        def lighthouse(self, enabled):
            self.lighthouse_enabled = enabled

    class State:
        global_step = 7

    model, switch = Model(), SwitchToDense(8)
    switch.on_step_begin(None, State, None, model=model)
    assert model.lighthouse_enabled
    State.global_step = 8
    switch.on_step_begin(None, State, None, model=model)
    assert not model.lighthouse_enabled
    State.global_step = 2  # an earlier checkpoint
    switch.on_step_begin(None, State, None, model=model)
    assert model.lighthouse_enabled


def test_the_first_step_of_the_dense_stage():
    record = Record(switch_step=3)
    assert [record.stage_of(step) for step in (1, 3, 4)] == ["lighthouse", "lighthouse", "dense"]
