"""The picture of a bench's results; needs matplotlib."""

from __future__ import annotations

from pathlib import Path

from lighthouse.speed.layer import Layer


def need_matplotlib() -> None:
    """Raises `ImportError` that names what to install."""
    try:
        import matplotlib.figure  # noqa: F401
    except ImportError as error:
        raise ImportError(
            'the plot needs matplotlib, which is not installed: pip install "lighthouse-attn[train]"'
        ) from error


def draw(results: dict, file: Path) -> None:
    """Time, speed-up and memory against length, as PNG. Raises `ImportError` without matplotlib."""
    need_matplotlib()
    from matplotlib.figure import Figure

    figure = Figure(figsize=(12, 3.6), layout="constrained")
    times, ratio, memory = figure.subplots(1, 3)
    dtypes = list(dict.fromkeys(row["dtype"] for row in results["rows"]))
    for dtype, dash in zip(dtypes, ("-", "--", ":"), strict=False):
        rows = [row for row in results["rows"] if row["dtype"] == dtype]

        def line(axis, key: str, label: str, scale=1.0, rows=rows, dash=dash, dtype=dtype, **style) -> None:
            points = [(row["tokens"], scale * row[key]) for row in rows if key in row]
            if points:
                label += f", {dtype}" if len(dtypes) > 1 else ""
                axis.plot(*zip(*points, strict=True), label=label, **{"marker": "o", "linestyle": dash} | style)

        for name, color, label in (("dense", "tab:gray", "dense"), ("lighthouse", "tab:orange", "Lighthouse")):
            line(times, f"{name}_seconds", label, 1e3, color=color)
            line(memory, f"{name}_peak_bytes", label, 2**-20, color=color)
        line(ratio, "speedup", "measured", color="tab:orange")
        line(ratio, "graph_speedup", "measured, CUDA graph", color="tab:green", marker="^")
        line(ratio, "estimate", "the plan's estimate", color="tab:blue", marker="x", linestyle="--")
    ratio.axhline(1, color="tab:gray", linewidth=1)
    tokens = sorted({row["tokens"] for row in results["rows"]})
    for axis, title, scale in (
        (times, "forward and backward, ms", "log"),
        (ratio, "times as fast as dense", "linear"),
        (memory, "peak memory beyond the inputs, MiB", "log"),
    ):
        axis.set(title=title, xlabel="tokens", yscale=scale)
        axis.set_xscale("log", base=2)
        axis.set_xticks(tokens, [f"{count:,}" for count in tokens], rotation=30)
        axis.grid(alpha=0.3)
        axis.legend()
    layer = " and ".join([str(Layer(**results["layer"], dtype=dtypes[0])), *dtypes[1:]])
    figure.suptitle(f"One attention layer ({layer}) on {results['device']}")
    figure.savefig(file, dpi=110, format="png")
