"""`lighthouse plan` as a user types it."""

from __future__ import annotations

import json
import time
from dataclasses import replace

import pytest

from lighthouse.cli import main
from lighthouse.core.method import Method, plan
from lighthouse.core.settings import RECOMMENDED
from lighthouse.speed import estimates as speed
from lighthouse.speed import kept_rates
from lighthouse.speed.layer import LAYERS, Layer
from lighthouse.speed.rates import Checked, Curve, Rates

pytestmark = pytest.mark.usefixtures("one_thread")

RATES = Rates("some CPU", Curve(((1, 1e11),)), Curve(((1, 1e10),)), products=1e11)


def keep(**changes):
    """Rates of this device that were measured just now, for the default layer and the model `nano`."""
    kept_rates.cache_file().parent.mkdir(parents=True, exist_ok=True)
    layers = (LAYERS["cpu"], Layer(1, 1, 64, "float32"))
    its = replace(RATES, **{"measured": time.time(), "spread": 0.02, **changes})
    kept_rates.cache_file().write_text(
        json.dumps({kept_rates.cache_key(layer, "cpu"): its.values() for layer in layers})
    )


@pytest.fixture
def kept(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    keep()


def test_levels_and_shares(capsys):
    assert main(["plan", "--tokens", "98304", "--no_estimate"]) == 0
    said = capsys.readouterr().out
    for part in ("1,536 parents", "98,304", "24,576", "S   18,432 entries, S/N 18.75%", "6.25% of the tokens", "4.04%"):
        assert part in said
    assert "estimate" not in said and "Warning" not in said


def test_an_estimate_from_kept_rates(kept, capsys):
    assert (
        main(["plan", "--device", "cpu", "--tokens", "8192", "--layers", "4", "--dense_layers", "1", "--json", "-"])
        == 0
    )
    found = json.loads(capsys.readouterr().out)
    made = plan(8192, local_window=256)
    assert found["length"] == made.length and found["kept_share"] == made.kept_share
    expected = speed.estimate(made, LAYERS["cpu"], RATES)
    assert found["estimate"]["speedup"] == pytest.approx(expected.speedup)
    assert found["step"]["speedup"] == pytest.approx(2 * expected.speedup / (1 + expected.speedup))
    assert found["step"]["bytes"] > found["step"]["dense_bytes"] and found["warnings"] == []


WINDOWS = [
    (
        "a_window",
        "",
        ["sub-sequence S", "local window     exact attention to the last 256 tokens, beside it", ", local window "],
        [],
    ),
    ("none", "--local_window 0", ["sub-sequence S", "Lighthouse's: inner attention"], ["local window"]),
    (
        "a_window_alone",
        "--select_topk 0",
        ["8,192 tokens, nothing is chosen", "256 tokens, and nothing else", "Lighthouse's: local window "],
        ["level", "sub-sequence", "kept share", "inner attention", "its operators"],
    ),
]


@pytest.mark.parametrize("options, parts, others", [w[1:] for w in WINDOWS], ids=[w[0] for w in WINDOWS])
def test_the_local_window_is_said_where_there_is_one(kept, capsys, options, parts, others):
    assert main(["plan", "--device", "cpu", "--tokens", "8192", *options.split()]) == 0
    said = capsys.readouterr().out
    for part in parts:
        assert part in said, part
    for part in others:
        assert part not in said, part


def test_the_published_method_keeps_less_than_dense_attention(capsys):
    options = "--local_window 0 --layers 4 --no_estimate --json -".split()
    assert main(["plan", "--device", "cpu", "--tokens", "8192", *options]) == 0
    step = json.loads(capsys.readouterr().out)["step"]
    assert step["dense_layers"] == 1 and step["bytes"] < step["dense_bytes"]


def test_a_model_of_pretrain(kept, capsys, tmp_path):
    file = tmp_path / "plan.json"
    assert main(["plan", "--device", "cpu", "--model", "nano", "--tokens", "4096", "--json", str(file)]) == 0
    said = capsys.readouterr().out
    assert "the model 'nano', 4 layers, 0 dense" in said and "times as fast" in said and "some CPU" in said
    step = json.loads(file.read_text())["step"]
    assert step["attention_work"] < step["work"] < 1
    assert 1 < step["speedup"] < json.loads(file.read_text())["estimate"]["speedup"]


def check_at(tokens, part, by="bench", layer=LAYERS["cpu"]) -> Checked:
    """A measured speed-up that the estimate is above by so much."""
    its = speed.estimate(plan(tokens, local_window=256), layer, RATES).speedup / (1 + part)
    return Checked(tokens, RECOMMENDED, its, time.time(), by)


PRECISION = [
    (
        "what_bench_found",
        {"checks": [check_at(8192, 0.11)]},
        ["give or take 11%", "by bench, it is 11% above"],
    ),
    ("an_estimate_too_low", {"checks": [check_at(8192, -0.15)]}, ["give or take 15%", "it is 15% below"]),
    ("the_nearest", {"checks": [check_at(2048, 0.9), check_at(16_384, 0.05)]}, ["give or take 5%", "at 16,384 tokens"]),
    ("the_spread", {"spread": 0.12, "checks": [check_at(8192, 0.01, "plan")]}, ["give or take 12%", "with the rates"]),
    ("nothing_measured", {}, ["the error is not known"]),
    ("rates_of_some_days_ago", {"measured": time.time() - 3 * 86_400}, ["measured 3 days ago; --measure"]),
]


@pytest.mark.parametrize("changes, parts", [p[1:] for p in PRECISION], ids=[p[0] for p in PRECISION])
def test_how_near_an_estimate_is_follows_from_what_was_measured(kept, capsys, changes, parts):
    keep(**changes)
    assert main(["plan", "--device", "cpu", "--tokens", "10000"]) == 0
    said = capsys.readouterr()
    assert not said.err and "20%" not in said.out
    for part in parts:
        assert part in said.out, part


def test_rates_of_a_busy_machine_give_no_precision(kept, capsys, monkeypatch):
    keep(spread=0.4)
    busy = replace(RATES, measured=time.time(), spread=0.5, checks=(check_at(8192, 0.01, "plan"),))
    monkeypatch.setattr(kept_rates, "measure_rates", lambda *_: busy)
    assert main(["plan", "--device", "cpu", "--tokens", "10000"]) == 0
    said = capsys.readouterr()
    assert "busy when the cached rates were measured (their spread is 40%): they are measured again" in said.err
    assert "the error is not known" in said.out and "up to 50% longer than the fastest" in said.out


def test_a_short_call_is_not_held_to_a_long_ones_precision(kept, capsys):
    keep(checks=[check_at(8192, 0.01)])
    assert main(["plan", "--device", "cpu", "--tokens", "1024"]) == 0
    assert "the error is not known" in capsys.readouterr().out


def test_every_setting_of_the_method_is_in_the_numbers(capsys):
    options = "--pool_ratios 1/2 1/8 --select_topk 64 --cover_start false --local_window 32".split()
    assert main(["plan", "--tokens", "4096", "--no_estimate", "--json", "-", *options]) == 0
    found = json.loads(capsys.readouterr().out)
    assert Method.of(found) == Method((1 / 2, 1 / 8), 64, cover_start=False, local_window=32)
    assert Method().values().keys() <= found.keys()


def test_warnings_are_printed(capsys):
    assert main(["plan", "--tokens", "131072", "--select_topk", "300", "--no_estimate"]) == 0
    assert "Warning: only 0.92% of the tokens are kept" in capsys.readouterr().out


REFUSED = [
    ("no_tokens", "--tokens 0", "tokens=0: at least one"),
    ("ratio", "--pool_ratios 0.3", "pool_ratios[0]=0.3"),
    ("cover_start", "--cover_start perhaps", "cover_start='perhaps': True or False is needed"),
    ("nothing_at_all", "--select_topk 0 --local_window 0", "select_topk=0"),
    ("local_window", "--local_window -1", "local_window=-1"),
    ("topk_is_no_number", "--select_topk many", "select_topk=many: a number such as"),
    ("model", "--model gigantic", "model='gigantic'"),
    ("too_long_for_the_model", "--model nano --tokens 131072", "context=131072: model 'nano' allows at most 65536"),
    ("model_and_sizes", "--model nano --heads 4", "model='nano' with heads=4"),
    ("kv_heads", "--heads 4 --kv_heads 3", "kv_heads=3"),
    ("layers", "--layers 0", "layers=0"),
    ("all_dense", "--layers 4 --dense_layers 2", "dense_layers=2"),
    ("threads", "--threads 0", "threads=0"),
    ("more_threads_than_cores", "--threads 100000", "threads=100000: from 1 to"),
    ("no_folder", "--json nowhere/a.json", "json='nowhere/a.json': its folder does not exist"),
]


@pytest.mark.parametrize(("arguments", "said"), [case[1:] for case in REFUSED], ids=[case[0] for case in REFUSED])
def test_refused_with_the_value_and_the_rule(arguments, said, capsys):
    try:
        status = main(["plan", "--no_estimate", *arguments.split()])
    except SystemExit as stop:
        status = stop.code
    assert status == 2 and said in capsys.readouterr().err


def test_no_gpu(capsys, monkeypatch):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    assert main(["plan", "--device", "cuda"]) == 2
    assert "finds no GPU here; use --device cpu" in capsys.readouterr().err


def test_help_ends_with_examples_that_run(capsys):
    with pytest.raises(SystemExit):
        main(["plan", "--help"])
    lines = capsys.readouterr().out.splitlines()
    examples = [line.split()[1:] for line in lines if line.startswith("  lighthouse plan")]
    assert len(examples) == 3 and lines[-1].strip()
    for example in examples:
        assert main([*example, *([] if "--no_estimate" in example else ["--no_estimate"])]) == 0
