"""Which options of Transformers' Trainer a run follows; settings and launches that are refused before any work."""

from __future__ import annotations

import os
from dataclasses import fields
from types import SimpleNamespace

import pytest
from transformers import TrainingArguments

from lighthouse.core.acting import acts, why_it_cannot_act
from lighthouse.core.method import Method, plan
from lighthouse.huggingface.processes import COUNTED_BY, strangers
from lighthouse.training import TrainingOptions, prepare
from lighthouse.training.checks import BY_ENVIRONMENT, check_followed
from lighthouse.training.depends import FREE_BETWEEN_RUNS, FREE_ON_RESUME, OPTIONS, ROWS
from lighthouse.training.model import new_config
from training_runs import CHECKPOINTING, options, training

CONFIG = new_config("nano", 128)
TRAINERS = {field.name for field in fields(TrainingArguments) if field.init}


def check(folder, **changes) -> None:
    check_followed(training(folder, **changes), CONFIG)


REFUSED = {name for name, option in OPTIONS.items() if option.refused}


def test_each_option_of_the_trainer_is_in_the_table_once():
    assert TRAINERS <= OPTIONS.keys() and len(ROWS) == len(OPTIONS)
    assert all(option.only_with in OPTIONS for option in OPTIONS.values() if option.only_with)


# An option, whether it may be another when a run goes on, and between runs that are compared.
DEPENDS = [
    ("learning_rate", False, False),
    ("bf16", False, False),
    ("data_seed", False, False),
    ("model", False, False),  # and every other of our own
    ("share", False, False),
    ("an_option_of_a_later_version", False, False),
    ("use_cache", False, False),  # refused
    ("max_steps", True, False),
    ("eval_steps", True, False),
    (CHECKPOINTING, True, False),
    ("dataloader_num_workers", True, False),
    ("save_steps", True, True),
    ("report_to", True, True),
    ("per_device_eval_batch_size", True, True),
    ("logging_nan_inf_filter", True, True),
    ("num_train_epochs", True, True),  # refused, and of no run a setting
]


@pytest.mark.parametrize("name, on_resume, between_runs", DEPENDS, ids=[case[0] for case in DEPENDS])
def test_what_may_be_another(name, on_resume, between_runs):
    assert (name in FREE_ON_RESUME, name in FREE_BETWEEN_RUNS) == (on_resume, between_runs)


CHANGED = {bool: lambda value: not value, int: lambda value: value + 1, float: lambda value: value + 1}


@pytest.mark.parametrize("name", sorted(REFUSED & TRAINERS - {"include_for_metrics", "parallelism_config"}))
def test_what_is_refused_is_refused_by_its_name(tmp_path, name):
    default = getattr(training(tmp_path), name)
    value = CHANGED.get(type(default), lambda value: "x")(default)
    checked = training(tmp_path)
    setattr(checked, name, value)
    with pytest.raises(ValueError, match=f"^{name}="):
        check_followed(checked, CONFIG)


NOT_FOLLOWED = [
    ("half_precision_on_a_cpu", {"fp16": True}, "fp16=True on a cpu device: .* use bf16"),
    ("epochs", {"num_train_epochs": 1.0}, r"num_train_epochs=1.0: max_steps \(--steps\) says how long"),
    ("as_many_epochs_as_the_trainers_default", {"num_train_epochs": 3.0}, "num_train_epochs=3.0"),
    (
        "arguments_of_what_is_off",
        {f"{CHECKPOINTING}_kwargs": {"a": 1}},
        f"it has no effect without {CHECKPOINTING}",
    ),
    ("shards_of_nothing", {"fsdp_config": {"a": 1}}, "fsdp_config=.* without fsdp"),
    ("a_best_model_that_is_not_loaded", {"metric_for_best_model": "loss"}, "without load_best_model_at_end"),
    ("a_repository_without_a_push", {"hub_model_id": "me/x"}, "hub_model_id='me/x': .* without push_to_hub"),
    ("a_push_that_never_is", {"push_to_hub": True, "hub_strategy": "end"}, "nothing at the end; .* hf upload"),
    (
        "a_metric_that_is_none",
        {"load_best_model_at_end": True, "save_strategy": "steps", "save_steps": 2, "metric_for_best_model": "bleu"},
        "metric_for_best_model='bleu': the held-out loss is the only metric",
    ),
    ("rows_of_all_devices", {"accelerator_config": {"split_batches": True}}, "accelerator_config: split_batches"),
    (
        "steps_in_another_place",
        {"accelerator_config": {"gradient_accumulation_kwargs": {"num_steps": 4}}},
        "num_steps in gradient_accumulation_kwargs .*, and give gradient_accumulation_steps",
    ),
    (
        "tokens_counted_in_no_way",
        {"include_num_input_tokens_seen": "some"},
        "='some': use one of all, non_padding, no",
    ),
    ("a_warm_up_of_none", {"lr_scheduler_type": "constant", "warmup_steps": 7}, "warmup_steps=7.*has no warm-up"),
    ("betas_of_none", {"optim": "sgd", "adam_beta1": 0.8}, "adam_beta1=0.8: the optimizer 'sgd' has none"),
    ("epsilon_of_none", {"optim": "adafactor", "adam_epsilon": 1e-6}, "adam_epsilon=1e-06: the optimizer 'adafactor'"),
    (
        "arguments_of_none",
        {"optim_args": "momentum=0.9"},
        "optim_args='momentum=0.9': the optimizer 'adamw_torch_fused'",
    ),
    (
        "the_worst_model",
        {"load_best_model_at_end": True, "save_strategy": "steps", "save_steps": 2, "greater_is_better": True},
        "greater_is_better=True: the best held-out loss is the smallest",
    ),
    ("modules_of_none", {"optim_target_modules": ["attn"]}, "optim_target_modules=.*does not get it"),
]


@pytest.mark.parametrize("changes, message", [n[1:] for n in NOT_FOLLOWED], ids=[n[0] for n in NOT_FOLLOWED])
def test_an_option_that_would_not_be_followed_is_refused(tmp_path, changes, message):
    with pytest.raises(ValueError, match=message):
        check(tmp_path, **changes)


GOOD = [
    ("the_defaults", {}),
    ("arguments_that_are_taken", {"optim": "sgd", "optim_args": "momentum=0.9"}),
    ("betas_that_are_taken", {"adam_beta1": 0.8, "adam_epsilon": 1e-6}),
    ("no_warm_up_by_default", {"lr_scheduler_type": "constant"}),
    ("a_schedule_by_the_loss", {"lr_scheduler_type": "reduce_lr_on_plateau"}),
    ("the_best_model", {"load_best_model_at_end": True, "save_strategy": "steps", "save_steps": 2}),
    ("on_what_nothing_depends", {"dataloader_drop_last": True, "remove_unused_columns": False, "do_train": True}),
    ("bfloat16", {"bf16": True}),
]


@pytest.mark.parametrize("changes", [g[1] for g in GOOD], ids=[g[0] for g in GOOD])
def test_an_option_that_is_followed_is_not(tmp_path, changes, caplog):
    check(tmp_path, **changes)
    assert not caplog.messages


def test_a_warm_up_that_is_none_is_written_down_as_none(tmp_path):
    constant = training(tmp_path, lr_scheduler_type="constant")
    check_followed(constant, CONFIG)
    assert constant.warmup_steps == 0


def test_an_option_of_a_later_version_is_said_not_to_be_known(tmp_path, caplog, monkeypatch):
    monkeypatch.delitem(OPTIONS, "torch_empty_cache_steps")
    check(tmp_path, torch_empty_cache_steps=3)
    assert "torch_empty_cache_steps: Lighthouse does not know this option" in caplog.text


@pytest.mark.parametrize("variable", BY_ENVIRONMENT)
def test_what_the_environment_turns_on_and_no_option_is_refused(tmp_path, monkeypatch, variable):
    good = training(tmp_path)
    monkeypatch.setenv(variable, "true")
    with pytest.raises(ValueError, match=f"{variable}=true in the environment, .* --{BY_ENVIRONMENT[variable]}"):
        check_followed(good, CONFIG)
    monkeypatch.setenv(variable, "no")
    check_followed(good, CONFIG)


def test_smoothed_labels_of_shards_are_refused(tmp_path):
    shards = training(tmp_path, label_smoothing_factor=0.1)
    shards.fsdp = True
    with pytest.raises(ValueError, match="label_smoothing_factor=0.1 with fsdp: .* not shift the labels"):
        check_followed(shards, CONFIG)


def test_a_precision_from_the_environment_is_refused(tmp_path, monkeypatch):
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "fp16")
    if getattr(training(tmp_path), "mixed_precision", "no") == "no":
        pytest.skip("this version of Transformers sets the variable itself")
    with pytest.raises(ValueError, match="ACCELERATE_MIXED_PRECISION=fp16 in the environment"):
        check(tmp_path)


# Settings with which Lighthouse never acts


CASES = [
    ("longer_than_the_sequence", 1024, [1 / 2, 1 / 4, 1 / 8], 1024, "1,920 entries for 1,024 tokens"),
    ("by_a_share", 1000, [1 / 2, 1 / 4, 1 / 8], 0.5, "with which it acts here is"),
    ("shorter_than_a_window", 8, [1 / 4, 1 / 16], 1 / 64, "fewer than the coarsest window of 16"),
    ("one_level", 512, [], 4, "without pool_ratios"),
    ("windows_of_which_one_is_there", 20, [1 / 4, 1 / 16], 9, "sub-sequence of 25 entries for 20 tokens"),
    ("as_long_as_the_sequence", 80, [1 / 2], 20, None),
    ("the_default", 512, [1 / 4, 1 / 16], 1 / 64, None),
]


@pytest.mark.parametrize("tokens, ratios, topk, message", [c[1:] for c in CASES], ids=[c[0] for c in CASES])
def test_where_lighthouse_can_never_act(tokens, ratios, topk, message):
    found = why_it_cannot_act(tokens, Method(ratios, topk))
    assert (found is None) == (message is None) and (message is None or message in found)
    if message is None or "entries of" not in message:
        return
    best = max(
        (k for k in range(1, tokens) if plan(tokens, pool_ratios=ratios, select_topk=k).length <= tokens), default=0
    )
    assert (f"with which it acts here is {best:,}" in found) == (best > 0)
    longer = next(n for n in range(tokens, 10**5) if acts(n, Method(ratios, topk)))
    assert f"with this one is {longer:,} tokens" in found


def test_such_settings_are_no_options_of_a_run(tmp_path):
    never = {"context": 1024, "pool_ratios": ["1/2", "1/4", "1/8"], "select_topk": "1024"}
    with pytest.raises(ValueError, match=r"^context=1024: select_topk=1024 .*\(188%\).* 160; .* 6,560 .* dense_only$"):
        options(tmp_path, **never)
    options(tmp_path, **never, dense_only=True)


# Processes that are strangers


def environment(monkeypatch, **values):
    for name in COUNTED_BY:
        monkeypatch.delenv(name, raising=False)
    for name, value in values.items():
        monkeypatch.setenv(name, value)


LAUNCHED = [
    ("alone", {}, 1, None),
    ("one_of_one", {"WORLD_SIZE": "1", "SLURM_NTASKS": "1"}, 1, None),
    ("joined", {"WORLD_SIZE": "2"}, 2, None),
    ("by_torchrun", {"WORLD_SIZE": "2"}, 1, "WORLD_SIZE=2: a launcher has started 2 processes"),
    ("by_mpirun", {"OMPI_COMM_WORLD_SIZE": "4"}, 1, "torchrun --nproc_per_node 4, .* OMPI_COMM_WORLD_SIZE=1"),
    ("by_hydra", {"PMI_SIZE": "3"}, 1, "PMI_SIZE=3"),
    ("by_srun", {"SLURM_STEP_NUM_TASKS": "8", "SLURM_NTASKS": "16"}, 1, "SLURM_STEP_NUM_TASKS=8"),
    ("one_step_of_a_larger_job", {"SLURM_STEP_NUM_TASKS": "1", "SLURM_NTASKS": "16"}, 1, None),
    ("one_process_in_a_batch_script", {"SLURM_NTASKS": "2"}, 1, None),
]


@pytest.mark.parametrize("values, found, message", [case[1:] for case in LAUNCHED], ids=[case[0] for case in LAUNCHED])
def test_processes_that_are_not_joined(monkeypatch, values, found, message):
    environment(monkeypatch, **values)
    said = strangers(found)
    assert (said is None) == (message is None)
    if message is not None:
        with pytest.raises(ValueError, match=message):
            raise ValueError(said)


def test_a_run_among_strangers_is_refused(tmp_path, monkeypatch):
    environment(monkeypatch, SLURM_STEP_NUM_TASKS="2")
    with pytest.raises(ValueError, match="SLURM_STEP_NUM_TASKS=2: .* not joined"):
        training(tmp_path)
    assert os.listdir(tmp_path) == []


def test_without_a_gpu_launched_processes_are_joined_on_the_cpu(tmp_path, monkeypatch):
    """As with `use_cpu`, which stays as it was given: the configuration may be taken to a machine with a GPU."""
    environment(monkeypatch, WORLD_SIZE="2")
    asked = []

    def post_init(self):
        asked.append(self.use_cpu)
        vars(self).update(_setup_devices=SimpleNamespace(type="cpu"), distributed_state=SimpleNamespace())

    monkeypatch.setattr(TrainingArguments, "__post_init__", post_init)
    monkeypatch.setattr(TrainingArguments, "world_size", 2)
    monkeypatch.setattr("torch.accelerator.is_available", lambda: False)
    assert training(tmp_path, use_cpu=False).use_cpu is False and asked == [True]


OUT_OF_RANGE = [
    ("learning_rate", -1.0, "learning_rate=-1.0: it must be at least 0 and finite"),
    ("learning_rate", float("nan"), "learning_rate=nan: it must be at least 0 and finite"),
    ("learning_rate", float("inf"), "learning_rate=inf: it must be at least 0 and finite"),
    ("max_grad_norm", float("nan"), "max_grad_norm=nan: it must be at least 0"),
    ("adam_beta2", 1.0, "adam_beta2=1.0: it must be at least 0 and below 1"),
    ("label_smoothing_factor", 2.0, "label_smoothing_factor=2.0: it must be at least 0 and below 1"),
    ("per_device_train_batch_size", 0, "per_device_train_batch_size=0: it must be at least 1 and finite"),
    ("gradient_accumulation_steps", -2, "gradient_accumulation_steps=-2: it must be at least 1"),
    ("save_steps", 0, "save_steps=0: it must be above 0"),
    ("eval_steps", -1, "eval_steps=-1: it must be above 0"),
    ("logging_steps", 0, "logging_steps=0: it must be above 0"),
    ("warmup_steps", -1, "warmup_steps=-1: it must be at least 0"),
    ("dataloader_num_workers", -1, "dataloader_num_workers=-1: it must be at least 0"),
    ("neftune_noise_alpha", -1.0, "neftune_noise_alpha=-1.0: it must be at least 0"),
    ("seed", -1, "seed=-1: it must be at least 0 and below 4294967296"),
    ("output_dir", "", "output_dir='': the name of a folder is needed"),
    ("torch_compile_backend", "nonsense", "torch_compile_backend='nonsense': one of .*inductor"),
    ("deepspeed", "no.json", "deepspeed='no.json' does not exist; a JSON file, or the JSON itself"),
    ("accelerator_config", "no.json", "accelerator_config='no.json' does not exist"),
]


@pytest.mark.parametrize("name, value, said", OUT_OF_RANGE, ids=[f"{o[0]}={o[1]}" for o in OUT_OF_RANGE])
def test_what_the_trainer_would_fail_on_later_is_refused_at_once(name, value, said):
    with pytest.raises((ValueError, FileNotFoundError), match=said):
        TrainingOptions(**{"report_to": "none", name: value})


@pytest.mark.parametrize("name, value", [("max_grad_norm", float("inf")), ("weight_decay", 0.0)])
def test_what_is_unusual_and_right_is_taken(name, value):
    assert getattr(TrainingOptions(**{"report_to": "none", name: value}), name) == value


ARGUMENTS = [
    ({"lr_scheduler_kwargs": {"num_cycles": "x"}}, "lr_scheduler_kwargs=.*could not convert string to float: 'x'"),
    ({"optim_args": "fast"}, "optim_args='fast': pairs such as 'a=1,b=2' are needed"),
    ({"torch_compile": True, "torch_compile_mode": "fast"}, "torch_compile_mode='fast': one of default, .* is needed"),
]


@pytest.mark.parametrize("changes, said", ARGUMENTS, ids=[next(iter(a[0])) for a in ARGUMENTS])
def test_arguments_of_the_trainers_parts_are_tried_before_any_work(tmp_path, text, changes, said):
    with pytest.raises(ValueError, match=said):
        prepare(options(text), training(tmp_path / "run", **changes))
    assert not (tmp_path / "run").exists()
