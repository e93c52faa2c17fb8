"""Mistakes that people make at the command line, each at every command that can meet it: the message that it gets.

Each ends with a status of its own and one line that names what was found, the rule and the way out; nothing is written,
and nothing that was there is lost. A command that can meet a new mistake belongs into its row.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
from pathlib import Path

import datasets
import huggingface_hub
import pytest
import torch

from lighthouse.cli import main
from lighthouse.core import files
from lighthouse.training import space
from training_runs import CONTEXT, write_text
from training_tokenizers import save_bpe

optuna = pytest.importorskip("optuna")
pytestmark = pytest.mark.usefixtures("one_thread")

METHOD = "--pool_ratios 1/2 1/4 --select_topk 4 --local_window 16"
RUN = (
    f"--model nano --context {CONTEXT} --held_out 2 --data text --report_to none --use_cpu --disable_tqdm true {METHOD}"
)
# What each command is given before the mistake, which may overrule it.
COMMANDS = {
    "pretrain": f"{RUN} --steps 4 --output_dir new",
    "compare": f"{RUN} --steps 20 --output_dir new",
    "tune": f"{RUN} --context 512 --steps 20 --output_dir new --judge tokens --trials 2",
    "evaluate": "run --parts loss --output_dir new",
    "export": "run --output new",
    "inspect": f"run/model --text text/00.txt --output new {METHOD}",
    "plan": f"--tokens 4096 --no_estimate --layers 4 {METHOD}",
    "bench": f"--tokens 256 {METHOD}",
    "doctor": "",
}
RUNS = ("pretrain", "compare", "tune")
MODELS = ("evaluate", "export", "inspect")
LAYERS = ("plan", "bench")
WITH_METHOD = (*RUNS, "inspect", *LAYERS)
ALL = (*RUNS, *MODELS, *LAYERS)

# A name, the commands, what is given, and what is said. Given as text, split at spaces; {..} is by command.
MISTAKES: list[tuple[str, tuple[str, ...], str, str]] = [
    # Options, their values and types
    ("an_option_misspelt", ALL, "--modle x", r"there is no option --modle.*; see lighthouse \w+ --help"),
    ("an_option_misspelt_to_the_doctor", ("doctor",), "--jsn x", "unrecognized arguments: --jsn"),
    ("letters_swapped", RUNS, "--ouptut_dir x", "no option --ouptut_dir; nearest: --output_dir"),
    ("letters_swapped", ("export", "inspect"), "--ouptut x", "no option --ouptut; nearest: --output"),
    ("dashes_where_there_are_none", ("evaluate",), "--output-dir x", "--output-dir; nearest: --output_dir"),
    ("dashes_where_there_are_none", LAYERS, "--select-topk 4", "--select-topk; nearest: --select_topk"),
    ("an_option_of_another_command", ("export", "inspect"), "--rows 4", "there is no option --rows"),
    ("an_option_without_its_value", ("compare", "tune", *MODELS, *LAYERS, "doctor"), "--json", "expected one argument"),
    ("an_option_without_its_value", ("pretrain",), "--steps", "expected one argument"),
    ("a_word_too_many", RUNS, "--steps 4 words", "'words' stands after no option that takes it"),
    ("a_word_too_many", (*MODELS, *LAYERS), "--json x words", "'words' stands after no option that takes it"),
    ("text_for_a_number", RUNS, "--steps many", "'many' is not a whole number"),
    ("text_for_a_number", ("evaluate", "inspect"), "--context many", "--context: 'many' is not a whole number"),
    ("text_for_a_number", LAYERS, "--tokens 8k", "'8k' is not a whole number"),
    ("a_thousands_separator", RUNS, "--steps 1,000", "'1,000' is not a whole number"),
    ("a_word_for_a_switch", RUNS, "--bf16 maybe", "--bf16: Truthy value expected: got maybe"),
    ("an_unknown_choice", RUNS, "--order random", "--order: there is no 'random'.*; one of shuffled, path is needed"),
    ("an_unknown_choice", ("evaluate",), "--parts los", "there is no 'los'; nearest: loss; one of loss, copy, passkey"),
    ("an_unknown_device", ("evaluate", "inspect", *LAYERS), "--device gpu", "no 'gpu'.*; one of cpu, cuda is needed"),
    ("an_unknown_dtype", ("evaluate", "export", *LAYERS), "--dtype fp16", "no 'fp16'.*; one of .*float16.* is needed"),
    ("an_unknown_optimizer", RUNS, "--optim adam", "there is no 'adam'; nearest: adam"),
    ("an_unknown_schedule", RUNS, "--lr_scheduler_type cosin", "cosin is not a valid SchedulerType.*'cosine'"),
    ("no_arms", ("compare",), "--arms denze lighthouse", "denze.*dense"),
    ("seeds_twice", ("compare",), "--seeds 1 1", r"seeds=\[1, 1\]: one seed or several different ones"),
    ("nothing_of_that_name_to_search", ("tune",), "--fixed rate", "fixed=rate: any of pool_ratios, .* is needed"),
    ("no_trials", ("tune",), "--trials 0", "trials=0: at least one is needed"),
    ("no_rows", ("evaluate",), "--rows 0", "rows=0: at least one is needed"),
    ("no_time", ("bench",), "--budget 0", "budget=0.0: seconds above 0 are needed"),
    ("no_tokens", LAYERS, "--tokens 0", "tokens=0: at least one token is needed"),
    ("no_steps", RUNS, "--steps 0", "max_steps=0: at least one step is needed"),
    (
        "no_rows_in_a_step",
        RUNS,
        "--per_device_train_batch_size 0",
        "per_device_train_batch_size=0: it must be at least",
    ),
    ("a_rate_below_zero", RUNS, "--learning_rate -1", "learning_rate=-1.0: it must be at least 0"),
    ("a_rate_that_is_no_number", RUNS, "--learning_rate nan", "learning_rate=nan: it must be at least 0 and finite"),
    ("a_share_in_percent", RUNS, "--share 60", "share=60.0: a share of the steps, 0 to 1, is needed"),
    ("nothing_held_out", RUNS, "--held_out 0", "held_out=0: at least one context is needed"),
    ("a_seed_below_zero", RUNS, "--seed -1", "seed=-1: it must be at least 0"),
    ("a_seed_below_zero", ("evaluate",), "--seed -1", "seed=-1: at least 0 is needed"),
    # The method
    (
        "ratios_that_do_not_follow",
        WITH_METHOD,
        "--pool_ratios 1/2 1/3",
        r"pool_ratios\[1\]=0.33.*: a window of 3 tokens",
    ),
    ("ratios_that_rise", WITH_METHOD, "--pool_ratios 1/4 1/2", r"pool_ratios\[1\]=0.5: ratios must decrease"),
    ("a_ratio_above_one", WITH_METHOD, "--pool_ratios 4", r"pool_ratios\[0\]=4: a ratio must be above 0 and below 1"),
    ("a_word_for_the_budget", WITH_METHOD, "--select_topk many", "select_topk=many: a number such as 512"),
    ("a_budget_below_zero", WITH_METHOD, "--select_topk -4", "select_topk=-4: 0 to 2.40 parents"),
    ("nothing_attended_to", WITH_METHOD, "--select_topk 0 --local_window 0", "local_window=0 attends to nothing"),
    ("a_window_below_zero", WITH_METHOD, "--local_window -1", "local_window=-1: 0 .none. to"),
    ("all_layers_dense", (*RUNS, "inspect", "plan"), "--dense_layers 9", "dense_layers=9: .* none is left for Lighth"),
    ("too_large_a_budget", RUNS, "--select_topk 4096", "context=.*: .*select_topk"),
    (
        "two_ways_to_switch",
        RUNS,
        "--switch_step 3 --dense_only",
        "switch_step and dense_only: only one of them can say",
    ),
    ("nothing_to_compare", ("compare", "tune"), "--dense_only", "steps with Lighthouse|both stages are needed"),
    # Lengths and models
    ("a_context_of_one_token", (*RUNS, "evaluate", "inspect"), "--context 1", "context=1: .*at least 2 tokens"),
    ("no_context", ("evaluate", "inspect"), "--context 0", "context=0: .*at least 2 tokens"),
    ("longer_than_the_model", RUNS, "--context 1000000", "context=1000000: model 'nano' allows at most 65536 tokens"),
    (
        "longer_than_the_model",
        ("evaluate", "inspect"),
        "--context 4096",
        f"context=4096: the model allows at most {CONTEXT}",
    ),
    ("an_unknown_model", RUNS, "--model huge", "model='huge': give one of nano, .*, or the path of a config.json"),
    ("an_unknown_model", ("bench",), "--train --model huge", "model='huge': give one of nano"),
    ("a_model_on_the_hub", RUNS, "--model meta-llama/Llama-3.2-1B", "this path does not exist"),
    (
        "a_model_of_another_kind",
        RUNS,
        "--model gpt2",
        "model='gpt2' has model_type 'gpt2': Lighthouse supports only llama",
    ),
    ("a_model_that_is_no_json", RUNS, "--model text/00.txt", "model='text/00.txt' is not a configuration in JSON"),
    ("a_rope_of_long_ago", RUNS, "--model su.json", "su.json' has a RoPE of type 'su', .*one of default"),
    # Text and tokenizers
    ("text_that_is_not_there", (*RUNS, "evaluate"), "--data nowhere", "data='nowhere' does not exist"),
    ("text_that_is_not_there", ("inspect",), "--text nowhere", "text='nowhere' does not exist"),
    ("a_folder_for_a_text", ("inspect",), "--text text", "text='text' is no file"),
    ("a_pattern_without_files", (*RUNS, "evaluate"), "--data text/*.md", r"data='text/\*.md' matches no file"),
    ("an_empty_folder", (*RUNS, "evaluate"), "--data empty", "data='empty' holds no text: there are no files"),
    ("what_is_no_text", (*RUNS, "evaluate"), "--data picture.png", "picture.png' is not UTF-8 text: byte 0 is 0x89"),
    ("what_is_no_text", ("inspect",), "--text picture.png", "text='picture.png' is not UTF-8 text"),
    ("a_blank_file", (*RUNS, "evaluate"), "--data blank.txt", "data='blank.txt' holds no text"),
    (
        "rows_as_text",
        (*RUNS, "evaluate"),
        "--data rows.jsonl",
        "is a file with rows .*--dataset json --data 'rows.jsonl'",
    ),
    ("text_as_rows", (*RUNS, "evaluate"), "--dataset json --data text/00.txt", "dataset='json' cannot be read: "),
    (
        "a_folder_as_rows",
        (*RUNS, "evaluate"),
        "--dataset json --data text",
        "data='text' is a folder, .*--dataset text",
    ),
    (
        "a_column_that_is_not_there",
        (*RUNS, "evaluate"),
        "--dataset json --data rows.jsonl --text_column body",
        "columns: t",
    ),
    ("a_column_without_rows", (*RUNS, "evaluate"), "--text_column body", "text_column='body'.* dataset"),
    ("a_pipe", (*RUNS, "evaluate"), "--data pipe", "data='pipe' is not a regular file: .*save it as a file first"),
    ("too_little_text", (*RUNS, "evaluate"), "--data short.txt", r"short.txt'? \w+ \d+ tokens.* needed"),
    (
        "no_network",
        (*RUNS, "evaluate"),
        "--dataset nobody/nothing",
        "dataset='nobody/nothing' (cannot be loaded|does not)",
    ),
    ("no_network", (*RUNS, *MODELS), "--tokenizer nobody/nothing", "tokenizer='nobody/nothing' cannot be loaded: "),
    (
        "a_folder_without_tokenizer",
        (*RUNS, *MODELS),
        "--tokenizer text",
        "tokenizer='text' is a folder without a token",
    ),
    ("another_models_tokenizer", ("evaluate",), "--tokenizer wide", "has ids up to .*: name the model's own tokenizer"),
    # Configurations
    ("no_such_configuration", RUNS, "--config no.yaml", "config='no.yaml' does not exist"),
    ("a_name_misspelt_in_a_file", RUNS, "--config misspelt.yaml", "there is no option 'contxt'; nearest: 'context'"),
    ("a_wrong_type_in_a_file", RUNS, "--config type.yaml", "type.yaml': context: .*invalid int value"),
    ("no_configuration", RUNS, "--config picture.png", "config='picture.png' is neither YAML nor JSON"),
    # The Trainer's options, launchers, packages, machines
    ("epochs", RUNS, "--num_train_epochs 3", "num_train_epochs=3.0: max_steps .--steps. says how long"),
    ("half_precision_without_a_gpu", RUNS, "--fp16", "fp16=True on a cpu device: nothing is trained in fp16 there"),
    ("shards_of_one_process", RUNS, "--fsdp full_shard", "fsdp with 1 process .*: sharding needs several processes"),
    ("a_package_for_logs_that_is_missing", RUNS[:2], "--report_to wandb", "wandb"),
    ("logs_to_nobody", RUNS[:2], "--report_to tensorbord", "tensorbord is not supported, only .*tensorboard"),
    ("a_package_for_shards_that_is_missing", RUNS, "--deepspeed {}", "deepspeed"),
    ("a_file_of_shards_that_is_missing", RUNS, "--deepspeed zero9.json", "deepspeed='zero9.json' does not exist"),
    (
        "an_optimizers_package_that_is_missing",
        RUNS,
        "--optim galore_adamw",
        "optim='galore_adamw': You need to install",
    ),
    ("kernels_of_others", RUNS, "--use_liger_kernel", "use_liger_kernel=True: it replaces the forward"),
    (
        "no_gpu",
        ("evaluate", "inspect", *LAYERS),
        "--device cuda",
        "device='cuda': PyTorch finds no GPU here; use --dev",
    ),
    ("more_threads_than_cores", LAYERS, "--threads 9999", r"threads=9999: from 1 to \d+, the cores of this process"),
    (
        "more_memory_than_there_is",
        RUNS,
        "--per_device_train_batch_size 1000000",
        "out of memory: a training step needs",
    ),
    # Places to write
    ("a_file_for_a_folder", (*RUNS, "evaluate"), "--output_dir blank.txt", "blank.txt' is a file: a folder is needed"),
    ("a_file_for_a_folder", ("export", "inspect"), "--output blank.txt", "blank.txt' is a file: "),
    (
        "a_folder_in_a_file",
        (*RUNS, "evaluate"),
        "--output_dir blank.txt/new",
        "blank.txt' is not a folder; name another",
    ),
    ("a_folder_in_a_file", ("export", "inspect"), "--output blank.txt/new", "blank.txt' is not a folder; name another"),
    (
        "no_rights",
        (*RUNS, "evaluate"),
        "--output_dir locked/new",
        "locked' cannot be written to .*; name another place",
    ),
    ("no_rights", ("export", "inspect"), "--output locked/new", "locked' cannot be written to .*; name another place"),
    ("no_name_for_a_folder", RUNS, "--output_dir=", "output_dir='': the name of a folder is needed"),
    ("a_folder_for_numbers", ("compare", "tune", *MODELS, *LAYERS, "doctor"), "--json text", "'text' is a folder"),
    (
        "a_place_that_is_not_there",
        ("compare", "tune", *MODELS, *LAYERS, "doctor"),
        "--json no/x.json",
        "does not exist",
    ),
    ("a_picture_nowhere", ("bench",), "--plot no/x.png", "plot='no/x.png': its folder does not exist"),
    ("numbers_that_are_there", ("bench",), "--json text/00.txt", "already exists: continue it with --resume"),
    ("numbers_of_another_kind", ("bench",), "--json text/00.txt --resume", "has no results of bench"),
    ("numbers_to_go_on_with", ("bench",), "--resume", "resume: --json FILE is needed"),
    # The wrong folder
    ("a_folder_with_a_run", ("pretrain",), "--output_dir run", "output_dir='run' already holds a run: .*--resume"),
    ("a_folder_with_a_run", ("compare",), "--output_dir run", "output_dir='run' holds something else, a run"),
    (
        "a_folder_with_another",
        ("compare",),
        "--output_dir compared",
        "'compared' holds a comparison already: .*--resume",
    ),
    ("a_folder_with_another", ("tune",), "--output_dir tuned", "'tuned' holds a study already: .*--resume"),
    ("a_folder_with_another", ("evaluate",), "--output_dir evaluated", "holds an evaluation with other settings"),
    ("a_folder_with_another", ("export",), "--output run2/model", "already exists: use another folder, or .*--force"),
    ("a_folder_to_replace_that_is_no_model", ("export",), "--output text --force", "only a model's folder is replaced"),
    ("the_model_over_itself", ("export",), "--output run/model --force", "holds what is to be exported"),
    (
        "nothing_to_resume",
        ("pretrain",),
        "--resume --output_dir empty",
        "holds no checkpoint to resume from: .*without",
    ),
    (
        "nothing_to_resume",
        ("compare",),
        "--resume --output_dir empty",
        "holds no comparison to resume: start it without",
    ),
    (
        "nothing_to_resume",
        ("tune",),
        "--resume --output_dir empty",
        "holds no study to resume: start it without --resume",
    ),
    ("another_rate", ("pretrain",), "--resume --output_dir run --learning_rate 9", "learning_rate was 0.002, is 9.0"),
    ("another_text", ("pretrain",), "--resume --output_dir run --data other", "the text, its order, .* has changed"),
    (
        "fewer_steps",
        ("pretrain",),
        "--resume --output_dir run --steps 2",
        "already has 4 steps; ask for at least as many",
    ),
    ("no_checkpoint", ("pretrain",), "--resume_from_checkpoint text", "is not a folder with a whole checkpoint"),
    ("no_checkpoint", ("compare", "tune"), "--resume_from_checkpoint text", "resume_from_checkpoint='text': "),
    (
        "an_earlier_version",
        ("compare",),
        "--output_dir old --resume",
        "a comparison of an earlier version, with seed-1/t",
    ),
    ("a_damaged_file", ("pretrain",), "--resume --output_dir damaged", "run.json' is damaged, it is not JSON"),
    ("a_damaged_file", ("tune",), "--resume --output_dir tuned", "study.json' is damaged, it is not JSON"),
]
# The same of a command whose first word is the mistake.
FIRST = [
    ("a_model_that_is_not_there", ("export", "inspect"), "nowhere", "'nowhere'.* (does not exist|is needed)"),
    (
        "a_model_that_is_not_there",
        ("evaluate",),
        "nobody/nothing",
        "model='nobody/nothing' cannot be read: .*is needed",
    ),
    ("a_file_for_a_model", MODELS, "run/run.json", "run/run.json'.* is needed"),
    ("an_empty_folder_for_a_model", MODELS, "empty", "'empty'.*(no model.safetensors|is needed)"),
    ("text_for_a_model", MODELS, "text", "'text'.*(no model.safetensors|is needed)"),
    ("a_run_without_a_checkpoint", MODELS, "begun", "is a run without a complete checkpoint yet: continue it with"),
    ("a_comparison_for_a_model", MODELS, "compared", "'compared'.*(no model.safetensors|is needed)"),
    ("a_model_of_another_kind", ("export", "inspect"), "gpt2", "(GPT2LMHeadModel|gpt2).*|no model.safetensors"),
    ("damaged_weights", ("export", "inspect"), "run2/model", "its weights cannot be read, the file is damaged"),
    ("damaged_weights", ("evaluate",), "run2", "its weights cannot be read, the file is damaged"),
    ("a_damaged_configuration", MODELS, "broken", "'broken'.*not a valid JSON"),
    ("damaged_results", MODELS, "damaged", "is damaged, it is not JSON"),
]


def cases():
    for name, commands, given, said in MISTAKES:
        for command in commands:
            yield pytest.param(command, [*COMMANDS[command].split(), *given.split()], said, id=f"{name}-{command}")
    for name, commands, given, said in FIRST:
        for command in commands:
            rest = COMMANDS[command].split()[1:]
            yield pytest.param(command, [given, *rest], said, id=f"{name}-{command}")


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder with a finished run, and everything that may be mistaken for something else."""
    before, here = Path.cwd(), tmp_path_factory.mktemp("place")
    os.chdir(here)
    write_text(here / "text")
    write_text(here / "other", seed=1)
    with contextlib.redirect_stdout(open(os.devnull, "w")):
        assert main(["pretrain", *RUN.split(), "--steps", "4", "--save_steps", "2", "--output_dir", "run"]) == 0
    for folder in ("empty", "begun", "compared/seed-1", "old/seed-1/two-stage", "tuned", "evaluated", "gpt2", "locked"):
        (here / folder).mkdir(parents=True)
    shutil.copy("run/run.json", "begun/run.json")
    shutil.copytree("run/model", "broken")
    shutil.copytree("run", "run2")
    shutil.copytree("run", "damaged")
    weights = Path("run2/model/model.safetensors")
    weights.write_bytes(weights.read_bytes()[:1000])
    save_bpe(here / "wide", additional_special_tokens=[f"<{n}>" for n in range(200)])
    config = json.loads(Path("run/model/config.json").read_text())
    for name, content in {
        "damaged/run.json": "{nonsense",
        "damaged/results.json": "{nonsense",
        "tuned/study.json": "{nonsense",
        "evaluated/evaluation.json": json.dumps({"settings": {"rows": 99}, "evaluation": {}}),
        "broken/config.json": "{nonsense",
        "gpt2/config.json": json.dumps({"model_type": "gpt2", "architectures": ["GPT2LMHeadModel"]}),
        "su.json": json.dumps({**config, "rope_parameters": {"rope_type": "su", "factor": 2.0}}),
        "rows.jsonl": json.dumps({"text": "the light " * 99}) + "\n",
        "short.txt": "short",
        "blank.txt": "   \n",
        "misspelt.yaml": "contxt: 9\n",
        "type.yaml": "context: many\n",
    }.items():
        Path(name).write_text(content)
    Path("picture.png").write_bytes(b"\x89PNG\r\n\x1a\n\x00\xff")
    os.mkfifo("pipe")
    yield here
    os.chdir(before)


def all_in(folder: Path) -> dict[str, tuple]:
    return {
        str(path): (path.stat().st_size, path.stat().st_mtime_ns) for path in folder.rglob("*") if path.is_file()
    } | {str(path): () for path in folder.rglob("*") if path.is_dir()}


@pytest.fixture
def no_network(monkeypatch):
    """As HF_HUB_OFFLINE sets it before anything is imported; else each name on the Hub is tried for a minute."""
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)


@pytest.fixture
def nobody_may_write_into_locked(monkeypatch):
    """The tests may run as a user who may write everywhere."""
    make = space.tempfile.mkdtemp

    def mkdtemp(suffix=None, prefix=None, dir=None):
        if str(dir).endswith("locked"):
            raise PermissionError(13, os.strerror(13), str(dir))
        return make(suffix, prefix, dir)

    monkeypatch.setattr(space.tempfile, "mkdtemp", mkdtemp)


def run(command: str, arguments: list[str]) -> int | None:
    if command == "doctor":
        from lighthouse_doctor.command import main as doctor

        command_of = doctor
    else:

        def command_of(arguments):
            return main([command, *arguments])

    try:
        return command_of(arguments)
    except SystemExit as stop:
        return stop.code


@pytest.mark.parametrize("command, arguments, said", list(cases()))
@pytest.mark.usefixtures("nobody_may_write_into_locked", "no_network")
def test_a_mistake(place, monkeypatch, capsys, command, arguments, said):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    before = all_in(place)
    status = run(command, arguments)
    after = all_in(place)
    shutil.rmtree("new", ignore_errors=True)  # so that one failure is not many
    found = capsys.readouterr().err
    progress, mark, error = found.rpartition(f"lighthouse {command}: error: ")
    assert status == 2 and mark and re.search(said, error), found
    assert "Traceback" not in found and "[Errno" not in error
    assert after == before


def test_how_many_there_are():
    names = {name for name, *_ in (*MISTAKES, *FIRST)}
    assert len(names) >= 60 and {command for _, commands, *_ in (*MISTAKES, *FIRST) for command in commands} == {
        *COMMANDS
    }


# What the machine does not give is found only when there is something to write: another status.
NO_SPACE = [("pretrain", "make room, or use another output_dir"), ("export", "make room|are needed")]


@pytest.mark.parametrize("command, said", NO_SPACE, ids=[n[0] for n in NO_SPACE])
def test_a_full_disk(place, monkeypatch, capsys, command, said):
    from lighthouse.export import export

    for module in (files, space, export):
        monkeypatch.setattr(module, "free_bytes", lambda folder: 1000)
    before = all_in(place)
    assert run(command, COMMANDS[command].split()) == 1
    found = capsys.readouterr().err
    assert re.search(said, found) and "Traceback" not in found
    assert all_in(place) == before
