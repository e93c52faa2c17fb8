"""The same run twice, dense and in two stages, for a comparison; and the sizes with which it takes minutes.

Both have the same first weights, text, order of it, steps and schedule: they differ in the attention alone.
"""

from __future__ import annotations

import copy
from dataclasses import replace
from pathlib import Path

from lighthouse.training.options import PretrainOptions, TrainingOptions
from lighthouse.training.result import PretrainResult
from lighthouse.training.run import Run, prepare


def demo_defaults(folder: str | Path = "runs/demo") -> dict:
    """Options, by name, of a comparison that two processor cores finish in under six minutes.

    The output folder is the first of `folder`, `folder-2`, ... that does not exist.
    """
    return {
        "model": "nano",
        "context": 8192,
        "held_out": 4,
        "share": 0.75,
        "max_steps": 72,
        "learning_rate": 2e-3,
        "lr_scheduler_type": "linear",
        "warmup_steps": 0.2,
        "max_grad_norm": 0.3,
        "logging_steps": 3,
        "eval_steps": 9,
        "save_strategy": "no",
        "output_dir": _free(Path(folder)),
    }


def pretrain_both(options: PretrainOptions, training: TrainingOptions) -> list[PretrainResult]:
    """Trains the plain model and, from the same weights on the same text, one in two stages.

    Returns the dense and the two-stage run's results; they are in the folders `dense` and `two-stage` of
    `training.output_dir`. Both runs are checked before the first begins, and raise what `prepare` raises.
    """
    return [run.train() for run in prepare_both(options, training)]


def prepare_both(options: PretrainOptions, training: TrainingOptions) -> list[Run]:
    """The two runs of `pretrain_both`, checked."""
    if not options.uses_lighthouse:
        raise ValueError("a comparison needs steps with Lighthouse: a share above 0, and not dense_only")
    runs = []
    for name, dense_only in (("dense", True), ("two-stage", False)):
        training_here = copy.deepcopy(training)
        training_here.output_dir = str(Path(training.output_dir) / name)
        runs.append(prepare(replace(options, dense_only=dense_only), training_here))
    return runs


def _free(folder: Path) -> str:
    candidate, number = folder, 1
    while candidate.exists():
        number += 1
        candidate = folder.with_name(f"{folder.name}-{number}")
    return str(candidate)
