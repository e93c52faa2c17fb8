"""What a study found: which trials count, what its page says of them, when trials are judged and pruned."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import optuna
import pytest
import torch

from lighthouse.report.studied import StudyResult, Trial, judged
from lighthouse.report.study import nothing_known, of_the_given, page_of
from lighthouse.report.study_picture import slices
from lighthouse.studies.storage import importance
from lighthouse.studies.trial import Judge
from lighthouse.training.result import HeldOut


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
    ("more_time", "time", {"seconds": 27.0}, "it had 27.0 s instead of 10.0 (+170%; 10% is allowed)"),
    ("less_time", "time", {"seconds": 7.0}, "it had 7.0 s instead of 10.0 (-30%"),
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
    found = judged(trials, judge, 10.0 if judge == "time" else 10_000)
    result = StudyResult("study", judge, 10.0, "tpe", "a device", found, {}, [])
    assert [trial.state for trial in found[:3]] == ["complete"] * 3
    assert (found[3].state == "not comparable") == (why is not None)
    if why is not None:
        assert why in found[3].why and result.best.number == 2 and found[3] not in result.front
        text = page_of(result, Path("best.yaml")).markdown()
        assert "1 of 4 did not meet this and cannot be the best" in text
        assert "3 complete, 1 not comparable" in text and found[3].why[:60] in text.replace("\u00a0", " ")


def test_where_nothing_is_comparable_and_where_the_given_setting_is_not():
    trials = [trial_of(0, state="not comparable", why="it had 27.0 s instead of 10.0"), trial_of(1)]
    result = StudyResult("study", "time", 10.0, "tpe", "a device", trials, {}, [])
    assert "whether this is better than the given setting: not comparable: it had 27.0 s" in of_the_given(result)
    assert of_the_given(result) in page_of(result, Path("best.yaml")).markdown()
    none = StudyResult("study", "time", 10.0, "tpe", "a device", trials[:1], {}, [])
    assert none.best is None and nothing_known(none) in page_of(none, None).markdown()
    assert "use --judge tokens" in nothing_known(none)


class DenseModel:
    """Says of each step that its forwards were dense."""

    def take_used(self):
        return SimpleNamespace(lighthouse=0, dense=1)


ARGS = SimpleNamespace(device=torch.device("cpu"))


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


def test_the_page_shows_whatever_settings_of_the_method_there_are():
    """What differs is a column, what is alike is said once; the best trial's are all there."""
    options = trial_of().options
    trials = [trial_of(n, options=options | {"cover_start": n < 2, "select_topk": 1 / 64}) for n in range(3)]
    text = page_of(StudyResult("study", "time", 10.0, "tpe", "a device", trials, {}, []), Path("best.yaml")).markdown()
    assert "| trial | loss | cover_start | time |" in text
    assert "The same in all trials: pool_ratios 1/4, select_topk 1/64, local_window 0, learning_rate 0.001" in text
    for row in (
        "| local_window | 0 | 0 |",
        "| pool_ratios | 1/4 | 1/4 |",
        "| cover_start | False | True |",
        "| rows | 1 | 1 |",
    ):
        assert row in text, row


def test_trials_of_an_earlier_version_are_read_as_they_were_kept():
    numbers = {"pool_ratios": [0.25], "select_topk": 0.015625, "learning_rate": 1e-3}
    texts = trial_of(options=numbers).texts
    method = {"pool_ratios": "1/4", "select_topk": "1/64", "cover_start": "True", "local_window": "0"}
    assert texts == method | {"learning_rate": "0.001"}


def test_a_trial_is_pruned_by_the_losses_behind_the_switch():
    """The switch is at step 6 of 10: evaluations at 7, 8, 9 and 10, and the first of them prunes nothing."""
    study = optuna.create_study(pruner=optuna.pruners.MedianPruner(n_startup_trials=1))

    def ends(worse: float, before: int = 0) -> list[int]:
        """The steps at which a trial is evaluated."""
        trial, steps = study.ask(), []
        judge = Judge(trial, switch_step=6, steps=10, evaluations=4, status=lambda line: None, what="", before=before)
        state = SimpleNamespace(max_steps=10, global_step=0, stateful_callbacks={}, log_history=[])
        judge.on_train_begin(ARGS, state, None)
        for state.global_step in range(1, 11):
            control = SimpleNamespace(should_log=False, should_evaluate=False, should_save=False)
            judge.on_step_end(ARGS, state, control, model=DenseModel())
            if control.should_evaluate:
                steps.append(state.global_step)
                judge.on_evaluate(ARGS, state, control, metrics={"eval_loss": worse + 10 / state.global_step})
        study.tell(trial, 1.0)
        return steps

    assert ends(0) == [7, 8, 9, 10]
    with pytest.raises(optuna.TrialPruned, match="at step 8 of 10"):
        ends(9)
    assert ends(9, before=4) == [7, 8, 9, 10]  # of another share, whose losses are of other places of the schedule
    with pytest.raises(optuna.TrialPruned, match="at step 8 of 10"):
        ends(18, before=4)


def test_a_candidate_that_decides_the_loss_is_the_most_important():
    """Of 14 trials: the six without a window are all better than the others, and nothing else matters."""
    study = optuna.create_study(sampler=optuna.samplers.RandomSampler(seed=0))
    for window in 6 * [0] + 2 * [128, 256, 512, 1024]:
        study.enqueue_trial({"local_window": window})
        trial = study.ask()
        window = trial.suggest_categorical("local_window", (0, 128, 256, 512, 1024))
        noise = trial.suggest_int("select_topk", 11, 85, log=True) + 1000 * trial.suggest_float("rate", 1e-3, 2e-3)
        study.tell(trial, (3.0 if window == 0 else 3.1) + noise / 10_000)
    found = importance(study, [trial_of(number) for number in range(14)])
    assert max(found, key=found.get) == "local_window" and sum(found.values()) == pytest.approx(1)


def test_the_pictures_show_a_parameter_of_the_trials_that_have_it():
    """A local window alone has no levels; windows have places of their own, since 0 has no logarithm."""
    parameters = [
        {"local_window": 256, "window_alone": True, "share": 0.5},
        {"local_window": 0, "levels": 2, "factor_1": 4, "select_topk": 8, "share": 0.6},
        {"local_window": 256, "window_alone": False, "levels": 3, "factor_1": 4, "factor_2": 2, "select_topk": 8},
    ]
    trials = [trial_of(number, parameters=its) for number, its in enumerate(parameters)]
    drawn = slices(StudyResult("study", "time", 10.0, "tpe", "a device", trials, {}, [])).axes
    shown = {axes.get_xlabel(): [point[0] for point in axes.collections[0].get_offsets().tolist()] for axes in drawn}
    assert shown == {
        "levels": [2, 3],
        "coarsest window, tokens": [4, 8],
        "local_window, tokens": [1, 0, 1],
        "share of the steps": [0.5, 0.6],
    }
    window = next(axes for axes in drawn if axes.get_xlabel().startswith("local_window"))
    assert [label.get_text() for label in window.get_xticklabels()] == ["0", "256"]
