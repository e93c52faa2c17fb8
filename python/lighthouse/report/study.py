"""The report of a study (`StudyResult`): the best setting, loss against time, what mattered, every trial and why."""

from __future__ import annotations

import math
import textwrap
from collections.abc import Callable
from fractions import Fraction
from pathlib import Path

from matplotlib.ticker import FuncFormatter, MaxNLocator, NullFormatter

from lighthouse.report.page import Page, new_figure
from lighthouse.report.picture import COLOURS
from lighthouse.report.studied import LEAST_DENSE, LEAST_STEPS, TOLERANCE
from lighthouse.report.table import minutes

NBSP = "\u00a0"
GREY, AMBER, BLUE = COLOURS[:3]
SECONDS = 100  # up to here times are said in seconds
LISTED = 40  # skipped settings, one a line
EVIDENCE = 10  # complete trials below which importances are little more than chance


def page_of(result, best_file: Path | None) -> Page:
    """The page; `best_file` is what `lighthouse pretrain --config` takes, if a trial is complete."""
    page = Page("Settings tried", _lead(result))
    if result.best is None:
        page.text(nothing_known(result))
    else:
        _best(page, result, best_file)
        page.section("Loss against time")
        page.figure("loss-against-time", _curves(result), _curves_alt(result))
        page.table(
            ("trial", "loss", "time", *_names(result)),
            [(t.number, f"{t.loss:.4f}", _time(t.seconds), *_values(t)) for t in result.front],
            caption="The front: no other complete trial is both faster and better.",
        )
        _importance(page, result)
    page.section("How they were judged")
    page.text(_judged(result))
    for note in result.notes:
        page.text(note)
    _trials(page, result)
    return page


def nothing_known(result) -> str:
    """Of a study without a best setting."""
    unequal = result.of("not comparable")
    if not unequal:
        return "No trial is complete yet, so that nothing is known of any setting."
    text = f"No trial is comparable, so that no setting is the best. The last of {len(unequal)}: {unequal[-1].why}."
    if result.judge == "time":
        text += " On a machine that does other things too, take --judge tokens, in another --output_dir."
    return text


def of_the_given(result) -> str | None:
    """What is to be said of the given setting where it is not compared; None where it is."""
    if result.given is not None:
        return None
    trial = next((trial for trial in reversed(result.trials) if trial.given), None)
    why = "it was not tried" if trial is None else f"{trial.state}{f': {trial.why}' if trial.why else ''}"
    return f"Whether this is better than the given setting is not known: {why}."


def _lead(result) -> str:
    counts = [
        f"{len(result.of(state))} {state}"
        for state in ("complete", "not comparable", "pruned", "failed", "skipped", "interrupted", "running", "waiting")
        if result.of(state)
    ]
    return f"Trials: {', '.join(counts)}. Sampler: {result.sampler}. Device: {result.device}."


def _best(page: Page, result, best_file: Path | None) -> None:
    best, given = result.best, result.given
    page.section("The best setting")
    rows = list(zip(_names(result), _values(best), strict=True))
    head = ["", f"best: trial {best.number}".replace(" ", NBSP)]
    if given is not None and given is not best:
        head.append(f"given: trial {given.number}".replace(" ", NBSP))
        rows = [(*row, value) for row, value in zip(rows, _values(given), strict=True)]
    shown = [trial for trial in (best, given) if trial is not None][: len(head) - 1]
    for name, text in (
        ("dense held-out loss", lambda trial: f"{trial.loss:.4f}"),
        ("steps", lambda trial: f"{trial.steps:,}"),
        ("tokens", lambda trial: f"{trial.tokens:,}"),
        ("training time", lambda trial: _time(trial.seconds)),
    ):
        rows.append((name, *map(text, shown)))
    page.table(head, rows)
    if given is best:
        page.text("None of the others was better than the given setting.")
    if given is None:
        page.text(of_the_given(result))
    page.text(
        "Each trial is one run with one seed: a difference as small as another seed makes decides nothing. Before a "
        "long run, try the best two or three with other seeds."
    )
    page.code(f"lighthouse pretrain --config {best_file} --steps 5000 --output_dir runs/tuned")


def _curves(result):
    figure = new_figure()
    axes = figure.add_subplot()
    for trial in result.of("pruned", "complete"):
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
                marker="o" if trial.state == "complete" else "x",
                markersize=4,
                color=colour,
            )
    front = result.front
    axes.step(
        [trial.seconds for trial in front],
        [trial.loss for trial in front],
        where="post",
        color=BLUE,
        linewidth=1,
        marker="o",
        markersize=4,
        label="front",
    )
    ends = [trial.loss for trial in result.of("complete")]
    reach = max(max(ends) - min(ends), 0.02)
    highest = max(point.loss for trial in result.of("complete", "pruned") for point in trial.held_out)
    axes.set_ylim(min(ends) - 0.15 * reach, min(highest, max(ends) + 1.5 * reach) + 0.1 * reach)
    longest = max(trial.seconds for trial in result.of("complete", "pruned"))
    if longest > SECONDS:
        axes.xaxis.set_major_formatter(FuncFormatter(lambda seconds, _: minutes(seconds)))
    unit = "minutes:seconds" if longest > SECONDS else "seconds"
    axes.xaxis.set_major_locator(MaxNLocator(6))
    axes.set(xlabel=f"training time, {unit}", ylabel="dense held-out loss, nats per token")
    axes.legend(frameon=False, fontsize=9)
    _plain(axes)
    return figure


def _curves_alt(result) -> str:
    pruned = ", crosses where one was pruned" if result.of("pruned") else ""
    return f"Dense held-out loss of each trial from the switch on: points at its end{pruned}; the front in blue."


def _importance(page: Page, result) -> None:
    page.section("What mattered")
    complete = len(result.of("complete"))
    if result.importance:
        figure = new_figure((5.5, 0.9 + 0.34 * len(result.importance)))
        axes = figure.add_subplot()
        names = list(result.importance)[::-1]
        bars = axes.barh(names, [result.importance[name] for name in names], color=AMBER, height=0.6)
        axes.bar_label(bars, fmt="{:.0%}", padding=3, fontsize=9)
        axes.set_xlim(0, 1.15 * max(result.importance.values()))
        axes.xaxis.set_visible(False)
        _plain(axes)
        axes.spines["bottom"].set_visible(False)
        page.figure("importance", figure, "Importance of each parameter for being among the best trials (PED-ANOVA).")
        if complete < EVIDENCE:
            page.text(f"With {complete} complete trials these shares are little more than chance.")
    else:
        page.text(f"{complete} complete trials are too few to tell the importance of a parameter.")
    figure = _slices(result)
    if figure is not None:
        page.figure("parameters", figure, "Loss of each complete trial against each parameter.")


def _coarsest(parameters: dict) -> int | None:
    factors = [value for name, value in parameters.items() if name.startswith("factor_")]
    return math.prod(factors) if factors else None


SLICES: dict[str, Callable] = {
    "levels": lambda parameters: parameters.get("levels"),
    "coarsest window, tokens": _coarsest,
    "select_topk, parents": lambda parameters: parameters.get("select_topk"),
    "learning rate": lambda parameters: parameters.get("learning_rate"),
    "batch": lambda parameters: parameters.get("batch"),
}


def _slices(result):
    """The loss against each parameter that has more than one value; None if none has."""
    trials = result.of("complete")
    columns = {name: [value(trial.parameters) for trial in trials] for name, value in SLICES.items()}
    columns = {name: values for name, values in columns.items() if None not in values and len(set(values)) > 1}
    if not columns:
        return None
    rows = math.ceil(len(columns) / 2)
    figure = new_figure((5.5, 2.1 * rows))
    for place, (name, values) in enumerate(columns.items(), 1):
        axes = figure.add_subplot(rows, 2, place)
        colours = [AMBER if trial is result.best else GREY for trial in trials]
        axes.scatter(values, [trial.loss for trial in trials], s=14, c=colours)
        if name.startswith(("coarsest", "select")):
            axes.set_xscale("log", base=2)
            axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.0f}"))
            axes.xaxis.set_minor_formatter(NullFormatter())
        else:
            axes.xaxis.set_major_locator(MaxNLocator(3, integer=name in ("levels", "batch")))
        axes.set_xlabel(name, fontsize=9)
        axes.tick_params(labelsize=8)
        _plain(axes)
    return figure


def _plain(axes) -> None:
    axes.grid(color="#e5e7eb", linewidth=0.8)
    axes.set_axisbelow(True)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)


def _judged(result) -> str:
    always = (
        "The loss is that of held-out text under dense attention, in nats per token, behind the last step of a "
        "schedule of the learning rate that fits the trial's steps. Losses from before the switch judge nothing."
    )
    complete, unequal = result.of("complete"), result.of("not comparable")
    always += (
        f" A trial counts only if it had what each has, within {TOLERANCE:.0%}, in at least {LEAST_STEPS} steps, "
        f"{LEAST_DENSE} of them dense, and if Lighthouse acted in all that were to be its"
        + (", and if its dense steps, the same work for all, took the usual time" if result.judge == "time" else "")
        + f": {len(unequal) or 'none'} of {len(complete) + len(unequal)} did not and can not be the best."
    )
    if result.judge == "tokens":
        return f"At equal tokens: {result.budget:,.0f} each, in whole steps. {always}"
    text = f"At equal time: {result.budget:,.1f} s of training each, evaluation not counted. "
    text += "How many steps these are follows from steps of both stages that were timed before the trial, the "
    text += "fastest of a few. "
    if complete:
        least, most = (limit(trial.seconds for trial in complete) for limit in (min, max))
        text += f"The comparable trials really took {least:,.1f} to {most:,.1f} s, "
        text += f"{least / result.budget - 1:+.0%} to {most / result.budget - 1:+.0%}. "
    return text + always


def _trials(page: Page, result) -> None:
    page.section("Every trial")
    trials = sorted(result.of("complete"), key=lambda trial: trial.loss)
    page.table(
        ("trial", "loss", *_names(result), "time", "steps", "state", ""),
        [
            (
                f"{trial.number}{' (given)' if trial.given else ''}".replace(" ", NBSP),
                "" if trial.loss is None else f"{trial.loss:.4f}",
                *_values(trial),
                "" if trial.seconds is None else _time(trial.seconds),
                "" if trial.steps is None else f"{trial.steps:,}",
                trial.state,
                _why(trial),
            )
            for trial in [*trials, *result.of("not comparable", "pruned", "failed", "interrupted", "running")]
            if trial.options  # else it was killed before it had a setting
        ],
    )
    skipped = result.of("skipped")
    if skipped:
        page.section("Skipped before any training")
        page.table(
            ("trial", *_names(result)[:2], ""),
            [(trial.number, *_values(trial)[:2], _why(trial)) for trial in skipped[:LISTED]],
        )
        if len(skipped) > LISTED:
            page.text(f"And {len(skipped) - LISTED} more, which are in `results.json`.")


def _names(result) -> list[str]:
    """Columns of a setting."""
    first = next((trial.options for trial in result.trials if trial.options), {})
    return [
        {"per_device_train_batch_size": "rows", "gradient_accumulation_steps": "accumulation"}.get(n, n) for n in first
    ]


def _values(trial) -> list[str]:
    """A setting's columns; none of them breaks into lines."""
    return [_shown(name, value).replace(" ", NBSP) for name, value in trial.options.items()]


def _shown(name: str, value) -> str:
    if isinstance(value, list):
        return " ".join(map(str, value))
    if name == "select_topk" and isinstance(value, float):
        return str(Fraction(value).limit_denominator(65_536))
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def _why(trial) -> str:
    """On one line: in a narrow column it would make a page of each row."""
    return textwrap.shorten(trial.why or "", 140, placeholder=" ...").replace(" ", NBSP)


def _time(seconds: float) -> str:
    return f"{seconds:.1f}{NBSP}s" if seconds <= SECONDS else minutes(seconds)
