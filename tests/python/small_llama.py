"""Llamas small enough for tests, wrapped so that Lighthouse acts on 64 tokens, and an inner attention that counts."""

from __future__ import annotations

import torch
from transformers import LlamaConfig, LlamaForCausalLM, LlamaModel

from lighthouse import LighthouseWrapper
from lighthouse.core.inner import causal_sdpa

VOCABULARY = 61
TOKENS = 64
LAYERS = 4  # one dense layer at each end by default without a local window
LIGHTHOUSE_LAYERS = 2
LIMIT = 128  # tokens the model allows

# 64 tokens: windows of 1, 2, 4; 16 entries of the coarsest level, two children each of 4 parents on two levels.
SETTINGS = {"pool_ratios": (1 / 2, 1 / 4), "select_topk": 4, "local_window": 0, "min_tokens": 0, "max_share": 1.0}
SUB_LENGTH = 32

MODELS = (LlamaModel, LlamaForCausalLM)


class Spy:
    """The default inner attention, and the shapes of the queries it was given: S long where Lighthouse acted."""

    def __init__(self):
        self.queries: list[tuple[int, ...]] = []

    def __call__(self, query, key, value, **kwargs):
        self.queries.append(tuple(query.shape))
        return causal_sdpa(query, key, value, **kwargs)

    @property
    def calls(self) -> int:
        return len(self.queries)

    def since(self, do) -> int:
        """How many calls `do()` makes."""
        before = self.calls
        do()
        return self.calls - before


def config(**changes) -> LlamaConfig:
    return LlamaConfig(
        **{
            "vocab_size": VOCABULARY,
            "hidden_size": 32,
            "intermediate_size": 32,
            "num_hidden_layers": LAYERS,
            "num_attention_heads": 2,
            "num_key_value_heads": 1,
            "max_position_embeddings": LIMIT,
            **changes,
        }
    )


def plain(model_class=LlamaForCausalLM, seed=0, **changes):
    torch.manual_seed(seed)
    return model_class(config(**changes)).train()


def wrapped(model_class=LlamaForCausalLM, seed=0, spy=None, change=lambda model: model, **settings):
    """A wrapped model of the same weights as `plain` with that seed; `change` is done to it before it is wrapped."""
    model = change(plain(model_class, seed, **settings.pop("config", {})))
    return LighthouseWrapper(model, **{**SETTINGS, "inner": spy, **settings})


def ids(rows=2, tokens=TOKENS, seed=1) -> torch.Tensor:
    return torch.randint(0, VOCABULARY, (rows, tokens), generator=torch.Generator().manual_seed(seed))
