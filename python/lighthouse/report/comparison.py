"""A `Comparison` as a page, as a checklist and as lines for the terminal.

A line of the checklist is ticked only by numbers of this comparison, which follow it as evidence. If they cannot show
what it claims, for example times of a busy machine, it is neither ticked nor failed but not checked.
"""

from __future__ import annotations

from collections.abc import Sequence
from statistics import mean

from lighthouse.report.compared import Comparison, Pair, Stripped
from lighthouse.report.known import known
from lighthouse.report.page import Check, Page
from lighthouse.report.picture import losses
from lighthouse.report.table import minutes, speed
from lighthouse.training.result import PretrainResult, Stage

MIB = 2**20
SLOWER = 1.2  # times a plain model's time: a stripped model that takes longer is not a plain one

# Settings in the table, before and after those of the method.
OF_RUN = ("model", "context", "share", "switch_step")
OF_TRAINING = (
    "dense_layers max_steps learning_rate lr_scheduler_type warmup_steps max_grad_norm weight_decay bf16 processes"
).split()

WHY_DENSE = (
    "Every loss here is the held-out loss under dense attention, nats per token, also in the stage with Lighthouse; "
    "times are of training, without evaluation, saving and compilation."
)


def checklist(found: Comparison) -> list[Check]:
    """What a user needs to know before shipping, each with its evidence."""
    return [_integrated(found), _faster(found), _as_good(found), _stripped(found), _card(found)]


def _integrated(found: Comparison) -> Check:
    settings, two_stage = found.settings, [pair.two_stage for pair in found.pairs]
    layers = found.layers - 2 * settings["dense_layers"]
    sizes = found.method.plan(settings["context"])
    counted = [[stage.steps if stage else 0 for stage in (run.lighthouse, run.dense)] for run in two_stage]
    planned = [[run.switch_step, run.steps - run.switch_step] for run in two_stage]
    different = [f"{_seed(found, pair)}{what}" for pair in found.pairs for what in pair.differences]
    other = [
        f"{_seed(found, pair)}{its[0]:,} steps went through Lighthouse and {its[1]:,} were dense; "
        f"{was[0]:,} and {was[1]:,} were planned"
        for pair, its, was in zip(found.pairs, counted, planned, strict=True)
        if its != was
    ]
    warned = [f"{_seed(found, pair)}{warning}" for pair in found.pairs for warning in pair.two_stage.warnings]
    wrong = other or different or warned
    passed = layers > 0 and sizes.length < sizes.tokens and min(map(min, counted)) > 0 and not wrong
    first, rest = counted[0]
    evidence = (
        f"{first:,} of {two_stage[0].steps:,} steps went through Lighthouse in {layers} of {found.layers} layers, on "
        f"{sizes.length:,} entries in place of {sizes.tokens:,} tokens, and {rest:,} were dense. "
    )
    if other:
        evidence += f"Not as planned: {'; '.join(other)}. "
    evidence += "".join(f"{_sentence(warning)} " for warning in warned)
    if different:
        evidence += f"From the baseline to the two-stage run not only attention differs: {'; '.join(different)}."
    else:
        evidence += f"Settings, text, seed ({_seeds(found)}){_first_losses(found)} are the baseline's."
    return Check("Wrapper integrated", passed, evidence)


def _first_losses(found: Comparison) -> str:
    first = [run.held_out[0] for pair in found.pairs for run in pair.runs]
    if any(point.step > 0 for point in first):
        return " (the loss before the first step was not measured)"
    return f" and loss before the first step ({', '.join(f'{point.loss:.4f}' for point in first[1::2])})"


def _faster(found: Comparison) -> Check:
    verdicts, sentences = zip(*map(_faster_pair, found.pairs), strict=True)
    each = [
        f"{minutes(pair.two_stage.seconds)} against {minutes(pair.baseline.seconds)}"
        + (f" (seed {pair.seed})" if len(found.pairs) > 1 else "")
        for pair in found.pairs
    ]
    evidence = f"The whole training took {', '.join(each)}"
    if all(pair.control.why_not is None for pair in found.pairs) and len(found.devices) == 1:
        stages = [pair.stage_times_as_fast for pair in found.pairs if pair.stage_times_as_fast is not None]
        of_stage = "" if len(stages) < len(found.pairs) else f"; its stage with Lighthouse {mean(stages):.2f} times"
        evidence += f": {mean(pair.times_as_fast for pair in found.pairs):.2f} times as fast{of_stage}"
    said = [f"{_seed(found, pair)}{sentence}" for pair, sentence in zip(found.pairs, sentences, strict=True)]
    if len(found.devices) > 1:
        verdicts = (*verdicts, None)
        if not any("same device" in sentence for sentence in said):
            said.append(f"The runs were not on the same device: {', '.join(found.devices)}.")
    passed = False if False in verdicts else None if None in verdicts else True
    return Check(f"Speed-up verified on {found.device}", passed, f"{evidence}. {' '.join(said)}")


def _faster_pair(pair: Pair) -> tuple[bool | None, str]:
    """Whether the two-stage run of a pair was faster, None if that is not known; and what the control shows."""
    control, lighthouse = pair.control, pair.two_stage.lighthouse
    if lighthouse is None or lighthouse.steps == 0:
        return False, "Lighthouse acted in no step: there is no speed-up by it."
    if pair.differences:
        return None, "The runs differ in more than the attention."
    if control.why_not is not None:
        return None, control.why_not
    shown = (
        f"Dense steps, the control, ran at {control.baseline:,.0f} tokens/s in the baseline and at "
        f"{control.two_stage:,.0f} in the two-stage run."
    )
    if pair.times_as_fast <= 1:
        return False, shown
    # As if all that was slower than the baseline's own median had come from elsewhere.
    least = (1 - control.slow[0]) * pair.times_as_fast
    if least <= 1 + control.difference:
        return None, f"{shown} So small a difference may be chance."
    return True, shown


def _as_good(found: Comparison) -> Check:
    baseline, two_stage = found.mean_loss("baseline"), found.mean_loss("two_stage")
    over = f", means over {len(found.pairs)} seeds" if len(found.pairs) > 1 else ""
    lower = sum(pair.loss_difference <= 0 for pair in found.pairs)
    seeds = (
        f"Not higher with {lower} of {len(found.pairs)} seeds."
        if len(found.pairs) > 1
        else "One seed is one sample: with another seed the other run may end lower."
    )
    passed: bool | None = two_stage <= baseline
    why = []
    for pair in found.pairs:
        run = pair.two_stage
        if pair.differences:
            passed = None if passed else passed
            why.append(f"{_seed(found, pair)}the runs differ in more than the attention.")
        elif pair.left_dense:
            passed = None if passed else passed
            why.append(
                f"{_seed(found, pair)}Lighthouse did not act in {pair.left_dense:,} of the {run.switch_step:,} steps "
                "planned for it, so the loss says little about it."
            )
        if run.model_step <= run.switch_step:
            passed = False
            why.append(
                f"{_seed(found, pair)}the saved model is from step {run.model_step:,} and had no dense step after the "
                f"switch (after step {run.switch_step:,})."
            )
    return Check(
        f"{found.pairs[0].which.capitalize()} held-out loss matches or improves the baseline",
        passed,
        " ".join(
            [
                f"{two_stage:.4f} against {baseline:.4f} ({two_stage - baseline:+.4f}){over}.",
                *(f"{_seed(found, pair)}{_of_best(pair)}" for pair in found.pairs if pair.which == "best"),
                *map(_sentence, why),
                seeds,
                *map(passing, found.pairs),
            ]
        ),
    )


def _of_best(pair: Pair) -> str:
    """What the losses are if each run's best checkpoint was used; a sentence."""
    baseline, two_stage = pair.runs
    return (
        f"As load_best_model_at_end asks for, these are the losses of the best checkpoints, after step "
        f"{baseline.model_step:,} of the baseline and {two_stage.model_step:,} of the two-stage run; the last ones are "
        f"{two_stage.held_out[-1].loss:.4f} against {baseline.held_out[-1].loss:.4f}."
    )


def _stripped(found: Comparison) -> Check:
    what, stripped = "Stripped and inference benchmarked", found.stripped
    if stripped.failure is not None:
        return Check(what, False, _sentence(stripped.failure))
    inference, exported = known(stripped.inference), known(stripped.exported)
    ratios = [
        inference.exported.prefill_seconds / inference.plain.prefill_seconds,
        inference.exported.decode_seconds / inference.plain.decode_seconds,
    ]
    ours = inference.modules.get("lighthouse", 0) + len(inference.imported)
    plain = inference.same_outputs and bool(inference.modules) and ours == 0
    # The same modules with the same weights cannot be faster: then the machine did something else meanwhile.
    noisy = min(ratios) < 1 / SLOWER
    modules = ", ".join(f"{count} of {package}" for package, count in sorted(inference.modules.items()))
    outputs = "the same" if inference.same_outputs else "other"
    return Check(
        what,
        None if plain and noisy else plain and max(ratios) <= SLOWER,
        f"{_sentence(exported.check)} Beside a plain model with its weights it gives {outputs} outputs, bit "
        f"for bit; its modules are {modules}. It takes {ratios[0]:.2f} of the plain model's time for a prefill of "
        f"{inference.exported.prompt:,} tokens and {ratios[1]:.2f} for a token of decoding (at most {SLOWER} passes), "
        f"medians of {inference.rounds} round{'' if inference.rounds == 1 else 's'}."
        + (" A model cannot be that much faster than the same model: the machine was busy." if noisy else "")
        + "".join(f" Warning: {_sentence(warning)}" for warning in exported.warnings),
    )


def _card(found: Comparison) -> Check:
    stripped = found.stripped
    if stripped.exported is None:
        return Check("Model card updated", False, "There is no exported model.")
    evidence = f"`model/README.md` names {', '.join(stripped.card_names) or 'nothing of this run'}"
    if stripped.card_lacks:
        evidence += f"; it lacks {', '.join(stripped.card_lacks)}"
    return Check("Model card updated", not stripped.card_lacks, f"{evidence}.")


def passing(pair: Pair) -> str:
    """When the two-stage run of a pair has the baseline's final, or best, loss; a sentence."""
    baseline, two_stage = pair.baseline, pair.two_stage
    name = f"Seed {pair.seed}: the two-stage run"
    doubt = "" if pair.control.why_not is None else " These times are not comparable."
    if pair.passes is not None:
        steps, seconds = pair.passes
        times = f", after {pair.sooner:.2f} times as long" if not doubt else ""
        return (
            f"{name} reaches the baseline's {pair.which} loss {baseline.loss:.4f} after step {steps:,.0f}, at "
            f"{minutes(seconds)}; the baseline reached it at {minutes(pair.baseline_passes[1])}{times}.{doubt}"
        )
    ends = f"it ends with {two_stage.loss:.4f} at {minutes(two_stage.seconds)}"
    if pair.which == "best":
        ends = f"its best is {two_stage.loss:.4f}, and it ends at {minutes(two_stage.seconds)}"
    if pair.baseline_then is not None and two_stage.seconds < baseline.seconds:
        ends += f", when the baseline was last measured at {pair.baseline_then:.4f}"
    return f"{name} does not reach the baseline's {pair.which} loss {baseline.loss:.4f}; {ends}.{doubt}"


def recovery(pair: Pair) -> str:
    """What the switch did to the dense held-out loss of a pair's two-stage run; a sentence."""
    found, switch = pair.recovery, pair.two_stage.switch_step
    if found is None:
        return f"Seed {pair.seed}: nothing was measured after the switch."
    if found.jump == 0:
        return (
            f"Seed {pair.seed}: no rise: {found.before:.4f} right before the switch, after step {switch:,}, and "
            f"{found.first:.4f} at the next measurement, after step {switch + found.first_steps:,}."
        )
    back = (
        "not back at the end"
        if found.steps is None
        else f"back after {found.steps:,.0f} steps, {minutes(known(found.seconds))}"
    )
    return (
        f"Seed {pair.seed}: {found.before:.4f} right before the switch, after step {switch:,}; the loss rises by up "
        f"to {found.jump:.4f}, and is {back}."
    )


def page(found: Comparison, checks: Sequence[Check] | None = None) -> Page:
    """The report of a `Comparison`."""
    settings, checks = found.settings, checklist(found) if checks is None else checks
    steps, which = found.pairs[0].baseline.steps, found.pairs[0].which
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
            (f"baseline's {which} loss", [f"{pair.baseline.loss:.4f}" for pair in found.pairs]),
            (f"two-stage's {which} loss", [f"{pair.two_stage.loss:.4f}" for pair in found.pairs]),
            ("difference", [f"{pair.loss_difference:+.4f}" for pair in found.pairs]),
            (f"baseline at its {which} loss", [minutes(pair.baseline_passes[1]) for pair in found.pairs]),
            ("two-stage there", ["never" if pair.passes is None else minutes(pair.passes[1]) for pair in found.pairs]),
            (
                "times as long",
                ["" if pair.sooner is None or pair.control.why_not else f"{pair.sooner:.2f}" for pair in found.pairs],
            ),
        ],
        "When the two-stage run reached the baseline's loss: interpolated between two evaluations, from the switch on.",
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
            ("tokens/s with Lighthouse", [speed(run.lighthouse) for run in runs]),
            ("tokens/s dense", [speed(run.dense) for run in runs]),
            ("peak MiB with Lighthouse", [_mib(run.lighthouse) for run in runs]),
            ("peak MiB dense", [_mib(run.dense) for run in runs]),
        ],
        _of_memory(runs),
    )
    for pair in found.pairs:
        if pair.control.why_not is not None:
            result.text(f"{_seed(found, pair)}the times are not comparable. {pair.control.why_not}")

    result.section("Recovery after the switch")
    for pair in found.pairs:
        result.text(recovery(pair))

    result.section("The stripped model")
    _stripped_part(result, found.stripped)

    result.section("Settings")
    of_method = found.method.texts()
    values = settings | of_method
    names = [name for name in (*OF_RUN, *of_method, *OF_TRAINING) if values.get(name) is not None]
    result.table(("setting", "value"), [(f"`{name}`", values[name]) for name in names])
    result.text(
        "All settings are in `config.yaml` of each run's folder, and every number of this page is in `results.json`."
    )
    return result


def _stripped_part(result: Page, stripped: Stripped) -> None:
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


def _seed(found: Comparison, pair: Pair) -> str:
    """The prefix of a sentence about one of several pairs."""
    return f"Seed {pair.seed}: " if len(found.pairs) > 1 else ""


def _seeds(found: Comparison) -> str:
    return ", ".join(str(pair.seed) for pair in found.pairs)


def _mib(stage: Stage | None) -> str:
    return "" if stage is None or stage.peak_memory is None else f"{stage.peak_memory / MIB:,.0f}"


def _sentence(text: str) -> str:
    text = text.rstrip(".")
    return f"{text[:1].upper()}{text[1:]}."
