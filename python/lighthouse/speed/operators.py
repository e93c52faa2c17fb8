"""Each operator of Lighthouse alone: its time and the bytes that it must move, compared with the rate of a copy."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from lighthouse.core.local import Local
from lighthouse.core.method import Method
from lighthouse.core.operators import memory_order
from lighthouse.speed.measure import captured, median_seconds
from lighthouse.speed.sides import dense_attention

Calls = dict[str, tuple[Callable, int]]  # by operator: a call of it, and the bytes that it must move


def operators(inputs: Sequence[Tensor], grad: Tensor, method: Method, *, repeats: int) -> dict[str, dict]:
    """Each operator alone: seconds, on a GPU in a CUDA graph, and the bytes that it must move."""
    query, key, value = (tensor.detach() for tensor in inputs)
    on_gpu = grad.is_cuda

    def seconds(call: Callable) -> float:
        if on_gpu:
            return median_seconds(captured(call, calls=10), "cuda", repeats=repeats, budget=1) / 10
        return median_seconds(call, "cpu", repeats=repeats, budget=10)

    with torch.no_grad():
        calls = _of_the_pyramid(query, key, value, grad, method) if method.chooses else {}
        calls |= _of_the_window(query, key, value, grad, method) if method.local_window else {}
        return {name: {"seconds": seconds(call), "bytes": moved} for name, (call, moved) in calls.items()}


def _of_the_pyramid(query: Tensor, key: Tensor, value: Tensor, grad: Tensor, method: Method) -> Calls:
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
    return {
        "score": (lambda: ops.score(query, key), whole[0] + whole[1] + scored),
        "select": (lambda: ops.select(*chosen), scored + marks),
        "gather": (lambda: ops.gather(query, key, value, *choice, length), pooled),
        "scatter": (lambda: ops.scatter(output, *choice), spread),
        "scatter_backward": (lambda: ops.scatter_backward(grad, *choice, length, memory_order(output)), spread),
        "gather_backward": (lambda: ops.gather_backward(*subs, *choice, *orders), pooled),
    }


def _of_the_window(query: Tensor, key: Tensor, value: Tensor, grad: Tensor, method: Method) -> Calls:
    ops, local = torch.ops.lighthouse, Local.of(query, method.local_window, None, 0.0)
    output, *saved = ops.local_attention(query, key, value, *local)
    inputs = query, key, value
    moved = sum(tensor.nbytes for tensor in (*inputs, output, saved[0]))
    return {
        "local_attention": (lambda: ops.local_attention(*inputs, *local), moved),
        "local_attention_backward": (
            lambda: ops.local_attention_backward(grad, *inputs, output, *saved, *local),
            moved + grad.nbytes + sum(tensor.nbytes for tensor in inputs),
        ),
    }


def copy_speed(device: torch.device | str) -> float:
    """Bytes per second, read and written, of a copy far larger than the caches."""
    source = torch.ones(1 << (28 if torch.device(device).type == "cuda" else 26), dtype=torch.float32, device=device)
    target = torch.empty_like(source)
    return 2 * source.nbytes / median_seconds(lambda: target.copy_(source), device, repeats=10, budget=10)
