"""What a comparison's report makes of numbers: the checklist, when the baseline's loss is passed, the recovery.

Here with two arms; `test_compare_standings.py` has more.
"""

from __future__ import annotations

from dataclasses import replace

import pytest

from lighthouse.export.export import Exported
from lighthouse.export.plain import Inference, Speed
from lighthouse.report.checklist import checklist, passing, recovery
from lighthouse.report.compared import Comparison, Pair, Recovery, Seed, Stripped, recovery_of
from lighthouse.report.comparison import page
from lighthouse.training import PretrainResult
from lighthouse.training.result import HeldOut, Stage
from training_runs import CHECKPOINTING

SETTINGS = {
    "model": "nano",
    "context": 128,
    "pool_ratios": [0.5, 0.25],
    "select_topk": 4,
    "dense_layers": 1,
    "tokens_per_step": 128,
    "learning_rate": 0.002,
    "device": "cpu",
    "rows": "these",
    CHECKPOINTING: False,
}


def run_named(name: str) -> PretrainResult:
    return PretrainResult(name, "", 128, 0, 0, 0, {}, [], SETTINGS, device="a device")


SPEED = Speed(96, 0.1, 0.01)
EMPTY = Comparison(
    layers=4,
    seeds=[Seed(seed, {arm: run_named(arm) for arm in ("dense", "lighthouse")}) for seed in (0, 1)],
    stripped=Stripped(
        seed=0,
        exported=Exported("model", "run", "LlamaForCausalLM", 10**6, "float32", None, 20, 12, 10**6, "the same", []),
        inference=Inference("cpu", "float32", 32, 9, SPEED, SPEED, True, {"torch": 3, "transformers": 2}, []),
        card_names=["the settings"],
        card_lacks=[],
    ),
)


def changed(found, lighthouse=None, baseline=None, **stripped):
    changes = {"dense": baseline or {}, "lighthouse": lighthouse or {}}
    seeds = [
        replace(seed, runs={arm: replace(run, **changes[arm]) for arm, run in seed.runs.items()})
        for seed in found.seeds
    ]
    return replace(found, seeds=seeds, stripped=replace(found.stripped, **stripped))


LOSSES = (6, 5, 5, 5, 4, 3.5)


def run_of(lighthouse=0, dense=20, seconds=(1.0, 2.0), losses=LOSSES, acted=None, slow=(), **more) -> dict:
    """Of 20 steps, an evaluation each 4: `seconds` of a step with Lighthouse and of a dense one, twice in `slow` ones.

    Lighthouse acted in `acted` of its steps, by default in all.
    """
    each = [seconds[0]] * lighthouse + [seconds[1]] * dense
    each = [2 * took if step in slow else took for step, took in enumerate(each)]
    acted = lighthouse if acted is None else acted
    stages = {"lighthouse": (acted, each[:acted]), "dense": (len(each) - acted, each[acted:])}
    return {
        "steps": 20,
        "switch_step": lighthouse,
        "model_step": 20,
        "stages": {name: Stage(steps, sum(took), 128 * steps) for name, (steps, took) in stages.items() if steps},
        "held_out": [HeldOut(4 * i, sum(each[: 4 * i]), "dense", loss) for i, loss in enumerate(losses)],
        **more,
    }


def two_stages(**changes) -> dict:
    return run_of(**{"lighthouse": 12, "dense": 8, **changes})


def baseline(**changes) -> dict:
    return run_of(**{"losses": (6, 5, 5, 5, 4, 4), **changes})


FOUND = changed(EMPTY, two_stages(), baseline())
CHECKS = ("integrated", "speed-up", "loss", "stripped", "card")
FAILED, OPEN = False, None
VERDICTS = [
    ("nothing_wrong", {}, {}, {}, {"speed-up": ("1.43 times as fast", "64 tokens/s in the baseline and at 64 in")}),
    ("slower", {"seconds": (2.5, 2.0)}, {}, {"speed-up": FAILED}, {"speed-up": ("0:46 against 0:40",)}),
    (
        "dense_steps_of_a_baseline_on_a_busy_machine",
        {},
        {"seconds": (0, 8.0)},
        {"speed-up": OPEN},
        {"speed-up": ("was busy", "16 tokens/s in the baseline", "at 64 in the lighthouse run", "within 5%")},
    ),
    (
        "a_slow_first_step",
        {},
        {"slow": (0,)},
        {},
        {"speed-up": ("64 tokens/s in the baseline and at 64",)},
    ),
    (
        "a_baseline_that_was_slow_for_a_while",
        {},
        {"slow": range(8)},
        {"speed-up": OPEN},
        {"speed-up": ("was busy", "29% of the baseline's time and 0%")},
    ),
    (
        "faster_by_less_than_the_dense_steps_differ",
        {"seconds": (1.98, 1.93)},
        {},
        {"speed-up": OPEN},
        {"speed-up": ("may be chance",)},
    ),
    (
        "too_few_dense_steps_to_tell",
        {"lighthouse": 16, "dense": 4},
        {},
        {"speed-up": OPEN},
        {"speed-up": ("needs 8 dense steps of each, and 20 of the baseline and 4",)},
    ),
    (
        "on_another_device",
        {"device": "a faster one"},
        {},
        {"speed-up": OPEN},
        {"speed-up": ("not on the same device", "a faster one")},
    ),
    (
        "with_another_torch",
        {"versions": {"torch": "9.0"}},
        {"versions": {"torch": "8.0"}},
        {"speed-up": OPEN},
        {"speed-up": ("different versions: the baseline torch 8.0, the lighthouse run torch 9.0",)},
    ),
    (
        "lighthouse_never_acted",
        {"acted": 0},
        {},
        {"integrated": FAILED, "speed-up": FAILED, "loss": OPEN},
        {
            "integrated": ("0 of 20 steps", "12 and 8 were planned"),
            "speed-up": ("acted in no step",),
            "loss": ("Lighthouse did not act in 12 of the 12 steps planned for it",),
        },
    ),
    (
        "lighthouse_left_steps_dense",
        {"acted": 8},
        {},
        {"integrated": FAILED, "loss": OPEN},
        {"integrated": ("8 steps went through Lighthouse and 12 were dense; 12 and 8 were planned",)},
    ),
    (
        "a_run_with_warnings",
        {"warnings": ["In 3 of the 12 steps with Lighthouse some forwards were dense."]},
        {},
        {"integrated": FAILED},
        {"integrated": ("In 3 of the 12 steps with Lighthouse some forwards were dense.",)},
    ),
    (
        "a_higher_loss",
        {"losses": (6, 5, 5, 5, 4.5, 4.1)},
        {},
        {"loss": FAILED},
        {"loss": ("4.1000 against 4.0000 (+0.1000)", "does not reach the baseline's final loss 4.0000")},
    ),
    (
        "a_model_from_before_the_switch",
        {"model_step": 12},
        {},
        {"loss": FAILED},
        {"loss": ("he saved model is from step 12 and had no dense step",)},
    ),
    (
        "other_first_weights",
        {},
        {"losses": (7, 5, 5, 5, 4, 4)},
        {"integrated": FAILED, "speed-up": OPEN, "loss": OPEN},
        {"integrated": ("the loss before the first step is 7.0000 and 6.0000",)},
    ),
    (
        "a_baseline_with_lighthouse",
        {},
        {"lighthouse": 12, "dense": 8},
        {"integrated": FAILED, "speed-up": OPEN, "loss": OPEN},
        {"integrated": ("the baseline had Lighthouse in 12 steps",)},
    ),
    (
        "a_baseline_of_more_steps",
        {},
        {"steps": 24},
        {"integrated": FAILED, "speed-up": OPEN, "loss": OPEN},
        {"integrated": ("the baseline has 24 steps and the lighthouse run 20",)},
    ),
]


def verdicts(found) -> dict:
    """By check, what is not ticked."""
    speed = found.stripped.inference
    if speed is not None:  # its clock is not what is tested
        found = replace(found, stripped=replace(found.stripped, inference=replace(speed, plain=speed.exported)))
    checks = dict(zip(CHECKS, checklist(found), strict=True))
    return {name: check.passed for name, check in checks.items() if check.passed is not True}, checks, page(found)


@pytest.mark.parametrize("ours, theirs, expected, parts", [v[1:] for v in VERDICTS], ids=[v[0] for v in VERDICTS])
def test_a_line_is_ticked_failed_or_not_checked_with_its_numbers(ours, theirs, expected, parts):
    found = changed(FOUND, lighthouse=two_stages(**ours), baseline=baseline(**theirs))
    found_verdicts, checks, its_page = verdicts(found)
    assert found_verdicts == expected
    text = its_page.markdown()
    for name, said in parts.items():
        for part in said:
            assert part in checks[name].evidence and part in text, part
    for name, passed in expected.items():
        word = "failed" if passed is FAILED else "not checked"
        assert f"**{checks[name].what}: {word}**" in text


STRIPPED = [
    (
        "not_exported",
        {"exported": None, "inference": None, "failure": "logits differ"},
        {"stripped", "card"},
        "Logits differ",
    ),
    ("an_old_card", {"card_names": [], "card_lacks": ["the switch after step 3"]}, {"card"}, "it lacks the switch"),
]


@pytest.mark.parametrize("changes, failed, part", [s[1:] for s in STRIPPED], ids=[s[0] for s in STRIPPED])
def test_a_model_that_cannot_be_shipped_is_failed(changes, failed, part):
    found, checks, _ = verdicts(changed(FOUND, lighthouse=two_stages(), baseline=baseline(), **changes))
    assert found == dict.fromkeys(failed, FAILED) and any(part in checks[name].evidence for name in failed)


def test_times_that_do_not_compare_are_compared_nowhere():
    found = changed(FOUND, lighthouse=two_stages(), baseline=baseline(seconds=(0, 8.0)))
    text, sentence = page(found).markdown(), passing(found.pairs[0])
    assert "times as fast" not in text and "times as long" not in text
    assert sentence.endswith("These times are not comparable.") and "times as long" not in sentence
    assert found.numbers()["seeds"][0]["pairs"][0]["control"]["why_not"].startswith("The machine was busy")


def test_settings_in_which_the_runs_differ_are_named():
    settings = FOUND.pairs[0].baseline.settings | {CHECKPOINTING: True, "learning_rate": 1.0, "rows": "others"}
    integrated = checklist(changed(FOUND, baseline={"settings": settings}))[0]
    assert integrated.passed is False
    for part in (
        "learning_rate was 1.0, is 0.002",
        f"{CHECKPOINTING} was True, is False",
        "the text has changed, although",
    ):
        assert part in integrated.evidence


def test_several_processes_are_in_the_devices_name():
    settings = FOUND.settings | {"processes": 4}
    found = changed(FOUND, lighthouse={"settings": settings}, baseline={"settings": settings})
    assert found.device == f"4 processes on {found.pairs[0].baseline.device}"


INFERENCE = [
    ("other_outputs", lambda speed: replace(speed, same_outputs=False), "gives other outputs"),
    ("our_modules", lambda speed: replace(speed, modules={"torch": 3, "lighthouse": 2}), "2 of lighthouse"),
    ("slower", lambda speed: replace(speed, exported=replace(speed.plain, decode_seconds=1.0)), "a token of decoding"),
    ("quicker_than_itself", lambda speed: replace(speed, plain=replace(speed.plain, decode_seconds=1.0)), "was busy"),
]


@pytest.mark.parametrize("change, part", [i[1:] for i in INFERENCE], ids=[i[0] for i in INFERENCE])
def test_a_model_that_is_not_plain_is_failed(change, part):
    speed = FOUND.stripped.inference
    check = checklist(changed(FOUND, inference=change(replace(speed, plain=speed.exported))))[3]
    assert check.passed is (OPEN if part == "was busy" else FAILED) and part in check.evidence


# From curves


def curve(*losses) -> list[HeldOut]:
    """At every step from 0 on, a second each."""
    return [HeldOut(step, float(step), "dense", loss) for step, loss in enumerate(losses)]


def pair(lighthouse: list[float], baseline: list[float], switch_step: int = 2) -> Pair:
    """A second a step, and an evaluation behind each."""
    runs = [
        PretrainResult(name, "", 128, len(losses) - 1, switch, len(losses) - 1, {}, curve(*losses), {})
        for name, switch, losses in (("dense", 0, baseline), ("lighthouse", switch_step, lighthouse))
    ]
    runs = [replace(run, stages={"dense": Stage(run.steps, float(run.steps), 128 * run.steps)}) for run in runs]
    return Pair(0, *runs)


PASSES = [
    ("between_two_evaluations", [6, 5, 4, 3, 2], [6, 5, 4, 3, 2.5], (3.5, 3.5)),
    ("never", [6, 5, 4, 3, 2.6], [6, 5, 4, 3, 2.5], None),
    ("at_the_switch_already", [6, 5, 2, 3, 2.6], [6, 5, 4, 3, 2.5], (2, 2)),
    ("before_the_switch_alone", [6, 2, 4, 3, 2.6], [6, 5, 4, 3, 2.5], None),
    ("at_the_very_end", [6, 5, 4, 3, 2.5], [6, 5, 4, 3, 2.5], (4, 4)),
    ("of_a_baseline_that_was_there_before_its_end", [6, 5, 4, 3, 2], [6, 5, 2.5, 2, 2.5], (3.5, 3.5)),
]


@pytest.mark.parametrize("lighthouse, baseline, expected", [p[1:] for p in PASSES], ids=[p[0] for p in PASSES])
def test_when_it_passes_the_baselines_final_loss(lighthouse, baseline, expected):
    found = pair(lighthouse, baseline)
    assert found.passes == expected
    first = baseline.index(baseline[-1])  # not when it ended
    assert found.sooner == (None if expected is None else first / expected[1])
    assert ("does not reach" in passing(found)) == (expected is None)


RECOVERS = [
    (
        "no_rise",
        [6, 5, 4, 3, 3.5],
        Recovery(4, 0.0, 0.0, 0.0, 1, 3),
        "no rise: 4.0000 right before the switch, after step 2, and 3.0000 at the next measurement, after step 3",
    ),
    (
        "back",
        [6, 5, 4, 4.5, 5, 3],
        Recovery(4, 1.0, 2.5, 2.5, 1, 4.5),
        "rises by up to 1.0000, and is back after 2 steps",
    ),
    ("not_back", [6, 5, 4, 4.5], Recovery(4, 0.5, None, None, 1, 4.5), "not back at the end"),
    ("nothing_behind", [6, 5, 4], None, "nothing was measured"),
]


def test_the_best_losses_are_not_called_final():
    """With `load_best_model_at_end` the saved models, and so the compared losses, are the best checkpoints'."""
    best = {"settings": FOUND.settings | {"load_best_model_at_end": True}}
    ours = two_stages(losses=(6, 5, 5, 5, 3.5, 4.5), model_step=16, **best)
    theirs = baseline(losses=(6, 5, 5, 4, 4.6, 4.8), model_step=12, **best)
    found = changed(FOUND, ours, theirs, card_names=["the best loss"])
    check, text = checklist(found)[CHECKS.index("loss")], page(found).markdown()
    assert check.what == "Best held-out loss matches or improves the baseline" and check.passed
    for part in (
        "losses of the best checkpoints, after step 12 of the baseline and 16 of the lighthouse run",
        "the last ones are 4.5000 against 4.8000",
        "reaches the baseline's best loss 4.0000",
    ):
        assert part in check.evidence and part in text, part
    assert "best loss, seed 0" in text and "final" not in text.lower()
    assert {pair["compared_loss"] for seed in found.numbers()["seeds"] for pair in seed["pairs"]} == {"best"}
    never = changed(FOUND, two_stages(losses=(6, 5, 5, 5, 4.5, 4.6), model_step=16, **best), theirs)
    assert "its best is 4.5000, and it ends at 0:28" in passing(never.pairs[0])


@pytest.mark.parametrize("losses, expected, part", [r[1:] for r in RECOVERS], ids=[r[0] for r in RECOVERS])
def test_the_recovery_behind_the_switch(losses, expected, part):
    found = pair(losses, [6.0] * len(losses))
    assert recovery_of(found.other) == expected and part in recovery(found)
