"""What a user needs to know of a `Comparison` before shipping, line by line; and sentences about two of its runs.

A line of the checklist is ticked only by numbers of this comparison, which follow it as evidence. If they cannot show
what it claims, for example times of a busy machine, it is neither ticked nor failed but not checked. It is about the
arm that is shipped, beside the baseline; which arm is ahead is in `standings`.
"""

from __future__ import annotations

from statistics import mean

from lighthouse.core.method import Method
from lighthouse.report.compared import DENSE, Comparison, Pair
from lighthouse.report.known import known
from lighthouse.report.page import Check
from lighthouse.report.table import minutes

SLOWER = 1.2  # times a plain model's time: a stripped model that takes longer is not a plain one


def checklist(found: Comparison) -> list[Check]:
    """What a user needs to know before shipping, each with its evidence."""
    return [_integrated(found), _faster(found), _as_good(found), _stripped(found), _card(found)]


def _integrated(found: Comparison) -> Check:
    settings, shipped = found.settings, [pair.other for pair in found.pairs]
    layers, method = found.layers - 2 * settings["dense_layers"], found.method(found.shipped)
    sizes = method.plan(settings["context"])
    counted = [[stage.steps if stage else 0 for stage in (run.lighthouse, run.dense)] for run in shipped]
    planned = [[run.switch_step, run.steps - run.switch_step] for run in shipped]
    different = [f"{_prefix(found, pair)}{what}" for pair in found.pairs for what in pair.differences]
    other = [
        f"{_prefix(found, pair)}{its[0]:,} steps went through Lighthouse and {its[1]:,} were dense; "
        f"{was[0]:,} and {was[1]:,} were planned"
        for pair, its, was in zip(found.pairs, counted, planned, strict=True)
        if its != was
    ]
    warned = [f"{_prefix(found, pair)}{warning}" for pair in found.pairs for warning in pair.other.warnings]
    wrong = other or different or warned
    passed = layers > 0 and sizes.length < sizes.tokens and min(map(min, counted)) > 0 and not wrong
    first, rest = counted[0]
    evidence = (
        f"{first:,} of {shipped[0].steps:,} steps of the {found.shipped} run went through Lighthouse in {layers} of "
        f"{found.layers} layers, on {attended(method, settings['context'])}, and {rest:,} were dense. "
    )
    if other:
        evidence += f"Not as planned: {'; '.join(other)}. "
    evidence += "".join(f"{sentence(warning)} " for warning in warned)
    if different:
        evidence += f"From the baseline to the {found.shipped} run not only attention differs: {'; '.join(different)}."
    else:
        evidence += f"Settings, text, seed ({seeds_of(found)}){_first_losses(found)} are the baseline's."
    return Check("Wrapper integrated", passed, evidence)


def attended(method: Method, tokens: int) -> str:
    """What a token attends to in the layers with Lighthouse, in place of all of a sequence's tokens."""
    window = f"a local window of {method.local_window:,}"
    if not method.chooses:
        return f"{window} in place of {tokens:,} tokens"
    chosen = f"{method.length(tokens):,} entries in place of {tokens:,} tokens"
    return f"{chosen} and {window}" if method.local_window else chosen


def _first_losses(found: Comparison) -> str:
    first = [run.held_out[0] for pair in found.pairs for run in pair.runs]
    if any(point.step > 0 for point in first):
        return " (the loss before the first step was not measured)"
    return f" and loss before the first step ({', '.join(f'{point.loss:.4f}' for point in first[1::2])})"


def _faster(found: Comparison) -> Check:
    verdicts, sentences = zip(*map(_faster_pair, found.pairs), strict=True)
    each = [
        f"{minutes(pair.other.seconds)} against {minutes(pair.baseline.seconds)}"
        + (f" (seed {pair.seed})" if len(found.pairs) > 1 else "")
        for pair in found.pairs
    ]
    evidence = f"The whole training took {', '.join(each)}"
    if all(pair.control.why_not is None for pair in found.pairs) and len(found.devices) == 1:
        stages = [pair.stage_times_as_fast for pair in found.pairs if pair.stage_times_as_fast is not None]
        of_stage = "" if len(stages) < len(found.pairs) else f"; its stage with Lighthouse {mean(stages):.2f} times"
        evidence += f": {mean(pair.times_as_fast for pair in found.pairs):.2f} times as fast{of_stage}"
    said = [f"{_prefix(found, pair)}{sentence}" for pair, sentence in zip(found.pairs, sentences, strict=True)]
    if len(found.devices) > 1:
        verdicts = (*verdicts, None)
        if not any("same device" in sentence for sentence in said):
            said.append(f"The runs were not on the same device: {', '.join(found.devices)}.")
    passed = False if False in verdicts else None if None in verdicts else True
    return Check(f"Speed-up verified on {found.device}", passed, f"{evidence}. {' '.join(said)}")


def _faster_pair(pair: Pair) -> tuple[bool | None, str]:
    """Whether the other run of a pair was faster, None if that is not known; and what the control shows."""
    control, lighthouse = pair.control, pair.other.lighthouse
    if lighthouse is None or lighthouse.steps == 0:
        return False, "Lighthouse acted in no step: there is no speed-up by it."
    if pair.differences:
        return None, "The runs differ in more than the attention."
    if control.why_not is not None:
        return None, control.why_not
    shown = (
        f"Dense steps, the control, ran at {control.baseline:,.0f} tokens/s in the baseline and at "
        f"{control.other:,.0f} in the {pair.other.name} run."
    )
    if pair.times_as_fast <= 1:
        return False, shown
    # As if all that was slower than the baseline's own median had come from elsewhere.
    least = (1 - control.slow[0]) * pair.times_as_fast
    if least <= 1 + control.difference:
        return None, f"{shown} So small a difference may be chance."
    return True, shown


def _as_good(found: Comparison) -> Check:
    baseline, shipped = found.mean_loss(DENSE), found.mean_loss(found.shipped)
    over = f", means over {len(found.pairs)} seeds" if len(found.pairs) > 1 else ""
    lower = sum(pair.loss_difference <= 0 for pair in found.pairs)
    seeds = (
        f"Not higher with {lower} of {len(found.pairs)} seeds."
        if len(found.pairs) > 1
        else "One seed is one sample: with another seed the other run may end lower."
    )
    passed: bool | None = shipped <= baseline
    why = []
    for pair in found.pairs:
        run = pair.other
        if pair.differences:
            passed = None if passed else passed
            why.append(f"{_prefix(found, pair)}the runs differ in more than the attention.")
        elif pair.left_dense:
            passed = None if passed else passed
            why.append(
                f"{_prefix(found, pair)}Lighthouse did not act in {pair.left_dense:,} of the {run.switch_step:,} steps "
                "planned for it, so the loss says little about it."
            )
        if run.model_step <= run.switch_step:
            passed = False
            why.append(
                f"{_prefix(found, pair)}the saved model is from step {run.model_step:,} and had no dense step after "
                f"the switch (after step {run.switch_step:,})."
            )
    return Check(
        f"{found.which.capitalize()} held-out loss matches or improves the baseline",
        passed,
        " ".join(
            [
                f"{shipped:.4f} against {baseline:.4f} ({shipped - baseline:+.4f}){over}.",
                *(f"{_prefix(found, pair)}{_of_best(pair)}" for pair in found.pairs if pair.which == "best"),
                *map(sentence, why),
                seeds,
                *map(passing, found.pairs),
            ]
        ),
    )


def _of_best(pair: Pair) -> str:
    """What the losses are if each run's best checkpoint was used; a sentence."""
    baseline, other = pair.runs
    return (
        f"As load_best_model_at_end asks for, these are the losses of the best checkpoints, after step "
        f"{baseline.model_step:,} of the baseline and {other.model_step:,} of the {other.name} run; the last ones are "
        f"{other.held_out[-1].loss:.4f} against {baseline.held_out[-1].loss:.4f}."
    )


def _stripped(found: Comparison) -> Check:
    what, stripped = "Stripped and inference benchmarked", found.stripped
    if stripped.failure is not None:
        return Check(what, False, sentence(stripped.failure))
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
        f"{sentence(exported.check)} Beside a plain model with its weights it gives {outputs} outputs, bit "
        f"for bit; its modules are {modules}. It takes {ratios[0]:.2f} of the plain model's time for a prefill of "
        f"{inference.exported.prompt:,} tokens and {ratios[1]:.2f} for a token of decoding (at most {SLOWER} passes), "
        f"medians of {inference.rounds} round{'' if inference.rounds == 1 else 's'}."
        + (" A model cannot be that much faster than the same model: the machine was busy." if noisy else "")
        + "".join(f" Warning: {sentence(warning)}" for warning in exported.warnings),
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
    """When the other run of a pair has the baseline's final, or best, loss; a sentence."""
    baseline, other = pair.runs
    name = f"Seed {pair.seed}: the {other.name} run"
    doubt = "" if pair.control.why_not is None else " These times are not comparable."
    if pair.passes is not None:
        steps, seconds = pair.passes
        times = f", after {pair.sooner:.2f} times as long" if not doubt else ""
        return (
            f"{name} reaches the baseline's {pair.which} loss {baseline.loss:.4f} after step {steps:,.0f}, at "
            f"{minutes(seconds)}; the baseline reached it at {minutes(pair.baseline_passes[1])}{times}.{doubt}"
        )
    ends = f"it ends with {other.loss:.4f} at {minutes(other.seconds)}"
    if pair.which == "best":
        ends = f"its best is {other.loss:.4f}, and it ends at {minutes(other.seconds)}"
    if pair.baseline_then is not None and other.seconds < baseline.seconds:
        ends += f", when the baseline was last measured at {pair.baseline_then:.4f}"
    return f"{name} does not reach the baseline's {pair.which} loss {baseline.loss:.4f}; {ends}.{doubt}"


def recovery(pair: Pair) -> str:
    """What the switch did to the dense held-out loss of the other run of a pair; a sentence."""
    found, switch, name = pair.recovery, pair.other.switch_step, f"Seed {pair.seed}, {pair.other.name}"
    if found is None:
        return f"{name}: nothing was measured after the switch."
    if found.jump == 0:
        return (
            f"{name}: no rise: {found.before:.4f} right before the switch, after step {switch:,}, and "
            f"{found.first:.4f} at the next measurement, after step {switch + found.first_steps:,}."
        )
    back = (
        "not back at the end"
        if found.steps is None
        else f"back after {found.steps:,.0f} steps, {minutes(known(found.seconds))}"
    )
    return (
        f"{name}: {found.before:.4f} right before the switch, after step {switch:,}; the loss rises by up "
        f"to {found.jump:.4f}, and is {back}."
    )


def _prefix(found: Comparison, pair: Pair) -> str:
    """The prefix of a sentence about one of several pairs."""
    return f"Seed {pair.seed}: " if len(found.pairs) > 1 else ""


def seeds_of(found: Comparison) -> str:
    return ", ".join(str(pair.seed) for pair in found.pairs)


def sentence(text: str) -> str:
    text = text.rstrip(".")
    return f"{text[:1].upper()}{text[1:]}."
