"""Measuring what a causal language model makes of long contexts: loss by position, copies by distance, passkeys.

`evaluate` takes a model and rows of held-out ids, and knows no files; `command` is what `lighthouse evaluate` does with
it. Needs the `train` extra.
"""

from lighthouse.training.extra import require_train_extra

require_train_extra()

from lighthouse.evaluation.measure import EvaluationSettings, evaluate  # noqa: E402
from lighthouse.evaluation.results import (  # noqa: E402
    GAIN_NEEDED,
    CopyAt,
    CopyLoss,
    Evaluation,
    LossByPosition,
    Passkey,
    PasskeyCell,
    Stretch,
)

__all__ = [
    "GAIN_NEEDED",
    "CopyAt",
    "CopyLoss",
    "Evaluation",
    "EvaluationSettings",
    "LossByPosition",
    "Passkey",
    "PasskeyCell",
    "Stretch",
    "evaluate",
]
