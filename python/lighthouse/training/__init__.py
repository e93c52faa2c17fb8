"""Pre-training in two stages, Lighthouse then dense, on Transformers' Trainer.

    from lighthouse.training import PretrainOptions, TrainingOptions, pretrain

    result = pretrain(PretrainOptions(model="tiny", context=8192), TrainingOptions(output_dir="runs/a", max_steps=500))

Needs the `train` extra. It is looked for when this package is imported, so that a missing part is named at once and not
in the middle of a run.
"""

from lighthouse.training.extra import require_train_extra

require_train_extra()

from lighthouse.training.options import (  # noqa: E402
    DataOptions,
    LighthouseOptions,
    ModelOptions,
    PretrainOptions,
    TrainingOptions,
)
from lighthouse.training.result import (  # noqa: E402
    DiskFull,
    NotFinite,
    PretrainResult,
    Refused,
    RunFailed,
    Stopped,
    TextFailed,
)
from lighthouse.training.run import Run, prepare, pretrain  # noqa: E402

__all__ = [
    "DataOptions",
    "DiskFull",
    "LighthouseOptions",
    "ModelOptions",
    "NotFinite",
    "PretrainOptions",
    "PretrainResult",
    "Refused",
    "Run",
    "RunFailed",
    "Stopped",
    "TextFailed",
    "TrainingOptions",
    "prepare",
    "pretrain",
]
