"""What a Trainer that calls the model will do with the result.

No argument of the call says so: an evaluation for `compute_metrics` or `predict` is called like one for the loss alone,
which must not hold the logits. So it is read from the Trainer's own variables, up the call stack.
"""

from __future__ import annotations

import inspect
import sys
import threading
from types import FrameType

import torch


@torch.compiler.assume_constant_result
def wants_predictions() -> bool:
    """Whether a Trainer evaluates for more than the loss."""
    frame = _frame_of("prediction_step")
    return frame is not None and not frame.f_locals.get("prediction_loss_only", True)


@torch.compiler.assume_constant_result
def needs_logits() -> str | None:
    """What a Trainer needs logits for, which only a model with an output layer gives; None if it needs none."""
    frame = _frame_of("compute_loss")
    trainer = None if frame is None else frame.f_locals["self"]
    if trainer is None:
        return None
    if trainer.label_smoother is not None:
        return f"label_smoothing_factor={trainer.args.label_smoothing_factor}"
    will_evaluate = trainer.args.eval_strategy != "no" and not trainer.args.prediction_loss_only
    if trainer.compute_metrics is not None and will_evaluate:  # said before the first step, not after many
        return "compute_metrics"
    return "compute_metrics or predict()" if wants_predictions() else None


@torch.compiler.assume_constant_result
def expects_loss() -> bool:
    """Whether a Trainer takes its loss from the model, and would find none without labels."""
    frame = _frame_of("compute_loss")
    if frame is None:
        return False
    trainer = frame.f_locals["self"]
    own = inspect.unwrap(sys.modules["transformers.trainer"].Trainer.compute_loss).__code__
    return frame.f_code is own and trainer.label_smoother is None and trainer.compute_loss_func is None


@torch.compiler.assume_constant_result
def evaluates() -> bool:
    """Whether a Trainer evaluates: that this is dense needs no word."""
    return _frame_of("prediction_step") is not None


def keeps_a_checkpoint() -> bool:
    """Whether a Trainer saves a checkpoint, and will switch to dense attention itself: then it says what is missing."""
    frame = _frame_of("_save_checkpoint")
    callbacks = () if frame is None else frame.f_locals["self"].callback_handler.callbacks
    return any(getattr(callback, "switches_to_dense", False) for callback in callbacks)


def _frame_of(method: str) -> FrameType | None:
    """The innermost call of a Trainer's `method` that this one is in. DataParallel calls the model in other threads."""
    frames = [sys._getframe(1)]
    if threading.current_thread() is not threading.main_thread():
        frames += [frame for thread, frame in sys._current_frames().items() if thread == threading.main_thread().ident]
    return next(filter(None, (_above(frame, method) for frame in frames)), None)


def _above(frame: FrameType | None, method: str) -> FrameType | None:
    module = sys.modules.get("transformers.trainer")
    while frame is not None and module is not None:
        if frame.f_code.co_name == method and isinstance(frame.f_locals.get("self"), module.Trainer):
            return frame
        frame = frame.f_back
    return None
