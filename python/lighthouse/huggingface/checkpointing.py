"""Gradient checkpointing of a wrapped model keeps the choice (`lighthouse.checkpoint_contexts`).

Transformers keeps the checkpoint function, a partial, on every module that can be checkpointed.
"""

from __future__ import annotations

from functools import partial

from torch import nn

from lighthouse.core.checkpointing import checkpoint_contexts

_FUNCTION = "_gradient_checkpointing_func"


def keep_choices(model: nn.Module) -> None:
    """Lets the checkpointing that is set on `model` keep the choices. Reentrant checkpointing cannot, and a
    `context_fn` of the user's own stays."""
    for module, function in _checkpoint_functions(model):
        if function.keywords.get("use_reentrant") is False and "context_fn" not in function.keywords:
            setattr(module, _FUNCTION, partial(function, context_fn=checkpoint_contexts))


def forget_choices(model: nn.Module) -> None:
    """Undoes `keep_choices`."""
    for module, function in _checkpoint_functions(model):
        if function.keywords.get("context_fn") is checkpoint_contexts:
            keywords = {name: value for name, value in function.keywords.items() if name != "context_fn"}
            setattr(module, _FUNCTION, partial(function.func, *function.args, **keywords))


def _checkpoint_functions(model: nn.Module) -> list[tuple[nn.Module, partial]]:
    found = ((module, vars(module).get(_FUNCTION)) for module in model.modules())
    return [(module, function) for module, function in found if isinstance(function, partial)]
