"""A `Comparison` as a page: which arm is ahead, the checklist, and all numbers in tables and pictures."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from statistics import mean

from lighthouse.report import standings
from lighthouse.report.checklist import attended, checklist, passing, recovery, seeds_of, sentence
from lighthouse.report.compared import DENSE, Comparison, Pair, Stripped
from lighthouse.report.evaluated import ALT, figures
from lighthouse.report.known import known
from lighthouse.report.page import Check, Page
from lighthouse.report.picture import losses
from lighthouse.report.table import minutes
from lighthouse.training.result import PretrainResult, Stage

MIB = 2**20

# Settings in the table, before and after those of the method.
OF_RUN = ("model", "context", "share", "switch_step")
OF_TRAINING = (
    "max_steps learning_rate lr_scheduler_type warmup_steps max_grad_norm weight_decay bf16 processes"
).split()

WHY_DENSE = (
    "Every loss here is the held-out loss under dense attention, nats per token, also in the stage with Lighthouse; "
    "times are of training, without evaluation, saving and compilation."
)


def page(found: Comparison, checks: Sequence[Check] | None = None) -> Page:
    """The report of a `Comparison`."""
    settings, checks = found.settings, checklist(found) if checks is None else checks
    steps = found.pairs[0].baseline.steps
    model = settings["model"].rstrip("/").rpartition("/")[2]
    result = Page(
        f"Lighthouse compared: {model} at {settings['context']:,} tokens",
        f"Runs of {steps:,} steps of {settings['tokens_per_step']:,} tokens each that differ in attention alone, with "
        f"the same seeds ({seeds_of(found)}), data and schedule, on {found.device}. {WHY_DENSE}",
    )
    for arm in found.arms:
        result.text(f"`{arm}`: {_what_is(found, arm)}")

    result.section("Which arm is ahead")
    for line in standings.said(found):
        result.text(line)
    result.section("Checklist")
    result.checklist(checks)
    _loss_part(result, found)
    _time_part(result, found)
    _distance_part(result, found)

    result.section("Recovery after the switch")
    for pair in _all_pairs(found):
        result.text(recovery(pair))

    result.section("The stripped model")
    _stripped_part(result, found.stripped)
    _settings_part(result, found)
    return result


def _what_is(found: Comparison, arm: str) -> str:
    """A sentence."""
    if arm == DENSE:
        return "dense attention in all steps, the baseline."
    run, method = found.seeds[0].runs[arm], found.method(arm)
    layers = found.layers - 2 * run.settings["dense_layers"]
    return (
        f"up to the switch after step {run.switch_step:,}, {attended(method, run.context)} in {layers} of "
        f"{found.layers} layers; then dense."
    )


def _loss_part(result: Page, found: Comparison) -> None:
    which, several = found.which, len(found.seeds) > 1
    runs = [run for seed in found.seeds for run in seed.runs.values()]
    result.section("Loss against time and steps")
    result.figure("loss-time", losses(runs, "time"), "Dense held-out loss against training time")
    result.figure("loss-steps", losses(runs, "steps"), "The same against steps")
    standing, time = standings.at_equal_steps(found), standings.at_equal_time(found)
    deviations = {arm: standing.deviation(arm) for arm in found.arms}
    at_time = {} if time.standing is None else {arm: time.standing.mean(arm) for arm in time.standing.values}
    rows = [
        (f"{which} loss, seed {seed.seed}", [f"{known(run.loss):.4f}" for run in seed.runs.values()])
        for seed in found.seeds
        if several
    ]
    over = ", mean" if several else ""
    rows += [
        (f"{which} loss{over}", [f"{standing.mean(arm):.4f}" for arm in found.arms]),
        ("standard deviation", [_number(deviations[arm], ".4f") for arm in found.arms]),
        (
            f"less the baseline's{over}",
            ["", *(f"{standing.mean(arm) - standing.mean(DENSE):+.4f}" for arm in found.arms[1:])],
        ),
        (f"at equal time{over}", [_number(at_time.get(arm), ".4f") for arm in found.arms]),
    ]
    _table(
        result,
        found.arms,
        rows,
        f"Dense held-out loss, nats per token; the baseline is {DENSE}."
        + (" At equal time: interpolated linearly between two evaluations." if at_time else ""),
    )
    for pair in _all_pairs(found):
        result.text(passing(pair))
    rows = []
    for seed in found.seeds:
        pairs, of_seed = seed.pairs.values(), f", seed {seed.seed}" if several else ""
        first = minutes(next(iter(pairs)).baseline_passes[1])
        reached = ["never" if pair.passes is None else minutes(pair.passes[1]) for pair in pairs]
        sooner = ["" if pair.control.why_not else _number(pair.sooner, ".2f") for pair in pairs]
        rows += [(f"reached{of_seed}", [first, *reached]), (f"times as long{of_seed}", ["", *sooner])]
    _table(
        result,
        found.arms,
        rows,
        f"When each arm reached the baseline's {which} loss: interpolated between two evaluations, from the switch on.",
    )


def _time_part(result: Page, found: Comparison) -> None:
    by_arm = [[seed.runs[arm] for seed in found.seeds] for arm in found.arms]
    result.section("Time, speed, memory")

    def row(of: Callable[[PretrainResult], float | None], shown: Callable[[float], str]) -> list[str]:
        each = [[value for value in map(of, runs) if value is not None] for runs in by_arm]
        return [shown(mean(values)) if values else "" for values in each]

    def rate(stage: Stage | None) -> float | None:
        return None if stage is None else stage.tokens_per_second

    def peak(stage: Stage | None) -> float | None:
        return None if stage is None or stage.peak_memory is None else stage.peak_memory / MIB

    _table(
        result,
        found.arms,
        [
            ("training time", row(lambda run: run.seconds, minutes)),
            ("device hours", row(lambda run: run.device_hours, "{:.4f}".format)),
            ("tokens/s with Lighthouse", row(lambda run: rate(run.lighthouse), "{:,.0f}".format)),
            ("tokens/s dense", row(lambda run: rate(run.dense), "{:,.0f}".format)),
            ("peak MiB with Lighthouse", row(lambda run: peak(run.lighthouse), "{:,.0f}".format)),
            ("peak MiB dense", row(lambda run: peak(run.dense), "{:,.0f}".format)),
        ],
        ("Means over the seeds. " if len(found.seeds) > 1 else "")
        + _of_memory([run for runs in by_arm for run in runs]),
    )
    for pair in _all_pairs(found):
        if pair.control.why_not is not None:
            result.text(f"Seed {pair.seed}, {pair.other.name}: the times are not comparable. {pair.control.why_not}")


def _distance_part(result: Page, found: Comparison) -> None:
    """What evaluations of the models found; nothing where there are none."""
    every = standings.mean_evaluations(found)
    if not every:
        return
    result.section("At distance")
    several = len(found.seeds) > 1
    error = "standard deviation over the seeds" if several else "standard error over {}"
    arms, drawn = list(every), figures(every)
    parts = [one.loss for one in every.values() if one.loss]
    if len(parts) == len(arms):
        result.figure("loss-position", drawn["loss"], ALT["loss"])
        of_loss = [
            (f"{each[0].start:,} to {each[0].stop:,}", [f"{one.loss:.4f} ± {one.error:.4f}" for one in each])
            for each in zip(*(part.stretches for part in parts), strict=True)
        ]
        caption = f"Dense held-out loss by position in the context, nats per token, ± {error.format('rows of text')}."
        _table(result, arms, of_loss, caption)
    copies = [one.copy for one in every.values() if one.copy]
    if len(copies) == len(arms):
        result.figure("copy-distance", drawn["copy"], ALT["copy"])
        of_copies = [
            (f"{each[0].distance:,} tokens", [f"{one.gain:.2f} ± {one.error:.2f}" for one in each])
            for each in zip(*(copy.distances for copy in copies), strict=True)
        ]
        caption = (
            f"Copy gain by distance, ± {error.format('passages')}: what the second appearance of a random passage of "
            f"{copies[0].passage_tokens} tokens saves, nats per token; a perfect copy saves {copies[0].chance:.2f}."
        )
        _table(result, arms, of_copies, caption)


def _settings_part(result: Page, found: Comparison) -> None:
    result.section("Settings")
    sparse = found.arms[1:]
    texts = [
        found.method(arm).texts() | {"dense_layers": str(found.seeds[0].runs[arm].settings["dense_layers"])}
        for arm in sparse
    ]
    _table(result, sparse, [(f"`{name}`", [its[name] for its in texts]) for name in texts[0]], "Of each arm.")
    names = [name for name in (*OF_RUN, *OF_TRAINING) if found.settings.get(name) is not None]
    result.table(("setting", "value"), [(f"`{name}`", found.settings[name]) for name in names], "Of all arms.")
    result.text(
        "All settings are in `config.yaml` of each run's folder, and every number of this page is in `results.json`."
    )


def _stripped_part(result: Page, stripped: Stripped) -> None:
    if stripped.failure is not None:
        result.text(sentence(stripped.failure))
    if stripped.exported is None:
        return
    exported = stripped.exported
    result.text(
        f"In `model`: a plain `{exported.model_class}` of seed {stripped.seed}, {exported.parameters:,} parameters in "
        f"{exported.dtype}, with tokenizer and model card. {sentence(exported.check)}"
    )
    for warning in exported.warnings:
        result.text(f"Warning: {warning}")
    if stripped.inference is None:
        return
    inference = stripped.inference
    sides = (inference.exported, inference.plain)
    _table(
        result,
        ["stripped", "plain"],
        [
            ("prefill, seconds", [f"{side.prefill_seconds:.4f}" for side in sides]),
            ("prefill, tokens/s", [f"{side.prefill_tokens_per_second:,.0f}" for side in sides]),
            ("decoding, ms a token", [f"{1e3 * side.decode_seconds:.2f}" for side in sides]),
            ("decoding, tokens/s", [f"{side.decode_tokens_per_second:,.0f}" for side in sides]),
        ],
        f"Prefill of {inference.exported.prompt:,} tokens, then {inference.new_tokens} greedy ones, in "
        f"{inference.dtype}, in a process that cannot import lighthouse; medians of {inference.rounds} rounds in turn. "
        "Plain: built by Transformers from the same configuration, with the same weights.",
    )


def _table(result: Page, columns: list[str], rows: list[tuple[str, list[str]]], caption: str) -> None:
    """Quantities one below the other, which a phone has room for. Unknown ones are left out."""
    result.table(("", *columns), [(name, *values) for name, values in rows if any(values)], caption)


def _of_memory(runs: Sequence[PretrainResult]) -> str:
    """What the peaks measure, and which of them are comparable."""
    kinds = {run.settings["device"] for run in runs}
    if kinds == {"cuda"}:
        return "Peak memory of each stage's steps: what PyTorch had allocated."
    text = (
        "Peak memory of each stage's steps: resident memory of the whole process, including interpreter, libraries and "
        "what an earlier run left in it. So the peaks of one run's stages are comparable, those of two runs hardly."
    )
    if len(kinds) > 1:
        text += " On a GPU it is what PyTorch had allocated, which is not comparable with it."
    return text


def _all_pairs(found: Comparison) -> list[Pair]:
    """The baseline beside each other arm, seed by seed."""
    return [pair for seed in found.seeds for pair in seed.pairs.values()]


def _number(value: float | None, form: str) -> str:
    return "" if value is None else format(value, form)
