"""`lighthouse bench`: dense attention against Lighthouse on this device, and beside it what the plan estimated."""

from __future__ import annotations

import argparse
import json
import math
import sys
from collections.abc import Sequence
from pathlib import Path

import torch

from lighthouse.cli.plan import add_device, add_layer, add_settings, chosen_device
from lighthouse.cli.shared import check_folders, say
from lighthouse.core.method import Method
from lighthouse.speed import estimates as speed
from lighthouse.speed.benchmark import TOKENS, Bench, draw, need_matplotlib
from lighthouse.speed.measure import WrongResult

EXAMPLE = """\
examples:
  lighthouse bench --tokens 1024 2048
  lighthouse bench --tokens 8192 32768 65536 --dtype bfloat16 --json bench.json --resume --plot bench.png
  lighthouse bench --tokens 2048 --train --model nano --context 2048
"""

MIB = 2**20
COLUMNS = ("tokens", "S", "dense", "Lighthouse", "times", "estimate", "error", "peak dense", "Lighthouse", "of dense")
WIDTHS = (9, 9, 13, 13, 8, 10, 8, 13, 13, 10)


def main(arguments: Sequence[str]) -> int:
    """Runs `lighthouse bench` and returns the exit status."""
    options = _parser().parse_args(arguments)
    try:
        bench, file = _prepared(options)
    except (ValueError, TypeError) as error:
        print(f"lighthouse bench: error: {error}", file=sys.stderr)
        return 2
    except ImportError as error:
        print(f"lighthouse bench: error: {error}", file=sys.stderr)
        return 1
    try:
        _run(bench, file, options)
    except (WrongResult, OSError, ImportError, torch.OutOfMemoryError) as error:
        print(f"lighthouse bench: error: {error}", file=sys.stderr)
        if isinstance(error, torch.OutOfMemoryError):
            print("shorter --tokens fit; what was measured before is in --json", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        if file is not None and file.is_file():
            print(f"what was measured is in {file}; --resume goes on", file=sys.stderr)
        raise
    return 0


def _prepared(options: argparse.Namespace) -> tuple[Bench, Path | None]:
    """Everything that can be refused is refused here."""
    device = chosen_device(options)
    if options.tokens is None:
        options.tokens = list(TOKENS[device])
    for tokens in options.tokens:
        if tokens < 1:
            raise ValueError(f"tokens={tokens}: at least one token is needed")
    if not 0 < options.budget < math.inf:
        raise ValueError(f"budget={options.budget}: seconds above 0 are needed")
    if options.resume and options.json in (None, "-"):
        raise ValueError("resume: --json FILE is needed, the file to go on with")
    if options.train:
        from lighthouse.core.settings import LighthouseSettings
        from lighthouse.training.model import check_head_dim, check_model

        layers = check_model(options.model, options.context)
        check_head_dim(options.model, options.context, device)
        settings = LighthouseSettings(Method.of(options), options.dense_layers).for_layers(layers)
        options.dense_layers = settings.dense_layers
        _check_acts(options)
    check_folders(options, "json", "plot")
    layer = speed.default_layer(
        device, heads=options.heads, kv_heads=options.kv_heads, head_dim=options.head_dim, dtype=options.dtype
    )
    bench = Bench(
        layer,
        device,
        Method.of(options),
        budget=options.budget,
        again=options.measure,
        say=say,
    )
    file = None if options.json in (None, "-") else Path(options.json)
    if file is not None and file.exists():
        if not options.resume:
            raise ValueError(f"json={str(file)!r} is there already: --resume goes on with it, or give another file")
        bench.resume(file)
    if options.plot:
        need_matplotlib()  # before anything is measured
    return bench, file


def _check_acts(options: argparse.Namespace) -> None:
    """Refuses a training step whose side with Lighthouse would be dense too. Raises `ValueError`."""
    made = Method.of(options).plan(options.context)
    if len(made.windows) == 1 or not made.entries[-1]:
        raise ValueError(
            f"context={options.context} with windows of {', '.join(map(str, made.windows))} tokens: this is dense "
            "attention, nothing to compare; take a longer --context or other --pool_ratios"
        )
    if made.length > made.tokens:
        raise ValueError(
            f"context={options.context}: the sub-sequence has {made.length:,} entries, "
            f"{made.length / made.tokens:.0%} of the tokens, so that a model stays dense; take a smaller --select_topk "
            "or a longer --context"
        )


def _run(bench: Bench, file: Path | None, options: argparse.Namespace) -> None:
    out = sys.stderr if options.json == "-" else sys.stdout

    def show(line: str) -> None:
        print(line, file=out, flush=True)

    show(f"{bench.results['device']}; torch {torch.__version__}; a layer of {bench.layer}, forward and backward")
    say("the result against float64")
    show(f"checked: the error against float64 is {bench.check():.2f} of dense attention's\n")
    show(line(COLUMNS))
    for tokens in sorted(set(options.tokens)):
        row = bench.has(tokens)
        if row is None:
            row = bench.measure(tokens)
            if file is not None:
                bench.save(file)
        show(line(cells(row)))
    show("")
    for note in notes(bench.results["rows"], speed.SHORT[bench.device]):
        show(note)
    show(pays(bench))
    if options.train:
        row = bench.has_step(options.model, options.context, options.dense_layers)
        if row is None:
            row = bench.measure_step(options.model, options.context, dense_layers=options.dense_layers)
            if file is not None:
                bench.save(file)
        show(step_lines(row))
    if bench.again:
        say("--measure: no length was left to measure, so the rates were not measured anew either")
    if file is not None:
        bench.save(file)
    elif options.json == "-":
        print(json.dumps(bench.results, indent=1))
    if options.plot:
        draw(bench.results, Path(options.plot))
        show(f"\nPicture: {options.plot}")


def line(parts: Sequence[str]) -> str:
    return "".join(f"{part:>{width}}" for part, width in zip(parts, WIDTHS, strict=True))


def cells(row: dict) -> list[str]:
    return [
        f"{row['tokens']:,}",
        f"{row['length']:,}",
        f"{1e3 * row['dense_seconds']:,.2f} ms",
        f"{1e3 * row['lighthouse_seconds']:,.2f} ms",
        f"{row['speedup']:.2f}",
        f"{row['estimate']:.2f}",
        f"{row['error']:+.0%}",
        f"{row['dense_peak_bytes'] / MIB:,.1f} MiB",
        f"{row['lighthouse_peak_bytes'] / MIB:,.1f} MiB",
        f"{row['lighthouse_peak_bytes'] / row['dense_peak_bytes']:.2f}",
    ]


def notes(rows: Sequence[dict], short: float = 0.0) -> list[str]:
    """What must be known of times: which are of one call, and where the machine was not quiet.

    The spread of times up to `short` seconds says nothing.
    """
    found, names = [], {"dense": "dense", "lighthouse": "Lighthouse"}

    def where(row: dict) -> str:
        return f"{row.get('tokens') or row['context']:,} tokens"

    sides = [(row, name, label) for row in rows for name, label in names.items()]
    once = [f"{label} at {where(row)}" for row, name, label in sides if row.get(f"{name}_calls") == 1]
    if once:
        found.append(f"Of one call alone, which says nothing of its spread: {'; '.join(once)}.")
    noisy = [
        f"{label} at {where(row)} by {row[f'{name}_spread']:.0%}"
        for row, name, label in sides
        if row.get(f"{name}_spread", 0) > speed.BUSY and row.get(f"{name}_seconds", 1) > short
    ]
    if noisy:
        found.append(
            f"The machine was not quiet: the median call was slower than the fastest, {'; '.join(noisy)}. These "
            "speed-ups may be others when it is."
        )
    return found


def pays(bench: Bench) -> str:
    found = bench.pays_from()
    if found is None:
        return "Lighthouse is not faster at the longest of these lengths: longer --tokens, or a smaller --select_topk."
    first = found == bench.results["rows"][0]["tokens"]
    return f"Lighthouse is faster from {found:,} tokens on" + (", the shortest measured." if first else ".")


def step_lines(row: dict) -> str:
    lines = [
        f"\nA training step of {row['model']!r} at {row['context']:,} tokens, {2 * row['dense_layers']} layers dense:",
        f"{'':12}{'tokens/s':>14}{'peak memory beyond weights and states':>40}",
    ]
    for name, label in (("dense", "dense"), ("lighthouse", "Lighthouse")):
        peak = f"{row[f'{name}_peak_bytes'] / MIB:,.1f} MiB"
        lines.append(f"{label:12}{row[f'{name}_tokens_per_second']:>14,.0f}{peak:>40}")
    lines += [f"{row['speedup']:.2f} times as fast", *notes([row])]
    return "\n".join(lines)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="lighthouse bench",
        description="Times one attention layer on this device, dense against Lighthouse, over several lengths; the "
        "result is checked first. Beside each speed-up stands what `lighthouse plan` estimates for it.",
        epilog=EXAMPLE,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--tokens", type=int, nargs="+",
                        help="lengths (default: 1,024 to 16,384; on a GPU 4,096 to 262,144)")  # fmt: skip
    parser.add_argument("--budget", type=float, default=8.0,
                        help="seconds for the calls of a length; on a CPU slow ones are one (default: 8)")  # fmt: skip
    add_device(parser)
    parser.add_argument("--resume", action="store_true", help="go on with the results that --json has")
    parser.add_argument("--plot", metavar="FILE", help="draw time, speed-up and memory against length there (PNG)")
    add_layer(parser)
    add_settings(parser)
    group = parser.add_argument_group("training step")
    group.add_argument("--train", action="store_true", help="time a step of a model, too")
    group.add_argument("--model", default="tiny", metavar="SIZE|CONFIG", help="as pretrain takes it (default: tiny)")
    group.add_argument("--context", type=int, default=8192, help="tokens of the step (default: 8,192)")
    return parser
