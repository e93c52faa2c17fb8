"""The choice by itself: which entries of the pyramid a sequence keeps (METHOD 2 to 4)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from lighthouse.inputs import check_cover_start, check_qk, check_scores
from lighthouse.operators import choose
from lighthouse.plan import sub_length
from lighthouse.settings import POOL_RATIOS, SELECT_TOPK, check_pool_ratios, check_select_topk


@dataclass(frozen=True, eq=False)
class Selection:
    """The entries chosen, one choice per batch row and key-value head.

    Attributes:
        mask: `[B, Hkv, N]` uint8; bit l of a token says that the entry of level l whose window ends there is chosen.
        prefix: `[B, Hkv, N]` int32; the place in the sub-sequence of the first such entry.
        length: S, the same for every row and head.
        windows: tokens per entry of each level, finest first.
    """

    mask: Tensor
    prefix: Tensor
    length: int
    windows: tuple[int, ...]

    def entries(self, batch: int, head: int) -> list[tuple[int, int]]:
        """The chosen (level, index) pairs of one row and key-value head, in causal order, S of them."""
        mask = self.mask[batch, head].tolist()
        return [
            (level, token // window)
            for token, bits in enumerate(mask)
            if bits
            for level, window in enumerate(self.windows)
            if bits >> level & 1
        ]


def select(
    query: Tensor,
    key: Tensor,
    *,
    pool_ratios: Sequence[float] = POOL_RATIOS,
    select_topk: int | float = SELECT_TOPK,
    scores: tuple[Tensor, Tensor] | None = None,
    cover_start: bool = True,
) -> Selection:
    """The choice that `lighthouse.attention` makes for these inputs (METHOD 2 to 4).

    Args:
        query: `[B, Hq, N, D]`.
        key: `[B, Hkv, N, D]`, Hkv dividing Hq.
        pool_ratios, select_topk, scores, cover_start: as in `lighthouse.attention`.

    Raises:
        ValueError, TypeError: naming the argument, the rule and the value.
    """
    windows, topk = check_pool_ratios(pool_ratios), check_select_topk(select_topk)
    query, key = check_qk(query, key)
    check_cover_start(cover_start)
    mask, prefix = choose(query, key, windows, topk, check_scores(scores, key), cover_start)
    return Selection(mask, prefix, sub_length(key.shape[2], windows, topk), windows)
