"""Activation checkpointing that keeps the choice.

A layer that runs again in the backward must not choose again: it would cost time, and if the second run rounds
differently (compiled code may fuse differently) it would choose differently and give gradients of another function.
Instead 13 bytes per token and key-value head are kept.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from torch._ops import OpOverload
from torch.utils.checkpoint import CheckpointPolicy, create_selective_checkpoint_contexts

from lighthouse.core.operators import CHOICE


def checkpoint_contexts(policy_fn_or_list: Callable | Sequence[OpOverload] = ()):
    """The `context_fn` of `torch.utils.checkpoint.checkpoint` for a region with Lighthouse attention.

        checkpoint(layer, x, use_reentrant=False, context_fn=lighthouse.checkpoint_contexts)

    All else is recomputed, as in full checkpointing. For selective checkpointing, also under `torch.compile`:

        context_fn = functools.partial(lighthouse.checkpoint_contexts, [torch.ops.aten.mm.default])

    Args:
        policy_fn_or_list: what to save besides the choice, in the forms that
            `torch.utils.checkpoint.create_selective_checkpoint_contexts` takes.

    Returns:
        Two context managers: for the forward, for the recomputation.
    """
    if not callable(policy_fn_or_list):
        return create_selective_checkpoint_contexts([*CHOICE, *policy_fn_or_list])

    def policy(context, operator, *args, **kwargs):
        if operator in CHOICE:
            return CheckpointPolicy.MUST_SAVE
        return policy_fn_or_list(context, operator, *args, **kwargs)

    return create_selective_checkpoint_contexts(policy)
