"""The report of a study (`StudyResult`): the best setting, loss against time, what mattered, every trial and why."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from pathlib import Path

from lighthouse.core.method import Method
from lighthouse.report.known import known
from lighthouse.report.page import Page
from lighthouse.report.studied import (
    COMPLETE,
    FAILED,
    INTERRUPTED,
    LEAST_DENSE,
    LEAST_STEPS,
    PRUNED,
    RUNNING,
    SKIPPED,
    STATES,
    TOLERANCE,
    UNEQUAL,
    StudyResult,
    Trial,
)
from lighthouse.report.study_picture import SECONDS, bars, curves, slices
from lighthouse.report.table import minutes

NBSP = "\u00a0"
SHORT = {"per_device_train_batch_size": "rows", "gradient_accumulation_steps": "accumulation"}
LISTED = 40  # skipped settings, one a line
EVIDENCE = 10  # complete trials below which importances are little more than chance


def page_of(result: StudyResult, best_file: Path | None) -> Page:
    """The page; `best_file` is what `lighthouse pretrain --config` takes, if a trial is complete."""
    page, names = Page("Settings tried", _lead(result)), _different(result)
    if result.best is None:
        page.text(nothing_known(result))
    else:
        _best(page, result, result.best, best_file)
        page.section("Loss against time")
        page.figure("loss-against-time", curves(result), _curves_alt(result))
        page.table(
            ("trial", "loss", "time", *_heads(names)),
            [(t.number, f"{t.loss:.4f}", _time(known(t.seconds)), *_values(t, names)) for t in result.front],
            caption="The front: no other complete trial is both faster and better.",
        )
        _importance(page, result)
    page.section("How they were judged")
    page.text(_judged(result))
    for note in result.notes:
        page.text(note)
    _trials(page, result)
    return page


def nothing_known(result: StudyResult) -> str:
    """Of a study without a best setting."""
    unequal = result.of(UNEQUAL)
    if not unequal:
        return "No trial is complete yet, so nothing is known about any setting."
    text = f"No trial is comparable, so no setting is the best. The last of {len(unequal)}: {unequal[-1].why}."
    if result.judge == "time":
        text += " On a shared machine use --judge tokens, in another --output_dir."
    return text


def of_the_given(result: StudyResult) -> str:
    """Why the given setting is not compared."""
    trial = next((trial for trial in reversed(result.trials) if trial.given), None)
    why = "it was not tried" if trial is None else f"{trial.state}{f': {trial.why}' if trial.why else ''}"
    return f"It is not known whether this is better than the given setting: {why}."


def _lead(result: StudyResult) -> str:
    counts = [f"{len(result.of(state))} {state}" for state in STATES if result.of(state)]
    return f"Trials: {', '.join(counts)}. Sampler: {result.sampler}. Device: {result.device}."


def _best(page: Page, result: StudyResult, best: Trial, best_file: Path | None) -> None:
    given = result.given
    page.section("The best setting")
    names = list(best.texts)
    rows: list[tuple[str, ...]] = list(zip(_heads(names), _values(best, names), strict=True))
    head = ["", f"best: trial {best.number}".replace(" ", NBSP)]
    if given is not None and given is not best:
        head.append(f"given: trial {given.number}".replace(" ", NBSP))
        rows = [(*row, value) for row, value in zip(rows, _values(given, names), strict=True)]
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
        page.text("No other setting was better than the given one.")
    if given is None:
        page.text(of_the_given(result))
    page.text(
        "Each trial is one run with one seed: a difference no larger than that between seeds decides nothing. And a "
        f"trial is short: after more than {known(best.steps):,} steps another setting may be the best. Before a long "
        "run, try the best two or three, and the given one, with other seeds and more steps."
    )
    page.code(f"lighthouse pretrain --config {best_file} --steps 5000 --output_dir runs/tuned")


def _curves_alt(result: StudyResult) -> str:
    pruned = ", crosses where one was pruned" if result.of(PRUNED) else ""
    return f"Dense held-out loss of each trial from the switch on: points at its end{pruned}; the front in blue."


def _importance(page: Page, result: StudyResult) -> None:
    page.section("What mattered")
    complete = len(result.of(COMPLETE))
    if result.importance:
        alt = "Importance of each parameter for being among the best trials (PED-ANOVA)."
        page.figure("importance", bars(result.importance), alt)
        if complete < EVIDENCE:
            page.text(f"With {complete} complete trials these shares are little more than chance.")
    else:
        page.text(f"{complete} complete trials are too few to estimate the importance of a parameter.")
    figure = slices(result)
    if figure is not None:
        page.figure("parameters", figure, "Loss of each complete trial against each parameter.")


def _judged(result: StudyResult) -> str:
    always = (
        "The loss is that of held-out text under dense attention, in nats per token, after the last step of a "
        "learning-rate schedule that fits the trial's steps. Losses from before the switch are not used."
    )
    complete, unequal = result.of(COMPLETE), result.of(UNEQUAL)
    always += (
        f" A trial counts only if it had the same {result.judge} as the others, within {TOLERANCE:.0%}, in at least "
        f"{LEAST_STEPS} steps, {LEAST_DENSE} of them dense, and if Lighthouse acted in all steps planned for it"
        + (", and if its dense steps, the same work for all, took the usual time." if result.judge == "time" else ".")
    )
    if unequal:
        always += f" {len(unequal)} of {len(complete) + len(unequal)} did not meet this and cannot be the best."
    if result.judge == "tokens":
        return f"At equal tokens: {result.budget:,.0f} each, in whole steps. {always}"
    text = f"At equal time: {result.budget:,.1f} s of training each, evaluation not counted. "
    text += "The number of steps follows from the fastest of a few steps of each stage, timed before the trial. "
    if complete:
        least, most = (limit(known(trial.seconds) for trial in complete) for limit in (min, max))
        text += f"The comparable trials took {least:,.1f} to {most:,.1f} s, "
        text += f"{least / result.budget - 1:+.0%} to {most / result.budget - 1:+.0%}. "
    return text + always


def _trials(page: Page, result: StudyResult) -> None:
    page.section("Every trial")
    names, first = _different(result), next((trial.texts for trial in result.trials if trial.options), {})
    alike = [f"{name} {text}" for name, text in first.items() if name not in names]
    if alike:
        page.text(f"The same in all trials: {', '.join(alike)}.")
    trials = sorted(result.of(COMPLETE), key=lambda trial: known(trial.loss))
    page.table(
        ("trial", "loss", *_heads(names), "time", "steps", "state", ""),
        [
            (
                f"{trial.number}{' (given)' if trial.given else ''}".replace(" ", NBSP),
                "" if trial.loss is None else f"{trial.loss:.4f}",
                *_values(trial, names),
                "" if trial.seconds is None else _time(trial.seconds),
                "" if trial.steps is None else f"{trial.steps:,}",
                trial.state,
                _why(trial),
            )
            for trial in [*trials, *result.of(UNEQUAL, PRUNED, FAILED, INTERRUPTED, RUNNING)]
            if trial.options  # else it was killed before it had a setting
        ],
    )
    skipped = result.of(SKIPPED)
    if skipped:
        page.section("Skipped before any training")
        of_method = [setting.name for setting in Method.settings() if setting.name in names]
        page.table(
            ("trial", *_heads(of_method), ""),
            [(trial.number, *_values(trial, of_method), _why(trial)) for trial in skipped[:LISTED]],
        )
        if len(skipped) > LISTED:
            page.text(f"And {len(skipped) - LISTED} more, which are in `results.json`.")


def _different(result: StudyResult) -> list[str]:
    """The values of a setting that differ between trials."""
    texts = [trial.texts for trial in result.trials if trial.options]
    return [name for name in (texts[0] if texts else ()) if len({each.get(name) for each in texts}) > 1]


def _heads(names: Sequence[str]) -> list[str]:
    """Columns of a setting."""
    return [SHORT.get(name, name) for name in names]


def _values(trial: Trial, names: Sequence[str]) -> list[str]:
    """A setting's columns; none of them breaks into lines."""
    return [trial.texts.get(name, "").replace(" ", NBSP) for name in names]


def _why(trial: Trial) -> str:
    """On one line: in a narrow column it would make a page of each row."""
    return textwrap.shorten(trial.why or "", 140, placeholder=" ...").replace(" ", NBSP)


def _time(seconds: float) -> str:
    return f"{seconds:.1f}{NBSP}s" if seconds <= SECONDS else minutes(seconds)
