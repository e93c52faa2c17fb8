"""Copy loss by distance: a random passage is planted in held-out text, and again some tokens later.

Nothing but its first appearance helps with the second, so what the second costs less is what the model carries over
that distance. The second appearance stands at the same place for every distance, and the passages are the same, so that
only the distance differs.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch

from lighthouse.evaluation.losses import TokenLosses, rows_at_once
from lighthouse.evaluation.positions import mean_and_error
from lighthouse.evaluation.results import CopyAt, CopyLoss
from lighthouse.text.tokenizer import Encoder

PASSAGE, CUE = 64, 8  # tokens planted, and of them those at the front that are not counted
FIRST = 256  # tokens, the shortest distance in a context of at least four times as many
LETTERS = b"abcdefghijklmnopqrstuvwxyz0123456789"
SHORTEST = 4 * PASSAGE  # tokens of a context in which something can be planted twice


def distances(context: int) -> list[int]:
    """In tokens, each twice the one before; none if the context has fewer than `SHORTEST` tokens."""
    first = FIRST
    while first > PASSAGE and 4 * first > context:
        first //= 2
    found = []
    while first <= context - 2 * PASSAGE - _play(context):
        found.append(first)
        first *= 2
    return found


def copy_loss(
    losses: TokenLosses, rows: torch.Tensor, encoder: Encoder, passages: int, seed: int, advance: Callable[[int], None]
) -> CopyLoss:
    """Plants `passages` passages, each in one of the rows `[R, N]`, which are used in turn."""
    context = rows.shape[1]
    alphabet, said = ordinary_tokens(encoder, losses.vocabulary)
    chance = torch.Generator().manual_seed(seed)
    planted = alphabet[torch.randint(len(alphabet), (passages, PASSAGE), generator=chance)]
    seconds = context - PASSAGE - torch.randint(_play(context), (passages,), generator=chance)
    hosts = rows[torch.arange(passages) % len(rows)].long()
    counted = torch.arange(CUE, PASSAGE)
    found = []
    for distance in distances(context):
        text, places = hosts.clone(), torch.stack([seconds - distance, seconds], 1)
        for row, passage, (first, second) in zip(text, planted, places.tolist(), strict=True):
            row[first : first + PASSAGE] = passage
            row[second : second + PASSAGE] = passage
        at, size = (places[:, :, None] + counted).flatten(1), rows_at_once(context)
        both = []
        for batch, where in zip(text.split(size), at.split(size), strict=True):
            both.append(losses(batch, where)[0].double().view(len(batch), 2, -1).mean(2))
            advance(batch.numel())
        first, second = torch.cat(both).unbind(1)
        found.append(CopyAt(distance, first.mean().item(), second.mean().item(), mean_and_error(first - second)[1]))
    return CopyLoss(found, passages, PASSAGE, CUE, said, math.log(len(alphabet)))


def ordinary_tokens(encoder: Encoder, vocabulary: int) -> tuple[torch.Tensor, str]:
    """The ids that a passage is made of, and what they are called: no special or added token is one."""
    if encoder.is_bytes:
        [ids] = encoder([LETTERS])
        return torch.from_numpy(ids.astype("int64")), "letters and digits"
    tokenizer = encoder.tokenizer
    special = {*tokenizer.all_special_ids, *tokenizer.added_tokens_decoder}
    ordinary = sorted(i for i in set(tokenizer.get_vocab().values()) - special if i < vocabulary)
    return torch.tensor(ordinary), "tokens of the vocabulary"


def _play(context: int) -> int:
    """Tokens over which the places of the second appearances are spread, at the end of the context."""
    return min(128, context // 8)
