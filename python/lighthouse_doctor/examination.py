"""The checks in their order, run in another process, and a fresh one after each that fails.

So a library that kills the process when it is loaded, a kernel that hangs, or a GPU left unusable by the check before
is one failed line, and the checks after it still run.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict
from pathlib import Path
from typing import NamedTuple, NoReturn

from lighthouse_doctor import computing, machine, packages
from lighthouse_doctor.facts import said_by
from lighthouse_doctor.line import FAILED, NOTE, REINSTALL, Line

SECONDS_FOR_A_CHECK = 60

# Without the current folder on the path, which `-c` puts there.
OTHER_SIDE = """\
import sys
sys.path[:] = filter(None, sys.path)
from lighthouse_doctor.examination import answer
answer(sys.argv[1:])
"""


class Check(NamedTuple):
    look: Callable[[], Iterator[Line]]
    needs: tuple[str, ...] = ()  # if one of these checks fails, this one is not run
    needed: bool = True  # whether Lighthouse cannot train if the check itself breaks


CHECKS = {
    "python": Check(machine.check_python),
    "torch": Check(machine.check_torch),
    "driver": Check(machine.check_driver, ("torch",)),
    "gpus": Check(machine.check_gpus, ("torch", "driver")),
    "cudnn": Check(machine.check_cudnn, ("torch",), needed=False),
    "library": Check(packages.check_library, ("torch",)),
    "sdpa": Check(computing.check_backends, ("torch",), needed=False),
    "self-test": Check(computing.check_self_test, ("torch", "library")),
    "flash-attn": Check(packages.check_flash_attn, ("torch",), needed=False),
    "train extra": Check(packages.check_train_extra, needed=False),
    "memory": Check(machine.check_memory, needed=False),
    "disk": Check(machine.check_disk, needed=False),
}


def examine(checks: Iterable[str] = tuple(CHECKS), seconds: float = SECONDS_FOR_A_CHECK) -> Iterator[Line]:
    """Runs the checks, names of `CHECKS` in its order, and yields their lines as they come.

    A check that takes longer than `seconds` is ended and has failed. One that needs a failed check is a note.
    """
    failed: set[str] = set()
    waiting = list(checks)
    while waiting:
        name = waiting[0]
        reason = next((need for need in CHECKS[name].needs if need in failed), None)
        if reason is not None:
            yield Line(name, NOTE, f"not checked, because of {reason}", needed=False)
            waiting.pop(0)
            continue
        for name, line in _in_one_process(_until_blocked(waiting, failed), seconds):
            if line is None:
                waiting.remove(name)
                continue
            if line.stops:
                failed.add(line.check)
            yield line


def _until_blocked(names: list[str], failed: set[str]) -> list[str]:
    for count, name in enumerate(names):
        if failed.intersection(CHECKS[name].needs):
            return names[:count]
    return list(names)


def _in_one_process(names: list[str], seconds: float) -> Iterator[tuple[str, Line | None]]:
    """Lines of the checks as (check, line), and (check, None) at the end of each, up to the first that fails."""
    path = [entry or os.getcwd() for entry in sys.path] + [str(Path(__file__).resolve().parents[1])]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(path), "TOKENIZERS_PARALLELISM": "false"}
    with tempfile.TemporaryFile() as noise:
        process = subprocess.Popen(
            [sys.executable, "-c", OTHER_SIDE, *names],
            stdout=subprocess.PIPE,
            stderr=noise,
            text=True,
            env=environment,
        )
        late = threading.Event()

        def end():
            late.set()
            process.kill()

        def watched() -> threading.Timer:
            clock = threading.Timer(seconds, end)
            clock.start()
            return clock

        assert process.stdout is not None
        left, clock = list(names), watched()  # the first of them runs
        try:
            for said in process.stdout:
                report = json.loads(said)
                if report["line"] is not None:
                    yield left[0], Line(**report["line"])
                    continue
                clock.cancel()
                yield left.pop(0), None
                clock = watched()
            status = process.wait()
        finally:
            clock.cancel()
            process.kill()
            process.wait()
            process.stdout.close()
        if status == 0 or not left:
            return
        running = left[0]
        noise.seek(0)
        last = noise.read().decode(errors="replace").strip().splitlines()[-1:]
        why = f"gave no answer within {seconds:g} s" if late.is_set() else f"the process died: {_ending(status)}"
        fix = {"library": REINSTALL, "torch": "pip install --force-reinstall torch"}.get(running)
        yield running, Line(running, FAILED, "; ".join([why, *last]), fix, needed=CHECKS[running].needed)
        yield running, None


def _ending(status: int) -> str:
    if status >= 0:
        return f"exit status {status}"
    number = signal.Signals(-status)
    return f"{number.name} ({signal.strsignal(number)})"


def answer(names: list[str]) -> NoReturn:
    """The other side of `_in_one_process`. Ends after the first check that fails."""
    reports = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # keeps what libraries print out of the report

    def report(name, line):
        reports.write(json.dumps({"check": name, "line": line and asdict(line)}) + "\n")
        reports.flush()

    for name in names:
        failed = False
        try:
            for line in CHECKS[name].look():
                failed |= line.status == FAILED
                report(name, line)
        except Exception as error:
            failed = True
            report(name, Line(name, FAILED, said_by(error), needed=CHECKS[name].needed))
        report(name, None)
        if failed:
            break
    reports.flush()
    os._exit(0)  # skips what broken libraries do at the end of a process
