"""The next-token loss and its gradients: logits and cross entropy, ours, and torch's fused one; time and peak memory.

    python bench/loss.py --json loss.json
    python bench/loss.py --tokens 98304 --vocabulary 128256 --width 4096 --dtype bfloat16 --device cuda --json loss.json

From hidden states and the output layer's weight to the mean loss and the gradients of both. "logits" is what
Transformers does: all logits, in float32 the cross entropy. "lighthouse" is `next_token_loss`, which a wrapped model
uses. "torch" is `linear_cross_entropy` with `allow_retain_graph=True`, where torch has it (2.15); by default it would
make all logits. The dtype "autocast" is float32 under bfloat16 autocast, as Trainer has it with `--bf16`.

First the loss and both gradients of each side are compared with float64, at `--check-tokens` and the given vocabulary
and width: our error may be at most twice that of the plain side; torch's error is only printed. A side
that does not fit into memory is reported and left out.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from contextlib import nullcontext
from pathlib import Path

import setting
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lighthouse.huggingface.loss import IGNORE_INDEX, next_token_loss
from lighthouse.speed.measure import median_seconds, peak_bytes

GIB = 1 << 30
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "autocast": torch.float32}


def logits_loss(layer: nn.Linear, hidden: Tensor, targets: Tensor) -> Tensor:
    return F.cross_entropy(layer(hidden).float(), targets, ignore_index=IGNORE_INDEX)


def our_loss(layer: nn.Linear, hidden: Tensor, targets: Tensor) -> Tensor:
    return next_token_loss(layer, hidden[None], None, shift_labels=targets[None])


def torch_loss(layer: nn.Linear, hidden: Tensor, targets: Tensor) -> Tensor:
    options = torch.nn.LinearCrossEntropyOptions(allow_retain_graph=True)
    return F.linear_cross_entropy(hidden, layer.weight, targets, ignore_index=IGNORE_INDEX, options=options)


SIDES = {"logits": logits_loss, "lighthouse": our_loss}
if hasattr(torch.nn, "LinearCrossEntropyOptions"):
    SIDES["torch"] = torch_loss


class Problem:
    """Random hidden states, targets of which a tenth is ignored, and an output layer; the same for every side."""

    def __init__(self, tokens: int, options):
        device, dtype = options.device, DTYPES[options.dtype]
        generator = torch.Generator(device).manual_seed(0)
        self.autocast = options.dtype == "autocast"
        self.hidden = torch.randn(tokens, options.width, generator=generator, device=device, dtype=dtype)
        self.hidden.requires_grad_()
        self.targets = torch.randint(0, options.vocabulary, (tokens,), generator=generator, device=device)
        self.targets[torch.rand(tokens, generator=generator, device=device) < 0.1] = IGNORE_INDEX
        self.layer = nn.Linear(options.width, options.vocabulary, bias=False, device=device, dtype=dtype)
        with torch.no_grad():  # logits of a spread of about two, as in a model that has learnt something
            self.layer.weight.normal_(0.0, 2 / options.width**0.5, generator=generator)

    def run(self, side: str, tokens: int | None = None) -> tuple[Tensor, ...]:
        """The loss and the gradients of hidden states and weight, of the first `tokens`."""
        hidden = self.hidden.detach()[:tokens].requires_grad_()
        context = torch.autocast(hidden.device.type, torch.bfloat16) if self.autocast else nullcontext()
        with context:
            loss = SIDES[side](self.layer, hidden, self.targets[:tokens])
        return loss.detach(), *torch.autograd.grad(loss, (hidden, self.layer.weight))

    def true(self) -> tuple[Tensor, ...]:
        """The same in float64, on the CPU."""
        hidden, weight = (
            tensor.detach().cpu().double().requires_grad_() for tensor in (self.hidden, self.layer.weight)
        )
        loss = F.cross_entropy(F.linear(hidden, weight), self.targets.cpu(), ignore_index=IGNORE_INDEX)
        return loss.detach(), *torch.autograd.grad(loss, (hidden, weight))


def check(options) -> dict:
    """The relative errors against float64. Exits if ours are more than twice those of plain logits."""
    problem = Problem(options.check_tokens, options)
    true = problem.true()
    errors = {}
    for side in SIDES:
        found = [tensor.cpu().double() for tensor in problem.run(side)]
        pairs = zip(("loss", "hidden", "weight"), found, true, strict=True)
        errors[side] = {name: ((a - b).norm() / b.norm()).item() for name, a, b in pairs}
    for name, error in errors["lighthouse"].items():
        if not error <= 2 * errors["logits"][name] + 1e-6:
            sys.exit(f"{name}: error {error:.2e} where plain logits have {errors['logits'][name]:.2e}: not timed")
    return errors


def peak(side: str, options) -> tuple[int, float]:
    """Peak bytes of one call beyond hidden states, targets and weight, the gradients included; and its seconds."""
    problem = Problem(options.tokens, options)
    problem.run(side, 64)  # one-time set-up is not part of the loss
    start = time.perf_counter()
    found = peak_bytes(lambda: problem.run(side), options.device)
    return found, time.perf_counter() - start


def peak_in_own_process(side: str, options) -> tuple[int, float] | None:
    """The same in a separate process, which may be killed if it runs out of memory; then None."""
    command = [sys.executable, __file__, "--peak", side]
    for name in ("tokens", "vocabulary", "width", "dtype", "device", "threads"):
        command += [f"--{name}", str(getattr(options, name))]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode == -9 or "can't allocate memory" in done.stderr:
        return None
    if done.returncode:
        sys.exit(done.stderr)
    size, seconds = done.stdout.split()[-2:]
    return int(size), float(seconds)


def measure(side: str, options) -> dict:
    on_gpu = options.device == "cuda"
    try:
        found = peak(side, options) if on_gpu else peak_in_own_process(side, options)
        if found is None:
            return {}
        row = {"peak_bytes": found[0]}
        if not on_gpu and found[1] > options.budget / 2:
            return row | {"seconds": found[1]}
        problem = Problem(options.tokens, options)
        limits = {"repeats": options.repeats, "budget": options.budget}
        return row | {"seconds": median_seconds(lambda: problem.run(side), options.device, **limits)}
    except torch.OutOfMemoryError:
        return {}
    finally:
        if on_gpu:
            torch.cuda.empty_cache()


def line(side: str, row: dict, errors: dict) -> str:
    cells = [f"{1e3 * row['seconds']:,.1f} ms", f"{row['peak_bytes'] / GIB:,.2f} GiB"] if row else ["does not fit"] * 2
    cells += [f"{errors[name]:.1e}" for name in ("loss", "hidden", "weight")]
    return f"| {side} | " + " | ".join(cells) + " |"


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=16_384)
    parser.add_argument("--vocabulary", type=int, default=32_768)
    parser.add_argument("--width", type=int, default=256, help="numbers in a hidden state (default 256)")
    parser.add_argument("--dtype", choices=list(DTYPES), help="default: float32; on a GPU bfloat16")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--check-tokens", type=int, default=2500, help="tokens compared with float64 (default 2,500)")
    parser.add_argument("--threads", type=int, default=2, help="of the CPU (default 2)")
    parser.add_argument("--repeats", type=int, default=5, help="timed calls of each side at most (default 5)")
    parser.add_argument("--budget", type=float, default=30.0, help="seconds for each side's calls, about (default 30)")
    parser.add_argument("--json", type=Path, help="write the results to this file, after each side")
    parser.add_argument("--peak", choices=list(SIDES), help="only print this side's peak memory in bytes")
    options = parser.parse_args()
    options.dtype = options.dtype or ("bfloat16" if options.device == "cuda" else "float32")
    return options


def main() -> None:
    options = arguments()
    torch.set_num_threads(options.threads)
    if options.peak:
        print(*peak(options.peak, options))
        return
    names = ("tokens", "vocabulary", "width", "dtype", "check_tokens")
    results = {
        "command": setting.command(),
        "device": setting.device_name(options.device),
        "versions": setting.versions(options.device),
        "settings": {name: getattr(options, name) for name in names},
    }
    print(f"{results['device']}; torch {torch.__version__}; " + ", ".join(f"{n} {getattr(options, n)}" for n in names))
    results["errors"] = errors = check(options)
    print(
        "\n| | time | peak memory | error: loss | of hidden's gradient | of weight's |\n|---|---:|---:|---:|---:|---:|"
    )
    for side in SIDES:
        results[side] = measure(side, options)
        print(line(side, results[side], errors[side]), flush=True)
        if options.json:
            options.json.write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main()
