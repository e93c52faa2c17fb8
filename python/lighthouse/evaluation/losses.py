"""The loss of each token of a sequence, without holding the logits of all of them.

The model's own forward runs, except that its output layer gets one token only: its input, the last hidden states, is
kept, and the output layer is then applied to a block of tokens at a time. The trap: a model may change the logits
after the output layer (soft-capping, scaling), or make them in another way. So both ways are compared on a short
sequence first, bit for bit, and where they differ the model's own logits are used, all at once.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext

import torch
import torch.nn.functional as F
from transformers import PreTrainedModel

from lighthouse.huggingface.loss import chunk_tokens
from lighthouse.huggingface.wrapped import WrappedModel

logger = logging.getLogger("lighthouse")

COMPARED = 64  # tokens on which both ways are compared
TOGETHER = 2**14  # tokens of short sequences that go through the model together


@contextmanager
def dense(model: PreTrainedModel) -> Iterator[None]:
    """The model with dense attention, without dropout, gradients and compiled code; afterwards it is as it was.

    Compiled layers would be compiled again for each length of a sequence.
    """
    training, on = model.training, isinstance(model, WrappedModel) and model.lighthouse_enabled
    if isinstance(model, WrappedModel) and on:
        model.lighthouse(False)
    model.eval()
    try:
        with torch.no_grad(), torch.compiler.set_stance("force_eager"):
            yield
    finally:
        model.train(training)
        if isinstance(model, WrappedModel) and on:
            model.lighthouse(True)


class TokenLosses:
    """Called with ids, gives the losses of a model that is `dense`. `sample` `[1, N]` are ids of ordinary text."""

    def __init__(self, model: PreTrainedModel, sample: torch.Tensor, autocast: torch.dtype | None = None):
        if model.get_output_embeddings() is None:
            raise TypeError(
                f"model is a {type(model).__name__} without an output layer: a causal language model is needed"
            )
        self.model = model
        self.device = model.device
        self.autocast = autocast
        self.head = model.get_output_embeddings()
        self.vocabulary = 0  # numbers in a token's logits
        self.in_blocks = self._agrees(sample[:1, :COMPARED])
        if not self.in_blocks:
            logger.warning(
                "Lighthouse: the logits of %s are not those of its output layer alone, so they are held for all tokens "
                "of a sequence: long sequences need much memory",
                type(model).__name__,
            )

    def __call__(self, ids: torch.Tensor, at: torch.Tensor | None = None) -> tuple[torch.Tensor, torch.Tensor]:
        """The losses, nats, of the tokens at positions `at` `[B, P]`, and whether each is the likeliest there.

        ids `[B, N]`; positions are at least 1, and without `at` all from there on, `[B, N - 1]`. Float32 and bool, on
        the CPU.

        Raises `ValueError` for a loss that is not finite.
        """
        ids = ids.to(self.device, torch.int64)
        at = torch.arange(1, ids.shape[1]).expand(len(ids), -1) if at is None else at
        at = at.to(self.device)
        targets = ids.gather(1, at).flatten()
        hidden, logits = self._forward(ids, only_first=self.in_blocks)
        rows, logits_of = (
            (hidden, self._head) if self.in_blocks and hidden is not None else (logits, torch.nn.Identity())
        )
        before = at - 1
        places = (before + ids.shape[1] * torch.arange(len(ids), device=self.device)[:, None]).flatten()
        rows = rows.flatten(0, 1)
        losses, likeliest = [], []
        step = chunk_tokens(self.vocabulary)
        for start in range(0, len(targets), step):
            wanted = targets[start : start + step]
            logits = logits_of(rows[places[start : start + step]]).float()
            losses.append(F.cross_entropy(logits, wanted, reduction="none"))
            likeliest.append(logits.argmax(-1) == wanted)
        found = torch.cat(losses).view(at.shape).cpu()
        if not found.isfinite().all():
            raise ValueError(
                f"the model's losses are not finite in {self.autocast or self.model.dtype}: it needs another dtype, or "
                "its weights are damaged"
            )
        return found, torch.cat(likeliest).view(at.shape).cpu()

    def _forward(self, ids: torch.Tensor, only_first: bool = False) -> tuple[torch.Tensor | None, torch.Tensor]:
        """What the output layer is given, None if it is not called, and the model's logits: of the first token only."""
        caught: list[torch.Tensor] = []

        def catch(module, inputs):
            caught.extend(inputs)
            return (inputs[0][:, :1],) if only_first else None

        hook = self.head.register_forward_pre_hook(catch) if isinstance(self.head, torch.nn.Module) else None
        try:
            with self._precision():
                logits = self.model(input_ids=ids, use_cache=False).logits
        finally:
            if hook is not None:
                hook.remove()
        return caught[0] if len(caught) == 1 else None, logits

    def _head(self, hidden: torch.Tensor) -> torch.Tensor:
        with self._precision():
            return self.head(hidden)

    def _precision(self):
        return nullcontext() if self.autocast is None else torch.autocast(self.device.type, self.autocast)

    def _agrees(self, sample: torch.Tensor) -> bool:
        """Whether the output layer makes the model's logits of what it is given, and that is all tokens' states."""
        sample = sample.to(self.device, torch.int64)
        hidden, logits = self._forward(sample)
        self.vocabulary = logits.shape[-1]
        if hidden is None or hidden.shape[:2] != sample.shape:
            return False
        return torch.equal(self._head(hidden).float(), logits.float())


def rows_at_once(tokens: int) -> int:
    """Sequences of so many tokens that go through a model together."""
    return max(1, TOGETHER // tokens)
