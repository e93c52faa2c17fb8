"""What evaluations found, as pictures and as a few lines: of one model, or of several side by side.

Each picture takes the evaluations by the names that are shown; those that lack its part are left out.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from lighthouse.evaluation.results import GAIN_NEEDED, CopyLoss, Evaluation, LossByPosition, Passkey, Stretch
from lighthouse.report.page import INCHES, new_figure
from lighthouse.report.picture import COLOURS, make_plain

ALT = {
    "loss": "Dense held-out loss by position in the context",
    "copy": "Copy gain by distance",
    "passkey": "Passkeys found, by length and depth",
}


def figures(evaluations: Mapping[str, Evaluation]) -> dict[str, Figure]:
    """The picture of each part that was measured, by the part's name."""
    drawn = {"loss": loss_figure, "copy": copy_figure, "passkey": passkey_figure}
    parts = [name for name in drawn if any(getattr(found, name) for found in evaluations.values())]
    return {name: drawn[name](evaluations) for name in parts}


def loss_figure(evaluations: Mapping[str, Evaluation]) -> Figure:
    """The mean loss of each stretch of the context, with its standard error, a line for each model."""
    figure = new_figure()
    axes = figure.add_subplot()
    colours = _colours(evaluations)
    most: list[Stretch] = []
    for name, found in evaluations.items():
        if found.loss is None:
            continue
        stretches = found.loss.stretches
        # Each stretch has the same width, although the next is as long as all before it.
        places, losses = range(len(stretches)), [s.loss for s in stretches]
        _line(axes, name, places, losses, [s.error for s in stretches], colours[name])
        if len(evaluations) == 1:
            for place, loss in zip(places, losses, strict=True):
                axes.annotate(f"{loss:.3f}", (place, loss), (6, 5), textcoords="offset points", fontsize=8)
        most = max(most, stretches, key=len)
    axes.set_xticks(range(len(most)), [f"{_tokens(s.start)} to {_tokens(s.stop)}" for s in most])
    axes.set_xlabel("position in the context, tokens")
    axes.set_ylabel("dense held-out loss, nats per token")
    axes.set_title("Held-out loss by position: it falls where more context helps", loc="left", fontsize=10)
    axes.margins(x=0.12)
    axes.tick_params(axis="x", labelsize=8, labelrotation=20 if len(most) > 4 else 0)
    make_plain(axes)
    if len(evaluations) > 1:
        axes.legend(frameon=False)
    return figure


def copy_figure(evaluations: Mapping[str, Evaluation]) -> Figure:
    """The copy gain against the distance, and the gain above which a model copies."""
    figure = new_figure()
    axes = figure.add_subplot()
    colours = _colours(evaluations)
    distances: set[int] = set()
    for name, found in evaluations.items():
        if found.copy is None:
            continue
        at = found.copy.distances
        x = [each.distance for each in at]
        _line(axes, name, x, [each.gain for each in at], [each.error for each in at], colours[name])
        distances |= set(x)
        if len(evaluations) == 1:
            _level(axes, sum(each.first for each in at) / len(at), "a perfect copy", "#6b7280")
    _level(axes, GAIN_NEEDED, "copies above this line", "#b91c1c")
    axes.set_xscale("log", base=2)
    axes.set_xticks(sorted(distances), [_tokens(distance) for distance in sorted(distances)])
    axes.set_ylim(bottom=min(0, axes.get_ylim()[0]))
    axes.set_xlabel("tokens from the first appearance to the second")
    axes.set_ylabel("copy gain, nats per token")
    axes.set_title("What the second appearance of a random passage saves", loc="left", fontsize=10)
    make_plain(axes)
    if len(evaluations) > 1:
        axes.legend(frameon=False)
    return figure


def passkey_figure(evaluations: Mapping[str, Evaluation]) -> Figure:
    """Length by depth, a row of two panels for each model: the share of keys found, and how much likelier they are."""
    shown = {name: found.passkey for name, found in evaluations.items() if found.passkey is not None}
    width, height = INCHES
    figure = new_figure((1.6 * width, 0.9 * height * len(shown)))
    panels = figure.subplots(len(shown), 2, squeeze=False)
    most = max(2.0, *(abs(cell.gain) for found in shown.values() for cell in found.cells))
    for (left, right), (name, found) in zip(panels, shown.items(), strict=True):
        title = f"{name}: " if len(shown) > 1 else ""
        _grid(left, found, [cell.accuracy for cell in found.cells], (0, 1), "YlGn", "{:.0%}")
        left.set_title(f"{title}keys found", loc="left", fontsize=10)
        _grid(right, found, [round(cell.gain, 1) + 0.0 for cell in found.cells], (-most, most), "PuOr_r", "{:+.1f}")
        right.set_title(f"{title}nats likelier than another key", loc="left", fontsize=10)
    return figure


def summary(found: Evaluation) -> list[str]:
    """A sentence or two for each part that was measured."""
    lines = []
    if found.loss is not None:
        lines.append(_loss_said(found.loss))
    if found.copy is not None:
        lines.append(_copies_said(found.copy))
    if found.passkey is not None:
        lines.append(_passkeys_said(found.passkey))
    return lines


def _loss_said(found: LossByPosition) -> str:
    stretches = ", ".join(f"{s.loss:.3f} ({_tokens(s.start)} to {_tokens(s.stop)})" for s in found.stretches)
    return f"Loss: {found.loss:.4f} nats per token; by position in the context: {stretches}."


def _copies_said(found: CopyLoss) -> str:
    gains = ", ".join(f"{at.gain:.2f} ({_tokens(at.distance)})" for at in found.distances)
    if not found.measurable:
        most = max(0.0, *(at.gain for at in found.distances))
        return (
            f"Copies: not measurable, the model does not copy yet: a second appearance saves at most {most:.2f} nats "
            f"per token, {GAIN_NEEDED} are needed to judge."
        )
    reach = f"over each distance up to {_tokens(found.reach)} tokens" if found.reach else "over some distances only"
    return f"Copies: {reach}; nats per token saved by distance: {gains}; chance is {found.chance:.2f}."


def _passkeys_said(found: Passkey) -> str:
    keys = found.trials * len(found.cells)
    return (
        f"Passkeys: {found.accuracy:.1%} of {keys:,} found; in the mean the key is likelier than another by "
        f"{round(found.gain, 2) + 0.0:.2f} nats."
    )


def _line(axes: Axes, name: str, x: Sequence[float], y: Sequence[float], errors: Sequence[float], colour: str) -> None:
    style: dict[str, Any] = {"marker": "o", "markersize": 4, "capsize": 3, "elinewidth": 0.8, "capthick": 0.8}
    axes.errorbar(x, y, errors, color=colour, label=name, **style)


def _level(axes: Axes, height: float, what: str, colour: str) -> None:
    axes.axhline(height, color=colour, linewidth=0.9, linestyle=":")
    where: dict[str, Any] = {"xycoords": ("axes fraction", "data"), "textcoords": "offset points"}
    axes.annotate(what, (1, height), (-2, 4), ha="right", color=colour, fontsize=8, **where)


def _grid(
    axes: Axes, found: Passkey, values: list[float], limits: tuple[float, float], colours: str, form: str
) -> None:
    lengths, depths = sorted({cell.length for cell in found.cells}), sorted({cell.depth for cell in found.cells})
    grid = np.array(values).reshape(len(lengths), len(depths)).T
    image = axes.imshow(grid, vmin=limits[0], vmax=limits[1], cmap=colours, aspect="auto")
    for (row, column), value in np.ndenumerate(grid):
        dark = sum(image.to_rgba(value)[:3]) < 1.5
        colour = "white" if dark else "black"
        axes.text(column, row, form.format(value), ha="center", va="center", fontsize=8, color=colour)
    axes.set_xticks(range(len(lengths)), [_tokens(length) for length in lengths])
    axes.set_yticks(range(len(depths)), [f"{depth:.0%}" for depth in depths])
    axes.set_xlabel("tokens of text")
    axes.set_ylabel("depth of the key")


def _colours(evaluations: Mapping[str, Evaluation]) -> dict[str, str]:
    if len(evaluations) == 1:
        return dict.fromkeys(evaluations, COLOURS[1])
    return {name: COLOURS[i % len(COLOURS)] for i, name in enumerate(evaluations)}


def _tokens(number: int) -> str:
    """1024 is 1K, 98304 is 96K."""
    return f"{number // 1024}K" if number and number % 1024 == 0 else f"{number:,}"
