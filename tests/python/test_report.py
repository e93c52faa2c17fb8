"""The table and the pictures of runs."""

from __future__ import annotations

import pytest

pytest.importorskip("matplotlib")

from matplotlib.image import imread  # noqa: E402
from rich.console import Console  # noqa: E402

from lighthouse import report  # noqa: E402
from lighthouse.report.picture import losses  # noqa: E402
from lighthouse.report.table import minutes  # noqa: E402
from lighthouse.training import PretrainResult  # noqa: E402
from lighthouse.training.result import HeldOut, Stage  # noqa: E402


def result(name, switch_step, seconds_per_step):
    lighthouse, dense = seconds_per_step
    steps, points, now = 10, [], 0.0
    for step in range(1, steps + 1):
        now += lighthouse if step <= switch_step else dense
        if step % 2 == 0:
            points.append(HeldOut(step, now, "lighthouse" if step <= switch_step else "dense", 5 / step + 2))
    stages = {"dense": Stage(steps - switch_step, (steps - switch_step) * dense, (steps - switch_step) * 8192)}
    if switch_step:
        stages["lighthouse"] = Stage(switch_step, switch_step * lighthouse, switch_step * 8192)
    return PretrainResult(name, f"/runs/{name}/model", 8192, steps, switch_step, steps, stages, points, {})


RUNS = [result("dense", 0, (0, 8.0)), result("lighthouse", 6, (2.0, 8.0))]


def printed(table, width=100) -> str:
    console = Console(width=width, record=True, file=open("/dev/null", "w"))
    console.print(table)
    return console.export_text()


def test_the_table_has_time_speed_of_each_stage_and_loss():
    text = printed(report.table(RUNS))
    for part in ("dense", "lighthouse", "1:20", "0:44 (1.82x as fast)", "4,096", "1,024", "2.5000", "(+0.0000)"):
        assert part in text


def test_the_table_of_one_run_compares_with_nothing():
    assert "as fast" not in printed(report.table(RUNS[:1]))


def test_when_a_loss_is_reached():
    """On the line between two evaluations; with Lighthouse from the switch, step 6 with 2.8333, on."""
    assert RUNS[0].reaches(3.25) == (4, 32) and RUNS[0].reaches(1.0) is None
    assert RUNS[0].reaches(3.875) == pytest.approx((3, 24)) and RUNS[0].reaches(9.0) == (2, 16)
    assert RUNS[1].reaches(3.25) == RUNS[1].reaches(2.84) == (6, 12)
    assert RUNS[1].reaches((17 / 6 + 2.625) / 2) == pytest.approx((7, 20))
    assert RUNS[0].loss_at(15.9) is None


def test_the_table_fits_eighty_columns():
    assert "lighthouse" in printed(report.table(RUNS), width=80)


@pytest.mark.parametrize("against", ["time", "steps"])
def test_the_picture_shows_each_curve(tmp_path, against):
    losses(RUNS, against).savefig(tmp_path / "both.png")
    losses(RUNS[:1], against).savefig(tmp_path / "one.png")
    both, one = (imread(tmp_path / name)[..., :3] for name in ("both.png", "one.png"))
    assert both.shape == one.shape and both.shape[0] > 500 and both.shape[1] > 800
    assert (one < 0.9).any(axis=-1).mean() > 0.005  # not blank
    assert (both != one).any(axis=-1).mean() > 0.005


@pytest.mark.parametrize("seconds, text", [(0, "0:00"), (59.6, "1:00"), (75.2, "1:15"), (7265, "2:01:05")])
def test_minutes(seconds, text):
    assert minutes(seconds) == text
