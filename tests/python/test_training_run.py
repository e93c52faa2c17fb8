"""Whole runs: Lighthouse in the first steps and no others, the record, and the plain model at the end."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import fields
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback, TrainingArguments

from lighthouse.export.card import history_of_checkpoint
from lighthouse.training import PretrainResult, Refused, RunFailed, checkpoints, prepare, pretrain
from lighthouse.training import run as run_module
from lighthouse.training.model import new_model
from lighthouse.training.result import TextFailed
from lighthouse.training.trainer import rows_to_evaluate
from training_runs import CHECKPOINTING, CONTEXT, options, training, watch, write_text

pytestmark = pytest.mark.usefixtures("one_thread")

TRAINERS = {f.name for f in fields(TrainingArguments)}


@pytest.fixture(scope="module")
def trained(tmp_path_factory, text):
    """A run, and of each of its steps whether it was with Lighthouse. It is not to be changed."""
    with pytest.MonkeyPatch.context() as patch:
        steps = watch(patch)
        return pretrain(options(text), training(tmp_path_factory.mktemp("trained"))), steps


def test_lighthouse_runs_in_the_first_steps_and_no_others(trained):
    result, steps = trained
    assert steps == [(step, step <= 3) for step in range(1, 6)] and result.switch_step == 3
    assert {name: stage.steps for name, stage in result.stages.items()} == {"lighthouse": 3, "dense": 2}


def test_the_record(trained):
    result, _ = trained
    # Every second step, right before the switch, and at the end.
    assert [(p.step, p.stage) for p in result.held_out] == [
        (2, "lighthouse"),
        (3, "lighthouse"),
        (4, "dense"),
        (5, "dense"),
    ]
    seconds = [p.seconds for p in result.held_out]
    assert seconds == sorted(seconds) and seconds[-1] == pytest.approx(result.seconds)
    assert result.lighthouse.tokens == 3 * CONTEXT and result.lighthouse.tokens_per_second > 0
    assert PretrainResult.load(Path(result.model_folder).parent / "results.json") == result


def test_a_dense_run_is_the_plain_model_throughout_and_so_is_a_share_of_zero(tmp_path, text, monkeypatch):
    steps = watch(monkeypatch)
    dense, none = (
        pretrain(options(text, **how), training(tmp_path / name))
        for name, how in {"a": {"dense_only": True}, "b": {"share": 0}}.items()
    )
    assert steps == [(step, False) for step in range(1, 6)] * 2
    assert dense.name == "dense" and list(dense.stages) == ["dense"]
    assert [p.loss for p in dense.held_out] == [p.loss for p in none.held_out]  # to the last bit


def plain_loss(folder: Path, text: Path, result: PretrainResult) -> float:
    """The held-out loss of the saved model, by Transformers alone."""
    run = prepare(options(text), training(folder / "other"))
    model = AutoModelForCausalLM.from_pretrained(result.model_folder).eval()
    _, rows = run_module.data.rows_of(run.corpus)
    losses = []
    for row in rows:
        ids = torch.as_tensor(row["input_ids"]).long()[None]
        with torch.no_grad():
            losses.append(model(input_ids=ids, labels=ids).loss.item())
    return sum(losses) / len(losses)


def test_the_held_out_loss_is_the_plain_models_cross_entropy(tmp_path, text, trained):
    result, _ = trained
    assert result.loss == pytest.approx(plain_loss(tmp_path, text, result), rel=1e-5)


def test_with_label_smoothing_the_held_out_loss_is_the_cross_entropy_too(tmp_path, text):
    result = pretrain(options(text), training(tmp_path, label_smoothing_factor=0.4))
    assert result.loss == pytest.approx(plain_loss(tmp_path, text, result), rel=1e-5)


NAMES = [({"share": 0.6}, "two-stage"), ({"share": 1.0}, "lighthouse-only"), ({"dense_only": True}, "dense")]
NAMES += [({"switch_step": 9}, "lighthouse-only"), ({"switch_step": 4}, "two-stage"), ({"share": 0.0}, "dense")]


@pytest.mark.parametrize("when, name", NAMES, ids=str)
def test_a_run_is_named_by_the_stages_that_it_has(tmp_path, text, when, name):
    assert prepare(options(text, **when), training(tmp_path))._name == name


def test_lighthouse_alone_is_said_to_be_no_model_for_use(tmp_path, text, caplog, monkeypatch):
    steps = watch(monkeypatch)
    result = pretrain(options(text, lighthouse_only=True), training(tmp_path))
    assert steps == [(step, True) for step in range(1, 6)]
    assert result.name == "lighthouse-only" and list(result.stages) == ["lighthouse"]
    assert "All 5 steps of these weights used" in result.warnings[0] and result.warnings[0] in caplog.text
    assert PretrainResult.load(tmp_path / "results.json").warnings == result.warnings
    assert result.loss == pytest.approx(plain_loss(tmp_path, text, result), rel=1e-5)


def test_with_the_best_model_its_loss_is_the_one_reported(tmp_path, text):
    best = {"load_best_model_at_end": True, "save_strategy": "steps", "save_steps": 1, "eval_steps": 1}
    result = pretrain(options(text), training(tmp_path, learning_rate=0.5, **best))
    losses = {point.step: point.loss for point in result.held_out}
    assert result.model_step == min(losses, key=losses.get) != result.steps
    assert result.loss == min(losses.values())


def test_a_best_model_from_before_the_switch_is_said_to_be_no_model_for_use(tmp_path, text, caplog):
    """A rate so high at the end that the dense stage makes it worse."""

    class Spoil(TrainerCallback):
        def on_step_begin(self, args, state, control, optimizer=None, **kwargs):
            for group in optimizer.param_groups:
                group["lr"] = 1e-3 if state.global_step < 3 else 2.0

    best = {"load_best_model_at_end": True, "save_strategy": "steps", "save_steps": 1, "eval_steps": 1}
    result = prepare(options(text), training(tmp_path, **best)).train(callbacks=[Spoil()])
    assert result.switch_step == 3 and result.model_step <= 3
    warning = f"All {result.model_step} steps of these weights used Lighthouse"
    assert len(result.warnings) == 1 and warning in result.warnings[0] and warning in caplog.text
    assert history_of_checkpoint(tmp_path / "model").warnings() == result.warnings


@pytest.mark.parametrize("order", ["random", "sequential"])
def test_every_step_is_whole_and_has_the_tokens_that_it_counts_for(tmp_path, monkeypatch, order):
    """Where rows, batches and accumulation do not divide: in each pass a part of a step's rows is left for the next."""
    seen, step = [], run_module.RunTrainer.training_step

    def counted(trainer, model, inputs, *args, **kwargs):
        seen.append((trainer.state.global_step + 1, inputs["input_ids"].numel(), trainer.state.epoch))
        return step(trainer, model, inputs, *args, **kwargs)

    monkeypatch.setattr(run_module.RunTrainer, "training_step", counted)
    rows = {"per_device_train_batch_size": 4, "gradient_accumulation_steps": 2}
    strategy = {"train_sampling_strategy": order} if "train_sampling_strategy" in TRAINERS else {}
    text = write_text(tmp_path / "text", files=4, words=250)
    result = pretrain(options(text), training(tmp_path / "run", max_steps=5, eval_strategy="no", **rows, **strategy))
    assert seen[-1][2] >= 1  # the second pass
    tokens = [sum(numel for at, numel, _ in seen if at == number) for number in range(1, 6)]
    assert tokens == [4 * 2 * CONTEXT] * 5
    assert sum(stage.tokens for stage in result.stages.values()) == sum(tokens)
    assert [point.step for point in result.held_out] == [5]  # the one evaluation where none is asked for


def test_a_step_of_more_rows_than_the_text_has_is_refused(tmp_path, text):
    with pytest.raises(ValueError, match=r"a step needs 64 rows .*, and the text has only \d\d: use fewer"):
        pretrain(options(text, context=512), training(tmp_path / "run", per_device_train_batch_size=64))
    assert not (tmp_path / "run").exists()


HELD_OUT = [
    ("one_process", 1, 5, 4, 4),
    ("divides", 2, 8, 2, 2),
    ("does_not", 2, 6, 4, 3),
    ("no_size_does", 2, 5, 4, 1),
]


@pytest.mark.parametrize("processes, rows, wanted, found", [h[1:] for h in HELD_OUT], ids=[h[0] for h in HELD_OUT])
def test_no_held_out_row_counts_twice(capsys, processes, rows, wanted, found):
    """Several processes would fill the last batch with rows again."""
    args = SimpleNamespace(per_device_eval_batch_size=wanted, world_size=processes, process_index=0)
    assert rows_to_evaluate(rows, args) == found
    assert (f"from {wanted} to {found}" in capsys.readouterr().out) == (found != wanted)


def test_the_saved_folder_needs_nothing_of_this_package(trained):
    result, _ = trained
    program = f"""
import sys
class Absent:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] == "lighthouse":
            raise ModuleNotFoundError(name)
sys.meta_path.insert(0, Absent())
from transformers import AutoModelForCausalLM, AutoTokenizer
model = AutoModelForCausalLM.from_pretrained({result.model_folder!r})
tokenizer = AutoTokenizer.from_pretrained({result.model_folder!r})
ids = tokenizer("the light", return_tensors="pt", add_special_tokens=False).input_ids
print(type(model).__name__, model.config.use_cache, model(ids).logits.shape[-1], len(tokenizer))
print(model.generate(ids, max_new_tokens=3, min_new_tokens=3).shape[1] - ids.shape[1])
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == ["LlamaForCausalLM", "True", "384", "384", "3"]
    for path in Path(result.model_folder).iterdir():
        assert b"lighthouse" not in path.read_bytes().lower(), path


def test_the_tokenizer_is_saved_with_it(trained):
    result, _ = trained
    tokenizer = AutoTokenizer.from_pretrained(result.model_folder)
    assert tokenizer("Füße", add_special_tokens=False).input_ids == [byte + 3 for byte in "Füße".encode()]


def test_weights_depend_on_the_seed_alone():
    first, second, other = (new_model("nano", CONTEXT, seed).lm_head.weight for seed in (1, 1, 2))
    assert torch.equal(first, second) and not torch.equal(first, other)


def test_training_options_of_the_trainer_count(tmp_path, text):
    result = pretrain(
        options(text),
        training(
            tmp_path,
            gradient_accumulation_steps=2,
            per_device_train_batch_size=2,
            **{CHECKPOINTING: True},
            bf16=True,
        ),
    )
    assert result.dense.tokens == 2 * 4 * CONTEXT
    assert result.loss < 6.1


def test_it_learns(tmp_path, text):
    result = pretrain(options(text), training(tmp_path, max_steps=40, eval_steps=20, learning_rate=5e-3))
    assert result.held_out[0].loss > result.loss + 0.1 and result.loss < 3.5


REFUSED = [
    ("share_above_one", {"share": 1.5}, {}, "share=1.5: a share of the steps, 0 to 1"),
    ("share_below_zero", {"share": -0.1}, {}, "share=-0.1"),
    ("share_not_a_number", {"share": float("nan")}, {}, "share=nan"),
    ("no_steps", {}, {"max_steps": 0}, "max_steps=0: at least one step"),
    ("steps_left_to_epochs", {}, {"max_steps": -1}, "max_steps=-1"),
    ("unknown_size", {"model": "huge"}, {}, "model='huge': give one of nano, tiny"),
    ("longer_than_the_model_allows", {"context": 65_537}, {}, "context=65537: model 'nano' allows at most 65536"),
    ("no_context", {"context": 1}, {}, "context=1: at least 2"),
    ("nothing_held_out", {"held_out": 0}, {}, "held_out=0"),
    ("a_ratio_that_is_none", {"pool_ratios": ["0.3"]}, {}, r"pool_ratios\[0\]=0.3"),
    ("a_ratio_that_is_no_number", {"pool_ratios": ["a quarter"]}, {}, "pool_ratios=a quarter: a number"),
    ("nothing_at_all", {"select_topk": "0", "local_window": "0"}, {}, "select_topk=0"),
    ("all_layers_dense", {"dense_layers": 2}, {}, "dense_layers=2: .* none is left for Lighthouse"),
    ("a_folder_that_is_not_there", {"data": "/no/such/folder"}, {}, "data='/no/such/folder' does not exist"),
    (
        "more_memory_than_there_is",
        {"model": "llama-8b", "context": 1_000_000},
        {},
        "out of memory: a training step needs at least .* use a shorter --context, --gradient_checkpointing true",
    ),
    ("shards_on_a_cpu", {}, {"fsdp": "full_shard"}, "fsdp with 1 process on a cpu device"),
    ("workers_that_each_stream", {"stream": True}, {"dataloader_num_workers": 2}, "each would read the whole text"),
    ("a_streams_own_seed", {"stream": True}, {"data_seed": 1}, "data_seed=1 with stream: .* follows from seed"),
    ("a_stream_in_order", {"stream": True}, {"train_sampling_strategy": "sequential"}, "='sequential' with stream: "),
    ("nothing_to_resume", {}, {"resume": True}, "holds no checkpoint to resume from"),
    ("a_checkpoint_that_is_not_there", {}, {"resume_from_checkpoint": "/no/such"}, "'/no/such' is not a folder"),
    ("a_batch_size_that_changes", {}, {"auto_find_batch_size": True}, "auto_find_batch_size=True: the steps' tokens"),
    ("checkpoints_to_no_avail", {}, {"save_only_model": True}, "save_only_model=True: no run could resume"),
    ("another_hand_on_the_signal", {}, {"enable_jit_checkpoint": True}, "SIGTERM already saves a checkpoint"),
]


LARGER = [
    ("a_window_beside_the_pyramid", {}, "Lighthouse"),
    ("no_window", {"local_window": "0"}, "dense"),
    ("no_window_and_no_dense_stage", {"local_window": "0", "lighthouse_only": True}, "Lighthouse"),
    ("a_dense_run", {"dense_only": True}, "dense"),
]


@pytest.mark.parametrize("run, stage", [each[1:] for each in LARGER], ids=[each[0] for each in LARGER])
def test_the_larger_stage_must_fit(tmp_path, text, monkeypatch, run, stage):
    needed = []
    monkeypatch.setattr(run_module, "check_memory", lambda estimate, device: needed.append(estimate))
    prepare(options(text, **run), training(tmp_path))
    assert [estimate.what.split()[1] for estimate in needed] == [stage]


@pytest.mark.parametrize("run, trainer, message", [r[1:] for r in REFUSED], ids=[r[0] for r in REFUSED])
def test_refused_before_any_work(tmp_path, text, run, trainer, message):
    folder = tmp_path / "run"
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        prepare(options(text, **run), training(folder, **trainer))
    assert not folder.exists()


def test_a_folder_with_a_run_is_not_written_over(text, trained):
    folder = Path(trained[0].model_folder).parent
    before = {path: path.stat().st_mtime_ns for path in folder.rglob("*")}
    with pytest.raises(FileExistsError, match="already holds a run: use another folder .* --resume, or delete"):
        prepare(options(text), training(folder))
    assert {path: path.stat().st_mtime_ns for path in folder.rglob("*")} == before


def test_two_runs_are_not_in_one_folder(tmp_path, text, monkeypatch):
    """Not at the same time, nor one after the other where the second was prepared before the first began."""
    monkeypatch.setattr(checkpoints, "WORKERS_END", 0.2)
    first, second = (prepare(options(text, dense_only=True), training(tmp_path / "run", max_steps=1)) for _ in range(2))
    with (
        checkpoints.alone_in(tmp_path / "run"),
        pytest.raises(Refused, match="another process is training in"),
    ):
        first.train()
    assert list((tmp_path / "run").iterdir()) == []
    result = first.train()
    with pytest.raises(Refused, match="holds a run that another process has started"):
        second.train()
    assert PretrainResult.load(tmp_path / "run" / "results.json") == result


def test_a_file_is_no_output_folder(tmp_path, text):
    (tmp_path / "run").write_text("")
    with pytest.raises(FileExistsError, match="is a file: a folder is needed"):
        prepare(options(text), training(tmp_path / "run"))


def test_what_a_run_says(tmp_path, text):
    said = str(prepare(options(text), training(tmp_path)))
    for part in (
        "5 steps of 128 tokens: 3 with Lighthouse, 2 dense",
        "measured with dense",
    ):
        assert part in said
    assert "dense attention is as fast" in said  # at 128 tokens


@pytest.mark.parametrize("checkpointing, graphs", [(False, 3), (True, 4)], ids=["plain", "activation_checkpointing"])
def test_compiled_layers(tmp_path, text, trained, monkeypatch, checkpointing, graphs):
    """Two graphs to train with, Lighthouse's and the dense one, for all layers and both stages, and what evaluates:
    with checkpointing the first layer's input asks for a gradient there too."""
    plain_compile = torch.nn.Module.compile
    quick = {"backend": "aot_eager"}
    monkeypatch.setattr(torch.nn.Module, "compile", lambda self, **options: plain_compile(self, **options, **quick))
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    compiled = pretrain(options(text, compile_layers=True), training(tmp_path, **{CHECKPOINTING: checkpointing}))
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == graphs
    assert [p.loss for p in compiled.held_out] == pytest.approx([p.loss for p in trained[0].held_out], rel=1e-4)
    model = AutoModelForCausalLM.from_pretrained(compiled.model_folder)
    assert list(model.state_dict()) == list(new_model("nano", CONTEXT, 0).state_dict())


def test_a_run_with_callbacks_of_the_callers_that_keeps_no_model(tmp_path, text):
    losses = []

    class Watch(TrainerCallback):
        def on_evaluate(self, args, state, control, metrics=None, **kwargs):
            losses.append(metrics["eval_loss"])

    result = prepare(options(text), training(tmp_path)).train(callbacks=[Watch()], keep_model=False)
    assert losses == [point.loss for point in result.held_out]
    assert result.model_folder is None and PretrainResult.load(tmp_path / "results.json") == result
    assert not (tmp_path / "model").exists()


@pytest.mark.parametrize("workers", [0, 1])
def test_a_run_whose_streamed_text_changes_says_where_it_can_go_on(tmp_path, workers):
    folder = write_text(tmp_path / "text", files=4, words=100)

    class Change(TrainerCallback):
        def on_step_begin(self, args, state, control, **kwargs):
            if state.global_step == 2:
                (folder / "00.txt").write_text("another text")

    run = prepare(
        options(folder, stream=True, held_out=1),
        training(tmp_path / "run", max_steps=99, save_strategy="steps", save_steps=1, dataloader_num_workers=workers),
    )
    said = (
        r"^data='[^\n]*00.txt' changed since this command found it: [^\n]* The last whole checkpoint is "
        r"[^\n]*/checkpoint-\d+: the same command with --resume continues from there. It needs the text that [^\n]*$"
    )
    with pytest.raises(TextFailed, match=said) as ended:
        run.train(callbacks=[Change()])
    assert isinstance(ended.value, RunFailed)  # a sentence and exit status 1, and no traceback
