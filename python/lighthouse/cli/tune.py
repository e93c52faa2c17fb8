"""`lighthouse tune`: the options, the checks, the study, and what is printed at the end."""

from __future__ import annotations

import logging
import sys
from collections.abc import Sequence

from lighthouse.training.extra import require_tune_extra

require_tune_extra()

from rich.console import Console  # noqa: E402
from transformers.utils.logging import disable_progress_bar  # noqa: E402

from lighthouse.cli.pretrain import parse_run, run_parser  # noqa: E402
from lighthouse.cli.shared import check_folders, write_text  # noqa: E402
from lighthouse.report.study import nothing_known, of_the_given  # noqa: E402
from lighthouse.studies.tune import Study, TuneOptions, prepare_study  # noqa: E402
from lighthouse.training import RunFailed, Stopped  # noqa: E402
from lighthouse.training.result import STOPPED  # noqa: E402

EXAMPLE = """\
examples:
  lighthouse tune --model nano --context 2048 --steps 40 --trials 6 --output_dir runs/tune
  lighthouse tune --config runs/tune/study.yaml --resume            continues it, also from another terminal
  lighthouse tune --model nano --context 2048 --steps 40 --sampler grid --judge tokens --output_dir runs/grid \\
      --fixed learning_rate batch share --levels 3 --level_ratio 1/8 1/2 --topk 16 64 --local_windows 0 256
  lighthouse pretrain --config runs/tune/best.yaml --steps 200 --output_dir runs/tuned
"""

DEFAULTS = {"max_steps": 200, "output_dir": "runs/tune"}


def main(arguments: Sequence[str]) -> int:
    """Runs `lighthouse tune` and returns the exit status."""
    arguments = list(arguments)
    parser = _parser(whole_help="--help-all" in arguments)
    logging.basicConfig(format="%(message)s")
    disable_progress_bar()
    try:
        options, training, (tuning, general) = parse_run(parser, arguments)
        check_folders(general, "json")
        study = prepare_study(options, training, tuning)
    except (ValueError, TypeError, OSError) as error:
        print(f"lighthouse tune: error: {error}", file=sys.stderr)
        return 2
    return _run(study, general.json)


def _run(study: Study, json_file: str | None) -> int:
    # With --json - the numbers alone are on standard output.
    console = Console(file=sys.stderr if json_file == "-" else sys.stdout)

    def say(line: str) -> None:
        console.print(line, markup=False, highlight=False, soft_wrap=True)

    say(str(study))
    try:
        with console.status("") as status:
            result = study.run(say, lambda line: status.update(line.replace("[", r"\[")))
        if json_file is not None:
            write_text(result.results.read_text(encoding="utf-8"), json_file)
    except (KeyboardInterrupt, Stopped) as error:
        print(f"\nInterrupted. Finished trials are kept; continue with `{study.go_on}`.", file=sys.stderr)
        return 130 if isinstance(error, KeyboardInterrupt) else STOPPED
    except (RunFailed, OSError) as error:
        print(f"lighthouse tune: error: {error}", file=sys.stderr)
        if study.begun:
            print(f"Continue with `{study.go_on}`.", file=sys.stderr)
        return 1
    if json_file == "-":
        return 0
    if result.best is None:
        say(nothing_known(result))
    else:
        best, given = result.best, result.given
        than = "" if given is None or given is best else f"; the given setting {given.loss:.4f}"
        say(f"\nBest: trial {best.number}, {best.setting}: {best.loss:.4f}{than}")
        if given is None:
            say(of_the_given(result))
        say(f"To train with it: lighthouse pretrain --config {study.files.best} --steps N --output_dir FOLDER")
    say(f"Report: {study.folder / 'report.html'}")
    return 0


def _parser(whole_help: bool):
    parser, general = run_parser(
        "tune",
        "Tries settings around the given one, each in a short two-stage run, and judges them by the dense held-out "
        "loss at equal time or equal tokens. The run options are those of the given setting; --max_steps is the "
        "length of a trial. Trials save no checkpoints.",
        EXAMPLE,
        more=[TuneOptions],
        whole_help=whole_help,
    )
    parser.set_defaults(**DEFAULTS)
    general.add_argument("--json", metavar="FILE", help="write the numbers as JSON to FILE; - is standard output")
    return parser
