"""Dense held-out loss against training time or steps, one curve a run, the switch to dense marked."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import cycle
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, MaxNLocator, MultipleLocator

from lighthouse.report.known import known
from lighthouse.report.page import new_figure
from lighthouse.report.table import minutes
from lighthouse.training.result import HeldOut, PretrainResult

COLOURS = ("#6b7280", "#d97706", "#2563eb", "#059669", "#9333ea")
# Seconds, as clocks have them.
TICKS = (1, 5, 10, 15, 30, 60, 120, 300, 600, 900, 1800, 3600, 7200, 14_400, 43_200, 86_400)
SHOWN_ABOVE = 1.0  # nats above the lowest loss: what is higher, at the very start, would flatten all the rest
DASHED = (0, (4, 2))
ABOVE_SWITCH = 0.3  # nats that are shown above the loss at the switch, however high that is

Place = Callable[[HeldOut], float]  # along the axis


def losses(runs: Sequence[PretrainResult], against: str) -> Figure:
    """A picture of `PretrainResult`s, `against` "time" or "steps". Runs of one name, of several seeds, look alike.

    The first stage of a run that is not dense throughout is dashed, and a diamond marks the switch. A dotted line goes
    through the first run's final loss: the others pass it or they do not.
    """
    figure = new_figure()
    axes = figure.add_subplot()
    places: dict[str, Place] = {"time": lambda point: point.seconds, "steps": lambda point: point.step}
    colours = dict(zip(dict.fromkeys(run.name for run in runs), cycle(COLOURS), strict=False))
    named = set()
    for run in runs:
        _curve(axes, run, places[against], colours[run.name], label=run.name not in named)
        named.add(run.name)
    if any(_first_stage(run) for run in runs):
        axes.plot([], [], color="black", ls=DASHED, marker="D", markersize=5, label="first stage, and the switch")
    lowest = min(point.loss for run in runs for point in run.held_out)
    highest = max(point.loss for run in runs for point in run.held_out)
    switch = [p.loss for run in runs for p in run.held_out if 0 < p.step == run.switch_step]
    top = min(highest, max([lowest + SHOWN_ABOVE, *(loss + ABOVE_SWITCH for loss in switch)]))
    axes.set_ylim(lowest - 0.06 * (top - lowest), top + 0.04 * (top - lowest))
    axes.set_xlim(left=0)
    if len(runs) > 1:
        axes.axhline(known(runs[0].loss), color=colours[runs[0].name], linewidth=0.9, linestyle=":")
    if against == "time":
        longest = max(point.seconds for run in runs for point in run.held_out)
        axes.xaxis.set_major_locator(MultipleLocator(next((s for s in TICKS if longest <= 7 * s), longest / 7)))
        axes.xaxis.set_major_formatter(FuncFormatter(lambda seconds, _: minutes(seconds)))
        axes.set_xlabel("training time, minutes:seconds, without evaluation")
    else:
        axes.xaxis.set_major_locator(MaxNLocator(6))
        axes.xaxis.set_major_formatter(FuncFormatter(lambda steps, _: f"{steps:,.0f}"))
        axes.set_xlabel("steps")
    axes.set_ylabel("dense held-out loss, nats per token")
    make_plain(axes)
    axes.legend(frameon=False, loc="upper right")
    return figure


def make_plain(axes: Axes) -> None:
    """A light grid, and no box around it."""
    axes.grid(color="#e5e7eb", linewidth=0.8)
    axes.set_axisbelow(True)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)


def _first_stage(run: PretrainResult) -> int:
    """How many evaluations were made with Lighthouse on, up to the switch; 0 where it was planned and never acted."""
    acted = run.switch_step and run.lighthouse is not None
    return sum(point.step <= run.switch_step for point in run.held_out) if acted else 0


def _curve(axes: Axes, run: PretrainResult, place: Place, colour: str, label: bool) -> None:
    points = [(place(point), point.loss) for point in run.held_out]
    first = points[: _first_stage(run)]
    second = points[len(first) - 1 :] if first else points  # joined where the stage changes
    style: dict[str, Any] = {"color": colour, "marker": "o", "markersize": 3.5}
    if first:
        axes.plot(*zip(*first, strict=True), **style, ls=DASHED)
        axes.plot(*first[-1], color=colour, marker="D", markersize=7, ls="")
    every = slice(1 if first else 0, None)
    axes.plot(*zip(*second, strict=True), **style, markevery=every, label=run.name if label else None)
