"""Inputs, a layer and a counter of operators that several test files share. Needs torch alone."""

from __future__ import annotations

import functools

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import CheckpointPolicy

import lighthouse

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


MM = torch.ops.aten.mm.default


class Calls(TorchDispatchMode):
    """Counts the calls of every operator, those of compiled code too."""

    supports_higher_order_operators = True  # compiled checkpointing calls random operators through one, in torch 2.11

    @classmethod
    def ignore_compile_internals(cls):
        return True

    def __init__(self):
        super().__init__()
        self.of = {}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.of[func] = self.of.get(func, 0) + 1
        return func(*args, **(kwargs or {}))

    def __getitem__(self, name):
        return self.of.get(getattr(torch.ops.lighthouse, name).default, 0)


def save_products(context, operator, *args, **kwargs):
    return CheckpointPolicy.MUST_SAVE if operator == MM else CheckpointPolicy.PREFER_RECOMPUTE


CONTEXTS = {
    "full": lighthouse.checkpoint_contexts,
    "selective_by_a_list": functools.partial(lighthouse.checkpoint_contexts, [MM]),
    "selective_by_a_policy": functools.partial(lighthouse.checkpoint_contexts, save_products),
}


class Layer(torch.nn.Module):
    """Two key-value heads for four query heads, and products before and behind the attention."""

    def __init__(self, width=32):
        super().__init__()
        torch.manual_seed(0)
        self.qkv = torch.nn.Linear(width, 2 * width, bias=False)
        self.out = torch.nn.Linear(width, width, bias=False)

    def forward(self, x):
        query, key, value = self.qkv(x).unflatten(-1, (8, -1)).transpose(1, 2).split((4, 2, 2), dim=1)
        attended = lighthouse.attention(query, key, value, select_topk=5)
        return x + self.out(attended.transpose(1, 2).flatten(2)).relu()
