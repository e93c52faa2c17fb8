"""Two builds of the native library, operator by operator: the same bits, and which is faster.

    python bench/operators.py LIBRARY_BEFORE LIBRARY_AFTER [--device cuda] [--out FILE]

Each library runs in its own process, since both register torch.ops.lighthouse.*; the two take turns, so that a
drifting clock affects both alike. An operator's outputs are compared bit by bit before it is timed. Needs torch alone.
"""

from __future__ import annotations

import argparse
import ctypes
import hashlib
import json
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch

WINDOWS = [1, 4, 16]
TOPK = (1, 64)
TOKENS = (8192, 98304)
ORDER = [0, 2, 1, 3]  # gradients as a model's inputs are: [batch, tokens, heads, head_dim] in memory


def operators(tokens: int, heads: int, head_dim: int, dtype: torch.dtype, device: str) -> dict[str, Callable]:
    """Every operator with its arguments, as a layer passes them on."""
    ops = torch.ops.lighthouse
    generator = torch.Generator().manual_seed(tokens)  # the host's: the same numbers for both libraries

    def rand(count: int) -> torch.Tensor:
        x = torch.randn(1, count, heads, head_dim, generator=generator)
        return x.to(device=device, dtype=dtype).transpose(1, 2)

    query, key, value, grad = (rand(tokens) for _ in range(4))
    scores = ops.score(query, key)
    choice = ops.select(*scores, WINDOWS, *TOPK, True)
    length = int(choice[1][0, 0, -1]) + int(choice[0][0, 0, -1]).bit_count()
    sub = ops.gather(query, key, value, *choice, WINDOWS, length)
    return {
        "score": lambda: ops.score(query, key),
        "select": lambda: ops.select(*scores, WINDOWS, *TOPK, True),
        "gather": lambda: ops.gather(query, key, value, *choice, WINDOWS, length),
        "gather_backward": lambda: ops.gather_backward(*sub, *choice, WINDOWS, ORDER, ORDER, ORDER),
        "scatter": lambda: (ops.scatter(sub[0], *choice, WINDOWS),),
        "scatter_backward": lambda: (ops.scatter_backward(grad, *choice, WINDOWS, length, [0, 1, 2, 3]),),
    }


def digest(tensors: tuple[torch.Tensor, ...]) -> str:
    """A hash of the bytes of all outputs and of their layout in memory."""
    sha = hashlib.sha256()
    for tensor in tensors:
        sha.update(repr((tensor.dtype, tuple(tensor.shape), tensor.stride())).encode())
        host = tensor.cpu().contiguous()
        sha.update(ctypes.string_at(host.data_ptr(), host.nbytes))
    return sha.hexdigest()


def timed(run: Callable, device: str, calls: int) -> Callable[[], float]:
    """A function that gives the milliseconds of a call: on CUDA of `calls` calls in a graph, without the launches."""
    if device != "cuda":

        def on_cpu() -> float:
            start = time.perf_counter()
            for _ in range(calls):
                run()
            return (time.perf_counter() - start) / calls * 1e3

        return on_cpu
    graph = torch.cuda.CUDAGraph()
    torch.cuda.synchronize()
    with torch.cuda.graph(graph):
        for _ in range(calls):
            run()

    def on_cuda() -> float:
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        graph.replay()
        end.record()
        end.synchronize()
        return start.elapsed_time(end) / calls

    return on_cuda


def serve(options: argparse.Namespace) -> None:
    """The process of one library: does what each line of standard input asks for, and answers with a line."""
    torch.ops.load_library(options.serve)
    table: dict[str, Callable] = {}
    timer: Callable[[], float] | None = None
    for line in sys.stdin:
        command, *words = line.split()
        if command == "tokens":
            timer, table = None, {}
            table = operators(
                int(words[0]), options.heads, options.head_dim, getattr(torch, options.dtype), options.device
            )
            answer: object = list(table)
        elif command == "digest":
            answer = digest(table[words[0]]())
        elif command == "warm":
            timer = timed(table[words[0]], options.device, options.calls)
            answer = timer()
        else:
            assert timer is not None
            answer = timer()
        print(json.dumps(answer), flush=True)


class Library:
    def __init__(self, path: Path, options: argparse.Namespace):
        words = [f"--{name}={getattr(options, name)}" for name in ("device", "dtype", "heads", "calls")]
        self.process = subprocess.Popen(
            [sys.executable, __file__, f"--serve={path}", f"--head-dim={options.head_dim}", *words],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def ask(self, *words: object):
        assert self.process.stdin is not None and self.process.stdout is not None
        self.process.stdin.write(" ".join(map(str, words)) + "\n")
        self.process.stdin.flush()
        answer = self.process.stdout.readline()
        if not answer:
            sys.exit(f"a library's process ended at {' '.join(map(str, words))}: its error is above")
        return json.loads(answer)


def compare(before: Library, after: Library, options: argparse.Namespace) -> dict[str, dict]:
    results: dict[str, dict] = {}
    for tokens in options.tokens:
        names, _ = before.ask("tokens", tokens), after.ask("tokens", tokens)
        for name in names:
            same = before.ask("digest", name) == after.ask("digest", name)
            times: dict[str, list[float]] = {"before": [], "after": []}
            for library in (before, after):
                library.ask("warm", name)
            for turn in range(options.repeats):
                # The order changes: what the first leaves in caches and clocks affects each as often.
                sides = [("before", before), ("after", after)]
                for side, library in sides if turn % 2 == 0 else reversed(sides):
                    times[side].append(library.ask("time"))
            medians = {side: statistics.median(values) for side, values in times.items()}
            ratio = medians["after"] / medians["before"]
            results[f"{tokens} {name}"] = {
                **{f"{side}_ms": round(value, 5) for side, value in medians.items()},
                "ratio": round(ratio, 4),
                "same_bits": same,
            }
            bits = "the same bits" if same else "OTHER BITS"
            print(
                f"{tokens:>7} {name:<17} {medians['before']:9.4f} {medians['after']:9.4f} ms  {ratio:6.3f}  {bits}",
                flush=True,
            )
    return results


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("libraries", nargs="*", type=Path, metavar="LIBRARY", help="the one before, the one after")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--tokens", type=int, nargs="+", default=list(TOKENS))
    parser.add_argument("--heads", type=int, default=8)
    parser.add_argument("--head-dim", type=int, default=128)
    parser.add_argument("--repeats", type=int, default=31, help="turns of each library; the median is reported")
    parser.add_argument("--calls", type=int, default=10, help="calls of an operator a turn")
    parser.add_argument("--out", type=Path, help="JSON file to write")
    parser.add_argument("--serve", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.serve:
        return serve(options)
    if len(options.libraries) != 2:
        parser.error("two libraries are needed: the one before and the one after")

    before, after = (Library(path.resolve(strict=True), options) for path in options.libraries)
    report = {
        "device": torch.cuda.get_device_name() if options.device == "cuda" else platform.processor() or "cpu",
        "versions": {"torch": torch.__version__, "cuda": torch.version.cuda, "python": platform.python_version()},
        "command": " ".join(["python", *sys.argv]),
        "what": f"milliseconds a call, {options.calls} calls a turn, medians of {options.repeats} turns; "
        f"{options.dtype}, batch 1, {options.heads} heads of {options.head_dim}, "
        f"windows {WINDOWS}, select_topk={TOPK[0]}/{TOPK[1]}",
        "results": compare(before, after, options),
    }
    if options.out:
        options.out.write_text(json.dumps(report, indent=1) + "\n")
    if not all(result["same_bits"] for result in report["results"].values()):
        sys.exit("the two libraries differ in bits")


if __name__ == "__main__":
    main()
