"""What each trial has, equal time or equal tokens, and how many steps that is.

Equal time is planned in advance: the learning-rate schedule and the switch need the number of steps. So a few steps of
each stage are timed, and a trial gets as many steps as fit into the budget, with a whole schedule. The time that it
really took is reported with its loss, and a trial that took more or less than the budget is not compared
(`report.studied.judged`).
"""

from __future__ import annotations

import bisect
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from lighthouse.core.files import remove
from lighthouse.report.studied import too_few
from lighthouse.studies.trial import StepClock, Timed, Unequal, made_quiet
from lighthouse.training.callbacks import StopOnSignal
from lighthouse.training.form import tokens_per_step
from lighthouse.training.options import PretrainOptions, TrainingOptions
from lighthouse.training.result import DENSE, LIGHTHOUSE
from lighthouse.training.run import Run

WARM_UP, TIMED = 2, 4  # steps of each stage before a trial

PerStep = dict[str, float]  # seconds, by stage


def too_few_of(options: PretrainOptions, training: TrainingOptions, steps: int) -> str | None:
    """Why this many steps say nothing about these options; None if they do."""
    return too_few(steps, options.lighthouse_steps(steps, tokens_per_step(options, training)))


def seconds_of(options: PretrainOptions, training: TrainingOptions, steps: float, per_step: PerStep) -> float:
    """The seconds that this many steps take."""
    # Half a step more or less decides which number is the nearest.
    lighthouse = options.lighthouse_steps(steps, tokens_per_step(options, training))  # type: ignore[arg-type]
    return lighthouse * per_step[LIGHTHOUSE] + (steps - lighthouse) * per_step[DENSE]


def steps_in(budget: float, options: PretrainOptions, training: TrainingOptions, per_step: PerStep | None) -> int:
    """How many steps fit into seconds, or without `per_step` into tokens, to the nearest.

    Raises `Unequal` if this many say nothing.
    """
    if per_step is None:
        steps = round(budget / tokens_per_step(options, training))
    else:
        numbers = range(1, 3 + int(budget / min(per_step.values())))
        steps = bisect.bisect_right(
            numbers, budget, key=lambda steps: seconds_of(options, training, steps - 0.5, per_step)
        )
    why = too_few_of(options, training, steps)
    if why is not None:
        of_each = f"{budget:,.0f} tokens" if per_step is None else f"{budget:,.1f} s"
        raise Unequal(f"{of_each} are {why}")
    return steps


def time_steps(
    options: PretrainOptions,
    training: TrainingOptions,
    folder: Path,
    stop: StopOnSignal,
    prepared: Callable[[PretrainOptions, TrainingOptions], Run],
) -> PerStep:
    """Trains a few steps of each stage in `folder`, which is removed; `training` is changed."""
    steps = WARM_UP + TIMED
    options = replace(options, switch_step=steps, switch_tokens=None)
    training.max_steps = 2 * steps
    clock = StepClock(training.device)
    remove(folder)
    try:
        prepared(options, made_quiet(training, folder)).train(callbacks=[clock], keep_model=False, stop=stop)
    except Timed:
        pass
    finally:
        remove(folder)
    # The fastest: what the device can do, whoever else uses it just now.
    return {LIGHTHOUSE: min(clock.seconds[WARM_UP:steps]), DENSE: min(clock.seconds[steps + WARM_UP :])}
