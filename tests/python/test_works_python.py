"""What may look like a mistake from Python and works: batches of other kinds, a Trainer's options, models around."""

import copy
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.utils.data import DataLoader, TensorDataset
from transformers import AutoModelForCausalLM, LlamaForCausalLM, Trainer, TrainingArguments

from lighthouse import LighthouseWrapper
from lighthouse.huggingface import LighthouseCallback
from small_llama import LIGHTHOUSE_LAYERS, MODELS, SETTINGS, TOKENS, VOCABULARY, Spy, ids, plain, wrapped
from small_trainers import Container, Doubled, bare, rows, trainer

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.mark.parametrize("model_class", MODELS)
@pytest.mark.parametrize("state", ["on", "off", "eval"])
def test_one_tensor_in_a_tuple_or_list_is_a_batch(model_class, state):
    model = wrapped(model_class).lighthouse(state != "off").train(state != "eval")
    expected = model({"input_ids": ids()}).loss
    (loaded,) = DataLoader(TensorDataset(ids()), batch_size=2)
    for batch in (loaded, (ids(),), [ids()], [ids().int()]):
        assert torch.equal(model(batch).loss, expected)
    labels = ids(seed=9)
    assert torch.equal(model([ids()], labels=labels).loss, model({"input_ids": ids(), "labels": labels}).loss)


def test_a_bare_tensor_is_the_plain_models_call(said):
    model, never = wrapped().lighthouse(False), plain()
    for _ in range(2):
        found, expected = model(ids()), never(ids(), use_cache=False)
        assert found.loss is None and torch.equal(found.logits, expected.logits)
    assert len(said) == 1 and 'gives no loss: model({"input_ids": ids}) gives it' in said[0]
    model(input_ids=ids()), model.eval()(ids())
    assert len(said) == 1


def test_shifted_labels_have_a_name_of_their_own():
    shifted = torch.nn.functional.pad(ids(), (0, 1), value=-100)[:, 1:].contiguous()
    torch.testing.assert_close(wrapped()(ids(), shift_labels=shifted).loss, wrapped()({"input_ids": ids()}).loss)


REPEATED = {
    "one token over and over": torch.full((2, TOKENS), 7),
    "two tokens in turn": torch.arange(TOKENS).remainder(2).expand(2, -1),
}


@pytest.mark.parametrize("tokens", REPEATED)
def test_tokens_that_repeat_are_not_taken_for_shifted_labels(tokens):
    tokens = REPEATED[tokens]
    last_ignored = tokens.clone()
    last_ignored[:, -1] = -100
    for labels in (tokens, last_ignored):
        assert torch.isfinite(wrapped()(tokens, labels=labels).loss)


def expected_logits(model):
    model.unwrap()
    with torch.no_grad():
        return model.eval()(ids(4)).logits


def test_metrics_and_predictions_of_a_trainer_have_logits(tmp_path):
    seen = []
    model = wrapped()
    metrics = lambda found: seen.append(found) or {"tokens": found.label_ids.size}  # noqa: E731
    run = trainer(model, tmp_path, evaluated=rows(), metrics=metrics, eval_strategy="steps", eval_steps=1)
    run.train()
    assert run.evaluate()["eval_tokens"] == 4 * TOKENS and len(seen) == 3
    run.compute_metrics = None
    predictions, loss = run.predict(rows()).predictions, run.evaluate()["eval_loss"]
    expected = expected_logits(model)
    for found in (seen[-1].predictions, predictions):
        torch.testing.assert_close(torch.from_numpy(found), expected)
    assert loss == pytest.approx(trainer(model, tmp_path, evaluated=rows()).evaluate()["eval_loss"], rel=1e-5)


@pytest.mark.slow  # compiles for training and for evaluating
def test_metrics_of_compiled_code_have_logits(tmp_path):
    model = wrapped(config={"num_hidden_layers": 1})
    compiled = {"torch_compile": True, "torch_compile_backend": "aot_eager"}
    run = trainer(
        model, tmp_path, evaluated=rows(), metrics=lambda found: {"shape": found.predictions.shape}, **compiled
    )
    run.train()
    assert run.evaluate()["eval_shape"] == (4, TOKENS, VOCABULARY)
    assert run.predict(rows()).predictions.shape == (4, TOKENS, VOCABULARY)


def test_an_evaluation_for_the_loss_alone_holds_no_logits(tmp_path):
    class Spied(Trainer):
        def compute_loss(self, *args, **kwargs):
            loss, outputs = super().compute_loss(*args, **{**kwargs, "return_outputs": True})
            held.append(outputs.logits)
            return (loss, outputs) if kwargs.get("return_outputs") else loss

    held = []
    arguments = TrainingArguments(str(tmp_path), use_cpu=True, report_to="none", disable_tqdm=True)
    Spied(model=wrapped(), args=arguments, eval_dataset=rows()).evaluate()
    assert held == [None]


class InAThread(nn.Module):
    """Calls the model as DataParallel does its replicas."""

    def __init__(self, model):
        super().__init__()
        self.module, self.config = model, model.config

    def forward(self, input_ids=None, labels=None, **kwargs):
        def call():
            with torch.no_grad():
                return self.module(input_ids=input_ids, labels=labels, **kwargs)

        with ThreadPoolExecutor(1) as pool:
            return pool.submit(call).result()


def test_predictions_by_other_threads_have_logits(tmp_path):
    model = wrapped()
    found = trainer(InAThread(model).eval(), tmp_path).predict(rows()).predictions
    torch.testing.assert_close(torch.from_numpy(found), expected_logits(model))


def test_smoothed_labels_are_the_plain_models(tmp_path):
    found, expected = (
        trainer(model, tmp_path, label_smoothing_factor=0.2).train().training_loss
        for model in (wrapped().lighthouse(False), plain())
    )
    assert found == pytest.approx(expected, rel=1e-5)


def test_a_loss_function_of_the_trainers_gets_the_logits_without_labels(tmp_path):
    def loss(outputs, labels, num_items_in_batch=None):
        return outputs.logits.float().logsumexp(-1).mean()

    run = trainer(wrapped(), tmp_path, data=rows())
    run.compute_loss_func = loss
    assert run.train().training_loss > 0


def test_noise_on_the_embeddings_of_a_bare_model(tmp_path):
    assert trainer(bare(), tmp_path, neftune_noise_alpha=5.0).train().training_loss > 0


def test_a_normal_run_says_nothing(tmp_path, said):
    model, callback = wrapped(), LighthouseCallback(switch_share=0.5)
    often = {"save_strategy": "steps", "save_steps": 1, "eval_strategy": "steps", "eval_steps": 1, "max_steps": 4}
    trainer(model, tmp_path, evaluated=rows(), callbacks=[callback], **often).train()
    model.unwrap().save_pretrained(tmp_path / "plain")
    assert len(list(tmp_path.glob("checkpoint-*/model.safetensors"))) == 4 and not said


def test_a_checkpoint_is_spoken_of_where_nothing_switches(tmp_path, said):
    trainer(wrapped(), tmp_path, save_strategy="steps", save_steps=1).train()
    assert len(said) == 1 and "the plain model is saved and Lighthouse is still on" in said[0]


def test_a_model_can_be_wrapped_after_the_trainer_was_made(tmp_path):
    model, spy = plain(), Spy()
    run = trainer(model, tmp_path, callbacks=[LighthouseCallback(switch_step=1)])
    LighthouseWrapper(model, **SETTINGS, inner=spy)
    run.train()
    assert spy.calls == LIGHTHOUSE_LAYERS and not model.lighthouse_enabled


def test_the_callback_finds_the_model_inside_of_another(tmp_path):
    spy = Spy()
    model = wrapped(spy=spy)
    callback = LighthouseCallback(switch_share=0.5)
    trainer(Container(model), tmp_path, callbacks=[callback], max_steps=4).train()
    assert spy.calls == 2 * LIGHTHOUSE_LAYERS and not model.lighthouse_enabled
    assert (callback.steps.lighthouse, callback.steps.dense) == (2, 2)


def test_an_output_layer_that_is_replaced_after_wrapping_has_the_models_own_loss(said):
    model = wrapped().lighthouse(False)
    model.lm_head = Doubled(32, VOCABULARY, bias=False)
    model.train()
    found = model({"input_ids": ids()})
    assert found.logits is not None and len(said) == 1
    assert "the output layer is a Doubled of small_trainers, not a plain nn.Linear" in said[0]


def test_a_second_model_of_a_wrapped_ones_configuration_is_wrapped_and_apart():
    spy = Spy()
    first = wrapped(spy=Spy())
    for made in (LlamaForCausalLM(first.config), LlamaForCausalLM(copy.deepcopy(first.config))):
        second = LighthouseWrapper(made.train(), **SETTINGS, inner=spy)
        assert spy.since(lambda: second({"input_ids": ids()}).loss.backward()) == LIGHTHOUSE_LAYERS  # noqa: B023
        first.eval()
        assert second.config._attn_implementation == "lighthouse" and first.config._attn_implementation == "sdpa"
        assert second.unwrap().config._attn_implementation == "sdpa"
        first.train()


def test_a_plain_model_is_made_of_a_wrapped_ones_configuration_as_the_message_says():
    first = wrapped()
    second = AutoModelForCausalLM.from_config(copy.deepcopy(first.config), attn_implementation="sdpa")
    first({"input_ids": ids()})
    assert torch.isfinite(second(ids(), labels=ids()).loss)
    assert first.config._attn_implementation == "lighthouse" and second.config._attn_implementation == "sdpa"


WORKS = {
    "distributed data parallel": nn.parallel.DistributedDataParallel,
    "data parallel without a GPU": nn.DataParallel,
    "compiled after wrapping": lambda model: torch.compile(model, backend="aot_eager"),
    "copied": copy.deepcopy,
}


@pytest.fixture
def one_process():
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.mark.parametrize("around", WORKS)
def test_what_is_put_around_a_wrapped_model_takes_its_batches(around, one_process):
    made = WORKS[around](wrapped(config={"num_hidden_layers": 1}))
    expected = wrapped(config={"num_hidden_layers": 1})({"input_ids": ids()}).loss
    for batch in ({"input_ids": ids()}, (ids(),)):
        loss = made(batch).loss
        loss.backward()
        torch.testing.assert_close(loss, expected)
