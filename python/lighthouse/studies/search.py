"""Which settings a study tries: the ranges around the given one, which are worth training, and their grid.

pool_ratios is searched as the number of levels and, for each level above the tokens, how many entries of the one below
it pools: a ratio of 1/4 is the factor 4. select_topk is searched as a number of parents, on a logarithmic scale.

At short contexts 512 to 4,096 parents, meant for 98,304 tokens, would be all entries. So below that length the default
range keeps its share of the tokens, and settings that the plan shows to be dense attention by another name are never
trained.
"""

from __future__ import annotations

import copy
import itertools
import math
import operator
import random
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from optuna import Trial

from lighthouse.core.method import DEFAULT, MAX_LEVELS, MAX_WINDOW, Method, number
from lighthouse.core.settings import LONG, MAX_SHARE, LighthouseSettings
from lighthouse.studies.tune_options import RANGES, TuneOptions
from lighthouse.training.options import PretrainOptions, TrainingOptions

LEVELS = (2, 5)  # the tokens are one
LEVEL_RATIO = (1 / 10, 1 / 2)
TOPK = (512, 4096)  # of `LONG` tokens or more
RATE_WITHIN = 0.1
BATCH_UP_TO = 0.4
LOOKED_AT = 100_000  # settings, in seconds: of wider ranges the trials themselves show whether any is worth training

ROWS, ACCUMULATION = "per_device_train_batch_size", "gradient_accumulation_steps"


@dataclass(frozen=True)
class Setting:
    """One point of the search. `batch` is of `Space.batch_option`."""

    method: Method
    learning_rate: float
    batch: int

    def __str__(self) -> str:
        texts, usual = self.method.texts(), DEFAULT.texts()
        ratios, parents = texts.pop("pool_ratios"), texts.pop("select_topk")
        others = [f"{name} {text}" for name, text in texts.items() if text != usual[name]]
        return "  ".join([ratios, f"k {parents}", *others, f"rate {self.learning_rate:.3g}", f"batch {self.batch}"])


@dataclass(frozen=True)
class Space:
    """The ranges, both ends included. `notes` explain ranges that a user may not expect."""

    context: int
    device_type: str
    given: Setting
    batch_option: str
    searched: tuple[str, ...]
    levels: tuple[int, int]
    factors: tuple[int, int]
    topk: tuple[int, int]
    rates: tuple[float, float]
    batches: tuple[int, int]
    notes: list[str] = field(default_factory=list)

    @classmethod
    def of(cls, options: PretrainOptions, training: TrainingOptions, tuning: TuneOptions) -> Space:
        """Around the given options, as `TuneOptions` says. Raises `ValueError` where nothing is left to search."""
        method, context = options.method, options.context
        factors = factors_of(method)
        searched = [name for name in RANGES if name not in tuning.fixed]
        for name in tuning.fixed:
            for option in RANGES[name]:
                if getattr(tuning, option) is not None:
                    raise ValueError(f"{option} is a range of {name}, which is among fixed: only one of them can hold")
        if not factors and "pool_ratios" not in searched:
            raise ValueError("pool_ratios is empty and fixed: that is dense attention, nothing to tune")

        notes = []
        batch_option, batches, note = _batches(training, tuning, "batch" in searched)
        if note:
            searched.remove("batch")
            notes.append(note)
        scale = min(1.0, context / LONG)
        default_topk = tuple(max(1, round(scale * k)) for k in TOPK)
        if scale < 1 and tuning.topk is None and "select_topk" in searched:
            notes.append(
                f"topk is {default_topk[0]:,} to {default_topk[1]:,} parents per level: below {LONG:,} tokens the "
                f"range is the same shares of the tokens as {TOPK[0]:,} to {TOPK[1]:,} at {LONG:,} tokens."
            )
        asked_topk = tuning.topk and [
            replace(method, select_topk=number("topk", end)).parents(context) for end in tuning.topk
        ]
        asked_factors = None if tuning.level_ratio is None else _factors(tuning.level_ratio)
        within = RATE_WITHIN if tuning.rate_within is None else tuning.rate_within
        rate = training.learning_rate
        space = cls(
            context=context,
            device_type=training.device.type,
            given=Setting(method, rate, getattr(training, batch_option)),
            batch_option=batch_option,
            searched=tuple(searched),
            levels=_range("levels", tuning.levels, LEVELS, [len(method.windows)]),
            factors=_range("level_ratio", asked_factors, _factors(LEVEL_RATIO), factors, ratio=True),
            topk=_range("topk", asked_topk, default_topk, [method.parents(context)]),
            rates=(rate * (1 - within), rate * (1 + within)),
            batches=batches,
            notes=notes,
        )
        if not 2 <= space.levels[0] <= space.levels[1] <= MAX_LEVELS:
            raise ValueError(f"levels={list(space.levels)}: 2 to {MAX_LEVELS} levels, including the tokens, are needed")
        if not searched or all(low == high for low, high in space._ends().values()):
            raise ValueError(
                f"fixed={' '.join(tuning.fixed) or 'nothing'}: nothing is left to search"
                + (f" ({' '.join(notes)})" if notes else "")
                + "; remove one of "
                + ", ".join(RANGES)
                + " from fixed, or give a range of more than one value"
            )
        space.check_sensible()
        return space

    def __str__(self) -> str:
        lines = []
        if "pool_ratios" in self.searched:
            levels, ratios = _span(*self.levels), _span(*(f"1/{factor}" for factor in self.factors))
            lines.append(f"pool_ratios    {levels} levels, from each to the next {ratios}")
        if "select_topk" in self.searched:
            lines.append(f"select_topk    {_span(*(f'{k:,}' for k in self.topk))} parents per level")
        if "learning_rate" in self.searched:
            lines.append(f"learning_rate  {_span(*(f'{rate:.4g}' for rate in self.rates))}")
        if "batch" in self.searched:
            lines.append(f"batch          {self.batch_option} {_span(*self.batches)}")
        return "\n".join([*lines, *self.notes])

    def suggest(self, trial: Trial) -> Setting:
        """The setting that an Optuna trial proposes."""
        method, rate, batch = self.given.method, self.given.learning_rate, self.given.batch
        if "pool_ratios" in self.searched:
            levels = trial.suggest_int("levels", *self.levels)
            factors = [trial.suggest_int(f"factor_{level}", *self.factors) for level in range(1, levels)]
            method = self._pooled(method, factors)
        if "select_topk" in self.searched:
            method = self._choosing(method, trial.suggest_int("select_topk", *self.topk, log=True))
        if "learning_rate" in self.searched:
            rate = trial.suggest_float("learning_rate", *self.rates)
        if "batch" in self.searched:
            batch = trial.suggest_int("batch", *self.batches)
        return Setting(method, rate, batch)

    def _pooled(self, method: Method, factors: Sequence[int]) -> Method:
        """With levels that each pool this many entries of the one below; the given setting keeps its own notation."""
        if list(factors) == factors_of(self.given.method):
            return replace(method, pool_ratios=self.given.method.pool_ratios)
        # No `Method` takes larger ones, nor has any text room for them.
        windows = (window for window in itertools.accumulate(factors, operator.mul) if window <= MAX_WINDOW)
        return replace(method, pool_ratios=tuple(1 / window for window in windows))

    def _choosing(self, method: Method, parents: int) -> Method:
        """With this many parents per level; the given setting keeps its own notation."""
        given = self.given.method
        return replace(method, select_topk=given.select_topk if parents == given.parents(self.context) else parents)

    def parameters(self, setting: Setting) -> dict[str, Any]:
        """The parameters with which `suggest` proposes this setting."""
        factors = factors_of(setting.method)
        all_of_them = {
            "pool_ratios": {"levels": len(factors) + 1}
            | {f"factor_{level}": factor for level, factor in enumerate(factors, 1)},
            "select_topk": {"select_topk": setting.method.parents(self.context)},
            "learning_rate": {"learning_rate": setting.learning_rate},
            "batch": {"batch": setting.batch},
        }
        return {name: value for part in self.searched for name, value in all_of_them[part].items()}

    def values(self, setting: Setting) -> dict[str, Any]:
        """The setting as options by name, as `with_values` and JSON take them."""
        return setting.method.written() | {"learning_rate": setting.learning_rate, self.batch_option: setting.batch}

    def label(self, parameter: str) -> str:
        """A parameter's name for people."""
        if parameter.startswith("factor_"):
            level = int(parameter.removeprefix("factor_"))
            return f"pool_ratios: level {level - 1} to {level}"
        return {"levels": "pool_ratios: levels", "batch": self.batch_option}.get(parameter, parameter)

    def grid(self, values: int, seed: int) -> list[Setting]:
        """The given setting, then all combinations of `values` of each range, in an order that `seed` decides.

        Every number of levels is tried, and the ratio from each level to the next is the same within a setting.
        """
        methods, rates, batches = [self.given.method], [self.given.learning_rate], [self.given.batch]
        if "pool_ratios" in self.searched:
            methods = [
                self._pooled(self.given.method, [factor] * (levels - 1))
                for levels in range(self.levels[0], self.levels[1] + 1)
                for factor in _spread(*self.factors, values, log=True)
            ]
        if "select_topk" in self.searched:
            topk = _spread(*self.topk, values, log=True)
            methods = [self._choosing(method, parents) for method in methods for parents in topk]
        if "learning_rate" in self.searched:
            low, high = self.rates
            between = [low + (high - low) * i / (values - 1) for i in range(values)] if values > 1 else rates
            # The given one, rounded differently, would be another setting.
            rates = [rates[0] if math.isclose(rate, rates[0]) else rate for rate in between]
        if "batch" in self.searched:
            batches = _spread(*self.batches, values)
        points = [Setting(*point) for point in itertools.product(methods, rates, batches)]
        random.Random(seed).shuffle(points)
        first = self.parameters(self.given)
        return [self.given, *(point for point in points if self.parameters(point) != first)]

    def pointless(self, setting: Setting) -> str | None:
        """Why the plan shows that training this setting is pointless; None if it does not.

        Dense attention, or about as slow; or more parents than there are entries, which is a smaller select_topk.
        """
        its = setting.method.plan(self.context)
        coarsest = its.entries[-1]
        if not setting.method.pool_ratios:
            return "dense attention: pool_ratios is empty"
        if not coarsest:
            return f"dense attention: the coarsest window, {its.windows[-1]:,} tokens, is longer than the context"
        if its.parents > coarsest:
            asked = f"{its.parents:,} parents per level were asked for"
            return f"{asked}, but the coarsest level has only {coarsest:,} entries"
        if its.length > MAX_SHARE * its.tokens:
            return f"dense attention is as fast: the sub-sequence has {its.length / its.tokens:.0%} of the tokens"
        return None

    def check_sensible(self) -> None:
        """Raises `ValueError`, with the way out, where no setting of the space is worth training."""
        least = LighthouseSettings().least_tokens(self.device_type)
        if self.context < least:
            raise ValueError(
                f"context={self.context}: below {least:,} tokens dense attention is as fast on {self.device_type}, "
                "so there is nothing to tune: use a longer --context"
            )
        tried, first, why = 0, None, None
        for setting in self._corners():
            reason = self.pointless(setting)
            if reason is None or tried == LOOKED_AT:
                return
            tried += 1
            first, why = first or setting, why or reason
        raise ValueError(
            f"topk={self.topk[0]} to {self.topk[1]}: no setting is worth training at context={self.context}, of {tried}"
            f" checked over the ranges; for example {first}: {why}. Use a longer --context, a smaller --topk, or "
            "other --levels and --level_ratio"
        )

    def _corners(self) -> Iterator[Setting]:
        """Every combination of levels and ratios that the context has room for, with few and many parents."""
        every: Iterable[Sequence[int]] = [factors_of(self.given.method)]
        if "pool_ratios" in self.searched:
            low, high = self.factors
            larger = (
                factors
                for levels in range(self.levels[0], self.levels[1] + 1)
                for factors in itertools.product(range(low, high + 1), repeat=levels - 1)
                if math.prod(factors) <= self.context
            )
            every = itertools.chain([[low] * (self.levels[0] - 1)], larger)
        searched = "select_topk" in self.searched
        topk = _spread(*self.topk, 3, log=True) if searched else [self.given.method.parents(self.context)]
        for factors in every:  # one at a time: wide ranges have millions
            pooled = self._pooled(self.given.method, factors)
            for parents in topk:
                yield replace(self.given, method=self._choosing(pooled, parents))

    def _ends(self) -> dict[str, tuple]:
        """The ends of the searched ranges."""
        ends = {
            "levels": self.levels,
            "factors": self.factors,
            "select_topk": self.topk,
            "learning_rate": self.rates,
            "batch": self.batches,
        }
        if "pool_ratios" not in self.searched:
            del ends["levels"], ends["factors"]
        return {name: end for name, end in ends.items() if name in ("levels", "factors") or name in self.searched}


def factors_of(method: Method) -> list[int]:
    """How many entries of the level below each level pools."""
    return [coarser // finer for finer, coarser in itertools.pairwise(method.windows)]


def with_values(
    options: PretrainOptions, training: TrainingOptions, values: Mapping[str, Any]
) -> tuple[PretrainOptions, TrainingOptions]:
    """Copies of a run's options with a setting's values (`Space.values`) in their place."""
    method, training = Method.of(values), copy.deepcopy(training)
    for name in values.keys() - method.values().keys():
        setattr(training, name, values[name])
    return replace(options, **method.values()), training


def _batches(training: TrainingOptions, tuning: TuneOptions, searched: bool) -> tuple[str, tuple[int, int], str | None]:
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


def _factors(ratios: Sequence) -> tuple[int, int]:
    """Ratios from a level to the next as whole factors, smallest first."""
    values = sorted((number("level_ratio", ratio) for ratio in ratios), reverse=True)
    if not all(isinstance(ratio, float) and 0 < ratio <= 0.5 for ratio in values):
        raise ValueError(f"level_ratio={' '.join(map(str, ratios))}: ratios above 0 and up to 1/2 are needed")
    return math.ceil(1 / values[0] - 1e-6), math.floor(1 / values[-1] + 1e-6)


def _range(name: str, asked: Sequence | None, default: Sequence, given: Sequence, ratio: bool = False) -> tuple:
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
                f"{name}: the given setting, which is tried first, has {shown[0]}, outside {_span(*shown[1:])}: give "
                f"another with --{'select_topk' if name == 'topk' else 'pool_ratios'}, or a wider range"
            )
    return low, high


def _spread(low: int, high: int, values: int, log: bool = False) -> list[int]:
    """At most `values` whole numbers from `low` to `high`, both among them, evenly or by equal factors."""
    if values == 1 or low == high:
        return [low]
    parts = [i / (values - 1) for i in range(values)]
    found = {round(low * (high / low) ** part) if log else round(low + (high - low) * part) for part in parts}
    return sorted(found)


def _span(low, high) -> str:
    return f"{low}" if low == high else f"{low} to {high}"
