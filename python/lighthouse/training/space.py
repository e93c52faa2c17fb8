"""Whether a folder can be written to, and its disk has space for what a run saves: its checkpoints and the model."""

from __future__ import annotations

import logging
import math
import os
import tempfile
from contextlib import contextmanager
from pathlib import Path

from transformers import TrainingArguments

from lighthouse.core.files import NO_SPACE, free_bytes
from lighthouse.training.checkpoints import checkpoints_in
from lighthouse.training.result import DiskFull

logger = logging.getLogger(__name__)


def check_writable(name: str, folder: str | Path, *, weights: bool = True) -> None:
    """Raises `OSError` if `folder`, which may not exist yet, cannot be written to; `name` is its option.

    With `weights` also if safetensors could not read them there again. By trying it, and leaving nothing behind: what
    the mode says is not all, as of a file system mounted read-only.
    """
    if not os.fspath(folder):
        raise ValueError(f"{name}='': the name of a folder is needed")
    try:
        os.fspath(folder).encode("utf-8", "strict" if weights else "surrogateescape")
    except UnicodeEncodeError:
        raise OSError(
            f"{name}={os.fspath(folder)!r}: safetensors reads only names in UTF-8; name another place"
        ) from None
    if os.path.isfile(folder):  # not pathlib's, which raises for a name that is too long
        raise FileExistsError(f"{name}={str(folder)!r} is a file: a folder is needed")
    above = Path(folder).absolute()
    while not os.path.lexists(above):
        above = above.parent
    try:
        if not above.is_dir():
            raise NotADirectoryError(f"{name}={str(folder)!r}: {str(above)!r} is not a folder; name another place")
        with tempfile.TemporaryDirectory(prefix=".lighthouse-", dir=above) as tried:
            (Path(tried) / Path(folder).absolute().relative_to(above)).mkdir(parents=True, exist_ok=True)
    except OSError as error:
        if error.errno is None:
            raise
        raise type(error)(
            f"{name}={str(folder)!r}: {str(above)!r} cannot be written to ({error.strerror}); name another place"
        ) from error


def check_space(model, training: TrainingArguments, folder: Path, *, finished: bool) -> None:
    """Refuses a run that cannot save one checkpoint, and warns of one that cannot keep all it should."""
    free = free_bytes(folder)
    if training.process_index != 0:
        return
    weights, one, saves = weight_bytes(model), 0, 0
    if training.save_strategy != "no" and not finished:
        one = checkpoint_bytes(model, training)
        saves = 1
        if training.save_strategy == "steps":
            every = training.save_steps
            every = every if every >= 1 else math.ceil(every * training.max_steps)
            saves = math.ceil(training.max_steps / every)
        if training.save_total_limit:
            there = len(checkpoints_in(folder))
            saves = max(1, min(saves, training.save_total_limit + 1 - there))  # one more while the oldest is there
    if free < max(one, weights):
        raise DiskFull(
            f"output_dir={str(folder)!r}: a checkpoint needs about {gb(one)} and the model {gb(weights)}, "
            f"but {gb(free)} are free there: make room, or use another output_dir"
        )
    if free < saves * one + weights:
        logger.warning(
            f"output_dir={str(folder)!r}: {saves} more checkpoints of about {gb(one)} and the model of "
            f"{gb(weights)} will not fit into the {gb(free)} that are free: lower save_total_limit or make room"
        )


@contextmanager
def space_for(what: str, folder: Path, needed: int):
    """Turns the error of a full disk into `DiskFull`. PyTorch's writer gives no error number: free space decides."""
    try:
        yield
    except Exception as error:
        free = free_bytes(folder)
        if getattr(error, "errno", None) in NO_SPACE or "os error 28" in str(error) or free < needed:
            raise DiskFull(
                f"output_dir={str(folder)!r} has no space for {what}: about {gb(needed)} are needed, {gb(free)} are "
                "free now. What was half written is removed. Make room, or lower save_total_limit."
            ) from error
        raise


def weight_bytes(model) -> int:
    """Bytes of all parameters in their present dtypes."""
    return sum(weight.numel() * weight.element_size() for weight in model.parameters())


def checkpoint_bytes(model, training: TrainingArguments) -> int:
    """About how large a checkpoint is: the weights, and of AdamW two numbers of 4 bytes for each."""
    states = 8 if training.optim in ("adamw_torch", "adamw_torch_fused") else 0
    return weight_bytes(model) + states * sum(weight.numel() for weight in model.parameters() if weight.requires_grad)


def gb(size: int) -> str:
    """A size for people."""
    return f"{size / 1e9:.1f} GB" if size >= 1e8 else f"{size / 1e6:.1f} MB"
