"""Dense held-out loss against training time, one curve a run, the switch to dense marked."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter

from lighthouse.report.table import minutes

COLOURS = ("#6b7280", "#d97706", "#2563eb", "#059669", "#9333ea")


def draw(runs: Sequence, path: str | Path) -> None:
    """Writes a PNG of `PretrainResult`s. Needs no display."""
    figure = Figure(figsize=(9, 5.4), dpi=150, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    for run, colour in zip(runs, COLOURS, strict=False):
        _curve(axes, run, colour, label_above=run is runs[0])
    axes.margins(x=0.1, y=0.12)
    axes.set_xlim(left=0)
    axes.xaxis.set_major_formatter(FuncFormatter(lambda seconds, _: minutes(seconds)))
    axes.set_xlabel("training time, minutes:seconds, without evaluation")
    axes.set_ylabel("held-out loss with dense attention, nats per token")
    axes.set_title(f"{runs[0].steps:,} steps on sequences of {runs[0].context:,} tokens", loc="left")
    axes.grid(color="#e5e7eb", linewidth=0.8)
    axes.set_axisbelow(True)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    axes.legend(frameon=False, loc="upper right")
    figure.savefig(path)


def _curve(axes, run, colour: str, label_above: bool) -> None:
    points = run.held_out
    first = [point for point in points if point.step <= run.switch_step]
    second = points[len(first) - 1 :] if first else points  # joined where the stage changes
    if first:
        axes.plot(
            [p.seconds for p in first],
            [p.loss for p in first],
            color=colour,
            linestyle=(0, (4, 2)),
            marker="o",
            markersize=4,
            label=f"{run.name}, trained with Lighthouse",
        )
        switch = first[-1]
        axes.axvline(switch.seconds, color=colour, linewidth=0.8, linestyle=":")
        axes.annotate(
            "switch to dense",
            (switch.seconds, 1),
            xycoords=("data", "axes fraction"),
            xytext=(-4, -6),
            textcoords="offset points",
            rotation=90,
            ha="right",
            va="top",
            color=colour,
        )
    axes.plot(
        [p.seconds for p in second],
        [p.loss for p in second],
        color=colour,
        marker="o",
        markersize=4,
        markevery=slice(1 if first else 0, None),
        label=f"{run.name}, dense" if first else run.name,
    )
    last = points[-1]
    axes.annotate(
        f"{last.loss:.3f} at {minutes(last.seconds)}",
        (last.seconds, last.loss),
        xytext=(0, 9 if label_above else -9),
        textcoords="offset points",
        ha="center",
        va="bottom" if label_above else "top",
        color=colour,
        fontweight="bold",
    )
