"""The held-out loss by the place of a token in its context: what a longer context is worth to the model."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch

from lighthouse.evaluation.losses import TokenLosses, rows_at_once
from lighthouse.evaluation.results import LossByPosition, Stretch

FIRST = 1024  # tokens of the first stretch, in a context of at least four times as many


def stretches(context: int) -> list[tuple[int, int]]:
    """Of positions: the first stretch, and from there on each as long as all before it; the last ends the context."""
    first = FIRST
    while first > 2 and 4 * first > context:
        first //= 2
    cuts = [0]
    while first < context:
        cuts.append(first)
        first *= 2
    return list(zip(cuts, [*cuts[1:], context], strict=True))


def loss_by_position(losses: TokenLosses, rows: torch.Tensor, advance: Callable[[int], None]) -> LossByPosition:
    """Of rows `[R, N]`; `advance` is told the tokens that were read."""
    found = []
    for batch in rows.split(rows_at_once(rows.shape[1])):
        found.append(losses(batch)[0].double())
        advance(batch.numel())
    loss = torch.cat(found)  # [R, N - 1], of position 1 on
    by_position = [
        Stretch(start, stop, *mean_and_error(loss[:, max(start - 1, 0) : stop - 1].mean(1)))
        for start, stop in stretches(rows.shape[1])
    ]
    return LossByPosition(*mean_and_error(loss.mean(1)), rows=len(rows), stretches=by_position)


def mean_and_error(values: torch.Tensor) -> tuple[float, float]:
    """The mean and its standard error, 0 for a single value."""
    error = 0.0 if len(values) < 2 else values.std().item() / math.sqrt(len(values))
    return values.mean().item(), error
