"""Which tokens are kept, as a picture and as a page with the text itself (`Choices` of huggingface.inspection).

The page is one self-contained file. The text is inserted as data and shown as text content, never as markup.
"""

from __future__ import annotations

import base64
import io
import json
from collections.abc import Sequence
from pathlib import Path
from typing import IO, Any

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import ListedColormap
from matplotlib.figure import Figure

from lighthouse.huggingface.inspection import Choices, stretches
from lighthouse.report.page import render

COLUMNS = 1600  # of the picture: longer texts are shown by the finest level in each stretch
BINS = 64  # stretches of the text for which the kept share is drawn
COLOURS = ("#b45309", "#fbbf24", "#fde9b8", "#f3f4f6", "#e5e7eb", "#d1d5db", "#9ca3af", "#6b7280")  # level 0 first


def draw(choices: Choices, target: str | Path | IO[bytes]) -> None:
    """Writes a PNG to a path or a file: the levels by head and position, the kept share by position, the overlap."""
    layers, heads, tokens = choices.levels.shape
    rows = choices.levels.reshape(layers * heads, tokens)
    if tokens > COLUMNS:
        rows = np.minimum.reduceat(rows, stretches(tokens, COLUMNS), axis=1)
    figure = Figure(figsize=(12, min(18, 4.6 + 0.12 * layers * heads)), dpi=120, layout="constrained")
    FigureCanvasAgg(figure)
    grid = figure.add_gridspec(2, 2, height_ratios=(max(2.0, 0.12 * layers * heads), 2.4), width_ratios=(2.2, 1))

    axes = figure.add_subplot(grid[0, :])
    levels = len(choices.windows)
    picture = axes.imshow(
        rows,
        aspect="auto",
        interpolation="nearest",
        cmap=ListedColormap(COLOURS[:levels]),
        vmin=-0.5,
        vmax=levels - 0.5,
        extent=(0, tokens, layers * heads, 0),
    )
    axes.set_yticks([(i + 0.5) * heads for i in range(layers)], [f"layer {layer}" for layer in choices.layers])
    for i in range(1, layers):
        axes.axhline(i * heads, color="white", linewidth=1)
    axes.set_xlabel("token")
    shown = f", the finest of up to {-(-tokens // COLUMNS)} in a column" if tokens > COLUMNS else ""
    axes.set_title(f"Finest level at which each key-value head keeps each token{shown}", loc="left")
    bar = figure.colorbar(picture, ax=axes, ticks=range(levels), shrink=0.8)
    bar.ax.set_yticklabels([f"window {window}" if window > 1 else "token" for window in choices.windows])

    axes = figure.add_subplot(grid[1, 0])
    bins = min(BINS, tokens)
    share = choices.kept_share(bins)
    middle = (np.arange(bins) + 0.5) * tokens / bins
    for layer, values in zip(choices.layers, share, strict=True):
        axes.plot(middle, values, color="#9ca3af", linewidth=0.8)
        axes.annotate(str(layer), (middle[-1], values[-1]), fontsize=7, color="#6b7280")
    axes.plot(middle, share.mean(axis=0), color=COLOURS[0], linewidth=2, label="mean of the layers")
    axes.set(xlabel="token", ylabel="kept share", xlim=(0, tokens), ylim=(0, None))
    axes.set_title("Share that is kept as tokens, by position", loc="left")
    axes.legend(frameon=False)

    axes = figure.add_subplot(grid[1, 1])
    picture = axes.imshow(choices.overlap(), vmin=0, vmax=1, cmap="viridis", interpolation="nearest")
    places = [(i + 0.5) * heads - 0.5 for i in range(layers)]
    axes.set_xticks(places, [str(layer) for layer in choices.layers])
    axes.set_yticks(places, [str(layer) for layer in choices.layers])
    axes.set_title("Overlap of two heads' tokens, by layer", loc="left")
    figure.colorbar(picture, ax=axes, shrink=0.8)
    figure.savefig(target, format="png")


def summary(choices: Choices) -> dict[str, Any]:
    """Numbers of a choice, as JSON takes them."""
    layers, heads, tokens = choices.levels.shape
    overlap = choices.overlap()
    layer_of = np.repeat(np.arange(layers), heads)
    same, other = layer_of[:, None] == layer_of[None], ~np.eye(layers * heads, dtype=bool)
    share = choices.kept.mean(axis=(1, 2))
    return {
        "tokens": tokens,
        "sub_length": choices.length,
        "windows": list(choices.windows),
        "local_window": choices.local_window,
        "kv_heads": heads,
        "kept_share": {str(layer): float(value) for layer, value in zip(choices.layers, share, strict=True)},
        "kept_by_every_head_share": float(choices.kept.all(axis=(0, 1)).mean()),
        "kept_by_no_head_share": float((~choices.kept).all(axis=(0, 1)).mean()),
        "overlap_between_heads_of_a_layer": _mean(overlap[same & other]),
        "overlap_between_layers": _mean(overlap[~same]),
    }


def _mean(values: np.ndarray) -> float | None:
    return float(values.mean()) if values.size else None


def page(choices: Choices, pieces: Sequence[str], title: str) -> str:
    """A self-contained HTML page; `pieces` is the text of each token."""
    layers, heads, _ = choices.levels.shape
    picture = io.BytesIO()
    draw(choices, picture)
    data = {
        "pieces": list(pieces),
        "levels": ["".join(map(str, head)) for layer in choices.levels for head in layer],
        "names": [f"layer {layer}, head {head}" for layer in choices.layers for head in range(heads)],
        "kept": [round(float(share), 3) for share in choices.kept.mean(axis=(0, 1))],
        "colours": list(COLOURS[: len(choices.windows)]),
        "windows": list(choices.windows),
    }
    return render(
        "choice.html.j2",
        title=title,
        numbers=summary(choices),
        picture=base64.b64encode(picture.getvalue()).decode(),
        data=data,
    )


def save(choices: Choices, pieces: Sequence[str], title: str, folder: str | Path) -> dict[str, Path]:
    """Writes `choice.png`, `choice.html` and `choice.json` into `folder` and returns their paths."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    paths = {kind: folder / f"choice.{kind}" for kind in ("png", "html", "json")}
    draw(choices, paths["png"])
    paths["html"].write_text(page(choices, pieces, title), encoding="utf-8")
    paths["json"].write_text(json.dumps(summary(choices), indent=2) + "\n", encoding="utf-8")
    return paths
