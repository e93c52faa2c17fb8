"""A Llama-style model of bytes in plain PyTorch, whose layers attend densely or with a given attention.

`attention(query, key, value)` on `[B, H, N, D]` is an argument of the forward pass: one model, any attention, nothing
to switch. Blocks are compiled, not the model: all have the same code, so each attention is compiled once however many
layers there are.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from sides import dense
from torch import Tensor, nn

HEAD_DIM = 128
VOCABULARY = 256  # bytes
ROPE_BASE = 10_000.0
INITIAL_STD = 0.02

Attention = Callable[[Tensor, Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class Shape:
    """`dense_layers` at each end attend densely whatever attention is given."""

    layers: int
    width: int
    heads: int
    feed_forward: int
    dense_layers: int = 2


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary positions of `[B, N, H, D]`, in float32."""
    a, b = x.float().chunk(2, dim=-1)
    return torch.cat((a * cos - b * sin, b * cos + a * sin), dim=-1).to(x.dtype)


class RMSNorm(nn.Module):
    def __init__(self, width: int):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))

    def forward(self, x: Tensor) -> Tensor:
        wide = x.float()
        return (wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + 1e-6) * self.weight).to(x.dtype)


class Block(nn.Module):
    def __init__(self, shape: Shape):
        super().__init__()
        inner = shape.heads * HEAD_DIM
        self.heads = shape.heads
        self.attention_norm = RMSNorm(shape.width)
        self.query = nn.Linear(shape.width, inner, bias=False)
        self.key = nn.Linear(shape.width, inner, bias=False)
        self.value = nn.Linear(shape.width, inner, bias=False)
        self.output = nn.Linear(inner, shape.width, bias=False)
        self.mlp_norm = RMSNorm(shape.width)
        self.gate = nn.Linear(shape.width, shape.feed_forward, bias=False)
        self.up = nn.Linear(shape.width, shape.feed_forward, bias=False)
        self.down = nn.Linear(shape.feed_forward, shape.width, bias=False)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, attention: Attention) -> Tensor:
        normed = self.attention_norm(x)
        query, key, value = (
            project(normed).unflatten(-1, (self.heads, HEAD_DIM)) for project in (self.query, self.key, self.value)
        )
        query, key = rotate(query, cos, sin), rotate(key, cos, sin)
        attended = attention(query.transpose(1, 2), key.transpose(1, 2), value.transpose(1, 2))
        x = x + self.output(attended.transpose(1, 2).flatten(2))
        normed = self.mlp_norm(x)
        return x + self.down(F.silu(self.gate(normed)) * self.up(normed))


class Head(nn.Module):
    """Hidden states and targets to each token's loss, in float32: 256 logits a token are small at any length."""

    def __init__(self, width: int):
        super().__init__()
        self.norm = RMSNorm(width)
        self.logits = nn.Linear(width, VOCABULARY, bias=False)

    def forward(self, x: Tensor, targets: Tensor) -> Tensor:
        logits = self.logits(self.norm(x)).float().flatten(0, 1)
        return F.cross_entropy(logits, targets.flatten(), reduction="none").view_as(targets)


class Model(nn.Module):
    """`cos` and `sin` `[N, 1, D/2]` float32 are not buffers: they keep their dtype whatever that of the weights."""

    def __init__(self, shape: Shape, cos: Tensor, sin: Tensor):
        super().__init__()
        self.shape, self.cos, self.sin = shape, cos, sin
        self.embedding = nn.Embedding(VOCABULARY, shape.width)
        self.blocks = nn.ModuleList(Block(shape) for _ in range(shape.layers))
        self.head = Head(shape.width)

    def forward(self, tokens: Tensor, targets: Tensor, attention: Attention) -> Tensor:
        """Mean loss of `targets` `[B, N]` given `tokens` `[B, N]`."""
        return self.losses(tokens, targets, attention).mean()

    def losses(self, tokens: Tensor, targets: Tensor, attention: Attention) -> Tensor:
        """The loss of each of `targets`, `[B, N]`."""
        x, last = self.embedding(tokens), self.shape.layers - 1
        for index, block in enumerate(self.blocks):
            at_an_end = min(index, last - index) < self.shape.dense_layers
            x = block(x, self.cos, self.sin, dense if at_an_end else attention)
        return self.head(x, targets)

    def parameter_count(self) -> int:
        return sum(parameter.numel() for parameter in self.parameters())


def new_model(
    shape: Shape,
    tokens: int,
    *,
    seed: int,
    device: str,
    dtype: torch.dtype = torch.float32,
    rope_base: float = ROPE_BASE,
) -> Model:
    """A compiled model for sequences of `tokens`; the same seed gives the same weights on every device.

    Normal weights of standard deviation 0.02; the two matrices of a block that write to the residual stream have that
    divided by the square root of twice the layers. Embedding and output matrix are not tied.
    """
    frequencies = rope_base ** (-torch.arange(0, HEAD_DIM, 2, dtype=torch.float64) / HEAD_DIM)
    angles = torch.outer(torch.arange(tokens, dtype=torch.float64), frequencies)[:, None]
    model = Model(shape, angles.cos().float().to(device), angles.sin().float().to(device))
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim == 2:
                writes = name.endswith(("output.weight", "down.weight"))
                std = INITIAL_STD / math.sqrt(2 * shape.layers) if writes else INITIAL_STD
                parameter.normal_(0.0, std, generator=generator)
    model.to(device=device, dtype=dtype)
    for part in (*model.blocks, model.head):
        part.compile(fullgraph=True, dynamic=False)
    return model


def compiled_graphs() -> int:
    """How many graphs torch.compile has made so far."""
    return torch._dynamo.utils.counters["stats"]["unique_graphs"]


def new_optimizer(model: Model, learning_rate: float) -> torch.optim.Optimizer:
    """Fused AdamW; only matrices decay, embedding and output matrix among them."""
    matrices = [p for p in model.parameters() if p.ndim == 2]
    vectors = [p for p in model.parameters() if p.ndim != 2]
    groups = [{"params": matrices, "weight_decay": 0.1}, {"params": vectors, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=learning_rate, betas=(0.9, 0.95), fused=True)
