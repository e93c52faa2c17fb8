"""What a model makes of long contexts: three measures with dense attention, from the model, held-out rows and a seed.

    from lighthouse.evaluation import EvaluationSettings, evaluate

    found = evaluate(model, rows, tokenizer, EvaluationSettings(trials=4))      # rows: ids [R, N]
    print(found.loss.loss, found.copy.reach, found.passkey.accuracy)

The same arguments give the same numbers. The model is left as it was, wrapped or not.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

import torch
from tqdm.auto import tqdm
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from lighthouse.evaluation import copies, passkeys
from lighthouse.evaluation.copies import copy_loss
from lighthouse.evaluation.losses import TokenLosses, dense
from lighthouse.evaluation.passkeys import passkey
from lighthouse.evaluation.positions import loss_by_position
from lighthouse.evaluation.results import PARTS, Evaluation, Part
from lighthouse.text.tokenizer import Encoder, load_tokenizer

SHORTEST = {"loss": 2, "copy": copies.SHORTEST, "passkey": passkeys.SHORTEST}


@dataclass(frozen=True, kw_only=True)
class EvaluationSettings:
    """What is measured, and how often. Raises `ValueError` naming the setting and the rule."""

    parts: tuple[str, ...] = tuple(PARTS)
    passages: int = 32  # planted for each distance
    depths: int = 5  # at which a key is hidden
    trials: int = 8  # keys for each length and depth
    seed: int = 0  # of passages, their places, and keys

    def __post_init__(self):
        for part in self.parts:
            if part not in PARTS:
                raise ValueError(f"parts={part!r}: one of {', '.join(PARTS)} is needed")
        if not self.parts or len(set(self.parts)) < len(self.parts):
            raise ValueError(f"parts={' '.join(self.parts)!r}: at least one part, and each once, is needed")
        for name, least in {"passages": 1, "depths": 2, "trials": 2, "seed": 0}.items():
            if getattr(self, name) < least:
                raise ValueError(f"{name}={getattr(self, name)}: at least {least} is needed")
        if self.trials % 2:
            raise ValueError(f"trials={self.trials}: an even number is needed, since keys are tried in pairs")

    def of_parts(self) -> dict[str, int]:
        """All but which parts there are."""
        return {name: value for name, value in asdict(self).items() if name != "parts"}

    def check_context(self, context: int) -> None:
        """Raises `ValueError` if the context is too short for a part."""
        for part in self.parts:
            if context < SHORTEST[part]:
                raise ValueError(
                    f"context={context}: the part {part!r} needs at least {SHORTEST[part]} tokens; leave it out"
                )


def evaluate(
    model: PreTrainedModel,
    rows: torch.Tensor,
    tokenizer: PreTrainedTokenizerBase | None = None,
    settings: EvaluationSettings | None = None,
    *,
    autocast: torch.dtype | None = None,
    known: dict[str, Part] | None = None,
    found: Callable[[str, Part], None] = lambda name, part: None,
    progress: bool = False,
) -> Evaluation:
    """Measures a model's held-out loss by position, its copy loss by distance, and its retrieval of passkeys.

    Args:
        model: a causal language model on its device. A wrapped one is evaluated dense; dropout is off.
        rows: held-out sequences of ids `[R, N]`, on any device; N is the context of every measure.
        tokenizer: the one that made the ids; by default bytes.
        settings: which parts, how many trials, the seed.
        autocast: the dtype of a model that is trained under autocast; by default its weights' own.
        known: parts that were measured before with the same arguments, by name; they are not measured again.
        found: called with the name of each part and what was measured, when it is.
        progress: show a bar on standard error.

    Raises:
        ValueError: the context is too short for a part, ids are outside the model's vocabulary, or losses are not
            finite.
    """
    settings, known = settings or EvaluationSettings(), known or {}
    if rows.ndim != 2 or not len(rows):
        raise ValueError(f"rows has shape {list(rows.shape)}: at least one sequence, [rows, tokens], is needed")
    context = rows.shape[1]
    settings.check_context(context)
    encoder = Encoder(tokenizer or load_tokenizer(None))
    rows = rows.cpu()
    results: dict[str, Any] = {}
    with dense(model):
        losses = TokenLosses(model, rows, autocast)
        if not 0 <= rows.min() <= rows.max() < losses.vocabulary:
            raise ValueError(
                f"rows has ids up to {rows.max()}: the model's vocabulary has 0 to {losses.vocabulary - 1}"
            )
        for name in settings.parts:
            if name in known:
                results[name] = known[name]
                continue
            with tqdm(
                total=_tokens(name, rows, settings), desc=name, unit=" tokens", unit_scale=True, disable=not progress
            ) as bar:
                results[name] = _measure(name, losses, rows, encoder, settings, bar.update)
            found(name, results[name])
    return Evaluation(context, len(rows), settings.of_parts(), **results)


def _measure(name: str, losses: TokenLosses, rows, encoder: Encoder, settings: EvaluationSettings, advance) -> Part:
    if name == "loss":
        return loss_by_position(losses, rows, advance)
    if name == "copy":
        return copy_loss(losses, rows, encoder, settings.passages, settings.seed, advance)
    return passkey(losses, rows, encoder, settings.depths, settings.trials, settings.seed, advance)


def _tokens(name: str, rows: torch.Tensor, settings: EvaluationSettings) -> int:
    """That a part reads."""
    context = rows.shape[1]
    if name == "loss":
        return rows.numel()
    if name == "copy":
        return len(copies.distances(context)) * settings.passages * context
    return 2 * settings.depths * settings.trials * sum(passkeys.lengths(context))
