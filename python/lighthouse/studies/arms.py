"""The arms of a comparison: the options with which each of them trains, from those that were given.

dense        dense attention in every step, the baseline
window       exact attention to the last `local_window` tokens alone, in every layer
published    the pyramid alone, with the dense layers that it needs
lighthouse   the settings as given; by default the pyramid and the window, in every layer
"""

from __future__ import annotations

import difflib
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from lighthouse.report.compared import ARMS, DENSE, LIGHTHOUSE, PUBLISHED, WINDOW
from lighthouse.training.options import PretrainOptions

DEFAULT_ARMS = (DENSE, WINDOW, LIGHTHOUSE)


def checked(arms: Sequence[str]) -> list[str]:
    """The arms in the order in which they are trained, the baseline first. Raises `ValueError`."""
    shown = f"arms={' '.join(arms)!r}"
    for arm in arms:
        if arm not in ARMS:
            near = difflib.get_close_matches(arm, ARMS, n=1, cutoff=0.5)
            hint = f"; nearest: {near[0]}" if near else ""
            raise ValueError(f"arms={arm!r}: one of {', '.join(ARMS)} is needed{hint}")
    if len(set(arms)) < len(arms):
        raise ValueError(f"{shown}: each arm can be named once")
    if DENSE not in arms or len(arms) < 2:
        raise ValueError(f"{shown}: {DENSE}, the baseline, and at least one other of {', '.join(ARMS[1:])} are needed")
    return [arm for arm in ARMS if arm in arms]


def options_of(options: PretrainOptions, arms: Sequence[str]) -> dict[str, PretrainOptions]:
    """The options of each arm. Raises `ValueError` for an arm that has nothing to attend with, or two alike."""
    found: dict[str, PretrainOptions] = {}
    for arm in arms:
        try:
            found[arm] = _options_of(options, arm)
        except ValueError as error:
            raise ValueError(f"the arm {arm} of the comparison: {error}") from None
    for arm in (WINDOW, PUBLISHED):
        if LIGHTHOUSE in found and found.get(arm) == found[LIGHTHOUSE]:
            settings = f"select_topk={options.method.select_topk}, local_window={options.method.local_window}"
            raise ValueError(
                f"arms={' '.join(arms)!r}: with {settings} {LIGHTHOUSE} is the same as {arm}; leave out one of them"
            )
    return found


def _options_of(options: PretrainOptions, arm: str) -> PretrainOptions:
    if arm == WINDOW and options.method.local_window == 0:
        raise ValueError("local_window=0 leaves it nothing to attend to: give a window, or leave the arm out")
    if arm == PUBLISHED and not options.method.chooses:
        raise ValueError("select_topk=0 leaves it nothing to attend to: give a share, or leave the arm out")
    changes: dict[str, dict[str, Any]] = {
        DENSE: {"dense_only": True, "switch_step": None, "switch_tokens": None},
        WINDOW: {"select_topk": 0, "dense_layers": 0},
        PUBLISHED: {"local_window": 0, "dense_layers": None},
        LIGHTHOUSE: {},
    }
    return replace(options, **changes[arm])
