"""Studies of a few steps of a few milliseconds: the smallest model, at the shortest context worth tuning."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from lighthouse.report import studied
from lighthouse.studies import tune
from lighthouse.studies.tune import Study, TuneOptions, prepare_study
from lighthouse.training import PretrainOptions, TrainingOptions
from training_runs import options, training

CONTEXT = 512

# Three settings that are trained, (1/4, 1/16) the given one, (1/4) and (1/16), and one that is skipped.
GRID = {
    "sampler": "grid",
    "trials": None,
    "grid_values": 2,
    "fixed": ["local_window", "share", "learning_rate", "batch"],
    "levels": [2, 3],
    "level_ratio": ["1/16", "1/4"],
    "topk": ["8"],
}


@contextmanager
def many_small_trials() -> Iterator[pytest.MonkeyPatch]:
    """For the studies of a test module: few steps count, and what was imported is not looked at for garbage."""
    gc.freeze()  # the Trainer collects garbage, twice a trial
    with pytest.MonkeyPatch.context() as patch:
        count_few_steps(patch)
        yield patch
    gc.unfreeze()


def count_few_steps(patch: pytest.MonkeyPatch) -> None:
    """Trials of 4 steps count, and of any time: how fast this machine is just now is not what is tested."""
    patch.setattr(studied, "LEAST_STEPS", 4)
    patch.setattr(studied, "LEAST_DENSE", 2)
    for module in (studied, tune):
        patch.setattr(module, "TOLERANCE", float("inf"))


def asked(
    text: Path, folder: Path, tuning: dict | None = None, steps: int = 4, **changes
) -> tuple[PretrainOptions, TrainingOptions, TuneOptions]:
    """Options of a study; `changes` are to those of the run."""
    ours = {"context": CONTEXT, "share": 0.5, "held_out": 1, "pool_ratios": ["1/4", "1/16"], "select_topk": "8"}
    names = changes.keys() & PretrainOptions.__dataclass_fields__.keys()
    ours |= {name: changes.pop(name) for name in names}
    tuning = {"judge": "tokens", "pruner": "none", "evaluations": 1, "trials": 3, **(tuning or {})}
    return options(text, **ours), training(folder, max_steps=steps, **changes), TuneOptions(**tuning)


def study_of(text: Path, folder: Path, tuning: dict | None = None, **changes) -> Study:
    return prepare_study(*asked(text, folder, tuning, **changes))


def quiet(line: str) -> None:
    """For `Study.run`, whose lines are not looked at."""
