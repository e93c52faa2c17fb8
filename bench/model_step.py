"""A whole training step of a 30-layer Llama-style model of bytes: dense against Lighthouse.

    python bench/model_step.py --json model-step.json --plot model-step.png
    python bench/model_step.py --tokens 32768 --sides dense lighthouse --json model-step.json

Forward, loss, backward and AdamW of one sequence: width 1024, 8 heads of 128, feed-forward 1536, 256 bytes as
vocabulary, bf16 weights, compiled blocks, no activation checkpointing. The sides are those of `SIDES`. Each: tokens per
second (median step), the most memory that is allocated, and from one profiled step the time by group of kernels.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path

import setting
import torch
from sides import check, dense
from small_model import Shape, new_model, new_optimizer
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

import lighthouse

# The attention, and how many layers at each end are dense. Lighthouse's are in stage 1 of a run.
SIDES = {
    "dense": (dense, 0),
    "lighthouse": (partial(lighthouse.attention, local_window=256), 0),
    "fewer chosen": (partial(lighthouse.attention, local_window=256, select_topk=1 / 128), 0),
    "window alone": (partial(lighthouse.attention, local_window=256, select_topk=0), 0),
    "published": (lighthouse.attention, 2),
}
GIB = 1 << 30

# The group of a kernel, by the first matching word in its name; CPU operators have similar names.
GROUPS = {
    "lighthouse": ("lighthouse",),
    "attention": ("cudnn", "sdpa", "fmha", "flash", "attention"),
    "optimizer": ("multi_tensor", "fused_adam", "fusedadam", "adamw"),
    "matrix products": ("gemm", "nvjet", "cutlass", "xmma", "cublas", "splitk", "aten::mm", "mkldnn"),
}
THE_REST = "the rest"  # norms, rotations, activations, residuals, the loss, copies


def group_of(kernel: str) -> str:
    name = kernel.lower()
    if name.startswith("triton_"):  # fused by Inductor; the name lists operators, also of neighbours
        return THE_REST
    return next((group for group, words in GROUPS.items() if any(word in name for word in words)), THE_REST)


class Steps:
    """Training steps of one side; `run()` is one of them."""

    def __init__(self, model, optimizer, tokens: int, device: str, attention):
        generator = torch.Generator().manual_seed(0)
        text = torch.randint(0, 256, (1, tokens + 1), generator=generator).to(device)
        self.tokens, self.targets = text[:, :-1].contiguous(), text[:, 1:].contiguous()
        self.model, self.optimizer, self.attention, self.device = model, optimizer, attention, device

    def run(self) -> None:
        self.model(self.tokens, self.targets, self.attention).backward()
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)

    def seconds(self) -> float:
        setting.synchronize(self.device)
        start = time.perf_counter()
        self.run()
        setting.synchronize(self.device)
        return time.perf_counter() - start


def profiled(steps: Steps) -> dict:
    """Seconds of one step by group, and the ten kernels that take most."""
    on_gpu = steps.device == "cuda"
    with profile(activities=[ProfilerActivity.CUDA if on_gpu else ProfilerActivity.CPU]) as trace:
        steps.seconds()
    kernels: dict[str, list[float]] = {}
    for event in trace.events():
        if on_gpu and (event.device_type != DeviceType.CUDA or event.is_user_annotation):
            continue  # the CPU's work meanwhile, and spans over kernels, which are counted themselves
        microseconds = event.time_range.elapsed_us() if on_gpu else event.self_cpu_time_total
        kernels.setdefault(event.name, []).append(microseconds / 1e6)
    groups = dict.fromkeys((*GROUPS, THE_REST), 0.0)
    for name, times in kernels.items():
        groups[group_of(name)] += sum(times)
    most = sorted(kernels, key=lambda name: -sum(kernels[name]))[:10]
    top = [
        {"kernel": name[:120], "group": group_of(name), "calls": len(kernels[name]), "seconds": sum(kernels[name])}
        for name in most
    ]
    return {"groups": groups, "kernels": top}


def measure(side: str, steps: Steps, count: int) -> dict:
    first = steps.seconds()  # compiles
    print(f"{side}: first step after {first:.0f} s", flush=True)
    on_gpu = steps.device == "cuda"
    if on_gpu:
        torch.cuda.reset_peak_memory_stats()
    times = [steps.seconds() for _ in range(count)]
    row = {"first_step_seconds": first, "step_seconds": times}
    row["tokens_per_second"] = steps.tokens.numel() / statistics.median(times)
    if on_gpu:
        row["peak_bytes"] = torch.cuda.max_memory_allocated()
    print(f"{side}: {row['tokens_per_second']:,.0f} tokens/s", flush=True)
    return row


def report(results: dict) -> None:
    rows = {side: results[side] for side in SIDES if side in results}
    print("\n| | " + " | ".join(rows) + " |\n|---|" + "---:|" * len(rows))

    def line(name, *cells):
        print(f"| {name} | " + " | ".join(cells) + " |")

    line("tokens per second", *(f"{row['tokens_per_second']:,.0f}" for row in rows.values()))
    if all("peak_bytes" in row for row in rows.values()):
        line("peak memory", *(f"{row['peak_bytes'] / GIB:.1f} GiB" for row in rows.values()))
    for group in (*GROUPS, THE_REST):
        line(f"time in {group}", *(f"{1e3 * row['groups'][group]:,.1f} ms" for row in rows.values()))
    for side, ratios in results.get("comparison", {}).items():
        print(f"{side}, of dense's: " + ", ".join(f"{name} {ratio:.3f}" for name, ratio in ratios.items()))


def compare(results: dict) -> None:
    if "dense" in results:
        names = [name for name in ("tokens_per_second", "peak_bytes") if name in results["dense"]]
        results["comparison"] = {
            side: {name: results[side][name] / results["dense"][name] for name in names}
            for side in SIDES
            if side in results and side != "dense"
        }


def plot(results: dict, path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    rows = {side: results[side] for side in SIDES if side in results}
    figure, axis = plt.subplots(figsize=(9, 2.6), constrained_layout=True)
    left = [0.0] * len(rows)
    for group in (*GROUPS, THE_REST):
        widths = [row["groups"][group] for row in rows.values()]
        axis.barh(list(rows), widths, left=left, label=group)
        left = [a + b for a, b in zip(left, widths, strict=True)]
    for index, row in enumerate(rows.values()):
        axis.text(left[index], index, f" {row['tokens_per_second']:,.0f} tokens/s", va="center")
    axis.set(xlabel="seconds of kernels in one step", xlim=(0, 1.25 * max(left)))
    axis.set_title(f"A training step of {results['settings']['tokens']:,} tokens on one {results['device']}")
    axis.invert_yaxis()
    axis.legend(loc="lower right", fontsize="small")
    figure.savefig(path, dpi=120)
    print(path)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=98_304)
    parser.add_argument("--sides", nargs="+", choices=list(SIDES), default=list(SIDES))
    parser.add_argument("--steps", type=int, default=5, help="timed steps of each side (default 5)")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cuda")
    parser.add_argument("--layers", type=int, default=30)
    parser.add_argument("--width", type=int, default=1024)
    parser.add_argument("--heads", type=int, default=8, help="of 128 each")
    parser.add_argument("--feed-forward", type=int, default=1536)
    parser.add_argument("--json", type=Path, help="write the results to this file, each side as soon as it is measured")
    parser.add_argument("--plot", type=Path, help="plot the time by group of kernels to this PNG file")
    options = parser.parse_args()

    shape = Shape(layers=options.layers, width=options.width, heads=options.heads, feed_forward=options.feed_forward)
    results = {
        "command": setting.command(),
        "device": setting.device_name(options.device),
        "versions": setting.versions(options.device),
        "settings": {"tokens": options.tokens, "steps": options.steps} | asdict(shape),
    }
    print(f"{results['device']}; torch {torch.__version__}", flush=True)
    error = results["error_of_dense"] = check(torch.bfloat16, options.device)
    print(f"checked: one layer's error against float64 is {error:.2f} of dense attention's", flush=True)
    model = new_model(shape, options.tokens, seed=0, device=options.device, dtype=torch.bfloat16)
    optimizer = new_optimizer(model, learning_rate=1e-4)
    print(f"{model.parameter_count() / 1e6:.1f}M parameters, {options.tokens:,} tokens a step; compiling", flush=True)
    results["settings"]["parameters"] = model.parameter_count()
    del results["settings"]["dense_layers"]  # each side has its own

    def save():
        compare(results)
        if options.json:
            options.json.write_text(json.dumps(results, indent=1) + "\n")

    for side in options.sides:
        attention, dense_layers = SIDES[side]
        model.shape = replace(shape, dense_layers=dense_layers)
        steps = Steps(model, optimizer, options.tokens, options.device, attention)
        results[side] = {"dense_layers": dense_layers} | measure(side, steps, options.steps)
        save()
        results[side] |= profiled(steps)
        save()
    report(results)
    if options.plot:
        plot(results, options.plot)


if __name__ == "__main__":
    main()
