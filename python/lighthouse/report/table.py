"""The runs side by side: training time, speed and memory of each stage, dense held-out loss."""

from __future__ import annotations

from collections.abc import Sequence

from rich.table import Table

from lighthouse.report.known import known
from lighthouse.training.result import PretrainResult, Stage


def table(runs: Sequence[PretrainResult], *, times_compare: bool = True) -> Table:
    """A `rich` table of `PretrainResult`s, one a row; time and loss also relative to the first, the baseline.

    Times only if they are comparable.
    """
    baseline = runs[0]
    result = Table(
        title=f"{baseline.steps:,} steps at {baseline.context:,} tokens",
        caption="time without evaluation, saving and compilation; loss in nats per token, always with dense attention",
    )
    result.add_column("run")
    for column in ("training time", "tokens/s Lighthouse", "tokens/s dense", "held-out loss"):
        result.add_column(column, justify="right")
    for run in runs:
        time = minutes(run.seconds)
        if run is not baseline and times_compare:
            time += f" ({baseline.seconds / run.seconds:.2f}x as fast)"
        loss = f"{run.loss:.4f}"
        if run is not baseline:
            loss += f" ({known(run.loss) - known(baseline.loss):+.4f})"
        result.add_row(run.name, time, speed(run.lighthouse), speed(run.dense), loss)
    return result


def minutes(seconds: float) -> str:
    """`75.2` is `1:15`, `7265` is `2:01:05`."""
    whole = round(seconds)
    if whole >= 3600:
        return f"{whole // 3600}:{whole // 60 % 60:02d}:{whole % 60:02d}"
    return f"{whole // 60}:{whole % 60:02d}"


def speed(stage: Stage | None) -> str:
    """Tokens per second; nothing where the stage has no step."""
    return "" if stage is None else f"{stage.tokens_per_second:,.0f}"
