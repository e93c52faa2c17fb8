"""`LighthouseWrapper`: a model trains with Lighthouse attention and stays the same objects.

What a model of Transformers needs is in `lighthouse.huggingface`, which is imported when the first model is wrapped, so
that `import lighthouse` needs only torch.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from torch import nn

from lighthouse.core.method import POOL_RATIOS, SELECT_TOPK, Method
from lighthouse.core.settings import MAX_SHARE, RECOMMENDED, LighthouseSettings


def LighthouseWrapper(
    model,
    *,
    pool_ratios: Sequence[float] = POOL_RATIOS,
    select_topk: int | float = SELECT_TOPK,
    dense_layers: int | None = None,
    cover_start: bool = True,
    local_window: int = RECOMMENDED.local_window,
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

    The wrapped model is called like the plain one, or with a batch, `model(batch)`, which always gives a loss: without
    `labels` in the batch, the input ids are the labels. A batch is a mapping of tensors, or one tensor of ids
    `[batch, tokens]` in a tuple or list, as `TensorDataset` has it; `model(ids)` with the bare tensor is the plain
    model's call, without labels. With labels the result has `loss`, and `logits` is None (see `loss`). It has in
    addition

    - `unwrap()`: the plain model again, the same object; warns if it had no, or hardly any, dense training;
    - `lighthouse(enabled)`: switches Lighthouse off or on in place; parameters and optimizer are untouched;
    - `lighthouse_enabled`, `lighthouse_settings`;
    - `take_used()`: which attention the training forwards since its last call ran.

    Each forward is either Lighthouse's or, to the last bit, the plain model's. In `eval()`, in `generate`, with a
    key-value cache and where Lighthouse would not pay, the plain model's attention and masks run, which is logged once.
    Where Lighthouse acts, anything it does not support is an error: a padding mask that hides anything,
    packed documents, masks of other shapes, sliding windows, soft-capping, attention sinks, keywords that it does not
    know, sequences longer than the model's `max_position_embeddings`, tensors on a device that this build has no
    kernels for.

    What is replaced must be Transformers' own. This is checked when the model is wrapped, at the switch, in `train()`
    and in each forward (of a model compiled as a whole, only when it is traced): attention modules, functions and masks
    of the user's own, replaced entries of Transformers' registry (sequence parallelism) and context parallelism are
    errors.
    A forward or loss function of the user's own, and hooks on the output layer, need `loss="model"`; if a hook is
    added later, the model's own loss is used, logged once. Layers that are inserted, copied or removed follow the
    model; calling a part of it by itself is an error where Lighthouse would act.

    Gradient checkpointing keeps the choice of each layer: the backward never chooses again
    (`lighthouse.checkpoint_contexts`). With `use_reentrant=False` a change of attention between a forward and its
    backward, by the switch or another forward, makes the backward a RuntimeError. While Lighthouse is enabled,
    training with reentrant checkpointing is an error, however it is enabled.

    Args:
        model: `LlamaModel` or `LlamaForCausalLM` of Transformers. A bare `LlamaModel` gets its input embedding as
            output matrix.
        pool_ratios, select_topk, cover_start: as in `lighthouse.attention` (METHOD 1 and 3).
        local_window: as in `lighthouse.attention` (METHOD 5a), but 256 by default: runs with it end lower. 0 is the
            published method.
        dense_layers: how many layers at each end stay dense; by default none with a local window, and without one
            `min(2, max(1, layers // 6))`, none below three layers.
        inner: a callable for the short causal sequence and the local window, as in `lighthouse.attention`.
        eval: "dense", or "lighthouse" to keep Lighthouse when whole sequences are evaluated. Losses measured with
            Lighthouse are not comparable with dense ones (METHOD 8).
        loss: "chunked", which never holds the logits and has no second derivatives, or "model" for the model's own loss
            and its logits. An evaluation of a Trainer that asks for predictions has the model's own in any case.
        min_tokens: sequences shorter than this, in tokens, run dense; by default the length measured for the device:
            512 on a CPU, 8,192 on CUDA.
        max_share: sequences whose sub-sequence is longer than this share of the tokens run dense.

    Returns:
        `model`.

    Raises:
        ImportError: without Transformers, or with one that is too old, naming what to install.
        TypeError, ValueError: before anything is changed, for a model or a setting that does not fit.
    """
    settings = LighthouseSettings(
        method=Method(pool_ratios, select_topk, cover_start, local_window),
        dense_layers=dense_layers,
        inner=inner,
        eval=eval,
        loss=loss,
        min_tokens=min_tokens,
        max_share=max_share,
    )
    from lighthouse import huggingface

    return huggingface.wrap(model, settings)


def unwrap(model):
    """Gives back the plain model: `model.unwrap()` with a clear error if it is not wrapped.

    The configuration stays the model's own copy, equal in content to the one it came with but for later changes.
    Raises `ValueError` for a model that is not wrapped, or no longer: then `model.unwrap()` is an AttributeError,
    since the plain model keeps nothing of Lighthouse.
    """
    if not callable(getattr(model, "unwrap", None)) or not hasattr(model, "lighthouse_settings"):
        modules = model.modules() if isinstance(model, nn.Module) else ()
        inside = next((type(module).__name__ for module in modules if hasattr(module, "lighthouse_settings")), None)
        hint = f"; the {inside} in it is: unwrap that one" if inside else ", or no longer"
        raise ValueError(f"this {type(model).__name__} is not wrapped by LighthouseWrapper{hint}")
    return model.unwrap()
