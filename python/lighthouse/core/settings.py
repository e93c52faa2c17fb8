"""Settings of a wrapped model: the method, the layers it acts in, and when it runs dense instead."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace

from lighthouse.core.inputs import check_takes_window
from lighthouse.core.method import Method

# What wrapped models and the commands do unless told otherwise; `lighthouse.attention` itself has no local window. With
# one of 256 tokens beside the pyramid and no dense layers, runs ended below dense ones (docs/quality.md); without it,
# the published method, some layers at each end must stay dense.
RECOMMENDED = Method(local_window=256)
SHARE = 0.6  # of the steps that use Lighthouse

# From this many tokens on, one layer's forward and backward without a local window is faster than dense attention: on a
# CPU the shortest measured length (bench/README.md), on CUDA where launching the kernels no longer dominates.
MIN_TOKENS = {"cpu": 512, "cuda": 8192}

LONG = 98_304  # tokens from which a text is long: settings for "100K" are for it, and a small kept share gets a warning

# Above this share of the tokens the sub-sequence is so long that gathering and writing back cost what is saved.
MAX_SHARE = 0.6

# A model with a smaller share of dense training forwards than this is hardly ready for dense attention. The loss had
# recovered from the switch after 100 of 2,300 steps in runs of our own, after 1,000 to 1,500 of 16,000 in the paper's.
LEAST_DENSE_SHARE = 0.05

EVAL = ("dense", "lighthouse")
LOSS = ("chunked", "model")


@dataclass(frozen=True)
class LighthouseSettings:
    """The checked settings of a wrapped model. `LighthouseWrapper` says what each of them means.

    `dense_layers` is a number once the model is known.
    """

    method: Method = RECOMMENDED
    dense_layers: int | None = None
    inner: Callable | None = None
    eval: str = "dense"
    loss: str = "chunked"
    min_tokens: int | None = None
    max_share: float = MAX_SHARE

    def __post_init__(self):
        check_whole_number("dense_layers", self.dense_layers)
        check_whole_number("min_tokens", self.min_tokens)
        _check_choice("eval", self.eval, EVAL)
        _check_choice("loss", self.loss, LOSS)
        if self.inner is not None and not callable(self.inner):
            raise TypeError(f"inner={self.inner!r}: a callable or None is needed")
        check_takes_window(self.inner, self.method.local_window)
        if isinstance(self.max_share, bool) or not isinstance(self.max_share, (int, float)):
            raise TypeError(f"max_share={self.max_share!r}: a number is needed")
        if not (math.isfinite(self.max_share) and 0 < self.max_share <= 1):
            raise ValueError(f"max_share={self.max_share}: a share of the tokens, above 0 and at most 1, is needed")

    def __getattr__(self, name: str):
        """The method's settings by their names too."""
        if name.startswith("_") or name == "method":  # not there yet while a copy is made
            raise AttributeError(name)
        return getattr(self.method, name)

    def for_layers(self, layers: int) -> LighthouseSettings:
        """The same with `dense_layers` as a number, for a model of `layers` layers. Raises `ValueError`."""
        dense = self.dense_layers
        if dense is None:
            dense = 0 if self.method.local_window or layers < 3 else min(2, max(1, layers // 6))
        found = replace(self, dense_layers=dense)
        found.check_layers(layers)
        return found

    def check_layers(self, layers: int) -> None:
        """Raises `ValueError` if Lighthouse, with `dense_layers` as a number, has none of `layers` layers."""
        if layers < 1:
            raise ValueError("the model has no layers")
        dense = self._dense_at_each_end
        if 2 * dense >= layers:
            raise ValueError(
                f"dense_layers={dense}: with {dense} dense layers at each end of {layers}, none is left for "
                f"Lighthouse; at most {(layers - 1) // 2} can be dense at each end"
            )

    def acts_in_layer(self, layer: int, layers: int) -> bool:
        """Whether `layer`, counted from 0, of `layers` layers is one of Lighthouse's and not a dense one."""
        return self._dense_at_each_end <= layer < layers - self._dense_at_each_end

    @property
    def _dense_at_each_end(self) -> int:
        assert self.dense_layers is not None, "the model is not known yet: for_layers makes it a number"
        return self.dense_layers

    def least_tokens(self, device_type: str) -> int:
        """The length below which the model runs dense on such a device."""
        if self.min_tokens is not None:
            return self.min_tokens
        return MIN_TOKENS.get(device_type, 0)

    def pays(self, tokens: int, device_type: str) -> bool:
        """Whether Lighthouse is used for `tokens` tokens, by `min_tokens` and `max_share`. May be symbolic."""
        if tokens < self.least_tokens(device_type):
            return False
        return self.method.length(tokens) <= self.max_share * tokens

    def why_dense(self, tokens: int | None, device_type: str) -> tuple[str, str]:
        """The rule that keeps a sequence of `tokens` dense, and a sentence with its numbers; None: they are not known.

        Called if `pays` is False.
        """
        least = self.least_tokens(device_type)
        if tokens is None:
            return "either", (
                f"sequences of fewer than {least:,} tokens (min_tokens), or whose sub-sequence is longer than "
                f"{self.max_share:.0%} of them (max_share)"
            )
        if tokens < least:
            return "min_tokens", f"sequences of {tokens:,} tokens are shorter than min_tokens={least:,}"
        length = self.method.length(tokens)
        return "max_share", (
            f"the sub-sequence of {tokens:,} tokens has {length:,} entries, {length / tokens:.0%} of them, more than "
            f"max_share={self.max_share:g} allows"
        )


def check_whole_number(name: str, value) -> None:
    """None, or a whole number of at least 0. Raises TypeError or ValueError naming it."""
    if value is None:
        return
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{name}={value!r}: a whole number is needed")
    if value < 0:
        raise ValueError(f"{name}={value}: zero or more is needed")


def _check_choice(name: str, value, allowed: tuple[str, ...]) -> None:
    if value not in allowed:
        raise ValueError(f"{name}={value!r}: one of {', '.join(map(repr, allowed))} is needed")
