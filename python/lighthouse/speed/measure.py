"""How long a call takes and how much memory it holds, on a CPU and on a GPU; and whether its result is right at all.

The trap of a GPU: calls are queued, so a clock on the CPU sees the launch and not the work. Times come from events
there, and from a CUDA graph where the launches themselves must not count.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

from lighthouse.core.attention import sub_sequence_attention
from lighthouse.core.method import DEFAULT, Method


class WrongResult(RuntimeError):
    """The attention gives something else than the float64 reference: there is nothing to time."""


def synchronize(device: torch.device | str) -> None:
    if torch.device(device).type == "cuda":
        torch.cuda.synchronize()


def median_seconds(
    run: Callable, device: torch.device | str, *, repeats: int, budget: float, pick: Callable = statistics.median
) -> float:
    """Median of up to `repeats` timed calls after one that is not timed, in about `budget` seconds.

    On a GPU calls are queued one behind the other, as in training: what the CPU needs to launch them counts only where
    the GPU waits for it. `pick=min` is for what the device can do, whoever else uses it.
    """
    return alternating_seconds([run], device, repeats=repeats, budget=budget, pick=pick)[0]


def alternating_seconds(
    runs: Sequence[Callable],
    device: torch.device | str,
    *,
    repeats: int,
    budget: float,
    pick: Callable = statistics.median,
) -> list[float]:
    """The same of several calls made in turn, for differences between them: clocks change with heat and with time."""
    return [pick(each) for each in timings(runs, device, repeats=repeats, budget=budget)]


def timings(runs: Sequence[Callable], device: torch.device | str, *, repeats: int, budget: float) -> list[list[float]]:
    """Seconds of each timed call, by run; at least one, and never one that sets up what later calls find set up.

    Where a round takes half the budget, each call is timed by itself in its part of the budget. Only where a first call
    on a CPU takes longer than that part it is the one that counts: what it sets up is little of so long a time, while
    on a GPU kernels may have been loaded or compiled in it for seconds.
    """
    first = [_seconds(run, device) for run in runs]
    if sum(first) > budget / 2:
        limits = {"repeats": repeats, "budget": budget / len(runs)}
        return [_by_itself(run, seconds, device, **limits) for run, seconds in zip(runs, first, strict=True)]
    if torch.device(device).type == "cuda":
        times = _event_seconds(runs, max(1, min(repeats, int(budget / sum(first)))))
    else:
        times = []
        start = time.perf_counter()
        while len(times) < repeats and time.perf_counter() - start < budget:
            times.append([_seconds(run, device) for run in runs])
    return [list(each) for each in zip(*times, strict=True)]


def _by_itself(run: Callable, first: float, device: torch.device | str, *, repeats: int, budget: float) -> list[float]:
    on_gpu = torch.device(device).type == "cuda"
    if first > budget and not on_gpu:
        return [first]
    times = [_seconds(run, device)]
    rounds = min(repeats, int(budget / times[0]))
    if on_gpu and rounds > 1:
        return [seconds for (seconds,) in _event_seconds([run], rounds)]
    while len(times) < rounds:
        times.append(_seconds(run, device))
    return times


def spread(times: Sequence[float]) -> float:
    """How much longer the median call took than the fastest: on a quiet machine a few per cent."""
    return statistics.median(times) / min(times) - 1


def _seconds(run: Callable, device: torch.device | str) -> float:
    synchronize(device)
    start = time.perf_counter()
    run()
    synchronize(device)
    return time.perf_counter() - start


def _event_seconds(runs: Sequence[Callable], rounds: int) -> list[list[float]]:
    events = [[torch.cuda.Event(enable_timing=True) for _ in range(len(runs) + 1)] for _ in range(rounds)]
    for marks in events:
        marks[0].record()
        for run, mark in zip(runs, marks[1:], strict=True):
            run()
            mark.record()
    torch.cuda.synchronize()
    return [[a.elapsed_time(b) / 1e3 for a, b in itertools.pairwise(marks)] for marks in events]


def captured(run: Callable, *, calls: int = 1) -> Callable:
    """Replays a CUDA graph of `calls` calls: the GPU's own time, whatever the launches cost."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):  # what is set up on a first call cannot be captured
        run()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(calls):
            run()
    return graph.replay


def peak_bytes(run: Callable, device: torch.device | str) -> int:
    """The most that PyTorch's allocator holds during one call, beyond what was there before it.

    On a CPU it is counted from the profiler's record of every allocation, so it does not depend on what the process
    has kept of earlier calls.
    """
    if torch.device(device).type == "cuda":
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        run()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before
    with _no_standard_error(), tempfile.TemporaryDirectory() as folder:
        with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as trace:
            run()
        file = Path(folder) / "trace.json"
        trace.export_chrome_trace(str(file))
        events = json.loads(file.read_text(encoding="utf-8"))["traceEvents"]
    allocations = sorted((event for event in events if event.get("name") == "[memory]"), key=lambda event: event["ts"])
    return max(itertools.accumulate((event["args"]["Bytes"] for event in allocations), initial=0))


@contextlib.contextmanager
def _no_standard_error():
    """The profiler's own library writes there, past Python, that it finds no GPU."""
    kept = os.dup(2)
    with open(os.devnull, "w") as nothing:
        os.dup2(nothing.fileno(), 2)
    try:
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)


def leaves(tokens: int, heads: int, kv_heads: int, head_dim: int, dtype: torch.dtype, device: torch.device | str):
    """Query, key and value as a model passes them, and the output's gradient: [B, N, H, D] in memory."""
    generator = torch.Generator(device).manual_seed(tokens)

    def rand(count):
        x = torch.randn(1, tokens, count, head_dim, generator=generator, device=device, dtype=dtype)
        return x.transpose(1, 2)

    return [rand(count).requires_grad_() for count in (heads, kv_heads, kv_heads)], rand(heads)


def check(
    dtype: torch.dtype,
    device: torch.device | str,
    *,
    head_dim: int = 128,
    method: Method = DEFAULT,
    tokens: int = 1500,
) -> float:
    """Largest error of output and gradients against the float64 reference, relative to dense attention's own error.

    Raises `WrongResult` where it is more than twice that.
    """
    inputs, grad = leaves(tokens, 4, 2, head_dim, dtype, device)
    ours = sub_sequence_attention(*inputs, method)
    mine = [ours.detach(), *torch.autograd.grad(ours, inputs, grad)]
    output = F.scaled_dot_product_attention(*inputs, is_causal=True, enable_gqa=True)
    plain = [output.detach(), *torch.autograd.grad(output, inputs, grad)]

    # The reference runs on the CPU, with the device's own scores: other rounding there could choose other entries.
    scores = [score.cpu() for score in torch.ops.lighthouse.score(*(tensor.detach() for tensor in inputs[:2]))]
    wide = [tensor.detach().cpu().double().contiguous() for tensor in inputs]
    wide_grad = grad.cpu().double().contiguous()
    args = (*wide, *scores, method.windows, *method.topk, method.cover_start, 0.0)
    true = [
        torch.ops.lighthouse.reference_attention(*args),
        *torch.ops.lighthouse.reference_attention_backward(*args, wide_grad),
    ]
    wide = [tensor.requires_grad_() for tensor in wide]
    output = F.scaled_dot_product_attention(*wide, is_causal=True, enable_gqa=True)
    plain_true = [output.detach(), *torch.autograd.grad(output, wide, wide_grad)]

    def worst(found: Sequence[Tensor], right: Sequence[Tensor]) -> float:
        return max(((a.cpu().double() - b).norm() / b.norm()).item() for a, b in zip(found, right, strict=True))

    error, allowed = worst(mine, true), worst(plain, plain_true)
    if not error <= 2 * allowed + 1e-6:
        raise WrongResult(
            f"error {error:.2e} against the float64 reference where dense attention has {allowed:.2e}, in {dtype} on "
            f"{device}: nothing is timed; please report it"
        )
    return error / allowed
