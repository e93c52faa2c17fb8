"""Two equal trainings of a 38M-parameter model of bytes: dense, and Lighthouse first and dense after that.

    python bench/corpus.py FOLDER ... --output corpus.xz        # the text, once; see its --help
    python bench/quality.py --corpus corpus.xz --seed 0 --json quality-0.json
    python bench/quality.py --report quality-0.json quality-1.json --plot quality.png

Both sides start from the same weights and see the same sequences in the same order. The dense loss on
held-out text is compared: at the end, and the seconds until the two-stage run reaches dense's final loss. Compilation,
warm-up and evaluation are outside those seconds.

The model: width 512, 12 layers, 4 heads of 128, feed-forward 1408, RMSNorm, SwiGLU, RoPE base 10,000, 256 bytes as
vocabulary, embedding not tied: 38.8M parameters. The recipe: AdamW (0.9, 0.95), weight decay 0.1 on matrices, learning
rate 1e-3 with 5 % warm-up and cosine to a tenth over both stages, gradients clipped at 1.0, one sequence a step, bf16
autocast over float32 weights. Lighthouse: the defaults, the outer two layers at each end dense, 62.5 % of the steps.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import math
import sys
import time
from dataclasses import asdict
from pathlib import Path

import setting
import torch
from corpus import read
from sides import check, dense, lighthouse_attention
from small_model import Model, Shape, compiled_graphs, new_model, new_optimizer

SIDES = ("dense", "two-stage")
FIRST_STAGE = 0.625  # of the steps
HELD_OUT = 8  # sequences, from the text's end
LEARNING_RATE, WARM_UP, CLIP = 1e-3, 0.05, 1.0


class Text:
    """Sequences of `tokens` bytes and their targets, on the device: training ones by step, and held-out ones."""

    def __init__(self, text: bytes, tokens: int, steps: int, seed: int, device: str):
        self.bytes = torch.frombuffer(bytearray(text), dtype=torch.uint8).to(device)
        self.tokens = tokens
        training = len(text) - HELD_OUT * tokens - 1
        count = (training - 1) // tokens
        if count < 1:
            sys.exit(f"the text has {len(text):,} bytes: at least {(HELD_OUT + 1) * tokens + 2:,} are needed")
        self.held_out = [training + i * tokens for i in range(HELD_OUT)]
        generator = torch.Generator().manual_seed(seed)
        passes = [torch.randperm(count, generator=generator) for _ in range(math.ceil(steps / count))]
        self.training = (torch.cat(passes)[:steps] * tokens).tolist()

    def at(self, start: int) -> tuple[torch.Tensor, torch.Tensor]:
        end = start + self.tokens
        return self.bytes[None, start:end].long(), self.bytes[None, start + 1 : end + 1].long()


def learning_rate(step: int, steps: int) -> float:
    """The learning rate of step `step`, counted from 0."""
    warm_up = max(1, round(WARM_UP * steps))
    if step < warm_up:
        return LEARNING_RATE * (step + 1) / warm_up
    done = (step - warm_up) / max(1, steps - warm_up)
    return LEARNING_RATE * (0.1 + 0.9 * (1 + math.cos(math.pi * done)) / 2)


def evaluation_steps(side: str, options) -> set[int]:
    """Every `--curve` steps, and every `--every` steps from the switch on, to find the crossing."""
    steps, switch = options.steps, int(FIRST_STAGE * options.steps)
    if side == "dense":
        return {*range(0, steps, options.curve), steps}
    return {*range(0, switch, options.curve), *range(switch, steps, options.every), steps}


def loss_of(model: Model, batch, attention) -> torch.Tensor:
    with torch.autocast(batch[0].device.type, torch.bfloat16):
        return model(*batch, attention)


def digest(model: Model) -> str:
    """sha256 of all weights: shows that both sides begin alike, also if they are trained in separate calls."""
    found = hashlib.sha256()
    for parameter in model.parameters():
        found.update(parameter.detach().cpu().numpy().tobytes())
    return found.hexdigest()


@torch.no_grad()
def held_out_loss(model: Model, text: Text) -> float:
    return sum(loss_of(model, text.at(start), dense).double() for start in text.held_out).item() / HELD_OUT


def train(side: str, text: Text, options, others_weights: str | None, save) -> None:
    """One training from fresh weights; `save(result)` after each evaluation."""
    model = new_model(shape(options), options.tokens, seed=options.seed, device=options.device)
    weights = digest(model)
    if others_weights not in (None, weights):
        sys.exit("the other side began with different weights: not compared")
    optimizer = new_optimizer(model, LEARNING_RATE)
    switch = 0 if side == "dense" else int(FIRST_STAGE * options.steps)

    print(f"{side}: {model.parameter_count() / 1e6:.1f}M parameters; compiling", flush=True)
    start = time.perf_counter()
    for attention in (dense,) if side == "dense" else (lighthouse_attention, dense):
        loss_of(model, text.at(0), attention).backward()  # gradients are thrown away: nothing is learned from this
    optimizer.zero_grad(set_to_none=True)
    row = {"step": 0, "seconds": 0.0, "loss": held_out_loss(model, text)}
    result = {"command": setting.command(), "switch": switch, "weights_sha256": weights}
    result["set_up_seconds"] = time.perf_counter() - start
    result["rows"] = [row]
    print(f"{side}: ready after {result['set_up_seconds']:.0f} s, held-out loss {row['loss']:.4f}", flush=True)

    evaluations, compiled = evaluation_steps(side, options), compiled_graphs()
    seconds, since, training_loss = 0.0, 0, torch.zeros((), device=options.device)
    setting.synchronize(options.device)
    start = time.perf_counter()
    for step in range(options.steps):
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, options.steps)
        loss = loss_of(model, text.at(text.training[step]), lighthouse_attention if step < switch else dense)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), CLIP)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        training_loss += loss.detach()
        if step + 1 not in evaluations:
            continue
        setting.synchronize(options.device)
        spent = time.perf_counter() - start
        seconds, steps = seconds + spent, step + 1 - since
        row = {
            "step": step + 1,
            "seconds": seconds,
            "loss": held_out_loss(model, text),
            "training_loss": training_loss.item() / steps,
            "stage": "lighthouse" if step < switch else "dense",
        }
        result["rows"].append(row)
        save(result)
        print(
            f"{side}: step {step + 1:>5,} of {options.steps:,} ({row['stage']}), {seconds:7.1f} s,"
            f" {1e3 * spent / steps:6.1f} ms a step, held-out loss {row['loss']:.4f},"
            f" training {row['training_loss']:.4f}",
            flush=True,
        )
        since = step + 1
        training_loss.zero_()
        setting.synchronize(options.device)
        start = time.perf_counter()
    result["compiled_while_timed"] = compiled_graphs() - compiled  # if not 0, the seconds include compilation
    result["finished"] = True
    save(result)


def compare(results: dict) -> dict | None:
    """The two figures, once both sides are finished."""
    if not all(results.get(side, {}).get("finished") for side in SIDES):
        return None
    one, two = (results[side]["rows"] for side in SIDES)
    aim = one[-1]["loss"]
    crossing = seconds_until(aim, [row for row in two if row["step"] >= results["two-stage"]["switch"]])
    return {
        "final_loss": {"dense": aim, "two-stage": two[-1]["loss"]},
        "loss_ratio": two[-1]["loss"] / aim,
        "seconds": {"dense": one[-1]["seconds"], "two-stage": two[-1]["seconds"], "two-stage until dense's": crossing},
        "times_dense": crossing and one[-1]["seconds"] / crossing,
    }


def seconds_until(aim: float, rows: list[dict]) -> float | None:
    """The seconds at which the loss first is `aim`, interpolated between evaluations; None if it never is."""
    if rows[0]["loss"] <= aim:
        return rows[0]["seconds"]
    for a, b in zip(rows, rows[1:], strict=False):
        if b["loss"] <= aim:
            return a["seconds"] + (b["seconds"] - a["seconds"]) * (a["loss"] - aim) / (a["loss"] - b["loss"])
    return None


def report(every: list[dict]) -> None:
    print("| seed | dense: loss | two-stage: loss | ratio | dense: s | two-stage: s | s until dense's loss | times |")
    print("|---:|---:|---:|---:|---:|---:|---:|---:|")
    compared = [(results["settings"]["seed"], compare(results)) for results in every]
    compared = [(seed, found) for seed, found in compared if found]
    for seed, found in compared:
        loss, seconds = found["final_loss"], found["seconds"]
        until, times = seconds["two-stage until dense's"], found["times_dense"]
        print(
            f"| {seed} | {loss['dense']:.4f} | {loss['two-stage']:.4f} | {found['loss_ratio']:.3f}"
            f" | {seconds['dense']:.1f} | {seconds['two-stage']:.1f}"
            + (f" | {until:.1f} | {times:.2f} |" if until else " | never | |")
        )
    if len(compared) > 1:
        ratio = sum(found["loss_ratio"] for _, found in compared) / len(compared)
        times = [found["times_dense"] for _, found in compared]
        times = f"{sum(times) / len(times):.2f}" if all(times) else ""
        print(f"| mean | | | {ratio:.3f} | | | | {times} |")


def plot(every: list[dict], path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, 2, figsize=(11, 4.2), sharey=True, constrained_layout=True)
    lowest = math.inf
    for results, dash in zip(every, ("-", "--", ":", "-.") * len(every), strict=False):
        for side, color in zip(SIDES, ("tab:gray", "tab:orange"), strict=True):
            if side not in results:
                continue
            rows = results[side]["rows"][1:]
            lowest = min(lowest, *(row["loss"] for row in rows))
            label = f"{side}, seed {results['settings']['seed']}"
            for axis, unit in zip(axes, ("step", "seconds"), strict=True):
                if side == "dense":
                    axis.axhline(rows[-1]["loss"], linestyle=dash, color=color, linewidth=0.7)
                axis.plot([row[unit] for row in rows], [row["loss"] for row in rows], dash, color=color, label=label)
                for row in rows:
                    if row["step"] == results[side]["switch"]:
                        axis.plot(row[unit], row["loss"], "v", color=color)
    for axis, unit in zip(axes, ("steps", "seconds of training"), strict=True):
        axis.set(xlabel=unit, ylim=(0.95 * lowest, lowest + 2.0), xlim=(0, None))
        axis.grid(alpha=0.3)
    axes[0].set_ylabel("held-out loss with dense attention, nats a byte")
    axes[0].legend()
    tokens, device = every[0]["settings"]["tokens"], every[0]["device"]
    figure.suptitle(f"Sequences of {tokens:,} bytes on one {device}; the mark is the switch to dense")
    figure.savefig(path, dpi=120)
    print(path)


def shape(options) -> Shape:
    return Shape(layers=options.layers, width=options.width, heads=options.heads, feed_forward=options.feed_forward)


def load(path: Path | None, head: dict) -> dict:
    """What another call has written for the same settings on the same device, or a new result."""
    if path is None or not path.exists():
        return dict(head)
    found = json.loads(path.read_text())
    for name, value in head.items():
        if found.get(name) != value:
            sys.exit(f"{path} is from another run: its {name} is {found.get(name)}, here {value}; name another file")
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--corpus", type=Path, help="the text: a file, or an xz-compressed one")
    parser.add_argument("--side", choices=[*SIDES, "both"], default="both")
    parser.add_argument("--seed", type=int, default=0, help="of the weights and of the order of the text (default 0)")
    parser.add_argument("--steps", type=int, default=2300)
    parser.add_argument("--tokens", type=int, default=32_768, help="of a sequence; one sequence a step")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cuda")
    parser.add_argument("--every", type=int, default=20, help="steps between evaluations after the switch (default 20)")
    parser.add_argument("--curve", type=int, default=100, help="steps between the others (default 100)")
    parser.add_argument("--layers", type=int, default=12)
    parser.add_argument("--width", type=int, default=512)
    parser.add_argument("--heads", type=int, default=4, help="of 128 each")
    parser.add_argument("--feed-forward", type=int, default=1408)
    parser.add_argument("--json", type=Path, help="write here after each evaluation; keeps the other side's result")
    parser.add_argument("--plot", type=Path, help="plot the loss against steps and seconds to this PNG file")
    parser.add_argument("--report", type=Path, nargs="+", help="train nothing: print and plot these results")
    options = parser.parse_args()
    if options.report:
        every = [json.loads(path.read_text()) for path in options.report]
    else:
        if options.corpus is None:
            parser.error("--corpus is needed")
        every = [run(options)]
    report(every)
    if options.plot:
        plot(every, options.plot)


def run(options) -> dict:
    text, sha256 = read(options.corpus)
    recipe = {"learning_rate": LEARNING_RATE, "warm_up": WARM_UP, "clip": CLIP, "first_stage": FIRST_STAGE}
    head = {
        "device": setting.device_name(options.device),
        "versions": setting.versions(options.device),
        "settings": {"seed": options.seed, "steps": options.steps, "tokens": options.tokens}
        | asdict(shape(options))
        | recipe,
        "corpus": {"bytes": len(text), "sha256": sha256, "held_out_sequences": HELD_OUT},
    }
    results = load(options.json, head)
    print(f"{head['device']}; torch {torch.__version__}; {len(text):,} bytes of text", flush=True)
    error = check(torch.bfloat16, options.device)
    print(f"checked: one layer's error against float64 is {error:.2f} of dense attention's", flush=True)
    prepared = Text(text, options.tokens, options.steps, options.seed, options.device)

    for side in SIDES if options.side == "both" else (options.side,):

        def save(result, side=side):
            results[side] = result
            results["comparison"] = compare(results)
            if options.json:
                options.json.write_text(json.dumps(results, indent=1) + "\n")

        other = results.get(SIDES[1 - SIDES.index(side)], {})
        train(side, prepared, options, other.get("weights_sha256"), save)
    return results


if __name__ == "__main__":
    main()
