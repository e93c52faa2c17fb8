"""What a study found, as plain numbers in `results.json`: trials, the best of them, the front of loss against time.

A loss reached with more time or tokens than the others had must not win: a trial counts as complete only if it had the
same as each of them (`judged`).
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from statistics import median

from lighthouse.core.files import write_whole
from lighthouse.core.method import Method
from lighthouse.report.known import known
from lighthouse.training.result import DENSE, LIGHTHOUSE, RESULTS, HeldOut

COMPLETE, UNEQUAL, PRUNED, FAILED, SKIPPED, INTERRUPTED, RUNNING, WAITING = STATES = (
    "complete",
    "not comparable",
    "pruned",
    "failed",
    "skipped",
    "interrupted",
    "running",
    "waiting",
)

TOLERANCE = 0.1  # of the time or the tokens that each trial has; and of the time of a dense step, the same work in all
LEAST_STEPS, LEAST_DENSE = 10, 3  # of a trial, and of its steps after the switch


@dataclass(frozen=True)
class Trial:
    """One setting. `options` are its values by option name, `setting` the same in a line, `parameters` Optuna's; `why`
    is what ended it early.

    `seconds` of training and `tokens` are of a trial that trained, up to where it ended; `loss` is the dense held-out
    loss at the end, in nats per token. `seconds_per_step` were measured before, by stage, if time is judged.
    `switch_step` steps were planned for Lighthouse; `stages` has the steps in which it acted and the others, with
    their seconds.
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
    switch_step: int | None = None
    stages: dict[str, dict] = field(default_factory=dict)

    @property
    def texts(self) -> dict[str, str]:
        """The setting's values by option name, as people read them."""
        method = Method.of(self.options).texts()
        others = {name: value for name, value in self.options.items() if name not in method}
        return method | {name: f"{v:.4g}" if isinstance(v, float) else str(v) for name, v in others.items()}


def too_few(steps: int, lighthouse: int) -> str | None:
    """Why this many steps, the first of them with Lighthouse, say nothing about a setting; None if they may."""
    dense = steps - lighthouse
    if steps >= LEAST_STEPS and lighthouse > 0 and dense >= LEAST_DENSE:
        return None
    return (
        f"{steps:,} steps, {lighthouse:,} with Lighthouse and {dense:,} dense; a trial needs at least {LEAST_STEPS}, "
        f"one with Lighthouse and {LEAST_DENSE} dense"
    )


def judged(trials: Sequence[Trial], judge: str, budget: float) -> list[Trial]:
    """The same trials; a complete one that did not have the same time or tokens becomes `UNEQUAL`, with the reason."""
    usual = _usual_dense_seconds(trials) if judge == "time" else {}
    found = []
    for trial in trials:
        why = _unequal(trial, judge, budget, usual) if trial.state == COMPLETE else None
        found.append(trial if why is None else replace(trial, state=UNEQUAL, why=why))
    return found


def _unequal(trial: Trial, judge: str, budget: float, usual: dict[float, float]) -> str | None:
    if trial.switch_step is not None:
        why = too_few(known(trial.steps), trial.switch_step)
        if why is not None:
            return why
        acted = trial.stages.get(LIGHTHOUSE, {}).get("steps", 0)
        if acted != trial.switch_step:
            return f"Lighthouse acted in {acted:,} of the {trial.switch_step:,} steps planned for it"
    had = known(trial.seconds if judge == "time" else trial.tokens)
    if abs(had / budget - 1) > TOLERANCE:
        of_each = f"{had:,.1f} s instead of {budget:,.1f}" if judge == "time" else f"{had:,} tokens of {budget:,.0f}"
        return f"it had {of_each} ({had / budget - 1:+.0%}; {TOLERANCE:.0%} is allowed)"
    expected = usual.get(_tokens_per_step(trial))
    if expected is not None:
        off = known(trial.seconds_per_step)[DENSE] / expected - 1
        if abs(off) > TOLERANCE:
            return (
                f"the machine was not as fast: a dense step, the same work in all trials of its batch, took {off:+.0%} "
                f"of the usual time when its steps were counted ({TOLERANCE:.0%} is allowed)"
            )
    return None


def _tokens_per_step(trial: Trial) -> float:
    return known(trial.tokens) / known(trial.steps)


def _usual_dense_seconds(trials: Sequence[Trial]) -> dict[float, float]:
    """By tokens of a step, what a dense one took when trials were timed: the median over these."""
    by_batch: dict[float, list[float]] = {}
    for trial in trials:
        if trial.state == COMPLETE and trial.seconds_per_step:
            by_batch.setdefault(_tokens_per_step(trial), []).append(trial.seconds_per_step[DENSE])
    return {batch: median(seconds) for batch, seconds in by_batch.items()}


@dataclass(frozen=True)
class StudyResult:
    """A study as it stands. `budget` is what each trial has: seconds of training, or tokens.

    `importance` is each parameter's share, by Optuna; empty if too few trials are complete. `notes` explain
    ranges that a user may not expect.
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
        """The complete trial with the smallest loss; None where none is complete, or none comparable."""
        return min(self.of(COMPLETE), key=lambda trial: known(trial.loss), default=None)

    @property
    def given(self) -> Trial | None:
        """The trial of the given setting, if it is complete."""
        return next((trial for trial in self.of(COMPLETE) if trial.given), None)

    @property
    def front(self) -> list[Trial]:
        """The complete trials that none is both faster and better than, fastest first."""
        front: list[Trial] = []
        for trial in sorted(self.of(COMPLETE), key=lambda trial: (known(trial.seconds), known(trial.loss))):
            if not front or known(trial.loss) < known(front[-1].loss):
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
