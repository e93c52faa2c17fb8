"""Which settings a study tries: the ranges around the given one, which are worth training, and their grid.

pool_ratios is searched as the number of levels and, for each level above the tokens, how many entries of the one below
it pools: a ratio of 1/4 is the factor 4. select_topk is searched as a number of parents, on a logarithmic scale, or not
at all where the local window is alone. local_window and share have candidates.

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
from dataclasses import dataclass, field, fields, replace
from typing import Any

from optuna import Trial

from lighthouse.core.method import DEFAULT, MAX_LEVELS, MAX_WINDOW, Method
from lighthouse.core.settings import MAX_SHARE, LighthouseSettings
from lighthouse.studies import ranges
from lighthouse.studies.ranges import range_of, span, spread
from lighthouse.studies.tune_options import RANGES, TuneOptions
from lighthouse.training.model import check_model
from lighthouse.training.options import PretrainOptions, TrainingOptions

LEVELS = (2, 5)  # the tokens are one
LEVEL_RATIO = (1 / 10, 1 / 2)
RATE_WITHIN = 0.1
LOOKED_AT = 100_000  # settings, in seconds: of wider ranges the trials themselves show whether any is worth training


@dataclass(frozen=True)
class Setting:
    """One point of the search. `batch` is of `Space.batch_option`; `share` is None where a step or tokens switch."""

    method: Method
    share: float | None
    learning_rate: float
    batch: int

    def __str__(self) -> str:
        texts, usual = self.method.texts(), DEFAULT.texts()
        ratios, parents = texts.pop("pool_ratios"), texts.pop("select_topk")
        chosen = [ratios, f"k {parents}"] if self.method.chooses else ["window alone"]
        others = [f"{name} {text}" for name, text in texts.items() if name in RANGES or text != usual[name]]
        others += [] if self.share is None else [f"share {self.share:g}"]
        return "  ".join([*chosen, *others, f"rate {self.learning_rate:.3g}", f"batch {self.batch}"])


@dataclass(frozen=True)
class Space:
    """The ranges, both ends included, and the candidates. `notes` explain what a user may not expect.

    `alone` says whether the local window is alone in no setting, in some or in all; `dense_layers` is None where each
    setting has as many as the rule of its own local window says.
    """

    context: int
    device_type: str
    given: Setting
    batch_option: str
    model_layers: int
    dense_layers: int | None
    searched: tuple[str, ...]
    levels: tuple[int, int]
    factors: tuple[int, int]
    alone: tuple[bool, ...]
    topk: tuple[int, int]
    windows: tuple[int, ...]
    shares: tuple[float, ...]
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
        if not factors and method.chooses and "pool_ratios" not in searched:
            raise ValueError("pool_ratios is empty and fixed: that is dense attention, nothing to tune")

        notes = []
        batch_option, batches, note = ranges.batches(training, tuning, "batch" in searched)
        if note:
            searched.remove("batch")
            notes.append(note)
        alone, topk, note = ranges.parents(tuning, method, context, "select_topk" in searched)
        if note:
            notes.append(note)
        if alone == (True,):
            if "pool_ratios" in searched:
                notes.append("pool_ratios is not searched: select_topk is 0, so nothing is chosen.")
            searched = [name for name in searched if name not in ("pool_ratios", "select_topk")]
        windows: tuple[int, ...] = (method.local_window,)
        if "local_window" in searched:
            windows = ranges.windows(tuning, method, context, alone)
        if True in alone and not any(windows):
            raise ValueError(
                "topk=0 is the local window alone, and local_window is 0 in all settings: search local_window too, or "
                "leave out the 0"
            )
        share = None if options.switch.share is None else options.share
        shares: tuple[float, ...] = ()
        if share is None and "share" in searched:
            if tuning.shares is not None:
                raise ValueError("shares with switch_step or switch_tokens: only one of them can say when to switch")
            searched.remove("share")
            notes.append("share is not searched: a step or a number of tokens says when Lighthouse ends.")
        if "share" in searched:
            shares, note = ranges.shares(options, training, tuning)
            notes += [note] if note else []
        model_layers = check_model(options.model, context)
        by_rule = LighthouseSettings(method).for_layers(model_layers).dense_layers
        asked_factors = None if tuning.level_ratio is None else ranges.factors(tuning.level_ratio)
        within = RATE_WITHIN if tuning.rate_within is None else tuning.rate_within
        rate = training.learning_rate
        space = cls(
            context=context,
            device_type=training.device.type,
            given=Setting(method, share, rate, getattr(training, batch_option)),
            batch_option=batch_option,
            model_layers=model_layers,
            dense_layers=None if options.dense_layers == by_rule else options.dense_layers,
            searched=tuple(searched),
            levels=range_of("levels", tuning.levels, LEVELS, [len(method.windows)] if method.chooses else []),
            factors=range_of(
                "level_ratio",
                asked_factors,
                ranges.factors(LEVEL_RATIO),
                factors if method.chooses else [],
                ratio=True,
            ),
            alone=alone,
            topk=topk,
            windows=windows,
            shares=shares,
            rates=(rate * (1 - within), rate * (1 + within)),
            batches=batches,
            notes=notes,
        )
        if not 2 <= space.levels[0] <= space.levels[1] <= MAX_LEVELS:
            raise ValueError(f"levels={list(space.levels)}: 2 to {MAX_LEVELS} levels, including the tokens, are needed")
        if all(len(set(values)) == 1 for values in space._values().values()):
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
            levels, ratios = span(*self.levels), span(*(f"1/{factor}" for factor in self.factors))
            lines.append(f"pool_ratios    {levels} levels, from each to the next {ratios}")
        if "select_topk" in self.searched:
            alone = "0, the local window alone, or " if True in self.alone else ""
            lines.append(f"select_topk    {alone}{span(*(f'{k:,}' for k in self.topk))} parents per level")
        if "local_window" in self.searched:
            lines.append(
                f"local_window   {ranges.listed([f'{w:,}' for w in self.windows])} tokens{self._dense_shown()}"
            )
        if "share" in self.searched:
            lines.append(f"share          {ranges.listed([f'{share:g}' for share in self.shares])} of the steps")
        if "learning_rate" in self.searched:
            lines.append(f"learning_rate  {span(*(f'{rate:.4g}' for rate in self.rates))}")
        if "batch" in self.searched:
            lines.append(f"batch          {self.batch_option} {span(*self.batches)}")
        return "\n".join([*lines, *self.notes])

    def _dense_shown(self) -> str:
        """How the settings without a local window differ from the others in their dense layers."""
        if self.windows[0] or self.dense_layers is not None or not any(self.windows):
            return ""
        dense = self._dense_layers(replace(self.given.method, local_window=0, select_topk=1))
        return f", 0 with {dense} of the {self.model_layers} layers dense at each end" if dense else ""

    def suggest(self, trial: Trial) -> Setting:
        """The setting that an Optuna trial proposes."""
        given = self.given
        window, share, rate, batch = given.method.local_window, given.share, given.learning_rate, given.batch
        if "local_window" in self.searched:
            window = trial.suggest_categorical("local_window", self.windows)
        alone = self.alone[0]
        if len(self.alone) > 1 and window:  # without a window there must be a pyramid
            alone = trial.suggest_categorical("window_alone", self.alone)
        factors, parents = factors_of(given.method), 0 if alone else given.method.parents(self.context)
        if "pool_ratios" in self.searched and not alone:
            levels = trial.suggest_int("levels", *self.levels)
            factors = [trial.suggest_int(f"factor_{level}", *self.factors) for level in range(1, levels)]
        if "select_topk" in self.searched and not alone:
            parents = trial.suggest_int("select_topk", *self.topk, log=True)
        if "share" in self.searched:
            share = trial.suggest_categorical("share", self.shares)
        if "learning_rate" in self.searched:
            rate = trial.suggest_float("learning_rate", *self.rates)
        if "batch" in self.searched:
            batch = trial.suggest_int("batch", *self.batches)
        return Setting(self._method(window, factors, parents), share, rate, batch)

    def _method(self, window: int, factors: Sequence[int], parents: int) -> Method:
        """With levels that each pool this many entries of the one below; the given setting keeps its own notation."""
        given = self.given.method
        ratios = given.pool_ratios
        if list(factors) != factors_of(given):
            # No `Method` takes larger ones, nor has any text room for them.
            windows = (size for size in itertools.accumulate(factors, operator.mul) if size <= MAX_WINDOW)
            ratios = tuple(1 / size for size in windows)
        topk = given.select_topk if parents == given.parents(self.context) else parents
        return replace(given, pool_ratios=ratios, select_topk=topk, local_window=window)

    def parameters(self, setting: Setting) -> dict[str, Any]:
        """The parameters with which `suggest` proposes this setting."""
        method, found = setting.method, {}
        factors = factors_of(method)
        all_of_them = {
            "local_window": {"local_window": method.local_window},
            "pool_ratios": {"levels": len(factors) + 1}
            | {f"factor_{level}": factor for level, factor in enumerate(factors, 1)},
            "select_topk": {"select_topk": method.parents(self.context)},
            "share": {"share": setting.share},
            "learning_rate": {"learning_rate": setting.learning_rate},
            "batch": {"batch": setting.batch},
        }
        if len(self.alone) > 1 and method.local_window:
            found["window_alone"] = not method.chooses
        for part in self.searched:
            if method.chooses or part not in ("pool_ratios", "select_topk"):
                found |= all_of_them[part]
        return found

    def values(self, setting: Setting) -> dict[str, Any]:
        """The setting as options by name, as `with_values` and JSON take them."""
        found = setting.method.written() | {"dense_layers": self._dense_layers(setting.method)}
        found |= {} if setting.share is None else {"share": setting.share}
        return found | {"learning_rate": setting.learning_rate, self.batch_option: setting.batch}

    def _dense_layers(self, method: Method) -> int:
        settings = LighthouseSettings(method, self.dense_layers).for_layers(self.model_layers)
        assert settings.dense_layers is not None  # a number now
        return settings.dense_layers

    def label(self, parameter: str) -> str:
        """A parameter's name for people."""
        if parameter.startswith("factor_"):
            level = int(parameter.removeprefix("factor_"))
            return f"pool_ratios: level {level - 1} to {level}"
        names = {"levels": "pool_ratios: levels", "window_alone": "window alone", "batch": self.batch_option}
        return names.get(parameter, parameter)

    def grid(self, values: int, seed: int) -> list[Setting]:
        """The given setting, then all combinations of `values` of each range, in an order that `seed` decides.

        Every number of levels and every candidate is tried, and the ratio from each level to the next is the same
        within a setting.
        """
        given = self.given.method
        every, topk = [factors_of(given)], [given.parents(self.context)]
        rates, batches = [self.given.learning_rate], [self.given.batch]
        if "pool_ratios" in self.searched:
            every = [
                [factor] * (levels - 1)
                for levels in range(self.levels[0], self.levels[1] + 1)
                for factor in spread(*self.factors, values, log=True)
            ]
        if "select_topk" in self.searched:
            topk = spread(*self.topk, values, log=True)
        methods = [
            self._method(window, factors, parents)
            for window in self.windows
            for factors, parents in itertools.product(every, topk)
            if False in self.alone
        ]
        methods += [
            self._method(window, factors_of(given), 0) for window in self.windows if window and True in self.alone
        ]
        if "learning_rate" in self.searched:
            low, high = self.rates
            between = [low + (high - low) * i / (values - 1) for i in range(values)] if values > 1 else rates
            # The given one, rounded differently, would be another setting.
            rates = [rates[0] if math.isclose(rate, rates[0]) else rate for rate in between]
        if "batch" in self.searched:
            batches = spread(*self.batches, values)
        points = [
            Setting(*point) for point in itertools.product(methods, self.shares or [self.given.share], rates, batches)
        ]
        random.Random(seed).shuffle(points)
        first = self.parameters(self.given)
        return [self.given, *(point for point in points if self.parameters(point) != first)]

    def pointless(self, setting: Setting) -> str | None:
        """Why the plan shows that training this setting is pointless; None if it does not.

        Dense attention, or about as slow; or more parents than there are entries, which is a smaller select_topk.
        """
        its = setting.method.plan(self.context)
        coarsest = its.entries[-1]
        if its.local_window >= its.tokens:
            return f"dense attention: local_window={its.local_window:,} covers all {its.tokens:,} tokens"
        if not setting.method.chooses:
            return None
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
            f"context={self.context}: no setting is worth training, of {tried} checked over the ranges; for example "
            f"{first}: {why}. Use a longer --context, a smaller --topk, shorter --local_windows, or other --levels and "
            "--level_ratio"
        )

    def _corners(self) -> Iterator[Setting]:
        """Every combination of levels and ratios that the context has room for, with few and many parents."""
        given = self.given.method
        if True in self.alone:
            shortest = min(window for window in self.windows if window)
            yield replace(self.given, method=self._method(shortest, factors_of(given), 0))
        if False not in self.alone:
            return
        every: Iterable[Sequence[int]] = [factors_of(given)]
        if "pool_ratios" in self.searched:
            low, high = self.factors
            larger = (
                factors
                for levels in range(self.levels[0], self.levels[1] + 1)
                for factors in itertools.product(range(low, high + 1), repeat=levels - 1)
                if math.prod(factors) <= self.context
            )
            every = itertools.chain([[low] * (self.levels[0] - 1)], larger)
        topk = spread(*self.topk, 3, log=True) if "select_topk" in self.searched else [given.parents(self.context)]
        for factors in every:  # one at a time: wide ranges have millions
            for parents in topk:
                yield replace(self.given, method=self._method(self.windows[0], factors, parents))

    def _values(self) -> dict[str, tuple]:
        """The ends of the searched ranges, and the candidates."""
        found = {
            "local_window": self.windows,
            "select_topk": self.topk + (0,) * (len(self.alone) - 1),
            "share": self.shares,
            "learning_rate": self.rates,
            "batch": self.batches,
        }
        found = {name: values for name, values in found.items() if name in self.searched}
        return found | ({"levels": self.levels, "factors": self.factors} if "pool_ratios" in self.searched else {})


def factors_of(method: Method) -> list[int]:
    """How many entries of the level below each level pools."""
    return [coarser // finer for finer, coarser in itertools.pairwise(method.windows)]


def with_values(
    options: PretrainOptions, training: TrainingOptions, values: Mapping[str, Any]
) -> tuple[PretrainOptions, TrainingOptions]:
    """Copies of a run's options with a setting's values (`Space.values`) in their place."""
    method, training = Method.of(values).values(), copy.deepcopy(training)
    of_the_run = {option.name for option in fields(options)} & values.keys() - method.keys()
    for name in values.keys() - method.keys() - of_the_run:
        setattr(training, name, values[name])
    return replace(options, **method, **{name: values[name] for name in of_the_run}), training
