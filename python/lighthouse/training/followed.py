"""Which options of Transformers' Trainer a run follows, and what is refused because it would not be.

Every field of `TrainingArguments` is in one of these tables. The trap is the option that the Trainer takes and that
then does nothing, or something else than it says: it would be written down with the run as if it had been followed.
"""

from __future__ import annotations

import dataclasses
import logging
import os

from transformers import Trainer, TrainingArguments
from transformers.trainer_utils import SchedulerType

from lighthouse.training.configuration import changed
from lighthouse.training.model import empty_model
from lighthouse.training.options import WITHOUT_WARM_UP, TrainingOptions

logger = logging.getLogger(__name__)

# Options that a run follows.
FOLLOWED = frozenset(
    "output_dir per_device_train_batch_size max_steps learning_rate lr_scheduler_type lr_scheduler_kwargs "
    "warmup_steps warmup_ratio optim optim_args optim_target_modules weight_decay adam_beta1 adam_beta2 adam_epsilon "
    "gradient_accumulation_steps max_grad_norm label_smoothing_factor bf16 fp16 tf32 activation_checkpointing "
    "activation_checkpointing_kwargs gradient_checkpointing gradient_checkpointing_kwargs torch_compile "
    "torch_compile_backend torch_compile_mode neftune_noise_alpha torch_empty_cache_steps logging_strategy "
    "logging_steps logging_first_step logging_dir log_on_each_node include_num_input_tokens_seen "
    "include_tokens_per_second log_level log_level_replica disable_tqdm report_to run_name project trackio_space_id "
    "trackio_bucket_id trackio_static_space_id eval_strategy eval_steps eval_delay per_device_eval_batch_size "
    "eval_on_start eval_accumulation_steps save_strategy save_steps save_on_each_node save_total_limit push_to_hub "
    "hub_token hub_private_repo hub_model_id hub_strategy hub_always_push hub_revision load_best_model_at_end "
    "metric_for_best_model greater_is_better full_determinism seed data_seed use_cpu accelerator_config "
    "dataloader_num_workers dataloader_pin_memory dataloader_persistent_workers dataloader_prefetch_factor "
    "dataloader_multiprocessing_context train_sampling_strategy ddp_find_unused_parameters ddp_bucket_cap_mb "
    "ddp_broadcast_buffers ddp_static_graph ddp_backend ddp_timeout fsdp fsdp_config deepspeed debug "
    "skip_memory_metrics resume_from_checkpoint".split()
)

# Options that nothing depends on here: rows are of one length and steps whole, all of the held-out loss is kept and no
# other prediction, a loss that is not finite ends the run, and which process this is comes from the launcher.
NOTHING_DEPENDS_ON = frozenset(
    "average_tokens_across_devices dataloader_drop_last remove_unused_columns logging_nan_inf_filter "
    "prediction_loss_only eval_do_concat_batches eval_use_gather_object do_train do_eval local_rank "
    "save_safetensors".split()
)

_NO_METRICS = "the held-out loss is the one metric of a run"
_ONE_PRECISION = "the held-out loss is measured in the precision of training, and the weights stay in float32"

# Options that must stay as they are by default, and why.
REFUSED = {
    "auto_find_batch_size": "the steps' tokens would change within the run",
    "batch_eval_metrics": _NO_METRICS,
    "bf16_full_eval": _ONE_PRECISION,
    "dataloader_in_order": "rows would come in an order by chance, and a resumed run would be another",
    "do_predict": "there is nothing to predict here",
    "enable_jit_checkpoint": "SIGTERM saves a checkpoint already, and in a way that resumes to the same losses",
    "fp16_full_eval": _ONE_PRECISION,
    "group_by_length": "all rows are one context long",
    "ignore_data_skip": "a resumed run would begin the text again",
    "include_for_metrics": _NO_METRICS,
    "include_inputs_for_metrics": _NO_METRICS,
    "jit_mode_eval": "the model that is trained is the one that is evaluated",
    "label_names": "a batch has labels, and no others",
    "length_column_name": "all rows are one context long",
    "liger_kernel_config": "Liger's kernels are not used here",
    "mp_parameters": "SageMaker's model parallelism is not supported",
    "num_train_epochs": "max_steps (--steps) says how long a run is",
    "overwrite_output_dir": "a folder that holds a run is never written over",
    "parallelism_config": "a sequence is on one device: Lighthouse chooses among all of its tokens",
    "past_index": "nothing is passed from one step to the next",
    "restore_callback_states_from_checkpoint": "what a run keeps is restored already",
    "save_only_model": "no run could go on from such checkpoints",
    "use_cache": "with a key-value cache attention is dense, so training never has one",
    "use_legacy_prediction_loop": "the held-out loss is measured in one way",
    "use_liger_kernel": "it puts another forward in the place of the one that Lighthouse is in",
}

# Options that do something only where another is set.
ONLY_WITH = {
    "activation_checkpointing_kwargs": "activation_checkpointing",
    "gradient_checkpointing_kwargs": "gradient_checkpointing",
    "fsdp_config": "fsdp",
    "metric_for_best_model": "load_best_model_at_end",
    "greater_is_better": "load_best_model_at_end",
    "hub_model_id": "push_to_hub",
    "hub_private_repo": "push_to_hub",
    "hub_revision": "push_to_hub",
    "hub_strategy": "push_to_hub",
    "hub_always_push": "push_to_hub",
}

# What accelerate does by itself where a variable says so, as `accelerate launch` sets them, and the option for it.
BY_ENVIRONMENT = {
    "ACCELERATE_USE_FSDP": "fsdp",
    "ACCELERATE_USE_DEEPSPEED": "deepspeed",
    "ACCELERATE_DYNAMO_BACKEND": "torch_compile",
}

SAMPLED = ("random", "sequential")
COUNTED = ("all", "non_padding", "no")


def check_followed(training: TrainingOptions, config) -> None:
    """Raises `ValueError` for an option that a run would not follow. `config` is the model's."""
    known = FOLLOWED | NOTHING_DEPENDS_ON | REFUSED.keys()
    names = {field.name for field in dataclasses.fields(TrainingArguments) if field.init}
    different = {name for name in names if changed(training, name)}
    for name, why in REFUSED.items():
        if name in different:
            raise ValueError(f"{name}={getattr(training, name)!r}: {why}; leave it out")
    for name, other in ONLY_WITH.items():
        if name in different and not getattr(training, other, None):
            if other != "load_best_model_at_end" or not _needs_a_metric(training):
                raise ValueError(f"{name}={getattr(training, name)!r}: nothing is done with it without {other}")
    for name in sorted(different - known):
        logger.warning(f"{name}: an option not known here; whether a run follows it was not looked at.")
    _check_precision(training)
    _check_evaluation(training)
    _check_rows(training)
    _check_schedule(training)
    _check_optimizer(training, config)


def _check_precision(training: TrainingOptions) -> None:
    device = training.device.type
    if training.fp16 and device == "cpu":
        raise ValueError("fp16=True on a cpu device: nothing is trained in it there; take bf16, or leave it out")
    asked = "fp16" if training.fp16 else "bf16" if training.bf16 else "no"
    if training.mixed_precision != asked:
        raise ValueError(
            f"ACCELERATE_MIXED_PRECISION={training.mixed_precision} in the environment, where the options say "
            f"{'--' + asked if asked != 'no' else 'float32'}: take the variable away, or give --bf16 or --fp16"
        )
    for variable, option in BY_ENVIRONMENT.items():
        value = os.environ.get(variable, "").lower()
        if value not in ("", "0", "no", "false") and not getattr(training, option):
            raise ValueError(
                f"{variable}={value} in the environment, where the options have no {option}: take the variable away, "
                f"or give --{option}, which is kept with the run"
            )


def _needs_a_metric(training: TrainingOptions) -> bool:
    by_metric = ("reduce_lr_on_plateau", "greedy")
    best = str(getattr(training.save_strategy, "value", training.save_strategy)) == "best"
    return best or str(getattr(training.lr_scheduler_type, "value", training.lr_scheduler_type)) in by_metric


def _check_evaluation(training: TrainingOptions) -> None:
    metric = training.metric_for_best_model
    if metric is not None and metric.removeprefix("eval_") != "loss":
        raise ValueError(f"metric_for_best_model={metric!r}: {_NO_METRICS}; leave it out, or take loss")
    if training.greater_is_better:
        raise ValueError("greater_is_better=True: the best held-out loss is the smallest; leave it out")
    if training.push_to_hub and str(getattr(training.hub_strategy, "value", training.hub_strategy)) == "end":
        raise ValueError(
            "hub_strategy='end': checkpoints are pushed while a run trains, and nothing at its end; take every_save, "
            f"or upload the model afterwards: hf upload NAME {os.path.join(training.output_dir, 'model')}"
        )


def _check_rows(training: TrainingOptions) -> None:
    if training.label_smoothing_factor and training.fsdp:
        raise ValueError(
            f"label_smoothing_factor={training.label_smoothing_factor} with fsdp: the Trainer does not see that labels "
            "are to be shifted for a model in shards, and would train on wrong ones; leave one of them out"
        )
    if getattr(training.accelerator_config, "split_batches", False):
        raise ValueError(
            "accelerator_config: split_batches would make per_device_train_batch_size the rows of all devices; leave "
            "it out, and give the rows of one"
        )
    if (getattr(training.accelerator_config, "gradient_accumulation_kwargs", None) or {}).get("num_steps") is not None:
        raise ValueError(
            "accelerator_config: num_steps in gradient_accumulation_kwargs would change the rows of a step after its "
            "tokens were counted; leave it out, and give gradient_accumulation_steps"
        )
    counted = training.include_num_input_tokens_seen
    if counted not in COUNTED and not isinstance(counted, bool):  # which earlier versions keep
        raise ValueError(f"include_num_input_tokens_seen={counted!r}: take one of {', '.join(COUNTED)}")
    strategy = getattr(training, "train_sampling_strategy", "random")
    if strategy not in SAMPLED:
        raise ValueError(
            f"train_sampling_strategy={strategy!r}: all rows are one context long; take one of {', '.join(SAMPLED)}"
        )


def _check_schedule(training: TrainingOptions) -> None:
    if training.lr_scheduler_type not in WITHOUT_WARM_UP:
        return
    name = training.lr_scheduler_type.value
    if training.warmup_steps != 0:
        raise ValueError(
            f"warmup_steps={training.warmup_steps}: the schedule {name!r} has no warm-up; leave it out, or take "
            "constant_with_warmup"
        )
    if training.lr_scheduler_type == SchedulerType.CONSTANT and training.lr_scheduler_kwargs:
        raise ValueError(f"lr_scheduler_kwargs={training.lr_scheduler_kwargs!r}: the schedule {name!r} takes none")


def _check_optimizer(training: TrainingOptions, config) -> None:
    """Betas, epsilon and arguments that the optimizer is not given. Which are given its keywords tell."""
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
                f"{option}={getattr(training, option)!r}: the optimizer {name!r} is not given it; leave it out"
            )


def _same_without(option: str, given: str, keywords) -> bool:
    try:
        return given == keywords(**{option: None})
    except (RuntimeError, TypeError, ValueError):
        return False  # it cannot do without
