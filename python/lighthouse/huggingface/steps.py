"""Optimizer steps by the attention that their training forwards ran: what happened, not what was planned.

The warnings about a run, its model and an exported checkpoint are made from these numbers, only here.
"""

from __future__ import annotations

from dataclasses import dataclass
from weakref import WeakKeyDictionary

from lighthouse.core.settings import LEAST_DENSE_SHARE

_taken: WeakKeyDictionary = WeakKeyDictionary()  # model: (step, what its training forwards in it ran)


def forget_forwards(model) -> None:
    """Forwards before the first step of a training count for no step."""
    model.take_used()
    _taken.pop(model, None)


def used_in(model, step: int):
    """What `WrappedModel.take_used` returns for the `step`-th step, for each caller at its end."""
    if _taken.get(model, (None, None))[0] != step:
        _taken[model] = step, model.take_used()
    return _taken[model][1]


def tokens_counted(attributes: dict, log_history: list[dict]) -> bool | str:
    """Whether the Trainer has counted all tokens of a run, from its first step on; which of them, where that is kept.

    `attributes` are a `LighthouseCallback`'s in a checkpoint. Without it the logs show it: they have the number from
    when it is counted.
    """
    if "counted" in attributes:
        return attributes["counted"] or False
    return all("num_input_tokens_seen" in entry for entry in log_history)


@dataclass
class Steps:
    """`lighthouse` steps in which Lighthouse acted, the last of them being `last`; `dense` are the others.

    `mixed` of the first had dense forwards too: a short batch among those that a step accumulates, say.
    """

    lighthouse: int = 0
    dense: int = 0
    mixed: int = 0
    last: int = 0

    def note(self, used, step: int) -> None:
        """The `step`-th step, counted from 1, used what `used_in` returns for it."""
        if used.lighthouse:
            self.lighthouse += 1
            self.mixed += used.dense
            self.last = step
        else:
            self.dense += 1


def not_ready(step: int, last: int, lighthouse: int | None = None) -> list[str]:
    """Of weights of the `step`-th step, where Lighthouse last acted in the `last`-th: why they are not ready for use.

    `lighthouse` are the steps that it acted in, by default all up to the last.
    """
    last = min(step, last)
    dense = step - last
    if last == 0 or dense >= LEAST_DENSE_SHARE * step:
        return []
    if dense:
        return [
            f"Of the {step:,} steps of these weights only the last {dense:,} were dense: with less than "
            f"{LEAST_DENSE_SHARE:.0%} of them they are hardly ready for dense attention, which every other program "
            "uses."
        ]
    used = f"All {step:,} steps of these weights used Lighthouse"
    if lighthouse is not None and lighthouse < last:
        used = f"Lighthouse was used up to the last of the {step:,} steps of these weights"
    return [f"{used}: they had no dense stage and are not ready for dense attention, which every other program uses."]


def not_as_wished(wished: int, steps: Steps) -> list[str]:
    """Where Lighthouse was to act in the first `wished` steps and did not in all of them, or not in all forwards."""
    said = []
    if steps.lighthouse == 0 < wished:
        said.append(
            f"Lighthouse never acted: it was on in {wished:,} steps, but every training forward in them was dense, as "
            "happens for sequences shorter than min_tokens or settings beyond max_share. This was a dense run."
        )
    elif steps.lighthouse < wished:
        said.append(
            f"Lighthouse acted in {steps.lighthouse:,} of the {wished:,} steps in which it was on; the others were "
            "dense, as happens for sequences shorter than min_tokens."
        )
    if steps.mixed:
        said.append(f"In {steps.mixed:,} of the {steps.lighthouse:,} steps with Lighthouse some forwards were dense.")
    return said
