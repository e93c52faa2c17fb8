"""A wrapped model under Transformers' Trainer and accelerate: columns, checkpoints, resuming, evaluation, leftovers."""

import json

import pytest
import torch
from accelerate import Accelerator
from transformers import LlamaForCausalLM, LlamaModel, Trainer, TrainerCallback, TrainingArguments

from small_llama import LIGHTHOUSE_LAYERS, MODELS, TOKENS, VOCABULARY, Spy, ids, plain, wrapped

pytestmark = pytest.mark.usefixtures("one_thread")

both = pytest.mark.parametrize("model_class", MODELS)


class Rows(torch.utils.data.Dataset):
    """Sequences with a column that no model takes."""

    def __init__(self, rows=8, **columns):
        starts = torch.arange(rows)[:, None]
        self.ids, self.columns = (starts + torch.arange(TOKENS)) % VOCABULARY, columns

    def __len__(self):
        return len(self.ids)

    def __getitem__(self, index):
        row = {"input_ids": self.ids[index], "labels": self.ids[index]}
        return {**row, **{name: value[index] for name, value in self.columns.items()}}


class Losses(TrainerCallback):
    def __init__(self):
        self.losses = {}

    def on_log(self, args, state, control, logs=None, **kwargs):
        if "loss" in logs:
            self.losses[state.global_step] = logs["loss"]


class SwitchAt(TrainerCallback):
    """Lighthouse before the step, dense attention from it on: the step is absolute, so that resuming repeats it."""

    def __init__(self, step, model):
        self.step, self.model = step, model

    def on_step_begin(self, args, state, control, **kwargs):
        self.model.lighthouse(state.global_step < self.step)


def trainer(model, folder, callbacks=(), data=None, **arguments):
    arguments = {
        "max_steps": 4,
        "per_device_train_batch_size": 2,
        "logging_steps": 1,
        "learning_rate": 1e-2,
        "report_to": "none",
        "use_cpu": True,
        "disable_tqdm": True,
        "seed": 5,
        "save_strategy": "no",
        **arguments,
    }
    losses = Losses()
    result = Trainer(
        model=model,
        args=TrainingArguments(output_dir=str(folder), **arguments),
        train_dataset=data or Rows(),
        eval_dataset=Rows(4),
        callbacks=[losses, *callbacks],
    )
    result.losses = losses.losses
    return result


@both
def test_trainer_trains_and_keeps_the_columns(model_class, tmp_path):
    spy = Spy()
    run = trainer(wrapped(model_class, spy=spy), tmp_path, max_steps=6)
    run._set_signature_columns_if_needed()
    assert {"input_ids", "labels", "attention_mask", "position_ids"} <= set(run._signature_columns)
    assert run.label_names == ["labels"] and run.model_accepts_loss_kwargs and run._loss_shifts_labels
    run.train()
    assert spy.calls == 6 * LIGHTHOUSE_LAYERS
    assert run.losses[6] < 0.95 * run.losses[1]


@pytest.mark.parametrize("accumulation", [1, 2])
def test_switched_off_it_trains_as_the_plain_model(accumulation, tmp_path):
    """With accumulation the Trainer counts the tokens of all parts: their losses are sums over that number."""
    arguments = {"gradient_accumulation_steps": accumulation, "per_device_train_batch_size": 2 // accumulation}
    found = trainer(wrapped().lighthouse(False), tmp_path, **arguments)
    expected = trainer(plain(), tmp_path, **arguments)
    found.train()
    expected.train()
    for step, loss in expected.losses.items():
        assert found.losses[step] == pytest.approx(loss, rel=1e-4)


@pytest.mark.parametrize(("model_class", "from_steps"), [(LlamaModel, (2,)), (LlamaForCausalLM, (2, 4))])
def test_checkpoints_are_the_plain_models_and_resume_in_either_stage(model_class, from_steps, tmp_path):
    def run(folder, resume=None):
        spy = Spy()
        model = wrapped(model_class, spy=spy)
        result = trainer(model, folder, [SwitchAt(3, model)], save_strategy="steps", save_steps=2, max_steps=6)
        result.train(resume_from_checkpoint=resume)
        assert spy.calls == LIGHTHOUSE_LAYERS * (3 if resume is None else 1 if resume.endswith("-2") else 0)
        return result

    whole = run(tmp_path / "whole")
    checkpoint = tmp_path / "whole" / "checkpoint-2"
    text = (checkpoint / "config.json").read_text()
    assert json.loads(text)["architectures"] == [model_class.__name__] and "lighthouse" not in text
    assert type(model_class.from_pretrained(checkpoint)) is model_class
    for step in from_steps:
        resumed = run(tmp_path / f"from-{step}", str(tmp_path / "whole" / f"checkpoint-{step}"))
        assert {s: loss for s, loss in whole.losses.items() if s > step} == resumed.losses
    model = whole.model.unwrap()
    assert type(model) is model_class
    final = model_class.from_pretrained(tmp_path / "whole" / "checkpoint-6")
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), final.parameters(), strict=True))


@pytest.mark.parametrize("loss_only", [True, False])
@both
def test_evaluation_is_dense(model_class, loss_only, tmp_path):
    spy = Spy()
    model = wrapped(model_class, spy=spy)
    found = trainer(model, tmp_path, prediction_loss_only=loss_only).evaluate()["eval_loss"]
    assert spy.calls == 0 and not model.training
    never = wrapped(model_class).unwrap().eval()
    with torch.no_grad():
        if model_class is LlamaModel:
            logits = never(Rows(4).ids).last_hidden_state @ never.embed_tokens.weight.T
        else:
            logits = never(Rows(4).ids).logits
    expected = torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), Rows(4).ids[:, 1:].flatten())
    assert found == pytest.approx(expected.item(), rel=1e-5)


def test_metrics_from_logits(tmp_path):
    model = wrapped(loss="model")
    run = trainer(model, tmp_path)
    run.compute_metrics = lambda prediction: {"shape": prediction.predictions.shape}
    assert run.evaluate()["eval_shape"] == (4, TOKENS, VOCABULARY)


def test_padding_is_refused_by_the_trainer_too(tmp_path):
    mask = torch.ones(8, TOKENS, dtype=torch.long)
    mask[:, -3:] = 0
    with pytest.raises(ValueError, match="attention_mask hides tokens"):
        trainer(wrapped(), tmp_path, data=Rows(attention_mask=mask)).train()
    trainer(wrapped().lighthouse(False), tmp_path, data=Rows(attention_mask=mask), max_steps=1).train()


@both
def test_unwrapping_removes_what_mixed_precision_leaves(model_class, tmp_path):
    spy = Spy()
    model = wrapped(model_class, spy=spy)
    trainer(model, tmp_path, bf16=True, max_steps=2).train()
    assert spy.calls == 2 * LIGHTHOUSE_LAYERS
    assert "forward" in vars(model)  # accelerate's, around the wrapped class's
    model.unwrap()
    assert "forward" not in vars(model) and "_original_forward" not in vars(model)
    assert type(model(ids())) is type(plain(model_class)(ids()))


def test_a_forward_that_others_set_stays():
    """Liger, for one, sets a forward on the instance; accelerate then puts its own around that."""
    model = wrapped()

    def theirs(self, *args, **kwargs):
        return LlamaForCausalLM.forward(self, *args, **kwargs)

    model.forward = theirs.__get__(model)
    Accelerator(cpu=True, mixed_precision="bf16").prepare(model)
    model.unwrap()
    assert model.forward.__func__ is theirs and "_original_forward" not in vars(model)
