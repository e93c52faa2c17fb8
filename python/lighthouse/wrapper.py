"""`LighthouseWrapper`: a model trains with Lighthouse attention and stays, object by object, the model it was.

Here is what does not depend on where the model comes from: the settings and the way in and out. What a model of
Transformers needs is in `lighthouse.huggingface`, which is imported when the first model is wrapped, so that
`import lighthouse` needs torch alone.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace

from lighthouse.plan import sub_length
from lighthouse.settings import POOL_RATIOS, SELECT_TOPK, check_pool_ratios, check_select_topk

# From this many tokens on, one layer's forward and backward is faster than dense attention: on a CPU the shortest
# length that was measured (bench/README.md), on CUDA where launching the kernels no longer decides.
MIN_TOKENS = {"cpu": 512, "cuda": 8192}

# Above this share of the tokens the sub-sequence is so long that gathering and writing back cost what is saved.
MAX_SHARE = 0.6

# A model with a smaller share of dense training forwards than this is hardly ready for dense attention. The loss had
# recovered from the switch after 100 of 2,300 steps in runs of our own, after 1,000 to 1,500 of 16,000 in the paper's.
LEAST_DENSE_SHARE = 0.05

EVAL = ("dense", "lighthouse")
LOSS = ("chunked", "model")


@dataclass(frozen=True)
class LighthouseSettings:
    """What a wrapped model was given, checked. `LighthouseWrapper` says what each of them means.

    `dense_layers` is a number once the model is known; `windows` (tokens, finest first) and `topk` (numerator,
    denominator) follow from `pool_ratios` and `select_topk`.
    """

    pool_ratios: tuple[float, ...] = POOL_RATIOS
    select_topk: int | float = SELECT_TOPK
    dense_layers: int | None = None
    cover_start: bool = True
    inner: Callable | None = None
    eval: str = "dense"
    loss: str = "chunked"
    min_tokens: int | None = None
    max_share: float = MAX_SHARE
    windows: tuple[int, ...] = field(init=False, repr=False, compare=False)
    topk: tuple[int, int] = field(init=False, repr=False, compare=False)

    def __post_init__(self):
        object.__setattr__(self, "windows", tuple(check_pool_ratios(self.pool_ratios)))
        object.__setattr__(self, "topk", tuple(check_select_topk(self.select_topk)))
        object.__setattr__(self, "pool_ratios", tuple(self.pool_ratios))
        _check_whole_number("dense_layers", self.dense_layers)
        _check_whole_number("min_tokens", self.min_tokens)
        _check_choice("eval", self.eval, EVAL)
        _check_choice("loss", self.loss, LOSS)
        if not isinstance(self.cover_start, bool):
            raise TypeError(f"cover_start={self.cover_start!r}: True or False is needed")
        if self.inner is not None and not callable(self.inner):
            raise TypeError(f"inner={self.inner!r}: a callable or None is needed")
        if isinstance(self.max_share, bool) or not isinstance(self.max_share, (int, float)):
            raise TypeError(f"max_share={self.max_share!r}: a number is needed")
        if not (math.isfinite(self.max_share) and 0 < self.max_share <= 1):
            raise ValueError(f"max_share={self.max_share}: a share of the tokens, above 0 and at most 1, is needed")

    def for_layers(self, layers: int) -> LighthouseSettings:
        """The same with `dense_layers` as a number, for a model of `layers` layers. Raises `ValueError`."""
        dense = self.dense_layers
        if dense is None:
            dense = 0 if layers < 3 else min(2, max(1, layers // 6))
        found = replace(self, dense_layers=dense)
        found.check_layers(layers)
        return found

    def check_layers(self, layers: int) -> None:
        """Raises `ValueError` where Lighthouse, with `dense_layers` as a number, has none of `layers` layers."""
        if layers < 1:
            raise ValueError("the model has no layers")
        dense = self.dense_layers
        if 2 * dense >= layers:
            raise ValueError(
                f"dense_layers={dense}: with {dense} dense layers at each end of {layers}, none is left to Lighthouse; "
                f"at most {(layers - 1) // 2} can be dense at each end"
            )

    def acts_in_layer(self, layer: int, layers: int) -> bool:
        """Whether `layer`, counted from 0, of `layers` layers is one of Lighthouse's and not a dense one."""
        return self.dense_layers <= layer < layers - self.dense_layers

    def least_tokens(self, device_type: str) -> int:
        """The length below which the model runs dense on such a device."""
        if self.min_tokens is not None:
            return self.min_tokens
        return MIN_TOKENS.get(device_type, 0)

    def pays(self, tokens: int, device_type: str) -> bool:
        """Whether a sequence of `tokens` is worth it: `min_tokens` and `max_share`. Symbolic numbers pass too."""
        if tokens < self.least_tokens(device_type):
            return False
        return sub_length(tokens, self.windows, self.topk) <= self.max_share * tokens

    def why_dense(self, tokens: int | None, device_type: str) -> tuple[str, str]:
        """The rule that keeps a sequence of `tokens` dense, and a sentence with its numbers; None: they are not known.

        Asked where `pays` is False.
        """
        least = self.least_tokens(device_type)
        if tokens is None:
            return "either", (
                f"sequences of fewer than {least:,} tokens (min_tokens), or whose sub-sequence is longer than "
                f"{self.max_share:.0%} of them (max_share)"
            )
        if tokens < least:
            return "min_tokens", f"sequences of {tokens:,} tokens are shorter than min_tokens={least:,}"
        length = sub_length(tokens, self.windows, self.topk)
        return "max_share", (
            f"the sub-sequence of {tokens:,} tokens has {length:,} entries, {length / tokens:.0%} of them, more than "
            f"max_share={self.max_share:g} allows"
        )


def LighthouseWrapper(
    model,
    *,
    pool_ratios: Sequence[float] = POOL_RATIOS,
    select_topk: int | float = SELECT_TOPK,
    dense_layers: int | None = None,
    cover_start: bool = True,
    inner: Callable | None = None,
    eval: str = "dense",
    loss: str = "chunked",
    min_tokens: int | None = None,
    max_share: float = MAX_SHARE,
):
    """Makes `model` train with Lighthouse attention, in place, and returns that same object.

    The class of the object is swapped for a subclass and back by `unwrap()`; parameters, their names, `state_dict`
    keys, checkpoints and `save_pretrained` are the plain model's throughout. Wrap before `torch.compile`, `Trainer`,
    DDP or `accelerate.prepare`; before or after `fully_shard`.

    The wrapped model is called like the plain one, or with one mapping of tensors, `model(batch)`, which always gives
    a loss: where the batch has no `labels`, the input ids are the labels. With labels the result has `loss`, and
    `logits` is None (see `loss`). It has in addition

    - `unwrap()`: the plain model again, the same object; warns where it had no, or hardly any, dense training;
    - `lighthouse(enabled)`: switches Lighthouse off or on in place; parameters and optimizer are untouched;
    - `lighthouse_enabled`, `lighthouse_settings`;
    - `take_used()`: which attention the training forwards since its last call ran.

    Each forward is either Lighthouse's or, to the last bit, the plain model's. It is the plain model's, with its
    attention and masks, and this is said once, in `eval()`, in `generate`, with a key-value cache, and where Lighthouse
    would not pay. Where Lighthouse acts, anything it cannot honour is an error: a padding mask that hides anything,
    packed documents, masks of other shapes, sliding windows, soft-capping, attention sinks, keywords that it does not
    know, sequences longer than the model's `max_position_embeddings`, tensors on a device that this build has no
    kernels for.

    What is replaced has to be Transformers' own, and is looked at when the model is wrapped, at the switch, in
    `train()` and in each forward (compiled as a whole, only when it is traced): attention modules, functions and masks
    of the user's own, replaced entries of Transformers' registry (sequence parallelism), context parallelism: errors.
    A forward or loss function of the user's own, and hooks on the output layer, need `loss="model"`; a hook that comes
    later has the model's own loss taken, which is said once. Layers that are put in, copied or taken out follow the
    model; a part of it called by itself is an error where Lighthouse would act.

    Gradient checkpointing keeps the choice of each layer: the backward never chooses again
    (`lighthouse.checkpoint_contexts`). With `use_reentrant=False` a change of attention between a forward and its
    backward, by the switch or another forward, makes the backward a RuntimeError. While Lighthouse is enabled,
    training with reentrant checkpointing, by any road, is an error.

    Args:
        model: `LlamaModel` or `LlamaForCausalLM` of Transformers. A bare `LlamaModel` gets its input embedding as
            output matrix.
        pool_ratios, select_topk, cover_start: as in `lighthouse.attention` (METHOD 1 and 3).
        dense_layers: how many layers at each end stay dense; by default `min(2, max(1, layers // 6))`, none below
            three layers.
        inner: a callable for the short causal sequence, as in `lighthouse.attention`.
        eval: "dense", or "lighthouse" to keep Lighthouse when whole sequences are evaluated. Losses seen under
            Lighthouse are not comparable with dense ones (METHOD 8).
        loss: "chunked", which never holds the logits and has no second derivatives, or "model" for the model's own loss
            and its logits.
        min_tokens: sequences shorter than this, in tokens, run dense; by default the length measured for the device:
            512 on a CPU, 8,192 on CUDA.
        max_share: sequences whose sub-sequence is longer than this share of the tokens run dense.

    Returns:
        `model`.

    Raises:
        ImportError: without Transformers, naming what to install.
        TypeError, ValueError: before anything is changed, for a model or a setting that does not fit.
    """
    settings = LighthouseSettings(
        pool_ratios=pool_ratios,
        select_topk=select_topk,
        dense_layers=dense_layers,
        cover_start=cover_start,
        inner=inner,
        eval=eval,
        loss=loss,
        min_tokens=min_tokens,
        max_share=max_share,
    )
    return _huggingface().wrap(model, settings)


def unwrap(model):
    """Gives back the plain model: `model.unwrap()` with an error that says so when it is not wrapped.

    The configuration stays the model's own copy, equal in content to the one it came with but for later changes.
    Raises `ValueError` for a model that is not wrapped, or no longer: there `model.unwrap()` is an AttributeError,
    since nothing of Lighthouse stays on the plain model.
    """
    if not callable(getattr(model, "unwrap", None)) or not hasattr(model, "lighthouse_settings"):
        raise ValueError(f"this {type(model).__name__} is not wrapped by LighthouseWrapper, or no longer")
    return model.unwrap()


def _huggingface():
    try:
        import transformers  # noqa: F401
    except ImportError as error:
        raise ImportError(
            'LighthouseWrapper needs Transformers, which is not installed here: pip install "lighthouse-attn[train]"'
        ) from error
    from lighthouse import huggingface

    return huggingface


def _check_whole_number(name: str, value) -> None:
    if value is None:
        return
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{name}={value!r}: a whole number is needed")
    if value < 0:
        raise ValueError(f"{name}={value}: zero or more is needed")


def _check_choice(name: str, value, allowed: tuple[str, ...]) -> None:
    if value not in allowed:
        raise ValueError(f"{name}={value!r}: one of {', '.join(map(repr, allowed))} is needed")
