"""Each operator of Lighthouse alone: its time and the bytes that it must move, compared with the rate of a copy."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from lighthouse.core.method import Method
from lighthouse.core.operators import memory_order
from lighthouse.speed.measure import captured, median_seconds
from lighthouse.speed.sides import dense_attention


def operators(inputs: Sequence[Tensor], grad: Tensor, method: Method, *, repeats: int) -> dict[str, dict]:
    """Each operator alone: seconds, on a GPU in a CUDA graph, and the bytes that it must move."""
    query, key, value = (tensor.detach() for tensor in inputs)
    ops, windows, length = torch.ops.lighthouse, method.windows, method.length(query.shape[2])
    scores = ops.score(query, key)
    chosen = (*scores, windows, *method.topk, method.cover_start)
    mask, prefix = ops.select(*chosen)
    choice = (mask, prefix, windows)
    subs = ops.gather(query, key, value, *choice, length)
    output = dense_attention(*subs)
    orders = [memory_order(tensor) for tensor in (query, key, value)]

    whole, part = ([tensor.nbytes for tensor in tensors] for tensors in ((query, key, value), subs))
    marks, scored = mask.nbytes + prefix.nbytes, 2 * scores[0].nbytes
    pooled, spread = sum(whole) + sum(part) + marks, whole[0] + part[0] + marks
    calls = {
        "score": (lambda: ops.score(query, key), whole[0] + whole[1] + scored),
        "select": (lambda: ops.select(*chosen), scored + marks),
        "gather": (lambda: ops.gather(query, key, value, *choice, length), pooled),
        "scatter": (lambda: ops.scatter(output, *choice), spread),
        "scatter_backward": (lambda: ops.scatter_backward(grad, *choice, length, memory_order(output)), spread),
        "gather_backward": (lambda: ops.gather_backward(*subs, *choice, *orders), pooled),
    }

    def seconds(call: Callable) -> float:
        if query.is_cuda:
            return median_seconds(captured(call, calls=10), "cuda", repeats=repeats, budget=1) / 10
        return median_seconds(call, "cpu", repeats=repeats, budget=10)

    with torch.no_grad():
        return {name: {"seconds": seconds(call), "bytes": moved} for name, (call, moved) in calls.items()}


def copy_speed(device: torch.device | str) -> float:
    """Bytes per second, read and written, of a copy far larger than the caches."""
    source = torch.ones(1 << (28 if torch.device(device).type == "cuda" else 26), dtype=torch.float32, device=device)
    target = torch.empty_like(source)
    return 2 * source.nbytes / median_seconds(lambda: target.copy_(source), device, repeats=10, budget=10)
