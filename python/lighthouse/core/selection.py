"""The choice by itself: which entries of the pyramid a sequence keeps (METHOD 2 to 4)."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from lighthouse.core.documents import lengths_of
from lighthouse.core.inputs import check_qk, check_scores
from lighthouse.core.method import POOL_RATIOS, SELECT_TOPK, Method
from lighthouse.core.operators import Selection, choose
from lighthouse.core.sequences import Sequences


def select(
    query: Tensor,
    key: Tensor,
    *,
    pool_ratios: Sequence[float] = POOL_RATIOS,
    select_topk: int | float = SELECT_TOPK,
    scores: tuple[Tensor, Tensor] | None = None,
    cover_start: bool = True,
    cu_seqlens: Tensor | Sequence[int] | None = None,
) -> Selection:
    """The choice that `lighthouse.attention` makes for these inputs (METHOD 2 to 4).

    Args:
        query: `[B, Hq, N, D]`.
        key: `[B, Hkv, N, D]`, Hkv dividing Hq.
        pool_ratios, select_topk, scores, cover_start, cu_seqlens: as in `lighthouse.attention`. On a CPU alone with
            `cu_seqlens`, so far.

    Raises:
        ValueError, TypeError: naming the argument, the rule and the value.
    """
    method = Method(pool_ratios, select_topk, cover_start)
    query, key = check_qk(query, key)
    sequences = Sequences(method, key.shape[0], key.shape[2])
    if cu_seqlens is not None:
        sequences = Sequences.of_documents(method, lengths_of(cu_seqlens, query))
    return choose(query, key, sequences, check_scores(scores, key))
