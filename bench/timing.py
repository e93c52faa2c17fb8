"""How long a call takes and how much memory it holds, on a CPU and on a GPU."""

from __future__ import annotations

import gc
import itertools
import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from setting import synchronize


def median_seconds(run: Callable, device: str, *, repeats: int, budget: float) -> float:
    """Median of up to `repeats` timed calls after a warm-up; the first call alone where it takes half the budget.

    On a GPU calls are queued one behind the other, as in training: what the CPU needs to launch them counts only where
    the GPU waits for it.
    """
    return alternating_seconds([run], device, repeats=repeats, budget=budget)[0]


def alternating_seconds(runs: Sequence[Callable], device: str, *, repeats: int, budget: float) -> list[float]:
    """The same of several calls made in turn, for differences between them: clocks change with heat and with time."""
    first = []
    for run in runs:
        synchronize(device)
        start = time.perf_counter()
        run()
        synchronize(device)
        first.append(time.perf_counter() - start)
    if sum(first) > budget / 2:
        return first
    if device == "cuda":
        times = _event_seconds(runs, max(1, min(repeats, int(budget / sum(first)))))
    else:
        times = []
        start = time.perf_counter()
        while len(times) < repeats and time.perf_counter() - start < budget:
            times.append([_seconds(run) for run in runs])
    return [statistics.median(each) for each in zip(*times, strict=True)]


def _seconds(run: Callable) -> float:
    start = time.perf_counter()
    run()
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


def copy_speed(device: str) -> float:
    """Bytes per second, read and written, of a copy far larger than the caches."""
    source = torch.ones(1 << (28 if device == "cuda" else 26), dtype=torch.float32, device=device)
    target = torch.empty_like(source)
    seconds = median_seconds(lambda: target.copy_(source), device, repeats=10, budget=10)
    return 2 * source.numel() * source.element_size() / seconds


def peak_bytes(run: Callable, device: str) -> int:
    """The most memory that one call holds beyond what was there before it."""
    gc.collect()
    if device == "cuda":
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        run()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before
    Path("/proc/self/clear_refs").write_text("5")  # the high-water mark starts anew
    before = _resident("VmRSS")
    run()
    return _resident("VmHWM") - before


def _resident(field: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field + ":"):
            return int(line.split()[1]) * 1024
    raise RuntimeError(f"/proc/self/status has no {field}")
