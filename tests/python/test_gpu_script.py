"""`scripts/gpu_test.py` with programs that only say what the real ones would."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[2] / "scripts" / "gpu_test.py"

GOOD = """
[ RUN      ] Cases/CudaChains.AreRight/defaults
[       OK ] Cases/CudaChains.AreRight/defaults (3 ms)
[ RUN      ] Cases/CudaLarge.IsRight/many, where GetParam() = many
cuda_device.h:92: Skipped
23 GiB are needed

[  SKIPPED ] Cases/CudaLarge.IsRight/many, where GetParam() = many (0 ms)
[  SKIPPED ] Cases/CudaLarge.IsRight/many, where GetParam() = many
"""
CRASH = GOOD + "[ RUN      ] Cases/CudaChains.AreRight/one_level\n"
XML = """<testsuite><testcase classname="a" name="right"/>
<testcase classname="a" name="wrong"><failure message="no"/></testcase>
<testcase classname="a" name="left_out"><skipped message="no Transformers"/></testcase></testsuite>"""
GPU = json.dumps({"device": "a GPU", "versions": {"torch": "2.11", "pytest-xdist": None}})


def program(path: Path, *lines: str) -> Path:
    path.write_text("\n".join(["#!/bin/sh", *lines]) + "\n")
    path.chmod(0o755)
    return path


def say(text: str) -> str:
    return f"cat <<'END'\n{text}\nEND"


def python(path: Path, *tests: str, gpu: str = GPU) -> Path:
    """Stands for the Python that runs the tests: does the lines `tests` in pytest's place."""
    return program(path, f'if [ "$1" = -c ]; then {say(gpu)}\nexit; fi', *tests)


REPORTS = f'for each; do case $each in --junitxml=*) {say(XML)[:3]} >"${{each#*=}}"{say(XML)[3:]}\n;; esac; done'

# What the two programs do, how it all ends, and of each part what is counted: passed, failed, skipped.
ENDS = [
    ("all_right", [say(GOOD)], ["exit 0"], "passed", {"cpp": ("passed", 1, 0, 1), "memcheck": ("passed", 1, 0, 1)}),
    ("a_crash", [say(CRASH), "kill -9 $$"], ["exit 0"], "failed", {"cpp": ("failed", 1, 1, 1)}),
    ("a_failed_test", [say(GOOD)], [REPORTS, "exit 1"], "failed", {"python": ("failed", 1, 1, 1)}),
    ("too_long", [say(GOOD)], ["echo 'a::b PASSED'", "sleep 60 & wait"], "failed", {"python": ("timed out", 1, 0, 0)}),
    ("nothing_to_run", [say("")], ["exit 5"], "failed", {"cpp": ("skipped", 0, 0, 0), "python": ("failed", 0, 0, 0)}),
]


def run(folder: Path, tests: Path, interpreter: Path, *options: str) -> tuple[subprocess.CompletedProcess, dict]:
    output = folder / "gpu-test.json"
    program(folder / "sanitizer", "shift 4", '"$@"')
    own = ["--output", str(output), "--cpp-tests", str(tests), "--python", str(interpreter)]
    command = [sys.executable, str(SCRIPT), *own, "--sanitizer", str(folder / "sanitizer"), *options]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    return done, json.loads(output.read_text())


@pytest.mark.parametrize("cpp, tests, ended, parts", [e[1:] for e in ENDS], ids=[e[0] for e in ENDS])
def test_the_file_says_how_each_part_ended(tmp_path, cpp, tests, ended, parts):
    done, said = run(tmp_path, program(tmp_path / "cpp", *cpp), python(tmp_path / "python", *tests), "--limit", "3")
    assert said["ended"] == ended and done.returncode == (ended != "passed"), done.stdout + done.stderr
    found = {part["name"]: part for part in said["parts"]}
    assert len(found) == 6 and said["device"] == "a GPU"
    for name, (its, *counts) in parts.items():
        part = found[name]
        assert (part["ended"], *(part[kind] for kind in ("passed", "failed", "skipped"))) == (its, *counts), part
    assert found["cpp"]["skips"] in ({}, {"23 GiB are needed": 1})
    assert sum(part["passed"] for part in said["parts"]) == said["passed"]


def test_without_a_gpu_nothing_has_passed(tmp_path):
    interpreter = python(tmp_path / "python", "exit 0", gpu=json.dumps({"device": None, "versions": {"torch": "2.11"}}))
    done, said = run(tmp_path, program(tmp_path / "cpp", say(GOOD)), interpreter)
    assert said["ended"] == "skipped" and done.returncode == 1


def test_what_is_missing_has_not_passed(tmp_path):
    done, said = run(tmp_path, tmp_path / "nothing", tmp_path / "nowhere", "--sanitizer", "no-sanitizer")
    reasons = {part["name"]: (part["ended"], part["reason"]) for part in said["parts"]}
    assert reasons["cpp"] == ("failed", f"{tmp_path / 'nothing'} is not there: build lighthouse_tests")
    assert reasons["python"] == ("failed", f"{tmp_path / 'nowhere'} has no torch")
    assert done.returncode == 1 and said["ended"] == "failed"
