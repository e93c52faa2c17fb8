"""The ranges and candidates that `TuneOptions` names, each holding the given setting, which is tried first."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import TypeVar

from lighthouse.core.method import Method, check_select_topk, number
from lighthouse.core.plan import parents_per_level
from lighthouse.core.settings import LONG
from lighthouse.studies.budget import too_few_of
from lighthouse.studies.tune_options import TuneOptions
from lighthouse.training.options import PretrainOptions, TrainingOptions

TOPK = (512, 4096)  # of `LONG` tokens or more
WINDOWS = (0, 128, 256, 512, 1024)
SHARES = (0.5, 0.6, 0.7, 0.8, 0.9)
BATCH_UP_TO = 0.4

ROWS, ACCUMULATION = "per_device_train_batch_size", "gradient_accumulation_steps"

Number = TypeVar("Number", int, float)


def range_of(name: str, asked: Sequence | None, default: Sequence, given: Sequence, ratio: bool = False) -> tuple:
    """The range asked for, or the default one, widened to hold what is given."""
    if asked is None:
        return min(*default, *given), max(*default, *given)
    if len(asked) > 2 or asked[0] > asked[-1]:
        raise ValueError(f"{name}={' '.join(map(str, asked))}: one value, or the lower and the upper end, are needed")
    low, high = asked[0], asked[-1]
    for value in given:
        if not low <= value <= high:
            shown = [f"1/{end}" if ratio else f"{end:,}" for end in (value, low, high)]
            raise ValueError(
                f"{name}: the given setting, which is tried first, has {shown[0]}, outside {span(*shown[1:])}: give "
                f"another with --{'select_topk' if name == 'topk' else 'pool_ratios'}, or a wider range"
            )
    return low, high


def candidates_of(
    name: str, asked: Sequence[Number] | None, default: Sequence[Number], given: Number
) -> tuple[Number, ...]:
    """The candidates asked for, or the default ones and what is given, smallest first."""
    if asked is not None and given not in asked:
        raise ValueError(
            f"{name}s: the given setting, which is tried first, has {given:g}, which is not among "
            f"{' '.join(f'{value:g}' for value in asked)}: give another with --{name}, or add it"
        )
    return tuple(sorted({given}.union(default if asked is None else asked)))


def factors(ratios: Sequence) -> tuple[int, int]:
    """Ratios from a level to the next as whole factors, smallest first."""
    values = sorted((number("level_ratio", ratio) for ratio in ratios), reverse=True)
    if not all(isinstance(ratio, float) and 0 < ratio <= 0.5 for ratio in values):
        raise ValueError(f"level_ratio={' '.join(map(str, ratios))}: ratios above 0 and up to 1/2 are needed")
    return math.ceil(1 / values[0] - 1e-6), math.floor(1 / values[-1] + 1e-6)


def parents(
    tuning: TuneOptions, method: Method, context: int, searched: bool
) -> tuple[tuple[bool, ...], tuple[int, int], str | None]:
    """Whether the local window is alone in no setting, in some or in all; the range of parents; and what to say of it.

    A 0 before a range of parents, or a given setting without any, adds the local window alone.
    """
    given = method.parents(context)
    with_pyramid = [given] if method.chooses else []
    scale = min(1.0, context / LONG)
    default = tuple(max(1, round(scale * k)) for k in TOPK)
    if not searched:
        return (not method.chooses,), range_of("topk", None, default, with_pyramid), None
    if tuning.topk is None:
        note = None
        if scale < 1:
            note = (
                f"topk is {default[0]:,} to {default[1]:,} parents per level: below {LONG:,} tokens the range is the "
                f"same shares of the tokens as {TOPK[0]:,} to {TOPK[1]:,} at {LONG:,} tokens."
            )
        alone = (False,) if method.chooses else (False, True)
        return alone, range_of("topk", None, default, with_pyramid), note
    asked = [parents_per_level(context, check_select_topk(number("topk", end))) for end in tuning.topk]
    if asked == [0] or (given == 0 and asked[0]):
        return (True,), range_of("topk", asked, default, [given]), None
    alone = (False, True) if asked[0] == 0 else (False,)
    return alone, range_of("topk", asked[1:] if asked[0] == 0 else asked, default, with_pyramid), None


def windows(tuning: TuneOptions, method: Method, context: int, alone: tuple[bool, ...]) -> tuple[int, ...]:
    """The local windows to try: a window that is alone is one."""
    if tuning.local_windows is not None and 0 in tuning.local_windows and False not in alone:
        raise ValueError(
            "local_windows=0: select_topk=0 chooses nothing, so a window above 0 is needed; leave out the 0"
        )
    shorter = [window for window in WINDOWS if window < context]
    found = candidates_of("local_window", tuning.local_windows, shorter, method.local_window)
    return tuple(window for window in found if window or False in alone)


def shares(options: PretrainOptions, training: TrainingOptions, tuning: TuneOptions) -> tuple[tuple[float, ...], str]:
    """The shares to try, and what to say of those that leave too few dense steps: a trial is judged after them."""

    def too_few(share: float) -> str | None:
        if tuning.seconds is not None:
            return None  # how many steps fit into them is known once steps were timed
        return too_few_of(replace(options, share=share), training, training.max_steps)

    found = candidates_of("share", tuning.shares, SHARES, options.share)
    left_out = {share: why for share in found if share != options.share and (why := too_few(share)) is not None}
    if not left_out:
        return found, ""
    first, why = next(iter(left_out.items()))
    if tuning.shares is not None:
        raise ValueError(f"shares={first:g}: {why}; use more --max_steps, or leave it out")
    shown = " ".join(f"{share:g}" for share in left_out)
    return tuple(share for share in found if share not in left_out), f"Not tried of share: {shown}, since {why}."


def batches(training: TrainingOptions, tuning: TuneOptions, searched: bool) -> tuple[str, tuple[int, int], str | None]:
    """The option that is the batch, its range, and if the batch is not searched, why."""
    up_to = BATCH_UP_TO if tuning.batch_up_to is None else tuning.batch_up_to
    options = {name: getattr(training, name) for name in (ROWS, ACCUMULATION)}
    for name, value in options.items():
        most = math.floor(value * (1 + up_to) + 1e-9)
        if searched and most > value:
            return name, (value, most), None
    note = None
    if searched:
        note = (
            f"The batch is not searched: no whole number is within {up_to:.0%} above {ROWS}={options[ROWS]} or "
            f"{ACCUMULATION}={options[ACCUMULATION]}."
        )
    return ROWS, (options[ROWS], options[ROWS]), note


def spread(low: int, high: int, values: int, log: bool = False) -> list[int]:
    """At most `values` whole numbers from `low` to `high`, both among them, evenly or by equal factors."""
    if values == 1 or low == high:
        return [low]
    parts = [i / (values - 1) for i in range(values)]
    found = {round(low * (high / low) ** part) if log else round(low + (high - low) * part) for part in parts}
    return sorted(found)


def span(low, high) -> str:
    return f"{low}" if low == high else f"{low} to {high}"


def listed(values: Sequence[str]) -> str:
    """`a, b or c`."""
    return values[0] if len(values) == 1 else f"{', '.join(values[:-1])} or {values[-1]}"
