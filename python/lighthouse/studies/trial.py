"""What a trial of a study needs around its run: its judge, its clock and its log."""

from __future__ import annotations

import copy
import logging
import math
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, redirect_stderr, redirect_stdout
from pathlib import Path
from time import perf_counter
from typing import IO

import optuna
import torch
from accelerate.utils.memory import should_reduce_batch_size
from transformers import TrainerCallback
from transformers.trainer_utils import IntervalStrategy, SaveStrategy

from lighthouse.speed.measure import synchronize
from lighthouse.training.callbacks import Record
from lighthouse.training.options import TrainingOptions
from lighthouse.training.result import RunFailed
from lighthouse.training.run import Run

Say = Callable[[str], None]


class Judge(Record):
    """Evaluates evenly over the dense stage, tells Optuna each loss, and ends a trial that it prunes.

    The k-th evaluation is at the same part of each trial's dense stage, whatever its steps, and Optuna knows it by the
    number `before + k`. With another share it is at another place of the schedule: trials of each share have another
    `before`, so that only losses at the same place are compared; and never one from before the switch (METHOD 8). The
    first loss prunes nothing: it shows the size of the jump, not how far the loss recovers.

    A trial that has trained for more than `most` seconds is ended by `Unequal`.
    """

    def __init__(
        self,
        trial: optuna.Trial,
        switch_step: int,
        steps: int,
        evaluations: int,
        status: Say,
        what: str,
        most: float = math.inf,
        before: int = 0,
    ):
        super().__init__(switch_step)
        self.most, self.before = most, before
        dense = steps - switch_step
        self.trial = trial
        self.places = {switch_step + -(-dense * k // evaluations): k for k in range(1, evaluations + 1)}
        self.status, self.what = status, what

    @property
    def steps(self) -> int:
        """Until now."""
        return sum(stage["steps"] for stage in self.stages.values())

    def on_step_end(self, args, state, control, model=None, **kwargs):
        if state.global_step in self.places:
            control.should_evaluate = True  # before the clock is read, which then waits for the device
        super().on_step_end(args, state, control, model=model, **kwargs)
        self.status(f"{self.what}: step {state.global_step} of {state.max_steps}")
        if self.seconds > self.most:
            raise Unequal(
                f"{self.seconds:,.1f} s at step {state.global_step:,} of {state.max_steps:,} exceed the "
                f"{self.most:,.1f} s allowed: the steps became slower than when they were timed"
            )
        return control

    def on_evaluate(self, args, state, control, metrics=None, **kwargs):
        super().on_evaluate(args, state, control, metrics=metrics, **kwargs)
        place = self.places.get(state.global_step)
        if place is None:
            return
        self.trial.report(metrics["eval_loss"], self.before + place)
        if place > 1 and state.global_step < state.max_steps and self.trial.should_prune():
            raise optuna.TrialPruned(f"{metrics['eval_loss']:.4f} at step {state.global_step} of {state.max_steps}")


class SameRows(TrainerCallback):
    """Ends the study if a trial has other rows than its first: they are known only once the text is tokenized."""

    def __init__(self, study: optuna.Study, run: Run, locked: Callable[[], AbstractContextManager]):
        self.study, self.run, self.locked = study, run, locked

    def on_train_begin(self, args, state, control, **kwargs):
        rows = self.run.corpus.rows_fingerprint
        with self.locked():
            first = self.study.user_attrs.get("rows")
            if first is None:
                self.study.set_user_attr("rows", rows)
        if first not in (None, rows):
            raise RunFailed(
                f"The text is not the one that the study began with: it was {first!r}, is now {rows!r}. "
                "Restore the text, or start a new study in another --output_dir."
            )


class Unequal(Exception):
    """The trial cannot have, or did not have, the same time or tokens as the others. The message says why."""


class Timed(Exception):
    """All steps to be timed are timed."""


class StepClock(TrainerCallback):
    """The seconds of each step, its data included; waits for the device."""

    def __init__(self, device: torch.device):
        self.device = device
        self.seconds: list[float] = []
        self._mark = 0.0

    def on_train_begin(self, args, state, control, **kwargs):
        self._mark = perf_counter()

    def on_step_end(self, args, state, control, **kwargs):
        synchronize(self.device)
        now = perf_counter()
        self.seconds.append(now - self._mark)
        self._mark = now
        if state.global_step == state.max_steps:
            raise Timed


@contextmanager
def output_into(log: IO[str]) -> Iterator[None]:
    """Sends all output, log lines and warnings there."""
    root = logging.getLogger()
    before = root.handlers
    library = logging.getLogger("transformers")
    own = library.handlers, library.propagate
    root.handlers = [logging.StreamHandler(log)]
    library.handlers, library.propagate = [], True
    try:
        with redirect_stdout(log), redirect_stderr(log):
            yield
    finally:
        root.handlers = before
        library.handlers, library.propagate = own
        log.flush()


def made_quiet(training: TrainingOptions, folder: Path) -> TrainingOptions:
    """A trial's: nothing is saved, and only `Judge` says when to evaluate."""
    training = copy.deepcopy(training)
    training.output_dir = str(folder)
    training.resume = False
    training.eval_strategy, training.save_strategy = IntervalStrategy.NO, SaveStrategy.NO
    training.eval_on_start = training.push_to_hub = False
    training.report_to = []  # type: ignore[assignment]  # as its own check has left it where it was none
    training.disable_tqdm = True
    return training


def out_of_memory(error: Exception) -> bool:
    """Whether an error says that memory ran out, on any device."""
    return isinstance(error, MemoryError) or should_reduce_batch_size(error)
