"""Dense attention against Lighthouse on this device: a layer at several lengths, and a step of a model.

On a CPU the sides are called in turn, so that other load on the machine affects both. Nothing is timed before the
result is right (`sides.check`). Results are plain dictionaries, for JSON; each row is complete in itself, so a file of
them can be continued.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch import Tensor

from lighthouse.core.attention import sub_sequence_attention
from lighthouse.core.devices import check_device, check_on_cuda, device_name
from lighthouse.core.files import write_whole
from lighthouse.core.inner import inner_backend
from lighthouse.core.method import DEFAULT, Method
from lighthouse.core.settings import LighthouseSettings
from lighthouse.speed.estimates import estimate
from lighthouse.speed.kept_rates import keep_check, rates_of
from lighthouse.speed.layer import Layer
from lighthouse.speed.measure import captured, peak_bytes, spread, synchronize, timings
from lighthouse.speed.operators import copy_speed, operators
from lighthouse.speed.origin import versions
from lighthouse.speed.sides import Side, check, check_finite, dense_attention, inner_side, leaves

# By device: on a CPU lengths that two cores finish in a minute.
TOKENS = {
    "cpu": (1024, 2048, 4096, 8192, 16_384),
    "cuda": (4096, 8192, 16_384, 32_768, 65_536, 98_304, 131_072, 262_144),
}
REPEATS = {"cpu": 5, "cuda": 20}
STEPS = 3  # timed training steps of each side
GRAPH_TOKENS = 131_072  # beyond, launches cost nothing compared with the work

SAME = ("device", "versions", "layer", *DEFAULT.values())  # must be the same for rows of one table


class CannotGoOn(ValueError):
    """The results in a file were not measured like those that would be added."""


@dataclass
class Bench:
    """What is measured, and what was found so far.

    Args:
        budget: seconds for the calls of one length, about; on a CPU a call that takes half of it is timed once.
        parts: also time the inner attention, the forward pass and each operator separately, and on a GPU CUDA graphs.
        say: called with a line for each measurement.
    """

    layer: Layer
    device: str
    method: Method = DEFAULT
    budget: float = 8.0
    parts: bool = False
    again: bool = False  # measure the rates of the estimate again
    command: str = ""
    say: Callable[[str], None] = lambda line: None
    results: dict = field(init=False)

    def __post_init__(self):
        device = torch.device(self.device)
        check_device("device", device)
        self.on_gpu = device.type == "cuda"
        if self.on_gpu:
            check_on_cuda("dtype", self.layer.torch_dtype, self.layer.head_dim)
        self.results = {
            "commands": [self.command],
            "device": device_name(device),
            "versions": versions(device),
            "layer": {name: value for name, value in asdict(self.layer).items() if name != "dtype"},
            **self.method.values(),
            "error_of_dense": {},
            "rows": [],
            "train": [],
        }

    def of(self, dtype: str) -> Bench:
        """The same layer in another dtype, with the same results to add to."""
        other = replace(self, layer=replace(self.layer, dtype=dtype))
        other.results = self.results
        return other

    @property
    def rows(self) -> list[dict]:
        """What was found of this dtype, by length."""
        return [row for row in self.results["rows"] if row["dtype"] == self.layer.dtype]

    def resume(self, file: Path) -> None:
        """Takes over what a file has. Raises `CannotGoOn` where that was measured differently."""
        try:
            former = json.loads(file.read_text(encoding="utf-8"))
            for name in ("rows", "train"):
                former[name] = [dict(row) for row in former[name]]
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise CannotGoOn(f"json={str(file)!r} has no results of bench ({error!r}): give another file") from None
        if "versions" not in former:
            raise CannotGoOn(f"json={str(file)!r} was written by an earlier version of bench: give another file")
        former = DEFAULT.values() | former  # a setting that an earlier version lacks was as by default
        for name in SAME:
            if former.get(name) != self.results[name]:
                raise CannotGoOn(
                    f"json={str(file)!r} was measured with {name} {former.get(name)!r}, which is now "
                    f"{self.results[name]!r}: give another file, or the same options"
                )
        self.results.update(former)
        if self.command not in self.results["commands"]:
            self.results["commands"].append(self.command)

    def save(self, file: Path) -> None:
        """Writes the complete results or nothing."""
        write_whole(file, json.dumps(self.results, indent=1) + "\n")

    def check(self) -> float:
        """The error against float64, relative to dense attention's. Raises `WrongResult`."""
        error = check(self.layer.torch_dtype, self.device, head_dim=self.layer.head_dim, method=self.method)
        self.results["error_of_dense"][self.layer.dtype] = error
        return error

    def has(self, tokens: int) -> dict | None:
        """What was measured of a length, with its parts if asked for."""
        found = next((row for row in self.rows if row["tokens"] == tokens), None)
        return None if found and self.parts and "operators" not in found else found

    def measure(self, tokens: int) -> dict:
        """One length: seconds, peak bytes, the speed-up and what the plan estimates for it. Added to the results.

        From then on `plan` compares its estimates with the speed-up. Raises `WrongResult`.
        """
        made, layer = self.method.plan(tokens), self.layer
        rates = rates_of(layer, self.device, again=self.again, say=self.say)
        self.again = False
        inputs, grad = leaves(tokens, layer.heads, layer.kv_heads, layer.head_dim, layer.torch_dtype, self.device)
        sides = {"dense": Side(dense_attention, inputs, grad), "lighthouse": Side(self._attention, inputs, grad)}
        if self.on_gpu:
            check_finite(self._attention, inputs, grad)
        row: dict[str, Any] = {
            "tokens": tokens,
            "dtype": layer.dtype,
            "length": made.length,
            "kept_share": made.kept_share,
            "inner_backend": inner_backend(*inputs[:2]).name,
        }
        inner = {"inner": inner_side(made.length, layer, self.device)} if self.parts and self.method.chooses else {}
        self.say(f"{tokens:,} tokens: time")
        row |= self._times(sides | inner, tokens)
        for name, side in sides.items():
            self.say(f"{tokens:,} tokens: memory, {name}")
            row[f"{name}_peak_bytes"] = peak_bytes(side.used, self.device)
            if self.parts and self.on_gpu:
                row[f"{name}_held_peak_bytes"] = peak_bytes(side.both, self.device)
        row["speedup"] = row["dense_seconds"] / row["lighthouse_seconds"]
        row["estimate"] = estimate(made, layer, rates).speedup
        row["error"] = row["estimate"] / row["speedup"] - 1
        row["peak_of_dense"] = row["lighthouse_peak_bytes"] / row["dense_peak_bytes"]
        if self.parts:
            self.say(f"{tokens:,} tokens: each operator")
            row["operators"] = operators(inputs, grad, self.method, repeats=self._repeats)
            if "copy_bytes_per_second" not in self.results:
                self.results["copy_bytes_per_second"] = copy_speed(self.device)
        keep_check(layer, self.device, tokens, row["speedup"], self.method, say=self.say)
        others = [other for other in self.results["rows"] if (other["dtype"], other["tokens"]) != (layer.dtype, tokens)]
        self.results["rows"] = sorted([*others, row], key=lambda row: (row["dtype"], row["tokens"]))
        if self.on_gpu:
            torch.cuda.empty_cache()  # fragments left by one length get in the way of the next
        return row

    def _attention(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        return sub_sequence_attention(query, key, value, self.method)

    @property
    def _repeats(self) -> int:
        return REPEATS[torch.device(self.device).type]

    def _times(self, sides: dict[str, Side], tokens: int) -> dict:
        """Median seconds by side, and with `parts` those of the forward pass alone and of CUDA graphs."""
        row: dict[str, Any] = {}
        graphs = self.parts and self.on_gpu and tokens <= GRAPH_TOKENS
        # On a GPU, dense attention's long calls in between would hide the launches.
        groups = [["dense"], [name for name in sides if name != "dense"]] if self.on_gpu else [list(sides)]
        for names in groups:
            for what in ("", "forward_") if self.parts else ("",):
                calls = [sides[name].forward if what else sides[name].both for name in names]
                kinds = {what: calls} | ({f"graph_{what}": [captured(call) for call in calls]} if graphs else {})
                for kind, runs in kinds.items():
                    found = timings(runs, self.device, repeats=self._repeats, budget=self.budget / len(groups))
                    for name, times in zip(names, found, strict=True):
                        row[f"{name}_{kind}seconds"] = median(times)
                        if not kind:
                            row[f"{name}_calls"], row[f"{name}_spread"] = len(times), spread(times)
        for kind in ("", "graph_"):
            if f"inner_{kind}seconds" in row:
                row[f"{kind}beside_inner_seconds"] = row[f"lighthouse_{kind}seconds"] - row[f"inner_{kind}seconds"]
        if graphs:
            row["graph_speedup"] = row["dense_graph_seconds"] / row["lighthouse_graph_seconds"]
        return row

    def has_step(self, model: str, context: int, dense_layers: int) -> dict | None:
        asked = {"model": model, "context": context, "dense_layers": dense_layers, "dtype": self.layer.dtype}
        return next((row for row in self.results["train"] if asked.items() <= row.items()), None)

    def measure_step(self, model: str, context: int, *, dense_layers: int | None = None) -> dict:
        """A training step of a model of `lighthouse pretrain`: tokens per second and peak bytes, dense and Lighthouse.

        Forward, loss without logits, backward and AdamW of one sequence; bfloat16 autocast where the layer's dtype is
        that, and layers compiled on a GPU, as pretrain has it. Needs the `train` extra.
        """
        from lighthouse.huggingface import wrap
        from lighthouse.training.model import new_model

        settings = LighthouseSettings(self.method, dense_layers, min_tokens=0, max_share=1.0)
        plain: Any = new_model(model, context, seed=0)
        wrapped: Any = wrap(plain.to(self.device).train(), settings)
        if self.on_gpu:
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

        row: dict[str, Any] = {
            "model": model,
            "context": context,
            "dense_layers": wrapped.lighthouse_settings.dense_layers,
            "dtype": self.layer.dtype,
        }
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
        """The shortest measured length from which on Lighthouse is faster; None if it is not at the longest."""
        found = None
        for row in reversed(self.rows):
            if row["speedup"] <= 1:
                break
            found = row["tokens"]
        return found
