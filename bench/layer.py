"""One attention layer, forward and backward: dense against Lighthouse, time and peak memory.

    python bench/layer.py --json layer.json --plot layer.png
    python bench/layer.py --tokens 98304 262144                          # on a GPU: cuDNN's attention is "dense"
    python bench/layer.py --device cpu --tokens 2048 8192 --dtype float32 --threads 2

First a result is checked, then at each length both sides are timed in turn in the same process. "Inner" is the
attention of the sub-sequence alone, the most that this method can save; "beside inner" is the rest of Lighthouse's
time. On a GPU everything up to 131,072 tokens is timed a second time as a CUDA graph, which has no launch costs. Each
operator is timed alone, too, beside the bytes that it must move; on a GPU always in a graph.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from pathlib import Path

import setting
import torch
from sides import check, dense, leaves
from timing import copy_speed, peak_bytes
from torch.nn.attention import SDPBackend

import lighthouse
from lighthouse.core.inner import SubSequences, causal_sdpa
from lighthouse.core.method import check_pool_ratios, check_select_topk
from lighthouse.core.operators import memory_order
from lighthouse.speed.measure import alternating_seconds, captured, median_seconds

MIB = 1024 * 1024
GRAPH_TOKENS = 131_072  # beyond, launches are nothing beside the work

DEFAULTS = {
    "cpu": {
        "tokens": [2048, 4096, 8192, 16_384, 32_768],
        "dtype": ["float32", "bfloat16"],
        "heads": 4,
        "head_dim": 64,
        "repeats": 5,
        "budget": 30.0,
    },
    "cuda": {
        "tokens": [4096, 8192, 32_768, 98_304, 262_144, 524_288, 1_048_576],
        "dtype": ["bfloat16"],
        "heads": 8,
        "head_dim": 128,
        "repeats": 20,
        "budget": 4.0,
    },
}


def peak_in_own_process(side, tokens, options, dtype_name) -> tuple[int, float]:
    """Peak bytes of one side, where nothing has been allocated before and freed memory goes back at once.

    The seconds of that one call, too: for lengths at which a call takes minutes.
    """
    environment = os.environ | {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}
    command = [sys.executable, __file__, "--peak", side, "--tokens", str(tokens), "--dtype", dtype_name]
    for name in ("device", "heads", "kv_heads", "head_dim", "threads", "select_topk"):
        command += [f"--{name.replace('_', '-')}", str(getattr(options, name))]
    command += ["--pool-ratios", *map(str, options.pool_ratios)]
    printed = subprocess.run(command, env=environment, check=True, capture_output=True, text=True).stdout.split()
    return int(printed[0]), float(printed[1])


def peak(side, tokens, options, dtype, *, held=False) -> tuple[int, float]:
    """Peak bytes of one call and its seconds, here. As in a model, the output is used by what follows and not held.

    `held`: the output stays until the gradients are there, and its gradient is one that was there before.
    """
    inputs, grad = leaves(tokens, options.heads, options.kv_heads, options.head_dim, dtype, options.device)
    attention = {"dense": dense, "lighthouse": ours(options)}[side]

    def run(tensors, gradient):
        if not held:
            torch.autograd.grad((attention(*tensors) * gradient).sum(), tensors)
            return
        output = attention(*tensors)
        torch.autograd.grad(output, tensors, gradient)

    few = [tensor.detach()[:, :, :64].requires_grad_() for tensor in inputs]
    run(few, grad[:, :, :64])  # what is set up once is not the layer's
    start = time.perf_counter()
    found = peak_bytes(lambda: run(inputs, grad), options.device)
    return found, time.perf_counter() - start


def ours(options):
    def attention(query, key, value):
        return lighthouse.attention(query, key, value, pool_ratios=options.pool_ratios, select_topk=options.select_topk)

    return attention


def times(sides: dict, options) -> dict:
    """Seconds of forward and backward and of the forward pass alone; as CUDA graphs where launches matter.

    `sides` are attentions, inputs and gradients by name. They are called in turn, for the difference between them.
    """

    def both(attention, inputs, grad):
        return lambda: torch.autograd.grad(attention(*inputs), inputs, grad)

    def forward(attention, inputs, grad):
        def run():
            with torch.no_grad():
                attention(*inputs)

        return run

    limits = {"repeats": options.repeats, "budget": options.budget}
    short = all(inputs[0].shape[2] <= GRAPH_TOKENS for _, inputs, _ in sides.values())
    found = {}
    for what, make in (("seconds", both), ("forward_seconds", forward)):
        runs = [make(*side) for side in sides.values()]
        kinds = {what: runs}
        if options.device == "cuda" and short:
            kinds[f"graph_{what}"] = [captured(run) for run in runs]
        for kind, calls in kinds.items():
            measured = alternating_seconds(calls, options.device, **limits)
            found |= {f"{name}_{kind}": seconds for name, seconds in zip(sides, measured, strict=True)}
    return found


def operators(inputs, grad, inner, options) -> dict:
    """Each operator alone: seconds, and the bytes that it must move."""
    windows, topk = check_pool_ratios(options.pool_ratios), check_select_topk(options.select_topk)
    query, key, value = (tensor.detach() for tensor in inputs)
    ops = torch.ops.lighthouse
    scores = ops.score(query, key)
    mask, prefix = ops.select(*scores, windows, *topk, True)
    length = sub_length(query.shape[2], options)
    subs = ops.gather(query, key, value, mask, prefix, windows, length)
    output = inner(*subs)
    orders = [memory_order(tensor) for tensor in (query, key, value)]

    whole, part = ([tensor.nbytes for tensor in tensors] for tensors in ((query, key, value), subs))
    choice = mask.nbytes + prefix.nbytes
    calls = {
        "score": (lambda: ops.score(query, key), whole[0] + whole[1] + 2 * scores[0].nbytes),
        "select": (lambda: ops.select(*scores, windows, *topk, True), 2 * scores[0].nbytes + choice),
        "gather": (
            lambda: ops.gather(query, key, value, mask, prefix, windows, length),
            sum(whole) + sum(part) + choice,
        ),
        "scatter": (lambda: ops.scatter(output, mask, prefix, windows), whole[0] + part[0] + choice),
        "scatter_backward": (
            lambda: ops.scatter_backward(grad, mask, prefix, windows, length, memory_order(output)),
            whole[0] + part[0] + choice,
        ),
        "gather_backward": (
            lambda: ops.gather_backward(*subs, mask, prefix, windows, *orders),
            sum(whole) + sum(part) + choice,
        ),
    }

    def seconds(call):
        if options.device == "cuda":
            return median_seconds(captured(call, calls=10), "cuda", repeats=options.repeats, budget=1) / 10
        return median_seconds(call, "cpu", repeats=options.repeats, budget=10)

    with torch.no_grad():
        return {name: {"seconds": seconds(call), "bytes": moved} for name, (call, moved) in calls.items()}


def sub_length(tokens: int, options) -> int:
    return lighthouse.plan(tokens, pool_ratios=options.pool_ratios, select_topk=options.select_topk).length


def check_finite(tokens: int, inputs, grad, options) -> None:
    """`check` compares a short sequence; at this length at least nothing may be missing."""
    output = ours(options)(*inputs)
    for tensor in (output, *torch.autograd.grad(output, inputs, grad)):
        if not tensor.isfinite().all():
            sys.exit(f"{tokens:,} tokens: the output or a gradient is not finite: not timed")


def measure(tokens, options, dtype) -> dict:
    on_gpu = options.device == "cuda"
    inputs, grad = leaves(tokens, options.heads, options.kv_heads, options.head_dim, dtype, options.device)
    length = sub_length(tokens, options)
    layout = SubSequences(1, length)

    def inner(query, key, value):
        return causal_sdpa(query, key, value, scale=None, dropout_p=0.0, layout=layout)

    # As gather lays the inputs out, and the gradient like the output, which is what scatter_backward does.
    short = leaves(length, options.heads, options.kv_heads, options.head_dim, dtype, options.device)[0]
    short = [tensor.detach().contiguous().requires_grad_() for tensor in short]
    short_grad = torch.randn_like(inner(*short).detach())

    row = {"tokens": tokens, "dtype": str(dtype).removeprefix("torch."), "length": length}
    row["inner_backend"] = SDPBackend(
        torch._fused_sdp_choice(*short, None, 0.0, True, scale=None, enable_gqa=options.heads != options.kv_heads)
    ).name
    if on_gpu:
        check_finite(tokens, inputs, grad, options)
    sides = {
        "lighthouse": (ours(options), inputs, grad),
        "inner": (inner, short, short_grad),
        "dense": (dense, inputs, grad),
    }
    for names in (("lighthouse", "inner"), ("dense",)):
        print(f"  {tokens:,} tokens: {' and '.join(names)}", file=sys.stderr, flush=True)
        try:
            of_side = peak if on_gpu else peak_in_own_process
            memory, once = of_side(names[0], tokens, options, dtype if on_gpu else row["dtype"])
            row[f"{names[0]}_peak_bytes"] = memory
            if on_gpu and tokens <= GRAPH_TOKENS:
                row[f"{names[0]}_held_peak_bytes"], _ = peak(names[0], tokens, options, dtype, held=True)
            if names == ("dense",) and not on_gpu and once > 2 * options.budget:
                row["dense_seconds"] = once
                continue
            row |= times({name: sides[name] for name in names}, options)
        except torch.OutOfMemoryError:
            print(f"{tokens:,} tokens: {names[0]} does not fit into the memory", flush=True)
    print(f"  {tokens:,} tokens: each operator", file=sys.stderr, flush=True)
    row["operators"] = operators(inputs, grad, inner, options)
    derive(row)
    return row


def derive(row: dict) -> None:
    """What is said about the times: of eager mode, and of CUDA graphs where there are any."""
    for kind in ("", "graph_"):
        found = [row.get(f"{name}_{kind}seconds") for name in ("dense", "lighthouse", "inner")]
        if all(found):
            row[f"{kind}times_dense"] = found[0] / found[1]
        if all(found[1:]):
            row[f"{kind}beside_inner_seconds"] = found[1] - found[2]
    for kind in ("", "held_"):
        found = [row.get(f"{name}_{kind}peak_bytes") for name in ("dense", "lighthouse")]
        if all(found):
            row[f"{kind}peak_of_dense"] = found[1] / found[0]


def ms(seconds: float) -> str:
    return f"{1e3 * seconds:,.2f} ms"


def mib(size: float) -> str:
    return f"{size / MIB:,.1f} MiB"


COLUMNS = [
    ("tokens", "tokens", "{:,}".format),
    ("dense", "dense_seconds", ms),
    ("Lighthouse", "lighthouse_seconds", ms),
    ("inner alone", "inner_seconds", ms),
    ("times dense", "times_dense", "{:.2f}".format),
    ("beside inner", "beside_inner_seconds", ms),
    ("forward: dense", "dense_forward_seconds", ms),
    ("Lighthouse", "lighthouse_forward_seconds", ms),
    ("graph: dense", "dense_graph_seconds", ms),
    ("Lighthouse", "lighthouse_graph_seconds", ms),
    ("times dense", "graph_times_dense", "{:.2f}".format),
    ("beside inner", "graph_beside_inner_seconds", ms),
    ("peak: dense", "dense_peak_bytes", mib),
    ("Lighthouse", "lighthouse_peak_bytes", mib),
    ("of dense's", "peak_of_dense", "{:.2f}".format),
    ("output held", "held_peak_of_dense", "{:.2f}".format),
]


def columns(device: str) -> list:
    return [column for column in COLUMNS if device == "cuda" or "graph" not in column[1]]


def header(device: str) -> str:
    names = [name for name, _, _ in columns(device)]
    return "| " + " | ".join(names) + " |\n|" + "---:|" * len(names)


def line(row: dict, device: str) -> str:
    cells = [form(row[name]) if name in row else "-" for _, name, form in columns(device)]
    return "| " + " | ".join(cells) + " |"


def operator_table(row: dict, copied: float) -> str:
    lines = ["| operator | bytes moved | time | GB/s | of a copy |", "|---|---:|---:|---:|---:|"]
    for name, found in row["operators"].items():
        speed = found["bytes"] / found["seconds"]
        lines.append(
            f"| `{name}` | {found['bytes'] / 1e6:,.1f} MB | {1e3 * found['seconds']:,.3f} ms | {speed / 1e9:,.1f}"
            f" | {speed / copied:.0%} |"
        )
    return "\n".join(lines)


def plot(results, path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, 3, figsize=(14, 4), constrained_layout=True)
    sides = {"dense": ("tab:gray", "o", "dense"), "lighthouse": ("tab:orange", "s", "Lighthouse")}
    dtypes = list(dict.fromkeys(row["dtype"] for row in results["rows"]))
    for dtype, dash in zip(dtypes, ("-", "--", ":"), strict=False):
        rows = [row for row in results["rows"] if row["dtype"] == dtype]

        def draw(axis, name, scale=1.0, dash=dash, rows=rows, **style):
            points = [(row["tokens"], row[name] * scale) for row in rows if name in row]
            if points:
                axis.plot(*zip(*points, strict=True), dash, **style)

        for side, (color, marker, label) in sides.items():
            style = {"color": color, "marker": marker, "label": f"{label}, {dtype}"}
            draw(axes[0], f"{side}_seconds", 1e3, **style)
            draw(axes[2], f"{side}_peak_bytes", 1 / MIB, **style)
        draw(axes[1], "times_dense", color="tab:orange", marker="s", label=f"eager, {dtype}")
        draw(axes[1], "graph_times_dense", color="tab:blue", marker="^", label=f"CUDA graph, {dtype}")
    titles = ("time", "ms"), ("times as fast as dense", ""), ("peak memory beyond the inputs", "MiB")
    for axis, (title, unit) in zip(axes, titles, strict=True):
        axis.set(yscale="log" if unit else "linear", xlabel="tokens", ylabel=unit, title=title)
        axis.set_xscale("log", base=2)
        axis.xaxis.set_major_formatter(lambda tokens, _: f"{tokens:,.0f}")
        axis.tick_params(axis="x", labelrotation=30)
        axis.grid(alpha=0.3)
        axis.legend()
    axes[1].axhline(1, color="tab:gray", linewidth=1)
    figure.suptitle(f"One attention layer, forward and backward, on {results['device']}")
    figure.savefig(path, dpi=120)


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=list(DEFAULTS), default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--tokens", type=int, nargs="+", help="default: 2,048 to 32,768; on a GPU 4,096 to 1,048,576")
    parser.add_argument(
        "--dtype",
        nargs="+",
        choices=["float32", "bfloat16", "float16"],
        help="default: float32 and bfloat16; on a GPU bfloat16",
    )
    parser.add_argument("--heads", type=int, help="query heads (default 4; on a GPU 8)")
    parser.add_argument("--kv-heads", type=int, help="key-value heads (default: as many)")
    parser.add_argument("--head-dim", type=int, help="default 64; on a GPU 128")
    parser.add_argument("--pool-ratios", type=float, nargs="*", default=[1 / 4, 1 / 16])
    parser.add_argument("--select-topk", type=lambda t: int(t) if t.isdigit() else float(t), default=1 / 64)
    parser.add_argument("--threads", type=int, default=2, help="of the CPU (default 2)")
    parser.add_argument("--repeats", type=int, help="timed calls of each side at most (default 5; on a GPU 20)")
    parser.add_argument("--budget", type=float, help="seconds for each side's calls, about (default 30; on a GPU 4)")
    parser.add_argument("--json", type=Path, help="write the results there, after each length")
    parser.add_argument("--plot", type=Path, help="draw time and memory against length there (PNG)")
    parser.add_argument("--peak", choices=["dense", "lighthouse"], help="only print this side's peak memory in bytes")
    options = parser.parse_args()
    for name, value in DEFAULTS[options.device].items():
        if getattr(options, name) is None:
            setattr(options, name, value)
    options.kv_heads = options.kv_heads or options.heads
    return options


def main() -> None:
    options = arguments()
    torch.set_num_threads(options.threads)
    if options.peak:
        print(*peak(options.peak, options.tokens[0], options, getattr(torch, options.dtype[0])))
        return

    copied = copy_speed(options.device)
    results = {
        "command": setting.command(),
        "device": setting.device_name(options.device),
        "versions": setting.versions(options.device),
        "settings": {
            name: getattr(options, name) for name in ("heads", "kv_heads", "head_dim", "pool_ratios", "select_topk")
        },
        "copy_bytes_per_second": copied,
        "error_of_dense": {},
        "rows": [],
    }
    print(f"{results['device']}; torch {torch.__version__}; a copy moves {copied / 1e9:,.1f} GB/s")
    for dtype_name in options.dtype:
        dtype = getattr(torch, dtype_name)
        settings = {"pool_ratios": options.pool_ratios, "select_topk": options.select_topk}
        error = check(dtype, options.device, head_dim=options.head_dim, **settings)
        results["error_of_dense"][dtype_name] = error
        print(f"\n{dtype_name}: error against float64 is {error:.2f} of dense attention's\n\n{header(options.device)}")
        for tokens in options.tokens:
            row = measure(tokens, options, dtype)
            print(line(row, options.device), flush=True)
            results["rows"].append(row)
            if options.json:  # after each row: a long run that is stopped keeps what it has
                options.json.write_text(json.dumps(results, indent=1) + "\n")
            if options.device == "cuda":
                torch.cuda.empty_cache()  # what one length has left in pieces is in the way of the next
    for row in results["rows"]:
        print(f"\n{row['tokens']:,} tokens, {row['dtype']}, each operator alone:\n\n{operator_table(row, copied)}")
    if options.plot:
        plot(results, options.plot)
        print(f"\n{options.plot}")


if __name__ == "__main__":
    main()
