"""Which arm of a comparison is ahead: at equal steps, at equal time, far into the context, and in copying."""

from __future__ import annotations

from dataclasses import replace

import pytest

from lighthouse.evaluation import CopyAt, CopyLoss, Evaluation, LossByPosition, Stretch
from lighthouse.report import standings
from lighthouse.report.compared import Comparison, Seed, Stripped
from lighthouse.report.comparison import page
from lighthouse.report.standings import Standing, loss_at
from lighthouse.training import PretrainResult
from lighthouse.training.result import HeldOut, Stage

SETTINGS = {
    "model": "nano",
    "context": 4096,
    "local_window": 256,
    "dense_layers": 0,
    "tokens_per_step": 4096,
    "device": "cpu",
}
OF_ARM = {
    "dense": {"dense_only": True},
    "window": {"select_topk": 0},
    "published": {"local_window": 0, "dense_layers": 1},
    "lighthouse": {},
}
STEPS, SWITCH = 20, 12


def run(arm: str, losses: tuple[float, ...], first: float = 1.0, dense: float = 2.0) -> PretrainResult:
    """20 steps with an evaluation each 4; `first` and `dense` are the seconds of a step of either stage."""
    switch = 0 if arm == "dense" else SWITCH
    times = [min(step, switch) * first + max(0, step - switch) * dense for step in range(0, STEPS + 1, 4)]
    stages = {"dense": Stage(STEPS - switch, (STEPS - switch) * dense, (STEPS - switch) * 4096)}
    if switch:
        stages["lighthouse"] = Stage(switch, switch * first, switch * 4096)
    points = [HeldOut(4 * i, time, "dense", loss) for i, (time, loss) in enumerate(zip(times, losses, strict=True))]
    return PretrainResult(
        arm, "", 4096, STEPS, switch, STEPS, stages, points, SETTINGS | OF_ARM[arm], device="a device"
    )


def ending(last: float) -> tuple[float, ...]:
    """A curve that ends there."""
    return (6.0, 5.0, 5.0, 5.0, last + 0.5, last)


def evaluation(far: float, gains: tuple[float, ...] = (0.0, 0.0)) -> Evaluation:
    stretches = [Stretch(0, 2048, 3.0, 0.1), Stretch(2048, 4096, far, 0.2)]
    copies = [CopyAt(256 * 2**i, 4.0, 4.0 - gain, 0.05) for i, gain in enumerate(gains)]
    return Evaluation(4096, 8, {}, LossByPosition(far, 0.1, 8, stretches), CopyLoss(copies, 16, 64, 8, "letters", 3.58))


def comparison(*seeds: dict[str, float | PretrainResult], evaluations=()) -> Comparison:
    """Of each seed each arm's final loss, or its run; and of each seed the evaluation of each arm."""
    found = [
        Seed(number, {arm: run(arm, ending(its)) if isinstance(its, float) else its for arm, its in seed.items()})
        for number, seed in enumerate(seeds)
    ]
    for seed, its in zip(found, evaluations, strict=False):
        seed.evaluations.update(its)
    return Comparison(4, found, Stripped(0, None, None, [], [], "not exported"))


def lines(found: Comparison) -> list[str]:
    return standings.said(found)


# At equal steps

WINNERS = [
    (
        "dense",
        [{"dense": 2.0, "window": 2.5, "lighthouse": 2.25}],
        "dense has the lowest final loss, 2.0000; lighthouse 2.2500, window 2.5000. One seed is one sample",
    ),
    (
        "window",
        [{"dense": 2.5, "window": 2.0, "lighthouse": 2.25}],
        "window has the lowest final loss, 2.0000; lighthouse 2.2500, dense 2.5000.",
    ),
    (
        "published",
        [{"dense": 2.5, "window": 2.25, "published": 2.0, "lighthouse": 2.125}],
        "published has the lowest final loss, 2.0000; lighthouse 2.1250, window 2.2500, dense 2.5000.",
    ),
    (
        "lighthouse_with_every_seed",
        [{"dense": 2.5, "lighthouse": 2.0}, {"dense": 3.5, "lighthouse": 3.0}],
        "lighthouse has the lowest final loss, 2.5000 ± 0.7071; dense 3.0000 ± 0.7071. lighthouse is ahead of dense "
        "with 2 of 2 seeds.",
    ),
    (
        "lighthouse_with_two_of_three_seeds",
        [
            {"dense": 3.0, "window": 2.25, "lighthouse": 2.0},
            {"dense": 3.0, "window": 2.25, "lighthouse": 2.0},
            {"dense": 3.0, "window": 2.25, "lighthouse": 2.5},
        ],
        "lighthouse is ahead of window with 2 of 3 seeds, of dense with 3 of 3 seeds. The seed decides between "
        "lighthouse and window.",
    ),
    (
        "two_that_are_level",
        [{"dense": 2.5, "window": 2.0, "lighthouse": 2.0}],
        "window and lighthouse have the same lowest final loss, 2.0000; dense 2.5000.",
    ),
]


@pytest.mark.parametrize("seeds, part", [w[1:] for w in WINNERS], ids=[w[0] for w in WINNERS])
def test_who_is_ahead_at_equal_steps(seeds, part):
    found = comparison(*seeds)
    assert lines(found)[0].startswith("At equal steps, 20: ") and part in lines(found)[0]
    text = page(found).markdown()
    assert lines(found)[0] in text and text.index("Which arm is ahead") < text.index("Checklist")


def test_a_seed_decides_less_the_more_often_it_agrees():
    assert "The seed decides" not in Standing({"dense": [2.0, 3.0], "window": [1.0, 2.0]}).said("loss")
    assert "The seed decides between window and dense" in Standing({"dense": [2, 3], "window": [1, 3]}).said("loss")


def test_numbers_of_a_standing_have_mean_spread_and_each_seed():
    numbers = Standing({"dense": [2.0, 4.0], "window": [1.0, 1.0]}).numbers()
    assert list(numbers) == ["window", "dense"]
    assert numbers["dense"] == {"mean": 3.0, "deviation": pytest.approx(2**0.5), "of_each_seed": [2.0, 4.0]}


# At equal time: dense steps take 2 seconds, those with Lighthouse 1, so dense ends after 40 and the others after 28

DENSE = (6.0, 5.0, 4.0, 3.5, 3.0, 2.0)  # after 0, 8, 16, 24, 32, 40 seconds
WINDOW = (6.0, 5.5, 5.0, 4.5, 4.0, 2.5)  # after 0, 4, 8, 12, 20, 28 seconds
LOSS_AT = [
    ("of_dense_between_two_evaluations", "dense", DENSE, 28.0, 3.25),
    ("at_an_evaluation", "dense", DENSE, 24.0, 3.5),
    ("at_its_end", "window", WINDOW, 28.0, 2.5),
    ("after_its_end", "window", WINDOW, 99.0, 2.5),
    ("at_the_switch", "window", WINDOW, 12.0, 4.5),
    ("before_the_switch", "window", WINDOW, 11.9, None),
]


@pytest.mark.parametrize("arm, losses, seconds, expected", [c[1:] for c in LOSS_AT], ids=[c[0] for c in LOSS_AT])
def test_the_loss_after_some_seconds(arm, losses, seconds, expected):
    assert loss_at(run(arm, losses), seconds) == expected


def test_another_arm_is_ahead_at_equal_time_than_at_equal_steps():
    found = comparison({"dense": run("dense", DENSE), "window": run("window", WINDOW)})
    steps, time = lines(found)[:2]
    assert "dense has the lowest final loss, 2.0000; window 2.5000." in steps
    assert time.startswith("At equal time, the 0:28 of the shortest run (window): ")
    assert "window has the lowest loss, 2.5000; dense 3.2500." in time
    assert "interpolated linearly between evaluations" in time and "schedule of its own could end lower" in time
    text = page(found).markdown()
    assert "| at equal time | 3.2500 | 2.5000 |" in text and time in text
    numbers = standings.numbers(found)["equal_time"]
    assert numbers["seconds"] == [28.0] and numbers["standing"]["dense"]["mean"] == 3.25


def test_an_arm_that_is_not_dense_at_that_time_is_not_ranked_then():
    slow = run("published", ending(1.0), first=3.0)  # its switch comes after 36 seconds
    time = lines(comparison({"dense": run("dense", DENSE), "window": run("window", WINDOW), "published": slow}))[1]
    assert "published 1" not in time and "published: not yet dense and evaluated by then." in time
    only = comparison({"dense": run("dense", DENSE, dense=0.5), "published": run("published", DENSE, 3.0, 0.5)})
    assert "not compared. By then no other arm was dense and evaluated." in lines(only)[1]


def test_times_of_a_busy_machine_are_not_compared():
    found = comparison({"dense": run("dense", DENSE, dense=3.0), "window": run("window", WINDOW)})
    time = lines(found)[1]
    assert "not compared. Seed 0, window: The machine was busy: dense steps" in time
    assert "lowest" not in time and "at equal time" not in page(found).markdown()


# At distance

FAR = [
    (
        "the_end_of_the_context",
        [{"dense": evaluation(2.0), "window": evaluation(2.5)}],
        "Far into the context: dense has the lowest held-out loss of the tokens 2,048 to 4,096 of it, 2.0000; wind",
    ),
    (
        "copies_at_the_longest_distance_at_which_one_copies",
        [{"dense": evaluation(2.0, (1.5, 0.25)), "window": evaluation(2.5, (3.0, 0.75))}],
        "Copying over 512 tokens, the longest distance at which an arm copies (saves more than 0.5 nats per token): "
        "window has the highest copy gain, 0.75; dense 0.25.",
    ),
    (
        "copies_over_a_shorter_distance",
        [{"dense": evaluation(2.0, (1.5, 0.25)), "window": evaluation(2.5, (1.0, 0.0))}],
        "Copying over 256 tokens, the longest distance at which an arm copies (saves more than 0.5 nats per token): "
        "dense has the highest copy gain, 1.50; window 1.00.",
    ),
    (
        "nothing_copied",
        [{"dense": evaluation(2.0, (0.0, 0.25)), "window": evaluation(2.5, (0.5, -0.25))}],
        "Copying over a distance: not measurable, no arm copies yet. The second appearance of a passage saves at most "
        "0.50 nats per token, and more than 0.5 are needed to judge.",
    ),
    (
        "an_arm_without_an_evaluation_of_one_seed",
        [{"dense": evaluation(2.0), "window": evaluation(2.5)}, {"dense": evaluation(2.0)}],
        "At distance: not compared, since fewer than two arms were evaluated with every seed.",
    ),
]


@pytest.mark.parametrize("evaluations, part", [f[1:] for f in FAR], ids=[f[0] for f in FAR])
def test_who_is_ahead_at_distance(evaluations, part):
    found = comparison(*({"dense": 2.0, "window": 2.5} for _ in evaluations), evaluations=evaluations)
    assert any(part in line for line in lines(found)), lines(found)


def test_tables_and_pictures_of_what_was_evaluated():
    """Of one seed with the errors of the evaluation, of several with the standard deviation over these."""
    one = {"dense": evaluation(2.0, (1.5, 0.5)), "window": evaluation(2.5)}
    two = {"dense": evaluation(3.0, (2.5, 0.5)), "window": evaluation(2.5)}
    losses = {"dense": 2.0, "window": 2.5}
    single, both = (page(comparison(*[losses] * len(every), evaluations=every)) for every in ([one], [one, two]))
    assert {"loss-position.png", "copy-distance.png"} < set(single.files())
    for part in ("| 2,048 to 4,096 | 2.0000 ± 0.2000 | 2.5000 ± 0.2000 |", "standard error over rows of text"):
        assert part in single.markdown()
    for part in ("| 256 tokens | 1.50 ± 0.05 | 0.00 ± 0.05 |", "± standard error over passages"):
        assert part in single.markdown()
    for part in (
        "| 2,048 to 4,096 | 2.5000 ± 0.7071 | 2.5000 ± 0.0000 |",
        "| 256 tokens | 2.00 ± 0.71 | 0.00 ± 0.00 |",
    ):
        assert part in both.markdown()
    assert "standard error" not in both.markdown() and "± standard deviation over the seeds" in both.markdown()
    none = page(comparison(losses))
    assert "At distance\n" not in none.markdown() and "loss-position.png" not in none.files()


# The page of four arms


def test_the_page_says_what_each_arm_is():
    text = page(comparison({arm: 2.0 + i / 8 for i, arm in enumerate(OF_ARM)})).markdown()
    for part in (
        "`dense`: dense attention in all steps, the baseline.",
        "`window`: up to the switch after step 12, a local window of 256 in place of 4,096 tokens in 4 of 4 layers",
        "`published`: up to the switch after step 12, 768 entries in place of 4,096 tokens in 2 of 4 layers",
        "`lighthouse`: up to the switch after step 12, 768 entries in place of 4,096 tokens and a local window of 256",
        "| `local_window` | 256 | 0 | 256 |",
        "| `select_topk` | 0 | 1/64 | 1/64 |",
        "| `dense_layers` | 0 | 1 | 0 |",
        "| final loss | 2.0000 | 2.1250 | 2.2500 | 2.3750 |",
        "| less the baseline's |  | +0.1250 | +0.2500 | +0.3750 |",
        "| training time | 0:40 | 0:28 | 0:28 | 0:28 |",
    ):
        assert part in text, part
    assert "12 of 20 steps of the lighthouse run went through Lighthouse" in text  # which is the one that is checked


def test_means_and_spread_over_seeds():
    text = page(comparison({"dense": 2.0, "window": 2.5}, {"dense": 3.0, "window": 3.5})).markdown()
    for part in (
        "| final loss, seed 0 | 2.0000 | 2.5000 |",
        "| final loss, seed 1 | 3.0000 | 3.5000 |",
        "| final loss, mean | 2.5000 | 3.0000 |",
        "| standard deviation | 0.7071 | 0.7071 |",
        "| less the baseline's, mean |  | +0.5000 |",
    ):
        assert part in text, part


SHIPPED = [
    ("lighthouse_where_it_is_an_arm", {"dense": 2.0, "window": 2.1, "lighthouse": 2.2}, "lighthouse"),
    ("else_the_other_arm_with_the_lowest_loss", {"dense": 2.0, "window": 2.2, "published": 2.1}, "published"),
    ("never_the_baseline", {"dense": 2.0, "window": 2.2}, "window"),
]


@pytest.mark.parametrize("losses, arm", [s[1:] for s in SHIPPED], ids=[s[0] for s in SHIPPED])
def test_the_arm_that_is_shipped(losses, arm):
    found = comparison(losses)
    assert found.shipped == arm and {pair.other.name for pair in found.pairs} == {arm}


def test_what_keeps_a_standing_from_being_one_is_said():
    other = run("window", ending(2.5))
    other = replace(other, stages={**other.stages, "lighthouse": Stage(4, 4.0, 4 * 4096)})
    first = run("published", (7.0, 5.0, 5.0, 5.0, 3.0, 2.5))
    said = lines(comparison({"dense": 2.0, "window": other, "published": first}))
    assert any("Seed 0, window: Lighthouse did not act in 8 of the 12 steps planned for it" in line for line in said)
    assert any(
        "Seed 0, published: not comparable, the loss before the first step is 6.0000 and 7.0" in line for line in said
    )
