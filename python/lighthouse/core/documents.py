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


def attend_by_document(attend: Callable[..., Tensor], query: Tensor, *others: Tensor, stretches: Stretches) -> Tensor:
    """`attend(query, *others, layout=)` of each stretch alone, those of one length together; zeros between them.

    Query `[1, Hq, T, D]`, all others `[1, Hkv, T, ...]`; the output is like the query.
    """
    outputs: dict[int, Tensor] = {}
    for length, firsts in _by_length(stretches).items():
        rows = (_stacked(tensor, firsts, length) for tensor in (query, *others))
        output = attend(*rows, layout=SubSequences(len(firsts), length))
        outputs |= zip(firsts, output.unbind(0), strict=True)
    parts, at = [], 0
    for first in sorted(outputs):
        if first > at:
            parts.append(query.new_zeros(query.shape[1], first - at, query.shape[3]))
        parts.append(outputs[first])
        at = first + outputs[first].shape[1]
    if at < query.shape[2]:
        parts.append(query.new_zeros(query.shape[1], query.shape[2] - at, query.shape[3]))
    return torch.cat(parts, dim=1)[None]


# Without autograd, for PyTorch's kernels.


def _by_length(stretches: Stretches) -> dict[int, list[int]]:
    """The first row of each stretch, by their lengths; empty ones left out."""
    firsts: dict[int, list[int]] = {}
    for first, end in stretches:
        if end > first:
            firsts.setdefault(end - first, []).append(first)
    return firsts


def count_of_lengths(stretches: Stretches) -> int:
    """How many calls `forward_by_length` makes."""
    return len(_by_length(stretches))


def _stacked(tensor: Tensor, firsts: list[int], length: int) -> Tensor:
    return torch.stack([tensor[0, :, first : first + length] for first in firsts])


def _zeros(like: Tensor) -> Tensor:
    """Contiguous as `[1, T, H, D]`."""
    return torch.zeros_like(like.transpose(1, 2), memory_format=torch.contiguous_format).transpose(1, 2)


def _put(target: Tensor, rows: Tensor, firsts: list[int], length: int) -> None:
    for first, row in zip(firsts, rows, strict=True):
        target[0, :, first : first + length] = row


def forward_by_length(forward: Callable, query: Tensor, key: Tensor, value: Tensor, stretches: Stretches):
    """`forward(query, key, value)` of the stretches of each length, as the rows of a batch.

    Returns the output, zeros outside of all stretches, and behind it what `forward` returned behind its own, length by
    length.
    """
    output, kept = _zeros(query), []
    for length, firsts in _by_length(stretches).items():
        rows, *rest = forward(*(_stacked(tensor, firsts, length) for tensor in (query, key, value)))
        _put(output, rows, firsts, length)
        kept += rest
    return output, *kept


def backward_by_length(backward: Callable, inputs: Sequence[Tensor], kept, stretches: Stretches):
    """Its gradients: `backward(*inputs, *kept)` of each length; inputs are the output's gradient, query, key, value."""
    sums = [_zeros(tensor) for tensor in inputs[1:4]]
    by_length = _by_length(stretches)
    each = len(kept) // max(1, len(by_length))
    for index, (length, firsts) in enumerate(by_length.items()):
        own = (_stacked(tensor, firsts, length) for tensor in inputs)
        for target, rows in zip(sums, backward(*own, *kept[index * each : (index + 1) * each]), strict=True):
            _put(target, rows, firsts, length)
    return tuple(sums)
