"""A `Comparison` as a page, as a checklist and as lines for the terminal.

A line of the checklist is ticked by numbers of this comparison alone, which stand behind it.
"""

from __future__ import annotations

from collections.abc import Sequence
from statistics import mean

from lighthouse.plan import plan
from lighthouse.report.page import Check, Page
from lighthouse.report.picture import losses
from lighthouse.report.table import minutes

MIB = 2**20
SLOWER = 1.2  # a stripped model that takes more than so many times a plain one's time is not a plain one

WHY_DENSE = (
    "Every loss here is the held-out loss under dense attention, nats per token, also in the stage with Lighthouse; "
    "times are of training, without evaluation, saving and compilation."
)


def checklist(found) -> list[Check]:
    """What a user needs to know before shipping, each with its evidence."""
    return [_integrated(found), _faster(found), _as_good(found), _stripped(found), _card(found)]


def _integrated(found) -> Check:
    settings, two_stage = found.settings, [pair.two_stage for pair in found.pairs]
    layers = found.layers - 2 * settings["dense_layers"]
    sizes = plan(settings["context"], pool_ratios=settings["pool_ratios"], select_topk=settings["select_topk"])
    counted = [[stage.steps if stage else 0 for stage in (run.lighthouse, run.dense)] for run in two_stage]
    planned = [[run.switch_step, run.steps - run.switch_step] for run in two_stage]
    same = all(_begin_alike(pair) for pair in found.pairs)
    dense = all(pair.baseline.lighthouse is None for pair in found.pairs)
    passed = (
        layers > 0
        and sizes.length < sizes.tokens
        and counted == planned
        and min(min(counts) for counts in counted) > 0
        and all(pair.baseline.steps == pair.two_stage.steps for pair in found.pairs)
        and dense
        and same
    )
    first, rest = counted[0]
    return Check(
        "Wrapper integrated",
        passed,
        f"{first:,} of {two_stage[0].steps:,} steps went through Lighthouse in {layers} of {found.layers} layers, on "
        f"{sizes.length:,} entries in place of {sizes.tokens:,} tokens, the last {rest:,} were dense. "
        f"Text, seed ({_seeds(found)}){_first_losses(found)} are {'' if same else 'not '}the baseline's"
        f"{'' if dense else ', which had Lighthouse on'}.",
    )


def _begin_alike(pair) -> bool:
    """The same text and, where it was measured before the first step, the same loss to the last bit."""
    settings = [run.settings for run in pair.runs]
    first = [run.held_out[0] for run in pair.runs]
    measured = all(point.step == 0 for point in first)
    return settings[0]["text"] == settings[1]["text"] and (not measured or first[0].loss == first[1].loss)


def _first_losses(found) -> str:
    first = [pair.two_stage.held_out[0] for pair in found.pairs]
    if any(point.step > 0 for point in first):
        return ""
    return f" and loss before the first step ({', '.join(f'{point.loss:.4f}' for point in first)})"


def _faster(found) -> Check:
    each = [
        f"{minutes(pair.two_stage.seconds)} against {minutes(pair.baseline.seconds)}"
        + (f" (seed {pair.seed})" if len(found.pairs) > 1 else "")
        for pair in found.pairs
    ]
    stages = [pair.stage_times_as_fast for pair in found.pairs]
    of_stage = "" if None in stages else f"; its stage with Lighthouse {mean(stages):.2f} times"
    alike = len(found.devices) == 1
    others = "" if alike else " The runs were not on the same device: their times do not compare."
    return Check(
        f"Speed-up verified on {found.device}",
        alike and all(pair.two_stage.seconds < pair.baseline.seconds for pair in found.pairs),
        f"The whole training took {', '.join(each)}: {mean(pair.times_as_fast for pair in found.pairs):.2f} times as "
        f"fast{of_stage}.{others}",
    )


def _as_good(found) -> Check:
    baseline, two_stage = found.mean_loss("baseline"), found.mean_loss("two_stage")
    over = f", means over {len(found.pairs)} seeds" if len(found.pairs) > 1 else ""
    return Check(
        "Final held-out loss matches or improves the baseline",
        two_stage <= baseline,
        f"{two_stage:.4f} against {baseline:.4f} ({two_stage - baseline:+.4f}){over}. "
        + " ".join(map(passing, found.pairs)),
    )


def _stripped(found) -> Check:
    what, stripped = "Stripped and inference benchmarked", found.stripped
    if stripped.failure is not None:
        return Check(what, False, _sentence(stripped.failure))
    inference = stripped.inference
    ratios = [
        inference.exported.prefill_seconds / inference.plain.prefill_seconds,
        inference.exported.decode_seconds / inference.plain.decode_seconds,
    ]
    ours = inference.modules.get("lighthouse", 0) + len(inference.imported)
    passed = inference.same_outputs and ours == 0 and max(ratios) <= SLOWER
    modules = ", ".join(f"{count} of {package}" for package, count in sorted(inference.modules.items()))
    outputs = "the same" if inference.same_outputs else "other"
    return Check(
        what,
        passed,
        f"{_sentence(stripped.exported.check)} Beside a plain model with its weights it gives {outputs} outputs, bit "
        f"for bit; its modules are {modules}. It takes {ratios[0]:.2f} of the plain model's time for a prefill of "
        f"{inference.exported.prompt:,} tokens and {ratios[1]:.2f} for a token of decoding (at most {SLOWER} passes).",
    )


def _card(found) -> Check:
    stripped = found.stripped
    if stripped.exported is None:
        return Check("Model card updated", False, "There is no exported model.")
    evidence = f"`model/README.md` names {', '.join(stripped.card_names) or 'nothing of this run'}"
    if stripped.card_lacks:
        evidence += f"; it lacks {', '.join(stripped.card_lacks)}"
    return Check("Model card updated", not stripped.card_lacks, f"{evidence}.")


def passing(pair) -> str:
    """When the two-stage run of a pair has the baseline's final loss; a sentence."""
    baseline, two_stage = pair.baseline, pair.two_stage
    name = f"Seed {pair.seed}: the two-stage run"
    if pair.passes is not None:
        steps, seconds = pair.passes
        return (
            f"{name} is at the baseline's final {baseline.loss:.4f} behind step {steps:,.0f}, at {minutes(seconds)}; "
            f"the baseline got there at {minutes(baseline.seconds)}, after {pair.sooner:.2f} times as long."
        )
    ends = f"it ends with {two_stage.loss:.4f} at {minutes(two_stage.seconds)}"
    if pair.baseline_then is not None and two_stage.seconds < baseline.seconds:
        ends += f", when the baseline stood at {pair.baseline_then:.4f}"
    return f"{name} does not get to the baseline's final {baseline.loss:.4f} within its steps; {ends}."


def recovery(pair) -> str:
    """What the switch did to the dense held-out loss of a pair's two-stage run; a sentence."""
    found, switch = pair.recovery, pair.two_stage.switch_step
    if found is None:
        return f"Seed {pair.seed}: nothing was measured behind the switch."
    if found.jump == 0:
        return (
            f"Seed {pair.seed}: no rise; {found.before:.4f} right before the switch, behind step {switch:,}, and "
            f"{found.first:.4f} behind step {switch + found.first_steps:,}, when it was next measured."
        )
    back = (
        "not back there at the end"
        if found.steps is None
        else f"back there after {found.steps:,.0f} steps, {minutes(found.seconds)}"
    )
    return (
        f"Seed {pair.seed}: {found.before:.4f} right before the switch, behind step {switch:,}; it rises by up to "
        f"{found.jump:.4f}, and is {back}."
    )


def page(found, checks: Sequence[Check] | None = None) -> Page:
    """The report of a `Comparison`."""
    settings, checks = found.settings, checklist(found) if checks is None else checks
    steps = found.pairs[0].baseline.steps
    model = settings["model"].rstrip("/").rpartition("/")[2]
    result = Page(
        f"Lighthouse compared: {model} at {settings['context']:,} tokens",
        f"A baseline with dense attention and a two-stage run, Lighthouse first and dense after that, of {steps:,} "
        f"steps of {settings['tokens_per_step']:,} tokens each, with the same seeds ({_seeds(found)}), data and "
        f"schedule, on {found.device}. {WHY_DENSE}",
    )
    result.checklist(checks)
    runs = [run for pair in found.pairs for run in pair.runs]

    result.section("Loss against time and tokens")
    result.figure("loss-time", losses(runs, "time"), "Dense held-out loss against training time")
    result.figure("loss-tokens", losses(runs, "tokens"), "The same against the tokens trained on")
    for pair in found.pairs:
        result.text(passing(pair))
    _table(
        result,
        [f"seed {pair.seed}" for pair in found.pairs],
        [
            ("baseline's final loss", [f"{pair.baseline.loss:.4f}" for pair in found.pairs]),
            ("two-stage's final loss", [f"{pair.two_stage.loss:.4f}" for pair in found.pairs]),
            ("difference", [f"{pair.loss_difference:+.4f}" for pair in found.pairs]),
            ("baseline at its final loss", [minutes(pair.baseline.seconds) for pair in found.pairs]),
            ("two-stage there", ["never" if pair.passes is None else minutes(pair.passes[1]) for pair in found.pairs]),
            ("times as long", ["" if pair.sooner is None else f"{pair.sooner:.2f}" for pair in found.pairs]),
        ],
        "When the two-stage run had the baseline's loss: on the line between two evaluations, from the switch on.",
    )

    result.section("Time, speed, memory")
    _table(
        result,
        [
            run.name if len(found.pairs) == 1 else f"{run.name}, {pair.seed}"
            for pair in found.pairs
            for run in pair.runs
        ],
        [
            ("training time", [minutes(run.seconds) for run in runs]),
            ("device hours", [f"{run.device_hours:.4f}" for run in runs]),
            ("tokens/s with Lighthouse", [_speed(run.lighthouse) for run in runs]),
            ("tokens/s dense", [_speed(run.dense) for run in runs]),
            ("peak MiB with Lighthouse", [_mib(run.lighthouse) for run in runs]),
            ("peak MiB dense", [_mib(run.dense) for run in runs]),
        ],
        "Peak memory of each stage's steps: "
        + (
            "what PyTorch had allocated."
            if settings["device"] == "cuda"
            else "what was resident of the whole process, interpreter and libraries included."
        ),
    )

    result.section("Recovery behind the switch")
    for pair in found.pairs:
        result.text(recovery(pair))

    result.section("The stripped model")
    _stripped_part(result, found.stripped)

    result.section("Settings")
    result.table(
        ("setting", "value"),
        [
            (f"`{name}`", _value(settings[name]))
            for name in (
                "model context share switch_step pool_ratios select_topk dense_layers max_steps learning_rate "
                "lr_scheduler_type warmup_steps max_grad_norm weight_decay bf16 processes"
            ).split()
            if settings.get(name) is not None
        ],
    )
    result.text(
        "All of them are in `config.yaml` of each run's folder, and every number of this page is in `results.json`."
    )
    return result


def _stripped_part(result: Page, stripped) -> None:
    if stripped.failure is not None:
        result.text(_sentence(stripped.failure))
    if stripped.exported is None:
        return
    exported = stripped.exported
    result.text(
        f"In `model`: a plain `{exported.model_class}` of seed {stripped.seed}, {exported.parameters:,} parameters in "
        f"{exported.dtype}, with tokenizer and model card. {_sentence(exported.check)}"
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
    """Quantities one below the other, which a phone has room for. One that nothing is known of is left out."""
    result.table(("", *columns), [(name, *values) for name, values in rows if any(values)], caption)


def _seeds(found) -> str:
    return ", ".join(str(pair.seed) for pair in found.pairs)


def _speed(stage) -> str:
    return "" if stage is None else f"{stage.tokens_per_second:,.0f}"


def _mib(stage) -> str:
    return "" if stage is None or stage.peak_memory is None else f"{stage.peak_memory / MIB:,.0f}"


def _value(value) -> str:
    return ", ".join(map(str, value)) if isinstance(value, list) else str(value)


def _sentence(text: str) -> str:
    text = text.rstrip(".")
    return f"{text[:1].upper()}{text[1:]}."
