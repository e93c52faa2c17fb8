"""What a wrapped model remembers, and the seat that each of its Lighthouse layers has in it.

One place decides: every layer asks the state of its model. The trap is a copied layer: its configuration, with the
attention's name, is copied too. So a copied seat belongs to no model until the layer's model gives it one, and the
attention refuses a layer without one.
"""

from __future__ import annotations

import itertools
import logging
import threading
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from transformers import PretrainedConfig, PreTrainedModel

from lighthouse.core.settings import LEAST_DENSE_SHARE, LighthouseSettings
from lighthouse.huggingface.attention_interface import NAME, dense_name
from lighthouse.huggingface.class_swap import Swapped

logger = logging.getLogger("lighthouse")

_numbers = itertools.count(1)


class Used(NamedTuple):
    """Which attention training forwards ran; both where some did one and some the other."""

    lighthouse: bool
    dense: bool


if TYPE_CHECKING:

    class Stateful(Swapped, PreTrainedModel):
        """A wrapped model, for modules that do not depend on what it does."""

        _lighthouse: State
        plain_class: Any

else:
    Stateful = Swapped


@dataclass
class State:
    """What a wrapped model remembers besides its plain attributes."""

    settings: LighthouseSettings
    former: str  # the attention the model came with
    config: PretrainedConfig  # the model's own
    dense_config: PretrainedConfig  # what its dense layers hold
    loss_type: str | None  # the one the model came with
    enabled: bool = True
    own_loss: str | None = None  # why the loss is the model's own, whatever the settings say
    with_gradients: bool = False  # whether the forward that runs was begun with gradients enabled
    running: dict[int, tuple[bool, bool]] = field(default_factory=dict)  # thread: whether Lighthouse acts, gradients
    generating: set[int] = field(default_factory=set)  # threads
    # Written in compiled code and never read there, since what is read there would be compiled in.
    used_lighthouse: bool = False
    used_dense: bool = False
    saw_ids: bool = False  # the values of a batch were looked at; on a GPU those of the first one only
    saw_labels: bool = False
    ready: bool = True  # a dense training forward has followed the last one with Lighthouse
    ran_compiled: bool = False
    # Training forwards; compiled code cannot count.
    lighthouse_forwards: int = 0
    dense_forwards: int = 0
    # Of this model in this process. A string, since the compiler may take a number for a variable.
    name: str = field(default_factory=lambda: f"model {next(_numbers)}")

    def __getstate__(self) -> dict:
        return {key: value for key, value in vars(self).items() if key not in ("name", "running", "generating")}

    def __setstate__(self, state: dict) -> None:
        vars(self).update(state, name=f"model {next(_numbers)}", running={}, generating=set())

    def name_attention(self, acts: bool) -> None:
        model, dense = (NAME, dense_name(self.former)) if acts else (self.former, self.former)
        for config, wanted in ((self.config, model), (self.dense_config, dense)):
            if config._attn_implementation != wanted:
                config._attn_implementation = wanted

    def enter(self, acts: bool) -> tuple[bool, bool] | None:
        """Begins a forward with Lighthouse or without; returns the enclosing forward of this thread, for `leave`.

        Raises `RuntimeError` where another thread runs the model with the other attention, which has the same name.
        """
        gradients = torch.is_grad_enabled()
        if torch.compiler.is_compiling():
            self.name_attention(acts)
            self.with_gradients = gradients
            return None
        thread = threading.get_ident()
        if any(other[0] != acts for number, other in list(self.running.items()) if number != thread):
            raise RuntimeError(
                "another thread is running this model with the other attention, Lighthouse or dense: a "
                "wrapped model has one attention at a time"
            )
        outer = self.running.get(thread)
        self.running[thread] = acts, gradients
        self.name_attention(acts)
        self.with_gradients = gradients
        return outer

    def leave(self, outer: tuple[bool, bool] | None) -> None:
        """Ends a forward; the enclosing one continues with its own attention."""
        self.with_gradients = outer is not None and outer[1]
        if torch.compiler.is_compiling():
            return
        if outer is None:
            self.running.pop(threading.get_ident(), None)
        else:
            self.running[threading.get_ident()] = outer
            self.name_attention(outer[0])

    def is_running(self) -> bool:
        """Whether this thread is in a forward of the model, or in the backward of one that runs layers again."""
        return threading.get_ident() in self.running or torch._C._current_graph_task_id() != -1

    def start_generating(self) -> tuple[bool, bool] | None:
        outer = self.enter(acts=False)
        self.generating.add(threading.get_ident())
        return outer

    def stop_generating(self, outer: tuple[bool, bool] | None) -> None:
        self.generating.discard(threading.get_ident())
        self.leave(outer)

    def is_generating(self) -> bool:
        return bool(self.generating) and threading.get_ident() in self.generating

    def note_training(self, acts: bool) -> None:
        """One more training forward, with Lighthouse or dense."""
        if acts:
            self.used_lighthouse, self.ready = True, False
        else:
            self.used_dense, self.ready = True, True
        if torch.compiler.is_compiling():
            self.ran_compiled = True
        else:
            self.lighthouse_forwards += acts
            self.dense_forwards += not acts

    def trained_before(self, steps, step: int, forwards: int) -> None:
        """The model has the weights of a checkpoint of the `step`-th step, of so many training forwards each.

        `steps` are its `Steps`.
        """
        self.ready = step > steps.last or steps.lighthouse == 0
        self.lighthouse_forwards = steps.lighthouse * forwards
        self.dense_forwards = steps.dense * forwards

    @property
    def hardly_dense(self) -> tuple[int, int] | None:
        """(training forwards, dense ones among them) if the dense ones are too few, else None."""
        lighthouse, dense = self.lighthouse_forwards, self.dense_forwards
        few = lighthouse > 0 and dense < LEAST_DENSE_SHARE * (lighthouse + dense)
        return (lighthouse + dense, dense) if few and not self.ran_compiled else None

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

    Compiled code logs it while it is compiled.
    """
    if (name, rule or message) not in _said:
        _said.add((name, rule or message))
        logger.warning("Lighthouse: %s", message)
