"""What the benchmarks measure beside the times of `lighthouse.speed.measure`: the speed of a copy, and peak memory."""

from __future__ import annotations

import gc
from collections.abc import Callable
from pathlib import Path

import torch

from lighthouse.speed.measure import median_seconds


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
