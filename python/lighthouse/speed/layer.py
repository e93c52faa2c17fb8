"""The attention of one layer, by its sizes: its work, the bytes that its operators move, and those that it keeps."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch

from lighthouse.core.plan import local_pairs

DTYPES = ("float32", "bfloat16", "float16")


@dataclass(frozen=True)
class Layer:
    """The attention of one layer, for a batch of one. `dtype` by its name: "bfloat16"."""

    heads: int = 8
    kv_heads: int = 8
    head_dim: int = 128
    dtype: str = "bfloat16"

    def __post_init__(self):
        for name in ("heads", "kv_heads", "head_dim"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise ValueError(f"{name}={value!r}: a whole number of at least 1 is needed")
        if self.heads % self.kv_heads:
            raise ValueError(
                f"kv_heads={self.kv_heads} with heads={self.heads}: the query heads must be a multiple of them"
            )
        if self.dtype not in DTYPES:
            raise ValueError(f"dtype={self.dtype!r}: {' or '.join(DTYPES)} is needed")

    @property
    def torch_dtype(self) -> torch.dtype:
        return getattr(torch, self.dtype)

    def __str__(self) -> str:
        grouped = f" over {self.kv_heads}" if self.kv_heads != self.heads else ""
        return f"{self.heads} heads{grouped} of {self.head_dim}, {self.dtype}"

    def work(self, length: int) -> int:
        """Operations of causal attention, forward and backward: seven products over half a square."""
        return 7 * self.heads * self.head_dim * length * length

    def local_work(self, tokens: int, window: int) -> int:
        """Operations of a local window, forward and backward, and of FlashAttention's forward once more."""
        products = 14 if self.dtype == "float32" else 18
        return products * self.heads * self.head_dim * local_pairs(tokens, window)

    def moved(self, tokens: int, length: int, *, local: bool = False) -> int:
        """Bytes that our operators must read and write, forward and backward (METHOD 2, 3, 6, 7).

        With a local window they also read its output and its three gradients, and gather once more; nothing where
        nothing is chosen.
        """
        if not length:
            return 0
        size = self.torch_dtype.itemsize
        query, pair = self.heads * self.head_dim * size, 2 * self.kv_heads * self.head_dim * size
        scores, choice = 8 * self.kv_heads * tokens, 5 * self.kv_heads * tokens
        score = (query + pair // 2) * tokens + scores
        select = scores + choice
        gather = (query + pair) * (tokens + length) + choice
        scatter = query * (tokens + length) + choice
        added = (2 * query + pair) * tokens + gather if local else 0
        return score + select + 2 * gather + 2 * scatter + added

    def kept(self, tokens: int, length: int | None = None, *, local: bool = False) -> int:
        """Bytes that stay between forward and backward: dense, or with a sub-sequence of `length`.

        Query, key, value, output and the softmax's sums; Lighthouse keeps these of the sub-sequence, the choice, and
        the output that the next product needs. With a local window it keeps those of the tokens, and of the
        sub-sequence output and sums.
        """
        size = self.torch_dtype.itemsize
        row = 2 * (self.heads + self.kv_heads) * self.head_dim * size + 4 * self.heads
        output, choice = self.heads * self.head_dim * size, 5 * self.kv_heads * tokens
        if length is None:
            return row * tokens
        if local:
            return row * tokens + ((output + 4 * self.heads) * length + choice if length else 0)
        return row * length + output * tokens + choice


LAYERS = {"cpu": Layer(4, 4, 64, "float32"), "cuda": Layer(8, 8, 128, "bfloat16")}


def default_layer(device: torch.device | str, **given) -> Layer:
    """The device's default with what is given, and not None, in its place; `heads` alone are the key heads too."""
    given = {name: value for name, value in given.items() if value is not None}
    if "heads" in given:
        given.setdefault("kv_heads", given["heads"])
    return replace(LAYERS[torch.device(device).type], **given)
