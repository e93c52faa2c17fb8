"""What Transformers' Trainer leaves of a run: its checkpoints' names, their state, and which of them is the best."""

from __future__ import annotations

from pathlib import Path

from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

STATE = "trainer_state.json"


def step_of(checkpoint: Path) -> int:
    """The step in a checkpoint's name; -1 if there is none."""
    number = checkpoint.name.removeprefix(f"{PREFIX_CHECKPOINT_DIR}-")
    return int(number) if number.isdecimal() else -1


def best_checkpoint(state, training) -> Path | None:
    """The checkpoint whose weights the Trainer loads at its end, where that is to be the best and there is one.

    `state` is a `TrainerState`, `training` the `TrainingArguments`. Not by `best_global_step`, of which there may be no
    checkpoint.
    """
    best = state.best_model_checkpoint if training.load_best_model_at_end else None
    return Path(best) if best is not None and Path(best).is_dir() else None
