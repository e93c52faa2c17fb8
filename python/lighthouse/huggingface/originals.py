"""Checks that what Lighthouse replaces is Transformers' own code.

A layer with its own attention would never run Lighthouse, or run without the mask it relies on and see later tokens; a
forward with its own loss would be bypassed. Names show neither, but a function's code has a file: each function of a
chain of wrappers must be in Transformers.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
import transformers
from torch import nn
from transformers.loss import loss_utils
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from lighthouse.core.inputs import check_not_sharded
from lighthouse.huggingface.attention_interface import NAME, dense_name, lighthouse_attention, lighthouse_mask
from lighthouse.huggingface.loss import multiplies, name_of

_PACKAGE = str(Path(transformers.__file__).parent) + "/"
_TORCH = str(Path(torch.__file__).parent) + "/"

# Attentions that Transformers has; kernels of its hub have a "/" in their names.
OWN_NAMES = ("eager", "sdpa", "flash_attention_2", "flash_attention_3", "flash_attention_4", "flex_attention")

# Whose hooks gather what is sharded, and change no number.
_SHARDING = ("torch.distributed.", "deepspeed.")
_SPLITTING = "torch.distributed.tensor."


_found: dict[tuple[Callable, str | None], bool] = {}


def is_own(function: Any, name: str | None = None) -> bool:
    """Whether `function`, and all it wraps, is Transformers' own code; with `name` that of this qualified name."""
    key = function, name
    if key not in _found:
        _found[key] = _is_own(*key)
    return _found[key]


def _is_own(function: Callable, name: str | None) -> bool:
    while True:
        while isinstance(function, functools.partial):
            function = function.func
        code = getattr(function, "__code__", None)
        if code is None or not code.co_filename.startswith(_PACKAGE):
            return False
        inside = getattr(function, "__wrapped__", None)
        if inside is None:
            return name is None or function.__qualname__ == name
        function = inside


def place_of(function: Any) -> str:
    """Where `function` comes from, for an error."""
    while isinstance(function, functools.partial):
        function = function.func
    return f"{getattr(function, '__module__', None)}.{getattr(function, '__qualname__', type(function).__name__)}"


def check_attention_module(index: int, module: nn.Module, attention: type[nn.Module]) -> None:
    """Raises `ValueError` unless the attention module of layer `index` computes what `attention` does."""
    why = _why_another(module, attention)
    if why is not None:
        raise ValueError(f"the attention of layer {index}, a {type(module).__name__}, has {why}")


def _why_another(module: nn.Module, attention: type[nn.Module]) -> str | None:
    if type(module).__call__ is not nn.Module.__call__:
        return f"its own __call__: {_SELF_ATTENTION}"
    if "forward" in vars(module):
        return f"its own forward on the instance: {_SELF_ATTENTION}"
    if not is_own(type(module).forward, f"{attention.__name__}.forward"):
        return f"its own forward, {place_of(type(module).forward)}: {_SELF_ATTENTION}"
    if getattr(module, "is_causal", True) is not True:
        return f"is_causal={module.is_causal!r}: Lighthouse is causal self-attention only"
    return None


_SELF_ATTENTION = (
    "Lighthouse replaces only Transformers' own attention, and would bypass another one or drop its mask; to train "
    "with your own attention, call lighthouse.attention in it, without the wrapper"
)


def check_layers(modules: Sequence[nn.Module], attention: type[nn.Module]) -> None:
    """Raises `ValueError` where a layer's attention is not Transformers' `attention`, or is another layer's too."""
    for index, module in enumerate(modules):
        check_attention_module(index, module, attention)
    if len(set(map(id, modules))) < len(modules):
        raise ValueError("one attention module is in several layers: Lighthouse needs one for each layer")


def check_attention_functions(former: str, module: nn.Module) -> None:
    """Raises `ValueError` unless what runs where Lighthouse does not act is Transformers' own."""
    for name in dict.fromkeys((former, dense_name(former))):
        check_attention_function(name, module)


def check_attention_function(name: str, module: nn.Module) -> None:
    """Raises `ValueError` unless `name` is, for the attention `module`, one of Transformers' own dense attentions."""
    function, mask = ALL_ATTENTION_FUNCTIONS.get(name), ALL_MASK_ATTENTION_FUNCTIONS.get(name)
    if function is None:  # eager: the function of the file that the module's forward is in
        inside = type(module).forward
        while hasattr(inside, "__wrapped__"):
            inside = inside.__wrapped__
        function = inside.__globals__.get("eager_attention_forward")
    if function is None or not is_own(function):
        found = f"is {place_of(function)}, not one of Transformers' own"
    elif mask is not None and not is_own(mask):
        found = f"has a mask made by {place_of(mask)}, not by Transformers' own"
    elif name not in OWN_NAMES and "/" not in name:
        found = "was registered by its user"
    else:
        return
    raise ValueError(f'attention "{name}" {found}: {_SELF_CHOSEN}')


_SELF_CHOSEN = (
    "Lighthouse would bypass it and its mask, and the dense stage would not train what Lighthouse trained; "
    'set "sdpa", "eager" or a flash attention before wrapping, and leave their entries in Transformers\' registry as '
    "they are (sequence parallelism replaces them, and each process would attend within its own shard)"
)


def check_registry() -> None:
    """Raises `ValueError` where another function stands under Lighthouse's name, or SDPA attends across processes."""
    if ALL_MASK_ATTENTION_FUNCTIONS.get(NAME) is not lighthouse_mask:
        raise ValueError(f'the mask of attention "{NAME}" in Transformers\' registry was replaced: masks would be lost')
    if ALL_ATTENTION_FUNCTIONS.get(NAME) is not lighthouse_attention:
        raise ValueError(
            f'attention "{NAME}" in Transformers\' registry is {place_of(ALL_ATTENTION_FUNCTIONS.get(NAME))}: '
            "Lighthouse would never run; register yours under another name"
        )
    check_not_sharded()


def why_own_loss(model: nn.Module, output_layer: nn.Module, forward: Callable, causal: type[nn.Module]) -> str | None:
    """What in the model's own loss the loss without logits would bypass; None where it gives the same.

    `forward` is the plain class's, `causal` the architecture's class with an output layer.
    """
    name = type(model).__name__
    if not is_own(forward, f"{causal.__name__}.forward"):
        return f"this {name} has its own forward, {place_of(forward)}"
    if not is_own(model.loss_function, "ForCausalLMLoss"):
        return f"this {name} has its own loss function, {place_of(model.loss_function)}"
    if not is_own(loss_utils.fixed_cross_entropy) or not F.cross_entropy.__code__.co_filename.startswith(_TORCH):
        return "the cross entropy was replaced"
    if "forward" in vars(output_layer):
        return "the output layer has its own forward on the instance"
    if not multiplies(type(output_layer)):
        return f"the output layer is a {name_of(type(output_layer))}, not a plain nn.Linear"
    if _is_split(output_layer):
        return "the output layer is split by tensor parallelism"
    if _hooks(output_layer, sharding=False):
        return "the output layer has hooks"
    return None


def may_pass_hooks(layer: nn.Module) -> bool:
    """Whether `layer` has hooks, none of which gathers what is sharded. Raises `ValueError` where it has both kinds.

    `layer` is the input embedding of a bare model. One that tensor parallelism has split is refused too.
    """
    if _is_split(layer):
        raise ValueError(
            "the input embedding is split by tensor parallelism, and it is the output layer too: use a model with its "
            'own output layer and loss="model"'
        )
    others = _hooks(layer, sharding=False)
    if others and _hooks(layer, sharding=True):
        raise ValueError(
            f"the input embedding is sharded and has a hook, {place_of(others[0])}: it is the output layer too, and "
            "the hook would run on the loss; use a model with its own output layer"
        )
    return bool(others)


def _is_split(layer: nn.Module) -> bool:
    """By tensor parallelism, whose hooks take hidden states and nothing else."""
    return any(str(getattr(hook, "__module__", "")).startswith(_SPLITTING) for hook in _hooks(layer, sharding=True))


def _hooks(layer: nn.Module, sharding: bool) -> list[Callable]:
    kinds = (layer._forward_hooks, layer._forward_pre_hooks, layer._backward_hooks, layer._backward_pre_hooks)
    hooks = [hook for kind in kinds for hook in kind.values()]
    return [hook for hook in hooks if str(getattr(hook, "__module__", "")).startswith(_SHARDING) == sharding]
