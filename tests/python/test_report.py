"""The table and the picture of a comparison."""

from __future__ import annotations

import pytest

pytest.importorskip("matplotlib")

from matplotlib.image import imread  # noqa: E402
from rich.console import Console  # noqa: E402

from lighthouse import report  # noqa: E402
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


RUNS = [result("dense", 0, (0, 8.0)), result("two-stage", 6, (2.0, 8.0))]


def printed(table, width=100) -> str:
    console = Console(width=width, record=True, file=open("/dev/null", "w"))
    console.print(table)
    return console.export_text()


def test_the_table_has_time_speed_of_each_stage_and_loss():
    text = printed(report.table(RUNS))
    for part in ("dense", "two-stage", "1:20", "0:44 (1.82x as fast)", "4,096", "1,024", "2.5000", "(+0.0000)"):
        assert part in text


def test_the_table_of_one_run_compares_with_nothing():
    assert "as fast" not in printed(report.table(RUNS[:1]))


def test_the_baseline_at_the_time_the_other_ended():
    # After 44 seconds the dense run has made five steps, four at its last evaluation.
    line = "When the two-stage run ended with 2.5000, at 0:44, the dense run stood at 3.2500."
    assert report.same_time(RUNS) == line
    assert report.same_time(RUNS[:1]) == report.same_time(RUNS[::-1]) == ""


def test_seconds_to_a_loss():
    assert RUNS[0].seconds_to(3.25) == 32 and RUNS[0].seconds_to(1.0) is None
    assert RUNS[0].loss_at(15.9) is None


def test_the_table_fits_eighty_columns():
    assert "two-stage" in printed(report.table(RUNS), width=80)


def test_the_picture_shows_each_curve(tmp_path):
    report.draw(RUNS, tmp_path / "both.png")
    report.draw(RUNS[:1], tmp_path / "one.png")
    both, one = (imread(tmp_path / name)[..., :3] for name in ("both.png", "one.png"))
    assert both.shape == one.shape and both.shape[0] > 500 and both.shape[1] > 900
    assert (one < 0.9).any(axis=-1).mean() > 0.005  # not blank
    assert (both != one).any(axis=-1).mean() > 0.005


@pytest.mark.parametrize("seconds, text", [(0, "0:00"), (59.6, "1:00"), (75.2, "1:15"), (3600, "60:00")])
def test_minutes(seconds, text):
    assert minutes(seconds) == text
