"""Dense attention against Lighthouse on this device: a layer at several lengths, and a step of a model.

Both sides are called in turn in one process, so that what else the machine does meets both. Nothing is timed before the
result is right (`measure.check`). Results are plain dictionaries, for JSON; each row is complete in itself, so a file
of them can be gone on with.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from statistics import median

import torch

from lighthouse.core.attention import sub_sequence_attention
from lighthouse.core.devices import check_device, check_on_cuda, device_name
from lighthouse.core.method import DEFAULT, Method
from lighthouse.core.settings import LighthouseSettings
from lighthouse.core.version import VERSION
from lighthouse.speed.estimates import Layer, dense_attention, estimate
from lighthouse.speed.measure import check, leaves, peak_bytes, spread, synchronize, timings
from lighthouse.speed.rates import keep_check, rates_of

# By device: lengths that two CPU cores are through with in a minute, and those of a GPU.
TOKENS = {
    "cpu": (1024, 2048, 4096, 8192, 16_384),
    "cuda": (4096, 8192, 16_384, 32_768, 65_536, 98_304, 131_072, 262_144),
}
REPEATS = {"cpu": 5, "cuda": 20}
STEPS = 3  # timed training steps of each side

SAME = ("device", "torch", "lighthouse", "layer", *DEFAULT.values())  # or rows cannot stand in one table


class CannotGoOn(ValueError):
    """The results in a file were not measured like those that would be added."""


@dataclass
class Bench:
    """What is measured, and what was found so far.

    Args:
        budget: seconds for the calls of one length, about; on a CPU a call that takes half of it is timed once.
        say: is told what is being done.
    """

    layer: Layer
    device: str
    method: Method = DEFAULT
    budget: float = 8.0
    again: bool = False  # measure the rates of the estimate anew
    say: Callable[[str], None] = lambda line: None
    results: dict = field(init=False)

    def __post_init__(self):
        device = torch.device(self.device)
        check_device("device", device)
        if device.type == "cuda":
            check_on_cuda("dtype", self.layer.torch_dtype, self.layer.head_dim)
        self.results = {
            "device": device_name(device),
            "torch": torch.__version__,
            "lighthouse": VERSION,
            "layer": asdict(self.layer),
            **self.method.values(),
            "rows": [],
            "train": [],
        }

    def resume(self, file: Path) -> None:
        """Takes over what a file has. Raises `CannotGoOn` where that was measured differently."""
        try:
            former = json.loads(file.read_text(encoding="utf-8"))
            rows, train = list(former["rows"]), list(former["train"])
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise CannotGoOn(f"json={str(file)!r} holds no results of bench ({error!r}): give another file") from None
        for name in SAME:
            if former.get(name) != self.results[name]:
                raise CannotGoOn(
                    f"json={str(file)!r} was measured with {name} {former.get(name)!r}, now it is "
                    f"{self.results[name]!r}: give another file, or the same options"
                )
        self.results |= {"rows": rows, "train": train, "error_of_dense": former.get("error_of_dense")}

    def save(self, file: Path) -> None:
        """Writes the results, as a whole or not at all."""
        partial = file.with_name(f"{file.name}.partial")
        partial.write_text(json.dumps(self.results, indent=1) + "\n", encoding="utf-8")
        os.replace(partial, file)

    def check(self) -> float:
        """The error against float64, relative to dense attention's. Raises `WrongResult`."""
        error = check(
            self.layer.torch_dtype,
            self.device,
            head_dim=self.layer.head_dim,
            method=self.method,
        )
        self.results["error_of_dense"] = error
        return error

    def has(self, tokens: int) -> dict | None:
        return next((row for row in self.results["rows"] if row["tokens"] == tokens), None)

    def measure(self, tokens: int) -> dict:
        """One length: seconds, peak bytes, the speed-up and what the plan estimates for it. Added to the results.

        `plan` holds its estimates against the speed-up from then on.
        """
        made = self.method.plan(tokens)
        rates = rates_of(self.layer, self.device, again=self.again, say=self.say)
        self.again = False
        self.say(f"{tokens:,} tokens: time")
        layer = self.layer
        inputs, grad = leaves(tokens, layer.heads, layer.kv_heads, layer.head_dim, layer.torch_dtype, self.device)

        def ours(query, key, value):
            return sub_sequence_attention(query, key, value, self.method)

        def both(function):
            return lambda: torch.autograd.grad(function(*inputs), inputs, grad)

        def used(function):  # as in a model the output is not held to the end
            return lambda: torch.autograd.grad((function(*inputs) * grad).sum(), inputs)

        sides = {"dense": dense_attention, "lighthouse": ours}
        row = {"tokens": tokens, "length": made.length, "kept_share": made.kept_share}
        repeats = REPEATS[torch.device(self.device).type]
        calls = [both(function) for function in sides.values()]
        times = timings(calls, self.device, repeats=repeats, budget=self.budget)
        for (name, function), found in zip(sides.items(), times, strict=True):
            row[f"{name}_seconds"] = median(found)
            row[f"{name}_calls"], row[f"{name}_spread"] = len(found), spread(found)
            self.say(f"{tokens:,} tokens: memory, {name}")
            row[f"{name}_peak_bytes"] = peak_bytes(used(function), self.device)
        row["speedup"] = row["dense_seconds"] / row["lighthouse_seconds"]
        row["estimate"] = estimate(made, layer, rates).speedup
        row["error"] = row["estimate"] / row["speedup"] - 1
        keep_check(layer, self.device, tokens, row["speedup"], self.method, say=self.say)
        self.results["rows"] = sorted([*self.results["rows"], row], key=lambda row: row["tokens"])
        return row

    def has_step(self, model: str, context: int, dense_layers: int) -> dict | None:
        asked = {"model": model, "context": context, "dense_layers": dense_layers}
        return next((row for row in self.results["train"] if asked.items() <= row.items()), None)

    def measure_step(self, model: str, context: int, *, dense_layers: int | None = None) -> dict:
        """A training step of a model of `lighthouse pretrain`: tokens per second and peak bytes, dense and Lighthouse.

        Forward, loss without logits, backward and AdamW of one sequence; bfloat16 autocast where the layer's dtype is
        that, and layers compiled on a GPU, as pretrain has it. Needs the `train` extra.
        """
        from lighthouse.huggingface import wrap
        from lighthouse.training.model import new_model

        settings = LighthouseSettings(self.method, dense_layers, min_tokens=0, max_share=1.0)
        wrapped = wrap(new_model(model, context, seed=0).to(self.device).train(), settings)
        on_gpu = torch.device(self.device).type == "cuda"
        if on_gpu:
            for layer in wrapped.base_model.layers:
                layer.compile(fullgraph=True, dynamic=False)
        optimizer = torch.optim.AdamW(wrapped.parameters(), lr=1e-4, fused=True)
        generator = torch.Generator().manual_seed(0)
        batch = {"input_ids": torch.randint(3, 259, (1, context), generator=generator).to(self.device)}
        autocast = torch.autocast(
            torch.device(self.device).type, self.layer.torch_dtype, enabled=self.layer.dtype != "float32"
        )

        def step():
            with autocast:
                loss = wrapped(batch).loss
            loss.backward()
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)

        row = {"model": model, "context": context, "dense_layers": wrapped.lighthouse_settings.dense_layers}
        for name, enabled in (("lighthouse", True), ("dense", False)):
            wrapped.lighthouse(enabled)
            self.say(f"a training step of {model!r}, {context:,} tokens, {name}")
            step()  # compiles, and makes the optimizer's states
            times = []
            for _ in range(STEPS):
                synchronize(self.device)
                start = time.perf_counter()
                step()
                synchronize(self.device)
                times.append(time.perf_counter() - start)
                if sum(times) > self.budget:
                    break
            row[f"{name}_tokens_per_second"] = context / median(times)
            row[f"{name}_calls"], row[f"{name}_spread"] = len(times), spread(times)
            row[f"{name}_peak_bytes"] = peak_bytes(step, self.device)
        row["speedup"] = row["lighthouse_tokens_per_second"] / row["dense_tokens_per_second"]
        self.results["train"].append(row)
        return row

    def pays_from(self) -> int | None:
        """The shortest of the measured lengths from which on Lighthouse is faster; None where the longest is not."""
        found = None
        for row in reversed(self.results["rows"]):
            if row["speedup"] <= 1:
                break
            found = row["tokens"]
        return found


def need_matplotlib() -> None:
    """Raises `ImportError` that names what to install."""
    try:
        import matplotlib.figure  # noqa: F401
    except ImportError as error:
        raise ImportError(
            'the plot needs matplotlib, not installed here: pip install "lighthouse-attn[train]"'
        ) from error


def draw(results: dict, file: Path) -> None:
    """Time, speed-up and memory against length, as PNG. Raises `ImportError` without matplotlib."""
    need_matplotlib()
    from matplotlib.figure import Figure

    rows = results["rows"]
    tokens = [row["tokens"] for row in rows]
    figure = Figure(figsize=(12, 3.6), layout="constrained")
    times, ratio, memory = figure.subplots(1, 3)
    for name, color, label in (("dense", "tab:gray", "dense"), ("lighthouse", "tab:orange", "Lighthouse")):
        style = {"color": color, "marker": "o", "label": label}
        times.plot(tokens, [1e3 * row[f"{name}_seconds"] for row in rows], **style)
        memory.plot(tokens, [row[f"{name}_peak_bytes"] / 2**20 for row in rows], **style)
    ratio.plot(tokens, [row["speedup"] for row in rows], color="tab:orange", marker="o", label="measured")
    ratio.plot(
        tokens, [row["estimate"] for row in rows], "--", color="tab:blue", marker="x", label="the plan's estimate"
    )
    ratio.axhline(1, color="tab:gray", linewidth=1)
    for axis, title, scale in (
        (times, "forward and backward, ms", "log"),
        (ratio, "times as fast as dense", "linear"),
        (memory, "peak memory beyond the inputs, MiB", "log"),
    ):
        axis.set(title=title, xlabel="tokens", yscale=scale)
        axis.set_xscale("log", base=2)
        axis.set_xticks(tokens, [f"{count:,}" for count in tokens], rotation=30)
        axis.grid(alpha=0.3)
        axis.legend()
    figure.suptitle(f"One attention layer ({Layer(**results['layer'])}) on {results['device']}")
    figure.savefig(file, dpi=110, format="png")
