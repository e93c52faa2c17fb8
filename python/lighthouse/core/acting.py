"""Whether Lighthouse can act on a length at all, and the nearest settings with which it does.

It cannot where the sub-sequence would be longer than the sequence (a wrapped model then runs dense), nor where it is
the sequence itself: with one level, or fewer tokens than the coarsest window (METHOD 8).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

from lighthouse.core.method import Method

LONGEST = 2**30  # the longest length, in tokens, tried to find one on which the settings act


def acts(tokens: int, method: Method) -> bool:
    """Whether the sub-sequence of `tokens` is a choice, and not longer than they are."""
    if not method.chooses:
        return method.local_window < tokens
    return len(method.windows) > 1 and tokens >= method.windows[-1] and method.length(tokens) <= tokens


def why_it_cannot_act(tokens: int, method: Method) -> str | None:
    """The rule that keeps Lighthouse from acting on this many tokens, with the numbers and the way out; or None."""
    if acts(tokens, method):
        return None
    windows = method.windows
    if not method.chooses:
        return (
            f"local_window={method.local_window} covers all {tokens:,} tokens, and select_topk=0 chooses nothing, so "
            "all attention is dense: use a shorter local window or more tokens"
        )
    if len(windows) == 1:
        return "without pool_ratios the sub-sequence is the whole sequence, which is dense attention: give ratios"
    if tokens < windows[-1]:
        return (
            f"{tokens:,} tokens are fewer than the coarsest window of {windows[-1]:,}, so all attention is dense: "
            f"use at least {windows[-1]:,} tokens, or pool_ratios with shorter windows"
        )
    length = method.length(tokens)
    parents = _last(method.parents(tokens), lambda k: acts(tokens, replace(method, select_topk=k)))
    longer = _first(tokens, windows[-1], lambda n: acts(n, method))
    ways = [f"the largest select_topk with which it acts here is {parents:,}"] if parents else []
    ways += [f"the shortest length on which it acts with this one is {longer:,} tokens"] if longer else []
    return (
        f"select_topk={method.select_topk} gives a sub-sequence of {length:,} entries for {tokens:,} tokens "
        f"({length / tokens:.0%}); if it is longer than the sequence, Lighthouse never acts and all attention is "
        f"dense; {'; '.join(ways) or 'use other pool_ratios'}"
    )


def _last(number: int, good: Callable[[int], bool]) -> int:
    """The largest good number up to `number`, or 0. If a number is good, all smaller ones are."""
    low, high = 0, number
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if good(middle) else (low, middle - 1)
    return low


def _first(tokens: int, window: int, good: Callable[[int], bool]) -> int:
    """The shortest good length above `tokens`, a multiple of `window`; 0 if there is none up to `LONGEST`."""
    low = high = tokens // window
    while not good(high * window):
        low, high = high, 2 * high
        if high * window > LONGEST:
            return 0
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if good(middle * window) else (middle, high)
    return high * window
