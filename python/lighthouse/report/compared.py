"""What a comparison found: of each seed a run of each arm, what was measured of its model, and the stripped model.

The baseline is the arm that is dense throughout. Everything is judged by the dense held-out loss. Training losses of
the stage with Lighthouse are not comparable with dense ones, so none of them is used. And times are comparable only if
the machine was equally fast in all runs: each run's dense steps show this, since they do the same work (`Control`).
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property
from itertools import pairwise
from pathlib import Path
from statistics import mean, median

from lighthouse.core.files import write_whole
from lighthouse.core.method import DEFAULT, Method
from lighthouse.evaluation.results import Evaluation
from lighthouse.export.export import Exported
from lighthouse.export.plain import Inference
from lighthouse.report.known import known
from lighthouse.training.depends import FREE_BETWEEN_RUNS
from lighthouse.training.result import HeldOut, PretrainResult, crossing, versions
from lighthouse.training.resume import differences

AGREE = 0.05  # dense steps of two runs on a quiet machine differ by less than this
SLOW = 0.1  # the most of a run's time that may be in stretches slower than its own median, such as first steps
LEAST_DENSE_STEPS = 8  # of each run: fewer do not show how fast the machine was

# Dense throughout; the local window alone; the pyramid alone, as published; and both, or what was asked for.
DENSE, WINDOW, PUBLISHED, LIGHTHOUSE = ARMS = ("dense", "window", "published", "lighthouse")

# In which the runs of a seed differ on purpose.
OF_ONE_ARM = frozenset({"dense_only", "dense_layers", "switch_step", "switch_tokens", *DEFAULT.values()})


@dataclass(frozen=True)
class Recovery:
    """The dense held-out loss after the switch, compared with `before`, the loss right before it.

    `jump` is how far it rises above `before` until it is back; 0 if no evaluation is higher. It is back after `steps`
    optimizer steps and `seconds` of training, interpolated linearly between two evaluations: 0 if it never rose, None
    if it does not come back. The first measurement after the switch, `first_steps` after it, is `first`.
    """

    before: float
    jump: float
    steps: float | None
    seconds: float | None
    first_steps: int
    first: float


def recovery_of(run: PretrainResult) -> Recovery | None:
    """None if nothing was evaluated at the switch or after it."""
    at = next((i for i, point in enumerate(run.held_out) if point.step == run.switch_step), None)
    if at is None or at + 1 == len(run.held_out):
        return None
    switch, *after = run.held_out[at:]
    first_steps, first = after[0].step - switch.step, after[0].loss
    if after[0].loss <= switch.loss:
        return Recovery(switch.loss, 0.0, 0.0, 0.0, first_steps, first)
    back = next((i for i, point in enumerate(after) if point.loss <= switch.loss), None)
    jump = max(point.loss for point in after[:back]) - switch.loss
    if back is None:
        return Recovery(switch.loss, jump, None, None, first_steps, first)
    step, seconds = crossing(after[back - 1], after[back], switch.loss)
    return Recovery(switch.loss, jump, step - switch.step, seconds - switch.seconds, first_steps, first)


@dataclass(frozen=True)
class Control:
    """Whether the times of a pair's two runs are comparable. The dense steps of both do the same work.

    `baseline` and `other` are their tokens per second in the median step, None where there are fewer than
    `LEAST_DENSE_STEPS`. `slow` is the part of each run's training time that went into stretches slower than its stages'
    own medians. `why_not` says why the times are not comparable, if so.
    """

    baseline: float | None
    other: float | None
    slow: tuple[float, float]
    why_not: str | None

    @property
    def difference(self) -> float:
        """By how much the faster run's dense steps were faster than the other's."""
        rates = known(self.baseline), known(self.other)
        return max(rates) / min(rates) - 1


def step_seconds(run: PretrainResult, begin: int, end: int) -> list[float]:
    """Training seconds of each step after `begin` and up to `end`, each the mean between two evaluations."""
    points = [HeldOut(0, 0.0, "", 0.0), *(point for point in run.held_out if point.step > 0)]
    return [
        (b.seconds - a.seconds) / (b.step - a.step)
        for a, b in pairwise(points)
        if begin <= a.step < b.step <= end
        for _ in range(b.step - a.step)
    ]


def _slow(run: PretrainResult) -> float:
    stages = [step_seconds(run, 0, run.switch_step), step_seconds(run, run.switch_step, run.steps)]
    lost = sum(max(0.0, step - median(stage)) for stage in stages if stage for step in stage)
    return lost / run.seconds


def control_of(baseline: PretrainResult, other: PretrainResult) -> Control:
    runs, name = (baseline, other), other.name
    dense = [step_seconds(run, run.switch_step, run.steps) for run in runs]
    enough = min(map(len, dense)) >= LEAST_DENSE_STEPS
    tokens = other.settings.get("tokens_per_step", other.context)
    rates = [tokens / median(steps) if enough else None for steps in dense]
    found = Control(rates[0], rates[1], (_slow(baseline), _slow(other)), why_not=None)
    why_not = None
    if baseline.device != other.device:
        why_not = f"The runs were not on the same device: {baseline.device or 'unknown'}, {other.device or 'unknown'}."
    elif baseline.versions != other.versions:
        named = sorted(baseline.versions.keys() | other.versions.keys())
        which = [name for name in named if baseline.versions.get(name) != other.versions.get(name)]
        of_each = [", ".join(f"{name} {run.versions.get(name, 'unknown')}" for name in which) for run in runs]
        why_not = f"The runs had different versions: the baseline {of_each[0]}, the {name} run {of_each[1]}."
    elif not enough:
        why_not = (
            f"It is not known whether the machine was equally fast in both runs: this needs {LEAST_DENSE_STEPS} dense "
            f"steps of each, and {len(dense[0]):,} of the baseline and {len(dense[1]):,} of the {name} run were "
            "measured."
        )
    elif found.difference > AGREE:
        why_not = (
            f"The machine was busy: dense steps, the same work in both runs, ran at {rates[0]:,.0f} tokens/s in "
            f"the baseline and at {rates[1]:,.0f} in the {name} run; they must agree within {AGREE:.0%}."
        )
    elif max(found.slow) > SLOW:
        why_not = (
            f"The machine was busy: {found.slow[0]:.0%} of the baseline's time and {found.slow[1]:.0%} of the "
            f"{name} run's went into stretches slower than the run's own median; at most {SLOW:.0%} may."
        )
    return replace(found, why_not=why_not)


def which_loss(*runs: PretrainResult) -> str:
    """Which loss of runs is compared, that of the model each saved: "final", or "best" of its checkpoints."""
    return "best" if any(run.settings.get("load_best_model_at_end") for run in runs) else "final"


@dataclass(frozen=True)
class Pair:
    """The baseline and the run of another arm, of one seed."""

    seed: int
    baseline: PretrainResult
    other: PretrainResult

    @property
    def runs(self) -> list[PretrainResult]:
        return [self.baseline, self.other]

    @cached_property
    def control(self) -> Control:
        return control_of(self.baseline, self.other)

    @cached_property
    def differences(self) -> list[str]:
        """In what the two runs differ besides attention; empty if in nothing."""
        baseline, other = self.runs
        # What the baseline "was" the other run "is".
        found = differences(baseline.settings, other.settings, FREE_BETWEEN_RUNS | OF_ONE_ARM)
        if baseline.steps != other.steps:
            found.append(f"the baseline has {baseline.steps:,} steps and the {other.name} run {other.steps:,}")
        first = [point.loss for run in self.runs for point in run.held_out[:1] if point.step == 0]
        if len(first) == 2 and first[0] != first[1]:
            found.append(f"the loss before the first step is {first[0]:.4f} and {first[1]:.4f}")
        if baseline.lighthouse is not None:
            found.append(f"the baseline had Lighthouse in {baseline.lighthouse.steps:,} steps")
        return found

    @property
    def which(self) -> str:
        """Which loss of the runs is compared (`which_loss`)."""
        return which_loss(*self.runs)

    @property
    def left_dense(self) -> int:
        """Steps of the other run that were planned for Lighthouse but in which it did not act."""
        lighthouse = self.other.lighthouse
        return self.other.switch_step - (lighthouse.steps if lighthouse else 0)

    @property
    def times_as_fast(self) -> float:
        """Of the whole training. Meaningful only if `control` says that the times are comparable."""
        return self.baseline.seconds / self.other.seconds

    @property
    def stage_times_as_fast(self) -> float | None:
        """Of the stage with Lighthouse, by tokens per second; None where no step was of one of the two."""
        lighthouse, dense = self.other.lighthouse, self.baseline.dense
        if lighthouse is None or dense is None:
            return None
        return lighthouse.tokens_per_second / dense.tokens_per_second

    @property
    def loss_difference(self) -> float:
        """Of the dense held-out loss of the saved models (`which`), the other's less the baseline's."""
        return known(self.other.loss) - known(self.baseline.loss)

    @cached_property
    def passes(self) -> tuple[float, float] | None:
        """Steps and training seconds at which the other run has the baseline's loss; None if it never has."""
        return self.other.reaches(known(self.baseline.loss))

    @cached_property
    def baseline_passes(self) -> tuple[float, float]:
        """The same of the baseline itself, which may have had that loss before its end."""
        return known(self.baseline.reaches(known(self.baseline.loss)))

    @property
    def sooner(self) -> float | None:
        """How many times sooner than the baseline it has that loss."""
        return None if self.passes is None else self.baseline_passes[1] / self.passes[1]

    @cached_property
    def recovery(self) -> Recovery | None:
        return recovery_of(self.other)

    @property
    def baseline_then(self) -> float | None:
        """The baseline's last measured loss within the time of the whole other run."""
        return self.baseline.loss_at(self.other.seconds)


@dataclass(frozen=True)
class Seed:
    """The runs of a seed by arm, the baseline first: same first weights, text, order of it, steps and schedule.

    A run's name is its arm. `evaluations` are of the saved models, by arm; one that could not be made is missing.
    """

    seed: int
    runs: dict[str, PretrainResult]
    evaluations: dict[str, Evaluation] = field(default_factory=dict)

    @cached_property
    def pairs(self) -> dict[str, Pair]:
        """The baseline beside each other arm."""
        baseline = self.runs[DENSE]
        return {arm: Pair(self.seed, baseline, run) for arm, run in self.runs.items() if arm != DENSE}


def mean_loss(seeds: Sequence[Seed], arm: str) -> float:
    """Dense held-out loss of the models of an arm, over the seeds."""
    return mean(known(seed.runs[arm].loss) for seed in seeds)


def arm_to_ship(seeds: Sequence[Seed]) -> str:
    """The arm whose best model is exported, and which the checklist is about: not the dense one."""
    others = list(seeds[0].pairs)
    return LIGHTHOUSE if LIGHTHOUSE in others else min(others, key=lambda arm: mean_loss(seeds, arm))


@dataclass(frozen=True)
class Stripped:
    """The exported model. `failure` says why there is none, or none that was measured."""

    seed: int
    exported: Exported | None
    inference: Inference | None
    card_names: list[str]  # facts of this run that were searched for in the model card, and found
    card_lacks: list[str]
    failure: str | None = None


@dataclass(frozen=True)
class Comparison:
    """The whole comparison. `layers` are the model's; `not_evaluated` are sentences about models that could not be."""

    layers: int
    seeds: list[Seed]
    stripped: Stripped
    not_evaluated: list[str] = field(default_factory=list)

    @property
    def arms(self) -> list[str]:
        """The baseline first."""
        return list(self.seeds[0].runs)

    @property
    def shipped(self) -> str:
        return arm_to_ship(self.seeds)

    @property
    def pairs(self) -> list[Pair]:
        """Of each seed, the baseline and the arm that is shipped."""
        return self.pairs_of(self.shipped)

    def pairs_of(self, arm: str) -> list[Pair]:
        return [seed.pairs[arm] for seed in self.seeds]

    @property
    def which(self) -> str:
        """Which loss of the runs is compared (`Pair.which`)."""
        return self.pairs[0].which

    @property
    def devices(self) -> list[str]:
        """Those of the runs, each once, by names a person knows; how many processes there were, where several."""
        return list(dict.fromkeys(_device(run) for seed in self.seeds for run in seed.runs.values()))

    @property
    def device(self) -> str:
        return " and ".join(self.devices)

    @property
    def settings(self) -> dict:
        """Of the first run that is shipped; those of other seeds differ in the seed and the folder."""
        return self.pairs[0].other.settings

    def method(self, arm: str) -> Method:
        return Method.of(self.seeds[0].runs[arm].settings)

    def losses(self, arm: str) -> list[float]:
        """Dense held-out loss of an arm's models, one of each seed."""
        return [known(seed.runs[arm].loss) for seed in self.seeds]

    def mean_loss(self, arm: str) -> float:
        return mean_loss(self.seeds, arm)

    def numbers(self) -> dict:
        """As JSON takes them; the checklist and the standings are the report's."""
        seeds = [
            {
                "seed": seed.seed,
                "runs": [run.numbers() for run in seed.runs.values()],
                "pairs": [_numbers_of(pair) for pair in seed.pairs.values()],
                "evaluations": {arm: found.to_json() for arm, found in seed.evaluations.items()},
            }
            for seed in self.seeds
        ]
        return {
            "device": self.device,
            "versions": versions(),
            "arms": self.arms,
            "shipped": self.shipped,
            "seeds": seeds,
            "not_evaluated": self.not_evaluated,
            "stripped": asdict(self.stripped),
        }

    def save(self, path: str | Path, **more) -> None:
        write_whole(Path(path), json.dumps(self.numbers() | more, indent=2) + "\n")


def _device(run: PretrainResult) -> str:
    processes = run.settings.get("processes", 1)
    devices = run.settings.get("devices", processes)
    if processes > 1:
        return f"{processes} processes on {run.device}"
    return run.device if devices == 1 else f"{devices} devices of {run.device}"


def _numbers_of(pair: Pair) -> dict:
    return {
        "arm": pair.other.name,
        "control": asdict(pair.control),
        "differences": pair.differences,
        "times_as_fast": pair.times_as_fast,
        "stage_times_as_fast": pair.stage_times_as_fast,
        "compared_loss": pair.which,
        "loss_difference": pair.loss_difference,
        "passes": None if pair.passes is None else dict(zip(("step", "seconds"), pair.passes, strict=True)),
        "sooner": pair.sooner,
        "recovery": None if pair.recovery is None else asdict(pair.recovery),
        "device_hours": {run.name: run.device_hours for run in pair.runs},
    }
