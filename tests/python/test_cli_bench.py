"""`lighthouse bench` as a user types it: a small layer, with rates that are kept beforehand."""

from __future__ import annotations

import builtins
import json
import re
import time
from dataclasses import asdict, replace
from pathlib import Path

import pytest
import torch

from lighthouse.cli import main
from lighthouse.cli.bench import _parser, notes
from lighthouse.core.settings import RECOMMENDED
from lighthouse.speed import kept_rates, sides
from lighthouse.speed.benchmark import Bench
from lighthouse.speed.layer import Layer
from lighthouse.speed.measure import alternating_seconds, peak_bytes, spread, timings
from lighthouse.speed.rates import Curve, Rates
from lighthouse.speed.sides import WrongResult

pytestmark = pytest.mark.usefixtures("one_thread")

SMALL = "bench --device cpu --heads 2 --head_dim 16 --budget 0.2".split()
RATES = Rates("some CPU", Curve(((1, 1e11),)), Curve(((1, 1e10),)), products=1e11, measured=time.time(), spread=0.02)
LAYER = Layer(2, 2, 16, "float32")


@pytest.fixture(autouse=True)
def kept(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    kept_rates.cache_file().parent.mkdir(parents=True)
    layers = LAYER, replace(LAYER, dtype="bfloat16")
    kept_rates.cache_file().write_text(json.dumps({kept_rates.cache_key(its, "cpu"): asdict(RATES) for its in layers}))


def test_table_json_and_picture(tmp_path, capsys):
    file, picture = tmp_path / "bench.json", tmp_path / "bench.png"
    assert main([*SMALL, "--tokens", "512", "256", "--json", str(file), "--plot", str(picture)]) == 0
    said = capsys.readouterr().out
    for part in ("checked: the error against float64", "estimate", "256", "512", "Lighthouse is "):
        assert part in said
    results = json.loads(file.read_text())
    assert [row["tokens"] for row in results["rows"]] == [256, 512]
    for row in results["rows"]:
        assert row["speedup"] == row["dense_seconds"] / row["lighthouse_seconds"]
        assert row["error"] == pytest.approx(row["estimate"] / row["speedup"] - 1)
        assert 0 < row["lighthouse_peak_bytes"] and 0 < row["dense_peak_bytes"]
        assert row["dense_calls"] >= 1 and row["dense_spread"] >= 0
    checks = kept_rates.rates_of(LAYER, "cpu").checks  # what plan's estimates are held against
    assert {(check.tokens, check.speedup, check.by) for check in checks} == {
        (row["tokens"], row["speedup"], "bench") for row in results["rows"]
    }
    assert picture.read_bytes().startswith(b"\x89PNG")


def test_parts_of_two_dtypes(tmp_path, capsys):
    file, picture = tmp_path / "bench.json", tmp_path / "bench.png"
    arguments = [*SMALL, "--tokens", "128", "--json", str(file)]
    assert main([*arguments, "--cover_start", "false"]) == 0
    assert "operators" not in json.loads(file.read_text())["rows"][0]
    more = "--resume --parts --dtype float32 bfloat16 --cover_start false".split()
    assert main([*arguments, *more, "--plot", str(picture)]) == 0
    said = capsys.readouterr().out
    for part in ("float32, forward", "bfloat16, forward", "beside inner", "scatter_backward", "of a copy"):
        assert part in said
    results = json.loads(file.read_text())
    assert results["cover_start"] is False and len(results["commands"]) == 2 and results["versions"]["torch"]
    assert results["error_of_dense"].keys() == {"float32", "bfloat16"} and results["copy_bytes_per_second"] > 0
    assert [row["dtype"] for row in results["rows"]] == ["bfloat16", "float32"]
    for row in results["rows"]:
        assert row["beside_inner_seconds"] == row["lighthouse_seconds"] - row["inner_seconds"]
        assert row["inner_forward_seconds"] > 0 and row["inner_backend"] == "FLASH_ATTENTION"
        moved = replace(LAYER, dtype=row["dtype"]).moved(row["tokens"], row["length"])
        bytes_of = {name: operator["bytes"] for name, operator in row["operators"].items()}
        window = bytes_of.pop("local_attention"), bytes_of.pop("local_attention_backward")
        assert sum(bytes_of.values()) == moved and row["tokens"] < window[0] < window[1]
    assert picture.read_bytes().startswith(b"\x89PNG")


def test_the_settings_are_said_and_a_window_alone_has_no_other_operators(tmp_path, capsys):
    file = tmp_path / "bench.json"
    arguments = [*SMALL, "--tokens", "128", "--parts", "--json", str(file), "--select_topk", "0"]
    assert main([*arguments, "--local_window", "32"]) == 0
    assert "Lighthouse with pool_ratios 1/4 1/16, select_topk 0, local_window 32\n" in capsys.readouterr().out
    (row,) = json.loads(file.read_text())["rows"]
    assert row["operators"].keys() == {"local_attention", "local_attention_backward"} and "inner_seconds" not in row


def test_results_of_a_version_without_windows_go_on_without_one(tmp_path, capsys):
    file = tmp_path / "bench.json"
    arguments = [*SMALL, "--tokens", "128", "--json", str(file)]
    assert main([*arguments, "--local_window", "0"]) == 0
    results = json.loads(file.read_text())
    del results["local_window"]
    file.write_text(json.dumps(results))
    assert main([*arguments, "--resume"]) == 2
    assert "measured with local_window 0, which is now 256" in capsys.readouterr().err
    assert main([*arguments, "--resume", "--local_window", "0"]) == 0
    found = json.loads(file.read_text())
    assert found["local_window"] == 0 and found["rows"] == results["rows"] and len(found["commands"]) == 2


def commands_and_tables(file: str) -> list[tuple[list[str], list[int]]]:
    """The commands of a document that write JSON, and the lengths of the table before each."""
    found, lengths = [], []
    for line in (Path(__file__).parents[2] / file).read_text().splitlines():
        if match := re.match(r"\| ([\d,]+) \|", line):
            lengths.append(int(match[1].replace(",", "")))
        elif line.startswith("| tokens |"):
            lengths = []
        elif line.startswith("    lighthouse bench ") and "--json" in line:
            found.append((line.split()[2:], [*lengths]))
    return found


def test_the_tables_of_the_readme_are_made_by_one_command_each():
    (gpu, gpu_lengths), (cpu, cpu_lengths) = commands_and_tables("README.md")
    assert len(gpu_lengths) == 6 and len(cpu_lengths) == 4
    assert _parser().parse_args(gpu).tokens == gpu_lengths
    options = _parser().parse_args(cpu)
    assert options.tokens == cpu_lengths and options.dtype == ["float32", "bfloat16"] and options.device == "cpu"


@pytest.mark.parametrize("file", ["layer-h200.json", "layer-cpu.json"])
def test_the_tables_of_bench_are_made_by_one_command_each(file):
    recorded = json.loads((Path(__file__).parents[2] / "bench" / "results" / file).read_text())["rows"]
    parsed = [_parser().parse_args(command) for command, _ in commands_and_tables("bench/README.md")]
    [options] = [its for its in parsed if (its.device == "cpu") == ("cpu" in file)]
    assert options.parts and {row["tokens"] for row in recorded} <= set(options.tokens)
    assert {row["dtype"] for row in recorded} <= set(options.dtype or ["bfloat16"])


def test_json_on_standard_output(capsys):
    assert main([*SMALL, "--tokens", "256", "--json", "-"]) == 0
    assert json.loads(capsys.readouterr().out)["rows"][0]["tokens"] == 256


def test_interrupted_and_gone_on_with(tmp_path, monkeypatch, capsys):
    file = tmp_path / "bench.json"
    arguments = [*SMALL, "--tokens", "128", "256", "--json", str(file)]
    measure = Bench.measure

    def until_256(bench, tokens):
        if tokens == 256:
            raise KeyboardInterrupt
        return measure(bench, tokens)

    monkeypatch.setattr(Bench, "measure", until_256)
    assert main(arguments) == 130
    assert "continue with --resume" in capsys.readouterr().err
    before = json.loads(file.read_text())["rows"]
    assert [row["tokens"] for row in before] == [128]

    monkeypatch.setattr(Bench, "measure", measure)
    assert main(arguments) == 2 and "--resume" in capsys.readouterr().err
    assert main([*arguments, "--resume"]) == 0
    after = json.loads(file.read_text())["rows"]
    assert after[0] == before[0] and [row["tokens"] for row in after] == [128, 256]

    capsys.readouterr()
    assert main([*arguments, "--resume", "--measure"]) == 0
    assert "all lengths were measured already" in capsys.readouterr().err
    assert main([*arguments, "--resume", "--select_topk", "4"]) == 2
    assert "measured with select_topk 0.015625, which is now 4" in capsys.readouterr().err


def test_a_training_step(tmp_path, capsys):
    file = tmp_path / "bench.json"
    step = "--train --model nano --context 256".split()
    assert main([*SMALL, "--tokens", "128", *step, "--json", str(file)]) == 0
    assert "A training step of 'nano' at 256 tokens, 0 layers dense" in capsys.readouterr().out
    (row,) = json.loads(file.read_text())["train"]
    assert row["speedup"] == row["lighthouse_tokens_per_second"] / row["dense_tokens_per_second"]
    assert row["dense_peak_bytes"] > 0 and row["lighthouse_peak_bytes"] > 0
    bench = Bench(LAYER, "cpu", RECOMMENDED)
    bench.resume(file)
    assert bench.has_step("nano", 256, 0) == row and bench.has_step("nano", 256, 1) is None


def test_a_wrong_result_is_not_timed(monkeypatch, capsys):
    def wrong(*_, **__):
        raise WrongResult("error 1.0 against the float64 reference")

    monkeypatch.setattr("lighthouse.speed.benchmark.check", wrong)
    assert main([*SMALL, "--tokens", "128"]) == 1
    said = capsys.readouterr()
    assert "against the float64 reference" in said.err and "speedup" not in said.out


def test_a_check_sees_what_is_wrong(monkeypatch):
    monkeypatch.setattr(
        sides, "sub_sequence_attention", lambda query, key, value, method: 1.01 * query + 0 * (key + value).sum()
    )
    with pytest.raises(WrongResult, match="nothing is timed"):
        sides.check(torch.float32, "cpu", head_dim=16, tokens=200)


def test_without_matplotlib_it_is_said_before_measuring(monkeypatch, capsys, tmp_path):
    whole = builtins.__import__

    def without(name, *args, **kwargs):
        if name.startswith("matplotlib"):
            raise ImportError("No module named 'matplotlib'")
        return whole(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", without)
    assert main([*SMALL, "--plot", str(tmp_path / "a.png")]) == 1
    said = capsys.readouterr()
    assert 'pip install "lighthouse-attn[train]"' in said.err and not said.out


REFUSED = [
    ("no_tokens", "--tokens 0", "tokens=0"),
    ("budget", "--budget 0", "budget=0.0"),
    ("budget_is_no_number", "--budget nan", "budget=nan"),
    ("more_threads_than_cores", "--threads 100000", "threads=100000: from 1 to"),
    ("resume_without_a_file", "--resume", "resume: --json FILE"),
    ("no_folder", "--json nowhere/a.json", "json='nowhere/a.json': its folder"),
    ("heads", "--heads 0", "heads=0"),
    ("ratio", "--pool_ratios 0.3", "pool_ratios[0]=0.3"),
    ("cover_start", "--cover_start perhaps", "cover_start='perhaps': True or False is needed"),
    ("model", "--train --model gigantic", "model='gigantic'"),
    ("context", "--train --model nano --context 131072", "context=131072: model 'nano' allows at most 65536"),
    ("dense_layers", "--train --model nano --dense_layers 2", "dense_layers=2"),
    (
        "a_step_that_stays_dense",
        "--train --model nano --context 1024 --pool_ratios 1/2 1/4 1/8 --select_topk 1024",
        "context=1024: select_topk=1024 gives a sub-sequence of 1,920 entries for 1,024 tokens (188%)",
    ),
    (
        "windows_longer_than_a_step",
        "--train --model nano --context 12",
        "context=12: 12 tokens are fewer than the coarsest window of 16, so all attention is dense",
    ),
    (
        "a_window_longer_than_a_step",
        "--train --model nano --context 128 --select_topk 0",
        "context=128: local_window=256 covers all 128 tokens",
    ),
]


@pytest.mark.parametrize(("arguments", "said"), [case[1:] for case in REFUSED], ids=[case[0] for case in REFUSED])
def test_refused_with_the_value_and_the_rule(arguments, said, capsys):
    assert main([*SMALL, *arguments.split()]) == 2
    assert said in capsys.readouterr().err


def test_a_file_that_holds_something_else(tmp_path, capsys):
    file = tmp_path / "other.json"
    file.write_text("[]")
    assert main([*SMALL, "--json", str(file), "--resume"]) == 2
    assert "has no results of bench" in capsys.readouterr().err


def test_peak_is_what_is_held_at_once():
    def run():
        first = torch.empty(1 << 20, dtype=torch.uint8)
        del first
        second, third = torch.empty(1 << 20, dtype=torch.uint8), torch.empty(1 << 19, dtype=torch.uint8)
        return second.shape, third.shape

    assert peak_bytes(run, "cpu") == (1 << 20) + (1 << 19)


def taking(*seconds, calls=None):
    """A call that takes so long the first time, the second, ...; the last from then on."""
    calls = [] if calls is None else calls

    def run():
        calls.append(1)
        time.sleep(seconds[min(len(calls), len(seconds)) - 1])

    return run


def test_the_slow_side_is_timed_once_and_the_other_as_often_as_ever():
    slow_calls, quick_calls = [], []
    runs = [taking(0.2, calls=slow_calls), taking(0.001, calls=quick_calls)]
    slow, quick = alternating_seconds(runs, "cpu", repeats=5, budget=0.3)
    assert len(slow_calls) == 1 and len(quick_calls) == 6  # one that is not timed, and five
    assert slow > 0.2 > 0.1 > quick


def test_beside_a_slow_call_the_others_are_still_called_in_turn():
    order = []

    def call(name, seconds):
        return lambda: (order.append(name), time.sleep(seconds))

    found = timings([call("first", 0.001), call("slow", 0.2), call("last", 0.001)], "cpu", repeats=3, budget=0.3)
    assert [len(times) for times in found] == [3, 1, 3] and min(found[1]) > 0.2
    assert [name for name in order if name != "slow"] == ["first", "last"] * 4  # a round that is not timed, and three


def test_a_first_call_that_compiles_is_not_the_time():
    [times] = timings([taking(0.2, 0.001)], "cpu", repeats=5, budget=0.3)
    assert len(times) == 5 and sorted(times)[2] < 0.1
    [times] = timings([taking(0.05, 0.001)], "cpu", repeats=5, budget=0.3)
    assert len(times) == 5 and sorted(times)[2] < 0.05


def test_what_must_be_known_of_times_is_said():
    row = {"tokens": 4096, "dense_calls": 1, "dense_spread": 0.0, "lighthouse_calls": 5, "lighthouse_spread": 0.02}
    assert notes([row]) == ["Timed by a single call, so the spread is not known: dense at 4,096 tokens."]
    [said] = notes([row | {"dense_calls": 5, "lighthouse_spread": spread([1.0, 1.3, 1.5])}])
    assert "was busy" in said and "Lighthouse at 4,096 tokens by 30%" in said
    short = row | {"dense_calls": 5, "lighthouse_spread": 0.5, "lighthouse_seconds": 1e-4}
    assert notes([short]) and not notes([short], short=1e-3)
    assert notes([{"tokens": 4096, "speedup": 2.0}]) == []  # of a file that does not have them


def test_help_ends_with_examples(capsys):
    with pytest.raises(SystemExit):
        main(["bench", "--help"])
    assert "lighthouse bench --tokens 2048 --train --model nano --context 2048" in capsys.readouterr().out
