"""PyTorch's kernels of causal attention, called for what their gradients need too, without autograd.

The names are those of `torch.nn.attention.SDPBackend`. All take query `[B, Hq, S, D]`, key and value `[B, Hkv, S, D]`
with Hkv dividing Hq, and give the output, which is like the query, and what is saved for the gradient.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend

_ATEN = torch.ops.aten

HEAD_DIMS = (64, 128, 192, 256)  # the limits that kernels have


def head_dim_limit(query: Tensor) -> int:
    """The next of `HEAD_DIMS`, or the last: a constant while tracing too."""
    return next((size for size in HEAD_DIMS if query.shape[3] <= size), HEAD_DIMS[-1])


class Saved(NamedTuple):
    """What a gradient needs besides inputs and output: the log of each row's sum of weights, the dropout's seed."""

    logsumexp: Tensor
    seed: Tensor
    offset: Tensor


class Kernel(NamedTuple):
    forward: Callable[..., tuple[Tensor, Saved]]  # (query, key, value, scale, dropout_p)
    backward: Callable[..., tuple[Tensor, Tensor, Tensor]]  # (grad, query, key, value, output, saved, scale, dropout_p)


def _cudnn(query, key, value, scale, dropout_p):
    output, logsumexp, _, _, _, _, seed, offset, _ = _ATEN._scaled_dot_product_cudnn_attention.default(
        query, key, value, None, True, dropout_p, True, scale=scale
    )
    return output, Saved(logsumexp, seed, offset)


def _cudnn_backward(grad, query, key, value, output, saved, scale, dropout_p):
    tokens = query.shape[2]
    return _ATEN._scaled_dot_product_cudnn_attention_backward.default(
        *(grad, query, key, value, output, *saved, None, None, None, tokens, tokens, dropout_p, True), scale=scale
    )


def _flash(query, key, value, scale, dropout_p):
    output, logsumexp, _, _, _, _, seed, offset, _ = _ATEN._scaled_dot_product_flash_attention.default(
        query, key, value, dropout_p, True, scale=scale
    )
    return output, Saved(logsumexp, seed, offset)


def _flash_backward(grad, query, key, value, output, saved, scale, dropout_p):
    tokens, (logsumexp, seed, offset) = query.shape[2], saved
    return _ATEN._scaled_dot_product_flash_attention_backward.default(
        *(grad, query, key, value, output, logsumexp, None, None, tokens, tokens, dropout_p, True, seed, offset),
        scale=scale,
    )


def _efficient(query, key, value, scale, dropout_p):
    output, *saved = _ATEN._scaled_dot_product_efficient_attention.default(
        query, key, value, None, True, dropout_p, True, scale=scale
    )
    return output, Saved(*saved)


def _efficient_backward(grad, query, key, value, output, saved, scale, dropout_p):
    return _ATEN._scaled_dot_product_efficient_attention_backward.default(
        *(grad, query, key, value, None, output, *saved, dropout_p, [True, True, True, False], True), scale=scale
    )[:3]


def _cpu(query, key, value, scale, dropout_p):
    output, logsumexp = _ATEN._scaled_dot_product_flash_attention_for_cpu.default(
        query, key, value, dropout_p, True, scale=scale
    )
    return output, Saved(logsumexp, *(logsumexp.new_empty(0, dtype=torch.int64) for _ in range(2)))


def _cpu_backward(grad, query, key, value, output, saved, scale, dropout_p):
    return _ATEN._scaled_dot_product_flash_attention_for_cpu_backward.default(
        *(grad, query, key, value, output, saved.logsumexp, dropout_p, True), scale=scale
    )


CPU = "CPU"
KERNELS = {
    SDPBackend.CUDNN_ATTENTION.name: Kernel(_cudnn, _cudnn_backward),
    SDPBackend.FLASH_ATTENTION.name: Kernel(_flash, _flash_backward),
    SDPBackend.EFFICIENT_ATTENTION.name: Kernel(_efficient, _efficient_backward),
    CPU: Kernel(_cpu, _cpu_backward),
}
