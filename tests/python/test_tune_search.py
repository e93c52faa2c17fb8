"""What a study searches: ranges, what is pointless, grids, how many steps a budget holds, and what is refused."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
from optuna.trial import FixedTrial

from lighthouse.core.method import Method
from lighthouse.core.settings import RECOMMENDED, SHARE
from lighthouse.studies import search
from lighthouse.studies.budget import seconds_of, steps_in
from lighthouse.studies.ranges import SHARES
from lighthouse.studies.search import Setting, Space, with_values
from lighthouse.studies.trial import Unequal
from lighthouse.studies.tune import TuneOptions
from lighthouse.training import PretrainOptions, TrainingOptions
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
    run = {"model": "tiny", "select_topk": "1024", "local_window": "256", "per_device_train_batch_size": 5}
    space = space_of(text, context=98_304, steps=200, **run)
    assert (space.levels, space.factors, space.topk, space.batches) == ((2, 5), (2, 10), (512, 4096), (5, 7))
    assert (space.windows, space.shares) == ((0, 128, 256, 512, 1024), (0.5, 0.6, 0.7, 0.8, 0.9))
    assert space.rates == pytest.approx((1.8e-3, 2.2e-3)) and not space.notes
    assert "local_window   0, 128, 256, 512 or 1,024 tokens, 0 with 1 of the 6 layers dense at each end" in str(space)
    assert "share          0.5, 0.6, 0.7, 0.8 or 0.9 of the steps" in str(space)


def test_what_is_tried_first_by_default_is_what_is_recommended(tmp_path):
    options = PretrainOptions(model="tiny")
    first = Space.of(options, TrainingOptions(output_dir=str(tmp_path), use_cpu=True), TuneOptions()).given
    assert (first.method, first.share) == (RECOMMENDED, SHARE) and options.dense_layers == 0


RANGES = [
    ("shorter_contexts_keep_the_share_of_parents", {"context": 49_152, "select_topk": "512"}, {}, "topk", (256, 2048)),
    ("the_given_number_of_parents_widens_it", {"select_topk": "30"}, {}, "topk", (3, 30)),
    ("the_given_ratios_widen_it", {"pool_ratios": ["1/16"]}, {}, "factors", (2, 16)),
    ("a_range_of_parents_as_shares", {}, {"topk": ["1/128", "1/32"]}, "topk", (4, 16)),
    ("a_range_of_ratios", {}, {"level_ratio": ["1/8", "0.25"]}, "factors", (4, 8)),
    ("a_single_value", {}, {"levels": [3]}, "levels", (3, 3)),
    ("windows_below_the_context", {}, {}, "windows", (0, 16, 128, 256)),
    ("windows_of_a_users_own", {}, {"local_windows": [64, 16]}, "windows", (16, 64)),
    ("the_given_window_alone", {}, {"fixed": ["local_window"]}, "windows", (16,)),
    ("a_window_that_is_alone_is_one", {"select_topk": "0"}, {"topk": ["0"]}, "windows", (16, 128, 256)),
    ("shares_that_leave_dense_steps", {}, {}, "shares", (0.5, 0.6)),
    ("shares_of_a_users_own", {"steps": 40}, {"shares": [0.9, 0.5]}, "shares", (0.5, 0.9)),
    ("the_given_share_among_the_usual", {"steps": 40, "share": 0.65}, {}, "shares", (0.5, 0.6, 0.65, 0.7, 0.8, 0.9)),
    ("of_seconds_the_steps_are_not_known", {}, {"judge": "time", "seconds": 9.0}, "shares", SHARES),
    ("no_share_where_a_step_switches", {"switch_step": 2}, {}, "shares", ()),
    ("never_without_a_pyramid", {}, {}, "alone", (False,)),
    ("also_without_a_pyramid", {}, {"topk": ["0", "4", "16"]}, "alone", (False, True)),
    ("parents_beside_no_pyramid", {}, {"topk": ["0", "4", "16"]}, "topk", (4, 16)),
    ("the_given_window_without_a_pyramid", {"select_topk": "0"}, {}, "alone", (False, True)),
    ("always_without_a_pyramid", {"select_topk": "0"}, {"fixed": ["select_topk"]}, "alone", (True,)),
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
    found = space_of(text).pointless(Setting(method, 0.5, 1e-3, 1))
    assert found is None if why is None else why in found


def test_a_window_as_long_as_the_context_is_pointless(text):
    space = space_of(text)
    whole = replace(space.given, method=Method(local_window=512, select_topk=0))
    assert "dense attention: local_window=512 covers all 512 tokens" in space.pointless(whole)
    assert space.pointless(replace(whole, method=Method(local_window=511, select_topk=0))) is None


DENSE_LAYERS = [
    # the given setting's window and dense layers (None: not given), and those of a setting with this window
    ("none_beside_a_window", 16, None, 128, 0),
    ("by_the_published_rule_without_one", 16, None, 0, 1),
    ("none_beside_a_window_where_the_given_has_none", 0, None, 128, 0),
    ("a_users_number_in_all", 16, 1, 128, 1),
    ("a_users_number_without_a_window_too", 0, 0, 0, 0),
]


@pytest.mark.parametrize(
    "given, dense, window, expected", [d[1:] for d in DENSE_LAYERS], ids=[d[0] for d in DENSE_LAYERS]
)
def test_dense_layers_follow_from_each_settings_window(text, given, dense, window, expected):
    run = {"local_window": str(given), "dense_layers": dense, "steps": 40}
    space = space_of(text, **run)
    setting = replace(space.given, method=replace(space.given.method, local_window=window), share=0.7)
    options, training = with_values(*asked(text, Path("unused"), **run)[:2], space.values(setting))
    assert options.dense_layers == expected and options.method == setting.method
    assert options.share == 0.7 and options.lighthouse_steps(40, 512) == 28


def proposed(space: Space, **changes) -> Setting:
    return space.suggest(FixedTrial(space.parameters(space.given) | changes))


def test_the_window_alone_is_one_setting_without_levels_and_parents(text):
    space = space_of(text, {"topk": ["0", "4", "16"]})
    alone = proposed(space, local_window=128, window_alone=True)
    assert (alone.method.select_topk, alone.method.local_window) == (0, 128)
    assert str(alone) == "window alone  local_window 128  share 0.5  rate 0.002  batch 1"
    kept = space.parameters(alone)
    assert kept == {"local_window": 128, "window_alone": True, "share": 0.5, "learning_rate": 0.002}
    assert space.suggest(FixedTrial(kept)) == alone and space.pointless(alone) is None
    assert proposed(space, local_window=0).method.chooses  # nothing else is left there
    assert "select_topk    0, the local window alone, or 4 to 16 parents per level" in str(space)
    assert sum(not point.method.chooses for point in space.grid(3, seed=0)) == 3 * 2 * 3  # windows, shares, rates


def test_a_given_window_alone_stays_as_it_was_written(text):
    space = space_of(text, select_topk="0", pool_ratios=["0.2501", "1/16"])
    assert proposed(space) == space.given and space.given.method == Method([0.2501, 1 / 16], 0, local_window=16)
    both = proposed(space, window_alone=False, levels=3, factor_1=4, factor_2=4, select_topk=8)
    assert both.method == Method([0.2501, 1 / 16], 8, local_window=16)


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
    assert given == space.given and given.method == Method([0.2501, 1 / 16], topk, local_window=16)


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
    # levels, ratios, parents, rates, windows, shares
    assert len(points) == 2 * 3 * 3 * 3 * 4 * 2 == len({str(space.parameters(point)) for point in points})
    assert {(point.method.local_window, point.share) for point in points} == {
        (window, share) for window in (0, 16, 128, 256) for share in (0.5, 0.6)
    }
    assert {point.method.windows[1:] for point in points} == {(2,), (4,), (8,), (2, 4), (4, 16), (8, 64)}
    assert sorted({point.learning_rate for point in points}) == pytest.approx([1.8e-3, 2e-3, 2.2e-3])
    assert points != space.grid(3, seed=1) and points == space.grid(3, seed=0)


def test_the_given_learning_rate_is_one_of_a_grids_to_the_last_bit(text):
    fixed = ["pool_ratios", "select_topk", "local_window", "share", "batch"]
    space = space_of(text, {"fixed": fixed}, learning_rate=3e-4)
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
    ("by_its_own_share", {"share": 0.9}, 45 * 0.1 + 5 * 0.3, PER_STEP, 50),
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
    ("all_fixed", {}, {"fixed": list(search.RANGES)}, "nothing is left to search"),
    (
        "given_window_not_tried",
        {},
        {"local_windows": [0, 64]},
        "has 16, which is not among 0 64: give another with --lo",
    ),
    ("a_window_below_0", {}, {"local_windows": [16, -1]}, "local_window=-1: 0 (none) to 2^31 tokens"),
    ("fixed_with_candidates", {}, {"fixed": ["share"], "shares": [0.5]}, "shares is a range of share"),
    ("given_share_not_tried", {}, {"shares": [0.6, 0.7]}, "shares: the given setting, which is tried first, has 0.5"),
    ("a_share_without_dense_steps", {}, {"shares": [0.5, 1.0]}, "shares=1.0: a share of the steps above 0 and below 1"),
    ("a_share_with_few_dense_steps", {}, {"shares": [0.5, 0.8]}, "shares=0.8: 4 steps, 3 with Lighthouse and 1 dense"),
    ("shares_and_a_step", {"switch_step": 2}, {"shares": [0.5]}, "shares with switch_step or switch_tokens"),
    ("given_parents_and_none_tried", {}, {"topk": ["0"]}, "has 8, outside 0: give another with --select_topk"),
    ("given_alone_not_tried", {"select_topk": "0"}, {"topk": ["4", "16"]}, "has 0, outside 4 to 16"),
    (
        "neither_window_nor_pyramid",
        {"local_window": "0"},
        {"topk": ["0", "4", "16"], "fixed": ["local_window"]},
        "topk=0",
    ),
    (
        "no_window_alone",
        {"select_topk": "0"},
        {"topk": ["0"], "local_windows": [0, 16]},
        "local_windows=0: select_topk=0",
    ),
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
