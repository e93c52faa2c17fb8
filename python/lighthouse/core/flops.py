"""What `torch.utils.flop_counter` counts for the operators that hide attention, by its own rule: as if not causal."""

from __future__ import annotations

import torch
from torch.utils.flop_counter import register_flop_formula

import lighthouse.core.fused  # noqa: F401  # defines the operators

_OPERATORS = torch.ops.lighthouse
BACKWARD = 2.5  # five products for two


def _products(query, length: int, window: int) -> int:
    batch, heads, tokens, head_dim = query
    return 4 * batch * heads * head_dim * (length * length + tokens * min(window, tokens))


@register_flop_formula(_OPERATORS.local_attention)
def _(query, key, value, window, *_, **__) -> int:
    return _products(query, 0, window)


@register_flop_formula(_OPERATORS.local_attention_backward)
def _(grad, query, key, value, output, logsumexp, seed, offset, window, *_, **__) -> int:
    return int(BACKWARD * _products(query, 0, window))


@register_flop_formula(_OPERATORS.attend)
def _(query, key, value, mask, prefix, windows, length, kernel, scale, dropout_p, window, *_, **__) -> int:
    return _products(query, length, window)


@register_flop_formula(_OPERATORS.attend_backward)
def _(grad, mask, prefix, output_sub, *rest, **__) -> int:
    return int(BACKWARD * _products(grad, output_sub[2], rest[-2]))
