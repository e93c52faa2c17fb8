"""What a user can get wrong about the tensors, checked before any work."""

from __future__ import annotations

import logging

import torch
from torch import Tensor

from lighthouse.devices import check_device, check_on_cuda
from lighthouse.operators import with_unit_stride

logger = logging.getLogger("lighthouse")

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def _check_tensor(name: str, tensor: Tensor) -> None:
    if not isinstance(tensor, Tensor):
        raise TypeError(f"{name} is a {type(tensor).__name__}: a tensor [batch, heads, tokens, head_dim] is needed")
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
        logger.debug("%s has a last stride other than one and is copied; said once", name)


def _autocast(tensor: Tensor) -> Tensor:
    """Casts as PyTorch's own attention does under autocast."""
    device = tensor.device.type
    if device == "meta" or not torch.is_autocast_enabled(device) or tensor.dtype == torch.float64:
        return tensor
    return tensor.to(torch.get_autocast_dtype(device))


def check_qk(query: Tensor, key: Tensor) -> tuple[Tensor, Tensor]:
    """Query and key as the operators take them. Raises ValueError or TypeError."""
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
    """Query, key and value as the operators take them. Raises ValueError or TypeError."""
    query, key = check_qk(query, key)
    _check_tensor("value", value)
    value = _autocast(value)
    _check_against_query("value", value, query)
    if value.shape[1] != key.shape[1]:
        raise ValueError(f"value has {value.shape[1]} heads, key {key.shape[1]}: they must be the same")
    return query, key, _unit_stride("value", value)


def check_scores(scores: tuple[Tensor, Tensor] | None, key: Tensor) -> tuple[Tensor, Tensor] | None:
    """The user's scores as the operators take them. Raises ValueError or TypeError."""
    if scores is None:
        return None
    if not isinstance(scores, (tuple, list)) or len(scores) != 2:
        raise TypeError("scores must be a pair of tensors [batch, key heads, tokens]: for queries and for keys")
    for i, score in enumerate(scores):
        name = f"scores[{i}]"
        if not isinstance(score, Tensor):
            raise TypeError(f"{name} is a {type(score).__name__}: a tensor [batch, key heads, tokens] is needed")
        if score.shape != key.shape[:3]:
            raise ValueError(
                f"{name} has shape {list(score.shape)}: {list(key.shape[:3])} is needed, [batch, key heads, tokens]"
            )
        if score.dtype != torch.float32:
            raise ValueError(f"{name} has dtype {score.dtype}: float32 is needed")
        if score.device != key.device:
            raise ValueError(f"{name} is on {score.device}, key on {key.device}: they must be the same")
    query_score, key_score = scores
    return query_score.detach().contiguous(), key_score.detach().contiguous()
