"""What a model's layers choose on a text: the finest level at which each layer and head keeps each token.

The choice is caught where it is made, as the results of the operator `select` in one forward pass with Lighthouse. The
trap is the meaning: every token is kept at the coarsest level at least, so that "kept" alone says nothing; what counts
is at which level, and level 0 is the token itself.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import PreTrainedModel

from lighthouse.core.selection import Selection
from lighthouse.huggingface.wrapped import WrappedModel

SELECT = torch.ops.lighthouse.select.default


@dataclass(frozen=True, eq=False)
class Choices:
    """Of one sequence of N tokens.

    Attributes:
        levels: `[layers, heads, N]` uint8, the finest level at which each token is kept; heads are key-value heads.
        layers: the numbers of these layers in the model, from 0.
        windows: tokens per entry of each level, finest first.
        length: S of the sub-sequence.
        local_window: tokens that each attends to exactly beside what is kept; 0: none.
    """

    levels: np.ndarray
    layers: tuple[int, ...]
    windows: tuple[int, ...]
    length: int
    local_window: int = 0

    @property
    def tokens(self) -> int:
        return self.levels.shape[2]

    @property
    def kept(self) -> np.ndarray:
        """`[layers, heads, N]` bool: kept as tokens, at level 0."""
        return self.levels == 0

    def kept_share(self, bins: int) -> np.ndarray:
        """`[layers, bins]`: the share of each stretch of the text that is kept as tokens, over the heads."""
        starts = stretches(self.tokens, bins)
        counts = np.diff(starts, append=self.tokens)
        return np.add.reduceat(self.kept.mean(axis=1), starts, axis=1) / counts

    def overlap(self) -> np.ndarray:
        """`[layers * heads, layers * heads]`: tokens that both keep over tokens that one of them keeps, at level 0."""
        kept = self.kept.reshape(-1, self.tokens).astype(np.float32)
        both = kept @ kept.T
        counts = kept.sum(axis=1)
        either = counts[:, None] + counts[None] - both
        return np.divide(both, either, out=np.ones_like(both), where=either > 0)


def stretches(tokens: int, count: int) -> np.ndarray:
    """The first tokens of `count` stretches of a text, at even distances, so that places in a picture are true."""
    return np.arange(count) * tokens // count


@torch.no_grad()
def choices_of(model: PreTrainedModel, input_ids: torch.Tensor) -> Choices:
    """The choices of a wrapped model on one sequence; its attention everywhere else is what it trains with.

    Args:
        model: wrapped by `LighthouseWrapper` with `eval="lighthouse"` and `min_tokens=0, max_share=1.0`.
        input_ids: `[1, N]`.

    Raises:
        TypeError, ValueError: the model is not wrapped, or Lighthouse did not act on so many tokens.
    """
    if not isinstance(model, WrappedModel):
        raise TypeError(f"model is a plain {type(model).__name__}: wrap it with LighthouseWrapper first")
    if input_ids.ndim != 2 or input_ids.shape[0] != 1:
        raise ValueError(f"input_ids has shape {list(input_ids.shape)}: one sequence [1, N] is needed")
    training = model.training
    model.eval()
    try:
        with _Caught() as caught:
            bare = model.base_model is model
            model(input_ids=input_ids, use_cache=False, **({} if bare else {"logits_to_keep": 1}))
    finally:
        model.train(training)
    if not caught.found and not model.lighthouse_settings.method.chooses:
        raise ValueError(f"{model.lighthouse_settings.method} chooses nothing, so there is no choice to show")
    if not caught.found:
        raise ValueError(
            f"Lighthouse did not act on {input_ids.shape[1]} tokens: it is switched off, or the model was wrapped with "
            'settings that leave such a sequence dense (eval="lighthouse", min_tokens=0 and max_share=1.0 do not)'
        )
    settings, method = model.lighthouse_settings, model.lighthouse_settings.method
    count = model.config.num_hidden_layers
    layers = tuple(layer for layer in range(count) if settings.acts_in_layer(layer, count))
    levels = [_finest_levels(mask[0].cpu().numpy(), method.windows) for mask, _ in caught.found]
    length = method.length(input_ids.shape[1])
    return Choices(np.stack(levels), layers, method.windows, length, method.local_window)


def choices_in(selection: Selection, batch: int = 0) -> Choices:
    """The same of a choice that `lighthouse.select` returned: one layer."""
    levels = _finest_levels(selection.mask[batch].cpu().numpy(), selection.windows)
    return Choices(levels[None], (0,), selection.windows, selection.length)


def _finest_levels(mask: np.ndarray, windows: tuple[int, ...]) -> np.ndarray:
    """`[heads, N]` uint8 of masks `[heads, N]`: bit l is set at the last token of a chosen window of level l."""
    heads, tokens = mask.shape
    finest = np.full((heads, tokens), len(windows) - 1, dtype=np.uint8)
    for level in range(len(windows) - 1, -1, -1):
        window = windows[level]
        whole = tokens // window * window
        chosen = mask[:, window - 1 : whole : window] >> level & 1
        finest[:, :whole][np.repeat(chosen.astype(bool), window, axis=1)] = level
    return finest


class _Caught(TorchDispatchMode):
    """The results of every call of `select`, in order: one per layer that Lighthouse acts in."""

    def __init__(self):
        super().__init__()
        self.found = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        if func is SELECT:
            self.found.append(result)
        return result
