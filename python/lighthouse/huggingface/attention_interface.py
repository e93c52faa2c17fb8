"""The attention under its name in Transformers: "lighthouse".

A wrapped model's configuration names it while Lighthouse acts. What it does in a layer follows from the
state of the layer's model (`state.py`); a dense layer has a configuration of its own that names a dense attention, and
never gets here.
The wrapped model has already refused what cannot be honoured. A direct call of a part of it bypasses that check, so
both functions here check again what they can see.
"""

from __future__ import annotations

import torch
from torch._guards import detect_fake_mode
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.masking_utils import causal_mask_function

from lighthouse.core.attention import sub_sequence_attention
from lighthouse.huggingface.checks import check_keywords, check_mask

NAME = "lighthouse"

DEFAULT = "sdpa"  # Transformers' own default

# Attentions of Transformers that are causal without a mask; dense layers of a wrapped model get none.
CAUSAL_WITHOUT_MASK = ("sdpa", "flash_attention_2", "flash_attention_3", "flash_attention_4")


def lighthouse_attention(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    *,
    scaling: float | None = None,
    dropout: float = 0.0,
    **kwargs,
) -> tuple[torch.Tensor, None]:
    """Lighthouse attention as Transformers calls it.

    query `[B, Hq, N, D]`, key and value `[B, Hkv, N, D]`; the result is `[B, N, Hq, D]`, contiguous, and no weights.
    Raises `ValueError` for a mask, a key-value cache, or a module of a model that is not wrapped.
    """
    seat = getattr(module, "lighthouse_seat", None)
    if seat is None:
        raise ValueError(
            f'attention "{NAME}" in a {type(module).__name__} that is not part of a wrapped model. A model made from a '
            "wrapped model's configuration has this name too: wrap it, or make it with "
            f'AutoModelForCausalLM.from_config(copy.deepcopy(config), attn_implementation="{DEFAULT}"); to train with '
            "Lighthouse use LighthouseWrapper(model, ...), not the name"
        )
    state = seat.state
    if state is not None and not torch.compiler.is_compiling() and not state.is_running():
        raise ValueError(
            f"this {type(module).__name__} is part of a wrapped model and was called directly, where length, mask and "
            "stage are not checked: call the model itself, without a forward that another library sets on it (as TRL "
            "does), or switch Lighthouse off first (model.lighthouse(False), or model.eval() of the whole model)"
        )
    if state is None:
        raise ValueError(
            f"this {type(module).__name__} is a copy of a wrapped model's layer and is in no wrapped model: insert it "
            "into one, or copy the layer after unwrap()"
        )
    if state.with_gradients and not torch.is_grad_enabled():
        raise ValueError(
            "a layer runs without gradients in a training forward, as reentrant activation checkpointing does: its "
            "backward could run a different attention from the forward; use use_reentrant=False, with "
            "checkpoint_wrapper CheckpointImpl.NO_REENTRANT (and freeze layers by requires_grad_(False))"
        )
    settings = state.settings
    if attention_mask is not None:
        raise ValueError("attention_mask reached a Lighthouse layer: masks are not supported")
    if key.shape[2] != query.shape[2]:
        raise ValueError(
            f"{query.shape[2]} queries and {key.shape[2]} keys: Lighthouse trains on whole sequences, without a "
            "key-value cache"
        )
    check_keywords(kwargs)
    out = sub_sequence_attention(
        query,
        key,
        value,
        settings.method,
        scale=scaling,
        dropout_p=dropout,
        inner=settings.inner,
    )
    return out.transpose(1, 2), None


def lighthouse_mask(
    *, attention_mask: torch.Tensor | None = None, mask_function=causal_mask_function, **kwargs
) -> None:
    """No mask, and an error where one would be needed. Called once per forward, before the layers."""
    check_mask(attention_mask)
    # While tracing Transformers composes this function for packed documents whether or not there are any.
    traced = torch.compiler.is_compiling() or detect_fake_mode() is not None
    if mask_function is not causal_mask_function and not traced:
        raise ValueError(
            "position_ids restart, or the attention is not plainly causal: Lighthouse supports neither yet"
        )


def dense_name(former: str) -> str:
    """The attention of dense layers while Lighthouse acts: the model's former one where that needs no mask."""
    return former if former in CAUSAL_WITHOUT_MASK else DEFAULT


AttentionInterface.register(NAME, lighthouse_attention)
AttentionMaskInterface.register(NAME, lighthouse_mask)
