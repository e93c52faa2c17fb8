"""One attention layer, forward and backward: dense against Lighthouse, time and peak memory.

    python bench/layer.py --tokens 2048 8192 32768 --dtype float32 --threads 2 --json layer.json --plot layer.png

Each length: the result is checked, then both sides are timed in turn in the same process. "inner" is the attention of
the sub-sequence alone, the most that this method can save; "beside" is the part of Lighthouse's time that is not inner.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import platform
import statistics
import subprocess
import sys
import time
from pathlib import Path

import torch
import torch.nn.functional as F

import lighthouse
from lighthouse.attention import SubSequences, causal_sdpa
from lighthouse.operators import memory_order
from lighthouse.settings import check_pool_ratios, check_select_topk

MIB = 1024 * 1024


def median_seconds(run, *, repeats: int, budget: float) -> float:
    """Median of up to `repeats` timed calls after a warm-up; the first call alone where it takes half the budget."""
    start = time.perf_counter()
    run()
    first = time.perf_counter() - start
    if first > budget / 2:
        return first
    times = []
    while len(times) < repeats and sum(times) < budget:
        start = time.perf_counter()
        run()
        times.append(time.perf_counter() - start)
    return statistics.median(times)


def resident(field: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field + ":"):
            return int(line.split()[1]) * 1024
    raise RuntimeError(f"/proc/self/status has no {field}")


def peak_bytes(run) -> int:
    """The most memory that one call holds beyond what was there before it."""
    gc.collect()
    Path("/proc/self/clear_refs").write_text("5")  # the high-water mark starts anew
    before = resident("VmRSS")
    run()
    return resident("VmHWM") - before


def peak_in_own_process(side, tokens, options, dtype_name) -> tuple[int, float]:
    """Peak bytes of one side, where nothing has been allocated before and freed memory goes back at once.

    The seconds of that one call, too: for lengths at which a call takes minutes.
    """
    environment = os.environ | {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}
    command = [sys.executable, __file__, "--peak", side, "--tokens", str(tokens), "--dtype", dtype_name]
    for name in ("heads", "kv_heads", "head_dim", "threads", "select_topk"):
        command += [f"--{name.replace('_', '-')}", str(getattr(options, name))]
    command += ["--pool-ratios", *map(str, options.pool_ratios)]
    printed = subprocess.run(command, env=environment, check=True, capture_output=True, text=True).stdout.split()
    return int(printed[0]), float(printed[1])


def leaves(tokens, heads, kv_heads, head_dim, dtype):
    """Query, key and value as Transformers passes them, and the output's gradient: [B, N, H, D] in memory."""
    generator = torch.Generator().manual_seed(tokens)

    def rand(count):
        x = torch.randn(1, tokens, count, head_dim, generator=generator).to(dtype)
        return x.transpose(1, 2)

    return [rand(count).requires_grad_() for count in (heads, kv_heads, kv_heads)], rand(heads)


def forward_backward(attention, inputs, grad):
    def run():
        for tensor in inputs:
            tensor.grad = None
        attention(*inputs).backward(grad)

    return run


def forward_backward_in_a_model(attention, inputs, grad):
    """As in a model, the output is used by what follows and not held: what memory is measured with."""

    def run():
        for tensor in inputs:
            tensor.grad = None
        (attention(*inputs) * grad).sum().backward()

    return run


def check(dtype, pool_ratios, select_topk) -> float:
    """Largest error of output and gradients against the float64 oracle, relative to dense attention's own error.

    Exits where it is more than twice that: what is wrong is not timed.
    """
    inputs, grad = leaves(1500, 4, 2, 64, dtype)
    windows, topk = check_pool_ratios(pool_ratios), check_select_topk(select_topk)
    ours = lighthouse.attention(*inputs, pool_ratios=pool_ratios, select_topk=select_topk)
    ours.backward(grad)
    scores = torch.ops.lighthouse.score(*(tensor.detach() for tensor in inputs[:2]))
    wide = [tensor.detach().double().contiguous() for tensor in inputs]
    args = (*wide, *scores, windows, *topk, True, 0.0)
    true = [
        torch.ops.lighthouse.reference_attention(*args),
        *torch.ops.lighthouse.reference_attention_backward(*args, grad.double().contiguous()),
    ]
    mine = [ours.detach(), *(tensor.grad for tensor in inputs)]

    wide = [tensor.requires_grad_() for tensor in wide]
    dense_wide = F.scaled_dot_product_attention(*wide, is_causal=True, enable_gqa=True)
    dense_wide.backward(grad.double())
    plain = [tensor.detach().requires_grad_() for tensor in inputs]
    dense = F.scaled_dot_product_attention(*plain, is_causal=True, enable_gqa=True)
    dense.backward(grad)

    def error(a, b):
        return ((a.double() - b).norm() / b.norm()).item()

    allowed = max(
        error(a, b)
        for a, b in zip(
            [dense.detach(), *(t.grad for t in plain)], [dense_wide.detach(), *(t.grad for t in wide)], strict=True
        )
    )
    worst = max(error(a, b) for a, b in zip(mine, true, strict=True))
    if not worst <= 2 * allowed + 1e-6:
        sys.exit(f"error {worst:.2e} against the oracle where dense attention has {allowed:.2e}: not timed")
    return worst / allowed


def copy_speed(threads: int) -> float:
    """Bytes per second, read and written, of a copy far larger than the caches."""
    source = torch.ones(64 * MIB, dtype=torch.float32)
    target = torch.empty_like(source)
    seconds = median_seconds(lambda: target.copy_(source), repeats=5, budget=10)
    return 2 * source.numel() * 4 / seconds


def verbs(inputs, grad, windows, topk, length, repeats) -> dict:
    """Each operator alone: seconds, and the bytes that it must move."""
    query, key, value = (tensor.detach() for tensor in inputs)
    size = query.element_size()
    whole = [tensor.numel() * size for tensor in (query, key, value)]
    part = [b * length // query.shape[2] for b in whole]
    choice_bytes = key.shape[1] * key.shape[2] * 5
    ops = torch.ops.lighthouse
    scores = ops.score(query, key)
    mask, prefix = ops.select(*scores, windows, *topk, True)
    subs = ops.gather(query, key, value, mask, prefix, windows, length)
    orders = [memory_order(tensor) for tensor in (query, key, value)]
    calls = {
        "score": (lambda: ops.score(query, key), whole[0] + whole[1]),
        "select": (lambda: ops.select(*scores, windows, *topk, True), 8 * scores[0].numel() + choice_bytes),
        "gather": (
            lambda: ops.gather(query, key, value, mask, prefix, windows, length),
            sum(whole) + sum(part) + choice_bytes,
        ),
        "scatter": (lambda: ops.scatter(subs[0], mask, prefix, windows), whole[0] + part[0] + choice_bytes),
        "scatter_backward": (
            lambda: ops.scatter_backward(grad, mask, prefix, windows, length, orders[0]),
            whole[0] + part[0] + choice_bytes,
        ),
        "gather_backward": (
            lambda: ops.gather_backward(*subs, mask, prefix, windows, *orders),
            sum(whole) + sum(part) + choice_bytes,
        ),
    }
    return {
        name: {"seconds": median_seconds(call, repeats=repeats, budget=10), "bytes": moved}
        for name, (call, moved) in calls.items()
    }


def sides(options):
    """Dense attention and ours, of query, key and value."""

    def dense(query, key, value):
        grouped = options.heads != options.kv_heads
        return F.scaled_dot_product_attention(query, key, value, is_causal=True, enable_gqa=grouped)

    def ours(query, key, value):
        return lighthouse.attention(query, key, value, pool_ratios=options.pool_ratios, select_topk=options.select_topk)

    return dense, ours


def print_peak(options) -> None:
    inputs, grad = leaves(
        options.tokens[0], options.heads, options.kv_heads, options.head_dim, getattr(torch, options.dtype[0])
    )
    attention = sides(options)[("dense", "lighthouse").index(options.peak)]
    few = [tensor.detach()[:, :, :64].requires_grad_() for tensor in inputs]
    forward_backward_in_a_model(attention, few, grad[:, :, :64])()  # what is set up once is not the layer's
    start = time.perf_counter()
    peak = peak_bytes(forward_backward_in_a_model(attention, inputs, grad))
    print(peak, time.perf_counter() - start)


def measure(tokens, options, dtype) -> dict:
    inputs, grad = leaves(tokens, options.heads, options.kv_heads, options.head_dim, dtype)
    windows, topk = check_pool_ratios(options.pool_ratios), check_select_topk(options.select_topk)
    plan = lighthouse.plan(tokens, pool_ratios=options.pool_ratios, select_topk=options.select_topk)
    dense, ours = sides(options)
    short, short_grad = leaves(plan.length, options.heads, options.kv_heads, options.head_dim, dtype)
    short = [tensor.detach().contiguous().requires_grad_() for tensor in short]  # as gather lays them out
    layout = SubSequences(1, plan.length)

    def inner(query, key, value):
        return causal_sdpa(query, key, value, scale=None, dropout_p=0.0, layout=layout)

    timing = {"repeats": options.repeats, "budget": options.budget}
    row = {"tokens": tokens, "dtype": str(dtype).removeprefix("torch."), "length": plan.length}
    for name, attention, tensors, gradient in (
        ("lighthouse", ours, inputs, grad),
        ("inner", inner, short, short_grad),
        ("dense", dense, inputs, grad),
    ):
        if name != "inner":
            row[f"{name}_peak_bytes"], once = peak_in_own_process(name, tokens, options, row["dtype"])
        if name == "dense" and once > 2 * options.budget:
            row["dense_seconds"] = once
            continue
        run = forward_backward(attention, tensors, gradient)
        row[f"{name}_seconds"] = median_seconds(run, **timing)
        with torch.no_grad():
            row[f"{name}_forward_seconds"] = median_seconds(lambda: attention(*tensors), **timing)  # noqa: B023
        for tensor in tensors:
            tensor.grad = None
    row["times_dense"] = row["dense_seconds"] / row["lighthouse_seconds"]
    row["beside"] = 1 - row["inner_seconds"] / row["lighthouse_seconds"]
    row["verbs"] = verbs(inputs, grad, windows, topk, plan.length, options.repeats)
    return row


HEADER = (
    f"{'tokens':>8} {'dense s':>10} {'lighthouse s':>13} {'inner s':>10} {'times':>7} {'beside':>7}"
    f" {'dense MiB':>10} {'ours MiB':>9}"
)


def line(row) -> str:
    return (
        f"{row['tokens']:>8,} {row['dense_seconds']:>10.4f} {row['lighthouse_seconds']:>13.4f}"
        f" {row['inner_seconds']:>10.4f} {row['times_dense']:>7.2f} {row['beside']:>7.1%}"
        f" {row['dense_peak_bytes'] / MIB:>10.1f} {row['lighthouse_peak_bytes'] / MIB:>9.1f}"
    )


def markdown(rows) -> str:
    lines = [
        "| tokens | dense | Lighthouse | inner alone | times dense | beside inner | peak dense | peak Lighthouse |",
        "|---:|---:|---:|---:|---:|---:|---:|---:|",
    ]
    lines += [
        f"| {r['tokens']:,} | {r['dense_seconds']:.3f} s | {r['lighthouse_seconds']:.3f} s |"
        f" {r['inner_seconds']:.3f} s |"
        f" {r['times_dense']:.2f} | {r['beside']:.1%} | {r['dense_peak_bytes'] / MIB:,.0f} MiB |"
        f" {r['lighthouse_peak_bytes'] / MIB:,.0f} MiB |"
        for r in rows
    ]
    return "\n".join(lines)


def plot(results, path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, 2, figsize=(10, 4), constrained_layout=True)
    styles = {"dense": ("tab:gray", "o", "dense"), "lighthouse": ("tab:orange", "s", "Lighthouse")}
    for dtype, dash in (("float32", "-"), ("bfloat16", "--")):
        rows = [row for row in results["rows"] if row["dtype"] == dtype]
        if not rows:
            continue
        tokens = [row["tokens"] for row in rows]
        for side, (color, marker, label) in styles.items():
            text = f"{label}, {dtype}"
            axes[0].plot(tokens, [r[f"{side}_seconds"] for r in rows], dash, color=color, marker=marker, label=text)
            memory = [r[f"{side}_peak_bytes"] / MIB for r in rows]
            axes[1].plot(tokens, memory, dash, color=color, marker=marker, label=text)
    for axis, title, unit in ((axes[0], "time", "seconds"), (axes[1], "peak memory beyond the inputs", "MiB")):
        axis.set(yscale="log", xlabel="tokens", ylabel=unit, title=title)
        axis.set_xscale("log", base=2)
        axis.xaxis.set_major_formatter(lambda tokens, _: f"{tokens:,.0f}")
        axis.tick_params(axis="x", labelrotation=30)
        axis.grid(alpha=0.3)
        axis.legend()
    figure.suptitle("One attention layer, forward and backward")
    figure.savefig(path, dpi=120)


def machine() -> str:
    for text in Path("/proc/cpuinfo").read_text().splitlines():
        if text.startswith("model name"):
            return text.split(":")[1].strip()
    return platform.processor()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, nargs="+", default=[2048, 4096, 8192, 16_384, 32_768])
    parser.add_argument("--dtype", nargs="+", choices=["float32", "bfloat16"], default=["float32", "bfloat16"])
    parser.add_argument("--heads", type=int, default=4, help="query heads (default 4)")
    parser.add_argument("--kv-heads", type=int, help="key-value heads (default: as many)")
    parser.add_argument("--head-dim", type=int, default=64)
    parser.add_argument("--pool-ratios", type=float, nargs="*", default=[1 / 4, 1 / 16])
    parser.add_argument("--select-topk", type=lambda t: int(t) if t.isdigit() else float(t), default=1 / 64)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=5, help="timed calls of each side at most (default 5)")
    parser.add_argument("--budget", type=float, default=30, help="seconds for each side's calls, about (default 30)")
    parser.add_argument("--json", type=Path, help="write the results there")
    parser.add_argument("--plot", type=Path, help="draw time and memory against length there (PNG)")
    parser.add_argument("--peak", choices=["dense", "lighthouse"], help="only print this side's peak memory in bytes")
    options = parser.parse_args()
    options.kv_heads = options.kv_heads or options.heads
    torch.set_num_threads(options.threads)
    if options.peak:
        print_peak(options)
        return

    copied = copy_speed(options.threads)
    results = {
        "command": " ".join(["python", *sys.argv]),
        "device": f"{machine()}, {options.threads} threads",
        "versions": {
            "lighthouse": lighthouse.__version__,
            "torch": torch.__version__,
            "python": platform.python_version(),
        },
        "copy_bytes_per_second": copied,
        "error_of_dense": {},
        "rows": [],
    }
    print(f"{results['device']}; torch {torch.__version__}; a copy moves {copied / 1e9:.1f} GB/s")
    for dtype_name in options.dtype:
        dtype = getattr(torch, dtype_name)
        error = results["error_of_dense"][dtype_name] = check(dtype, options.pool_ratios, options.select_topk)
        print(f"\n{dtype_name}: error against float64 is {error:.2f} of dense attention's\n{HEADER}", flush=True)
        rows = []
        for tokens in options.tokens:
            rows.append(measure(tokens, options, dtype))
            print(line(rows[-1]), flush=True)
            results["rows"] = [r for r in results["rows"] if r not in rows] + rows
            if options.json:  # after each row: a long run that is stopped keeps what it has
                options.json.write_text(json.dumps(results, indent=1) + "\n")
        print("\n" + markdown(rows))
        last = rows[-1]
        print(f"\n{last['tokens']:,} tokens, each operator alone:")
        for name, verb in last["verbs"].items():
            speed = verb["bytes"] / verb["seconds"]
            print(
                f"  {name:18} {verb['seconds'] * 1e3:8.2f} ms {speed / 1e9:6.1f} GB/s {speed / copied:6.1%} of a copy"
            )
    if options.plot:
        plot(results, options.plot)
        print(f"\n{options.plot}")


if __name__ == "__main__":
    main()
