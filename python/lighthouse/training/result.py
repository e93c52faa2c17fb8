"""What a run found, as plain numbers in `results.json`; and how it may end early."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field
from itertools import pairwise
from pathlib import Path
from platform import python_version

import torch
import transformers

from lighthouse.core.files import write_whole
from lighthouse.core.version import VERSION

LIGHTHOUSE = "lighthouse"
DENSE = "dense"

RESULTS = "results.json"
PLAIN = ("name", "model_folder", "context", "steps", "switch_step", "model_step", "settings", "warnings")

STOPPED = 143  # 128 + SIGTERM


class RunFailed(RuntimeError):
    """A run could not continue. The message says what to do; the last whole checkpoint is as it was. Exit status 1."""


class Refused(RunFailed, ValueError):
    """What cannot be trained on or with, found only when the rows or the model were made. Nothing was trained."""


class DiskFull(RunFailed):
    """There is no space for a checkpoint or for the model."""


class TextFailed(RunFailed, ValueError):
    """Text that is read while training changed, or can be read no further."""


class NotFinite(RunFailed):
    """A loss, a gradient norm or a weight is NaN or infinite."""


class Stopped(SystemExit):
    """A signal stopped the run after a step, and all of it is in a checkpoint. Exit status 143.

    Like KeyboardInterrupt not an `Exception`: no `except Exception` of a script continues as if the run were finished.
    """

    def __init__(self, message: str):
        super().__init__(STOPPED)
        self.message = message

    def __str__(self) -> str:
        return self.message


@dataclass(frozen=True)
class Stage:
    """Optimizer steps of a stage, their seconds without evaluation, saving and compilation, their tokens.

    `peak_memory` is in bytes, of the process that had most: on CUDA what PyTorch had allocated, on a CPU what was
    resident of the whole process, interpreter and libraries included. None where the system does not report it.
    """

    steps: int
    seconds: float
    tokens: int
    peak_memory: int | None = None

    @property
    def tokens_per_second(self) -> float:
        return self.tokens / self.seconds


@dataclass(frozen=True)
class HeldOut:
    """The held-out loss, nats per token under dense attention, after `step` steps and `seconds` of training."""

    step: int
    seconds: float
    stage: str
    loss: float


def crossing(a: HeldOut, b: HeldOut, loss: float) -> tuple[float, float]:
    """The step and the training seconds at which the line from `a` down to `b` has `loss`."""
    part = (a.loss - loss) / (a.loss - b.loss)
    return a.step + part * (b.step - a.step), a.seconds + part * (b.seconds - a.seconds)


@dataclass(frozen=True)
class PretrainResult:
    """One run. `switch_step` steps were planned with Lighthouse, 0 in a dense run; `stages` are what they were.

    `model_folder` is None where no model was kept. The saved model is that after `model_step`: the last step, or the
    best with `load_best_model_at_end`. `settings` are all options by name; `warnings` say what keeps the model from
    use. `device` is a name a person knows, `versions` are those that it was trained with (`versions()`),
    `weights` a digest of the model's files (`checkpoints.weights_in`).
    """

    name: str
    model_folder: str | None
    context: int
    steps: int
    switch_step: int
    model_step: int
    stages: dict[str, Stage]
    held_out: list[HeldOut]
    settings: dict
    warnings: list[str] = field(default_factory=list)
    device: str = ""
    versions: dict[str, str] = field(default_factory=dict)
    weights: str = ""

    @property
    def seconds(self) -> float:
        """Training seconds of all stages."""
        return sum(stage.seconds for stage in self.stages.values())

    @property
    def device_hours(self) -> float:
        """Training hours summed over devices; the CPU of a process counts as one."""
        return self.seconds * self.settings.get("devices", self.settings.get("processes", 1)) / 3600

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

    def reaches(self, loss: float) -> tuple[float, float] | None:
        """The steps and the training seconds at which the dense held-out loss first is `loss`; None if it never is.

        Interpolated linearly between two evaluations. In a run with Lighthouse only those from the switch on count.
        """
        points = [point for point in self.held_out if point.step >= self.switch_step]
        if points and points[0].loss <= loss:
            return points[0].step, points[0].seconds
        for a, b in pairwise(points):
            if b.loss <= loss:
                return crossing(a, b, loss)
        return None

    def numbers(self) -> dict:
        """All of it, and what follows from it, as JSON takes it."""
        numbers = asdict(self)
        for name, stage in self.stages.items():
            numbers["stages"][name]["tokens_per_second"] = stage.tokens_per_second
        return numbers | {"seconds": self.seconds, "loss": self.loss}

    def save(self, path: str | Path) -> None:
        write_whole(Path(path), json.dumps(self.numbers(), indent=2) + "\n")

    @classmethod
    def load(cls, path: str | Path) -> PretrainResult:
        numbers = read_json(Path(path))
        stages = {
            name: Stage(stage["steps"], stage["seconds"], stage["tokens"], stage.get("peak_memory"))
            for name, stage in numbers["stages"].items()
        }
        return cls(
            **{key: numbers[key] for key in PLAIN},
            stages=stages,
            held_out=[HeldOut(**point) for point in numbers["held_out"]],
            device=numbers.get("device", ""),
            versions=numbers.get("versions", {}),
            weights=numbers.get("weights", ""),
        )


def read_json(path: Path) -> dict:
    """What a run or a command has written into a file. Raises `ValueError` if it is not that any more."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{str(path)!r} is damaged, it is not JSON: {error}") from None
    if not isinstance(found, dict):
        raise ValueError(f"{str(path)!r} is damaged: names with values are needed")
    return found


def versions() -> dict[str, str]:
    """The versions of the packages on which losses and times depend."""
    return {
        "lighthouse": VERSION,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "python": python_version(),
    }
