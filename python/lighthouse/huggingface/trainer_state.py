"""What Transformers' Trainer saves of a run: its checkpoints' names, their state, and which of them is the best."""

from __future__ import annotations

from pathlib import Path

from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

STATE = "trainer_state.json"


def step_of(checkpoint: Path) -> int:
    """The step in a checkpoint's name; -1 if there is none."""
    number = checkpoint.name.removeprefix(f"{PREFIX_CHECKPOINT_DIR}-")
    return int(number) if number.isdecimal() else -1


def best_checkpoint(state, training) -> Path | None:
    """The best checkpoint, whose weights the Trainer loads at its end with `load_best_model_at_end`; None without one.

    `state` is a `TrainerState`, `training` the `TrainingArguments`. `best_global_step` is not used: it may have no
    checkpoint.
    """
    best = state.best_model_checkpoint if training.load_best_model_at_end else None
    return Path(best) if best is not None and Path(best).is_dir() else None
