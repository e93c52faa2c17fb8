"""`lighthouse compare`: dense attention and others, side by side, and the model that can be shipped."""

from __future__ import annotations

import contextlib
import logging
import signal
import sys
from collections.abc import Sequence

from rich.console import Console
from transformers.utils.logging import disable_progress_bar

from lighthouse import report
from lighthouse.cli.pretrain import parse_run, run_parser
from lighthouse.cli.shared import check_folders, write_text
from lighthouse.report import standings
from lighthouse.report.checklist import checklist, passing, recovery
from lighthouse.report.compared import Comparison
from lighthouse.report.page import HTML
from lighthouse.studies.arms import DEFAULT_ARMS
from lighthouse.studies.compare import HOW_TO_GO_ON, Plan, compare_defaults, prepare_comparison
from lighthouse.training import RunFailed
from lighthouse.training.result import RESULTS, STOPPED

EXAMPLE = """\
examples:
  lighthouse compare                                    a small case on the standard library's sources, in minutes
  lighthouse compare --steps 40 --context 1024 --output_dir runs/quick
  lighthouse compare --arms dense window published lighthouse --output_dir runs/four
  lighthouse compare --config runs/books/config.yaml --seeds 0 1 --output_dir runs/books-compared
  lighthouse compare --config runs/books/config.yaml --seeds 0 1 --output_dir runs/books-compared --resume
"""


def main(arguments: Sequence[str]) -> int:
    """Runs `lighthouse compare` and returns the exit status. Faults after the checks keep their traceback."""
    arguments = list(arguments)
    parser, general = run_parser(
        "compare",
        "Trains a model with dense attention, with a local window alone and with Lighthouse, with the same seeds, data "
        "and schedule, one after the other. Reports speed, memory and the dense held-out loss of each, and which is "
        "ahead at equal steps, at equal time and far into the context; strips the Lighthouse model, checks it and "
        "times its inference. Takes every option of lighthouse pretrain; the defaults are a small case.",
        EXAMPLE,
        whole_help="--help-all" in arguments,
    )
    general.add_argument(
        "--arms",
        nargs="+",
        metavar="ARM",
        default=list(DEFAULT_ARMS),
        help="What is compared: dense, the baseline, and some of window (the local window alone), published (the "
        "pyramid alone, with dense layers) and lighthouse (the settings given).",
    )
    several = "Several seeds instead of --seed; all arms are trained with each in turn."
    general.add_argument("--seeds", type=int, nargs="+", metavar="SEED", help=several)
    general.add_argument("--json", metavar="FILE", help="Write the numbers as JSON to FILE; - is standard output.")
    parser.set_defaults(**compare_defaults(resume="--resume" in arguments))
    logging.basicConfig(format="%(message)s")
    disable_progress_bar()  # of writing model files, not that of training
    try:
        options, training, [own] = parse_run(parser, arguments)
        check_folders(own, "json")
        plan = prepare_comparison(options, training, arms=own.arms, seeds=own.seeds)
    except (ValueError, TypeError, OSError) as error:
        print(f"lighthouse compare: error: {error}", file=sys.stderr)
        return 2
    before = signal.signal(signal.SIGTERM, _stop)  # within a run its own handler is in force
    try:
        with contextlib.redirect_stdout(sys.stderr) if own.json == "-" else contextlib.nullcontext():
            found = plan.run(lambda message: print(f"\n{message}", flush=True))
            if found is not None:
                _say(plan, found)
    except RunFailed as error:
        print(f"lighthouse compare: error: {error}", file=sys.stderr)
        return 1
    except (KeyboardInterrupt, SystemExit):
        print(f"The comparison in {plan.folder} is not finished. {HOW_TO_GO_ON}", file=sys.stderr)
        raise
    finally:
        signal.signal(signal.SIGTERM, before)
    if found is not None and own.json is not None:
        write_text((plan.folder / RESULTS).read_text(encoding="utf-8"), own.json)
    return 0


def _say(plan: Plan, found: Comparison) -> None:
    console = Console()
    print()
    for seed in found.seeds:
        pairs = seed.pairs.values()
        times_compare = all(pair.control.why_not is None for pair in pairs)
        console.print(report.table(list(seed.runs.values()), times_compare=times_compare))
        print(*map(passing, pairs), *map(recovery, pairs), sep="\n", end="\n\n")
    print(*standings.said(found), sep="\n", end="\n\n")
    for check in checklist(found):
        head = f"[ ] {check.what}: {check.verdict.upper()}" if check.verdict else f"[x] {check.what}"
        print(head, f"    {check.evidence}", sep="\n")
    if found.stripped.exported is not None:
        print(f"\nPlain model, for AutoModelForCausalLM and AutoTokenizer: {found.stripped.exported.folder}")
    print(f"Report: {plan.folder / HTML}")


def _stop(number, frame):
    raise SystemExit(STOPPED)
