"""What the commands' parsers say of options that do not exist, and of folders that cannot be written to."""

from __future__ import annotations

import errno
import os
import sys
from pathlib import Path

import pytest

from lighthouse.cli import main
from lighthouse.cli.parser import Parser
from lighthouse.training import PretrainOptions, TrainingOptions, space
from lighthouse.training.checks import check_together
from lighthouse_doctor import command

UNKNOWN = [
    ("letters_swapped", ["--modle", "x"], "there is no option --modle; nearest: --model"),
    ("dashes", ["--model", "x", "--output-dirs", "y"], "there is no option --output-dirs; nearest: --output_dir"),
    ("with_a_value", ["--modl=x"], "there is no option --modl; nearest: --model"),
    ("the_beginning_of_a_name", ["--out", "y"], "there is no option --out; nearest: --output_dir"),
    ("nothing_like_it", ["--temperature", "1"], "there is no option --temperature; see"),
    ("before_one_that_is_missing", ["--modle", "x"], "--modle; nearest"),
    ("a_word_too_many", ["--model", "x", "y"], "'y' stands after no option that takes it"),
    (
        "a_choice",
        ["--model", "x", "--kind", "daark"],
        "--kind: there is no 'daark'; nearest: dark; one of dark, light is",
    ),
    ("no_number", ["--model", "x", "--steps", "1e3"], "--steps: '1e3' is not a whole number"),
    ("a_missing_one", [], "the following arguments are required: --model"),
]


@pytest.mark.parametrize("arguments, said", [u[1:] for u in UNKNOWN], ids=[u[0] for u in UNKNOWN])
def test_one_line_with_the_nearest_name(capsys, arguments, said):
    parser = Parser(prog="lighthouse it")
    parser.add_argument("--model", required=True)
    parser.add_argument("--output_dir")
    parser.add_argument("--kind", choices=["dark", "light"])
    parser.add_argument("--steps", type=int)
    with pytest.raises(SystemExit) as stop:
        parser.parse_args(arguments)
    found = capsys.readouterr().err
    assert stop.value.code == 2 and said in found and found.count("\n") == 1
    assert found.startswith("lighthouse it: error: ") and found.endswith("; see lighthouse it --help\n")


def test_an_option_of_several_values_that_is_given_twice_is_said(capsys):
    parser = Parser(prog="lighthouse it")
    parser.add_argument("--data", nargs="+")
    assert parser.parse_args(["--data", "a", "b"]).data == ["a", "b"] and capsys.readouterr().err == ""
    assert parser.parse_args(["--data", "a", "--data", "b"]).data == ["b"]
    assert capsys.readouterr().err == "lighthouse it: --data is given twice, and the last counts\n"


def test_an_interrupt_while_the_package_is_imported(monkeypatch, capsys):
    def interrupted():
        raise KeyboardInterrupt

    monkeypatch.setattr("lighthouse.cli.main", interrupted)
    monkeypatch.setattr(sys, "argv", ["lighthouse", "plan"])
    assert command.lighthouse() == 130 and capsys.readouterr().err == "interrupted\n"


def test_a_switch_after_the_last_step_is_said_before_the_first(tmp_path, caplog):
    for step, said in ((3, 0), (5, 0), (6, 1)):
        caplog.clear()
        training = TrainingOptions(output_dir=str(tmp_path), max_steps=5, use_cpu=True, report_to="none")
        check_together(PretrainOptions(data="x", switch_step=step), training)
        assert caplog.text.count(f"switch_step={step} of 5 steps: no step will be dense") == said


def test_numbers_below_zero_are_values():
    parser = Parser(prog="lighthouse it")
    parser.add_argument("--least", type=float)
    assert parser.parse_args(["--least", "-5"]).least == -5


def test_a_name_that_is_no_unicode_is_printed(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    name = os.fsdecode(b"caf\xe9")
    sys.stdout.reconfigure(errors="strict")
    assert main(["export", name, "--output", "x"]) == 2
    print(name)
    said = capsys.readouterr()
    assert r"caf\udce9" in said.out and "checkpoint='caf\\udce9' does not exist" in said.err


PLACES = [
    # the place, what is said, or None where it can be written to
    ("a_new_folder", "new/run", None),
    ("a_folder_that_is_there", "there", None),
    ("a_file", "file", "x='.*file' is a file: a folder is needed"),
    ("below_a_file", "file/run", "x='.*run': '.*file' is not a folder; name another place"),
    ("where_nobody_may", "/proc/run/it", "x='/proc/run/it': '/proc' cannot be written to .*; name another place"),
    ("a_name_of_an_old_archive", os.fsdecode(b"r\xfcn"), "x=.*: safetensors reads only names in UTF-8; name another"),
    ("too_long_a_name", "a" * 300, "x='.*aaa': .* cannot be written to .File name too long.; name another place"),
]


@pytest.mark.parametrize("place, said", [p[1:] for p in PLACES], ids=[p[0] for p in PLACES])
def test_a_folder_is_tried_and_left_as_it_was(tmp_path, place, said):
    (tmp_path / "there").mkdir()
    (tmp_path / "file").write_text("text")
    before = sorted(tmp_path.rglob("*"))
    if said is None:
        space.check_writable("x", tmp_path / place)
    else:
        with pytest.raises(OSError, match=said):
            space.check_writable("x", tmp_path / place)
    assert sorted(tmp_path.rglob("*")) == before


def test_a_folder_of_somebody_else_is_refused(tmp_path, monkeypatch):
    def mkdtemp(suffix=None, prefix=None, dir=None):
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), dir)

    monkeypatch.setattr(space.tempfile, "mkdtemp", mkdtemp)
    with pytest.raises(PermissionError, match=f"cannot be written to .{os.strerror(errno.EACCES)}.; name another"):
        space.check_writable("output_dir", Path(tmp_path) / "run")
