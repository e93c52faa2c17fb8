"""What Lighthouse cannot honour, refused before the first layer runs.

Transformers hands a custom attention no mask unless it asks, and no document boundaries at all: without these checks
padding and packed documents would be silently ignored. The trap is `torch.compile`: the values of a tensor cannot
be read there, so the check becomes part of the graph and fails when it runs, as a RuntimeError on a CPU and as a
device-side assertion on a GPU.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping

import torch

# Keyword -> why a value in it is refused. They travel from the model's call through every layer to the attention.
REFUSED_KEYWORDS = {
    "cu_seq_lens_q": "packed documents are not supported yet",
    "cu_seq_lens_k": "packed documents are not supported yet",
    "max_length_q": "packed documents are not supported yet",
    "max_length_k": "packed documents are not supported yet",
    "seq_idx": "packed documents are not supported yet",
    "cu_seqlens": "packed documents are not supported yet",
    "seq_lengths": "packed documents are not supported yet",
    "packed_seq_params": "packed documents are not supported yet",
    "sliding_window": "sliding windows are not supported",
    "softcap": "soft-capping of attention scores is not supported",
    "s_aux": "attention sinks are not supported",
    "position_bias": "a bias on attention scores is not supported",
    "block_sequence_ids": "attention in blocks is not supported",
}

# What is allowed because it changes nothing that an attention computes, or is checked elsewhere.
KNOWN_KEYWORDS = frozenset(
    {
        *("input_ids", "inputs_embeds", "labels", "shift_labels", "num_items_in_batch", "logits_to_keep"),
        *("attention_mask", "position_ids", "cache_position", "position_embeddings"),
        *("output_hidden_states", "output_attentions", "output_router_logits", "return_dict"),
        *("use_cache", "is_causal", "hidden_states"),
        *("ignore_index", "token_type_ids", "special_tokens_mask"),
    }
)

# Names of a key-value cache, today's and former ones.
CACHES = ("cache", "past_key_values", "past_key_value")

# The same, as a model's configuration spells it.
REFUSED_IN_CONFIG = {
    "sliding_window": "sliding windows are not supported",
    "attn_logit_softcapping": "soft-capping of attention scores is not supported",
    "attention_chunk_size": "attention in chunks is not supported",
    "attention_sinks": "attention sinks are not supported",
    "num_attention_sinks": "attention sinks are not supported",
}

WAY_OUT = "; for such batches switch it off: model.lighthouse(False)"


def check_config(config) -> None:
    """Refuses a model whose attention is not plain and causal. Raises `ValueError`."""
    for name, reason in REFUSED_IN_CONFIG.items():
        value = getattr(config, name, None)
        if value:
            raise ValueError(f"config.{name}={value!r}: {reason} by Lighthouse")
    others = set(getattr(config, "layer_types", None) or ()) - {"full_attention"}
    if others:
        raise ValueError(f"config.layer_types has {', '.join(sorted(others))}: full attention in every layer is needed")
    if not getattr(config, "is_causal", True):
        raise ValueError("config.is_causal=False: Lighthouse is causal self-attention only")


def check_checkpointing(body) -> None:
    """Refuses reentrant gradient checkpointing: it would recompute with whatever attention the last call left.

    Transformers keeps the checkpoint function, a partial, on `body`; without `use_reentrant` torch assumes True.
    """
    if not getattr(body, "gradient_checkpointing", False):
        return
    keywords = getattr(body._gradient_checkpointing_func, "keywords", {})
    if keywords.get("use_reentrant", True) is not False:
        raise ValueError(
            "gradient checkpointing is reentrant: its backward could run a different attention from the forward; "
            'use the other kind: model.gradient_checkpointing_enable({"use_reentrant": False})'
        )


def has_cache(call: Mapping) -> bool:
    """Whether a key-value cache is handed over, under any of its names."""
    return any(call.get(name) is not None for name in CACHES)


def check_call(call: Mapping, rows: int, tokens: int, config, names: Collection[str] = ()) -> None:
    """Refuses a forward that Lighthouse cannot honour. `call` holds the arguments of the model by name.

    `names` are those that the model's forward takes itself.

    Raises `ValueError`; under `torch.compile` what depends on a tensor's values fails when the graph runs.
    """
    check_keywords({name: value for name, value in call.items() if name not in names or name in REFUSED_KEYWORDS})
    for name in ("position_ids", "cache_position"):
        check_positions(call.get(name), tokens, name)
    if call.get("output_attentions", getattr(config, "output_attentions", False)):
        raise ValueError("output_attentions=True: Lighthouse has no attention weights to give" + WAY_OUT)
    check_length(tokens, config)
    check_mask(call.get("attention_mask"), (rows, tokens))


def check_keywords(keywords: Mapping) -> None:
    """Refuses what reaches an attention function as a keyword and changes what it would have to compute.

    An unknown keyword is refused too: its meaning is not known.
    """
    for name, reason in REFUSED_KEYWORDS.items():
        if keywords.get(name) is not None:
            raise ValueError(f"{name} is given: {reason} by Lighthouse" + WAY_OUT)
    if keywords.get("is_causal") is False:
        raise ValueError("is_causal=False: Lighthouse is causal self-attention only")
    for name, value in keywords.items():
        if value is not None and name not in KNOWN_KEYWORDS and name not in CACHES:
            raise ValueError(
                f"{name} is given: Lighthouse does not know it, and would ignore what it asks for; leave "
                "it out of the batch" + WAY_OUT
            )


def longest(config) -> int | None:
    """The most tokens that the model allows; None with dynamic RoPE, or where it does not say."""
    rope = getattr(config, "rope_parameters", None) or {}
    return None if rope.get("rope_type") == "dynamic" else getattr(config, "max_position_embeddings", None)


def check_length(tokens: int, config) -> None:
    """A sequence fits the model."""
    limit = longest(config)
    if limit is not None and tokens > limit:
        raise ValueError(
            f"the sequence has {tokens} tokens, the model allows {limit}: "
            "shorten it, or make the model with a larger config.max_position_embeddings"
        )


def check_mask(mask, shape: tuple[int, int] | None = None) -> None:
    """Only a mask `[B, N]` of ones: it hides nothing and numbers no documents."""
    if mask is None:
        return
    if not isinstance(mask, torch.Tensor):
        raise ValueError(
            f"attention_mask is a {type(mask).__name__}: only a mask [B, N] of ones is supported" + WAY_OUT
        )
    if mask.dim() != 2:
        raise ValueError(
            f"attention_mask has {mask.dim()} dimensions: only a mask [B, N] of ones is supported by Lighthouse"
            + WAY_OUT
        )
    if shape is not None and tuple(mask.shape) != shape:
        raise ValueError(f"attention_mask is {list(mask.shape)}, the batch {list(shape)}: they must be equal")
    _require(
        ((mask == 0) | (mask == 1)).all(),
        "attention_mask has values other than 0 and 1, as masks that number packed documents have: Lighthouse supports "
        "none yet, only one document per sequence (labels in its place are given by name: labels=...)" + WAY_OUT,
    )
    _require(
        (mask != 0).all(),
        "attention_mask hides tokens: Lighthouse supports no padding yet, only full sequences" + WAY_OUT,
    )


def check_positions(positions, tokens: int | None = None, name: str = "position_ids") -> None:
    """Positions `[.., N]` that count up by one: a restart is the start of another document."""
    if positions is None:
        return
    if tokens is not None and positions.shape[-1] != tokens:
        raise ValueError(f"{name} has {positions.shape[-1]} positions for {tokens} tokens: one for each is needed")
    if positions.shape[-1] < 2:
        return
    _require(
        (positions[..., 1:] - positions[..., :-1] == 1).all(),
        f"{name} restart or jump: Lighthouse supports no packed documents yet, only one per sequence" + WAY_OUT,
    )


def _require(condition: torch.Tensor, message: str) -> None:
    if torch.compiler.is_compiling():
        torch._assert_async(condition, message)
    elif not bool(condition):
        raise ValueError(message)
