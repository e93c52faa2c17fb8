"""Llama models by name, small enough for one machine, with the byte tokenizer."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from transformers import ByT5Tokenizer, LlamaConfig, LlamaForCausalLM, set_seed


@dataclass(frozen=True)
class Size:
    """A Llama's measures. `parameters` counts them for a vocabulary of bytes, embedding and output matrix included."""

    name: str
    layers: int
    width: int
    heads: int
    kv_heads: int
    head_dim: int
    intermediate: int
    max_context: int
    rope_theta: float
    initializer_range: float = 0.02

    @property
    def parameters(self) -> int:
        attention = 2 * self.width * self.head_dim * (self.heads + self.kv_heads)
        layer = attention + 3 * self.width * self.intermediate + 2 * self.width
        return self.layers * layer + 2 * len(byte_tokenizer()) * self.width + self.width

    def __str__(self) -> str:
        return (
            f"{self.name} ({self.parameters / 1e6:.1f}M: {self.layers} layers of {self.width}, "
            f"{self.heads} x {self.head_dim}, up to {self.max_context:,} tokens)"
        )


def byte_tokenizer() -> ByT5Tokenizer:
    """Bytes as tokens: needs no files and no network. Its ids are 0 to `len(tokenizer) - 1`."""
    return ByT5Tokenizer()


SIZES = {
    size.name: size
    for size in (
        Size("nano", 4, 128, 1, 1, 64, 512, 65_536, 10_000.0, 0.06),
        Size("tiny", 6, 256, 4, 4, 64, 704, 131_072, 100_000.0),
        Size("small", 12, 512, 8, 8, 64, 1408, 131_072, 500_000.0),
        Size("medium", 24, 1024, 8, 4, 128, 2816, 131_072, 500_000.0),
    )
}


def check_model(name: str, context: int) -> int:
    """Raises `ValueError` for a model that is not known or not made for so long a context; else its layers."""
    if name not in SIZES:
        raise ValueError(f"model={name!r}: there is {', '.join(SIZES)}")
    size = SIZES[name]
    if context > size.max_context:
        raise ValueError(f"context={context}: model {name!r} allows at most {size.max_context} tokens")
    return size.layers


def new_model(name: str, context: int, seed: int) -> LlamaForCausalLM:
    """A Llama of that size with fresh weights, which depend on `seed` alone.

    `context` tokens become its `max_position_embeddings`: it has seen no position beyond.
    """
    size, tokenizer = SIZES[name], byte_tokenizer()
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=size.width,
        intermediate_size=size.intermediate,
        num_hidden_layers=size.layers,
        num_attention_heads=size.heads,
        num_key_value_heads=size.kv_heads,
        head_dim=size.head_dim,
        max_position_embeddings=context,
        initializer_range=size.initializer_range,
        rope_parameters={"rope_type": "default", "rope_theta": size.rope_theta},
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    set_seed(seed)
    return LlamaForCausalLM(config).to(torch.float32)
