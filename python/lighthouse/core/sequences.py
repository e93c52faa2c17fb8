"""Which tokens attend to one another, described once a forward and passed on whole (METHOD 3 and 7a)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor

from lighthouse.core.method import Method

Stretches = tuple[tuple[int, int], ...]  # (first, end) of each


class SubSequences(NamedTuple):
    """The layout of short sequences in an inner attention's input: `count` rows of `length` entries, each causal."""

    count: int  # type: ignore[assignment]  # a tuple has a method of this name
    length: int


@dataclass(frozen=True)
class Sequences:
    """`rows` sequences of `tokens` tokens, a row of the batch each, and how they are pooled and chosen from.

    Code that handles sequences asks here for their number and lengths. `tokens` may be symbolic. Documents of their own
    lengths lie in one row (`of_documents`): then there is a table of them.
    """

    method: Method
    rows: int
    tokens: int
    length: int = field(init=False)  # S: the entries of a row's sub-sequence
    table: Tensor | None = None  # of documents, as the operators take it; on the CPU
    of_tokens: Stretches = ()  # a document each; padding is in none
    of_entries: Stretches = ()
    parents: tuple[int, ...] = ()  # k of each document

    def __post_init__(self) -> None:
        length = self.method.length(self.tokens) if self.table is None else self.of_entries[-1][1]
        object.__setattr__(self, "length", length)

    @classmethod
    def of_documents(
        cls,
        method: Method,
        lengths: Sequence[int],
        *,
        rows: Sequence[int] | None = None,
        padding: Sequence[bool] | None = None,
    ) -> Sequences:
        """Documents of `lengths` tokens one behind the other in one row, or padding where `padding` says so.

        `rows`: of the rows that each came in, the number; a whole number of parents is shared out within each.
        Documents of no tokens are left out. Raises ValueError if no document is left.
        """
        count = len(lengths)
        kinds = zip(lengths, rows or [0] * count, padding or [False] * count, strict=True)
        made = torch.tensor([each for each in kinds if each[0]], dtype=torch.int64).reshape(-1, 3)
        if not (made[:, 2] == 0).any():
            raise ValueError("no document has a token: at least one is needed")
        table = torch.ops.lighthouse.documents(made, method.windows, *method.topk)
        # As `Sequence` in C++ begins: row, first token, tokens, first entry, entries, parents.
        numbers = table[1:, 1:6].tolist()
        text = [of for of, is_padding in zip(numbers, made[:, 2].tolist(), strict=True) if not is_padding]
        return cls(
            method,
            1,
            int(made[:, 0].sum()),
            table,
            tuple((token, token + tokens) for token, tokens, *_ in text),
            tuple((entry, entry + entries) for _, _, entry, entries, _ in text),
            tuple(parents for *_, parents in text),
        )

    @property
    def sub(self) -> SubSequences:
        """The sub-sequences, as passed to an inner attention."""
        return SubSequences(self.rows, self.length)

    @property
    def whole(self) -> SubSequences:
        """The sequences themselves, in the same form."""
        return SubSequences(self.rows, self.tokens)
