"""Which tokens attend to one another, described once a forward and passed on whole (METHOD 3 and 7a)."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import NamedTuple

from lighthouse.core.method import Method


class SubSequences(NamedTuple):
    """The layout of short sequences in an inner attention's input: `count` rows of `length` entries, each causal."""

    count: int  # type: ignore[assignment]  # a tuple has a method of this name
    length: int


@dataclass(frozen=True)
class Sequences:
    """`rows` sequences of `tokens` tokens, a row of the batch each, and how they are pooled and chosen from.

    Code that handles sequences asks here for their number and lengths. `tokens` may be symbolic.
    """

    method: Method
    rows: int
    tokens: int
    length: int = field(init=False)  # S: the entries of a row's sub-sequence

    def __post_init__(self) -> None:
        object.__setattr__(self, "length", self.method.length(self.tokens))

    @property
    def sub(self) -> SubSequences:
        """The sub-sequences, as passed to an inner attention."""
        return SubSequences(self.rows, self.length)

    @property
    def whole(self) -> SubSequences:
        """The sequences themselves, in the same form."""
        return SubSequences(self.rows, self.tokens)
