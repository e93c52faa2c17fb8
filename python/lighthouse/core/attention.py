"""The functional call: Lighthouse attention on tensors (METHOD 1 to 7)."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from functools import partial

import torch
from torch import Tensor

from lighthouse.core import flops, fused  # noqa: F401  # flops: what torch's counter counts
from lighthouse.core.documents import attend_by_document, lengths_of
from lighthouse.core.inner import InnerAttention, causal_sdpa, stock_kernel
from lighthouse.core.inputs import (
    check_inner_output,
    check_not_sharded,
    check_options,
    check_qkv,
    check_scores,
    say_if_local_window_covers_all,
)
from lighthouse.core.local import Local, tokens_first
from lighthouse.core.method import POOL_RATIOS, SELECT_TOPK, Method, method_of
from lighthouse.core.operators import choose, gather, local_attention, scatter
from lighthouse.core.sequences import Sequences

logger = logging.getLogger("lighthouse")


def sub_sequence_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    method: Method,
    *,
    scale: float | None = None,
    scores: tuple[Tensor, Tensor] | None = None,
    dropout_p: float = 0.0,
    inner: InnerAttention | None = None,
    cu_seqlens: Tensor | Sequence[int] | None = None,
) -> Tensor:
    """`attention` by a method whose settings were checked."""
    query, key, value = check_qkv(query, key, value)
    scores = check_scores(scores, key)
    check_options(scale, dropout_p, inner, method.local_window)
    check_not_sharded()
    if cu_seqlens is not None:
        sequences = Sequences.of_documents(method, lengths_of(cu_seqlens, query))
        return _of_documents(query, key, value, sequences, scale, scores, dropout_p, inner)
    say_if_local_window_covers_all(method.local_window, query.shape[2])

    sequences = Sequences(method, query.shape[0], query.shape[2])
    attend = partial(inner or causal_sdpa, scale=scale, dropout_p=dropout_p)
    window, added = method.local_window, None
    if inner is None:
        local = Local.of(query, window, scale, dropout_p)
        if not method.chooses:
            return local_attention(query, key, value, local)
        output = fused.attend(query, key, value, sequences, scores, stock_kernel(query, key, dropout_p), local)
        if output is not None:
            return output
        added = local_attention(query, key, value, local) if window else None
    elif window:
        added = check_inner_output(attend(query, key, value, layout=sequences.whole, window=window), query)
        if not method.chooses:
            return tokens_first(added)

    selection = choose(query, key, sequences, scores)
    subs = gather(query, key, value, selection)
    output_sub = attend(*subs, layout=sequences.sub)
    return scatter(check_inner_output(output_sub, subs[0]), selection, added)


def _of_documents(query, key, value, sequences: Sequences, scale, scores, dropout_p, inner) -> Tensor:
    """The same of documents in one row."""
    if query.is_cuda:
        _say_that_lengths_are_calls()
        return _by_rows(query, key, value, sequences, scale=scale, scores=scores, dropout_p=dropout_p, inner=inner)
    attend = partial(inner or causal_sdpa, scale=scale, dropout_p=dropout_p)

    def checked(*inputs, **options):
        return check_inner_output(attend(*inputs, **options), inputs[0])

    method, added = sequences.method, None
    if inner is None and method.chooses:
        local = Local.of(query, method.local_window, scale, dropout_p)
        output = fused.attend(query, key, value, sequences, scores, stock_kernel(query, key, dropout_p), local)
        if output is not None:
            return output
    if method.local_window:
        within = partial(checked, window=method.local_window)
        added = tokens_first(attend_by_document(within, query, key, value, stretches=sequences.of_tokens))
        if not method.chooses:
            return added
    selection = choose(query, key, sequences, scores)
    subs = gather(query, key, value, selection)
    return scatter(attend_by_document(checked, *subs, stretches=sequences.of_entries), selection, added)


def _by_rows(query, key, value, sequences: Sequences, *, scores, **options) -> Tensor:
    """The same where the kernels take no documents: those of one length are the rows of a batch, each length a call."""
    lengths = (end - first for first, end in sequences.of_tokens)
    parents = dict(zip(lengths, sequences.parents, strict=True))  # of one row: by length

    def attend(query, key, value, *own_scores, layout):
        own = sequences.method.with_parents(parents[layout.length])
        return sub_sequence_attention(query, key, value, own, scores=own_scores or None, **options)

    return attend_by_document(attend, query, key, value, *(scores or ()), stretches=sequences.of_tokens)


@torch.compiler.assume_constant_result
def _say_that_lengths_are_calls() -> None:
    """Once, while tracing too."""
    if not _said:
        _said.append(True)
        logger.warning(
            "Lighthouse: on a GPU documents of one length are attended to together, and each length is a call of its "
            "own, which is slower for many lengths than one call for all (logged once)"
        )


_said: list[bool] = []


def attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    pool_ratios: Sequence[float] = POOL_RATIOS,
    select_topk: int | float = SELECT_TOPK,
    scale: float | None = None,
    scores: tuple[Tensor, Tensor] | None = None,
    dropout_p: float = 0.0,
    inner: InnerAttention | None = None,
    cover_start: bool = True,
    local_window: int = 0,
    cu_seqlens: Tensor | Sequence[int] | None = None,
) -> Tensor:
    """Lighthouse attention: causal attention of a chosen sub-sequence, written back to all tokens (METHOD).

    For training on whole sequences; it never falls back to dense attention by itself. Differentiable to query, key
    and value; which entries are chosen has no gradient. Between forward and backward only tensors of the
    sub-sequence's length and five bytes per token and key-value head are kept; with a local window also query, key and
    value.

    Args:
        query: `[B, Hq, N, D]`, any N, any strides with a unit last one; already rotated.
        key, value: `[B, Hkv, N, D]`, Hkv dividing Hq. One choice is made per key-value head.
        pool_ratios: entries per token of the levels above the tokens; windows are 1 over these. `()` is dense.
        select_topk: parents per level; an int is a number, a float a share of the tokens. 0: only the local window.
        scale: of the logits, a number above 0; None is 1/sqrt(D).
        scores: the caller's own scores instead of the norms: for queries and for keys, each `[B, Hkv, N]` float32. They
            get no gradient.
        dropout_p: passed on to the inner attention, and of the local window's weights.
        inner: the attention of the sub-sequence, `inner(query, key, value, *, scale, dropout_p, layout)`, whose output
            is like its query and has a gradient; PyTorch's `scaled_dot_product_attention` by default. With a local
            window it is called for that too, on query, key and value, with `window=local_window`: each row then sees
            that many, itself among them.
        cover_start: give the first tokens an output whatever their scores.
        local_window: exact causal attention to the last so many tokens, each token itself among them, is added to the
            output (METHOD 5a); 0 is the published method. PyTorch's kernels compute it.
        cu_seqlens: boundaries of documents that lie one behind the other in one row (a batch of 1): 0, where each but
            the first begins, and N; a list, a tuple, or an int32 or int64 tensor. Each document is attended to by
            itself, with the bits that it has alone (METHOD 7a). Equal boundaries are documents of no tokens. On a GPU
            each length is a call of its own so far.

    Returns:
        `[B, Hq, N, D]`; its `.transpose(1, 2)` is contiguous.

    Raises:
        ValueError, TypeError: before any work, naming the argument, the rule and the value; ValueError also inside of
            torch's `context_parallel`.
        NotImplementedError: under `torch.func.grad`, `vjp`, `jvp` and forward-mode derivatives, which would be wrong.
    """
    return sub_sequence_attention(
        query,
        key,
        value,
        method_of(pool_ratios, select_topk, cover_start, local_window),
        scale=scale,
        scores=scores,
        dropout_p=dropout_p,
        inner=inner,
        cu_seqlens=cu_seqlens,
    )
