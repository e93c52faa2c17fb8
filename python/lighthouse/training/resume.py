"""What is in a run's folder, and whether a run may resume from it.

A resumed run must be the one that began: the same model, text, batch, schedule and precision. Only what no loss depends
on may change.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from transformers import TrainerState

from lighthouse.core.method import DEFAULT, Method
from lighthouse.huggingface.trainer_state import STATE, best_checkpoint, step_of
from lighthouse.training import checkpoints
from lighthouse.training.callbacks import Record
from lighthouse.training.depends import FREE_ON_RESUME, PLACES
from lighthouse.training.options import TrainingOptions
from lighthouse.training.result import RESULTS, read_json
from lighthouse.training.space import check_writable

SETTINGS = "run.json"
MODEL = "model"

# The settings of a run that its checkpoints record too.
FACTS = (
    *(setting.name for setting in Method.settings()),
    *("context", "dense_layers", "tokens_per_step", "lighthouse_steps", "seed", "text"),
    "tokenizer_identity",
)

# Settings that may change on resuming, and are reported.
SAID = ("device_name", "versions")

# Settings that are digests: what to say where they differ.
DIGESTS = {
    "text": "the text, its order, its tokenizer or how it is split into rows has changed",
    "tokenizer_identity": "the tokenizer gives different ids",
    "rows": "the text has changed, although its files have the same sizes",
}


def what_is_there(training: TrainingOptions) -> tuple[dict | None, str | None]:
    """The settings of the run in the output folder and the checkpoint to resume from; None where there is none."""
    folder = Path(str(training.output_dir))
    check_writable("output_dir", folder)
    # Asked for by the environment too: every process looks before one of them writes.
    names = os.listdir(folder) if folder.is_dir() else []
    there = checkpoints.checkpoints_in(folder)
    if not training.resume and training.resume_from_checkpoint is None:
        if SETTINGS in names or RESULTS in names or MODEL in names or there:
            raise FileExistsError(
                f"output_dir={str(folder)!r} already holds a run: use another folder with --output_dir, continue "
                "that run with --resume, or delete the folder"
            )
        return None, None
    say = _say if training.process_index == 0 else lambda message: None
    if training.resume_from_checkpoint is None:
        checkpoint = checkpoints.last_whole(folder, say)
        if checkpoint is None and SETTINGS in names:
            say(f"{folder} holds a run that was interrupted before its first whole checkpoint: it starts again.")
            return read_json(folder / SETTINGS), None
        if checkpoint is None:
            raise FileNotFoundError(
                f"output_dir={str(folder)!r} holds no checkpoint to resume from: start the run without --resume"
            )
    else:
        checkpoint = Path(training.resume_from_checkpoint)
        _check_checkpoint(checkpoint, folder, there, SETTINGS in names)
    settings = checkpoint.parent / SETTINGS
    if not settings.is_file():
        raise FileNotFoundError(
            f"{str(settings)!r} is missing: {str(checkpoint)!r} is not from a run of lighthouse pretrain"
        )
    return read_json(settings), str(checkpoint)


def _check_checkpoint(checkpoint: Path, folder: Path, there: list[Path], holds_a_run: bool) -> None:
    """Raises if the checkpoint that was asked for by name cannot be resumed from in `folder`."""
    name = f"resume_from_checkpoint={str(checkpoint)!r}"
    if not checkpoint.is_dir():
        raise FileNotFoundError(f"{name} is not a folder with a whole checkpoint")
    fault = checkpoints.fault_of(checkpoint)
    if fault is not None:
        raise FileNotFoundError(f"{name} is not a folder with a whole checkpoint: {fault}")
    if checkpoint.parent.resolve() != folder.resolve():
        if holds_a_run:
            raise FileExistsError(
                f"output_dir={str(folder)!r} holds a different run from {name}: use the checkpoint's own folder, or a "
                "new one"
            )
        return
    later = [path.name for path in there if step_of(path) > step_of(checkpoint)]
    if later:
        raise FileExistsError(
            f"{name}: the folder has later checkpoints, {', '.join(later)}, which would be mixed with the new ones: "
            "remove them, or resume in a new output_dir"
        )


def _say(message: str) -> None:
    print(message, flush=True)


def state_in(checkpoint: str | Path) -> TrainerState:
    """The Trainer's state in a checkpoint."""
    return TrainerState.load_from_json(str(Path(checkpoint) / STATE))


def check_checkpoint(checkpoint: str | Path, training: TrainingOptions) -> None:
    """Raises `ValueError` if the checkpoint has more steps than the run is to have, or its best one is missing."""
    steps = state_in(checkpoint).global_step
    if steps > training.max_steps:
        raise ValueError(
            f"max_steps={training.max_steps}: {str(checkpoint)!r} already has {steps} steps; ask for at least as many"
        )
    check_best(checkpoint, training)


def check_best(checkpoint: str | Path, training: TrainingOptions) -> None:
    """Raises `ValueError` if the best checkpoint so far is not known, or not where the run left it."""
    if not training.load_best_model_at_end:
        return
    state = state_in(checkpoint)
    saved: Any = state.stateful_callbacks  # a mapping by name, once it is read
    record = saved.get(Record.__name__, {}).get("attributes", {})
    points = [point for point in record.get("held_out", ()) if point["step"] > 0]
    lowest = min(points, key=lambda point: point["loss"], default=None)
    if lowest is not None and (state.best_metric is None or lowest["loss"] < state.best_metric):
        raise ValueError(
            f"load_best_model_at_end: the lowest held-out loss so far, {lowest['loss']:.4f} after step "
            f"{lowest['step']}, was measured without the option, and its checkpoint was not kept as the best: leave "
            "the option out, or start again with it in another output_dir"
        )
    if state.best_model_checkpoint is not None and best_checkpoint(state, training) is None:
        raise ValueError(
            f"load_best_model_at_end: the best checkpoint so far, {state.best_model_checkpoint!r}, does not exist: "
            "move the run's folder back, start in the directory where it was started, or leave the option out"
        )


def check_same(earlier: dict, now: dict, free: frozenset[str] = FREE_ON_RESUME) -> None:
    """Raises `ValueError` that lists the `differences`."""
    differ = differences(earlier, now, free)
    if differ:
        raise ValueError(
            f"a resumed run must have the settings it began with: {'; '.join(differ)}. Its own are in its folder's "
            "config.yaml: --config RUN/config.yaml --resume"
        )


def differences(earlier: dict, now: dict, free: frozenset[str] = FREE_ON_RESUME) -> list[str]:
    """The settings, but for those in `free`, in which two runs differ: what each was and is.

    A setting of the method that the earlier run lacks was as by default. Other settings that only one of the two has
    belong to another version of Transformers and are not compared.
    """
    if "pool_ratios" in earlier:
        earlier = DEFAULT.values() | earlier
    free = free | {"lighthouse_steps", "devices", *SAID}  # the first two follow from the others
    if "text" in now and earlier.get("text") == now["text"]:
        free = free | PLACES
    return [
        DIGESTS.get(name, f"{name} was {earlier[name]!r}, is {now[name]!r}")
        for name in now
        if name in earlier and name not in free and earlier[name] != now[name]
    ]


def what_is_new(earlier: dict, now: dict) -> list[str]:
    """A sentence about what may change a loss a little but does not prevent resuming."""
    before, here = _flat(earlier), _flat(now)
    new = [f"{name} was {before[name]}, is {here[name]}" for name in here if before.get(name, here[name]) != here[name]]
    return [f"Since this run began {'; '.join(new)}: losses may differ in their last digits."] if new else []


def _flat(settings: dict) -> dict[str, str]:
    """The settings in `SAID`, each version by its own name."""
    found = {name: settings[name] for name in SAID if name in settings}
    return {name: value for name, value in found.items() if name != "versions"} | found.get("versions", {})


def check_same_model(checkpoint: str | Path, model) -> None:
    """The options may name a file whose configuration has changed."""
    if not (Path(checkpoint) / "config.json").is_file():
        return  # sharded by the Trainer, whose loading then compares the weights' names and shapes
    earlier, now = type(model.config).from_pretrained(checkpoint).to_dict(), model.config.to_dict()
    free = {"architectures", "dtype", "transformers_version", "use_cache"}  # written or changed by saving and wrapping
    differ = [
        f"{name} was {earlier.get(name)!r}, is {now.get(name)!r}"
        for name in sorted(earlier.keys() | now.keys())
        if name not in free and not name.startswith("_") and earlier.get(name) != now.get(name)
    ]
    if differ:
        raise ValueError("a resumed run must have the model it began with: " + "; ".join(differ))
