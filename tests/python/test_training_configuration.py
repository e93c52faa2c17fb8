"""Options from a file, and the file that a run writes."""

from __future__ import annotations

import json
from dataclasses import asdict, fields

import pytest

pytest.importorskip("datasets", reason="the train extra is needed")

import yaml  # noqa: E402
from transformers import TrainingArguments  # noqa: E402

from lighthouse.cli.pretrain import parse_run, run_parser  # noqa: E402
from lighthouse.training import PretrainOptions, TrainingOptions, configuration  # noqa: E402
from lighthouse.training.checks import check_followed  # noqa: E402
from training_runs import CONTEXT  # noqa: E402
from training_runs import training as training_options  # noqa: E402


def parser():
    return run_parser("pretrain", "", "", whole_help=True)[0]


def read(text, tmp_path):
    """The options of a file with this text: ours and the Trainer's."""
    (tmp_path / "options.yaml").write_text(text)
    options, training, _ = parse_run(parser(), ["--config", str(tmp_path / "options.yaml")])
    return options, training


BASE = f"model: nano\ncontext: {CONTEXT}\npool_ratios: [1/2]\nselect_topk: 4\nuse_cpu: true\n"

TEXT = """\
data: [a b.txt, -c, 1.10]
dense_only: on
dense_layers: null
learning_rate: 3e-4
seed: 010
torch_compile: false
lr_scheduler_type: linear
lr_scheduler_kwargs: {a: 1, b: no}
accelerator_config: {split_batches: true}
report_to: none
"""


@pytest.mark.parametrize("form", ["yaml", "json"])
def test_a_file_has_the_names_and_the_types_of_the_command_line(tmp_path, form):
    values = yaml.safe_load(BASE + TEXT) | {"data": ["a b.txt", "-c", "1.10"], "seed": 10}
    options, training = read(json.dumps(values) if form == "json" else BASE + TEXT, tmp_path)
    assert options.data == ["a b.txt", "-c", "1.10"] and options.dense_only is True and options.dense_layers is None
    assert training.learning_rate == 3e-4 and training.lr_scheduler_kwargs == {"a": 1, "b": False}
    assert training.accelerator_config.split_batches is True and training.torch_compile is False
    assert training.seed == 10 and training.report_to == []


# YAML's no, off and the like are what is written there: text where an option is text, false where it is a switch.
SWITCHED = [
    ("no_evaluation", "eval_strategy: no", "eval_strategy", "no"),
    ("no_checkpoints", "save_strategy: no", "save_strategy", "no"),
    ("no_logs", "logging_strategy: no", "logging_strategy", "no"),
    ("no_shards", "fsdp: no", "fsdp", False),
    ("shards_off", "fsdp: off", "fsdp", False),
    ("a_kind_of_shards", "fsdp: full_shard", "fsdp", True),
    ("no_tokens_counted", "include_num_input_tokens_seen: no", "include_num_input_tokens_seen", "no"),
    ("tokens_counted", "include_num_input_tokens_seen: all", "include_num_input_tokens_seen", "all"),
    ("a_dataset_in_norwegian", "dataset_config: no", "dataset_config", "no"),
    ("a_number_as_a_name", "run_name: 1.10", "run_name", "1.10"),
    ("a_time_as_a_name", "run_name: 1:30", "run_name", "1:30"),
    ("a_switch", "full_determinism: off", "full_determinism", False),
    ("nothing_as_null", "report_to: null", "report_to", []),
    ("all_checkpoints", "save_total_limit: null", "save_total_limit", None),
    ("all_checkpoints_by_nothing", "save_total_limit:", "save_total_limit", None),
]


@pytest.mark.parametrize("text, name, value", [s[1:] for s in SWITCHED], ids=[s[0] for s in SWITCHED])
def test_a_value_is_what_is_written(tmp_path, monkeypatch, text, name, value):
    monkeypatch.setattr(TrainingArguments, "_process_fsdp_args", lambda self: setattr(self, "fsdp", bool(self.fsdp)))
    options, training = read(BASE + text, tmp_path)
    assert getattr(options if hasattr(options, name) else training, name) == value


WRONG = [
    ("a_name_that_is_none", "contxt: 1", "there is no option 'contxt'; nearest: 'context'"),
    ("nothing_near", "zzzzzz: 1", "there is no option 'zzzzzz'$"),
    ("help_in_a_config", "help: true", "there is no option 'help'"),
    ("a_config_in_a_config", "config: a.yaml", "there is no option 'config'"),
    ("a_switch_by_its_opposite", "no_log_on_each_node: true", "there is no option 'no_log_on_each_node'"),
    ("a_list_for_one_value", "context: [1, 2]", "context: it is a list: one value is needed"),
    ("a_mapping_for_one_value", "context: {a: 1}", "context: it is a mapping: one value is needed"),
    ("nothing_in_a_list", "data: [a, null]", "data: None in a list: a value is needed"),
    ("no_schedule", "lr_scheduler_type: no", "no is not a valid SchedulerType"),
    ("no_number", "context: no", "context: invalid int value: 'no'"),
    ("no_optimizer", "optim: off", "optim: invalid choice: 'off'"),
    ("a_number_of_yaml_alone", "context: 0x80", "context: invalid int value: '0x80'"),
    ("null_for_a_number", "context: null", "context: it is null: .*; leave it out for the default, 8192"),
    ("null_for_a_switch", "stream: null", "stream: it is null: .* default, False"),
    ("null_for_text", "eval_strategy: ~", "eval_strategy: it is null: .* default, 'steps'"),
    ("a_name_twice", "max_steps: 4\nmax_steps: 6", "'max_steps' appears twice, again in line 2"),
    ("a_name_twice_in_json", '{"seed": 4, "seed": 4}', "'seed' appears twice"),
    ("a_name_twice_further_in", "fsdp_config:\n  a: 1\n  a: 2", "'a' appears twice, again in line 3"),
    ("two_names_of_one_option", "steps: 4\nmax_steps: 6", "'steps' and 'max_steps' are the same option"),
    ("tokens_counted_in_no_way", "include_num_input_tokens_seen: some", "seen='some': use one of all, non_pad"),
]


@pytest.mark.parametrize("text, message", [w[1:] for w in WRONG], ids=[w[0] for w in WRONG])
def test_wrong_names_and_values(tmp_path, text, message):
    with pytest.raises(ValueError, match=message):
        check_followed(read(text, tmp_path)[1], None)


def test_a_name_once_more_over_a_merged_mapping_is_no_second(tmp_path):
    text = "fsdp_config: &a {a: 1, b: 2}\nlr_scheduler_kwargs: {<<: *a, a: 3}\n"
    assert read(BASE + text, tmp_path)[1].lr_scheduler_kwargs == {"a": 3, "b": 2}


UNREADABLE = [
    ("not_there", None, FileNotFoundError, "does not exist"),
    ("a_list", "- 1\n- 2\n", ValueError, "names with values are needed"),
    ("not_yaml", "a: [1", ValueError, "neither YAML nor JSON"),
    ("empty", "", ValueError, "names with values are needed"),
]


@pytest.mark.parametrize("text, error, message", [u[1:] for u in UNREADABLE], ids=[u[0] for u in UNREADABLE])
def test_files_that_are_none(tmp_path, text, error, message):
    if text is not None:
        (tmp_path / "a.yaml").write_text(text)
    with pytest.raises(error, match=message):
        configuration.read(tmp_path / "a.yaml")


def written(options, training):
    return configuration.text_of(configuration.resolved(options, training))


def settings_of(options, training):
    ours = {name: getattr(training, name) for name in OPTIONS if name in TRAINERS}
    return asdict(options) | {name: value for name, value in ours.items() if name not in configuration.LEFT_OUT}


def test_what_a_run_writes_gives_the_same_run(tmp_path):
    options = PretrainOptions(model="nano", context=256, pool_ratios=["1/3"], select_topk="7", data=["x", "y"])
    training = TrainingOptions(output_dir=str(tmp_path), use_cpu=True, resume=True, hub_token="secret")
    text = written(options, training)
    assert "secret" not in text and "resume" not in text
    again, trained = read(text, tmp_path)
    assert settings_of(again, trained) == settings_of(options, training) and not trained.resume


TRAINERS = {field.name for field in fields(TrainingOptions) if field.init}
OPTIONS = {field.name: field for kind in (PretrainOptions, TrainingOptions) for field in fields(kind) if field.init}
KINDS = configuration.kinds_of(PretrainOptions) | configuration.kinds_of(TrainingOptions)

# Where a value by its type would not do.
VALUES = {
    "model": ["tiny"],
    "context": [256],
    "held_out": [3],
    "pool_ratios": [["1/3"], [0.25, 0.125], ["1/2", "1/4"]],
    "select_topk": ["1/16", "8", 0.25],
    "local_window": ["0", "32", 16],
    "optim": ["sgd"],
    "lr_scheduler_type": ["linear"],
    "eval_strategy": ["no", "epoch"],
    "logging_strategy": ["no"],
    "save_strategy": ["no", "best"],
    "hub_strategy": ["checkpoint"],
    "report_to": ["none", None, [], ["tensorboard"], ["tensorboard", "wandb"], "tensorboard"],
    "log_level": ["info"],
    "log_level_replica": ["info"],
    "include_num_input_tokens_seen": [True, False, "all", "non_padding"],
    "accelerator_config": [{"even_batches": False}, {"gradient_accumulation_kwargs": {"sync_each_batch": True}}],
    "debug": [["underflow_overflow"]],
    "save_total_limit": [5, 0, None],
    "train_sampling_strategy": ["sequential"],
    "dataloader_multiprocessing_context": ["spawn"],
    "warmup_steps": [7, 0.25],
    "dense_layers": [0],
    "order": ["path"],
    "trackio_static_space_id": [False, "me/x"],
}

# Options that need another beside them, or a device or a file that is not here.
WITH = {
    "torch_compile_mode": {"torch_compile": True},
    "dataloader_prefetch_factor": {"dataloader_num_workers": 1},
    "load_best_model_at_end": {"save_strategy": "best"},
    "greater_is_better": {"metric_for_best_model": "loss"},
}
NOT_HERE = {"ddp_backend", "deepspeed", "parallelism_config"}


def values_of(name):
    """Values of an option that are not its default: of its type, false, empty and None where they are allowed."""
    field, kinds = OPTIONS[name], KINDS[name]
    if name in VALUES:
        return VALUES[name]
    values = [value for kind, value in BY_TYPE if kind in kinds]
    values += [None] if type(None) in kinds and field.default is not None else []
    return [value for value in values if value is not field.default]


BY_TYPE = [(bool, True), (bool, False), (int, 3), (str, "no"), (str, "1.10"), (str, "null"), (list, ["a"]), (list, [])]
BY_TYPE += [(list, ["a", "2"]), (dict, {"a": 1, "b": {"c": ["x"], "d": "1"}, "e": None, "f": False}), (float, 0.5)]


def test_each_option_is_read_as_it_was_written(tmp_path):
    """Also none, false and what is empty: by null for the default another run would be written down."""
    lost, none = [], []
    for name in OPTIONS.keys() - set(configuration.LEFT_OUT) - NOT_HERE:
        tried = 0
        for value in values_of(name):
            changes = {"output_dir": str(tmp_path), "use_cpu": True, **WITH.get(name, {}), name: value}
            ours = {"model": "nano", "context": CONTEXT, "pool_ratios": ["1/2"], "select_topk": "4"}
            ours |= {name: value for name, value in changes.items() if name not in TRAINERS}
            try:
                options = PretrainOptions(**ours)
                training = TrainingOptions(**{name: value for name, value in changes.items() if name in TRAINERS})
            except (ValueError, TypeError, OSError):
                continue
            tried += 1
            if settings_of(*read(written(options, training), tmp_path)) != settings_of(options, training):
                lost.append((name, value))
        none += [] if tried else [name]
    assert lost == [] and none == []


@pytest.mark.parametrize("name", ["max_grad_norm", "warmup_steps", "full_determinism"])
def test_an_option_that_is_none_and_may_not_be(tmp_path, name):
    with pytest.raises(ValueError, match=f"^{name}=None: a value is needed"):
        training_options(tmp_path, **{name: None})


def test_the_command_line_wins_and_of_files_the_last(tmp_path):
    arguments = ["--config", "a.yaml", "--steps", "3", "--config=b.yaml"]
    assert configuration.names_in(arguments) == ["a.yaml", "b.yaml"]
    (tmp_path / "a.yaml").write_text(BASE + "steps: 5\nseed: 1\nsave_total_limit: 3\ndata: [a, b]\n")
    (tmp_path / "b.yaml").write_text("seed: 2\nsave_total_limit: null\n")
    files = [f"--config={tmp_path / name}" for name in ("a.yaml", "b.yaml")]
    options, training, _ = parse_run(parser(), ["--steps", "7", "--data", "c", *files])
    assert (training.max_steps, training.seed, training.save_total_limit, options.data) == (7, 2, None, ["c"])
    assert parse_run(parser(), files[:1])[1].save_total_limit == 3


def test_rows_move_to_a_gpu_without_waiting_for_the_step_before(cuda, tmp_path):
    assert TrainingOptions(output_dir=str(tmp_path)).accelerator_config.non_blocking
    users = TrainingOptions(output_dir=str(tmp_path), accelerator_config={"non_blocking": False})
    assert not users.accelerator_config.non_blocking


def test_nothing_moves_on_a_cpu(tmp_path):
    assert not TrainingOptions(output_dir=str(tmp_path), use_cpu=True).accelerator_config.non_blocking
