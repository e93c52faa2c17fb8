"""The two sides of each benchmark, dense attention and Lighthouse's, and the check that comes before any timing."""

from __future__ import annotations

import sys

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

import lighthouse
from lighthouse.core.method import POOL_RATIOS, SELECT_TOPK, check_pool_ratios, check_select_topk


def dense(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """PyTorch's causal attention; on CUDA it is cuDNN's or an error, so that it is known what was timed."""
    grouped = True if query.shape[1] != key.shape[1] else False  # noqa: SIM210 - a plain bool also while tracing
    if not query.is_cuda:
        return F.scaled_dot_product_attention(query, key, value, is_causal=True, enable_gqa=grouped)
    with sdpa_kernel(SDPBackend.CUDNN_ATTENTION):
        return F.scaled_dot_product_attention(query, key, value, is_causal=True, enable_gqa=grouped)


def lighthouse_attention(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """`lighthouse.attention` as it comes: windows of 1, 4 and 16 tokens, N/64 parents per level."""
    return lighthouse.attention(query, key, value)


def leaves(tokens: int, heads: int, kv_heads: int, head_dim: int, dtype: torch.dtype, device: str):
    """Query, key and value as a model passes them, and the output's gradient: [B, N, H, D] in memory."""
    generator = torch.Generator(device).manual_seed(tokens)

    def rand(count):
        x = torch.randn(1, tokens, count, head_dim, generator=generator, device=device, dtype=dtype)
        return x.transpose(1, 2)

    return [rand(count).requires_grad_() for count in (heads, kv_heads, kv_heads)], rand(heads)


def check(
    dtype: torch.dtype, device: str, *, head_dim: int = 128, pool_ratios=POOL_RATIOS, select_topk=SELECT_TOPK
) -> float:
    """Largest error of output and gradients against the float64 oracle, relative to dense attention's own error.

    Exits where it is more than twice that: what is wrong is not timed.
    """
    inputs, grad = leaves(1500, 4, 2, head_dim, dtype, device)
    windows, topk = check_pool_ratios(pool_ratios), check_select_topk(select_topk)
    ours = lighthouse.attention(*inputs, pool_ratios=pool_ratios, select_topk=select_topk)
    mine = [ours.detach(), *torch.autograd.grad(ours, inputs, grad)]
    output = F.scaled_dot_product_attention(*inputs, is_causal=True, enable_gqa=True)
    plain = [output.detach(), *torch.autograd.grad(output, inputs, grad)]

    # The oracle runs on the CPU, with the device's own scores: other rounding there could choose other entries.
    scores = [score.cpu() for score in torch.ops.lighthouse.score(*(tensor.detach() for tensor in inputs[:2]))]
    wide = [tensor.detach().cpu().double().contiguous() for tensor in inputs]
    wide_grad = grad.cpu().double().contiguous()
    args = (*wide, *scores, windows, *topk, True, 0.0)
    true = [
        torch.ops.lighthouse.reference_attention(*args),
        *torch.ops.lighthouse.reference_attention_backward(*args, wide_grad),
    ]
    wide = [tensor.requires_grad_() for tensor in wide]
    output = F.scaled_dot_product_attention(*wide, is_causal=True, enable_gqa=True)
    plain_true = [output.detach(), *torch.autograd.grad(output, wide, wide_grad)]

    def worst(found, right):
        return max(((a.cpu().double() - b).norm() / b.norm()).item() for a, b in zip(found, right, strict=True))

    error, allowed = worst(mine, true), worst(plain, plain_true)
    if not error <= 2 * allowed + 1e-6:
        sys.exit(f"error {error:.2e} against the oracle where dense attention has {allowed:.2e}: not timed")
    return error / allowed
