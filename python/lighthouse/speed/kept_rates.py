"""The rates of a device, cached from one call of `lighthouse plan` or `bench` to the next.

Cached rates can go out of date: another version or driver, or a machine that was busy then or has changed since. So
they are kept for `DAYS` at most, and measured again if something speaks against them.
"""

from __future__ import annotations

import json
import os
import re
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import torch

from lighthouse.core.devices import device_name
from lighthouse.core.files import write_whole
from lighthouse.core.method import Method
from lighthouse.core.version import VERSION
from lighthouse.speed.estimates import ERROR, ERROR_FROM, error_of
from lighthouse.speed.layer import Layer
from lighthouse.speed.rates import BUSY, Checked, Rates, measure_rates

DAYS = 7
DAY = 86_400.0

Say = Callable[[str], None]


def cache_file() -> Path:
    """`$XDG_CACHE_HOME/lighthouse/rates.json`, by default in `~/.cache`."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "lighthouse" / "rates.json"


def cache_key(layer: Layer, device: torch.device | str) -> str:
    """What rates depend on: device and its driver, threads, versions and layer."""
    parts = [device_name(device), f"torch {torch.__version__}", f"lighthouse {VERSION}", str(layer)]
    if torch.device(device).type == "cuda":
        parts.insert(1, f"driver {_driver()}")
    return " | ".join(parts)


def _driver() -> str:
    try:
        text = Path("/proc/driver/nvidia/version").read_text(encoding="utf-8")
    except OSError:
        return "unknown"
    found = re.search(r"Kernel Module.*?(\d+(?:\.\d+)+)", text)
    return found[1] if found else "unknown"


def rates_of(layer: Layer, device: torch.device | str, *, again: bool = False, say: Say = lambda line: None) -> Rates:
    """The device's rates for such layers: from `cache_file()`, or measured and cached there, by `cache_key`.

    `again` measures them again. So does anything that speaks against the cached ones; a line says so.
    """
    kept = None if again else _kept(layer, device, say)
    if kept is not None:
        why = stale(kept, layer, torch.device(device).type)
        if why is None:
            return kept
        say(f"{why}: they are measured again")
    rates = measure_rates(layer, device, say)
    if kept is not None:  # speed-ups that bench measured are still those
        rates = replace(rates, checks=(*rates.checks, *(check for check in kept.checks if check.by != "plan")))
    _keep(layer, device, rates, say)
    return rates


def stale(rates: Rates, layer: Layer, device_type: str, now: float | None = None) -> str | None:
    """What speaks against cached rates; None if nothing does."""
    age = ((time.time() if now is None else now) - rates.measured) / DAY
    if rates.measured == 0:
        return "it is not known when the cached rates were measured"
    if not -1 <= age <= DAYS:
        return f"the cached rates are {age:,.0f} days old" if age > 0 else "the cached rates have a date in the future"
    if rates.spread is None or rates.spread > BUSY:
        spread = "" if rates.spread is None else f" (their spread is {rates.spread:.0%})"
        return f"the machine was busy when the cached rates were measured{spread}"
    for check in rates.checks:
        if check.by == "bench" and check.when > rates.measured and check.tokens >= ERROR_FROM[device_type]:
            error = error_of(check, layer, rates)
            if abs(error) > ERROR:
                return (
                    f"bench measured {check.speedup:.2f} times at {check.tokens:,} tokens, and the cached rates give "
                    f"{(1 + error) * check.speedup:.2f}"
                )
    return None


def keep_check(
    layer: Layer,
    device: torch.device | str,
    tokens: int,
    speedup: float,
    method: Method,
    *,
    say: Say = lambda line: None,
) -> None:
    """Adds a speed-up that bench measured to the cached rates, in place of an earlier one like it."""
    rates = _kept(layer, device, say)
    if rates is None:
        return
    new = Checked(tokens, method, speedup, time.time(), "bench")

    def like_it(check: Checked) -> bool:
        names = ("tokens", "method", "by")
        return all(getattr(check, name) == getattr(new, name) for name in names)

    others = tuple(check for check in rates.checks if not like_it(check))
    _keep(layer, device, replace(rates, checks=(*others, new)), say)


def _kept(layer: Layer, device: torch.device | str, say: Say) -> Rates | None:
    found = _read(cache_file(), say).get(cache_key(layer, device))
    if found is None:
        return None
    try:
        return Rates.load(found)
    except (AttributeError, KeyError, TypeError, ValueError):
        say(f"{cache_file()}: the cached rates of this device cannot be read; they are measured again")
        return None


def _keep(layer: Layer, device: torch.device | str, rates: Rates, say: Say) -> None:
    file = cache_file()
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        kept = _read(file, lambda line: None) | {cache_key(layer, device): rates.values()}
        write_whole(file, json.dumps(kept, indent=1) + "\n")
    except OSError as error:
        say(f"the rates cannot be cached: {error}")


def _read(file: Path, say: Say) -> dict:
    try:
        kept = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}
    except (OSError, ValueError, RecursionError) as error:
        say(f"{file} cannot be read ({error}); the rates are measured again")
        return {}
    if not isinstance(kept, dict):
        say(f"{file} does not contain rates; they are measured again")
        return {}
    return kept
