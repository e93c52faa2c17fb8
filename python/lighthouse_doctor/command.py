"""The command line of `lighthouse doctor`, and the entry point of all `lighthouse` commands; it runs before
the package is imported.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

from lighthouse_doctor.examination import examine
from lighthouse_doctor.line import can_train, verdict

EXAMPLE = """\
examples:
  lighthouse doctor
  lighthouse doctor --json doctor.json
  lighthouse doctor --json - 2>/dev/null

exit status: 0 Lighthouse can train here (without a GPU: on the CPU, slowly), 1 it cannot, 2 the arguments are wrong
"""


def lighthouse() -> int:
    """The `lighthouse` command: `doctor` without importing the package, every other by `lighthouse.cli`."""
    try:
        if sys.argv[1:2] == ["doctor"]:
            return main(sys.argv[2:])
        from lighthouse.cli import main as command

        return command()
    except KeyboardInterrupt:  # also while importing, which takes seconds
        print("interrupted", file=sys.stderr)
        return 130


def main(arguments: Sequence[str]) -> int:
    """Runs `lighthouse doctor` and returns the exit status. Here and not in `cli`, which needs the whole package."""
    parser = argparse.ArgumentParser(
        prog="lighthouse doctor",
        description="Checks whether Lighthouse can train on this machine, one line per check, with the command that "
        "fixes each problem.",
        epilog=EXAMPLE,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--json", metavar="FILE", help="write the lines as JSON to FILE; - is standard output")
    options = parser.parse_args(list(arguments))
    if options.json not in (None, "-") and not Path(options.json).parent.is_dir():
        parser.error(f"argument --json: {options.json!r}: the folder {str(Path(options.json).parent)!r} does not exist")
    if options.json not in (None, "-") and Path(options.json).is_dir():
        parser.error(f"argument --json: {options.json!r} is a folder: the name of a file is needed")
    out = sys.stderr if options.json == "-" else sys.stdout
    lines = []
    for line in examine():
        lines.append(line)
        print(line, file=out, flush=True)
    print(f"\n{verdict(lines)}", file=out)
    if options.json is not None:
        text = json.dumps({"can_train": can_train(lines), "lines": [asdict(line) for line in lines]}, indent=2) + "\n"
        try:
            sys.stdout.write(text) if options.json == "-" else Path(options.json).write_text(text, encoding="utf-8")
        except OSError as error:
            print(f"lighthouse doctor: error: --json {options.json!r}: {error.strerror}", file=sys.stderr)
            return 1
    return 0 if can_train(lines) else 1
