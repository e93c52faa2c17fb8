"""Retrieval of a passkey: a sentence with a random number somewhere in a long text, and the question at its end.

The answer is not generated but read off one forward over text, question and key: a token of the key counts as right if
it was the likeliest after those before it, as greedy decoding would choose it. A small model gets no key right, so the
log probability of the key is compared with that of another one too, which is nowhere in the text. The trap: some
numbers are likelier than others in any text. So each two trials share text and keys: what is hidden in one is the other
key in the next, and what either key is worth by itself cancels.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

from lighthouse.evaluation.losses import TokenLosses, rows_at_once
from lighthouse.evaluation.positions import mean_and_error
from lighthouse.evaluation.results import Passkey, PasskeyCell
from lighthouse.text.tokenizer import Encoder

DIGITS = 5
HIDDEN = "\nThe pass key is {key}. Remember it: {key} is the pass key.\n"
QUESTION = "\nWhat is the pass key? The pass key is"
LENGTHS = 5  # at most, each twice the one before
SHORTEST = 256  # tokens


def lengths(context: int) -> list[int]:
    """Of the texts, in tokens, the last the whole context; none if that has fewer than `SHORTEST` tokens."""
    return sorted(context >> i for i in range(LENGTHS) if context >> i >= SHORTEST)


def depths(number: int) -> list[float]:
    """From 0, where the text begins, to 1, just before the question."""
    return [i / (number - 1) for i in range(number)]


def passkey(
    losses: TokenLosses,
    rows: torch.Tensor,
    encoder: Encoder,
    depths_tried: int,
    trials: int,
    seed: int,
    advance: Callable[[int], None],
) -> Passkey:
    """Hides `trials` keys, an even number, at each length and depth in text from the rows `[R, N]`.

    The keys are the same in every cell.
    """
    chance = torch.Generator().manual_seed(seed)
    pairs = 10 ** (DIGITS - 1) + torch.randint(9 * 10 ** (DIGITS - 1), (trials // 2, 2), generator=chance)
    pairs[:, 1] += pairs[:, 0] == pairs[:, 1]
    keys = torch.stack([pairs, pairs.flip(1)], 1).view(-1, 2)  # of each trial the key, and the other
    cells = []
    for length in lengths(rows.shape[1]):
        for depth in depths(depths_tried):
            right, gain = _cell(losses, rows, encoder, keys.tolist(), length, depth)
            both = mean_and_error(gain.view(-1, 2).mean(1))
            cells.append(PasskeyCell(length, depth, right.double().mean().item(), *both))
            advance(2 * trials * length)
    return Passkey(cells, trials, DIGITS)


def _cell(losses, rows, encoder, keys, length: int, depth: float) -> tuple[torch.Tensor, torch.Tensor]:
    """Of each trial, whether all tokens of the key were right, and the key's log probability less the other's."""
    texts, answers = [], []
    for trial, (key, other) in enumerate(keys):
        text = rows[trial // 2 % len(rows)].long()
        [hidden, asked, *ends] = _encoded(encoder, HIDDEN.format(key=key), QUESTION, *_answers(key, other))
        room = length - len(hidden) - max(map(len, ends))
        place = 1 + round(depth * (room - 1))  # the first token may be one that begins a text
        for end in ends:
            texts.append(torch.cat([text[:place], hidden, text[place:room], end]))
            begins = next((i for i, (a, b) in enumerate(zip(asked, end, strict=False)) if a != b), len(asked))
            before = len(texts[-1]) - len(end)
            answers.append(range(before + begins, before + len(end)))
    most = max(map(len, answers))
    whole = torch.stack(
        [torch.cat([text, text[-1:].expand(length - len(text))]) for text in texts]
    )  # nothing looks back
    at = torch.tensor([[*answer, *[answer[-1]] * (most - len(answer))] for answer in answers])
    counts = torch.tensor([[i < len(answer) for i in range(most)] for answer in answers])
    found, right = [], []
    size = rows_at_once(length)
    for batch, where in zip(whole.split(size), at.split(size), strict=True):
        loss, likeliest = losses(batch, where)
        found.append(loss.double())
        right.append(likeliest)
    log_probability = -(torch.cat(found) * counts).sum(1).view(-1, 2)
    all_right = (torch.cat(right) | ~counts).all(1).view(-1, 2)[:, 0]
    return all_right, log_probability[:, 0] - log_probability[:, 1]


def _answers(*keys: int) -> list[str]:
    return [f"{QUESTION} {key}" for key in keys]


def _encoded(encoder: Encoder, *texts: str) -> list[torch.Tensor]:
    return [torch.from_numpy(ids.astype("int64")) for ids in encoder([text.encode() for text in texts])]
