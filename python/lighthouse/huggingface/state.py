"""What a wrapped model remembers, and the seat that each of its Lighthouse layers has in it.

What decides is one place: every layer asks the state of the model it sits in. The trap is a layer that is copied: it
takes its configuration, and with it the attention's name, along. So a copied seat belongs to no model until the model
that the layer stands in gives it one, and a layer without one is refused by the attention.
"""

from __future__ import annotations

import itertools
import logging
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from transformers import PretrainedConfig

from lighthouse.huggingface.attention_interface import NAME, dense_name
from lighthouse.wrapper import LighthouseSettings

logger = logging.getLogger("lighthouse")

_numbers = itertools.count(1)


class Used(NamedTuple):
    """Which attention training forwards ran; both where some did one and some the other."""

    lighthouse: bool
    dense: bool


@dataclass
class State:
    """What a wrapped model remembers beside its plain attributes."""

    settings: LighthouseSettings
    former: str  # the attention the model came with
    config: PretrainedConfig  # the model's own
    dense_config: PretrainedConfig  # what its dense layers hold
    loss_type: str | None  # the one the model came with
    enabled: bool = True
    generating: bool = False
    own_loss: str | None = None  # why the loss is the model's own, whatever the settings say
    with_gradients: bool = False  # whether the forward that runs was begun with gradients enabled
    # Written in compiled code and never read there, since what is read there would be compiled in.
    used_lighthouse: bool = False
    used_dense: bool = False
    ready: bool = True  # a dense training forward has followed the last one with Lighthouse
    # Training forwards; compiled code cannot count.
    lighthouse_forwards: int = 0
    dense_forwards: int = 0
    # Of this model in this process. A string, since the compiler may take a number for a variable.
    name: str = field(default_factory=lambda: f"model {next(_numbers)}")

    def __getstate__(self) -> dict:
        return {key: value for key, value in vars(self).items() if key != "name"}

    def __setstate__(self, state: dict) -> None:
        vars(self).update(state, name=f"model {next(_numbers)}")

    def name_attention(self, acts: bool) -> None:
        model, dense = (NAME, dense_name(self.former)) if acts else (self.former, self.former)
        for config, wanted in ((self.config, model), (self.dense_config, dense)):
            if config._attn_implementation != wanted:
                config._attn_implementation = wanted

    def note_training(self, acts: bool) -> None:
        """One more training forward, with Lighthouse or dense."""
        if acts:
            self.used_lighthouse, self.ready = True, False
        else:
            self.used_dense, self.ready = True, True
        if not torch.compiler.is_compiling():
            self.lighthouse_forwards += acts
            self.dense_forwards += not acts

    def take_used(self) -> Used:
        used = Used(self.used_lighthouse, self.used_dense)
        self.used_lighthouse = self.used_dense = False
        return used


class Seat:
    """What a Lighthouse layer's attention module holds as `lighthouse_seat`: the state of the model it sits in."""

    def __init__(self, state: State | None = None):
        self.state = state

    def __reduce__(self):  # copies and pickles alike
        return Seat, ()


_said: set[tuple[str, str]] = set()


@torch.compiler.assume_constant_result
def say_once(name: str, message: str, rule: str | None = None) -> None:
    """Logs a warning once per model, rule (by default the message itself) and process.

    Compiled code says it while it is compiled.
    """
    if (name, rule or message) not in _said:
        _said.add((name, rule or message))
        logger.warning("Lighthouse: %s", message)
