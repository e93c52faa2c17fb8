"""How long a call takes and how much memory it holds, on a CPU and on a GPU.

On a GPU calls are queued, so a clock on the CPU sees the launch and not the work. There times come from events, and
from a CUDA graph if the launches themselves must not count.
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
from torch.profiler import ProfilerActivity, profile


def synchronize(device: torch.device | str) -> None:
    if torch.device(device).type == "cuda":
        torch.cuda.synchronize()


def median_seconds(
    run: Callable, device: torch.device | str, *, repeats: int, budget: float, pick: Callable = statistics.median
) -> float:
    """Median of up to `repeats` timed calls after one that is not timed, in about `budget` seconds.

    On a GPU calls are queued one after the other, as in training: the CPU's time to launch them counts only if the GPU
    waits for it. `pick=min` is for what the device can do, whoever else uses it.
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
    """Seconds of each timed call, by run; at least one, and never one that does set-up for later calls.

    All are called in turn. Where a round takes half the budget, the slowest is timed by itself in its part of the
    budget, and the others continue in turn. On a CPU, if the first call takes longer than that part, it is the one
    that counts: its set-up is little of so long a time, while on a GPU it may have loaded or compiled kernels for
    seconds.
    """
    first = [_seconds(run, device) for run in runs]
    return _timings(list(zip(runs, first, strict=True)), device, repeats=repeats, budget=budget)


def _timings(runs: list[tuple[Callable, float]], device, *, repeats: int, budget: float) -> list[list[float]]:
    first = sum(seconds for _, seconds in runs)
    if first > budget / 2:
        slowest, part = max(range(len(runs)), key=lambda i: runs[i][1]), budget / len(runs)
        found = [_by_itself(*runs[slowest], device, repeats=repeats, budget=part)]
        others = runs[:slowest] + runs[slowest + 1 :]
        beside = _timings(others, device, repeats=repeats, budget=budget - part) if others else []
        return beside[:slowest] + found + beside[slowest:]
    if torch.device(device).type == "cuda":
        times = _event_seconds([run for run, _ in runs], max(1, min(repeats, int(budget / first))))
    else:
        times = []
        start = time.perf_counter()
        while len(times) < repeats and time.perf_counter() - start < budget:
            times.append([_seconds(run, device) for run, _ in runs])
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
    with torch.cuda.stream(side):  # the set-up of a first call cannot be captured
        run()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(calls):
            run()
    return graph.replay


def peak_bytes(run: Callable, device: torch.device | str) -> int:
    """The most that PyTorch's allocator holds during one call, beyond what it held before.

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
    """The profiler's own library writes there, bypassing Python, that it finds no GPU."""
    kept = os.dup(2)
    with open(os.devnull, "w") as nothing:
        os.dup2(nothing.fileno(), 2)
    try:
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)
