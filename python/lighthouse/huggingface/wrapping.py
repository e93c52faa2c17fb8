"""Wraps a model: everything is checked before anything is changed."""

from __future__ import annotations

import copy
from typing import Any, cast

from transformers import PreTrainedModel

from lighthouse.core.settings import LighthouseSettings
from lighthouse.huggingface import checks, looking, originals
from lighthouse.huggingface.architectures import Architecture, architecture_of
from lighthouse.huggingface.attention_interface import DEFAULT, NAME
from lighthouse.huggingface.checkpointing import keep_choices
from lighthouse.huggingface.class_swap import swap
from lighthouse.huggingface.loss import OutputLayer, multiplies, name_of
from lighthouse.huggingface.state import State, say_once
from lighthouse.huggingface.wrapped import WrappedModel


def wrap(model: PreTrainedModel, settings: LighthouseSettings) -> WrappedModel:
    """Puts `WrappedModel` over `model`, in place. Users call `lighthouse.LighthouseWrapper`.

    Raises `TypeError` or `ValueError` before anything is changed.
    """
    if isinstance(model, WrappedModel):
        raise ValueError(
            f"this {type(model).__name__} is already wrapped, with {model.lighthouse_settings}; "
            "unwrap it first for other settings"
        )
    architecture = architecture_of(model)
    former = model.config._attn_implementation
    if former == NAME:  # made from a wrapped model's configuration
        former = DEFAULT
    _check_model(model, former, architecture, settings)
    body = architecture.body(model)
    attention = architecture.attention(body)
    settings = settings.for_layers(len(attention))

    own, dense = copy.deepcopy(model.config), copy.deepcopy(model.config)
    shared = model.config
    module: Any
    for module in model.modules():
        if getattr(module, "config", None) is shared:
            module.config = own
    swap(architecture.output_layer(model), OutputLayer)
    swap(model, WrappedModel)
    wrapped = cast(WrappedModel, model)
    wrapped._lighthouse = State(
        settings=settings, former=former, config=own, dense_config=dense, loss_type=model.loss_type
    )
    looking.seat_layers(wrapped)
    looking.remember(wrapped)
    if not architecture.has_head(model):
        # Trainer counts the predicted tokens by this: a bare model would be given one too many per sequence.
        model.loss_type = "ForCausalLM"
    keep_choices(model)
    wrapped._settle()
    _say_if_never(wrapped)
    return wrapped


def _say_if_never(model: WrappedModel) -> None:
    """Warns of settings with which Lighthouse acts at no length that the model allows."""
    state, device = model._lighthouse, next(model.parameters()).device.type
    longest = checks.longest(model.config)
    if longest is None or device == "meta" or state.settings.pays(longest, device):
        return
    _, message = state.settings.why_dense(longest, device)
    never = "the model allows no longer sequences: with these settings Lighthouse never acts"
    say_once(state.name, f"{message}, and {never}")


def _check_model(model: PreTrainedModel, former: str, architecture: Architecture, settings: LighthouseSettings) -> None:
    name = type(model).__name__
    checks.check_config(model.config)
    if "forward" in vars(model):
        raise ValueError(
            f"this {name} has its own forward on the instance, as Liger or accelerate leave it: wrap the model first"
        )
    for module in architecture.body(model).modules():
        if isinstance(module, WrappedModel):
            raise ValueError(f"a part of this {name} is already wrapped: unwrap it, then wrap the whole")
    modules = architecture.attention(architecture.body(model))
    originals.check_layers(modules, architecture.attention_class)
    originals.check_attention_functions(former, modules[0])
    originals.check_registry()
    layer = architecture.output_layer(model)
    if architecture.has_head(model):
        reason = originals.why_own_loss(model, layer, type(model).forward, architecture.causal)
        if settings.loss == "chunked" and reason is not None:
            raise ValueError(f'{reason}: use loss="model"; the loss without logits would bypass it')
        return
    if settings.loss == "model":
        raise ValueError(
            f'loss="model": a {name} has no loss of its own; use "chunked" or a {architecture.causal.__name__}'
        )
    if not multiplies(type(layer)):
        raise ValueError(
            f"the input embedding is a {name_of(type(layer))}: a bare {name} predicts with it, which needs a plain "
            f"nn.Embedding; use a {architecture.causal.__name__}"
        )
    originals.may_pass_hooks(layer)
