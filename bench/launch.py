"""What one call costs the host: microseconds by part, on tensors so small that nothing else counts.

    python bench/launch.py --json launch.json

This limits short lengths: a GPU waits for its next kernel. On CUDA a call is timed until it returns, without
waiting for the device, which is done long before; on a CPU the little work on the tensors is in the figures. Each
figure is the minimum of several loops. The parts do not add up to the whole: autograd's engine is between them.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path

import setting
import torch
import torch.nn.functional as F

import lighthouse
from lighthouse.core import operators
from lighthouse.core.inner import causal_sdpa
from lighthouse.core.inputs import check_qkv
from lighthouse.core.sequences import Sequences


def microseconds(call, *, loops: int = 7, calls: int = 200) -> float:
    """The time of one call: the minimum over several loops, since disturbances only add time."""
    for _ in range(20):
        call()
    best = float("inf")
    for _ in range(loops):
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        start = time.perf_counter()
        for _ in range(calls):
            call()
        best = min(best, (time.perf_counter() - start) / calls)
    return best * 1e6


def parts(query, key, value, grad) -> dict[str, float]:
    """Name of a part: microseconds."""
    method = lighthouse.Method()
    sequences = Sequences(method, query.shape[0], query.shape[2])
    selection, layout = operators.choose(query, key, sequences, None), sequences.sub
    windows, topk, length = method.windows, method.topk, selection.length
    subs = operators.gather(query, key, value, selection)

    def inner(q, k, v):
        return causal_sdpa(q, k, v, scale=None, dropout_p=0.0, layout=layout)

    def dense(q, k, v):
        return F.scaled_dot_product_attention(q, k, v, is_causal=True)

    def both(attention, inputs, gradient):
        def run():
            for tensor in inputs:
                tensor.grad = None
            attention(*inputs).backward(gradient)

        return run

    inputs = (query, key, value)
    short = [tensor.detach().clone().requires_grad_() for tensor in subs]
    grad_sub = torch.randn_like(short[0])
    choice = (selection.mask, selection.prefix, windows)
    orders = [operators.memory_order(tensor) for tensor in inputs]
    ops, below = torch.ops.lighthouse, operators.without_gradient
    scores = ops.score(query.detach(), key.detach())
    return {
        "settings": microseconds(lighthouse.Method),
        "sub-sequence's length": microseconds(lambda: sequences.length),
        "checks of the tensors": microseconds(lambda: check_qkv(*inputs)),
        "score": microseconds(lambda: below(ops.score, query, key)),
        "select": microseconds(lambda: below(ops.select, *scores, windows, *topk, True)),
        "gather": microseconds(lambda: below(ops.gather, *inputs, *choice, length)),
        "gather, recorded": microseconds(lambda: operators.gather(*inputs, selection)),
        "gather, recorded by register_autograd": microseconds(lambda: ops.gather(*inputs, *choice, length)),
        "inner": microseconds(lambda: inner(*short)),
        "scatter": microseconds(lambda: below(ops.scatter, short[0], *choice)),
        "scatter, recorded": microseconds(lambda: operators.scatter(short[0], selection)),
        "scatter, recorded by register_autograd": microseconds(lambda: ops.scatter(short[0], *choice)),
        "scatter_backward": microseconds(lambda: below(ops.scatter_backward, grad, *choice, length, orders[0])),
        "gather_backward": microseconds(lambda: below(ops.gather_backward, *short, *choice, *orders)),
        "inner, forward and backward": microseconds(both(inner, short, grad_sub)),
        "Lighthouse, forward": microseconds(lambda: lighthouse.attention(*inputs)),
        "Lighthouse, forward and backward": microseconds(both(lighthouse.attention, inputs, grad)),
        "dense, forward": microseconds(lambda: dense(*inputs)),
        "dense, forward and backward": microseconds(both(dense, inputs, grad)),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--json", type=Path, help="write the results to this file")
    options = parser.parse_args()
    torch.set_num_threads(1)

    on_cuda = torch.device(options.device).type == "cuda"
    make = {"device": options.device, "dtype": torch.bfloat16 if on_cuda else torch.float32}
    query, key, value, grad = (torch.randn(1, options.tokens, 2, 64, **make).transpose(1, 2) for _ in range(4))
    found = parts(*(tensor.requires_grad_() for tensor in (query, key, value)), grad)
    kind = "cuda" if on_cuda else "cpu"
    device = setting.device_name(kind)
    print(f"{device}, torch {torch.__version__}: host microseconds of one call, {options.tokens} tokens")
    for name, time_ in found.items():
        print(f"  {name:40} {time_:8.1f}")
    if options.json:
        results = {
            "command": setting.command(),
            "device": device,
            "versions": setting.versions(kind),
            "tokens": options.tokens,
            "microseconds": found,
        }
        options.json.write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main()
