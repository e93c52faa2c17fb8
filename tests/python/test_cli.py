"""The `lighthouse` command as a user types it."""

from __future__ import annotations

import json
import subprocess
import sys
from importlib.machinery import PathFinder

import pytest

import lighthouse
from lighthouse.cli import main
from training_runs import write_text

pytestmark = pytest.mark.usefixtures("one_thread")

SMALL = (
    "--model nano --context 128 --held_out 2 --steps 3 --eval_steps 1 --logging_steps 1 --report_to none "
    "--pool_ratios 1/2 0.25 --select_topk 4 --use_cpu --save_strategy no"
).split()


def test_without_a_command_it_helps(capsys):
    assert main([]) == 0
    assert "pretrain" in capsys.readouterr().out


def test_version(capsys):
    with pytest.raises(SystemExit) as stop:
        main(["--version"])
    assert stop.value.code == 0 and lighthouse.__version__ in capsys.readouterr().out


def test_an_unknown_command(capsys):
    with pytest.raises(SystemExit) as stop:
        main(["pretrian"])
    assert stop.value.code == 2 and "pretrian" in capsys.readouterr().err


def test_help_groups_the_options_and_has_examples(capsys):
    with pytest.raises(SystemExit) as stop:
        main(["pretrain", "--help"])
    text = capsys.readouterr().out
    assert stop.value.code == 0
    for part in (
        "model:",
        "data:",
        "lighthouse:",
        "training (",
        "examples:",
        "--share",
        "--max_steps, --steps",
        "nano (",
    ):
        assert part in text
    assert "--adafactor" not in text and "--fsdp_config" not in text


def test_whole_help_has_every_option_of_the_trainer(capsys):
    with pytest.raises(SystemExit):
        main(["pretrain", "--help-all"])
    text = capsys.readouterr().out
    for option in ("--fsdp", "--deepspeed", "--torch_compile", "--gradient_accumulation_steps", "--bf16"):
        assert option in text


def test_a_run(tmp_path, capsys):
    text, out = write_text(tmp_path / "text"), tmp_path / "run"
    assert (
        main(["pretrain", *SMALL, "--data", str(text), "--output_dir", str(out), "--lr_scheduler_type", "linear"]) == 0
    )
    said = capsys.readouterr()
    assert "2 with Lighthouse" in said.out and str(out / "model") in said.out.replace("\n", "")
    assert "dense held-out loss" in said.err + said.out
    results = json.loads((out / "results.json").read_text())
    assert results["steps"] == 3 and results["settings"]["pool_ratios"] == [0.5, 0.25]
    assert (out / "model" / "config.json").is_file()

    assert main(["pretrain", *SMALL, "--data", str(text), "--output_dir", str(out)]) == 2
    assert "already holds a run" in capsys.readouterr().err


def test_options_from_files_and_from_the_command_line(tmp_path, capsys):
    text, out = write_text(tmp_path / "text"), tmp_path / "run"
    (tmp_path / "a.yaml").write_text("max_steps: 9\nshare: 1.0\nlearning_rate: 0.5\n")
    (tmp_path / "b.json").write_text(json.dumps({"max_steps": 5, "data": str(text), "seed": 3}))
    files = ["--config", str(tmp_path / "a.yaml"), "--config", str(tmp_path / "b.json")]
    assert main(["pretrain", *files, *SMALL, "--output_dir", str(out), "--learning_rate=0.25"]) == 0
    settings = json.loads((out / "results.json").read_text())["settings"]
    assert (settings["share"], settings["learning_rate"], settings["seed"]) == (1.0, 0.25, 3)
    assert json.loads((out / "results.json").read_text())["steps"] == 3
    capsys.readouterr()
    (tmp_path / "a.yaml").write_text("contxt: 9\n")
    assert main(["pretrain", *files, *SMALL]) == 2
    assert "a.yaml': there is no option 'contxt'; nearest: 'context'" in capsys.readouterr().err


WRONG = [
    ("unknown_option", ["--nonsense", "1"], "--nonsense"),
    ("share", ["--share", "2"], "share=2.0"),
    ("steps", ["--steps", "0"], "max_steps=0"),
    ("data", ["--data", "/no/such/folder"], "'/no/such/folder' does not exist"),
    ("context", ["--model", "nano", "--context", "1000000"], "allows at most"),
    ("ratios", ["--pool_ratios", "1/2", "1/3"], "pool_ratios[1]"),
    ("topk", ["--select_topk", "many"], "select_topk=many"),
    ("no_config", ["--config", "no.yaml"], "config='no.yaml' does not exist"),
    ("two_switches", ["--switch_step", "3", "--dense_only"], "switch_step and dense_only: only one of them"),
    ("a_missing_reporter", ["--report_to", "wandb"], "report_to=['wandb']: WandbCallback requires wandb"),
    ("a_missing_optimizer", ["--optim", "adamw_bnb_8bit"], "optim='adamw_bnb_8bit': You need to install"),
    ("a_schedule_without_such", ["--lr_scheduler_kwargs", '{"x": 1}'], "lr_scheduler_kwargs={'x': 1}: "),
    ("a_missing_launcher", ["--deepspeed", "zero.json"], "deepspeed"),
]


@pytest.mark.parametrize("arguments, message", [w[1:] for w in WRONG], ids=[w[0] for w in WRONG])
def test_a_wrong_option_is_an_error_of_one_line(tmp_path, monkeypatch, capsys, arguments, message):
    monkeypatch.chdir(tmp_path)
    try:
        status = main(["pretrain", *arguments])
    except SystemExit as stop:
        status = stop.code
    said = capsys.readouterr().err
    assert status == 2 and message in said and "Traceback" not in said
    assert not list(tmp_path.iterdir())


LATE = [
    ("text_that_ends_in_the_middle", "late.txt", "run", "late.txt' is not UTF-8 text: byte 300,000 is 0xff"),
    ("a_folder_in_a_file", "text", "text/00.txt/run", "text/00.txt' is not a folder; name another place"),
]


@pytest.mark.parametrize("text, out, message", [case[1:] for case in LATE], ids=[case[0] for case in LATE])
def test_what_is_wrong_once_the_work_has_begun_is_an_error_of_one_line(tmp_path, capsys, text, out, message):
    write_text(tmp_path / "text")
    (tmp_path / "late.txt").write_bytes(b"a line of text\n" * 20_000 + b"\xff")
    data = ["--data", str(tmp_path / text), str(tmp_path / "text"), "--seed", "1"]
    before = sorted(tmp_path.rglob("*"))
    assert main(["pretrain", *SMALL, *data, "--output_dir", str(tmp_path / out)]) == 2
    said = capsys.readouterr().err
    assert message in said and "Traceback" not in said
    assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.parametrize("command", ["pretrain", "compare"])
def test_without_the_extra_it_names_what_to_install(monkeypatch, capsys, command):
    whole, imported = PathFinder.find_spec, ("lighthouse.training", "lighthouse.cli.pretrain", "lighthouse.cli.compare")
    for name in [name for name in sys.modules if name.startswith(imported)]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.delitem(sys.modules, "datasets", raising=False)
    monkeypatch.setattr(PathFinder, "find_spec", lambda name, *rest: None if name == "datasets" else whole(name, *rest))
    monkeypatch.setattr(sys, "meta_path", [PathFinder])
    assert main([command]) == 1
    said = capsys.readouterr().err
    assert "needs datasets" in said and 'pip install "lighthouse-attn[train]"' in said


def test_the_installed_command():
    done = subprocess.run([sys.executable, "-m", "lighthouse.cli", "--version"], capture_output=True, text=True)
    assert done.returncode == 0 and lighthouse.__version__ in done.stdout
