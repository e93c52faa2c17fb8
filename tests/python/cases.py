"""Inputs that several test files share."""

from __future__ import annotations

import torch

DEFAULTS = ((1 / 4, 1 / 16), 1 / 64)


def rand_qkv(tokens, *, batch=1, query_heads=2, kv_heads=1, head_dim=8, dtype=torch.float64, seed=0, layout="heads"):
    """Random query, key and value; `layout` is the dimension behind the batch in memory: "heads" or "tokens"."""
    generator = torch.Generator().manual_seed(seed)

    def rand(heads):
        if layout == "heads":
            return torch.randn(batch, heads, tokens, head_dim, generator=generator, dtype=torch.float64).to(dtype)
        x = torch.randn(batch, tokens, heads, head_dim, generator=generator, dtype=torch.float64).to(dtype)
        return x.transpose(1, 2)

    return rand(query_heads), rand(kv_heads), rand(kv_heads)


def dense(query, key, value, scale=None):
    """PyTorch's dense causal attention."""
    return torch.nn.functional.scaled_dot_product_attention(
        query, key, value, is_causal=True, scale=scale, enable_gqa=query.shape[1] != key.shape[1]
    )
