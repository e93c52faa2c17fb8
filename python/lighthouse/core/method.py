"""The method's settings, described, checked, read and printed only here (METHOD 1, 3 and 5a).

A field of `Method` is a setting, and a new one is one line there: commands, files, checkpoints, reports and cards take
fields, texts and numbers from here.

A message is formatted where it is raised: under `torch.compile(dynamic=True)` the numbers are symbolic, and formatting
one breaks the graph.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping, Sequence
from dataclasses import Field, dataclass, field, fields, replace
from fractions import Fraction
from numbers import Integral, Real
from typing import Any

import torch

from lighthouse.core.plan import Plan, parents_per_level, plan_of, sub_length

POOL_RATIOS = (1 / 4, 1 / 16)
SELECT_TOPK = 1 / 64

MAX_LEVELS = 8  # a level is one bit of a token's mask byte
MAX_DENOMINATOR = 65_536
MAX_PARENTS = 2**40
MAX_WINDOW = 2**40
MAX_LOCAL_WINDOW = 2**31
RATIO_TOLERANCE = 1e-3

SWITCHES = {"true": True, "yes": True, "on": True, "false": False, "no": False, "off": False}


def check_cover_start(cover_start: bool) -> None:
    """Raises TypeError."""
    if not isinstance(cover_start, bool):  # bool("False") is True
        raise TypeError(f"cover_start={cover_start!r}: True or False is needed")


def check_local_window(local_window: int) -> None:
    """Raises ValueError or TypeError."""
    if isinstance(local_window, bool) or not isinstance(local_window, Integral):
        raise TypeError(f"local_window={local_window!r}: a whole number of tokens is needed, 0 for none")
    if not 0 <= local_window <= MAX_LOCAL_WINDOW:
        raise ValueError(f"local_window={local_window}: 0 (none) to 2^31 tokens are needed")


def check_pool_ratios(pool_ratios: Sequence[float]) -> tuple[int, ...]:
    """The windows in tokens, finest first, that the ratios stand for: `[0.5, 0.25]` is `(1, 2, 4)`.

    Raises ValueError naming the ratio and the rule: one over a whole number (within 1e-3), each smaller than the one
    before and dividing it, at most seven.
    """
    if isinstance(pool_ratios, (str, bytes)) or not isinstance(pool_ratios, Sequence):
        raise TypeError(f"pool_ratios={pool_ratios!r}: a sequence of ratios is needed, for example (1/4, 1/16)")
    if len(pool_ratios) >= MAX_LEVELS:
        raise ValueError(f"pool_ratios has {len(pool_ratios)} ratios: at most {MAX_LEVELS - 1}")
    windows = [1]
    for i, ratio in enumerate(pool_ratios):
        if isinstance(ratio, bool) or not isinstance(ratio, Real):
            raise TypeError(f"pool_ratios[{i}]={ratio!r}: a number is needed")
        if not 0 < ratio < 1:  # NaN fails too
            raise ValueError(f"pool_ratios[{i}]={ratio!r}: a ratio must be above 0 and below 1")
        if ratio < 1 / MAX_WINDOW:
            raise ValueError(f"pool_ratios[{i}]={ratio!r}: at least 2^-40 is needed")
        numerator, denominator = float(ratio).as_integer_ratio()  # a symbolic ratio becomes constant here
        inverse = denominator / numerator
        window = max(2, round(inverse))
        if abs(inverse - window) > RATIO_TOLERANCE * window:
            raise ValueError(
                f"pool_ratios[{i}]={ratio!r}: one over a whole number of tokens is needed; "
                f"nearest: {_nearest(inverse, windows[-1])}"
            )
        finer = windows[-1]
        if window <= finer:
            raise ValueError(f"pool_ratios[{i}]={ratio!r}: ratios must decrease, and the one before is 1/{finer}")
        if window % finer:
            raise ValueError(
                f"pool_ratios[{i}]={ratio!r}: a window of {window} tokens is not a multiple of the one before, {finer};"
                f" nearest: {_nearest(inverse, finer)}"
            )
        windows.append(window)
    return tuple(windows)


def _nearest(inverse: float, finer: int) -> str:
    """The ratios next to `1 / inverse` that may follow a window of `finer` tokens."""
    below = max(2, math.floor(inverse / finer)) * finer
    return f"1/{below}, 1/{below + finer}" if below < inverse else f"1/{below}"


def check_select_topk(select_topk: int | float) -> tuple[int, int]:
    """Parents per level as (numerator, denominator): a share of the tokens, or the number itself over 0.

    A float is a share, above 0 and at most 1, taken as the nearest fraction with a denominator of at most 65,536; an
    int is the number, and 0 chooses nothing. Raises ValueError or TypeError.
    """
    if isinstance(select_topk, bool) or not isinstance(select_topk, Real):
        raise TypeError(
            f"select_topk={select_topk!r}: a whole number of parents, or a share of the tokens as a float, is needed"
        )
    if isinstance(select_topk, Integral):
        if not 0 <= select_topk <= MAX_PARENTS:
            raise ValueError(f"select_topk={select_topk!r}: 0 to 2^40 parents per level are needed")
        return int(select_topk), 0
    share = float(select_topk)
    if not 0 < share <= 1:
        hint = f"; for a number of parents write {int(share)}" if share >= 0 and share.is_integer() else ""
        raise ValueError(f"select_topk={select_topk!r}: a share of the tokens must be above 0 and at most 1{hint}")
    fraction = Fraction(share).limit_denominator(MAX_DENOMINATOR)
    if fraction == 0:
        return 1, 0  # less than one parent for any length: one is the minimum
    return fraction.numerator, fraction.denominator


def _setting(default: Any, help: str, metavar: str | None = None) -> Any:
    return field(default=default, metadata={"help": help} | ({"metavar": metavar} if metavar else {}))


@dataclass(frozen=True)
class Method:
    """How a sequence is pooled and chosen from: the settings of the method, checked.

    `windows` (tokens per entry of each level, finest first) and `topk` (numerator, denominator) follow from them. All
    lengths are in tokens; those of `parents` and `length` may be symbolic.

    Raises ValueError or TypeError naming the setting, the rule and the value.
    """

    pool_ratios: Sequence[float] = _setting(
        POOL_RATIOS, "Pooling ratio of each level above the tokens: 1/4 or 0.25.", "RATIO"
    )
    select_topk: int | float = _setting(
        SELECT_TOPK, "Parents chosen per level: a share of the tokens (1/64, 0.25) or a whole number (512).", "K"
    )
    cover_start: bool = _setting(
        True, "Choose the first window of each level always, so that every token has an output."
    )
    local_window: int = _setting(
        0, "Exact attention to the last so many tokens beside the pyramid; 0: none, the published method.", "TOKENS"
    )
    windows: tuple[int, ...] = field(init=False, repr=False, compare=False)
    topk: tuple[int, int] = field(init=False, repr=False)  # 1 is one parent, 1.0 all tokens: not the same

    def __post_init__(self) -> None:
        object.__setattr__(self, "windows", check_pool_ratios(self.pool_ratios))
        object.__setattr__(self, "topk", check_select_topk(self.select_topk))
        object.__setattr__(self, "pool_ratios", tuple(self.pool_ratios))
        check_cover_start(self.cover_start)
        check_local_window(self.local_window)
        if not self.chooses and self.local_window == 0:
            raise ValueError(
                "select_topk=0 chooses nothing, and local_window=0 attends to nothing: a local_window above 0 is needed"
            )

    @property
    def chooses(self) -> bool:
        """Whether there is a pyramid to choose from beside the local window."""
        return self.topk[0] > 0

    @classmethod
    def settings(cls) -> list[Field]:
        """Each setting's name, default and, as metadata, the help and the name of its values."""
        return [setting for setting in fields(cls) if setting.init]

    @classmethod
    def of(cls, values: Any) -> Method:
        """From a mapping or an object that has settings by name, as numbers or as text; others have their default."""
        get = values.get if isinstance(values, Mapping) else lambda name, default: getattr(values, name, default)
        return cls(**{each.name: _read(each, get(each.name, each.default)) for each in cls.settings()})

    def values(self) -> dict[str, Any]:
        """Each setting by name, as JSON has it."""
        return {each.name: _plain(getattr(self, each.name)) for each in self.settings()}

    def written(self) -> dict[str, Any]:
        """Each setting by name, as people write it in a file: `{"pool_ratios": ["1/4", "1/16"], ...}`."""
        return {name: written(value) for name, value in self.values().items()}

    def texts(self) -> dict[str, str]:
        """Each setting by name, as people write it in a line: `{"pool_ratios": "1/4 1/16", ...}`."""
        return {name: text_of(value) for name, value in self.values().items()}

    def __str__(self) -> str:
        """One line, without rarely changed settings that have their default."""
        plain = DEFAULT.texts()
        always = ("pool_ratios", "select_topk")
        shown = {name: text for name, text in self.texts().items() if name in always or text != plain[name]}
        return ", ".join(f"{name} {text or 'none'}" for name, text in shown.items())

    def parents(self, tokens):
        """k, the parents per level of a sequence."""
        return parents_per_level(tokens, self.topk)

    def length(self, tokens):
        """S, the number of entries of a sequence that attend to one another."""
        return sub_length(tokens, self.windows, self.topk)

    def with_parents(self, parents: int) -> Method:
        """The same with another whole number of parents; itself where they are a share of the tokens, or none."""
        numerator, denominator = self.topk
        return self if denominator or not numerator else replace(self, select_topk=parents)

    def plan(self, tokens: int) -> Plan:
        """The plan of a sequence, from its length alone. Raises ValueError or TypeError."""
        if isinstance(tokens, bool) or not isinstance(tokens, Integral):
            raise TypeError(f"tokens={tokens!r}: a whole number is needed")
        if tokens < 1:
            raise ValueError(f"tokens={tokens}: at least one token is needed")
        return plan_of(int(tokens), self.windows, self.topk, self.local_window)


DEFAULT = Method()
_kept = functools.lru_cache(64)(lambda types, *settings: Method(*settings))


def method_of(pool_ratios: Sequence[float], *settings: Any) -> Method:
    """`Method(pool_ratios, *settings)`, made once for the same arguments: checks take longer than a short launch."""
    if isinstance(pool_ratios, tuple) and not torch.compiler.is_compiling():
        try:
            # True and 1, 1 and 1.0 are equal, and not the same.
            return _kept((*map(type, pool_ratios), *map(type, settings)), pool_ratios, *settings)
        except TypeError:  # of what cannot be a key; the check below names it
            pass
    return Method(pool_ratios, *settings)


def plan(
    tokens: int,
    *,
    pool_ratios: Sequence[float] = POOL_RATIOS,
    select_topk: int | float = SELECT_TOPK,
    local_window: int = 0,
) -> Plan:
    """The plan for one sequence of `tokens` tokens. Raises ValueError or TypeError for settings that break a rule.

    >>> lighthouse.plan(98_304).length
    18432
    """
    return Method(pool_ratios, select_topk, local_window=local_window).plan(tokens)


def number(name: str, value: Any) -> Any:
    """`"1/64"` is 0.015625, `"512"` the number 512, `"1.0"` a share; anything but text is returned unchanged."""
    if not isinstance(value, str):
        return value
    try:
        return int(value)
    except ValueError:
        pass
    try:
        return float(Fraction(value))
    except (ValueError, ZeroDivisionError):
        raise ValueError(f"{name}={value}: a number such as 512, 0.25 or 1/64 is needed") from None


def _read(setting: Field, value: Any) -> Any:
    """Converts a text, or a list of texts, to the setting's type; anything else is returned unchanged."""
    name, default = setting.name, setting.default
    if isinstance(default, tuple):
        value = value.split() if isinstance(value, str) else value
        return tuple(number(name, item) for item in value) if isinstance(value, (list, tuple)) else value
    if isinstance(default, bool):
        return SWITCHES.get(value.lower(), value) if isinstance(value, str) else value
    return number(name, value)


def _plain(value: Any) -> Any:
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    if isinstance(value, (bool, str)):
        return value
    return int(value) if isinstance(value, Integral) else float(value)


def written(value: Any) -> Any:
    """The text that `Method.of` reads back to the same: 0.015625 is 1/64."""
    if isinstance(value, (list, tuple)):
        return [written(item) for item in value]
    if not isinstance(value, float):
        return value
    fraction = Fraction(value).limit_denominator(MAX_DENOMINATOR)
    return str(fraction) if fraction.denominator > 1 and float(fraction) == value else repr(value)


def text_of(value: Any) -> str:
    """The same in a line."""
    value = written(value)
    return " ".join(map(str, value)) if isinstance(value, list) else str(value)
