"""`lighthouse plan`: what a length and settings give, before anything is trained."""

from __future__ import annotations

import argparse
import os
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

import torch

from lighthouse.cli.parser import Parser
from lighthouse.cli.shared import add_method, check_folders, mib, say, write_json
from lighthouse.core.devices import check_device
from lighthouse.core.method import Method
from lighthouse.core.settings import LighthouseSettings
from lighthouse.speed import estimates as speed
from lighthouse.speed.advice import warnings
from lighthouse.speed.kept_rates import DAY, cache_file, rates_of
from lighthouse.speed.layer import DTYPES, LAYERS, Layer, default_layer
from lighthouse.speed.rates import BUSY, Rates

EXAMPLE = """\
examples:
  lighthouse plan --tokens 98304 --no_estimate
  lighthouse plan --tokens 131072 --heads 32 --kv_heads 8 --head_dim 128 --layers 32 --dtype bfloat16 --no_estimate
  lighthouse plan --model tiny --tokens 8192 --pool_ratios 1/2 1/4 1/8 --select_topk 256
"""

TOKENS = 98_304
OF_THE_LAYER = ("heads", "kv_heads", "head_dim", "layers")


def main(arguments: Sequence[str]) -> int:
    """Runs `lighthouse plan` and returns the exit status."""
    options = _parser().parse_args(arguments)
    try:
        found = _made(options)
    except (ValueError, TypeError, OSError) as error:
        print(f"lighthouse plan: error: {error}", file=sys.stderr)
        return 2
    except ImportError as error:
        print(f"lighthouse plan: error: {error}", file=sys.stderr)
        return 1
    if options.json != "-":
        print(_text(found))
    try:
        write_json(found, options.json)
    except OSError as error:
        print(f"lighthouse plan: error: json={options.json!r}: {error}", file=sys.stderr)
        return 1
    return 0


def _made(options: argparse.Namespace) -> dict:
    """All that is printed, as numbers."""
    device = chosen_device(options)
    check_folders(options, "json")
    method = Method.of(options)
    settings, plan = LighthouseSettings(method, options.dense_layers), method.plan(options.tokens)
    layer, config = described(options, options.tokens, device)
    found: dict[str, Any] = {
        "tokens": plan.tokens,
        "windows": plan.windows,
        "entries": plan.entries,
        "chosen": plan.chosen,
        "parents": plan.parents,
        "strata": [kind._asdict() for kind in plan.strata],
        "length": plan.length,
        "kept_share": plan.kept_share,
        "length_share": plan.length / plan.tokens,
        "layer": asdict(layer)
        | {
            "attention_work": plan.attention_work,
            "kept_bytes": layer.kept(plan.tokens, plan.length, local=plan.local_window > 0),
            "dense_kept_bytes": layer.kept(plan.tokens),
        },
        **method.values(),
    }
    rates = None
    if not options.no_estimate:
        check_device("device", torch.device(device))
        rates = rates_of(layer, device, again=options.measure, say=say)
        of_layer = speed.estimate(plan, layer, rates)
        found["device"] = rates.device
        found["estimate"] = asdict(of_layer) | {"speedup": of_layer.speedup}
        found["estimate"]["precision"] = _precision(rates, layer, device, options)
        found["estimate"]["graph_speedup"] = speed.estimate(plan, layer, rates, launches=False).speedup
        found["estimate"]["pays_from_tokens"] = speed.pays_from(layer, rates, method)
    layers = options.layers if config is None else config.num_hidden_layers
    if layers is not None:
        settings = settings.for_layers(layers)
        assert settings.dense_layers is not None  # a number now
        weights = 0 if config is None else _product_weights(config)
        step = speed.estimate_step(
            plan, layer, layers=layers, dense_layers=settings.dense_layers, product_weights=weights, rates=rates
        )
        found["step"] = asdict(step) | {"layers": layers, "dense_layers": settings.dense_layers, "model": options.model}
        found["step"] |= _memory(config, layer, plan, settings, layers, compiled=device == "cuda")
    found["warnings"] = warnings(method, options.tokens, layer=layer, rates=rates)
    return found


def _precision(rates: Rates, layer: Layer, device: str, options: argparse.Namespace) -> dict:
    """How accurate the estimate is: the age and spread of its rates, and its error where a speed-up was measured.

    `part` is None if not known: rates of a busy machine, or a length whose estimate follows from launches.
    """
    check = rates.nearest_check(options.tokens, Method.of(options))
    found: dict[str, Any] = {
        "days": (time.time() - rates.measured) / DAY,
        "spread": rates.spread,
        "check": None,
        "part": None,
    }
    if check is None:
        return found
    error = speed.error_of(check, layer, rates)
    found["check"] = check.values() | {"error": error}
    near = 0.5 <= check.tokens / options.tokens <= 2
    if rates.spread is None or rates.spread > BUSY:
        return found
    if near or options.tokens >= speed.ERROR_FROM[device]:
        found["part"] = max(rates.spread, abs(error))
    return found


def _product_weights(config) -> int:
    """Weights that each token is multiplied with: those of the layers, and the output matrix."""
    from lighthouse.training.model import empty_model

    layers = empty_model(config).model.layers
    return sum(weight.numel() for weight in layers.parameters() if weight.ndim == 2) + (
        config.vocab_size * config.hidden_size
    )


def _memory(config, layer, plan, settings, layers, compiled) -> dict:
    """Bytes of a step: of a model all of it at its peak, as pretrain runs it; of plain sizes what attention keeps."""
    if config is None:
        acting = layers - 2 * settings.dense_layers
        dense = layer.kept(plan.tokens)
        mixed = acting * layer.kept(plan.tokens, plan.length, local=plan.local_window > 0) + (layers - acting) * dense
        return {"bytes": mixed, "dense_bytes": layers * dense}
    from lighthouse.training.memory import estimate

    kind = {"bf16": layer.dtype != "float32", "compiled": compiled}
    return {
        "bytes": estimate(config, plan.tokens, lighthouse=settings, **kind).peak,
        "dense_bytes": estimate(config, plan.tokens, **kind).peak,
    }


def _text(found: dict) -> str:
    layer = Layer(**{name: found["layer"][name] for name in ("heads", "kv_heads", "head_dim", "dtype")})
    lines = _pyramid_lines(found) if found["parents"] else [f"{found['tokens']:,} tokens, nothing is chosen", ""]
    if found["local_window"]:
        beside = "beside it" if found["parents"] else "and nothing else"
        lines.append(f"local window     exact attention to the last {found['local_window']:,} tokens, {beside}")
    lines += [
        "",
        f"A layer ({layer}), forward and backward, a batch of one:",
        f"  attention work   {found['layer']['attention_work']:.2%} of dense",
        f"  kept for backward {_of_dense(found['layer']['kept_bytes'], found['layer']['dense_kept_bytes'])}",
    ]
    if "estimate" in found:
        its = found["estimate"]
        lines += [
            f"  estimate here    dense {_seconds(its['dense'])}, Lighthouse {_seconds(its['lighthouse'])}: "
            f"{its['speedup']:.1f} times as fast, {_give_or_take(its['precision'])}",
            *(f"                   {line}" for line in _known(its["precision"])),
            f"                   of Lighthouse's: {_parts(its)}",
        ]
        if its["graph_speedup"] > 1.05 * its["speedup"]:
            lines.append(f"                   without launches, as a CUDA graph, {its['graph_speedup']:.1f} times")
        pays = its["pays_from_tokens"]
        lines.append(
            f"                   faster than dense from about {pays:,} tokens on"
            if pays
            else "                   not faster than dense at any length up to 1,048,576"
        )
        lines.append(f"                   on {found['device']}")
    if "step" in found:
        lines += ["", *_step_lines(found["step"])]
    for warning in found["warnings"]:
        lines += ["", f"Warning: {warning}."]
    return "\n".join(lines)


def _pyramid_lines(found: dict) -> list[str]:
    lines = [f"{found['tokens']:,} tokens, {found['parents']:,} parents per level", ""]
    lines.append(f"{'level':>6}{'window':>12}{'entries':>14}{'chosen':>14}")
    for level, row in enumerate(zip(found["windows"], found["entries"], found["chosen"], strict=True)):
        lines.append(
            f"{level:>6}" + "".join(f"{number:>{width},}" for number, width in zip(row, (12, 14, 14), strict=True))
        )
    return [
        *lines,
        "",
        f"sub-sequence S   {found['length']:,} entries, S/N {found['length_share']:.2%}",
        f"kept share       {found['kept_share']:.2%} of the tokens are kept at level 0",
    ]


def _parts(estimate: dict) -> str:
    names = {"inner": "inner attention", "local": "local window", "movement": "its operators"}
    return ", ".join(f"{text} {_seconds(estimate[name])}" for name, text in names.items() if estimate[name])


def _step_lines(step: dict) -> list[str]:
    model, dense = step["model"], 2 * step["dense_layers"]
    lines = [
        f"A step of {f'the model {model!r}' if model else 'attention alone'}, {step['layers']} layers, {dense} dense:"
    ]
    lines.append(f"  attention work   {step['attention_work']:.2%} of dense")
    if model:
        lines.append(f"  all products     {step['work']:.2%} of dense's operations")
    what = "memory, at least" if model else "kept for backward"
    lines.append(f"  {what:<16} {_of_dense(step['bytes'], step['dense_bytes'])}")
    if step["speedup"]:
        left_out = "at most" if model else "attention alone:"
        lines.append(
            f"  estimate here    {left_out} {step['speedup']:.1f} times as fast"
            + ("; norms, rotations and the optimizer are left out (lighthouse bench --train measures)" if model else "")
        )
    return lines


def _bytes(size: float) -> str:
    return mib(size) if size < 2**30 else f"{size / 2**30:,.2f} GiB"


def _give_or_take(precision: dict) -> str:
    part = precision["part"]
    return "the error is not known" if part is None else f"give or take {max(part, 0.01):.0%}"


def _known(precision: dict) -> list[str]:
    """What the precision follows from, a line each."""
    lines, check, spread, days = [], precision["check"], precision["spread"], round(precision["days"])
    if check is not None:
        by = "by bench" if check["by"] == "bench" else "with the rates"
        side = "above" if check["error"] >= 0 else "below"
        lines.append(
            f"at {check['tokens']:,} tokens, the nearest length that was measured, {by}, it is "
            f"{abs(check['error']):.0%} {side} the measured speed-up"
        )
    if spread is not None and spread > BUSY:
        lines.append(
            f"the machine was busy when the rates were measured: the same call took up to {spread:.0%} longer "
            "than the fastest; the next `lighthouse plan` measures them again"
        )
    elif precision["part"] is None:
        lines.append("at so short a length the fixed cost of each call dominates: measure it with lighthouse bench")
    if days:
        lines.append(f"the rates were measured {days} day{'' if days == 1 else 's'} ago; --measure measures them again")
    return lines


def _of_dense(size: float, dense: float) -> str:
    return f"{_bytes(size)}, dense {_bytes(dense)} ({size / dense:.2f} of it)"


def _seconds(seconds: float) -> str:
    return f"{seconds:,.2f} s" if seconds >= 1 else f"{1e3 * seconds:,.2f} ms"


# Options that bench has too


def add_settings(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("lighthouse")
    add_method(group)
    group.add_argument("--dense_layers", type=int, help="layers at each end that stay dense (default: as in pretrain)")


def add_layer(parser: argparse.ArgumentParser, *, dtypes: str | None = None) -> None:
    """Sizes and dtype of a layer; `dtypes="+"`: of several dtypes, one after the other."""
    group = parser.add_argument_group("layer")
    group.add_argument("--heads", type=int, help="query heads (default: 4, on a GPU 8)")
    group.add_argument("--kv_heads", type=int, help="key-value heads (default: as many as query heads)")
    group.add_argument("--head_dim", type=int, help="default: 64, on a GPU 128")
    group.add_argument("--dtype", nargs=dtypes, choices=DTYPES, metavar="DTYPE",
                       help=f"{' or '.join(DTYPES)} (default: float32, on a GPU bfloat16)")  # fmt: skip


def add_device(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--device", choices=["cpu", "cuda"], help="default: cuda where there is one")
    parser.add_argument("--threads", type=int, help="CPU threads (default: as many as PyTorch uses)")
    parser.add_argument("--measure", action="store_true",
                        help=f"measure the device's rates again (cached in {cache_file()})")  # fmt: skip
    parser.add_argument("--json", metavar="FILE", help="write the numbers as JSON to FILE; - is standard output")


def chosen_device(options: argparse.Namespace) -> str:
    """The device asked for, or the one that exists. Raises `ValueError`."""
    threads, cores = getattr(options, "threads", None), len(os.sched_getaffinity(0))
    if threads is not None:
        if not 1 <= threads <= cores:
            raise ValueError(f"threads={threads}: from 1 to {cores}, the cores of this process, are needed")
        torch.set_num_threads(threads)
    if options.device == "cuda" and not torch.cuda.is_available():
        raise ValueError("device='cuda': PyTorch finds no GPU here; use --device cpu")
    return options.device or ("cuda" if torch.cuda.is_available() else "cpu")


def described(options: argparse.Namespace, tokens: int, device: str):
    """The layer, and the model's configuration or None. Raises `ValueError`."""
    sizes = {name: getattr(options, name, None) for name in OF_THE_LAYER}
    if options.model is None:
        layers = sizes.pop("layers")
        if layers is not None and layers < 1:
            raise ValueError(f"layers={layers}: at least one is needed")
        return default_layer(device, dtype=options.dtype, **sizes), None
    given = [name for name, value in sizes.items() if value is not None]
    if given:
        raise ValueError(
            f"model={options.model!r} with {given[0]}={sizes[given[0]]}: the model has its own; give only one of them"
        )
    from lighthouse.training.model import new_config

    config: Any = new_config(options.model, tokens)  # Transformers has numbers for what it declares optional
    heads, kv_heads, head_dim = config.num_attention_heads, config.num_key_value_heads, config.head_dim
    return Layer(heads, kv_heads, head_dim, options.dtype or LAYERS[device].dtype), config


def _parser() -> Parser:
    parser = Parser(
        prog="lighthouse plan",
        description="Shows what a length and settings give: the levels, the sub-sequence, the work and memory of a\n"
        "layer and of a training step relative to dense, and the estimated speed-up on this device. The\n"
        "estimate uses rates that are measured once, in under a minute, and cached.",
        epilog=EXAMPLE,
    )
    parser.add_argument(
        "--tokens", "--context", type=int, default=TOKENS, help=f"tokens in a sequence (default: {TOKENS:,})"
    )
    parser.add_argument("--model", metavar="SIZE|CONFIG", help="a size or configuration, as in pretrain")
    parser.add_argument("--no_estimate", action="store_true", help="measure nothing and show no estimated times")
    add_device(parser)
    add_layer(parser)
    parser.add_argument("--layers", type=int, help="layers of the model, to estimate a whole step")
    add_settings(parser)
    return parser
