"""The terminal while a run trains: what is logged stands above the progress bar, and nothing is said twice."""

from __future__ import annotations

import logging
import sys
from collections.abc import Iterator
from contextlib import contextmanager

from tqdm.auto import tqdm
from tqdm.contrib.logging import logging_redirect_tqdm

from lighthouse.huggingface import state

# By logger. What a wrapped model says to those who train it themselves: a run says both at its start, and at its end
# where they matter, that held-out losses are dense, and whether the model had a dense stage. And what the Trainer says
# of every resumed run: it compares a checkpoint's numbers of steps with the shares that they were worked out from.
# What must be the same is compared before (`resume`).
SAID_BY_A_RUN = {
    state.logger.name: ("in eval() attention is dense", "the plain model is saved"),
    "transformers.trainer_utils": ("do not match the ones in the `trainer_state.json`",),
    "transformers.trainer": ("do not match the ones in the `trainer_state.json`",),  # in earlier versions
}


@contextmanager
def without_what_a_run_says() -> Iterator[None]:
    """Keeps the sentences `SAID_BY_A_RUN` out of the log."""

    def others(record: logging.LogRecord) -> bool:
        return not any(sentence in record.getMessage() for sentence in SAID_BY_A_RUN[record.name])

    for name in SAID_BY_A_RUN:
        logging.getLogger(name).addFilter(others)
    try:
        yield
    finally:
        for name in SAID_BY_A_RUN:
            logging.getLogger(name).removeFilter(others)


@contextmanager
def above_the_bar() -> Iterator[None]:
    """Lines that go to the terminal by `logging` are written above a progress bar, and not into it."""
    names = (None, "transformers")
    with logging_redirect_tqdm([log for log in map(logging.getLogger, names) if _on_the_terminal(log)], tqdm):
        yield


def _on_the_terminal(log: logging.Logger) -> bool:
    return any(getattr(handler, "stream", None) in (sys.stdout, sys.stderr) for handler in log.handlers)
