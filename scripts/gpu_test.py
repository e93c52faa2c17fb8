#!/usr/bin/env python3
"""Runs every test that needs a GPU, on one GPU, and writes what came of it into one JSON file.

Needs no build tool and no network: the C++ test program, the native library beside the package or installed, and a
Python with torch, pytest and hypothesis; with pytest-xdist it is quicker. The parts run in lanes, side by side: what
needs much of the GPU's memory is one lane, so that nothing of it skips for the other's sake. The file is written again
whenever a part ends, and a part that takes too long is ended.
"""

from __future__ import annotations

import argparse
import collections
import datetime
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
import xml.etree.ElementTree as ElementTree
from dataclasses import asdict, dataclass, field
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]

# What the Python that runs the tests has.
VERSIONS = """
import importlib.metadata, json, platform, torch
def version(name):
    try: return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError: return None
names = ("pytest", "hypothesis", "pytest-xdist", "transformers")
there = torch.cuda.is_available()
print(json.dumps({
    "device": torch.cuda.get_device_name() if there else None,
    "compute_capability": "%d.%d" % torch.cuda.get_device_capability() if there else None,
    "memory": torch.cuda.get_device_properties(0).total_memory if there else None,
    "versions": {"python": platform.python_version(), "torch": torch.__version__, "cuda": torch.version.cuda,
                 "cudnn": torch.backends.cudnn.version(), **{name: version(name) for name in names}},
}))
"""


@dataclass
class Part:
    """One command and what came of it; `ended` is "passed", "failed", "timed out" or, without a GPU, "skipped"."""

    name: str
    command: list[str] = field(default_factory=list)
    limit: float = 0.0  # seconds
    ended: str = "not begun"
    reason: str | None = None  # of a part that was skipped as a whole, or did not come to its end
    seconds: float = 0.0
    passed: int = 0
    failed: int = 0
    skipped: int = 0
    failures: list[str] = field(default_factory=list)
    skips: dict[str, int] = field(default_factory=dict)  # how many tests, by reason

    def count(self, results: list[tuple[str, str, str]]) -> None:
        """Takes (test, "passed" or "failed" or "skipped", reason)."""
        kinds = collections.Counter(kind for _, kind, _ in results)
        self.passed, self.failed, self.skipped = (kinds[kind] for kind in ("passed", "failed", "skipped"))
        self.failures = [name for name, kind, _ in results if kind == "failed"]
        self.skips = dict(collections.Counter(reason for _, kind, reason in results if kind == "skipped"))


def of_gtest(log: str, _: Path) -> list[tuple[str, str, str]]:
    """What GoogleTest says of each test. One that began and has no end has failed: the program died, or was ended."""
    found, words = {}, {"OK": "passed", "FAILED": "failed", "SKIPPED": "skipped"}
    name, lines = None, []
    for line in log.splitlines():
        marked = re.match(r"\[ +(RUN|OK|FAILED|SKIPPED) +\] ([^\s,]+)", line)
        if marked is None:
            lines.append(line)
        elif marked[1] == "RUN":
            name, lines = marked[2], []
            found[name] = ("failed", "")
        elif marked[2] == name:
            reasons = [text for text in lines if text.strip() and not re.search(r":\d+: Skipped$", text)]
            found[name] = (words[marked[1]], reasons[-1].strip() if reasons else "")
            name = None  # it is named once more in the summary
    return [(test, *of) for test, of in found.items()]


def of_pytest(log: str, file: Path) -> list[tuple[str, str, str]]:
    """From pytest's own file or, where it did not live to write it, from its lines, one for each test."""
    if not file.is_file():
        lines = re.findall(r"(PASSED|FAILED|SKIPPED) (\S+::\S+)|(\S+::\S+) (PASSED|FAILED|SKIPPED)", log)
        return [(first or last, (kind or its).lower(), "") for kind, first, last, its in lines]
    found = []
    for test in ElementTree.parse(file).iter("testcase"):
        kinds = {child.tag: child for child in test}
        name = f"{test.get('classname')}::{test.get('name')}"
        if "failure" in kinds or "error" in kinds:
            found.append((name, "failed", ""))
        elif "skipped" in kinds:
            found.append((name, "skipped", kinds["skipped"].get("message") or ""))
        else:
            found.append((name, "passed", ""))
    return found


class Checks:
    """The parts, and where they are written to."""

    def __init__(self, options: argparse.Namespace):
        self.options, self.begun = options, time.monotonic()
        self.folder = Path(options.output).resolve().with_suffix("")
        self.folder.mkdir(parents=True, exist_ok=True)
        self.environment = dict(os.environ)
        if (ROOT / "python" / "lighthouse" / "liblighthouse.so").exists():  # or it is installed
            path = [str(ROOT / "python"), os.environ.get("PYTHONPATH", "")]
            self.environment["PYTHONPATH"] = os.pathsep.join(filter(None, path))
        threads = max(1, (os.cpu_count() or 1) // (options.workers + 2))
        self.environment.setdefault("OMP_NUM_THREADS", str(threads))
        self.head = {
            "command": sys.argv,
            "began": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
            # Of a checkout alone: a copy of the files may lie within another one.
            "commit": self._answer(["git", "-C", str(ROOT), "rev-parse", "HEAD"]) if (ROOT / ".git").exists() else None,
            "driver": self._answer(["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]),
        }
        self.head |= json.loads(self._answer([options.python, "-c", VERSIONS]) or "{}")
        self.lock = threading.Lock()
        self.lanes = self._lanes()
        self.parts = [part for lane in self.lanes for part, _ in lane]

    def _answer(self, command: list[str]) -> str | None:
        """The last line that a command says, or None."""
        try:
            done = subprocess.run(command, capture_output=True, text=True, timeout=120, env=self.environment)
        except (OSError, subprocess.TimeoutExpired):
            return None
        return done.stdout.strip().splitlines()[-1] if done.returncode == 0 and done.stdout.strip() else None

    def _lanes(self) -> list[list[tuple[Part, object]]]:
        options, program = self.options, Path(self.options.cpp_tests).resolve()
        versions = self.head.get("versions", {})
        missing = None if program.is_file() else f"{program} is not there: build lighthouse_tests"
        sanitizer = shutil.which(options.sanitizer) or shutil.which("/usr/local/cuda/bin/compute-sanitizer")

        def cpp(name: str, filter: str, limit: float, before: tuple[str, ...] = (), why: str | None = None):
            command = [*before, str(program), f"--gtest_filter={filter}"]
            return Part(name, command, limit, reason=missing or why), of_gtest

        def sanitized(tool: str):
            before = (sanitizer or options.sanitizer, "--tool", tool, "--error-exitcode", "9")
            why = None if sanitizer else f"{options.sanitizer} is not there"
            return cpp(tool, options.sanitizer_filter, 240, before, why)

        def python(name: str, files: list[str], limit: float, workers: int):
            parallel = ["-n", str(workers)] if workers > 1 and versions.get("pytest-xdist") else []
            results = f"--junitxml={self.folder / name}.xml"
            files = [str(Path("tests/python") / file) for file in files]
            command = [options.python, "-m", "pytest", "-v", "-m", "gpu", *parallel, results, *files]
            return Part(name, command, limit, reason=None if versions else f"{options.python} has no torch"), of_pytest

        large = "test_cuda_large.py"
        there = sorted(path.name for path in (ROOT / "tests" / "python").glob("test_cuda*.py") if path.name != large)
        there += ["test_documents.py", "test_local_window.py"]
        if versions.get("transformers"):
            there += ["test_training_configuration.py"]
        return [
            [cpp("cpp", "*Cuda*-*Large*", 240), sanitized("memcheck"), sanitized("racecheck")],
            [python("python", there, 420, options.workers)],
            [cpp("cpp-large", "*Cuda*Large*", 240), python("python-large", [large], 240, 1)],
        ]

    def run(self) -> int:
        """The exit status: 0 if something was checked and all of it passed."""
        self.write()
        threads = [threading.Thread(target=self._run_lane, args=(lane,)) for lane in self.lanes]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        result = self.write()
        counts = ", ".join(f"{result[kind]} {kind}" for kind in ("passed", "failed", "skipped"))
        print(f"{result['ended']}: {counts}, in {result['seconds']:.0f} s; device: {result.get('device')}")
        return 0 if result["ended"] == "passed" else 1

    def _run_lane(self, lane) -> None:
        for part, results in lane:
            try:
                self._run_part(part, results)
            except Exception as error:  # the other parts and the file come to their end
                part.ended, part.reason = "failed", f"{type(error).__name__}: {error}"
            self.write()
            why = f" ({part.reason})" if part.reason else ""
            print(f"{part.name}: {part.ended}{why}, {part.seconds:.0f} s", *part.failures, sep="\n  ", flush=True)

    def _run_part(self, part: Part, results) -> None:
        if part.reason is not None:
            part.ended = "skipped" if part.reason.startswith(self.options.sanitizer) else "failed"
            return
        begun = time.monotonic()
        part.limit = round(min(part.limit, self.options.limit - (begun - self.begun)), 1)
        if part.limit <= 0:
            part.ended, part.reason = "timed out", f"all parts together have {self.options.limit:g} s"
            return
        log, file = (self.folder / f"{part.name}.{kind}" for kind in ("log", "xml"))
        file.unlink(missing_ok=True)
        part.ended = "running"
        with open(log, "wb") as output:
            process = subprocess.Popen(
                part.command, cwd=ROOT, env=self.environment, stdout=output, stderr=output, start_new_session=True
            )
            try:
                status = process.wait(part.limit)
            except subprocess.TimeoutExpired:
                status = None
                os.killpg(process.pid, signal.SIGKILL)  # its workers too
                process.wait()
        part.seconds = round(time.monotonic() - begun, 1)
        part.count(results(log.read_text(errors="replace"), file))
        if status is None:
            part.ended, part.reason = "timed out", f"ended after {part.limit:g} s; its last lines are in {log}"
        elif status != 0 or part.failed:
            part.ended, part.reason = "failed", f"exit status {status}; what it said is in {log}"
        else:
            part.ended = "passed" if part.passed else "skipped"

    def write(self) -> dict:
        with self.lock:
            bad = [part.name for part in self.parts if part.ended in ("failed", "timed out")]
            open_ = [part.name for part in self.parts if part.ended in ("not begun", "running")]
            passed = self.head.get("device") and any(part.passed for part in self.parts)
            result = {
                "ended": "running" if open_ else "failed" if bad else "passed" if passed else "skipped",
                **self.head,
                "seconds": round(time.monotonic() - self.begun, 1),
                **{kind: sum(getattr(part, kind) for part in self.parts) for kind in ("passed", "failed", "skipped")},
                "parts": [asdict(part) for part in self.parts],
            }
            partial = Path(f"{self.options.output}.partial")
            partial.write_text(json.dumps(result, indent=2) + "\n")
            os.replace(partial, self.options.output)
            return result


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument(
        "--output", default="gpu-test.json", help="the JSON; what the parts say goes into a folder of its name"
    )
    parser.add_argument("--cpp-tests", default="build/dev/lighthouse_tests", help="the C++ test program")
    parser.add_argument("--python", default=sys.executable, help="a Python with torch, pytest and hypothesis")
    parser.add_argument("--workers", type=int, default=3, help="processes for the Python tests, with pytest-xdist")
    parser.add_argument(
        "--sanitizer", default="compute-sanitizer", help="the program, where it is not found by its name"
    )
    parser.add_argument("--sanitizer-filter", default="Cases/CudaChains*", help="the C++ tests that run under it")
    parser.add_argument("--limit", type=float, default=470, help="seconds for everything")
    return Checks(parser.parse_args(arguments)).run()


if __name__ == "__main__":
    sys.exit(main())
