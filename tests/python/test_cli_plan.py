"""`lighthouse plan` as a user types it."""

from __future__ import annotations

import json
from dataclasses import asdict

import pytest

from lighthouse import speed
from lighthouse.cli import main
from lighthouse.plan import plan
from lighthouse.speed import Curve, Layer, Rates
from small_llama import one_thread  # noqa: F401

RATES = Rates("some CPU", Curve(((1, 1e11),)), Curve(((1, 1e10),)), products=1e11)


@pytest.fixture
def kept(tmp_path, monkeypatch):
    """A cache that has rates of this device, for the default layer and the model `nano`."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    speed.cache_file().parent.mkdir(parents=True)
    layers = (speed.LAYERS["cpu"], Layer(1, 1, 64, "float32"))
    numbers = {speed.cache_key(layer, "cpu"): asdict(RATES) for layer in layers}
    speed.cache_file().write_text(json.dumps(numbers))


def test_levels_and_shares(capsys):
    assert main(["plan", "--tokens", "98304", "--no_estimate"]) == 0
    said = capsys.readouterr().out
    for part in ("1,536 parents", "98,304", "24,576", "S   18,432 entries, S/N 18.75%", "6.25% of the tokens", "3.52%"):
        assert part in said
    assert "estimate" not in said and "Warning" not in said


def test_an_estimate_from_kept_rates(kept, capsys):
    assert (
        main(["plan", "--device", "cpu", "--tokens", "8192", "--layers", "4", "--dense_layers", "1", "--json", "-"])
        == 0
    )
    found = json.loads(capsys.readouterr().out)
    made = plan(8192)
    assert found["length"] == made.length and found["kept_share"] == made.kept_share
    expected = speed.estimate(made, speed.LAYERS["cpu"], RATES)
    assert found["estimate"]["speedup"] == pytest.approx(expected.speedup)
    assert found["step"]["speedup"] == pytest.approx(2 * expected.speedup / (1 + expected.speedup))
    assert found["step"]["bytes"] < found["step"]["dense_bytes"] and found["warnings"] == []


def test_a_model_of_pretrain(kept, capsys, tmp_path):
    file = tmp_path / "plan.json"
    assert main(["plan", "--device", "cpu", "--model", "nano", "--tokens", "4096", "--json", str(file)]) == 0
    said = capsys.readouterr().out
    assert "the model 'nano', 4 layers, 2 dense" in said and "times as fast" in said and "some CPU" in said
    step = json.loads(file.read_text())["step"]
    assert step["attention_work"] < step["work"] < 1 and step["bytes"] < step["dense_bytes"]
    assert 1 < step["speedup"] < json.loads(file.read_text())["estimate"]["speedup"]


def test_warnings_are_printed(capsys):
    assert main(["plan", "--tokens", "131072", "--select_topk", "300", "--no_estimate"]) == 0
    assert "Warning: 0.92% of the tokens are kept" in capsys.readouterr().out


REFUSED = [
    ("no_tokens", "--tokens 0", "tokens=0: at least one"),
    ("ratio", "--pool_ratios 0.3", "pool_ratios[0]=0.3"),
    ("topk", "--select_topk 0", "select_topk=0"),
    ("topk_is_no_number", "--select_topk many", "'many': a number such as"),
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
    assert "finds no GPU here; take --device cpu" in capsys.readouterr().err


def test_help_ends_with_examples_that_run(capsys):
    with pytest.raises(SystemExit):
        main(["plan", "--help"])
    lines = capsys.readouterr().out.splitlines()
    examples = [line.split()[1:] for line in lines if line.startswith("  lighthouse plan")]
    assert len(examples) == 3 and lines[-1].strip()
    for example in examples:
        assert main([*example, *([] if "--no_estimate" in example else ["--no_estimate"])]) == 0
