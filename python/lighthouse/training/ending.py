"""What is printed or raised when a run ends early, and where it can resume from."""

from __future__ import annotations

import sys
from contextlib import contextmanager, suppress
from pathlib import Path

from transformers import Trainer

from lighthouse.core.files import NO_SPACE
from lighthouse.text.documents import TextLost
from lighthouse.training.checkpoints import last_whole
from lighthouse.training.result import DiskFull, NotFinite, Stopped, TextFailed


def how_to_go_on(folder: Path) -> str:
    """A sentence about the run in the folder."""
    last = last_whole(folder)
    if last is None:
        return f"There is no whole checkpoint in {folder} yet: with --resume the same command starts again."
    return f"The last whole checkpoint is {last}: the same command with --resume continues from there."


def said(error: Exception) -> str:
    """Its message, without a number where the message is a sentence of ours."""
    if isinstance(error, OSError) and error.filename is None and error.strerror:
        return error.strerror
    return str(error)


@contextmanager
def saying_how_to_go_on(trainer: Trainer, folder: Path):
    """While a run trains. What ends it is raised as a `RunFailed` that says how to resume, or printed with that."""
    try:
        yield
    except BaseException as error:
        with suppress(Exception):
            trainer.callback_handler.on_train_end(trainer.args, trainer.state, trainer.control)  # logs, the bar
        if isinstance(error, NotFinite):
            raise NotFinite(
                f"{error}. The state of this step was not saved. {how_to_go_on(folder)} Resuming meets the same rows "
                "again: to change learning_rate or max_grad_norm, or to leave these rows out, start a new run in "
                "another output_dir."
            ) from None
        if isinstance(error, TextLost):  # a worker's has its traceback in front
            text = str(error).rpartition(f"{TextLost.__name__}: ")[2].strip()
            how = f"{how_to_go_on(folder)} It needs the text that the run began with."
            raise TextFailed(f"{text.rstrip('.')}. {how}") from error
        if isinstance(error, DiskFull):
            raise DiskFull(f"{error} {how_to_go_on(folder)}") from error.__cause__
        if isinstance(error, OSError) and error.errno in NO_SPACE:  # of a log, say
            raise DiskFull(f"{said(error)}. {how_to_go_on(folder)}") from error
        if isinstance(error, (Stopped, KeyboardInterrupt)) and trainer.is_world_process_zero():
            what = error if isinstance(error, Stopped) else f"Interrupted after step {trainer.state.global_step}."
            print(f"\n{what} {how_to_go_on(folder)}", file=sys.stderr, flush=True)
        raise
