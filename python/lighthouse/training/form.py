"""What a run is, as a flat mapping of plain JSON values: its options (`form_of`) and what it found (`found_by`).

`run.json` is the two together, and a run that is resumed or compared is compared by them. The first part is a pure
function: nothing is read, tokenized or built to know what a run would be.
"""

from __future__ import annotations

import json
from dataclasses import asdict, fields

from transformers import TrainingArguments

from lighthouse.core.devices import device_name
from lighthouse.text.data import Corpus
from lighthouse.training.options import PretrainOptions, TrainingOptions
from lighthouse.training.result import versions

# `resume_from_checkpoint` belongs to one start of a run, not to the run.
TRAINERS = tuple(f.name for f in fields(TrainingArguments) if f.init and f.name != "resume_from_checkpoint")


def tokens_per_step(options: PretrainOptions, training: TrainingOptions) -> int:
    """Of one optimizer step, on all devices."""
    rows = training.train_batch_size * training.gradient_accumulation_steps * training.world_size
    return rows * options.context


def form_of(options: PretrainOptions, training: TrainingOptions) -> dict:
    """Every option of a run by name, and what follows from options alone: `tokens_per_step`, `lighthouse_steps`.

    The latter as planned: if a run resumes with another number of steps, a share's switch stays where it was.
    """
    values, tokens = training.to_dict(), tokens_per_step(options, training)
    form = asdict(options) | {name: values[name] for name in TRAINERS}
    form |= {"tokens_per_step": tokens, "lighthouse_steps": options.lighthouse_steps(training.max_steps, tokens)}
    return json.loads(json.dumps(form, default=str))


def found_by(training: TrainingOptions, corpus: Corpus) -> dict:
    """The text, its tokenizer, the processes, devices and versions that a run has; `rows` once the rows are made."""
    found = {
        "text": corpus.fingerprint,
        "tokenizer_identity": corpus.encoder.identity,
        "processes": training.world_size,
        "devices": training.world_size * max(1, training.n_gpu),
        "device": training.device.type,
        "device_name": device_name(training.device),
        "versions": versions(),
    }
    rows = corpus.rows_fingerprint
    return found if rows is None else found | {"rows": rows}
