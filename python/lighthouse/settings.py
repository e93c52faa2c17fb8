"""The two settings of the method, checked: what a user writes becomes what the operators take (METHOD 1 and 3).

A message is put together where it is raised: under `torch.compile(dynamic=True)` the numbers are symbolic, and to write
one down breaks the graph.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from fractions import Fraction
from numbers import Integral, Real

POOL_RATIOS = (1 / 4, 1 / 16)
SELECT_TOPK = 1 / 64

MAX_LEVELS = 8  # a level is one bit of a token's mask byte
MAX_DENOMINATOR = 65_536
MAX_PARENTS = 2**40
MAX_WINDOW = 2**40
RATIO_TOLERANCE = 1e-3


def check_pool_ratios(pool_ratios: Sequence[float]) -> tuple[int, ...]:
    """The windows in tokens, finest first, that the ratios stand for: `[0.5, 0.25]` is `(1, 2, 4)`.

    Raises ValueError naming the ratio and the rule: one over a whole number (within 1e-3), each smaller than the one
    before and dividing it, at most seven.
    """
    if isinstance(pool_ratios, (str, bytes)) or not isinstance(pool_ratios, Sequence):
        raise TypeError(f"pool_ratios={pool_ratios!r}: a sequence of ratios is needed, for example (1/4, 1/16)")
    if len(pool_ratios) >= MAX_LEVELS:
        raise ValueError(f"pool_ratios has {len(pool_ratios)} ratios: at most {MAX_LEVELS - 1}")
    windows = [1]
    for i, ratio in enumerate(pool_ratios):
        if isinstance(ratio, bool) or not isinstance(ratio, Real):
            raise TypeError(f"pool_ratios[{i}]={ratio!r}: a number is needed")
        if not 0 < ratio < 1:  # NaN is not, either
            raise ValueError(f"pool_ratios[{i}]={ratio!r}: a ratio must be above 0 and below 1")
        if ratio < 1 / MAX_WINDOW:
            raise ValueError(f"pool_ratios[{i}]={ratio!r}: at least 2^-40 is needed")
        numerator, denominator = float(ratio).as_integer_ratio()  # where the ratio is symbolic, constants from here on
        inverse = denominator / numerator
        window = max(2, round(inverse))
        if abs(inverse - window) > RATIO_TOLERANCE * window:
            below = max(2, math.floor(inverse))
            nearest = f"1/{below}, 1/{below + 1}" if below < inverse else f"1/{below}"
            raise ValueError(
                f"pool_ratios[{i}]={ratio!r}: one over a whole number of tokens is needed; nearest: {nearest}"
            )
        finer = windows[-1]
        if window <= finer:
            raise ValueError(f"pool_ratios[{i}]={ratio!r}: ratios must decrease, and the one before is 1/{finer}")
        if window % finer:
            raise ValueError(
                f"pool_ratios[{i}]={ratio!r}: a window of {window} tokens is not a multiple of the one before, {finer};"
                f" nearest: 1/{window // finer * finer}, 1/{(window // finer + 1) * finer}"
            )
        windows.append(window)
    return tuple(windows)


def check_select_topk(select_topk: int | float) -> tuple[int, int]:
    """Parents per level as (numerator, denominator): a share of the tokens, or the number itself over 0.

    A float is a share, above 0 and at most 1, taken as the nearest fraction with a denominator of at most 65,536; an
    int is the number. Raises ValueError or TypeError.
    """
    if isinstance(select_topk, bool) or not isinstance(select_topk, Real):
        raise TypeError(
            f"select_topk={select_topk!r}: a whole number of parents, or a share of the tokens as a float, is needed"
        )
    if isinstance(select_topk, Integral):
        if not 1 <= select_topk <= MAX_PARENTS:
            raise ValueError(f"select_topk={select_topk!r}: at least one parent per level is needed, and at most 2^40")
        return int(select_topk), 0
    share = float(select_topk)
    if not 0 < share <= 1:
        hint = f"; for a number of parents write {int(share)}" if share > 1 and share.is_integer() else ""
        raise ValueError(f"select_topk={select_topk!r}: a share of the tokens must be above 0 and at most 1{hint}")
    fraction = Fraction(share).limit_denominator(MAX_DENOMINATOR)
    if fraction == 0:
        return 1, 0  # less than one parent for any length: one is the least there is
    return fraction.numerator, fraction.denominator
