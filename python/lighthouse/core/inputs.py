"""Checks of a user's tensors, before any work."""

from __future__ import annotations

import inspect
import logging
import math
from collections.abc import Callable
from numbers import Real
from types import FunctionType

import torch
import torch.nn.functional as F
from torch import Tensor

from lighthouse.core.devices import check_device, check_on_cuda
from lighthouse.core.operators import with_unit_stride

logger = logging.getLogger("lighthouse")

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def _check_layout(name: str, tensor: Tensor) -> None:
    if tensor.is_nested:
        raise ValueError(f"{name} is a nested tensor: sequences of one length are needed; pass each by itself")
    if tensor.layout != torch.strided:
        raise ValueError(f"{name} has layout {tensor.layout}: torch.strided is needed; convert it with .to_dense()")


def _check_tensor(name: str, tensor: Tensor) -> None:
    if not isinstance(tensor, Tensor):
        raise TypeError(f"{name} is a {type(tensor).__name__}: a tensor [batch, heads, tokens, head_dim] is needed")
    _check_layout(name, tensor)
    if tensor.ndim != 4:
        raise ValueError(f"{name} has shape {list(tensor.shape)}: [batch, heads, tokens, head_dim] is needed")
    if 0 in tensor.shape:
        raise ValueError(f"{name} has shape {list(tensor.shape)}: every size must be at least 1")
    if tensor.dtype not in DTYPES:
        raise ValueError(f"{name} has dtype {tensor.dtype}: float32, bfloat16, float16 or float64 is needed")


def _check_against_query(name: str, tensor: Tensor, query: Tensor) -> None:
    if tensor.shape == query.shape and tensor.dtype == query.dtype and tensor.device == query.device:
        return  # the usual case costs least
    for what, mine, others in (
        ("dtype", tensor.dtype, query.dtype),
        ("device", tensor.device, query.device),
        ("batch", tensor.shape[0], query.shape[0]),
        ("tokens", tensor.shape[2], query.shape[2]),
        ("head_dim", tensor.shape[3], query.shape[3]),
    ):
        if mine != others:
            raise ValueError(f"{name} has {what} {mine}, query {others}: they must be the same")


def _unit_stride(name: str, tensor: Tensor) -> Tensor:
    if tensor.stride(-1) == 1:
        return tensor
    if not torch.compiler.is_compiling():
        _log_copy_once(name)
    return with_unit_stride(tensor)


_copied: set[str] = set()


def _log_copy_once(name: str) -> None:
    if name not in _copied:
        _copied.add(name)
        logger.debug("%s has a last stride other than 1 and is copied (logged once)", name)


def autocast_dtype(tensor: Tensor) -> torch.dtype:
    """The tensor cast as PyTorch's own attention casts it under autocast."""
    device = tensor.device.type
    if device == "meta" or not torch.is_autocast_enabled(device) or tensor.dtype == torch.float64:
        return tensor.dtype
    return torch.get_autocast_dtype(device)


def _autocast(tensor: Tensor) -> Tensor:
    dtype = autocast_dtype(tensor)
    return tensor if tensor.dtype == dtype else tensor.to(dtype)


def check_qk(query: Tensor, key: Tensor) -> tuple[Tensor, Tensor]:
    """Query and key as the operators need them. Raises ValueError or TypeError."""
    _check_tensor("query", query)
    check_device("query", query.device)
    if query.is_cuda:
        check_on_cuda("query", query.dtype, query.shape[3])
    _check_tensor("key", key)
    query, key = _autocast(query), _autocast(key)
    _check_against_query("key", key, query)
    if query.shape[1] % key.shape[1]:
        raise ValueError(
            f"key has {key.shape[1]} heads, query {query.shape[1]}: the query heads must be a multiple of the key heads"
        )
    return _unit_stride("query", query), _unit_stride("key", key)


def check_qkv(query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Query, key and value as the operators need them. Raises ValueError or TypeError."""
    query, key = check_qk(query, key)
    _check_tensor("value", value)
    value = _autocast(value)
    _check_against_query("value", value, query)
    if value.shape[1] != key.shape[1]:
        raise ValueError(f"value has {value.shape[1]} heads, key {key.shape[1]}: they must be the same")
    return query, key, _unit_stride("value", value)


def check_scores(scores: tuple[Tensor, Tensor] | None, key: Tensor) -> tuple[Tensor, Tensor] | None:
    """The user's scores as the operators need them. Raises ValueError or TypeError."""
    if scores is None:
        return None
    if not isinstance(scores, (tuple, list)) or len(scores) != 2:
        raise TypeError("scores must be a pair of tensors [batch, key heads, tokens]: for queries and for keys")
    for i, score in enumerate(scores):
        name = f"scores[{i}]"
        if not isinstance(score, Tensor):
            raise TypeError(f"{name} is a {type(score).__name__}: a tensor [batch, key heads, tokens] is needed")
        _check_layout(name, score)
        if score.shape != key.shape[:3]:
            raise ValueError(
                f"{name} has shape {list(score.shape)}: {list(key.shape[:3])} is needed, [batch, key heads, tokens]"
            )
        if score.dtype != torch.float32:
            raise ValueError(f"{name} has dtype {score.dtype}: float32 is needed")
        if score.device != key.device:
            raise ValueError(f"{name} is on {score.device}, key on {key.device}: they must be the same")
        if score.requires_grad and torch.is_grad_enabled():
            _say_that_scores_have_no_gradient(i)
    query_score, key_score = scores
    return query_score.detach().contiguous(), key_score.detach().contiguous()


@torch.compiler.assume_constant_result
def _say_that_scores_have_no_gradient(i: int) -> None:
    """Once, while tracing too."""
    if i not in _said_of_scores:
        _said_of_scores.add(i)
        logger.warning(
            "Lighthouse: scores[%d] requires a gradient but gets none, since the choice has no gradient (logged "
            "once; pass scores.detach() if this is intended)",
            i,
        )


_said_of_scores: set[int] = set()


def check_not_sharded() -> None:
    """Raises `ValueError` inside of torch's `context_parallel`, which replaces SDPA; compiled code is not checked."""
    sdpa = F.scaled_dot_product_attention
    if torch.compiler.is_compiling() or not isinstance(sdpa, FunctionType):
        return
    if sdpa.__module__.startswith("torch.distributed"):
        raise ValueError(
            "context parallelism is on (torch.distributed's context_parallel): each process would choose and attend "
            "within its own shard of the sequence; Lighthouse does not support it yet"
        )


def say_if_local_window_covers_all(local_window: int, tokens) -> None:
    """Once; not while tracing, where `tokens` may be symbolic."""
    if local_window and not torch.compiler.is_compiling() and local_window >= tokens and not _said_of_local_window:
        _said_of_local_window.append(local_window)
        logger.warning(
            "Lighthouse: local_window=%d covers all %d tokens: its part of the sum is dense attention, which costs as "
            "much (logged once)",
            local_window,
            tokens,
        )


_said_of_local_window: list[int] = []


@torch.compiler.assume_constant_result
def takes_window(inner: Callable) -> bool:
    """Whether an inner attention of the user's has the keyword `window`."""
    try:
        parameters = inspect.signature(getattr(inner, "forward", inner)).parameters.values()
    except (TypeError, ValueError):  # a function without a signature that Python can see
        return True
    return any(each.name == "window" or each.kind == each.VAR_KEYWORD for each in parameters)


def check_takes_window(inner: Callable | None, local_window: int) -> None:
    """Raises ValueError if an inner attention of the user's does not know of local windows, and there is one."""
    if inner is not None and local_window and not takes_window(inner):
        raise ValueError(
            f"local_window={local_window}: this inner attention has no keyword window, the number of rows that each "
            "row sees: add it (window=None for the sub-sequence), or use local_window=0 or inner=None"
        )


def check_options(scale: float | None, dropout_p: float, inner: Callable | None, local_window: int = 0) -> None:
    """The other arguments of `lighthouse.attention`. Raises ValueError or TypeError."""
    if scale is not None:
        if isinstance(scale, Tensor):
            raise TypeError("scale is a tensor, which would get no gradient: a number is needed; scale the query by it")
        if not isinstance(scale, (Real, torch.SymFloat)):
            raise TypeError(f"scale={scale!r}: a number above 0 is needed, or None for 1/sqrt(head_dim)")
        if not 0 < scale < math.inf:  # of 0 PyTorch's attention makes NaN
            raise ValueError(f"scale={scale}: a finite number above 0 is needed, or None for 1/sqrt(head_dim)")
    if not isinstance(dropout_p, (Real, torch.SymFloat)):
        raise TypeError(f"dropout_p={dropout_p!r}: a share from 0 to below 1 is needed")
    if not 0 <= dropout_p < 1:
        raise ValueError(f"dropout_p={dropout_p}: a share from 0 to below 1 is needed")
    if inner is not None and not callable(inner):
        raise TypeError(
            f"inner={inner!r}: a function inner(query, key, value, *, scale, dropout_p, layout) is needed, or None for "
            "PyTorch's attention"
        )
    check_takes_window(inner, local_window)


def check_inner_output(output: Tensor, query: Tensor) -> Tensor:
    """The output of the user's inner attention, as `scatter` needs it. Raises ValueError or TypeError."""
    if not isinstance(output, Tensor):
        raise TypeError(f"inner returned a {type(output).__name__}: only the output is needed, a tensor")
    _check_layout("what inner returned", output)
    if output.shape != query.shape or output.dtype != query.dtype or output.device != query.device:
        raise ValueError(
            f"inner returned {list(output.shape)} {output.dtype} on {output.device} for a query of {list(query.shape)} "
            f"{query.dtype} on {query.device}: an output like the query is needed"
        )
    if query.requires_grad and not output.requires_grad and torch.is_grad_enabled():
        raise ValueError(
            "inner returned an output without a gradient for a query that requires one: nothing would be learned "
            "through it; a differentiable attention is needed, or torch.no_grad() around the call"
        )
    return with_unit_stride(output)
