"""Next-token loss that never holds the logits.

With long contexts and large vocabularies the logits are the largest tensor of a training step. Here the output layer
is applied to a stretch of tokens at a time, and in the backward once more. The trap is sharded weights: FSDP and ZeRO
gather a weight when the module that owns it is called, so the whole loss is computed inside one call of the output
layer, whose class is swapped for that (`class_swap.py`).
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

from lighthouse.class_swap import Swapped, swap

IGNORE_INDEX = -100

# A stretch has at least this many tokens, and more where the vocabulary is so small that its logits stay below
# `CHUNK_LOGITS` numbers: short stretches cost time, long ones memory.
CHUNK_TOKENS = 1024
CHUNK_LOGITS = 2**24


class OutputLayer(Swapped):
    """A module that makes logits, able to give the loss instead: called with targets too.

    An embedding is an output layer as well: the logits are then the products with its rows.
    """

    def forward(self, hidden: torch.Tensor, targets: torch.Tensor | None = None) -> torch.Tensor:
        """With hidden states `[T, C]` and targets `[T]`: the sum of the losses, float32. Else as the plain one."""
        if targets is None:
            return super().forward(hidden)
        logits_of = self._product if isinstance(self, nn.Embedding) else super().forward
        step = max(CHUNK_TOKENS, CHUNK_LOGITS // self.weight.shape[0])
        total = hidden.new_zeros((), dtype=torch.float32)
        start, tokens = 0, hidden.shape[0]
        while start < tokens:  # a range() would compile once for every number of tokens, not only of stretches
            stretch = slice(start, start + step if start + step < tokens else tokens)
            start += step
            total = total + checkpoint(
                _summed_loss,
                logits_of,
                hidden[stretch],
                targets[stretch],
                use_reentrant=False,
                preserve_rng_state=False,
            )
        return total

    def _product(self, hidden: torch.Tensor) -> torch.Tensor:
        return F.linear(hidden, self.weight)


def _summed_loss(logits_of, hidden: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    return F.cross_entropy(logits_of(hidden).float(), targets, ignore_index=IGNORE_INDEX, reduction="sum")


def next_token_loss(
    output_layer: nn.Module,
    hidden: torch.Tensor,
    labels: torch.Tensor | None,
    *,
    num_items_in_batch: torch.Tensor | int | None = None,
    shift_labels: torch.Tensor | None = None,
) -> torch.Tensor:
    """The mean over all predicted tokens of the cross entropy, without the logits. What Transformers' own loss gives.

    hidden `[B, N, C]`; labels `[B, N]`, the token at each place, -100 where nothing is to be predicted;
    `shift_labels` `[B, N]`, the token behind each place, replaces them. With `num_items_in_batch` the sum is divided
    by that number instead, as `Trainer` does for accumulated gradients.
    """
    swap(output_layer, OutputLayer)
    if shift_labels is None:
        shift_labels = F.pad(labels, (0, 1), value=IGNORE_INDEX)[..., 1:]
    targets = shift_labels.reshape(-1).to(hidden.device)
    total = output_layer(hidden.reshape(-1, hidden.shape[-1]), targets)
    if num_items_in_batch is None:
        return total / (targets != IGNORE_INDEX).sum()
    if isinstance(num_items_in_batch, torch.Tensor):
        num_items_in_batch = num_items_in_batch.to(total.device)
    return total / num_items_in_batch
