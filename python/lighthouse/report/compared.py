"""What a comparison found: the baseline and the two-stage run of each seed, and the model that was stripped.

Everything is judged by the dense held-out loss. Training losses of the stage with Lighthouse are not comparable with
dense ones, so none of them is used. And times are comparable only if the machine was equally fast in both runs: each
run's dense steps show this, since they do the same work (`Control`).
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from itertools import pairwise
from pathlib import Path
from statistics import mean, median

from lighthouse.core.files import write_whole
from lighthouse.core.method import Method
from lighthouse.export.export import Exported
from lighthouse.export.plain import Inference
from lighthouse.report.known import known
from lighthouse.training.depends import FREE_BETWEEN_RUNS
from lighthouse.training.result import HeldOut, PretrainResult, crossing, versions
from lighthouse.training.resume import differences

AGREE = 0.05  # dense steps of two runs on a quiet machine differ by less than this
SLOW = 0.1  # the most of a run's time that may be in stretches slower than its own median, such as first steps
LEAST_DENSE_STEPS = 8  # of each run: fewer do not show how fast the machine was

# In which the two runs of a seed differ on purpose.
OF_ONE_RUN = frozenset({"dense_only", "dense_layers"})


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

    `baseline` and `two_stage` are their tokens per second in the median step, None where there are fewer than
    `LEAST_DENSE_STEPS`. `slow` is the part of each run's training time that went into stretches slower than its stages'
    own medians. `why_not` says why the times are not comparable, if so.
    """

    baseline: float | None
    two_stage: float | None
    slow: tuple[float, float]
    why_not: str | None

    @property
    def difference(self) -> float:
        """By how much the faster run's dense steps were faster than the other's."""
        rates = known(self.baseline), known(self.two_stage)
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


def control_of(baseline: PretrainResult, two_stage: PretrainResult) -> Control:
    runs = (baseline, two_stage)
    dense = [step_seconds(run, run.switch_step, run.steps) for run in runs]
    enough = min(map(len, dense)) >= LEAST_DENSE_STEPS
    tokens = two_stage.settings.get("tokens_per_step", two_stage.context)
    ours, theirs = (tokens / median(steps) if enough else None for steps in dense)
    found = Control(ours, theirs, (_slow(baseline), _slow(two_stage)), why_not=None)
    why_not = None
    if baseline.device != two_stage.device:
        why_not = (
            f"The runs were not on the same device: {baseline.device or 'unknown'}, {two_stage.device or 'unknown'}."
        )
    elif baseline.versions != two_stage.versions:
        named = sorted(baseline.versions.keys() | two_stage.versions.keys())
        which = [name for name in named if baseline.versions.get(name) != two_stage.versions.get(name)]
        of_each = [", ".join(f"{name} {run.versions.get(name, 'unknown')}" for name in which) for run in runs]
        why_not = f"The runs had different versions: the baseline {of_each[0]}, the two-stage run {of_each[1]}."
    elif not enough:
        why_not = (
            f"It is not known whether the machine was equally fast in both runs: this needs {LEAST_DENSE_STEPS} dense "
            f"steps of each, and {len(dense[0]):,} of the baseline and {len(dense[1]):,} of the two-stage run were "
            "measured."
        )
    elif found.difference > AGREE:
        why_not = (
            f"The machine was busy: dense steps, the same work in both runs, ran at {ours:,.0f} tokens/s in "
            f"the baseline and at {theirs:,.0f} in the two-stage run; they must agree within {AGREE:.0%}."
        )
    elif max(found.slow) > SLOW:
        why_not = (
            f"The machine was busy: {found.slow[0]:.0%} of the baseline's time and {found.slow[1]:.0%} of the "
            f"two-stage run's went into stretches slower than the run's own median; at most {SLOW:.0%} may."
        )
    return replace(found, why_not=why_not)


@dataclass(frozen=True)
class Pair:
    """The two runs of a seed: same first weights, text, order of it, steps and schedule."""

    seed: int
    baseline: PretrainResult
    two_stage: PretrainResult

    @property
    def runs(self) -> list[PretrainResult]:
        return [self.baseline, self.two_stage]

    @cached_property
    def control(self) -> Control:
        return control_of(self.baseline, self.two_stage)

    @cached_property
    def differences(self) -> list[str]:
        """In what the two runs differ besides attention; empty if in nothing."""
        baseline, two_stage = self.runs
        # What the baseline "was" the two-stage run "is".
        found = differences(baseline.settings, two_stage.settings, FREE_BETWEEN_RUNS | OF_ONE_RUN)
        if baseline.steps != two_stage.steps:
            found.append(f"the baseline has {baseline.steps:,} steps and the two-stage run {two_stage.steps:,}")
        first = [point.loss for run in self.runs for point in run.held_out[:1] if point.step == 0]
        if len(first) == 2 and first[0] != first[1]:
            found.append(f"the loss before the first step is {first[0]:.4f} and {first[1]:.4f}")
        if baseline.lighthouse is not None:
            found.append(f"the baseline had Lighthouse in {baseline.lighthouse.steps:,} steps")
        return found

    @property
    def which(self) -> str:
        """Which loss of a run is compared, that of the model it saved: "final", or "best" of its checkpoints."""
        return "best" if any(run.settings.get("load_best_model_at_end") for run in self.runs) else "final"

    @property
    def left_dense(self) -> int:
        """Steps of the two-stage run that were planned for Lighthouse but in which it did not act."""
        lighthouse = self.two_stage.lighthouse
        return self.two_stage.switch_step - (lighthouse.steps if lighthouse else 0)

    @property
    def times_as_fast(self) -> float:
        """Of the whole training. Meaningful only if `control` says that the times are comparable."""
        return self.baseline.seconds / self.two_stage.seconds

    @property
    def stage_times_as_fast(self) -> float | None:
        """Of the stage with Lighthouse, by tokens per second; None where no step was of one of the two."""
        lighthouse, dense = self.two_stage.lighthouse, self.baseline.dense
        if lighthouse is None or dense is None:
            return None
        return lighthouse.tokens_per_second / dense.tokens_per_second

    @property
    def loss_difference(self) -> float:
        """Of the dense held-out loss of the saved models (`which`), two-stage less baseline."""
        return known(self.two_stage.loss) - known(self.baseline.loss)

    @cached_property
    def passes(self) -> tuple[float, float] | None:
        """Steps and training seconds at which the two-stage run has the baseline's loss; None if it never has."""
        return self.two_stage.reaches(known(self.baseline.loss))

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
        return recovery_of(self.two_stage)

    @property
    def baseline_then(self) -> float | None:
        """The baseline's last measured loss within the time of the whole two-stage run."""
        return self.baseline.loss_at(self.two_stage.seconds)


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
    """The whole comparison. `layers` are the model's."""

    layers: int
    pairs: list[Pair]
    stripped: Stripped

    @property
    def devices(self) -> list[str]:
        """Those of the runs, each once, by names a person knows; how many processes there were, where several."""
        return list(dict.fromkeys(_device(run) for pair in self.pairs for run in pair.runs))

    @property
    def device(self) -> str:
        return " and ".join(self.devices)

    @property
    def settings(self) -> dict:
        """Of the first two-stage run; the others' differ in the seed and the folder."""
        return self.pairs[0].two_stage.settings

    @property
    def method(self) -> Method:
        """Of the two-stage runs."""
        return Method.of(self.settings)

    def mean_loss(self, which: str) -> float:
        """Dense held-out loss of the models of the "baseline" or "two_stage" runs, over the seeds."""
        return mean(known(getattr(pair, which).loss) for pair in self.pairs)

    def numbers(self) -> dict:
        """As JSON takes them; the checklist is the report's."""
        pairs = [
            {
                "seed": pair.seed,
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
                "runs": [run.numbers() for run in pair.runs],
            }
            for pair in self.pairs
        ]
        return {"device": self.device, "versions": versions(), "pairs": pairs, "stripped": asdict(self.stripped)}

    def save(self, path: str | Path, **more) -> None:
        write_whole(Path(path), json.dumps(self.numbers() | more, indent=2) + "\n")


def _device(run: PretrainResult) -> str:
    processes = run.settings.get("processes", 1)
    devices = run.settings.get("devices", processes)
    if processes > 1:
        return f"{processes} processes on {run.device}"
    return run.device if devices == 1 else f"{devices} devices of {run.device}"
