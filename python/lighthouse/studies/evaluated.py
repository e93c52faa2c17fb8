"""What a run's saved model makes of its context, measured on what the run held out, and kept in the run's folder."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM

from lighthouse.core.devices import device_name
from lighthouse.evaluation import Evaluation, EvaluationSettings, evaluate
from lighthouse.evaluation.kept import FILE, Kept
from lighthouse.text.data import Corpus
from lighthouse.training.options import TrainingOptions
from lighthouse.training.result import PretrainResult, versions
from lighthouse.training.resume import MODEL

PARTS = ("loss", "copy")
PASSAGES = 16  # planted for each distance


class NotEvaluated(Exception):
    """Why a model was not evaluated, as the end of a sentence."""


def evaluate_run(
    folder: Path, run: PretrainResult, corpus: Corpus, training: TrainingOptions, begins: Callable[[], None]
) -> Evaluation:
    """Measures the model of a finished run in `folder`, with dense attention in the precision of training.

    Parts for which the context is too short are left out; what was measured before is read. `begins` is called if there
    is something left to measure.

    Raises:
        NotEvaluated: its losses are not finite on random passages, or the device has too little memory.
    """
    settings = EvaluationSettings(parts=tuple(filter(lambda part: _fits(part, run.context), PARTS)), passages=PASSAGES)
    rows = torch.from_numpy(corpus.held_out.rows.astype("int64"))
    kept = _kept(
        folder,
        same={
            "weights": run.weights,
            "text": corpus.fingerprint,
            "context": run.context,
            "rows": len(rows),
            **settings.of_parts(),
        },
        about={"model": MODEL, "device": device_name(training.device), "versions": versions()},
    )
    if all(part in kept.parts for part in settings.parts):
        return kept.evaluation()
    begins()
    model: Any = AutoModelForCausalLM.from_pretrained(folder / MODEL, local_files_only=True)
    precision = torch.bfloat16 if training.bf16 else torch.float16 if training.fp16 else None
    try:
        evaluate(
            model.to(training.device),
            rows,
            corpus.encoder.tokenizer,
            settings,
            autocast=precision,
            known=kept.parts,
            found=kept.add,
            progress=not training.disable_tqdm,
        )
    except (ValueError, torch.OutOfMemoryError) as error:
        raise NotEvaluated(str(error).rstrip(".")) from error
    return kept.evaluation()


def _fits(part: str, context: int) -> bool:
    try:
        EvaluationSettings(parts=(part,)).check_context(context)
    except ValueError:
        return False
    return True


def _kept(folder: Path, same: dict, about: dict) -> Kept:
    """What was measured of the same model in the same way; what was measured otherwise is measured again."""
    with suppress(FileExistsError):
        return Kept(folder, same, about)
    (folder / FILE).unlink()
    return Kept(folder, same, about)
