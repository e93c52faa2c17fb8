"""Which arm of a comparison is ahead, and by how much: at equal steps, at equal time, and far into the context.

Numbers are compared within each seed, since another seed also has another held-out text, and their means over the seeds
are ranked. The trap is equal time: the runs of all arms have the same schedule, so a slower one is still in the middle
of its own when the fastest has ended, and the sentence says so.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from itertools import pairwise
from statistics import mean, stdev

from lighthouse.evaluation.results import GAIN_NEEDED, CopyLoss, Evaluation, LossByPosition
from lighthouse.report.compared import Comparison
from lighthouse.report.table import minutes
from lighthouse.training.result import PretrainResult


@dataclass(frozen=True)
class Standing:
    """A number of each arm, one for each seed in the same order. The lowest mean is ahead, or the highest."""

    values: dict[str, list[float]]
    highest: bool = False

    def mean(self, arm: str) -> float:
        return mean(self.values[arm])

    def deviation(self, arm: str) -> float | None:
        """The standard deviation over the seeds; None of one seed."""
        return deviation(self.values[arm])

    @property
    def order(self) -> list[str]:
        """The arms, the one ahead first."""
        return sorted(self.values, key=self.mean, reverse=self.highest)

    def seeds_ahead(self, arm: str, other: str) -> int:
        """With how many seeds `arm` is ahead of `other`."""
        pairs = zip(self.values[arm], self.values[other], strict=True)
        return sum(one > two if self.highest else one < two for one, two in pairs)

    def numbers(self) -> dict:
        return {
            arm: {"mean": self.mean(arm), "deviation": self.deviation(arm), "of_each_seed": self.values[arm]}
            for arm in self.order
        }

    def said(self, what: str, digits: int = 4) -> str:
        """Who has the lowest or highest `what`, the others' numbers, and what the seeds say of the order."""
        first, *rest = self.order
        level = [arm for arm in rest if self.mean(arm) == self.mean(first)]
        most = "highest" if self.highest else "lowest"
        if level:
            verb, ahead = f"have the same {most}", " and ".join([", ".join([first, *level[:-1]]), level[-1]])
        else:
            verb, ahead = f"has the {most}", first
        others = ", ".join(f"{arm} {self._shown(arm, digits)}" for arm in rest if arm not in level)
        text = f"{ahead} {verb} {what}, {self._shown(first, digits)}" + (f"; {others}." if others else ".")
        seeds = len(self.values[first])
        if seeds == 1:
            return f"{text} One seed is one sample: with another seed the order may be different."
        counts = [f"of {arm} with {self.seeds_ahead(first, arm)} of {seeds} seeds" for arm in rest]
        text += f" {first} is ahead {', '.join(counts)}."
        open_ones = [arm for arm in rest if self.seeds_ahead(first, arm) < seeds]
        return f"{text} The seed decides between {first} and {' or '.join(open_ones)}." if open_ones else text

    def _shown(self, arm: str, digits: int) -> str:
        spread = self.deviation(arm)
        return f"{self.mean(arm):.{digits}f}" + ("" if spread is None else f" ± {spread:.{digits}f}")


def deviation(values: Sequence[float]) -> float | None:
    return stdev(values) if len(values) > 1 else None


def at_equal_steps(found: Comparison) -> Standing:
    """By the dense held-out loss of the saved models."""
    return Standing({arm: found.losses(arm) for arm in found.arms})


@dataclass(frozen=True)
class EqualTime:
    """The losses at the training time, `seconds`, of the shortest run of each seed.

    `standing` is None where they cannot be compared, and `why_not` says why. An arm of `not_yet` is not in it: with
    some seed it was not dense yet by then, or had not been evaluated.
    """

    seconds: list[float]
    shortest: list[str]
    standing: Standing | None = None
    not_yet: tuple[str, ...] = ()
    why_not: str | None = None


def at_equal_time(found: Comparison) -> EqualTime:
    shortest = [min(seed.runs.values(), key=lambda run: run.held_out[-1].seconds) for seed in found.seeds]
    seconds = [run.held_out[-1].seconds for run in shortest]
    result = EqualTime(seconds, [run.name for run in shortest])
    for seed in found.seeds:
        for arm, pair in seed.pairs.items():
            if pair.control.why_not is not None:
                return replace(result, why_not=f"Seed {seed.seed}, {arm}: {pair.control.why_not}")
    losses = {
        arm: [loss_at(seed.runs[arm], end) for seed, end in zip(found.seeds, seconds, strict=True)]
        for arm in found.arms
    }
    values = {arm: [loss for loss in each if loss is not None] for arm, each in losses.items()}
    values = {arm: each for arm, each in values.items() if len(each) == len(seconds)}
    not_yet = tuple(arm for arm in found.arms if arm not in values)
    if len(values) < 2:
        return replace(result, why_not="By then no other arm was dense and evaluated.", not_yet=not_yet)
    return replace(result, standing=Standing(values), not_yet=not_yet)


def loss_at(run: PretrainResult, seconds: float) -> float | None:
    """The dense held-out loss after so many training seconds, interpolated linearly between two evaluations.

    None before the switch and before the first evaluation.
    """
    points = [point for point in run.held_out if point.step >= run.switch_step]
    for a, b in pairwise(points):
        if a.seconds <= seconds <= b.seconds:
            part = (seconds - a.seconds) / (b.seconds - a.seconds) if b.seconds > a.seconds else 1.0
            return a.loss + part * (b.loss - a.loss)
    return points[-1].loss if points and points[-1].seconds <= seconds else None


def evaluated(found: Comparison, part: str) -> dict[str, list[Evaluation]]:
    """By arm, the evaluations of all seeds; arms of which one lacks the part are left out."""
    each = {arm: [seed.evaluations.get(arm) for seed in found.seeds] for arm in found.arms}
    every = {arm: [one for one in its if one is not None and getattr(one, part)] for arm, its in each.items()}
    return {arm: its for arm, its in every.items() if len(its) == len(found.seeds)}


def at_the_end_of_the_context(found: Comparison) -> tuple[Standing, int, int] | None:
    """By the loss of the tokens in the last stretch of the context, and the positions where it begins and ends."""
    every = evaluated(found, "loss")
    last = {arm: [one.loss.stretches[-1] for one in its if one.loss] for arm, its in every.items()}
    if len(last) < 2:
        return None
    stretch = next(iter(last.values()))[0]
    return Standing({arm: [each.loss for each in its] for arm, its in last.items()}), stretch.start, stretch.stop


def by_copies(found: Comparison) -> tuple[Standing, int | None] | None:
    """By the copy gain at the longest distance at which an arm copies; None for the distance if none copies at any.

    Then the standing is at the distance with the highest gain.
    """
    every = {arm: [one.copy for one in its if one.copy] for arm, its in evaluated(found, "copy").items()}
    if len(every) < 2:
        return None
    at = [at.distance for at in next(iter(every.values()))[0].distances]
    standings = [
        Standing({arm: [one.distances[i].gain for one in its] for arm, its in every.items()}, highest=True)
        for i in range(len(at))
    ]
    best = [standing.mean(standing.order[0]) for standing in standings]
    copied = [i for i, gain in enumerate(best) if gain > GAIN_NEEDED]
    if not copied:
        return standings[best.index(max(best))], None
    return standings[copied[-1]], at[copied[-1]]


def said(found: Comparison) -> list[str]:
    """Who is ahead: at equal steps, at equal time, far into the context, and in copying; a paragraph each."""
    steps = max(run.steps for seed in found.seeds for run in seed.runs.values())
    lines = [f"At equal steps, {steps:,}: {at_equal_steps(found).said(f'{found.which} loss')}"]
    lines.append(_equal_time_said(at_equal_time(found)))
    far = at_the_end_of_the_context(found)
    if far is not None:
        standing, start, stop = far
        lines.append(
            f"Far into the context: {standing.said(f'held-out loss of the tokens {start:,} to {stop:,} of it')}"
        )
    copies = by_copies(found)
    if copies is not None:
        lines.append(_copies_said(*copies))
    if far is None and copies is None:
        lines.append("At distance: not compared, since fewer than two arms were evaluated with every seed.")
    return lines + found.not_evaluated + _doubts(found)


def _equal_time_said(found: EqualTime) -> str:
    first, last = minutes(min(found.seconds)), minutes(max(found.seconds))
    span = first if first == last else f"{first} to {last}, by seed,"
    names = " or ".join(dict.fromkeys(found.shortest))
    head = f"At equal time, the {span} of the shortest run ({names})"
    if found.standing is None:
        return f"{head}: not compared. {found.why_not}"
    not_yet = f" {', '.join(found.not_yet)}: not yet dense and evaluated by then." if found.not_yet else ""
    return (
        f"{head}: {found.standing.said('loss')}{not_yet} These losses are interpolated linearly between evaluations; "
        "a longer run is there in the middle of its schedule, and a run of that length with a schedule of its own "
        "could end lower."
    )


def _copies_said(standing: Standing, distance: int | None) -> str:
    if distance is None:
        most = max(0.0, standing.mean(standing.order[0]))
        return (
            "Copying over a distance: not measurable, no arm copies yet. The second appearance of a passage saves at "
            f"most {most:.2f} nats per token, and more than {GAIN_NEEDED} are needed to judge."
        )
    return (
        f"Copying over {distance:,} tokens, the longest distance at which an arm copies (saves more than {GAIN_NEEDED} "
        f"nats per token): {standing.said('copy gain', 2)}"
    )


def _doubts(found: Comparison) -> list[str]:
    """What keeps a standing from showing what an arm's attention does."""
    lines = []
    for pair in (pair for seed in found.seeds for pair in seed.pairs.values()):
        name = f"Seed {pair.seed}, {pair.other.name}"
        if pair.differences:
            lines.append(f"{name}: not comparable, {'; '.join(pair.differences)}.")
        if pair.left_dense:
            lines.append(
                f"{name}: Lighthouse did not act in {pair.left_dense:,} of the {pair.other.switch_step:,} steps "
                "planned for it, so the numbers say little about it."
            )
    return lines


def mean_evaluations(found: Comparison) -> dict[str, Evaluation]:
    """The evaluations of each arm as one: means over the seeds, with the standard deviation over these as the error.

    With one seed it is that evaluation itself, whose errors are standard errors over rows and over passages.
    """
    loss, copy = evaluated(found, "loss"), evaluated(found, "copy")
    return {
        arm: replace(
            (loss.get(arm) or copy[arm])[0],
            loss=_mean_loss([one.loss for one in loss.get(arm, ()) if one.loss]),
            copy=_mean_copy([one.copy for one in copy.get(arm, ()) if one.copy]),
        )
        for arm in found.arms
        if arm in loss or arm in copy
    }


def _mean_loss(every: list[LossByPosition]) -> LossByPosition | None:
    if len(every) < 2:
        return every[0] if every else None
    stretches = [
        replace(each[0], loss=mean(one.loss for one in each), error=stdev(one.loss for one in each))
        for each in zip(*(one.stretches for one in every), strict=True)
    ]
    losses = [one.loss for one in every]
    return replace(every[0], loss=mean(losses), error=stdev(losses), stretches=stretches)


def _mean_copy(every: list[CopyLoss]) -> CopyLoss | None:
    if len(every) < 2:
        return every[0] if every else None
    distances = [
        replace(
            each[0],
            first=mean(one.first for one in each),
            second=mean(one.second for one in each),
            error=stdev(one.gain for one in each),
        )
        for each in zip(*(one.distances for one in every), strict=True)
    ]
    return replace(every[0], distances=distances)


def numbers(found: Comparison) -> dict:
    """As JSON takes them."""
    time, far, copies = at_equal_time(found), at_the_end_of_the_context(found), by_copies(found)
    return {
        "equal_steps": at_equal_steps(found).numbers(),
        "equal_time": asdict(replace(time, standing=None)) | {"standing": time.standing and time.standing.numbers()},
        "end_of_context": far and {"start": far[1], "stop": far[2], "standing": far[0].numbers()},
        "copies": copies and {"distance": copies[1], "standing": copies[0].numbers()},
        "said": said(found),
    }
