"""Options that are refused before any work, because a run would ignore them or do something else.

What the text, the folder or the machine's memory do not allow is checked where these are known.
"""

from __future__ import annotations

import dataclasses
import logging
import os
from contextlib import contextmanager
from typing import cast

import torch
from transformers import Trainer, TrainingArguments, get_scheduler
from transformers.integrations import get_reporting_integration_callbacks
from transformers.trainer_utils import SchedulerType
from transformers.utils.generic import ExplicitEnum

from lighthouse.core.settings import LighthouseSettings
from lighthouse.training.configuration import changed
from lighthouse.training.depends import NO_METRICS, OPTIONS
from lighthouse.training.memory import MemoryEstimate, estimate
from lighthouse.training.model import empty_model
from lighthouse.training.options import WITHOUT_WARM_UP, PretrainOptions, TrainingOptions

logger = logging.getLogger(__name__)

# Where accelerate silently runs copies instead of shards.
NOT_SHARDED_ON = frozenset({"cpu", "mps"})

# What accelerate does by itself where a variable says so, as `accelerate launch` sets them, and the option for it.
BY_ENVIRONMENT = {
    "ACCELERATE_USE_FSDP": "fsdp",
    "ACCELERATE_USE_DEEPSPEED": "deepspeed",
    "ACCELERATE_DYNAMO_BACKEND": "torch_compile",
}

SAMPLED = ("random", "sequential")
COUNTED = ("all", "non_padding", "no")


def check_together(options: PretrainOptions, training: TrainingOptions) -> None:
    """Refuses combinations of options that would silently do something else."""
    device = training.device.type
    if training.fsdp and (device in NOT_SHARDED_ON or training.world_size == 1):
        raise ValueError(
            f"fsdp with {training.world_size} process on a {device} device: sharding needs several processes on "
            "accelerators (torchrun --nproc_per_node 8 -m lighthouse.cli pretrain ...); without --fsdp each process "
            "holds a copy"
        )
    step = None if options.dense_only else options.switch_step
    if step is not None and step > training.max_steps > 0:
        logger.warning(
            f"switch_step={step} of {training.max_steps} steps: no step will be dense, so the model will "
            "not be ready for dense attention, unless the run is resumed with more steps."
        )
    if options.stream and training.data_seed is not None:
        raise ValueError(
            f"data_seed={training.data_seed} with stream: the order of a stream follows from seed; leave it out"
        )
    strategy = getattr(training, "train_sampling_strategy", "random")
    if options.stream and strategy != "random":
        raise ValueError(
            f"train_sampling_strategy={strategy!r} with stream: a stream is read in a random order, a different "
            "one in each pass; leave one of them out"
        )
    if options.stream and training.dataloader_num_workers > 1:
        raise ValueError(
            f"dataloader_num_workers={training.dataloader_num_workers} with stream: each would read the whole text; "
            "use one, which reads ahead"
        )


def check_followed(training: TrainingOptions, config) -> None:
    """Raises `ValueError` for an option that a run would not follow. `config` is the model's."""
    names = {field.name for field in dataclasses.fields(TrainingArguments) if field.init}
    different = {name: OPTIONS.get(name) for name in sorted(names) if changed(training, name)}
    for name, option in different.items():
        if option is not None and option.refused:
            raise ValueError(f"{name}={getattr(training, name)!r}: {option.refused}; leave it out")
    for name, option in different.items():
        other = option and option.only_with
        if other and not getattr(training, other, None):
            if other != "load_best_model_at_end" or not _needs_a_metric(training):
                raise ValueError(f"{name}={getattr(training, name)!r}: it has no effect without {other}")
        if option is None:
            logger.warning(f"{name}: Lighthouse does not know this option; whether a run follows it is not checked.")
    _check_precision(training)
    _check_evaluation(training)
    _check_rows(training)
    _check_schedule(training)
    _check_optimizer(training, config)
    _check_parts(training)


def _check_precision(training: TrainingOptions) -> None:
    device = training.device.type
    if training.fp16 and device == "cpu":
        raise ValueError("fp16=True on a cpu device: nothing is trained in fp16 there; use bf16, or leave it out")
    asked = "fp16" if training.fp16 else "bf16" if training.bf16 else "no"
    if training.mixed_precision != asked:
        raise ValueError(
            f"ACCELERATE_MIXED_PRECISION={training.mixed_precision} in the environment, but the options say "
            f"{'--' + asked if asked != 'no' else 'float32'}: unset the variable, or give --bf16 or --fp16"
        )
    for variable, option in BY_ENVIRONMENT.items():
        value = os.environ.get(variable, "").lower()
        if value not in ("", "0", "no", "false") and not getattr(training, option):
            raise ValueError(
                f"{variable}={value} in the environment, but the options have no {option}: unset the variable, or give "
                f"--{option}, which is saved with the run"
            )


def _needs_a_metric(training: TrainingOptions) -> bool:
    by_metric = ("reduce_lr_on_plateau", "greedy")
    best = str(getattr(training.save_strategy, "value", training.save_strategy)) == "best"
    return best or str(getattr(training.lr_scheduler_type, "value", training.lr_scheduler_type)) in by_metric


def _check_evaluation(training: TrainingOptions) -> None:
    metric = training.metric_for_best_model
    if metric is not None and metric.removeprefix("eval_") != "loss":
        raise ValueError(f"metric_for_best_model={metric!r}: {NO_METRICS}; leave it out, or use loss")
    if training.greater_is_better:
        raise ValueError("greater_is_better=True: the best held-out loss is the smallest; leave it out")
    if training.push_to_hub and str(getattr(training.hub_strategy, "value", training.hub_strategy)) == "end":
        raise ValueError(
            "hub_strategy='end': checkpoints are pushed during training, and nothing at the end; use every_save, "
            f"or upload the model afterwards: hf upload NAME {os.path.join(str(training.output_dir), 'model')}"
        )


def _check_rows(training: TrainingOptions) -> None:
    if training.label_smoothing_factor and training.fsdp:
        raise ValueError(
            f"label_smoothing_factor={training.label_smoothing_factor} with fsdp: for a sharded model the Trainer does "
            "not shift the labels, and would train on wrong ones; leave one of them out"
        )
    if getattr(training.accelerator_config, "split_batches", False):
        raise ValueError(
            "accelerator_config: split_batches would make per_device_train_batch_size the rows of all devices; leave "
            "it out, and give the rows of one device"
        )
    if (getattr(training.accelerator_config, "gradient_accumulation_kwargs", None) or {}).get("num_steps") is not None:
        raise ValueError(
            "accelerator_config: num_steps in gradient_accumulation_kwargs would change the rows of a step after its "
            "tokens were counted; leave it out, and give gradient_accumulation_steps"
        )
    counted = training.include_num_input_tokens_seen
    if counted not in COUNTED and not isinstance(counted, bool):  # which earlier versions keep
        raise ValueError(f"include_num_input_tokens_seen={counted!r}: use one of {', '.join(COUNTED)}")
    strategy = getattr(training, "train_sampling_strategy", "random")
    if strategy not in SAMPLED:
        raise ValueError(
            f"train_sampling_strategy={strategy!r}: all rows are one context long; use one of {', '.join(SAMPLED)}"
        )


def _check_schedule(training: TrainingOptions) -> None:
    if training.lr_scheduler_type not in WITHOUT_WARM_UP:
        return
    name = SchedulerType(training.lr_scheduler_type).value
    if training.warmup_steps != 0:
        raise ValueError(
            f"warmup_steps={training.warmup_steps}: the schedule {name!r} has no warm-up; leave it out, or use "
            "constant_with_warmup"
        )
    if training.lr_scheduler_type == SchedulerType.CONSTANT and training.lr_scheduler_kwargs:
        raise ValueError(f"lr_scheduler_kwargs={training.lr_scheduler_kwargs!r}: the schedule {name!r} takes none")


def _check_optimizer(training: TrainingOptions, config) -> None:
    """Refuses betas, epsilon and arguments that the optimizer does not get, as its keywords show."""
    model, name = empty_model(config), getattr(training.optim, "value", training.optim)

    def keywords(**changes) -> str:
        before = {option: getattr(training, option) for option in changes}
        try:
            for option, value in changes.items():
                setattr(training, option, value)
            return str(Trainer.get_optimizer_cls_and_kwargs(training, model))
        finally:
            for option, value in before.items():
                setattr(training, option, value)

    if training.optim_args and any("=" not in part for part in training.optim_args.split(",")):
        raise ValueError(f"optim_args={training.optim_args!r}: pairs such as 'a=1,b=2' are needed")
    try:
        given = keywords()
    except (ImportError, RuntimeError, TypeError, ValueError) as error:
        raise ValueError(f"optim={name!r}: {error}") from error
    for option in ("adam_beta1", "adam_beta2", "adam_epsilon"):
        if changed(training, option) and given == keywords(**{option: getattr(training, option) / 2}):
            raise ValueError(f"{option}={getattr(training, option)}: the optimizer {name!r} has none; leave it out")
    for option in ("optim_args", "optim_target_modules"):
        if getattr(training, option, None) and _same_without(option, given, keywords):
            raise ValueError(
                f"{option}={getattr(training, option)!r}: the optimizer {name!r} does not get it; leave it out"
            )


def _same_without(option: str, given: str, keywords) -> bool:
    try:
        return given == keywords(**{option: None})
    except (RuntimeError, TypeError, ValueError):
        return False  # it cannot do without


def _check_parts(training: TrainingOptions) -> None:
    """The Trainer's own parts that it would make only when all else is ready: here, their packages and arguments."""
    with _named("report_to", training.report_to):
        for callback in get_reporting_integration_callbacks(training.report_to):
            callback()
    if training.torch_compile and training.torch_compile_mode is not None:
        from torch._inductor import list_mode_options  # takes a second

        modes = list_mode_options()
        if training.torch_compile_backend in (None, "inductor") and training.torch_compile_mode not in modes:
            raise ValueError(f"torch_compile_mode={training.torch_compile_mode!r}: one of {', '.join(modes)} is needed")
    with _named("lr_scheduler_kwargs", training.lr_scheduler_kwargs):
        optimizer = torch.optim.SGD([torch.zeros(1)], lr=training.learning_rate)
        steps = {"num_warmup_steps": training.get_warmup_steps(training.max_steps)}
        schedule = get_scheduler(
            training.lr_scheduler_type,
            optimizer,
            **steps,
            num_training_steps=training.max_steps,
            scheduler_specific_kwargs=cast(dict | None, training.lr_scheduler_kwargs),  # which the Trainer has read
        )
        for rate in getattr(schedule, "lr_lambdas", ()):
            rate(training.max_steps - 1)  # what it does with its arguments after the warm-up


@contextmanager
def _named(name: str, value):
    """Adds to an error the option it comes from."""
    try:
        yield
    except (ImportError, RuntimeError, TypeError, ValueError) as error:
        value = value.value if isinstance(value, ExplicitEnum) else value
        raise ValueError(f"{name}={value!r}: {error}") from error


def memory_of(options: PretrainOptions, training: TrainingOptions, config, *, dense: bool) -> MemoryEstimate:
    """The estimate for one of a run's stages."""
    settings = LighthouseSettings(options.method, options.dense_layers)
    sharded = bool(training.fsdp) or training.deepspeed is not None
    return estimate(
        config,
        options.context,
        rows=training.per_device_train_batch_size,
        bf16=training.bf16,
        lighthouse=None if dense else settings,
        gradient_checkpointing=training.gradient_checkpointing or getattr(training, "activation_checkpointing", False),
        optimizer=training.optim.value if isinstance(training.optim, ExplicitEnum) else str(training.optim),
        accumulation=training.gradient_accumulation_steps,
        compiled=training.torch_compile or options.compile_layers,
        logits=training.label_smoothing_factor != 0,
        shards=training.world_size if sharded else 1,
    )
