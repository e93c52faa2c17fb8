"""The operators torch.ops.lighthouse.* as PyTorch sees them: sizes for tracing, and which is whose gradient.

The numbers are made in C++ (src/torch/operators.cpp has the schemas). Shapes: query side `[B, Hq, N, D]`, key side
`[B, Hkv, N, D]`, scores, mask and prefix `[B, Hkv, N]`; `_sub` is S long instead of N.
"""

from __future__ import annotations

import torch
from torch import Tensor

import lighthouse
from lighthouse import _library

LIBRARY_PATH = _library.load(lighthouse.__path__)

HEADS_FIRST = (0, 1, 2, 3)
TOKENS_FIRST = (0, 2, 1, 3)


def memory_order(tensor: Tensor) -> list[int]:
    """The tensor's dimensions from the slowest in memory to the fastest, the head dimension last."""
    return [*sorted(range(3), key=lambda i: -tensor.stride(i)), 3]


def with_unit_stride(tensor: Tensor) -> Tensor:
    """The tensor itself where the head dimension is contiguous, else a copy of which that is true."""
    return tensor if tensor.stride(-1) == 1 else tensor.contiguous()


def _empty(like: Tensor, length, order) -> Tensor:
    batch, heads, _, head_dim = like.shape
    return torch.empty_permuted((batch, heads, length, head_dim), order, dtype=like.dtype, device=like.device)


@torch.library.register_fake("lighthouse::score")
def _(query, key):
    scores = key.new_empty(key.shape[:3], dtype=torch.float32)
    return scores, torch.empty_like(scores)


@torch.library.register_fake("lighthouse::select")
def _(query_score, key_score, windows, topk_numerator, topk_denominator, cover_start):
    return query_score.new_empty(query_score.shape, dtype=torch.uint8), query_score.new_empty(
        query_score.shape, dtype=torch.int32
    )


@torch.library.register_fake("lighthouse::gather")
def _(query, key, value, mask, prefix, windows, length):
    return tuple(_empty(tensor, length, HEADS_FIRST) for tensor in (query, key, value))


@torch.library.register_fake("lighthouse::gather_backward")
def _(grad_query_sub, grad_key_sub, grad_value_sub, mask, prefix, windows, query_order, key_order, value_order):
    tokens = mask.shape[2]
    return (
        _empty(grad_query_sub, tokens, query_order),
        _empty(grad_key_sub, tokens, key_order),
        _empty(grad_value_sub, tokens, value_order),
    )


@torch.library.register_fake("lighthouse::scatter")
def _(output_sub, mask, prefix, windows):
    return _empty(output_sub, mask.shape[2], TOKENS_FIRST)


@torch.library.register_fake("lighthouse::scatter_backward")
def _(grad_output, mask, prefix, windows, length, order):
    return _empty(grad_output, length, order)


# Gradients. Every verb is linear, so each one's gradient is the other of its pair, to any order; scores and the choice
# have none. Only mask and prefix are kept.


def _no_gradient(ctx, inputs, output):
    ctx.mark_non_differentiable(*output)


torch.library.register_autograd("lighthouse::score", lambda ctx, *_: (None,) * 2, setup_context=_no_gradient)
torch.library.register_autograd("lighthouse::select", lambda ctx, *_: (None,) * 6, setup_context=_no_gradient)


def _gather_setup(ctx, inputs, output):
    query, key, value, mask, prefix, ctx.windows, _ = inputs
    ctx.save_for_backward(mask, prefix)
    ctx.orders = [memory_order(tensor) for tensor in (query, key, value)]


def _gather_backward(ctx, *grads):
    grads = [with_unit_stride(grad) for grad in grads]
    grads = torch.ops.lighthouse.gather_backward(*grads, *ctx.saved_tensors, ctx.windows, *ctx.orders)
    return *grads, None, None, None, None


torch.library.register_autograd("lighthouse::gather", _gather_backward, setup_context=_gather_setup)


def _gather_backward_setup(ctx, inputs, output):
    query_sub, _, _, mask, prefix, ctx.windows, *_ = inputs
    ctx.save_for_backward(mask, prefix)
    ctx.length = query_sub.shape[2]


def _gather_backward_backward(ctx, *grads):
    grads = [with_unit_stride(grad) for grad in grads]
    return *torch.ops.lighthouse.gather(*grads, *ctx.saved_tensors, ctx.windows, ctx.length), *[None] * 6


torch.library.register_autograd(
    "lighthouse::gather_backward", _gather_backward_backward, setup_context=_gather_backward_setup
)


def _scatter_setup(ctx, inputs, output):
    output_sub, mask, prefix, ctx.windows = inputs
    ctx.save_for_backward(mask, prefix)
    ctx.length, ctx.order = output_sub.shape[2], memory_order(output_sub)


def _scatter_backward(ctx, grad):
    grad_sub = torch.ops.lighthouse.scatter_backward(
        with_unit_stride(grad), *ctx.saved_tensors, ctx.windows, ctx.length, ctx.order
    )
    return grad_sub, None, None, None


torch.library.register_autograd("lighthouse::scatter", _scatter_backward, setup_context=_scatter_setup)


def _scatter_backward_setup(ctx, inputs, output):
    _, mask, prefix, ctx.windows, *_ = inputs
    ctx.save_for_backward(mask, prefix)


def _scatter_backward_backward(ctx, grad):
    return torch.ops.lighthouse.scatter(with_unit_stride(grad), *ctx.saved_tensors, ctx.windows), *[None] * 5


torch.library.register_autograd(
    "lighthouse::scatter_backward", _scatter_backward_backward, setup_context=_scatter_backward_setup
)
