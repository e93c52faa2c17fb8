"""What an evaluation found, as plain numbers; `to_json` and `from_json` turn it into what JSON takes and back."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any

GAIN_NEEDED = 0.5  # nats a token: below that a model does not copy, and nothing can be said of distances


@dataclass(frozen=True)
class Stretch:
    """The mean loss, nats per token, of the tokens at positions `start` to `stop - 1`, and its standard error."""

    start: int
    stop: int
    loss: float
    error: float


@dataclass(frozen=True)
class LossByPosition:
    """The held-out loss, nats per token: of all tokens but the first of each row, and by their place in the context."""

    loss: float
    error: float  # standard, over rows
    rows: int
    stretches: list[Stretch]


@dataclass(frozen=True)
class CopyAt:
    """The loss on both appearances of a passage that lie `distance` tokens apart, nats per token.

    `error` is the standard error of the gain, over passages.
    """

    distance: int
    first: float
    second: float
    error: float

    @property
    def gain(self) -> float:
        """Nats per token that the second appearance costs less than the first."""
        return self.first - self.second


@dataclass(frozen=True)
class CopyLoss:
    """The loss on random passages that appear twice, by the distance between the two, nearest first.

    `chance` is the loss, nats per token, of a model that knows only which tokens a passage may have.
    """

    distances: list[CopyAt]
    passages: int
    passage_tokens: int
    cue_tokens: int  # at the front of both appearances, not counted
    alphabet: str
    chance: float

    @property
    def measurable(self) -> bool:
        """Whether the model copies over any distance; if not, nothing can be said of how far it does."""
        return any(at.gain > GAIN_NEEDED for at in self.distances)

    @property
    def reach(self) -> int:
        """The largest distance in tokens up to which it copies over each one measured; 0 if over none."""
        reach = 0
        for at in self.distances:
            if at.gain <= GAIN_NEEDED:
                break
            reach = at.distance
        return reach


@dataclass(frozen=True)
class PasskeyCell:
    """Keys hidden at `depth`, 0 at the beginning to 1 at the end, of `length` tokens.

    `accuracy` is the share of the trials in which each token of the key was the likeliest; `gain` the mean log
    probability of the key less that of a random other one, nats per key, and `error` its standard error over pairs.
    """

    length: int
    depth: float
    accuracy: float
    gain: float
    error: float


@dataclass(frozen=True)
class Passkey:
    """A grid of length and depth, by length and then by depth."""

    cells: list[PasskeyCell]
    trials: int  # of a cell
    digits: int

    @property
    def accuracy(self) -> float:
        """The mean of all cells."""
        return sum(cell.accuracy for cell in self.cells) / len(self.cells)

    @property
    def gain(self) -> float:
        """The mean of all cells."""
        return sum(cell.gain for cell in self.cells) / len(self.cells)


Part = LossByPosition | CopyLoss | Passkey


@dataclass(frozen=True)
class Evaluation:
    """All that was measured of one model with dense attention; a part that was not asked for is None.

    `settings` are those of `EvaluationSettings` by name, without `parts`.
    """

    context: int
    rows: int
    settings: dict[str, int] = field(default_factory=dict)
    loss: LossByPosition | None = None
    copy: CopyLoss | None = None
    passkey: Passkey | None = None

    def to_json(self) -> dict:
        return asdict(self)

    @classmethod
    def from_json(cls, values: dict) -> Evaluation:
        parts = {name: part_from_json(name, values.get(name)) for name in PARTS}
        return cls(context=values["context"], rows=values["rows"], settings=values["settings"], **parts)


# A part's name, its class, and what its list holds.
PARTS: dict[str, tuple[type, str, type]] = {
    "loss": (LossByPosition, "stretches", Stretch),
    "copy": (CopyLoss, "distances", CopyAt),
    "passkey": (Passkey, "cells", PasskeyCell),
}


def part_from_json(name: str, values: dict | None) -> Any:
    """What `asdict` made of one part, back; None stays None."""
    if values is None:
        return None
    kind, listed, item = PARTS[name]
    return kind(**values | {listed: [item(**each) for each in values[listed]]})
