"""Options from a file, and the file that a run writes."""

from __future__ import annotations

import json

import pytest
import yaml

from lighthouse.cli.pretrain import run_parser
from lighthouse.training import PretrainOptions, TrainingOptions, configuration
from training_runs import CHECKPOINTING


def parser():
    return run_parser("pretrain", "", "", whole_help=True)[0]


def parsed(arguments):
    model, data, lighthouse, training, _ = parser().parse_args_into_dataclasses(arguments, look_for_args_file=False)
    return {**vars(model), **vars(data), **vars(lighthouse)}, training


def from_file(values):
    return parsed(configuration.as_arguments(values, parser(), "config"))


VALUES = {
    "model": "nano",
    "context": 256,
    "data": ["a b.txt", "-c"],
    "share": 0.5,
    "pool_ratios": ["1/2", 0.25],
    "dense_only": True,
    "dense_layers": None,
    "learning_rate": "3e-4",
    "torch_compile": False,
    "lr_scheduler_type": "linear",
    "lr_scheduler_kwargs": {"a": 1},
    "accelerator_config": {"split_batches": True},
    "report_to": "none",
    "use_cpu": True,
}


def test_a_file_has_the_names_and_the_types_of_the_command_line(tmp_path):
    values = {**VALUES, "data": ["a b.txt", "c"], "output_dir": str(tmp_path)}
    ours, training = from_file(values)
    assert ours["data"] == ["a b.txt", "c"] and ours["pool_ratios"] == ["1/2", "0.25"]
    assert ours["dense_only"] is True and ours["dense_layers"] is None and ours["context"] == 256
    assert training.learning_rate == 3e-4 and training.lr_scheduler_kwargs == {"a": 1}
    assert training.accelerator_config.split_batches is True and training.torch_compile is False


@pytest.mark.parametrize("given, found", [(True, True), (False, None), ("full_shard", "full_shard")])
def test_an_option_that_is_text_or_a_switch(given, found):
    arguments = configuration.as_arguments({"fsdp": given, "dense_only": True}, parser(), "config")
    assert parser().parse_args(arguments).fsdp == found


@pytest.mark.parametrize("name, write", [("a.yaml", yaml.safe_dump), ("a.json", json.dumps)], ids=["yaml", "json"])
def test_yaml_and_json(tmp_path, name, write):
    (tmp_path / name).write_text(write(VALUES))
    assert configuration.read(tmp_path / name) == VALUES


WRONG = [
    ("a_name_that_is_none", {"contxt": 1}, "there is no option 'contxt'; nearest: 'context'"),
    ("nothing_near", {"zzzzzz": 1}, "there is no option 'zzzzzz'$"),
    ("a_config_in_a_config", {"help": True}, "there is no option 'help'"),
    ("a_list_for_one_value", {"context": [1, 2]}, "context is a list: one value is needed"),
]


@pytest.mark.parametrize("values, message", [w[1:] for w in WRONG], ids=[w[0] for w in WRONG])
def test_wrong_names_and_values(values, message):
    with pytest.raises(ValueError, match=message):
        from_file(values)


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


def test_what_a_run_writes_gives_the_same_run(tmp_path):
    options = PretrainOptions(model="nano", context=256, pool_ratios=["1/3"], select_topk="7", data=["x", "y"])
    training = TrainingOptions(
        output_dir=str(tmp_path),
        use_cpu=True,
        resume=True,
        optim="adafactor",
        lr_scheduler_kwargs={"a": 1},
        **{CHECKPOINTING: True},
        hub_token="secret",
    )
    written = configuration.text_of(configuration.resolved(options, training))
    assert "secret" not in written and "resume" not in written
    (tmp_path / "config.yaml").write_text(written)
    ours, again = from_file(configuration.read(tmp_path / "config.yaml"))
    assert configuration.resolved(PretrainOptions(**ours), again) == configuration.resolved(options, training)
    assert again.optim == "adafactor" and getattr(again, CHECKPOINTING) and not again.resume


def test_the_command_line_wins_and_of_files_the_last(tmp_path):
    arguments = ["--config", "a.yaml", "--steps", "3", "--config=b.yaml"]
    assert configuration.names_in(arguments) == ["a.yaml", "b.yaml"]
    ours, _ = parsed(["--context=1", "--context=2", "--use_cpu"])
    assert ours["context"] == 2


def test_rows_move_to_a_gpu_without_waiting_for_the_step_before(cuda, tmp_path):
    assert TrainingOptions(output_dir=str(tmp_path)).accelerator_config.non_blocking
    users = TrainingOptions(output_dir=str(tmp_path), accelerator_config={"non_blocking": False})
    assert not users.accelerator_config.non_blocking


def test_nothing_moves_on_a_cpu(tmp_path):
    assert not TrainingOptions(output_dir=str(tmp_path), use_cpu=True).accelerator_config.non_blocking
