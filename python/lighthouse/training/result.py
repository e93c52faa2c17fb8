"""What a run found, as plain numbers, written to and read from `results.json`."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path

from lighthouse.training.callbacks import DENSE, LIGHTHOUSE

RESULTS = "results.json"
PLAIN = ("name", "model_folder", "context", "steps", "switch_step", "model_step", "settings")


@dataclass(frozen=True)
class Stage:
    """Optimizer steps of a stage, the seconds they took without evaluation and saving, and their tokens."""

    steps: int
    seconds: float
    tokens: int

    @property
    def tokens_per_second(self) -> float:
        return self.tokens / self.seconds


@dataclass(frozen=True)
class HeldOut:
    """The held-out loss, nats per token under dense attention, behind a step and so many training seconds."""

    step: int
    seconds: float
    stage: str
    loss: float


@dataclass(frozen=True)
class PretrainResult:
    """One run. `switch_step` is the number of Lighthouse's steps: 0 in a dense run.

    The saved model is that behind `model_step`: the last step, or the best with `load_best_model_at_end`.
    """

    name: str
    model_folder: str
    context: int
    steps: int
    switch_step: int
    model_step: int
    stages: dict[str, Stage]
    held_out: list[HeldOut]
    settings: dict

    @property
    def seconds(self) -> float:
        """Training seconds of all stages."""
        return sum(stage.seconds for stage in self.stages.values())

    @property
    def loss(self) -> float | None:
        """The dense held-out loss of the saved model."""
        return next((point.loss for point in reversed(self.held_out) if point.step == self.model_step), None)

    @property
    def lighthouse(self) -> Stage | None:
        return self.stages.get(LIGHTHOUSE)

    @property
    def dense(self) -> Stage | None:
        return self.stages.get(DENSE)

    def loss_at(self, seconds: float) -> float | None:
        """The dense held-out loss of the last evaluation within so many training seconds; None before the first."""
        return next((point.loss for point in reversed(self.held_out) if point.seconds <= seconds), None)

    def seconds_to(self, loss: float) -> float | None:
        """The training seconds of the first evaluation at or below `loss`; None if there is none."""
        return next((point.seconds for point in self.held_out if point.loss <= loss), None)

    def save(self, path: str | Path) -> None:
        numbers = asdict(self)
        for name, stage in self.stages.items():
            numbers["stages"][name]["tokens_per_second"] = stage.tokens_per_second
        numbers |= {"seconds": self.seconds, "loss": self.loss}
        Path(path).write_text(json.dumps(numbers, indent=2) + "\n", encoding="utf-8")

    @classmethod
    def load(cls, path: str | Path) -> PretrainResult:
        numbers = json.loads(Path(path).read_text(encoding="utf-8"))
        stages = {
            name: Stage(stage["steps"], stage["seconds"], stage["tokens"]) for name, stage in numbers["stages"].items()
        }
        return cls(
            **{key: numbers[key] for key in PLAIN},
            stages=stages,
            held_out=[HeldOut(**point) for point in numbers["held_out"]],
        )
