"""Which tokens are kept, as a picture and as a page with the text itself (`Choices` of huggingface.inspection).

The page is one file without anything from elsewhere. Its trap is the text: it is put in as data and shown as text
content, never as markup.
"""

from __future__ import annotations

import base64
import html
import io
import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import ListedColormap
from matplotlib.figure import Figure

COLUMNS = 1600  # of the picture: longer texts are shown by the finest level in each stretch
BINS = 64  # stretches of the text for which the kept share is drawn
COLOURS = ("#b45309", "#fbbf24", "#fde9b8", "#f3f4f6", "#e5e7eb", "#d1d5db", "#9ca3af", "#6b7280")  # level 0 first


def draw(choices, target) -> None:
    """Writes a PNG to a path or a file: the levels by head and position, the kept share by position, the overlap."""
    layers, heads, tokens = choices.levels.shape
    rows = choices.levels.reshape(layers * heads, tokens)
    if tokens > COLUMNS:
        rows = np.stack([part.min(axis=1) for part in np.array_split(rows, COLUMNS, axis=1)], axis=1)
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


def summary(choices) -> dict:
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
        "kv_heads": heads,
        "kept_share": {str(layer): float(value) for layer, value in zip(choices.layers, share, strict=True)},
        "kept_by_every_head_share": float(choices.kept.all(axis=(0, 1)).mean()),
        "kept_by_no_head_share": float((~choices.kept).all(axis=(0, 1)).mean()),
        "overlap_between_heads_of_a_layer": _mean(overlap[same & other]),
        "overlap_between_layers": _mean(overlap[~same]),
    }


def _mean(values: np.ndarray) -> float | None:
    return float(values.mean()) if values.size else None


def page(choices, pieces: Sequence[str], title: str) -> str:
    """A self-contained HTML page; `pieces` is the text of each token."""
    layers, heads, _ = choices.levels.shape
    picture = io.BytesIO()
    draw(choices, picture)
    numbers = summary(choices)
    overlaps = [
        (name, numbers[key])
        for name, key in (
            ("of two heads of a layer", "overlap_between_heads_of_a_layer"),
            ("of heads of two layers", "overlap_between_layers"),
        )
        if numbers[key] is not None
    ]
    facts = [
        f"{numbers['tokens']:,} tokens; a sub-sequence of {numbers['sub_length']:,} entries, "
        f"windows of {', '.join(map(str, choices.windows))} tokens.",
        f"Kept as tokens by every head of every layer: {numbers['kept_by_every_head_share']:.2%} of the text; by none: "
        f"{numbers['kept_by_no_head_share']:.2%}.",
        *(f"Overlap of the tokens that two heads keep, {name}: {value:.2f} on average." for name, value in overlaps),
    ]
    data = {
        "pieces": list(pieces),
        "levels": ["".join(map(str, head)) for layer in choices.levels for head in layer],
        "names": [f"layer {layer}, head {head}" for layer in choices.layers for head in range(heads)],
        "kept": [round(float(share), 3) for share in choices.kept.mean(axis=(0, 1))],
        "colours": list(COLOURS[: len(choices.windows)]),
        "windows": list(choices.windows),
    }
    return _PAGE.format(
        title=html.escape(title),
        facts="".join(f"<p>{html.escape(fact)}</p>" for fact in facts),
        picture=base64.b64encode(picture.getvalue()).decode(),
        data=json.dumps(data).replace("<", "\\u003c"),  # no "</script>" can end the data
    )


def save(choices, pieces: Sequence[str], title: str, folder: str | Path) -> dict[str, Path]:
    """Writes `choice.png`, `choice.html` and `choice.json` into `folder` and returns their paths."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    paths = {kind: folder / f"choice.{kind}" for kind in ("png", "html", "json")}
    draw(choices, paths["png"])
    paths["html"].write_text(page(choices, pieces, title), encoding="utf-8")
    paths["json"].write_text(json.dumps(summary(choices), indent=2) + "\n", encoding="utf-8")
    return paths


_PAGE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">
<title>{title}</title>
<style>
body {{ font: 16px/1.5 system-ui, sans-serif; max-width: 75rem; margin: 2rem auto; padding: 0 1rem; color: #111827 }}
.wide {{ overflow-x: auto }} .wide img {{ width: 100%; min-width: 50rem }}
#text {{ font: 14px/1.6 ui-monospace, monospace; white-space: pre-wrap; overflow-wrap: anywhere;
  border: 1px solid #e5e7eb; padding: 1rem; max-height: 40rem; overflow-y: auto }}
.key {{ display: inline-block; padding: 0 .5em; border: 1px solid #e5e7eb; margin-right: .5em }}
select {{ font: inherit; max-width: 100% }}
</style></head><body>
<h1>{title}</h1>
{facts}
<div class="wide"><img alt="levels by layer, head and position; kept share by position; overlap of heads"
  src="data:image/png;base64,{picture}"></div>
<h2>In the text</h2>
<p><label>Shown: <select id="which"></select></label> <span id="legend"></span></p>
<div id="text"></div>
<script type="application/json" id="data">{data}</script>
<script>
const data = JSON.parse(document.getElementById("data").textContent);
const which = document.getElementById("which"), text = document.getElementById("text");
const legend = document.getElementById("legend");
["share of all heads that keep the token", ...data.names].forEach((name, i) => which.add(new Option(name, i)));
const spans = data.pieces.map((piece) => {{
  const span = document.createElement("span");
  span.textContent = piece;
  return text.appendChild(span);
}});
function key(colour, name) {{
  const span = document.createElement("span");
  span.className = "key"; span.style.background = colour; span.textContent = name;
  legend.append(span);
}}
function show() {{
  const head = Number(which.value) - 1;
  legend.textContent = "";
  if (head < 0) [0, 0.5, 1].forEach((share) => key(`rgba(217, 119, 6, ${{share}})`, `${{100 * share}} %`));
  else data.windows.forEach((window, level) => key(data.colours[level], window > 1 ? `window ${{window}}` : "token"));
  spans.forEach((span, i) => {{
    span.style.background = head < 0 ? `rgba(217, 119, 6, ${{data.kept[i]}})` : data.colours[data.levels[head][i]];
    span.title = `token ${{i}}, kept by ${{Math.round(100 * data.kept[i])}} % of the heads`;
  }});
}}
which.onchange = show;
show();
</script></body></html>
"""
