"""A text folder and options with which a whole run takes a second or two.

What tests cut is cached in a folder of its own and not in the user's.
"""

from __future__ import annotations

import random
import tempfile
from pathlib import Path

import datasets
from transformers import TrainerCallback

from lighthouse.core import fused
from lighthouse.training import PretrainOptions, TrainingOptions
from lighthouse.training.trainer import RunTrainer

_cache = tempfile.TemporaryDirectory(prefix="lighthouse-tests-")
datasets.config.HF_DATASETS_CACHE = Path(_cache.name)

CONTEXT = 128

# As this version of Transformers calls it.
CHECKPOINTING = next(
    name
    for name in ("activation_checkpointing", "gradient_checkpointing")
    if name in TrainingOptions.__dataclass_fields__
)
WORDS = "the light of a house on the rock by the sea turns and returns and the ships see it from afar".split()


def write_text(folder: Path, files: int = 12, words: int = 400, seed: int = 0) -> Path:
    """`files` files of about `5 * words` bytes each, some of them in a folder below."""
    chance = random.Random(seed)
    for number in range(files):
        path = folder / ("deep" if number % 3 else "") / f"{number:02}.txt"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(" ".join(chance.choice(WORDS) for _ in range(words)) + "\n", encoding="utf-8")
    return folder


def options(text: Path, **changes) -> PretrainOptions:
    return PretrainOptions(
        **{
            "model": "nano",
            "context": CONTEXT,
            "data": str(text),
            "held_out": 2,
            "pool_ratios": ["1/2", "1/4"],
            "select_topk": "4",
            "local_window": "16",
            **changes,
        }
    )


def training(folder: Path, **changes) -> TrainingOptions:
    return TrainingOptions(
        **{
            "output_dir": str(folder),
            "max_steps": 5,
            "logging_steps": 1,
            "eval_steps": 2,
            "save_strategy": "no",
            "report_to": "none",
            "disable_tqdm": True,
            "use_cpu": True,
            **changes,
        }
    )


def watch(monkeypatch) -> list[tuple[int, bool]]:
    """A list to which each step of a run adds itself: (the step, whether a layer chose a sub-sequence in it)."""
    steps, calls = [], []
    attend = fused.attend

    def counted(*args, **kwargs):
        calls.append(1)
        return attend(*args, **kwargs)

    monkeypatch.setattr(fused, "attend", counted)

    class Watch(TrainerCallback):
        def on_step_end(self, args, state, control, model=None, **kwargs):
            steps.append((state.global_step, bool(calls)))
            calls.clear()

    before = RunTrainer.__init__

    def with_watch(self, **kwargs):
        before(self, **{**kwargs, "callbacks": [*kwargs["callbacks"], Watch()]})

    monkeypatch.setattr(RunTrainer, "__init__", with_watch)
    return steps


def status(process) -> int:
    """The exit status of a `multiprocessing` process, which is waited for and killed if it hangs."""
    process.join(120)
    hangs = process.exitcode is None
    process.kill()
    assert not hangs, "the process hangs"
    return process.exitcode
