"""What a comparison found: the baseline and the two-stage run of each seed, and the model that was stripped.

Everything is judged by the dense held-out loss. The trap is the stage with Lighthouse: its training losses do not
compare with dense ones, so none of them is looked at.
"""

from __future__ import annotations

import json
import platform
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from statistics import mean

import torch
import transformers

import lighthouse
from lighthouse.huggingface.export import Exported
from lighthouse.huggingface.plain import Inference
from lighthouse.training.checkpoints import write_whole
from lighthouse.training.result import PretrainResult, crossing


@dataclass(frozen=True)
class Recovery:
    """The dense held-out loss behind the switch, against `before`, that right before it.

    `jump` is how far it rises above, at the evaluations until it is back; 0 where none of them is higher. It is back
    `steps` optimizer steps and `seconds` of training behind the switch, on the line between two evaluations: 0 where it
    never rose, None where it does not come back. It was first measured, with `first`, `first_steps` behind the switch.
    """

    before: float
    jump: float
    steps: float | None
    seconds: float | None
    first_steps: int
    first: float


def recovery_of(run: PretrainResult) -> Recovery | None:
    """None where nothing was evaluated at the switch or behind it."""
    at = next((i for i, point in enumerate(run.held_out) if point.step == run.switch_step), None)
    if at is None or at + 1 == len(run.held_out):
        return None
    switch, *after = run.held_out[at:]
    first = {"first_steps": after[0].step - switch.step, "first": after[0].loss}
    if after[0].loss <= switch.loss:
        return Recovery(switch.loss, 0.0, 0.0, 0.0, **first)
    back = next((i for i, point in enumerate(after) if point.loss <= switch.loss), None)
    jump = max(point.loss for point in after[:back]) - switch.loss
    if back is None:
        return Recovery(switch.loss, jump, None, None, **first)
    step, seconds = crossing(after[back - 1], after[back], switch.loss)
    return Recovery(switch.loss, jump, step - switch.step, seconds - switch.seconds, **first)


@dataclass(frozen=True)
class Pair:
    """The two runs of a seed: same first weights, text, order of it, steps and schedule."""

    seed: int
    baseline: PretrainResult
    two_stage: PretrainResult

    @property
    def runs(self) -> list[PretrainResult]:
        return [self.baseline, self.two_stage]

    @property
    def times_as_fast(self) -> float:
        """Of the whole training."""
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
        """Of the final dense held-out loss, two-stage less baseline."""
        return self.two_stage.loss - self.baseline.loss

    @cached_property
    def passes(self) -> tuple[float, float] | None:
        """Steps and training seconds at which the two-stage run has the baseline's final loss; None if it never has."""
        return self.two_stage.reaches(self.baseline.loss)

    @property
    def sooner(self) -> float | None:
        """How many times sooner than the baseline it has that loss."""
        return None if self.passes is None else self.baseline.seconds / self.passes[1]

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
    card_names: list[str]  # what of this run was looked for in the model card, and found
    card_lacks: list[str]
    failure: str | None = None


@dataclass(frozen=True)
class Comparison:
    """All of it. `layers` are the model's."""

    layers: int
    pairs: list[Pair]
    stripped: Stripped

    @property
    def devices(self) -> list[str]:
        """Those of the runs, each once, by names a person knows."""
        return list(dict.fromkeys(run.device for pair in self.pairs for run in pair.runs))

    @property
    def device(self) -> str:
        return " and ".join(self.devices)

    @property
    def settings(self) -> dict:
        """Of the first two-stage run; the others' differ in the seed and the folder."""
        return self.pairs[0].two_stage.settings

    def mean_loss(self, which: str) -> float:
        """Final dense held-out loss of the "baseline" or "two_stage" runs, over the seeds."""
        return mean(getattr(pair, which).loss for pair in self.pairs)

    def numbers(self) -> dict:
        """As JSON takes them; the checklist is the report's."""
        pairs = [
            {
                "seed": pair.seed,
                "times_as_fast": pair.times_as_fast,
                "stage_times_as_fast": pair.stage_times_as_fast,
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


def versions() -> dict[str, str]:
    return {
        "lighthouse": lighthouse.__version__,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "python": platform.python_version(),
    }
