"""What is compared: dense attention, Lighthouse's and the inner one, their inputs, and whether the result is right."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from lighthouse.core.attention import sub_sequence_attention
from lighthouse.core.inner import causal_sdpa
from lighthouse.core.method import DEFAULT, Method
from lighthouse.core.sequences import SubSequences
from lighthouse.speed.layer import Layer


class WrongResult(RuntimeError):
    """The attention differs from the float64 reference, so it is not timed."""


def dense_attention(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """PyTorch's own causal attention of the whole sequence: what Lighthouse is compared with."""
    return causal_sdpa(
        query, key, value, scale=None, dropout_p=0.0, layout=SubSequences(query.shape[0], query.shape[2])
    )


def leaves(
    tokens: int, heads: int, kv_heads: int, head_dim: int, dtype: torch.dtype, device: torch.device | str
) -> tuple[tuple[Tensor, Tensor, Tensor], Tensor]:
    """Query, key and value as a model passes them, and the output's gradient: [B, N, H, D] in memory."""
    generator = torch.Generator(device).manual_seed(tokens)

    def rand(count: int) -> Tensor:
        x = torch.randn(1, tokens, count, head_dim, generator=generator, device=device, dtype=dtype)
        return x.transpose(1, 2)

    inputs = rand(heads).requires_grad_(), rand(kv_heads).requires_grad_(), rand(kv_heads).requires_grad_()
    return inputs, rand(heads)


@dataclass(frozen=True)
class Side:
    """An attention, and what it is called with. Each method is a call to be timed."""

    attention: Callable[..., Tensor]
    inputs: Sequence[Tensor]
    grad: Tensor

    def both(self) -> None:
        """Forward and backward with a gradient made beforehand; the output is held until the end."""
        torch.autograd.grad(self.attention(*self.inputs), self.inputs, self.grad)

    def used(self) -> None:
        """The same as in a model: the next operation uses the output, which is not held."""
        torch.autograd.grad((self.attention(*self.inputs) * self.grad).sum(), self.inputs)

    def forward(self) -> None:
        with torch.no_grad():
            self.attention(*self.inputs)


def inner_side(length: int, layer: Layer, device: torch.device | str) -> Side:
    """The attention of a sub-sequence alone, the least time that Lighthouse can take.

    Its inputs are laid out as `gather` does, and the gradient like the output, as `scatter_backward` makes it.
    """
    as_passed, _ = leaves(length, layer.heads, layer.kv_heads, layer.head_dim, layer.torch_dtype, device)
    inputs = [tensor.detach().contiguous().requires_grad_() for tensor in as_passed]
    return Side(dense_attention, inputs, torch.randn_like(dense_attention(*inputs).detach()))


def _grouped(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    return F.scaled_dot_product_attention(query, key, value, is_causal=True, enable_gqa=True)


def _with_gradients(attention: Callable[..., Tensor], inputs: Sequence[Tensor], grad: Tensor) -> list[Tensor]:
    output = attention(*inputs)
    return [output.detach(), *torch.autograd.grad(output, inputs, grad)]


def check_finite(attention: Callable[..., Tensor], inputs: Sequence[Tensor], grad: Tensor) -> None:
    """`check` compares a short sequence; at these inputs' length all must be finite. Raises `WrongResult`."""
    if not all(tensor.isfinite().all() for tensor in _with_gradients(attention, inputs, grad)):
        raise WrongResult(f"{inputs[0].shape[2]:,} tokens: the output or a gradient is not finite, so nothing is timed")


def check(
    dtype: torch.dtype,
    device: torch.device | str,
    *,
    head_dim: int = 128,
    method: Method = DEFAULT,
    tokens: int = 1500,
) -> float:
    """Largest error of output and gradients against the float64 reference, relative to dense attention's own error.

    Raises `WrongResult` if it is more than twice that.
    """
    inputs, grad = leaves(tokens, 4, 2, head_dim, dtype, device)
    mine = _with_gradients(lambda q, k, v: sub_sequence_attention(q, k, v, method), inputs, grad)
    plain = _with_gradients(_grouped, inputs, grad)

    # The reference runs on the CPU, with the device's own scores: other rounding there could choose other entries.
    scores = [score.cpu() for score in torch.ops.lighthouse.score(*(tensor.detach() for tensor in inputs[:2]))]
    wide = [tensor.detach().cpu().double().contiguous() for tensor in inputs]
    wide_grad = grad.cpu().double().contiguous()
    args = (*wide, *scores, method.windows, *method.topk, method.cover_start, 0.0)
    true = [
        torch.ops.lighthouse.reference_attention(*args, method.local_window),
        *torch.ops.lighthouse.reference_attention_backward(*args, wide_grad, method.local_window),
    ]
    plain_true = _with_gradients(_grouped, [tensor.requires_grad_() for tensor in wide], wide_grad)

    def worst(found: Sequence[Tensor], right: Sequence[Tensor]) -> float:
        return max(((a.cpu().double() - b).norm() / b.norm()).item() for a, b in zip(found, right, strict=True))

    error, allowed = worst(mine, true), worst(plain, plain_true)
    if not error <= 2 * allowed + 1e-6:
        raise WrongResult(
            f"error {error:.2e} against the float64 reference where dense attention has {allowed:.2e}, in {dtype} on "
            f"{device}: nothing is timed; please report it"
        )
    return error / allowed
