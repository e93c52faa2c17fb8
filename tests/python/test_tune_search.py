"""What a study searches: ranges, what is pointless, grids, how many steps a budget holds, and what is refused."""

from __future__ import annotations

from pathlib import Path

import pytest
from optuna.trial import FixedTrial

from lighthouse.core.method import Method
from lighthouse.studies import search
from lighthouse.studies.budget import seconds_of, steps_in
from lighthouse.studies.search import Setting, Space, with_values
from lighthouse.studies.trial import Unequal
from lighthouse.training import run as run_module
from tune_studies import asked, count_few_steps, study_of

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module", autouse=True)
def few_steps():
    with pytest.MonkeyPatch.context() as patch:
        count_few_steps(patch)
        yield


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
    assert "per_device_train_batch_size=2" in str(space) and "not searched" in str(space)


POINTLESS = [
    ("more_parents_than_entries", (4, 16), 64, "parents per level were asked for, but the coarsest level has only 32"),
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


def test_what_is_not_searched_of_the_method_is_that_of_each_setting(text):
    space = space_of(text, {"levels": [2, 3], "topk": ["4", "16"]}, cover_start=False)
    settings = [space.given, *space.grid(3, seed=0), space.suggest(FixedTrial(space.parameters(space.given)))]
    assert not any(setting.method.cover_start for setting in settings)
    assert "cover_start False" in str(space.given) and space.values(space.given)["cover_start"] is False
    options, training = with_values(*asked(text, Path("unused"))[:2], space.values(settings[-2]))
    assert options.method == settings[-2].method and training.learning_rate == settings[-2].learning_rate


AS_WRITTEN = [
    ("a_share", {"select_topk": "1/64"}, 1 / 64),
    ("a_number", {"select_topk": "8"}, 8),
]


@pytest.mark.parametrize("run, topk", [a[1:] for a in AS_WRITTEN], ids=[a[0] for a in AS_WRITTEN])
def test_the_given_setting_is_tried_as_it_was_written(text, run, topk):
    space = space_of(text, pool_ratios=["0.2501", "1/16"], **run)
    given = space.suggest(FixedTrial(space.parameters(space.given)))
    assert given == space.given and given.method == Method([0.2501, 1 / 16], topk)


def test_levels_longer_than_any_text_are_left_out(text):
    space = space_of(text, {"levels": [2, 8], "level_ratio": ["1/64", "1/2"]})
    longest = {"levels": 8} | {f"factor_{level}": 64 for level in range(1, 8)}
    setting = space.suggest(FixedTrial(space.parameters(space.given) | longest))
    assert setting.method.windows == tuple(64**level for level in range(7))
    assert "dense attention: the coarsest window" in space.pointless(setting)


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


# How many steps a budget holds

PER_STEP = {"lighthouse": 0.1, "dense": 0.3}
STEPS = [
    ("as_many_as_take_the_time", {}, 10 * 0.1 + 10 * 0.3, PER_STEP, 20),
    ("to_the_nearest", {}, 4.1, PER_STEP, 20),
    ("by_a_switch_at_a_step", {"switch_step": 10}, 10 * 0.1 + 5 * 0.3, PER_STEP, 15),
    ("tokens", {}, 20 * 512, None, 20),
    ("tokens_of_larger_batches", {"per_device_train_batch_size": 3}, 20 * 512, None, 7),
]


@pytest.mark.parametrize("run, budget, per_step, steps", [s[1:] for s in STEPS], ids=[s[0] for s in STEPS])
def test_how_many_steps_a_budget_holds(text, run, budget, per_step, steps):
    options, training, _ = asked(text, Path("unused"), **run)
    assert steps_in(budget, options, training, per_step) == steps
    if per_step is not None:
        assert seconds_of(options, training, steps, per_step) == pytest.approx(budget, abs=max(per_step.values()) / 2)


TOO_FEW = [
    ("tokens", {"switch_step": 2, "per_device_train_batch_size": 2}, 2048, None, "2,048 tokens are 2 steps, 2 with"),
    ("seconds", {"switch_step": 1000}, 0.3, PER_STEP, "0.3 s are 3 steps, 3 with Lighthouse and 0 dense"),
]


@pytest.mark.parametrize("run, budget, per_step, why", [t[1:] for t in TOO_FEW], ids=[t[0] for t in TOO_FEW])
def test_a_budget_of_too_few_steps(text, run, budget, per_step, why):
    options, training, _ = asked(text, Path("unused"), **run)
    with pytest.raises(Unequal) as refused:
        steps_in(budget, options, training, per_step)
    assert why in str(refused.value)


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
    ("few_steps", {"steps": 3}, {}, "needs at least 4, one with Lighthouse and 2 dense; use more --max_steps"),
    ("a_checkpoint", {"resume_from_checkpoint": "there"}, {}, "resume_from_checkpoint='there'"),
    ("short_contexts", {"context": 128}, {}, "context=128: below 512 tokens dense attention is as fast on cpu"),
    ("nothing_sensible", {"select_topk": "60"}, {"topk": ["60", "4096"]}, "no setting is worth training"),
    ("given_outside_a_range", {}, {"topk": ["16", "32"]}, "has 8, outside 16 to 32: give another with --select_topk"),
    ("given_ratio_outside", {}, {"level_ratio": ["1/3", "1/2"]}, "has 1/4, outside 1/2 to 1/3"),
    ("ratio_above_a_half", {}, {"level_ratio": ["0.9"]}, "level_ratio=0.9: ratios above 0 and up to 1/2"),
    ("a_range_backwards", {}, {"levels": [5, 2]}, "levels=5 2: one value, or the lower and the upper end"),
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
