"""What a run adds to the Trainer, each by itself; and what it writes to TensorBoard and the terminal."""

from __future__ import annotations

import json
import os
import signal
import time
from types import SimpleNamespace

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from transformers import TrainerControl, TrainerState

from lighthouse.core.method import plan
from lighthouse.huggingface.state import Used
from lighthouse.huggingface.steps import Steps, not_as_wished, not_ready
from lighthouse.huggingface.switch import SwitchToDense
from lighthouse.training import pretrain
from lighthouse.training.callbacks import FirstNotFinite, PlainLines, Record, StopOnSignal, memory
from lighthouse.training.result import DENSE, LIGHTHOUSE, NotFinite
from small_llama import wrapped
from training_runs import CONTEXT, options, training, write_text

pytestmark = pytest.mark.usefixtures("one_thread")


def test_tensorboard_has_what_the_run_logs(tmp_path):
    result = pretrain(
        options(write_text(tmp_path / "text")), training(tmp_path / "run", report_to="tensorboard", max_steps=4)
    )
    (events,) = (tmp_path / "run" / "runs").rglob("events.*")
    log = EventAccumulator(str(events)).Reload()
    values = {tag: {event.step: event.value for event in log.Scalars(tag)} for tag in log.Tags()["scalars"]}
    settings = plan(CONTEXT, pool_ratios=[0.5, 0.25], select_topk=4)  # as in training_runs
    # The switch is after step 2 of 4.
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


ARGS_CPU = SimpleNamespace(device=torch.device("cpu"))


class Model:
    """Of a wrapped model, what its training forwards ran in each step."""

    def __init__(self, *steps: tuple[bool, bool]):
        self.steps = [(False, False), *steps]  # none before the first

    def take_used(self):
        return Used(*self.steps.pop(0))


ACTED, NOT, BOTH = (True, False), (False, True), (True, True)


def recorded(*steps, switch_step: int) -> Record:
    """The record of a run whose steps went so."""
    record, state, model = Record(switch_step), TrainerState(), Model(*steps)
    record.on_train_begin(ARGS_CPU, state, None, model=model)
    for state.global_step in range(1, len(steps) + 1):
        record.on_step_end(ARGS_CPU, state, None, model=model)
    return record


STEPS = [
    ("as_planned", [ACTED, ACTED, NOT], 2, (2, 1, 0, 2), []),
    ("never_acted", [NOT, NOT, NOT], 2, (0, 3, 0, 0), ["never acted: it was on in 2 steps"]),
    ("acted_in_one_of_two", [NOT, ACTED, NOT], 2, (1, 2, 0, 2), ["acted in 1 of the 2 steps in which it was"]),
    ("with_dense_forwards", [BOTH, ACTED, NOT], 2, (2, 1, 1, 2), ["In 1 of the 2 steps with Lighthouse some"]),
    ("planned_dense", [NOT], 0, (0, 1, 0, 0), []),
]


@pytest.mark.parametrize("steps, planned, counted, said", [s[1:] for s in STEPS], ids=[s[0] for s in STEPS])
def test_a_step_counts_for_what_its_forwards_did_and_not_for_what_was_planned(steps, planned, counted, said):
    record = recorded(*steps, switch_step=planned)
    assert record.steps_used == Steps(*counted)
    stages = {name: stage["steps"] for name, stage in record.stages.items()}
    assert stages == {name: n for name, n in ((LIGHTHOUSE, counted[0]), (DENSE, counted[1])) if n}
    found = not_as_wished(planned, record.steps_used)
    assert len(found) == len(said) and all(part in sentence for part, sentence in zip(said, found, strict=True))


READY = [
    ("no_dense_stage", (30, 30, 30), "All 30 steps of these weights used Lighthouse"),
    ("an_earlier_checkpoint", (4, 30, 30), "All 4 steps of these weights used Lighthouse"),
    ("dense_steps_before_alone", (30, 30, 7), "was used up to the last of the 30 steps"),
    ("too_short_a_dense_stage", (100, 96, 96), "only the last 4 were dense: with less than 5%"),
    ("a_dense_stage", (100, 95, 95), None),
    ("never_with_it", (100, 0, 0), None),
    ("no_step_at_all", (0, 0, 0), None),
]


@pytest.mark.parametrize("numbers, said", [r[1:] for r in READY], ids=[r[0] for r in READY])
def test_what_keeps_weights_from_use(numbers, said):
    found = not_ready(*numbers)
    assert len(found) == (said is not None) and (said is None or said in found[0])


def test_a_log_over_the_switch_is_of_both(capsys):
    record = recorded(ACTED, ACTED, NOT, switch_step=2)
    logs = {"loss": 1.0, "learning_rate": 0.1, "lighthouse": record.lighthouse_share(3)}
    assert logs["lighthouse"] == pytest.approx(2 / 3) and record.lighthouse_share(3) == 0
    PlainLines().on_log(None, TrainerState(global_step=3, max_steps=9, is_world_process_zero=True), None, logs=logs)
    assert "step 3/9  both        loss 1.0000" in (said := capsys.readouterr().out)
    assert "Lighthouse in 67% of these steps" in said


def test_a_resumed_run_logs_what_an_undisturbed_one_does():
    """A checkpoint may lie in the middle of what a log is of; one of an earlier version knows the stages alone."""
    record = recorded(ACTED, ACTED, ACTED, switch_step=4)
    record._logged = 2, 2
    saved = json.loads(json.dumps(record.state()))
    resumed = Record(4)
    resumed.on_train_begin(ARGS_CPU, TrainerState(global_step=3, stateful_callbacks={"Record": saved}), None)
    assert resumed.steps_used == record.steps_used and resumed._logged == record._logged
    del saved["attributes"]["steps_used"], saved["attributes"]["logged"]
    resumed.on_train_begin(ARGS_CPU, TrainerState(global_step=3, stateful_callbacks={"Record": saved}), None)
    assert resumed.steps_used == Steps(lighthouse=3, last=3)


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
    record.on_step_end(args, state, None, model=Model())
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
        model = Model()
        model.steps = [ACTED if number == 1 else NOT]
        record.on_step_end(args, state, None, model=model)
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
    if number == signal.SIGINT:
        signal.signal(number, signal.default_int_handler)  # ignored where the tests run in the background
    before = signal.getsignal(number)
    with StopOnSignal() as stop:
        assert at_step(stop, 1) == (False, False)
        os.kill(os.getpid(), number)
        assert at_step(stop, 2) == (True, True)
    assert signal.getsignal(number) is before
    name = "Ctrl-C" if number == signal.SIGINT else number.name
    assert f"{name}: the run will save a checkpoint after this step and exit" in capfd.readouterr().err


def test_ctrl_c_that_a_background_job_ignores_stays_ignored():
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        with StopOnSignal() as stop:
            os.kill(os.getpid(), signal.SIGINT)
            assert at_step(stop, 2) == (False, False)
    finally:
        signal.signal(signal.SIGINT, before)


def test_a_study_ends_at_ctrl_c_at_once():
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        with StopOnSignal(StopOnSignal.SYSTEMS), pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)
            time.sleep(1)
    finally:
        signal.signal(signal.SIGINT, before)


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
    model, switch = wrapped(), SwitchToDense(8)

    class State:
        global_step = 7

    switch.on_step_begin(None, State, None, model=model)
    assert model.lighthouse_enabled
    State.global_step = 8
    switch.on_step_begin(None, State, None, model=model)
    assert not model.lighthouse_enabled
    State.global_step = 2  # an earlier checkpoint
    switch.on_step_begin(None, State, None, model=model)
    assert model.lighthouse_enabled


SAVES = [
    ("at_the_switch", 3, False, True, (True, True)),
    ("at_any_evaluation", 2, True, True, (True, True)),
    ("at_a_step_that_is_none", 2, False, True, (False, False)),
    ("where_the_best_is_not_asked_for", 3, False, False, (True, False)),
]


@pytest.mark.parametrize("step, evaluates, best, expected", [s[1:] for s in SAVES], ids=[s[0] for s in SAVES])
def test_what_may_be_the_best_is_saved(step, evaluates, best, expected):
    control = TrainerControl(should_evaluate=evaluates)
    args = SimpleNamespace(eval_strategy="steps", load_best_model_at_end=best)
    SwitchToDense(3, each_loss_saved=True).on_step_end(args, TrainerState(global_step=step), control)
    assert (control.should_evaluate, control.should_save) == expected


def test_the_first_step_of_the_dense_stage():
    record = Record(switch_step=3)
    assert [record.stage_of(step) for step in (1, 3, 4)] == ["lighthouse", "lighthouse", "dense"]
