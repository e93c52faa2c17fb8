"""Checks that a wrapped model is unchanged: at the switch, in `train()` and in each forward.

A change is refused if Lighthouse is on and would not act, or not on its input; a layer that was inserted, copied or
removed gets the seat that it has in the model now. Compiled code checks once, while it is traced.
"""

from __future__ import annotations

import functools
import weakref

import torch

from lighthouse.huggingface import originals
from lighthouse.huggingface.architectures import architecture_of
from lighthouse.huggingface.attention_interface import NAME
from lighthouse.huggingface.state import Seat, Stateful, say_once

_models: weakref.WeakValueDictionary[str, Stateful] = weakref.WeakValueDictionary()  # by their states' names


def remember(model: Stateful) -> None:
    """Lets compiled code, which may hold no model in a constant, find it by name."""
    _models[model._lighthouse.name] = model


@torch.compiler.assume_constant_result
def look_while_tracing(name: str) -> None:
    look_again(_models[name])


@torch.compiler.assume_constant_result
def say_why_dense_while_tracing(name: str, device: str) -> None:
    say_why_dense(_models[name], None, device)


def say_why_dense(model: Stateful, tokens: int | None, device: str) -> None:
    """Logs once that, and by which rule, a sequence of `tokens` runs dense; None: their number is not known yet."""
    state = model._lighthouse
    rule, message = state.settings.why_dense(tokens, device)
    say_once(state.name, f"{message}: dense attention runs", rule)


def attention_modules(model: Stateful) -> list:
    architecture = architecture_of(model)
    return architecture.attention(architecture.body(model))


def look_again(model: Stateful) -> None:
    """Raises `ValueError` for a change that would bypass Lighthouse while it is on."""
    state = model._lighthouse
    named = model.config._attn_implementation
    if named not in (NAME, state.former):
        if state.enabled:
            raise ValueError(
                f"config._attn_implementation was set to {named!r} on the wrapped model: Lighthouse sets it itself; "
                f"model.set_attn_implementation({named!r}) chooses what runs where Lighthouse does not act"
            )
        state.former = named  # off, the model is the plain one
    if state.enabled:
        modules = attention_modules(model)
        originals.check_layers(modules, architecture_of(model).attention_class)
        state.settings.check_layers(len(modules))
        originals.check_attention_functions(state.former, modules[0])
        originals.check_registry()
        forward = vars(model).get("forward")
        if forward is not None and not leads_to_ours(forward):
            raise ValueError(
                f"this {type(model).__name__} got its own forward on the instance after it was wrapped, "
                f"{originals.place_of(forward)}, as Liger leaves it: it would bypass Lighthouse; wrap the model "
                "without it"
            )
    seat_layers(model)
    state.own_loss = why_own_loss(model)


def seat_layers(model: Stateful) -> None:
    """Makes every layer follow the model's state, whatever it came with."""
    state = model._lighthouse
    modules = attention_modules(model)
    for index, module in enumerate(modules):
        acts = state.settings.acts_in_layer(index, len(modules))
        config = state.config if acts else state.dense_config
        if getattr(module, "config", None) is not config:
            module.config = config
        seat = vars(module).get("lighthouse_seat")
        if acts and (seat is None or seat.state is not state):
            module.lighthouse_seat = Seat(state)
        elif not acts and seat is not None:
            del module.lighthouse_seat


def seat_others(model: Stateful) -> None:
    """Attention of the architecture's kind that stands outside the row of layers (a further head's) stays dense."""
    state, seated = model._lighthouse, set(map(id, attention_modules(model)))
    for module in model.modules():
        if isinstance(module, architecture_of(model).attention_class) and id(module) not in seated:
            module.__dict__.pop("lighthouse_seat", None)
            if getattr(module, "config", None) is state.config:
                module.config = state.dense_config  # type: ignore[assignment]  # any attribute may be


def why_own_loss(model: Stateful) -> str | None:
    """Why the loss is the model's own though `loss="chunked"`; None where the two are the same."""
    architecture = architecture_of(model)
    if not architecture.has_head(model):
        return None
    forward = type(model).plain_class.forward
    return originals.why_own_loss(model, architecture.output_layer(model), forward, architecture.causal)


def leads_to_ours(forward) -> bool:
    """Whether a forward on the instance, as accelerate and `torch.compile` leave it, ends in the wrapped class's."""
    for _ in range(20):
        if getattr(forward, "is_lighthouse", False):
            return True
        if isinstance(forward, functools.partial):
            forward = forward.func
            continue
        inside = (getattr(forward, name, None) for name in ("__func__", "__wrapped__", "_torchdynamo_orig_callable"))
        forward = next((found for found in inside if found is not None), None)
        if forward is None:
            return False
    return False
