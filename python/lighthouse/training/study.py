"""What a study found, as plain numbers in `results.json`: trials, the best of them, the front of loss against time."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path

from lighthouse.training.checkpoints import write_whole
from lighthouse.training.result import RESULTS, HeldOut

COMPLETE, PRUNED, FAILED, SKIPPED, INTERRUPTED, RUNNING, WAITING = (
    "complete",
    "pruned",
    "failed",
    "skipped",
    "interrupted",
    "running",
    "waiting",
)


@dataclass(frozen=True)
class Trial:
    """One setting. `options` are its values by option name, `setting` the same in a line, `parameters` Optuna's; `why`
    is what ended it early.

    `seconds` of training and `tokens` are of a trial that trained, up to where it ended; `loss` is the dense held-out
    loss at the end, in nats per token. `seconds_per_step` were measured beforehand, by stage, where time is judged.
    """

    number: int
    state: str
    setting: str
    options: dict
    parameters: dict
    given: bool
    why: str | None
    loss: float | None
    seconds: float | None
    steps: int | None
    tokens: int | None
    held_out: list[HeldOut]
    seconds_per_step: dict[str, float] | None


@dataclass(frozen=True)
class StudyResult:
    """A study as it stands. `budget` is what each trial has: seconds of training, or tokens.

    `importance` is each parameter's share, by Optuna; empty where too few trials are complete. `notes` say what of the
    ranges is not as one might expect.
    """

    folder: str
    judge: str
    budget: float
    sampler: str
    device: str
    trials: list[Trial]
    importance: dict[str, float]
    notes: list[str]

    def of(self, *states: str) -> list[Trial]:
        """The trials in these states."""
        return [trial for trial in self.trials if trial.state in states]

    @property
    def best(self) -> Trial | None:
        """The complete trial with the smallest loss."""
        return min(self.of(COMPLETE), key=lambda trial: trial.loss, default=None)

    @property
    def given(self) -> Trial | None:
        """The trial of the given setting, if it is complete."""
        return next((trial for trial in self.of(COMPLETE) if trial.given), None)

    @property
    def front(self) -> list[Trial]:
        """The complete trials that none is both faster and better than, fastest first."""
        front = []
        for trial in sorted(self.of(COMPLETE), key=lambda trial: (trial.seconds, trial.loss)):
            if not front or trial.loss < front[-1].loss:
                front.append(trial)
        return front

    def save(self, path: str | Path) -> None:
        numbers = asdict(self)
        numbers |= {
            "best": self.best and self.best.number,
            "given": self.given and self.given.number,
            "front": [trial.number for trial in self.front],
        }
        write_whole(Path(path), json.dumps(numbers, indent=1) + "\n")

    @property
    def results(self) -> Path:
        return Path(self.folder) / RESULTS
