"""The options of a study: what it searches and how it judges."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from lighthouse.core.method import check_local_window

# What is searched, and the options that are its range or its candidates.
RANGES = {
    "pool_ratios": ("levels", "level_ratio"),
    "select_topk": ("topk",),
    "local_window": ("local_windows",),
    "share": ("shares",),
    "learning_rate": ("rate_within",),
    "batch": ("batch_up_to",),
}


@dataclass(kw_only=True)
class TuneOptions:
    """What a study searches and how it judges. Raises `ValueError` naming the option and the rule.

    A range is one or two values, candidates are any number. By default both also hold the given setting, which is the
    first trial; those that are given must hold it.
    """

    _argument_group_name = "tuning"

    trials: int | None = field(
        default=None,
        metadata={
            "help": "Number of settings to train in all processes together, including the given one (default: 20, or "
            "the whole grid). Skipped settings do not count."
        },
    )
    sampler: Literal["tpe", "grid"] = field(
        default="tpe", metadata={"help": "tpe: Optuna's TPE; grid: all combinations of a few values of each range."}
    )
    judge: Literal["time", "tokens"] = field(
        default="time",
        metadata={
            "help": "Give each trial the same training time, or the same number of tokens; use tokens on a shared "
            "machine and for repeatable results."
        },
    )
    seconds: float | None = field(
        default=None,
        metadata={
            "help": "Training seconds of each trial with --judge time (default: what the given setting takes for "
            "--max_steps)."
        },
    )
    evaluations: int = field(
        default=5, metadata={"help": "Number of evaluations of each trial, spread evenly over its dense stage."}
    )
    pruner: Literal["median", "none"] = field(
        default="median",
        metadata={
            "help": "median: end a trial whose loss is worse than the median of earlier trials at the same evaluation."
        },
    )
    fixed: list[str] = field(
        default_factory=list,
        metadata={"help": "Do not search these: any of " + ", ".join(RANGES) + ".", "metavar": "NAME"},
    )
    levels: list[int] | None = field(
        default=None, metadata={"help": "Range of the number of levels, including the tokens (default: 2 5)."}
    )
    level_ratio: list[str] | None = field(
        default=None,
        metadata={"help": "Range of the ratio from each level to the next (default: 1/10 1/2).", "metavar": "RATIO"},
    )
    topk: list[str] | None = field(
        default=None,
        metadata={
            "help": "Range of select_topk, in parents or shares of the tokens (default: 512 4096; below 98,304 "
            "tokens in proportion to the context). A 0 before them adds the local window alone: 0 512 4096.",
            "metavar": "K",
        },
    )
    local_windows: list[int] | None = field(
        default=None,
        metadata={
            "help": "Local windows to try, in tokens; 0 is the published method (default: those of 0 128 256 512 1024 "
            "that are shorter than the context).",
            "metavar": "TOKENS",
        },
    )
    shares: list[float] | None = field(
        default=None,
        metadata={
            "help": "Shares of the steps with Lighthouse to try (default: those of 0.5 0.6 0.7 0.8 0.9 that leave "
            "enough dense steps).",
            "metavar": "SHARE",
        },
    )
    rate_within: float | None = field(
        default=None,
        metadata={"help": "Range of the learning rate, as a relative distance from the given rate (default: 0.1)."},
    )
    batch_up_to: float | None = field(
        default=None,
        metadata={"help": "Range of the batch: up to this share more than the given batch (default: 0.4)."},
    )
    grid_values: int = field(
        default=3,
        metadata={
            "help": "Number of values of each range in a grid; every number of levels and every candidate is tried."
        },
    )

    def __post_init__(self) -> None:
        for name, choices in (
            ("sampler", ("tpe", "grid")),
            ("judge", ("time", "tokens")),
            ("pruner", ("median", "none")),
        ):
            if getattr(self, name) not in choices:
                raise ValueError(f"{name}={getattr(self, name)!r}: {' or '.join(choices)} is needed")
        for name in ("trials", "evaluations", "grid_values"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name}={value}: at least one is needed")
        if self.seconds is not None and not 0 < self.seconds < float("inf"):
            raise ValueError(f"seconds={self.seconds}: a time above 0 is needed")
        if self.seconds is not None and self.judge == "tokens":
            raise ValueError(f"seconds={self.seconds} with judge='tokens': --max_steps sets the number of tokens")
        unknown = [name for name in self.fixed if name not in RANGES]
        if unknown:
            raise ValueError(f"fixed={unknown[0]}: any of {', '.join(RANGES)} is needed")
        for window in self.local_windows or ():
            check_local_window(window)
        for share in self.shares or ():
            if not 0 < share < 1:
                raise ValueError(f"shares={share}: a share of the steps above 0 and below 1 is needed")
        if self.rate_within is not None and not 0 <= self.rate_within < 1:
            raise ValueError(f"rate_within={self.rate_within}: a share of at least 0 and below 1 is needed")
        if self.batch_up_to is not None and not 0 <= self.batch_up_to < float("inf"):
            raise ValueError(f"batch_up_to={self.batch_up_to}: a share of at least 0 is needed, such as 0.4")
