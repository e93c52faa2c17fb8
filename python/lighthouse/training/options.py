"""What a run can be told, as dataclasses: Transformers' HfArgumentParser makes command line options of them.

`TrainingOptions` is Transformers' `TrainingArguments` with other defaults, so every option of the Trainer is there
under its own name. Each checks its own values; what needs the model or the text is checked in `run.prepare`.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field, fields
from fractions import Fraction

import torch
from transformers import TrainingArguments

from lighthouse.training.model import SIZES
from lighthouse.wrapper import LighthouseSettings


@dataclass(kw_only=True)
class ModelOptions:
    """Which model is trained, from scratch."""

    _argument_group_name = "model"

    model: str = field(default="tiny", metadata={"help": "Size of the Llama: " + "; ".join(map(str, SIZES.values()))})
    context: int = field(default=8192, metadata={"help": "Tokens in a sequence, in training and evaluation."})


@dataclass(kw_only=True)
class DataOptions:
    """Which text it is trained on."""

    _argument_group_name = "data"

    data: str | None = field(
        default=None,
        metadata={
            "help": "Folder of text files (UTF-8, searched to the bottom). By default the sources of the running "
            "Python's standard library. Files are joined with an end mark and cut to the context.",
            "metavar": "FOLDER",
        },
    )
    held_out: int = field(
        default=16,
        metadata={"help": "Contexts of held-out text in each evaluation. Whole files are held out, a tenth at most."},
    )


@dataclass(kw_only=True)
class LighthouseOptions:
    """How Lighthouse is used."""

    _argument_group_name = "lighthouse"

    share: float = field(
        default=0.6, metadata={"help": "Share of the steps that use Lighthouse, 0 to 1; the others are dense."}
    )
    pool_ratios: list[str] = field(
        default_factory=lambda: ["1/4", "1/16"],
        metadata={"help": "Pooling ratio of each level above the tokens: 1/4 or 0.25.", "metavar": "RATIO"},
    )
    select_topk: str = field(
        default="1/64",
        metadata={"help": "Parents chosen per level: a share of the tokens (1/64, 0.25) or a whole number (512)."},
    )
    dense_layers: int | None = field(
        default=None,
        metadata={"help": "Layers at each end that stay dense. By default a sixth of them, at least 1, at most 2."},
    )
    dense_only: bool = field(default=False, metadata={"help": "Train the plain model, for comparison."})


@dataclass(kw_only=True)
class PretrainOptions(ModelOptions, DataOptions, LighthouseOptions):
    """All of a run but what the Trainer itself is told (`TrainingOptions`).

    `pool_ratios` and `select_topk` may be numbers too; text such as "1/64" is turned into them.

    Raises `ValueError` or `TypeError` naming the option and the rule.
    """

    def __post_init__(self):
        if self.model not in SIZES:
            raise ValueError(f"model={self.model!r}: there is {', '.join(SIZES)}")
        size = SIZES[self.model]
        if self.context < 2:
            raise ValueError(f"context={self.context}: at least 2 tokens are needed")
        if self.context > size.max_context:
            raise ValueError(f"context={self.context}: model {self.model!r} allows at most {size.max_context} tokens")
        if self.held_out < 1:
            raise ValueError(f"held_out={self.held_out}: at least one context is needed")
        if not (math.isfinite(self.share) and 0 <= self.share <= 1):
            raise ValueError(f"share={self.share}: a share of the steps, 0 to 1, is needed")
        self.pool_ratios = [_number("pool_ratios", ratio) for ratio in self.pool_ratios]
        self.select_topk = _number("select_topk", self.select_topk)
        settings = LighthouseSettings(
            pool_ratios=self.pool_ratios, select_topk=self.select_topk, dense_layers=self.dense_layers
        )
        if not self.dense_only and self.share > 0:
            self.dense_layers = settings.for_layers(size.layers).dense_layers

    @property
    def uses_lighthouse(self) -> bool:
        """Whether any step may use Lighthouse."""
        return not self.dense_only and self.share > 0


@dataclass(kw_only=True)
class TrainingOptions(TrainingArguments):
    """Transformers' `TrainingArguments` with defaults for pre-training a small model.

    `max_steps` (also `--steps`) decides the length; `num_train_epochs` is not looked at. Steps are optimizer steps.
    """

    _argument_group_name = "training (every option of Transformers' TrainingArguments)"

    output_dir: str | None = field(
        default="runs/pretrain",
        metadata={"help": "Folder for the run: checkpoints, results, the final model.", "aliases": ["--output"]},
    )
    max_steps: int = field(default=1000, metadata={"help": "Optimizer steps.", "aliases": ["--steps"]})
    resume: bool = field(
        default=False, metadata={"help": "Go on from the last checkpoint in the output folder, in either stage."}
    )
    per_device_train_batch_size: int = field(default=1, metadata={"help": "Sequences per device and step."})
    per_device_eval_batch_size: int = field(default=1, metadata={"help": "Sequences per device in evaluation."})
    learning_rate: float = field(default=2e-3, metadata={"help": "Highest learning rate."})
    lr_scheduler_type: str = field(default="cosine", metadata={"help": "Schedule of the learning rate."})
    warmup_steps: float = field(default=0.1, metadata={"help": "Steps of warm-up, or below 1 their share."})
    weight_decay: float = field(default=0.1, metadata={"help": "Weight decay."})
    adam_beta2: float = field(default=0.95, metadata={"help": "AdamW's second beta."})
    logging_steps: float = field(default=10, metadata={"help": "A line each so many steps, or below 1 their share."})
    eval_strategy: str = field(default="steps", metadata={"help": "When the dense held-out loss is measured."})
    eval_steps: float | None = field(default=0.1, metadata={"help": "Steps between evaluations, or below 1 a share."})
    save_steps: float = field(default=0.1, metadata={"help": "Steps between checkpoints, or below 1 a share."})
    save_total_limit: int | None = field(default=2, metadata={"help": "Checkpoints kept."})
    report_to: str | None = field(default="tensorboard", metadata={"help": "Where logs go: tensorboard, none, ..."})
    bf16: bool = field(
        default=torch.cuda.is_available(), metadata={"help": "bfloat16 autocast, by default where there is a GPU."}
    )
    seed: int = field(default=42, metadata={"help": "Of the weights, the order of the text and what is held out."})

    def __post_init__(self):
        if self.max_steps < 1:
            raise ValueError(f"max_steps={self.max_steps}: at least one step is needed")
        super().__post_init__()
        if self.device.type == "cpu":
            self.dataloader_pin_memory = False  # there is nothing to pin for; torch would warn


def field_names(*classes) -> set[str]:
    """The options that these dataclasses declare themselves, without those they inherit."""
    return {f.name for cls in classes for f in fields(cls) if f.name in cls.__annotations__}


def _number(name: str, value) -> int | float:
    """`"1/64"` is 0.015625, `"512"` the number 512, `"1.0"` a share; numbers stay as they are."""
    if not isinstance(value, str):
        return value
    try:
        return int(value)
    except ValueError:
        pass
    try:
        return float(Fraction(value))
    except (ValueError, ZeroDivisionError):
        raise ValueError(f"{name}={value}: a number such as 512, 0.25 or 1/64 is needed") from None
