"""`lighthouse bench`: dense attention against Lighthouse on this device, with the plan's estimate."""

from __future__ import annotations

import argparse
import json
import math
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import torch

from lighthouse.cli.parser import Parser
from lighthouse.cli.plan import add_device, add_layer, add_settings, chosen_device
from lighthouse.cli.shared import check_folders, mib, say
from lighthouse.core.acting import why_it_cannot_act
from lighthouse.core.method import Method
from lighthouse.speed.benchmark import TOKENS, Bench
from lighthouse.speed.layer import default_layer
from lighthouse.speed.origin import command
from lighthouse.speed.picture import draw, need_matplotlib
from lighthouse.speed.rates import BUSY, SHORT
from lighthouse.speed.sides import WrongResult

EXAMPLE = """\
examples:
  lighthouse bench --tokens 1024 2048
  lighthouse bench --tokens 8192 32768 65536 --dtype bfloat16 --json bench.json --resume --plot bench.png
  lighthouse bench --tokens 98304 --parts --json bench.json
  lighthouse bench --tokens 2048 --train --model nano --context 2048
"""


def _ms(seconds: float) -> str:
    return f"{1e3 * seconds:,.2f} ms"


Column = tuple[str, str, Callable[[float], str], int]  # name, key in a row, how it is written, width
COLUMNS: tuple[Column, ...] = (
    ("tokens", "tokens", "{:,}".format, 9),
    ("S", "length", "{:,}".format, 9),
    ("dense", "dense_seconds", _ms, 13),
    ("Lighthouse", "lighthouse_seconds", _ms, 13),
    ("times", "speedup", "{:.2f}".format, 8),
    ("estimate", "estimate", "{:.2f}".format, 10),
    ("error", "error", "{:+.0%}".format, 8),
    ("peak dense", "dense_peak_bytes", mib, 13),
    ("Lighthouse", "lighthouse_peak_bytes", mib, 13),
    ("of dense", "peak_of_dense", "{:.2f}".format, 10),
)
PARTS: tuple[Column, ...] = (
    ("tokens", "tokens", "{:,}".format, 9),
    ("inner alone", "inner_seconds", _ms, 14),
    ("beside inner", "beside_inner_seconds", _ms, 14),
    ("forward: dense", "dense_forward_seconds", _ms, 16),
    ("Lighthouse", "lighthouse_forward_seconds", _ms, 13),
)
GRAPHS: tuple[Column, ...] = (
    ("graph: dense", "dense_graph_seconds", _ms, 14),
    ("Lighthouse", "lighthouse_graph_seconds", _ms, 13),
    ("times", "graph_speedup", "{:.2f}".format, 8),
    ("beside inner", "graph_beside_inner_seconds", _ms, 14),
)
OPERATORS: tuple[Column, ...] = (
    ("operator", "name", str, 26),
    ("bytes moved", "bytes", lambda size: f"{size / 1e6:,.1f} MB", 14),
    ("time", "seconds", lambda seconds: f"{1e3 * seconds:,.3f} ms", 13),
    ("GB/s", "speed", lambda speed: f"{speed / 1e9:,.1f}", 10),
    ("of a copy", "of_a_copy", "{:.0%}".format, 11),
)


def main(arguments: Sequence[str]) -> int:
    """Runs `lighthouse bench` and returns the exit status."""
    options = _parser().parse_args(arguments)
    try:
        benches, file = _prepared(options, command("lighthouse bench", arguments))
    except (ValueError, TypeError) as error:
        print(f"lighthouse bench: error: {error}", file=sys.stderr)
        return 2
    except ImportError as error:
        print(f"lighthouse bench: error: {error}", file=sys.stderr)
        return 1
    try:
        _run(benches, file, options)
    except (WrongResult, OSError, ImportError, torch.OutOfMemoryError) as error:
        print(f"lighthouse bench: error: {error}", file=sys.stderr)
        if isinstance(error, torch.OutOfMemoryError):
            print("use shorter --tokens; what was measured before is in --json", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        if file is not None and file.is_file():
            print(f"what was measured is in {file}; continue with --resume", file=sys.stderr)
        raise
    return 0


def _prepared(options: argparse.Namespace, called: str) -> tuple[list[Bench], Path | None]:
    """One for each dtype, and the file of their results. All checks are made here."""
    device = chosen_device(options)
    if options.tokens is None:
        options.tokens = list(TOKENS[device])
    for tokens in options.tokens:
        if tokens < 1:
            raise ValueError(f"tokens={tokens}: at least one token is needed")
    if not 0 < options.budget < math.inf:
        raise ValueError(f"budget={options.budget}: seconds above 0 are needed")
    if options.resume and options.json in (None, "-"):
        raise ValueError("resume: --json FILE is needed, the file to continue")
    if options.train:
        from lighthouse.core.settings import LighthouseSettings
        from lighthouse.training.model import check_head_dim, check_model

        layers = check_model(options.model, options.context)
        check_head_dim(options.model, options.context, device)
        settings = LighthouseSettings(Method.of(options), options.dense_layers).for_layers(layers)
        options.dense_layers = settings.dense_layers
        _check_acts(options)
    check_folders(options, "json", "plot")
    dtypes = list(dict.fromkeys(options.dtype or ()))
    layer = default_layer(
        device, heads=options.heads, kv_heads=options.kv_heads, head_dim=options.head_dim, dtype=(dtypes or [None])[0]
    )
    bench = Bench(
        layer,
        device,
        Method.of(options),
        budget=options.budget,
        parts=options.parts,
        again=options.measure,
        command=called,
        say=say,
    )
    file = None if options.json in (None, "-") else Path(options.json)
    if file is not None and file.exists():
        if not options.resume:
            raise ValueError(f"json={str(file)!r} already exists: continue it with --resume, or give another file")
        bench.resume(file)
    if options.plot:
        need_matplotlib()  # before anything is measured
    return [bench, *map(bench.of, dtypes[1:])], file


def _check_acts(options: argparse.Namespace) -> None:
    """Refuses a training step whose side with Lighthouse would be dense too. Raises `ValueError`."""
    why_not = why_it_cannot_act(options.context, Method.of(options))
    if why_not is not None:
        raise ValueError(f"context={options.context}: {why_not}")


def _run(benches: Sequence[Bench], file: Path | None, options: argparse.Namespace) -> None:
    out = sys.stderr if options.json == "-" else sys.stdout

    def show(line: str = "") -> None:
        print(line, file=out, flush=True)

    results = benches[0].results
    for bench in benches:
        show(f"{results['device']}; torch {torch.__version__}; a layer of {bench.layer}, forward and backward")
        show(f"Lighthouse with {bench.method}")
        _layers(bench, file, sorted(set(options.tokens)), show)
        if options.train:
            row = bench.has_step(options.model, options.context, options.dense_layers)
            if row is None:
                row = bench.measure_step(options.model, options.context, dense_layers=options.dense_layers)
                if file is not None:
                    bench.save(file)
            show(step_lines(row))
        if bench is not benches[-1]:
            show()
    if any(bench.again for bench in benches):
        say("--measure: all lengths were measured already, so the rates were not measured again either")
    if file is not None:
        benches[0].save(file)
    elif options.json == "-":
        print(json.dumps(results, indent=1))
    if options.plot:
        draw(results, Path(options.plot))
        show(f"\nPicture: {options.plot}")


def _layers(bench: Bench, file: Path | None, lengths: Sequence[int], show: Callable[..., None]) -> None:
    say("checking the result against float64")
    show(f"checked: the error against float64 is {bench.check():.2f} of dense attention's\n")
    show(header(COLUMNS))
    rows = []
    for tokens in lengths:
        row = bench.has(tokens)
        if row is None:
            row = bench.measure(tokens)
            if file is not None:
                bench.save(file)
        rows.append(row)
        show(line(row, COLUMNS))
    show()
    if bench.parts:
        columns = (*PARTS, *GRAPHS) if bench.on_gpu else PARTS
        for text in (header(columns), *(line(row, columns) for row in rows)):
            show(text)
        for row in rows:
            show(f"\n{row['tokens']:,} tokens, each operator alone:\n\n{operator_table(row, bench.results)}")
        show()
    for note in notes(bench.rows, SHORT[torch.device(bench.device).type]):
        show(note)
    show(pays(bench))


def header(columns: Sequence[Column]) -> str:
    return "".join(f"{name:>{width}}" for name, _, _, width in columns)


def line(row: dict, columns: Sequence[Column]) -> str:
    return "".join(f"{form(row[key]) if key in row else '-':>{width}}" for _, key, form, width in columns)


def operator_table(row: dict, results: dict) -> str:
    lines = [header(OPERATORS)]
    for name, found in row["operators"].items():
        speed = found["bytes"] / found["seconds"]
        rates = {"name": name, "speed": speed, "of_a_copy": speed / results["copy_bytes_per_second"]}
        lines.append(line(found | rates, OPERATORS))
    return "\n".join(lines)


def notes(rows: Sequence[dict], short: float = 0.0) -> list[str]:
    """Notes on the times: which are of a single call, and where the machine was busy.

    The spread of times up to `short` seconds means nothing.
    """
    found, names = [], {"dense": "dense", "lighthouse": "Lighthouse"}

    def where(row: dict) -> str:
        return f"{row.get('tokens') or row['context']:,} tokens"

    sides = [(row, name, label) for row in rows for name, label in names.items()]
    once = [f"{label} at {where(row)}" for row, name, label in sides if row.get(f"{name}_calls") == 1]
    if once:
        found.append(f"Timed by a single call, so the spread is not known: {'; '.join(once)}.")
    noisy = [
        f"{label} at {where(row)} by {row[f'{name}_spread']:.0%}"
        for row, name, label in sides
        if row.get(f"{name}_spread", 0) > BUSY and row.get(f"{name}_seconds", 1) > short
    ]
    if noisy:
        found.append(
            f"The machine was busy: the median call was slower than the fastest, {'; '.join(noisy)}. On a quiet "
            "machine these speed-ups may differ."
        )
    return found


def pays(bench: Bench) -> str:
    found = bench.pays_from()
    if found is None:
        window = " or --local_window" if bench.method.local_window else ""
        return (
            f"Lighthouse is not faster at the longest length: use longer --tokens or a smaller --select_topk{window}."
        )
    first = found == bench.rows[0]["tokens"]
    return f"Lighthouse is faster from {found:,} tokens on" + (", the shortest measured." if first else ".")


def step_lines(row: dict) -> str:
    lines = [
        f"\nA training step of {row['model']!r} at {row['context']:,} tokens, {2 * row['dense_layers']} layers dense:",
        f"{'':12}{'tokens/s':>14}{'peak memory beyond weights and states':>40}",
    ]
    for name, label in (("dense", "dense"), ("lighthouse", "Lighthouse")):
        peak = mib(row[f"{name}_peak_bytes"])
        lines.append(f"{label:12}{row[f'{name}_tokens_per_second']:>14,.0f}{peak:>40}")
    lines += [f"{row['speedup']:.2f} times as fast", *notes([row])]
    return "\n".join(lines)


def _parser() -> Parser:
    parser = Parser(
        prog="lighthouse bench",
        description="Times one attention layer on this device, dense and with Lighthouse, at several lengths, after\n"
        "checking its result. Each speed-up is shown with the estimate of `lighthouse plan`.",
        epilog=EXAMPLE,
    )
    parser.add_argument("--tokens", type=int, nargs="+", metavar="N",
                        help="lengths in tokens (default: 1,024 to 16,384; on a GPU 4,096 to 262,144)")  # fmt: skip
    parser.add_argument("--budget", type=float, default=8.0,
                        help="seconds for the timed calls of each length, about; on a CPU a call that takes half of it "
                        "is timed once (default: 8)")  # fmt: skip
    parser.add_argument("--parts", action="store_true",
                        help="also time the inner attention, the forward pass and each operator separately, on a GPU "
                        "also as CUDA graphs")  # fmt: skip
    add_device(parser)
    parser.add_argument("--resume", action="store_true", help="continue from the results in the --json file")
    parser.add_argument("--plot", metavar="FILE", help="plot time, speed-up and memory against length to this PNG file")
    add_layer(parser, dtypes="+")
    add_settings(parser)
    group = parser.add_argument_group("training step")
    group.add_argument("--train", action="store_true", help="also time a training step of a model")
    group.add_argument("--model", default="tiny", metavar="SIZE|CONFIG", help="as in pretrain (default: tiny)")
    group.add_argument("--context", type=int, default=8192, help="tokens of the step (default: 8,192)")
    return parser
