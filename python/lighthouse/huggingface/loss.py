"""Next-token loss that never holds the logits.

With long contexts and large vocabularies the logits are the largest tensor of a training step. Here the output layer
is applied to a stretch of tokens at a time, and both gradients are made right there, in the forward: three products
and no recomputation. The trap is sharded weights: FSDP and ZeRO gather a weight when the module that owns it is
called, so the whole loss is computed inside one call of the output layer, whose class is swapped for that
(`class_swap.py`).

Sums are float32, the weight's gradient too: in bfloat16, 128 stretches made its error seven times that of plain logits.
That is why torch 2.15's `linear_cross_entropy`, which works alike and in less memory, is not used: it sums the loss and
the weight's gradient in the inputs' dtype (a bfloat16 loss of 4,096 tokens by 16,384 classes was 15 % off), under
autocast it multiplies in float32, and it adds rows by `index_add_`, whose order on CUDA is random. `bench/loss.py`
compares the two.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import nn

from lighthouse.huggingface.class_swap import Swapped, swap

IGNORE_INDEX = -100

# A stretch has at least this many tokens, and more where the vocabulary is so small that its logits stay below
# `CHUNK_LOGITS` numbers: short stretches cost time (each adds to the whole gradient of the weight), long ones memory.
CHUNK_TOKENS = 2048
CHUNK_LOGITS = 2**24


def chunk_tokens(vocabulary: int) -> int:
    """The tokens in a stretch."""
    return max(CHUNK_TOKENS, CHUNK_LOGITS // vocabulary)


def multiplies(layer: type[nn.Module]) -> bool:
    """Whether modules of this class make logits by nothing but a product with their weight."""
    if issubclass(layer, OutputLayer):
        return layer.multiplies
    return layer.forward in (nn.Linear.forward, nn.Embedding.forward)


def name_of(layer: type) -> str:
    """With the package it comes from, since others have a `Linear` too."""
    return f"{layer.__name__} of {layer.__module__.partition('.')[0]}"


if TYPE_CHECKING:

    class _Layer(Swapped, nn.Linear):
        multiplies: bool

else:
    _Layer = Swapped


class OutputLayer(_Layer):
    """A module that makes logits, able to give the loss instead: called with targets too.

    An embedding is an output layer as well: the logits are then the products with its rows.
    """

    @classmethod
    def namespace(cls, plain: Any) -> dict:
        return {"multiplies": multiplies(plain)}

    def forward(self, hidden: torch.Tensor, targets: torch.Tensor | None = None) -> torch.Tensor:
        """With hidden states `[T, C]` and targets `[T]`: the sum of the losses, float32. Else as the plain one.

        Raises `TypeError` for a layer that makes its logits in another way than `nn.Linear`.
        """
        if targets is None:
            return super().forward(hidden)
        if not self.multiplies:
            raise TypeError(
                f"the output layer is a {name_of(type(self))}: the loss without logits needs a plain nn.Linear or "
                'nn.Embedding; use loss="model" for any other layer'
            )
        factors = hidden, self.weight, getattr(self, "bias", None)
        wanted = tuple(torch.is_grad_enabled() and x is not None and x.requires_grad for x in factors)
        device = hidden.device.type
        dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else self.weight.dtype
        return _SummedLoss.apply(*factors, targets, dtype, wanted)


class _SummedLoss(torch.autograd.Function):
    """The sum of the cross entropies of `hidden @ weight.T + bias`, float32; products are in `dtype`.

    The forward makes the gradients that are `wanted`, of hidden states, weight and bias; the backward only scales them.
    """

    @staticmethod
    def forward(ctx, hidden, weight, bias, targets, dtype, wanted):
        total = hidden.new_zeros((), dtype=torch.float32)
        factor, offset = weight.to(dtype), None if bias is None else bias.to(dtype)
        grad_hidden = torch.empty_like(hidden) if wanted[0] else None
        grad_weight = torch.zeros_like(weight, dtype=torch.float32) if wanted[1] else None
        grad_bias = torch.zeros_like(bias, dtype=torch.float32) if wanted[2] else None
        step = chunk_tokens(weight.shape[0])
        start, tokens = 0, hidden.shape[0]
        while start < tokens:  # a range() would compile once for every number of tokens, not only of stretches
            stretch = slice(start, start + step if start + step < tokens else tokens)
            start += step
            rows = hidden[stretch].to(dtype)
            ignored = (targets[stretch] == IGNORE_INDEX)[:, None]
            classes = targets[stretch, None].masked_fill(ignored, 0)
            error = F.log_softmax(F.linear(rows, factor, offset).float(), dim=-1)
            chosen = error.gather(1, classes)
            total = total - chosen.masked_fill(ignored, 0).sum()
            if not any(wanted):
                continue
            # The gradient of a token's logits: their probabilities, less one at its class.
            error = error.exp_().scatter_(1, classes, chosen.exp() - 1).to(dtype)
            if grad_hidden is not None:
                grad_hidden[stretch] = (error @ factor).masked_fill(ignored, 0)
            if grad_weight is not None:
                rows = rows.masked_fill(ignored, 0)
                if dtype == torch.float32:
                    grad_weight.addmm_(error.t(), rows)
                else:
                    grad_weight += error.t() @ rows
            if grad_bias is not None:
                grad_bias += error.masked_fill(ignored, 0).sum(0, dtype=torch.float32)
            del error  # before the next stretch's logits
        ctx.save_for_backward(grad_hidden, grad_weight, grad_bias)
        ctx.dtypes = hidden.dtype, weight.dtype, None if bias is None else bias.dtype
        return total

    @staticmethod
    def backward(ctx, grad_total):
        if torch.is_grad_enabled() and not torch.compiler.is_compiling():  # create_graph=True
            raise NotImplementedError(
                'the loss without logits has no second derivatives: use loss="model", which has them'
            )
        found = [
            None if gradient is None else _scaled(gradient, grad_total, dtype)
            for gradient, dtype in zip(ctx.saved_tensors, ctx.dtypes, strict=True)
        ]
        return *found, None, None, None


def _scaled(gradient: torch.Tensor, factor: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """`gradient` times a float32 number, multiplied in float32; a stretch at a time where that is not its own dtype."""
    if gradient.dtype == torch.float32:
        return (gradient * factor).to(dtype)
    found = torch.empty_like(gradient, dtype=dtype)
    start, rows = 0, gradient.shape[0]
    while start < rows:
        stretch = slice(start, start + CHUNK_TOKENS if start + CHUNK_TOKENS < rows else rows)
        start += CHUNK_TOKENS
        found[stretch] = gradient[stretch].float() * factor
    return found


def next_token_loss(
    output_layer: nn.Module,
    hidden: torch.Tensor,
    labels: torch.Tensor | None,
    *,
    num_items_in_batch: torch.Tensor | int | None = None,
    shift_labels: torch.Tensor | None = None,
    past_hooks: bool = False,
) -> torch.Tensor:
    """The mean over all predicted tokens of the cross entropy, without the logits. What Transformers' own loss gives.

    hidden `[B, N, C]`; labels `[B, N]`: the token at each position, -100 to ignore it; `shift_labels` `[B, N]`: the
    next token at each position, used instead. With `num_items_in_batch` the sum is divided
    by that number instead, as `Trainer` does for accumulated gradients. With `past_hooks` the layer's hooks do not run.

    Raises `ValueError` for labels of another shape.
    """
    for name, given in (("labels", labels), ("shift_labels", shift_labels)):
        if given is not None and given.shape != hidden.shape[:2]:
            raise ValueError(
                f"{name} is {list(given.shape)}, the batch {list(hidden.shape[:2])}: one label for each token is needed"
            )
    swap(output_layer, OutputLayer)
    if shift_labels is None:
        if labels is None:
            raise ValueError("labels=None: labels or shift_labels are needed for the loss")
        shift_labels = F.pad(labels, (0, 1), value=IGNORE_INDEX)[..., 1:]
    targets = shift_labels.reshape(-1).to(hidden.device)
    run = output_layer.forward if past_hooks else output_layer
    total = run(hidden.reshape(-1, hidden.shape[-1]), targets)
    if num_items_in_batch is None:
        num_items_in_batch = (targets != IGNORE_INDEX).sum()
    count = torch.as_tensor(num_items_in_batch, device=total.device)
    # Where nothing is predicted the mean is no number, as PyTorch's, and its gradient is zero.
    return torch.where(count > 0, total / count.clamp(min=1), torch.nan)
