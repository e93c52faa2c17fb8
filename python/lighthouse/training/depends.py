"""What depends on each option of a run: one table, from which follows what is refused, and what may change.

Every field of `TrainingArguments` is in it. Some options that the Trainer accepts do nothing here, or something else;
they would be recorded with the run as if they had taken effect. The loss is assumed to depend on an option that is not
in the table, such as the model's size or one of a later version of Transformers.
"""

from __future__ import annotations

from dataclasses import dataclass

LOSS = "the loss"
TEXT = "where the text and its tokenizer lie; what these are is compared instead"
MEASURED = "how long a run is, and when which losses are measured"
COST = "the time or the memory of a step"
SHOWN = "what is shown, kept and published, and how rows are fetched"
NOTHING = "nothing here"


@dataclass(frozen=True)
class Option:
    """What depends on an option, why it must stay as by default, and which other must be set for it to do anything."""

    depends: str
    refused: str | None = None
    only_with: str | None = None


def _each(names: str, depends: str, *, only_with: str | None = None) -> list[tuple[str, Option]]:
    return [(name, Option(depends, only_with=only_with)) for name in names.split()]


def _refused(why: str, *names: str, depends: str = LOSS) -> list[tuple[str, Option]]:
    return [(name, Option(depends, refused=why)) for name in names]


NO_METRICS = "the held-out loss is the only metric of a run"
_ONE_LENGTH = "all rows are one context long"
_ONE_PRECISION = "the held-out loss is measured in the precision of training, and the weights stay in float32"

ROWS = [
    *_each("data dataset dataset_config tokenizer", TEXT),
    # The optimizer, its schedule and the rows of a step; the precision; how the model is compiled and cut.
    *_each("learning_rate lr_scheduler_type lr_scheduler_kwargs warmup_steps warmup_ratio optim optim_args", LOSS),
    *_each("optim_target_modules weight_decay adam_beta1 adam_beta2 adam_epsilon max_grad_norm", LOSS),
    *_each("per_device_train_batch_size gradient_accumulation_steps label_smoothing_factor neftune_noise_alpha", LOSS),
    *_each("seed data_seed full_determinism train_sampling_strategy accelerator_config bf16 fp16 tf32", LOSS),
    *_each("torch_compile torch_compile_backend torch_compile_mode average_tokens_across_devices", LOSS),
    *_each("ddp_find_unused_parameters ddp_bucket_cap_mb ddp_broadcast_buffers ddp_static_graph ddp_backend", LOSS),
    *_each("fsdp deepspeed", LOSS),
    *_each("fsdp_config", LOSS, only_with="fsdp"),
    # More steps stretch the schedule of the learning rate, which is printed.
    *_each("max_steps eval_strategy eval_steps eval_delay eval_on_start load_best_model_at_end", MEASURED),
    *_each("metric_for_best_model greater_is_better", MEASURED, only_with="load_best_model_at_end"),
    *_each("activation_checkpointing gradient_checkpointing torch_empty_cache_steps debug", COST),
    *_each("activation_checkpointing_kwargs", COST, only_with="activation_checkpointing"),
    *_each("gradient_checkpointing_kwargs", COST, only_with="gradient_checkpointing"),
    *_each("include_num_input_tokens_seen include_tokens_per_second dataloader_num_workers", COST),
    *_each("dataloader_pin_memory dataloader_persistent_workers dataloader_prefetch_factor", COST),
    *_each("output_dir resume resume_from_checkpoint save_strategy save_steps save_total_limit", SHOWN),
    *_each("save_on_each_node logging_strategy logging_steps logging_first_step logging_dir log_on_each_node", SHOWN),
    *_each("log_level log_level_replica disable_tqdm report_to run_name project trackio_space_id", SHOWN),
    *_each("trackio_bucket_id trackio_static_space_id skip_memory_metrics per_device_eval_batch_size", SHOWN),
    *_each("eval_accumulation_steps dataloader_multiprocessing_context ddp_timeout push_to_hub hub_token", SHOWN),
    *_each("hub_private_repo hub_model_id hub_strategy hub_always_push hub_revision", SHOWN, only_with="push_to_hub"),
    # The kind of device and the number of processes are compared by themselves.
    *_each("use_cpu", SHOWN),
    # Rows are of one length and steps whole, all of the held-out loss is kept and no other prediction, a loss that is
    # not finite ends the run, and which process this is comes from the launcher.
    *_each("dataloader_drop_last remove_unused_columns logging_nan_inf_filter prediction_loss_only", NOTHING),
    *_each("eval_do_concat_batches eval_use_gather_object do_train do_eval local_rank save_safetensors", NOTHING),
    *_refused("the steps' tokens would change within the run", "auto_find_batch_size"),
    *_refused("rows would come in a random order, and a resumed run would differ", "dataloader_in_order"),
    *_refused("this command makes no predictions", "do_predict", depends=NOTHING),
    *_refused("SIGTERM already saves a checkpoint, which resumes to the same losses", "enable_jit_checkpoint"),
    *_refused("a resumed run would start the text again", "ignore_data_skip"),
    *_refused("the model that is trained is the one that is evaluated", "jit_mode_eval"),
    *_refused("a batch has no labels but `labels`", "label_names"),
    *_refused("Liger's kernels are not used", "liger_kernel_config"),
    *_refused("SageMaker's model parallelism is not supported", "mp_parameters"),
    *_refused("max_steps (--steps) says how long a run is", "num_train_epochs", depends=NOTHING),
    *_refused("a folder that holds a run is never overwritten", "overwrite_output_dir"),
    *_refused("a sequence is on one device: Lighthouse chooses among all of its tokens", "parallelism_config"),
    *_refused("no state is passed from one step to the next", "past_index"),
    *_refused("a resumed run already restores its state", "restore_callback_states_from_checkpoint"),
    *_refused("no run could resume from such checkpoints", "save_only_model"),
    *_refused("with a key-value cache attention is dense, so training never has one", "use_cache"),
    *_refused("the held-out loss is measured in one way only", "use_legacy_prediction_loop"),
    *_refused("it replaces the forward that Lighthouse runs in", "use_liger_kernel"),
    *_refused(NO_METRICS, "batch_eval_metrics", "include_for_metrics", depends=NOTHING),
    *_refused(NO_METRICS, "include_inputs_for_metrics"),
    *_refused(_ONE_LENGTH, "group_by_length", "length_column_name"),
    *_refused(_ONE_PRECISION, "bf16_full_eval", "fp16_full_eval"),
]
OPTIONS = dict(ROWS)


def on_which(*depend: str) -> frozenset[str]:
    """The options on which what is named depends."""
    return frozenset(name for name, option in OPTIONS.items() if option.depends in depend)


# Options that may change on resuming, and options that may differ between compared runs.
FREE_ON_RESUME = on_which(MEASURED, COST, SHOWN, NOTHING)
FREE_BETWEEN_RUNS = on_which(SHOWN, NOTHING)
PLACES = on_which(TEXT)
