"""A Trainer of a small Llama, and what may stand around the model or in it."""

from __future__ import annotations

from torch import nn
from transformers import LlamaModel, Trainer, TrainingArguments

from small_llama import ids, wrapped


def bare(**settings):
    return wrapped(LlamaModel, **settings)


def rows(labels=True, count=4):
    return [{"input_ids": row, **({"labels": row} if labels else {})} for row in ids(count)]


def trainer(model, folder, data=None, callbacks=(), evaluated=None, metrics=None, **arguments) -> Trainer:
    """Of two steps on a CPU, with `arguments` changed, and no file written."""
    arguments = {"max_steps": 2, "use_cpu": True, "report_to": "none", "disable_tqdm": True, **arguments}
    arguments = {"save_strategy": "no", "logging_strategy": "no", "per_device_eval_batch_size": 2, **arguments}
    return Trainer(
        model=model,
        args=TrainingArguments(str(folder), **arguments),
        train_dataset=rows() if data is None else data,
        eval_dataset=evaluated,
        compute_metrics=metrics,
        callbacks=list(callbacks),
    )


class Container(nn.Module):
    """Stands between a Trainer and the model, as PEFT's does."""

    def __init__(self, *models):
        super().__init__()
        self.base_model = nn.ModuleList(models)

    def forward(self, input_ids=None, labels=None, **kwargs):
        return self.base_model[0](input_ids=input_ids, labels=labels, **kwargs)


class Doubled(nn.Linear):
    def forward(self, hidden):
        return 2 * super().forward(hidden)
