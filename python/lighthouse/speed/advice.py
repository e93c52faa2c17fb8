"""Warnings about a plan, a sentence each, with the way out."""

from __future__ import annotations

import math
from dataclasses import replace
from fractions import Fraction

from lighthouse.core.method import Method
from lighthouse.core.plan import Plan
from lighthouse.core.settings import LONG, MAX_SHARE
from lighthouse.speed.estimates import estimate, pays_from
from lighthouse.speed.layer import Layer
from lighthouse.speed.rates import Rates

LEAST_KEPT = 0.03  # of `LONG` tokens or more
LONG_TAIL = 0.1  # of the tokens that are kept at level 0


def warnings(method: Method, tokens: int, *, layer: Layer | None = None, rates: Rates | None = None) -> list[str]:
    """Warnings about a plan, a sentence each, with the way out; about time only if rates are given."""
    found, plan = [], method.plan(tokens)
    if plan.local_window >= tokens:
        found.append(
            f"local_window={plan.local_window:,} covers all {tokens:,} tokens: its part of the sum is dense attention"
        )
    if not method.chooses:
        return found
    coarsest, window = plan.entries[-1], plan.windows[-1]
    if len(plan.windows) == 1:
        return ["pool_ratios is empty: this is dense attention; the default is 1/4 1/16"]
    if not coarsest:
        return [
            f"{tokens:,} tokens are fewer than the coarsest window has ({window:,}): this is dense attention; "
            f"use sequences of at least {window:,} tokens, or a coarsest ratio larger than 1/{window}"
        ]
    kept = plan.kept_share
    if tokens >= LONG and kept < LEAST_KEPT:
        needed = math.ceil(LEAST_KEPT * tokens / plan.windows[1])
        way = (
            f"select_topk={needed:,} keeps {LEAST_KEPT:.0%}"
            if needed <= coarsest
            else f"a coarsest ratio larger than 1/{window}, so that more parents can be chosen"
        )
        found.append(
            f"only {kept:.2%} of the tokens are kept, less than {LEAST_KEPT:.0%}: short runs with so few ended at a "
            f"worse loss; {way}"
        )
    if plan.parents > coarsest:
        share = Fraction(coarsest, tokens).limit_denominator(65_536)
        found.append(
            f"{plan.parents:,} parents per level were asked for, but the coarsest level has only {coarsest:,} "
            f"entries: all of them are parents, and fewer are chosen; use select_topk up to {coarsest:,} "
            f"({float(share):.4g} of the tokens), or a coarsest ratio larger than 1/{window}"
        )
    tail = tokens % window
    if tail >= LONG_TAIL * plan.chosen[0]:
        below = tokens - tail
        found.append(
            f"the last {tail:,} tokens, after the last whole window of {window:,}, are always kept: they are "
            f"{tail / plan.chosen[0]:.0%} of the tokens kept at level 0; use {below:,} or {below + window:,} tokens"
        )
    speedup = None if rates is None or layer is None else estimate(plan, layer, rates).speedup
    slow = speedup is not None and speedup <= 1.05
    if slow or plan.length > MAX_SHARE * tokens:
        what = f"S is {plan.length / tokens:.0%} of the tokens"
        what += f", estimated at {speedup:.2f} times dense" if speedup is not None else ""
        found.append(f"dense attention is as fast ({what}); {_faster(method, plan, layer, rates)}")
    return found


def _faster(method: Method, plan: Plan, layer: Layer | None, rates: Rates | None) -> str:
    """A select_topk that pays at this length, or the length from which these settings pay."""

    def pays(tried: Plan) -> bool:
        if tried.length > MAX_SHARE * tried.tokens:
            return False
        return rates is None or layer is None or estimate(tried, layer, rates).speedup > 1.05

    parents = min(plan.parents, plan.entries[-1]) // 2
    while parents >= 1:
        if pays(replace(method, select_topk=parents).plan(plan.tokens)):
            return f"select_topk={parents:,} would be faster"
        parents //= 2
    if rates is not None and layer is not None:
        pays_at = pays_from(layer, rates, method)
        if pays_at is not None:
            return f"these settings pay from about {pays_at:,} tokens on"
    return "use longer sequences, or coarser ratios"
