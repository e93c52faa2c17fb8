"""The pictures of a study: loss against time, each parameter's importance, the loss against each parameter."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, MaxNLocator, NullFormatter

from lighthouse.report.known import known
from lighthouse.report.page import new_figure
from lighthouse.report.picture import COLOURS, make_plain
from lighthouse.report.studied import COMPLETE, PRUNED, StudyResult
from lighthouse.report.table import minutes

GREY, AMBER, BLUE = COLOURS[:3]
SECONDS = 100  # up to here times are given in seconds


def curves(result: StudyResult) -> Figure:
    """The loss of each trial that had one, from the switch on, and the front."""
    figure = new_figure()
    axes = figure.add_subplot()
    for trial in result.of(PRUNED, COMPLETE):
        points = trial.held_out
        if points:
            colour = AMBER if trial is result.best else GREY
            chosen = trial is result.best or trial.given
            axes.plot(
                [point.seconds for point in points],
                [point.loss for point in points],
                color=colour,
                linewidth=1.6 if chosen else 0.7,
                alpha=1.0 if chosen else 0.45,
                linestyle="--" if trial.given else "-",
                label="best" if trial is result.best else "given" if trial.given else None,
            )
            axes.plot(
                points[-1].seconds,
                points[-1].loss,
                marker="o" if trial.state == COMPLETE else "x",
                markersize=4,
                color=colour,
            )
    front = result.front
    axes.step(
        [known(trial.seconds) for trial in front],
        [known(trial.loss) for trial in front],
        where="post",
        color=BLUE,
        linewidth=1,
        marker="o",
        markersize=4,
        label="front",
    )
    ends = [known(trial.loss) for trial in result.of(COMPLETE)]
    reach = max(max(ends) - min(ends), 0.02)
    highest = max(point.loss for trial in result.of(COMPLETE, PRUNED) for point in trial.held_out)
    axes.set_ylim(min(ends) - 0.15 * reach, min(highest, max(ends) + 1.5 * reach) + 0.1 * reach)
    longest = max(known(trial.seconds) for trial in result.of(COMPLETE, PRUNED))
    if longest > SECONDS:
        axes.xaxis.set_major_formatter(FuncFormatter(lambda seconds, _: minutes(seconds)))
    unit = "minutes:seconds" if longest > SECONDS else "seconds"
    axes.xaxis.set_major_locator(MaxNLocator(6))
    axes.set(xlabel=f"training time, {unit}", ylabel="dense held-out loss, nats per token")
    axes.legend(frameon=False, fontsize=9)
    make_plain(axes)
    return figure


def bars(importance: Mapping[str, float]) -> Figure:
    """Each parameter's share."""
    figure = new_figure((5.5, 0.9 + 0.34 * len(importance)))
    axes = figure.add_subplot()
    names = list(importance)[::-1]
    drawn = axes.barh(names, [importance[name] for name in names], color=AMBER, height=0.6)
    axes.bar_label(drawn, fmt="{:.0%}", padding=3, fontsize=9)
    axes.set_xlim(0, 1.15 * max(importance.values()))
    axes.xaxis.set_visible(False)
    make_plain(axes)
    axes.spines["bottom"].set_visible(False)
    return figure


def _coarsest(parameters: dict[str, Any]) -> int | None:
    factors = [value for name, value in parameters.items() if name.startswith("factor_")]
    return math.prod(factors) if factors else None


SLICES: dict[str, Callable[[dict[str, Any]], Any]] = {
    "levels": lambda parameters: parameters.get("levels"),
    "coarsest window, tokens": _coarsest,
    "select_topk, parents": lambda parameters: parameters.get("select_topk"),
    "local_window, tokens": lambda parameters: parameters.get("local_window"),
    "share of the steps": lambda parameters: parameters.get("share"),
    "learning rate": lambda parameters: parameters.get("learning_rate"),
    "batch": lambda parameters: parameters.get("batch"),
}


def slices(result: StudyResult) -> Figure | None:
    """The loss against each parameter that has more than one value; None if none has.

    A trial is not among the points of a parameter that it lacks: a local window alone has no levels.
    """
    columns = {}
    for name, value in SLICES.items():
        points = [(found, trial) for trial in result.of(COMPLETE) if (found := value(trial.parameters)) is not None]
        if len({found for found, _ in points}) > 1:
            columns[name] = points
    if not columns:
        return None
    rows = math.ceil(len(columns) / 2)
    figure = new_figure((5.5, 2.1 * rows))
    for place, (name, points) in enumerate(columns.items(), 1):
        axes = figure.add_subplot(rows, 2, place)
        values, trials = zip(*points, strict=True)
        candidates = sorted(set(values)) if name.startswith("local_window") else None  # 0 has no logarithm
        axes.scatter(
            values if candidates is None else [candidates.index(value) for value in values],
            [known(trial.loss) for trial in trials],
            s=14,
            c=[AMBER if trial is result.best else GREY for trial in trials],
        )
        if candidates is not None:
            axes.set_xticks(range(len(candidates)), [f"{value:,}" for value in candidates])
        elif name.startswith("share"):
            axes.set_xticks(sorted(set(values)))
        elif name.startswith(("coarsest", "select")):
            axes.set_xscale("log", base=2)
            axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.0f}"))
            axes.xaxis.set_minor_formatter(NullFormatter())
        else:
            axes.xaxis.set_major_locator(MaxNLocator(3, integer=name in ("levels", "batch")))
        axes.set_xlabel(name, fontsize=9)
        axes.tick_params(labelsize=8)
        make_plain(axes)
    return figure
