"""The functional call: Lighthouse attention on tensors (METHOD 1 to 7)."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from lighthouse.core.inner import InnerAttention, causal_sdpa
from lighthouse.core.inputs import check_inner_output, check_not_sharded, check_options, check_qkv, check_scores
from lighthouse.core.method import POOL_RATIOS, SELECT_TOPK, Method
from lighthouse.core.operators import choose, gather, scatter
from lighthouse.core.sequences import Sequences


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
) -> Tensor:
    """`attention` by a method whose settings were checked."""
    query, key, value = check_qkv(query, key, value)
    scores = check_scores(scores, key)
    check_options(scale, dropout_p, inner)
    check_not_sharded()

    sequences = Sequences(method, query.shape[0], query.shape[2])
    selection = choose(query, key, sequences, scores)
    query_sub, key_sub, value_sub = gather(query, key, value, selection)
    output_sub = (inner or causal_sdpa)(
        query_sub, key_sub, value_sub, scale=scale, dropout_p=dropout_p, layout=sequences.sub
    )
    return scatter(check_inner_output(output_sub, query_sub), selection)


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
) -> Tensor:
    """Lighthouse attention: causal attention of a chosen sub-sequence, written back to all tokens (METHOD).

    For training on whole sequences; it never falls back to dense attention by itself. Differentiable to query, key
    and value; which entries are chosen has no gradient. Between forward and backward only tensors of the
    sub-sequence's length and five bytes per token and key-value head are kept.

    Args:
        query: `[B, Hq, N, D]`, any N, any strides with a unit last one; already rotated.
        key, value: `[B, Hkv, N, D]`, Hkv dividing Hq. One choice is made per key-value head.
        pool_ratios: entries per token of the levels above the tokens; windows are 1 over these. `()` is dense.
        select_topk: parents per level; an int is a number, a float a share of the tokens.
        scale: of the logits, a number above 0; None is 1/sqrt(D).
        scores: the caller's own scores instead of the norms: for queries and for keys, each `[B, Hkv, N]` float32. They
            get no gradient.
        dropout_p: passed on to the inner attention.
        inner: the attention of the sub-sequence, `inner(query, key, value, *, scale, dropout_p, layout)`, whose output
            is like its query and has a gradient; PyTorch's `scaled_dot_product_attention` by default.
        cover_start: give the first tokens an output whatever their scores.

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
        Method(pool_ratios, select_topk, cover_start),
        scale=scale,
        scores=scores,
        dropout_p=dropout_p,
        inner=inner,
    )
