"""Documents of their own lengths in one row, attended to each by itself (METHOD 7a)."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from lighthouse.core.sequences import Stretches, SubSequences


def lengths_of(cu_seqlens: Tensor | Sequence[int], query: Tensor) -> list[int]:
    """The documents' lengths from their boundaries, for `query` `[1, Hq, T, D]`. Raises ValueError or TypeError.

    A tensor on a GPU is read, for which the host waits.
    """
    if isinstance(cu_seqlens, Tensor):
        if cu_seqlens.dtype not in (torch.int32, torch.int64) or cu_seqlens.ndim != 1:
            raise TypeError(
                f"cu_seqlens is a {cu_seqlens.dtype} tensor of {cu_seqlens.ndim} dimensions: whole numbers, int32 or "
                "int64, in one dimension are needed"
            )
        bounds = cu_seqlens.tolist()
    elif isinstance(cu_seqlens, (list, tuple)):
        bounds = list(cu_seqlens)
        wrong = next((each for each in bounds if isinstance(each, bool) or not isinstance(each, int)), None)
        if wrong is not None:
            raise TypeError(f"cu_seqlens holds {wrong!r}: whole numbers are needed")
    else:
        raise TypeError(f"cu_seqlens is a {type(cu_seqlens).__name__}: a tensor, list or tuple of boundaries is needed")
    batch, tokens = query.shape[0], query.shape[2]
    if batch != 1:
        raise ValueError(
            f"cu_seqlens with a batch of {batch}: packed documents are one row, [1, heads, tokens, head_dim]; join the "
            "rows"
        )
    if len(bounds) < 2 or bounds[0] != 0 or bounds[-1] != tokens:
        first, last = (bounds[0], bounds[-1]) if bounds else ("none", "none")
        raise ValueError(
            f"cu_seqlens has {len(bounds)} boundaries, the first {first}, the last {last}: it must begin with 0 and "
            f"end with the {tokens} tokens"
        )
    lengths = [end - start for start, end in zip(bounds, bounds[1:], strict=False)]
    fall = next((i for i, length in enumerate(lengths) if length < 0), None)
    if fall is not None:
        raise ValueError(f"cu_seqlens falls from {bounds[fall]} to {bounds[fall + 1]}: boundaries must not decrease")
    return lengths


def attend_by_document(
    attend: Callable[..., Tensor], query: Tensor, key: Tensor, value: Tensor, stretches: Stretches
) -> Tensor:
    """`attend(query, key, value, layout=)` of each stretch alone, those of one length together; zeros between them.

    Query `[1, Hq, T, D]`, key and value `[1, Hkv, T, D]`; the output is like the query.
    """
    by_length: dict[int, list[int]] = {}
    for index, (first, end) in enumerate(stretches):
        if end > first:
            by_length.setdefault(end - first, []).append(index)
    outputs: list[Tensor | None] = [None] * len(stretches)
    for length, which in by_length.items():
        firsts = [stretches[index][0] for index in which]
        rows = ([tensor[0, :, first : first + length] for first in firsts] for tensor in (query, key, value))
        output = attend(*(torch.stack(parts) for parts in rows), layout=SubSequences(len(which), length))
        for index, own in zip(which, output.unbind(0), strict=True):
            outputs[index] = own
    parts, at = [], 0
    for (first, end), part in zip(stretches, outputs, strict=True):
        if first > at:
            parts.append(query.new_zeros(query.shape[1], first - at, query.shape[3]))
        if part is not None:
            parts.append(part)
        at = end
    if at < query.shape[2]:
        parts.append(query.new_zeros(query.shape[1], query.shape[2] - at, query.shape[3]))
    return torch.cat(parts, dim=1)[None]
