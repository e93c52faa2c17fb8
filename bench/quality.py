"""Equal trainings of a model of bytes that differ only in stage 1's attention: which part of it helps?

    python bench/corpus.py linux-source-6.1/{Documentation,kernel,mm,fs,include,net,lib} --suffixes .rst .c .h \\
        --exclude '*/translations/*' '*/nls/*' --order path --held-out held.xz --output corpus.xz
    python bench/quality.py --corpus corpus.xz --held-out held.xz --output results dense: both-1:arm=both,seed=1
    python bench/quality.py --report results --plot quality.png

A run is `name:key=value,key=value`, with the fields of `Settings` as keys; a run whose result already exists is not
made again. Arms: `dense`; `window`, exact causal attention to the last `window` tokens and nothing else; `published`,
the pyramid and nothing else; `both`, their sum. Stage 1 is the first `share` of the steps; the rest, and every held-out
loss, is dense. The same seed gives the same first weights and the same sequences in the same order in every arm.

Beside the held-out loss (nats a byte) and its parts by position in the context there is the copy gain: a passage of
64 random letters and digits is planted, and again d bytes later, at the same place for every d; the gain is the loss on
its first appearance less that on its second, the first eight bytes of both left out. Chance is ln 36 = 3.58 nats a
byte; a gain above it says that the first appearance was predicted worse than by chance, as random letters are.

Compare like with like: each arm at its own best learning rate and RoPE base, and long enough that dense attention has
left the plateau it begins on.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import math
import re
import statistics
import sys
import time
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path

import setting
import torch
from corpus import SEPARATOR, read, shuffled
from sides import check, dense
from small_model import Model, Shape, compiled_graphs, new_model, new_optimizer
from torch.nn.attention.flex_attention import BlockMask, flex_attention

import lighthouse

ARMS = ("dense", "window", "published", "both")
LABELS = {"window": "window alone", "published": "published method", "both": "pyramid + window"}
WARM_UP, CLIP = 0.05, 1.0
PASSAGE, CUE, PASSAGES = 64, 8, 32  # bytes planted, of them left out at the front, and how many are planted
BLOCK = 128  # tokens, of FlexAttention
LETTERS = b"abcdefghijklmnopqrstuvwxyz0123456789"


@dataclass(frozen=True)
class Settings:
    """One run's settings. `ratio` is tokens per parent (N / select_topk), `levels` the pyramid's windows in tokens."""

    arm: str = "dense"
    seed: int = 0
    steps: int = 4000
    tokens: int = 16_384
    batch: int = 2
    layers: int = 8
    width: int = 512
    heads: int = 4
    feed_forward: int = 1408
    rate: float = 1e-3
    schedule: str = "cosine"  # or "flat": down from the switch on only
    rope: float = 10_000.0
    share: float = 0.625
    dense_layers: int = 0  # at each end, in stage 1
    window: int = 256
    ratio: int = 64
    levels: str = "4x16"
    order: str = "path"  # of the text's files, or "shuffled"
    evaluations: int = 24

    @property
    def switch(self) -> int:
        return 0 if self.arm == "dense" else int(self.share * self.steps)

    def learning_rate(self, step: int) -> float:
        """The learning rate of step `step`, counted from 0: warm-up, then a cosine to a tenth."""
        warm_up = max(1, round(WARM_UP * self.steps))
        if step < warm_up:
            return self.rate * (step + 1) / warm_up
        begin = warm_up if self.schedule == "cosine" else max(warm_up, self.switch)
        done = max(0, step - begin) / max(1, self.steps - begin)
        return self.rate * (0.1 + 0.9 * (1 + math.cos(math.pi * done)) / 2)

    @classmethod
    def parse(cls, text: str) -> Settings:
        types = {field.name: type(field.default) for field in fields(cls)}
        given = dict(pair.split("=", 1) for pair in filter(None, text.split(",")))
        if unknown := given.keys() - types:
            sys.exit(f"{', '.join(sorted(unknown))}: not a setting; the settings are {', '.join(types)}")
        found = replace(cls(), **{name: types[name](value) for name, value in given.items()})
        if found.arm not in ARMS:
            sys.exit(f"arm={found.arm}: one of {', '.join(ARMS)} is needed")
        return found


class Text:
    """Sequences of bytes and their targets, on the device. Training ones lie side by side and come once a pass."""

    def __init__(self, training: bytes, held_out: bytes, settings: Settings, device: str):
        self.tokens, self.batch = settings.tokens, settings.batch
        self.bytes = torch.frombuffer(bytearray(training), dtype=torch.uint8).to(device)
        self.held = torch.frombuffer(bytearray(held_out), dtype=torch.uint8).to(device)
        count, needed = (len(training) - 1) // self.tokens, settings.steps * settings.batch
        self.held_out = [i * self.tokens for i in range((len(held_out) - 1) // self.tokens)]
        if not count or not self.held_out:
            sys.exit(f"{len(training):,} bytes of text, {len(held_out):,} held out: less than a sequence")
        generator = torch.Generator().manual_seed(settings.seed)
        passes = [torch.randperm(count, generator=generator) for _ in range(math.ceil(needed / count))]
        self.order = (torch.cat(passes)[:needed] * self.tokens).view(settings.steps, settings.batch).tolist()
        self.passes = needed / count

    def training(self, step: int):
        return self._pair([self.bytes[start : start + self.tokens + 1] for start in self.order[step]])

    def held_out_at(self, start: int):
        return self._pair([self.held[start : start + self.tokens + 1]])

    @staticmethod
    def _pair(rows):
        rows = torch.stack(rows).long()
        return rows[:, :-1], rows[:, 1:]


def stage_one(settings: Settings, device: str):
    """The attention of stage 1's layers."""
    if settings.arm == "dense":
        return dense
    ratios = tuple(1 / int(window) for window in settings.levels.split("x"))
    topk = max(1, settings.tokens // settings.ratio)

    def pyramid(query, key, value):
        return lighthouse.attention(query, key, value, pool_ratios=ratios, select_topk=topk)

    if settings.arm == "published":
        return pyramid
    mask = window_mask(settings.tokens, settings.window, device)

    def window(query, key, value):
        return flex_attention(query, key, value, block_mask=mask)

    def both(query, key, value):
        return pyramid(query, key, value) + window(query, key, value)

    return window if settings.arm == "window" else both


def window_mask(tokens: int, width: int, device: str) -> BlockMask:
    """Causal attention to the last `width` tokens. torch's `create_block_mask` takes tokens x tokens, or minutes."""

    def near(batch, head, query, key):
        return (query >= key) & (query - key < width)

    blocks = -(-tokens // BLOCK)
    behind = torch.arange(blocks, device=device)[:, None] - torch.arange(blocks, device=device)[None]
    # Of a block of queries and one of keys `behind` blocks before it: the smallest and the largest distance in tokens.
    nearest, farthest = behind * BLOCK - (BLOCK - 1), behind * BLOCK + (BLOCK - 1)
    full = (nearest >= 0) & (farthest < width) & (torch.arange(blocks, device=device) < tokens // BLOCK)
    partly = (farthest >= 0) & (nearest < width) & ~full

    def listed(which):
        count = which.sum(-1, dtype=torch.int32)[None, None]
        order = which.to(torch.int8).argsort(dim=-1, descending=True, stable=True).to(torch.int32)
        return count, order[None, None].contiguous()

    return BlockMask.from_kv_blocks(
        *listed(partly), *listed(full), BLOCK_SIZE=BLOCK, mask_mod=near, seq_lengths=(tokens, tokens)
    )


def losses(model: Model, batch, attention) -> torch.Tensor:
    """`[B, N]`, float32."""
    with torch.autocast(batch[0].device.type, torch.bfloat16):
        return model.losses(*batch, attention)


def digest(model: Model) -> str:
    found = hashlib.sha256()
    for parameter in model.parameters():
        found.update(parameter.detach().cpu().numpy().tobytes())
    return found.hexdigest()


def stretches(tokens: int) -> list[tuple[int, int]]:
    """Of positions: 0 to 1,024, and from there on each as long as all before it."""
    cuts = [0, *(1024 << i for i in range(30) if 1024 << i < tokens), tokens]
    return list(zip(cuts, cuts[1:], strict=False))


@torch.no_grad()
def held_out_loss(model: Model, text: Text) -> dict:
    """The mean with dense attention, and by position."""
    total = sum(losses(model, text.held_out_at(start), dense)[0].double() for start in text.held_out)
    mean = total / len(text.held_out)
    by_position = {f"{a}-{b}": mean[a:b].mean().item() for a, b in stretches(text.tokens)}
    return {"loss": mean.mean().item(), "by_position": by_position}


@torch.no_grad()
def copy_losses(model: Model, text: Text) -> dict:
    """Distance in bytes -> the mean loss on the first and on the second appearance; always the same passages."""
    generator = torch.Generator().manual_seed(7)
    letters = torch.tensor(list(LETTERS), dtype=torch.uint8)
    passages = letters[torch.randint(len(LETTERS), (PASSAGES, PASSAGE), generator=generator)].to(text.held.device)
    ends = text.tokens - PASSAGE - torch.randint(128, (PASSAGES,), generator=generator)
    found = {}
    for distance in (256 << i for i in range(30)):
        if distance > text.tokens - 2 * PASSAGE - 128:
            return found
        seen = []
        for number, (passage, second) in enumerate(zip(passages, ends.tolist(), strict=True)):
            start = text.held_out[number % len(text.held_out)]
            row = text.held[start : start + text.tokens + 1].clone()
            for place in (second - distance, second):
                row[place : place + PASSAGE] = passage
            loss = losses(model, Text._pair([row]), dense)[0]
            seen.append([loss[place + CUE - 1 : place + PASSAGE - 1].mean() for place in (second - distance, second)])
        found[distance] = torch.tensor(seen).mean(0).tolist()


def train(name: str, settings: Settings, text: Text, device: str) -> dict:
    shape = Shape(settings.layers, settings.width, settings.heads, settings.feed_forward, settings.dense_layers)
    torch.compiler.reset()
    model = new_model(shape, settings.tokens, seed=settings.seed, device=device, rope_base=settings.rope)
    result = {"weights_sha256": digest(model), "switch": settings.switch, "passes": text.passes}
    optimizer, first = new_optimizer(model, settings.rate), stage_one(settings, device)

    begin = time.perf_counter()
    for attention in {first, dense}:
        losses(model, text.training(0), attention).mean().backward()  # gradients are thrown away
    optimizer.zero_grad(set_to_none=True)
    held_out_loss(model, text)
    setting.synchronize(device)
    result["set_up_seconds"] = time.perf_counter() - begin

    every = max(1, settings.steps // settings.evaluations)
    rows, trained, seconds, since, compiled = [], [], 0.0, 0, compiled_graphs()
    begin = time.perf_counter()
    for step in range(settings.steps):
        for group in optimizer.param_groups:
            group["lr"] = settings.learning_rate(step)
        loss = losses(model, text.training(step), first if step < settings.switch else dense).mean()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), CLIP)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        trained.append(loss.detach())
        done = step + 1
        if done % every and done not in (settings.switch, settings.steps):
            continue
        setting.synchronize(device)
        seconds += time.perf_counter() - begin
        mean = torch.stack(trained[since:]).mean().item()
        rows.append({"step": done, "seconds": seconds, **held_out_loss(model, text), "training_loss": mean})
        print(
            f"{name}: step {done:,}, {seconds:.0f} s, held out {rows[-1]['loss']:.4f}, training {mean:.4f}", flush=True
        )
        if not math.isfinite(mean):
            break
        since = done
        begin = time.perf_counter()
    curve = torch.stack(trained)
    result |= {
        "compiled_while_timed": compiled_graphs() - compiled,  # if not 0, the seconds include compilation
        "training_loss": [round(part.mean().item(), 4) for part in curve.split(50)],  # means of 50 steps
        "rows": rows,
        "loss": rows[-1]["loss"],
        "seconds": seconds,
        "copy": copy_losses(model, text),
    }
    return result


def gains(result: dict) -> dict[int, float]:
    return {int(distance): first - second for distance, (first, second) in result["copy"].items()}


def report(results: list[dict]) -> None:
    print("| run | loss | by position | copy gain by distance | at the switch | seconds |")
    print("|---|---:|---|---|---:|---:|")
    for result in results:
        at = [row["loss"] for row in result["rows"] if row["step"] == result["switch"]]
        positions = " ".join(f"{loss:.3f}" for loss in result["rows"][-1]["by_position"].values())
        copied = " ".join(f"{distance}: {gain:.2f}" for distance, gain in gains(result).items())
        print(
            f"| {result['name']} | {result['loss']:.4f} | {positions} | {copied} | {at[0] if at else math.nan:.3f}"
            f" | {result['seconds']:.0f} |"
        )


def by_settings(results: list[dict]) -> dict[str, list[dict]]:
    """Runs that differ in their seed alone, by the name of the first without its seed."""
    groups: dict[tuple, list[dict]] = {}
    for result in sorted(results, key=lambda each: (ARMS.index(each["settings"]["arm"]), each["settings"]["seed"])):
        key = tuple((name, value) for name, value in result["settings"].items() if name != "seed")
        groups.setdefault(key, []).append(result)
    return {re.sub(r"shuffled-|-(s|lr)\d.*", "", group[0]["name"]): group for group in groups.values()}


def report_means(results: list[dict]) -> None:
    print("\n| | seeds | loss: mean, lowest, highest | copy gain at 4,096 and 8,192 | seconds | below 1.5 from step |")
    print("|---|---:|---|---|---:|---:|")
    for name, group in by_settings(results).items():
        losses_, copied = [each["loss"] for each in group], [gains(each) for each in group]
        far = ", ".join(
            f"{statistics.mean(each[distance] for each in copied):.2f}"
            for distance in (4096, 8192)
            if distance in copied[0]
        )
        left = [50 * next((i for i, loss in enumerate(each["training_loss"]) if loss < 1.5), 0) for each in group]
        print(
            f"| {name} | {len(group)} | {statistics.mean(losses_):.4f}, {min(losses_):.4f}, {max(losses_):.4f} | {far} "
            f"| {statistics.mean(each['seconds'] for each in group):.0f} | {min(left):,} to {max(left):,} |"
        )


def plot(results: list[dict], path: Path) -> None:
    """Means over seeds, from the lowest to the highest of them."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, (left, right) = plt.subplots(1, 2, figsize=(12, 4.6), constrained_layout=True)
    for name, group in by_settings(results).items():
        rows = list(zip(*(each["rows"] for each in group), strict=True))
        seconds = [statistics.mean(row["seconds"] for row in at) for at in rows]
        at_steps = [[row["loss"] for row in at] for at in rows]
        label = f"{LABELS.get(name, name)}, {len(group)} seeds"
        (line,) = left.plot(seconds, list(map(statistics.mean, at_steps)), label=label)
        left.fill_between(
            seconds, list(map(min, at_steps)), list(map(max, at_steps)), color=line.get_color(), alpha=0.15, linewidth=0
        )
        for when, at in zip(seconds, rows, strict=True):
            if at[0]["step"] == group[0]["switch"]:
                left.plot(when, statistics.mean(row["loss"] for row in at), "v", color=line.get_color())
        copied = [gains(each) for each in group]
        means = {distance: statistics.mean(each[distance] for each in copied) for distance in copied[0]}
        right.plot(list(means), list(means.values()), "o-", color=line.get_color(), label=label)
        spread = [[each[distance] for each in copied] for distance in means]
        right.fill_between(
            list(means), list(map(min, spread)), list(map(max, spread)), color=line.get_color(), alpha=0.15, linewidth=0
        )
        right.set_xscale("log", base=2)
        right.set_xticks(list(means), [f"{distance:,}" for distance in means])
    lowest = min(result["loss"] for result in results)
    left.set(
        xlabel="seconds of training", ylabel="dense held-out loss, nats a byte", ylim=(0.95 * lowest, lowest + 1.5)
    )
    right.set(xlabel="bytes to the first appearance", ylabel="copy gain, nats a byte")
    for axis in (left, right):
        axis.grid(alpha=0.3)
    right.legend(fontsize="small")
    figure.savefig(path, dpi=120)
    print(path)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="*", metavar="NAME:KEY=VALUE,...")
    parser.add_argument("--corpus", type=Path, help="the text to train on, its files in the order of their paths")
    parser.add_argument("--held-out", type=Path, help="the text of other folders")
    parser.add_argument("--output", type=Path, help="the folder for NAME.json of each run")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cuda")
    parser.add_argument("--report", type=Path, help="train nothing: print the results in this folder, or those named")
    parser.add_argument("--plot", type=Path, help="with --report: plot loss against time and the copy gain (PNG)")
    options = parser.parse_args()
    if options.report:
        results = [json.loads(path.read_text()) for path in sorted(options.report.glob("*.json"))]
        results = [each for each in results if not options.runs or each["name"] in options.runs]
        report(results)
        report_means(results)
        if options.plot:
            plot(results, options.plot)
        return
    if not (options.runs and options.corpus and options.held_out and options.output):
        parser.error("runs, --corpus, --held-out and --output are needed")
    runs = {name: Settings.parse(rest) for name, _, rest in (run.partition(":") for run in options.runs)}
    print(f"{setting.device_name(options.device)}; torch {torch.__version__}", flush=True)
    print(f"checked: a layer's error is {check(torch.bfloat16, options.device):.2f} of dense attention's", flush=True)
    texts = {"path": read(options.corpus)[0]}
    held_out, held_digest = read(options.held_out)
    options.output.mkdir(parents=True, exist_ok=True)
    for name, settings in runs.items():
        path = options.output / f"{name}.json"
        if path.exists():
            print(f"{path} already exists", flush=True)
            continue
        if settings.order not in texts:
            texts[settings.order] = SEPARATOR.join(shuffled(texts["path"].split(SEPARATOR)))
        training = texts[settings.order]
        head = {
            "name": name,
            "device": setting.device_name(options.device),
            "versions": setting.versions(options.device),
            "command": setting.command(),
            "settings": asdict(settings),
            "text": {"bytes": len(training), "sha256": hashlib.sha256(training).hexdigest()},
            "held_out": {"bytes": len(held_out), "sha256": held_digest},
        }
        result = head | train(name, settings, Text(training, held_out, settings, options.device), options.device)
        path.write_text(json.dumps(result, indent=1) + "\n")
        report([result])


if __name__ == "__main__":
    main()
