"""What follows from lengths and settings alone: windows, strata, the sub-sequence's length (METHOD 3).

The C++ rules have the same formulas, but cannot compute with the symbolic lengths that `torch.compile` traces; a test
compares the two.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch

PARENTS_PER_STRATUM = 128


class StratumKind(NamedTuple):
    """`count` strata that hold `entries` of the coarsest level and choose `budget` parents per level, each."""

    count: int  # type: ignore[assignment]  # a tuple has a method of this name
    entries: int
    budget: int


# Of lengths that may be symbolic. Dynamo traces the plain functions; where a SymInt itself is at hand, they would
# compare it and so specialise.
def _larger(a, b):
    return torch.sym_max(a, b) if isinstance(a, torch.SymInt) or isinstance(b, torch.SymInt) else max(a, b)


def _smaller(a, b):
    return torch.sym_min(a, b) if isinstance(a, torch.SymInt) or isinstance(b, torch.SymInt) else min(a, b)


def parents_per_level(tokens, topk: tuple[int, int]):
    """k of a sequence of `tokens`, which may be symbolic."""
    numerator, denominator = topk
    return numerator if denominator == 0 else _larger(1, tokens * numerator // denominator)


def stratum_kinds(tokens, windows: Sequence[int], topk: tuple[int, int]) -> list[StratumKind]:
    """The kinds of strata in order; one of the middle two is always empty. `tokens` may be symbolic."""
    entries, parents = tokens // windows[-1], parents_per_level(tokens, topk)
    count = _larger(1, (parents + PARENTS_PER_STRATUM - 1) // PARENTS_PER_STRATUM)
    more_entries, more_budget = entries % count, parents % count  # this many strata have one more
    return [
        StratumKind(_smaller(more_entries, more_budget), entries // count + 1, parents // count + 1),
        StratumKind(_larger(more_entries - more_budget, 0), entries // count + 1, parents // count),
        StratumKind(_larger(more_budget - more_entries, 0), entries // count, parents // count + 1),
        StratumKind(count - _larger(more_entries, more_budget), entries // count, parents // count),
    ]


def _fits(parents, entries, windows: Sequence[int], topk: tuple[int, int]):
    """parents <= entries. For most shares this holds for every length with an entry, and then only that is checked: for
    a symbolic length known to be long enough PyTorch sees it, and `torch.export` needs no condition."""
    numerator, denominator = topk
    always = numerator * windows[-1] <= denominator
    return entries >= 1 if always else parents <= entries


def chosen_per_level(tokens, windows: Sequence[int], topk: tuple[int, int]) -> list:
    """How many entries of each level are in the sub-sequence, finest first. `tokens` may be symbolic."""
    if topk[0] == 0:
        return [0] * len(windows)  # the local window alone
    entries, parents = tokens // windows[-1], parents_per_level(tokens, topk)
    ratios = [coarser // finer for finer, coarser in zip(windows, windows[1:], strict=False)]
    if _fits(parents, entries, windows, topk):
        # No stratum has fewer entries than its budget, so strata do not matter. Tracing a symbolic length depends on
        # this: the sum over strata takes minutes to simplify.
        chosen = [parents * ratio for ratio in ratios] + [entries]
    else:
        chosen = [0] * len(windows)
        for kind in stratum_kinds(tokens, windows, topk):
            in_stratum = kind.entries
            chosen[-1] = chosen[-1] + kind.count * in_stratum
            for level in range(len(ratios) - 1, -1, -1):
                in_stratum = _smaller(kind.budget, in_stratum) * ratios[level]
                chosen[level] = chosen[level] + kind.count * in_stratum
    chosen[0] = chosen[0] + tokens % windows[-1]  # the tail
    return chosen


def sub_length(tokens, windows: Sequence[int], topk: tuple[int, int]):
    """S, the length of the sub-sequence. `tokens` may be symbolic."""
    return sum(chosen_per_level(tokens, windows, topk))


@dataclass(frozen=True)
class Plan:
    """What Lighthouse does with a sequence of `tokens` tokens, from its length alone. Can be printed.

    Attributes:
        windows: tokens per entry of each level, finest first.
        parents: k, the entries of each level above 0 whose children are kept.
        strata: kinds of strata, as (count, coarsest entries each, parents per level each).
        entries: entries that each level has.
        chosen: of those, how many are in the sub-sequence.
        local_window: the tokens before each, itself among them, that it attends to exactly; 0: none.
    """

    tokens: int
    windows: tuple[int, ...]
    parents: int
    strata: tuple[StratumKind, ...]
    entries: tuple[int, ...]
    chosen: tuple[int, ...]
    local_window: int = 0

    @property
    def length(self) -> int:
        """S, the entries that attend to one another."""
        return sum(self.chosen)

    @property
    def kept_share(self) -> float:
        """The share of the tokens that are kept at level 0."""
        return self.chosen[0] / self.tokens

    @property
    def attention_work(self) -> float:
        """Query-key pairs of the inner attention and of the local window as a part of dense attention's."""
        pairs = self.length * (self.length + 1) // 2 + local_pairs(self.tokens, self.local_window)
        return pairs / (self.tokens * (self.tokens + 1) // 2)

    def __str__(self) -> str:
        rows = [("level", "window", "entries", "chosen")]
        rows += [
            (f"{level}", f"{self.windows[level]:,}", f"{self.entries[level]:,}", f"{self.chosen[level]:,}")
            for level in range(len(self.windows))
        ]
        table = "\n".join("  " + "".join(f"{cell:>12}" for cell in row) for row in rows)
        strata = ", ".join(f"{k.count:,} of {k.entries:,} entries and {k.budget:,} parents" for k in self.strata)
        times = 1 / self.attention_work
        if not self.parents:
            return (
                f"Lighthouse plan for {self.tokens:,} tokens: nothing is chosen, a local window of "
                f"{self.local_window:,} tokens alone\n"
                f"  attention work {self.attention_work:.2%} of dense: {times:,.1f} times less"
            )
        local = f"  local window of {self.local_window:,} tokens, exact\n" if self.local_window else ""
        return (
            f"Lighthouse plan for {self.tokens:,} tokens, {self.parents:,} parents per level\n{table}\n"
            f"  strata (coarsest level): {strata}\n"
            f"  sub-sequence S = {self.length:,} ({self.length / self.tokens:.1%} of the tokens); "
            f"kept share {self.kept_share:.1%}\n"
            f"{local}  attention work {self.attention_work:.2%} of dense: {times:,.1f} times less"
        )


def local_pairs(tokens: int, local_window: int) -> int:
    """Query-key pairs within the local window."""
    window = min(tokens, local_window)
    return tokens * window - window * (window - 1) // 2


def plan_of(tokens: int, windows: tuple[int, ...], topk: tuple[int, int], local_window: int = 0) -> Plan:
    """`lighthouse.plan` for settings that `Method` has checked."""
    return Plan(
        tokens=tokens,
        windows=windows,
        parents=parents_per_level(tokens, topk),
        strata=tuple(kind for kind in stratum_kinds(tokens, windows, topk) if kind.count and topk[0]),
        entries=tuple(tokens // window for window in windows),
        chosen=tuple(chosen_per_level(tokens, windows, topk)),
        local_window=local_window,
    )
