"""What an exported folder gives in a process that cannot import this package (`plain_process.py`)."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

import torch

from lighthouse.export import plain_process

ROUNDS, NEW_TOKENS = 25, 32


class PlainProcessFailed(RuntimeError):
    """The folder cannot be loaded or run without this package; the message is the process's last line."""


def in_plain_process(task: str, request: dict, *, cpu_only: bool) -> dict:
    """The answer of `plain_process`'s function of that name to the request."""
    with tempfile.TemporaryDirectory(prefix="lighthouse-plain-") as place:
        request = request | {
            "task": task,
            "output": str(Path(place) / "output.pt"),
            "threads": torch.get_num_threads(),
            "hide": [str(Path(plain_process.__file__).parent)],
        }
        environment = {
            **os.environ,
            "HF_HUB_OFFLINE": "1",
            "HF_HUB_DISABLE_PROGRESS_BARS": "1",
            "TRANSFORMERS_VERBOSITY": "error",
        }
        if cpu_only:
            environment["CUDA_VISIBLE_DEVICES"] = ""
        done = subprocess.run(
            [sys.executable, plain_process.__file__],
            input=json.dumps(request),
            env=environment,
            capture_output=True,
            text=True,
        )
        if done.returncode != 0:
            raise PlainProcessFailed((done.stderr.strip().splitlines() or [f"exit status {done.returncode}"])[-1])
        return torch.load(request["output"])


@dataclass(frozen=True)
class Speed:
    """Medians: seconds of a prefill of `prompt` tokens, and of one token of decoding after it."""

    prompt: int
    prefill_seconds: float
    decode_seconds: float

    @property
    def prefill_tokens_per_second(self) -> float:
        return self.prompt / self.prefill_seconds

    @property
    def decode_tokens_per_second(self) -> float:
        return 1 / self.decode_seconds


@dataclass(frozen=True)
class Inference:
    """An exported model compared with one built by Transformers alone from its configuration, in the same process.

    `same_outputs`: with the same weights both give the same logits after the prompt, bit for bit, and decode the same
    tokens. `modules` counts the exported model's modules by the package of their class; `imported` are modules of this
    package that the process had.
    """

    device: str
    dtype: str
    new_tokens: int
    rounds: int
    exported: Speed
    plain: Speed
    same_outputs: bool
    modules: dict[str, int]
    imported: list[str]


def inference(
    folder: str | os.PathLike,
    *,
    prompt: int,
    new_tokens: int = NEW_TOKENS,
    device: str = "cpu",
    dtype: str = "float32",
    rounds: int = ROUNDS,
    budget: float = 15.0,
) -> Inference:
    """Times prefill and decoding of the causal model in `folder`; greedy, batch 1.

    Args:
        prompt, new_tokens: lengths, together within the model's context.
        rounds: at most so many, each with both models; as many as fit into `budget` seconds, at least one.

    Raises `PlainProcessFailed`.
    """
    request = {
        "folder": str(folder),
        "auto_class": "AutoModelForCausalLM",
        "prompt": prompt,
        "new_tokens": new_tokens,
        "device": device,
        "dtype": dtype,
        "rounds": rounds,
        "budget": budget,
    }
    found = in_plain_process("inference", request, cpu_only=device == "cpu")
    if found["faults"]:
        raise PlainProcessFailed(f"{folder} is loaded with {found['faults']}")
    exported, plain = (Speed(prompt, *found["seconds"][side]) for side in ("exported", "plain"))
    return Inference(
        device=device,
        dtype=dtype,
        new_tokens=new_tokens,
        rounds=found["rounds"],
        exported=exported,
        plain=plain,
        same_outputs=found["same_outputs"],
        modules=found["modules"],
        imported=found["imported"],
    )
