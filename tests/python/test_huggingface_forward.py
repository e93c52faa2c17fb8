"""One forward of a wrapped model: what it does inside of others, beside others, compiled, and for the loss it makes."""

import copy
import functools
import threading
import types

import pytest
import torch
import torch.nn.functional as F
from torch._subclasses.fake_tensor import FakeTensorMode
from transformers import LlamaForCausalLM, LlamaModel
from transformers.models.llama.modeling_llama import LlamaDecoderLayer

from lighthouse import LighthouseWrapper
from lighthouse.huggingface.loss import next_token_loss
from small_llama import (
    LIGHTHOUSE_LAYERS,
    SETTINGS,
    TOKENS,
    VOCABULARY,
    Spy,
    ids,
    plain,
    wrapped,
)

pytestmark = pytest.mark.usefixtures("one_thread")

LONG, SHORT = {"input_ids": ids()}, {"input_ids": ids(tokens=20)}
ONE_LAYER = {"num_hidden_layers": 1}


# Inside of another forward, and beside one


def test_a_forward_inside_a_forward_leaves_the_outer_one_as_it_was():
    spy = Spy()
    model = wrapped(spy=spy, min_tokens=50)
    inside = []

    def short(*_):
        if not inside:
            inside.append(True)
            with torch.no_grad():
                model(SHORT)

    model.model.layers[0].register_forward_hook(short)
    assert spy.since(lambda: model(LONG)) == LIGHTHOUSE_LAYERS


def test_threads_with_different_attentions_are_refused():
    model = wrapped(min_tokens=50)
    begun, go_on = threading.Event(), threading.Event()

    def wait(*_):
        begun.set()
        go_on.wait(20)

    handle = model.model.layers[0].register_forward_hook(wait)
    thread = threading.Thread(target=lambda: model(LONG))
    thread.start()
    begun.wait(20)
    handle.remove()
    try:
        with pytest.raises(RuntimeError, match="another thread is running this model"):
            model(SHORT)
        with pytest.raises(RuntimeError, match="another thread is running this model"):
            model.generate(ids(), max_new_tokens=1)
        model(LONG)
    finally:
        go_on.set()
        thread.join()
    model(SHORT)


# Off, it is the plain model


OFF = [
    ("packed", {"position_ids": (torch.arange(TOKENS) % 40).expand(2, -1)}),
    ("shifted", {"position_ids": 3 + torch.arange(TOKENS).expand(2, -1)}),
    ("ignore_index", {"ignore_index": 0}),
    ("numbered_mask", {"attention_mask": 1 + torch.arange(TOKENS).expand(2, -1) // 40}),
    ("padding", {"attention_mask": (torch.arange(TOKENS) < 50).long().expand(2, -1)}),
]


@pytest.mark.parametrize("extra", [case[1] for case in OFF], ids=[case[0] for case in OFF])
@pytest.mark.parametrize("why", ["off", "too_short", "eval"])
def test_where_it_does_not_act_the_loss_is_the_plain_models(extra, why):
    model, never = wrapped(min_tokens=TOKENS + 1 if why == "too_short" else 0), plain()
    model.lighthouse(why != "off")
    for m in (model, never):
        m.train(why != "eval")
    found, expected = (m(ids(), labels=ids(), **extra).loss for m in (model, never))
    torch.testing.assert_close(found, expected)


def test_another_loss_type_stays_the_models_own():
    def changed():
        model = plain()
        model.loss_type = "ForMaskedLM"
        return model

    expected = changed()(ids(), labels=ids()).loss
    with pytest.raises(ValueError, match="has its own loss function"):
        LighthouseWrapper(changed(), **SETTINGS)
    model = LighthouseWrapper(changed(), **SETTINGS, loss="model").lighthouse(False)
    assert torch.equal(model(ids(), labels=ids()).loss, expected)
    assert model.unwrap().loss_type == "ForMaskedLM"


def test_a_name_set_while_it_is_off_is_honoured():
    model = wrapped().lighthouse(False)
    model.config._attn_implementation = "eager"
    model(LONG)
    assert model.config._attn_implementation == "eager"
    assert model.lighthouse(True).lighthouse(False).config._attn_implementation == "eager"
    model.model.set_attn_implementation("sdpa")
    model(LONG)
    assert model.unwrap().config._attn_implementation == "sdpa"


def test_shift_labels_alone_give_a_loss_of_the_models_own_too():
    shifted = F.pad(ids(), (0, 1), value=-100)[:, 1:].contiguous()
    found = wrapped(loss="model")({**LONG, "shift_labels": shifted}).loss
    torch.testing.assert_close(found, wrapped(loss="model")({**LONG, "labels": ids()}).loss)


def test_hidden_states_in_an_evaluation_do_not_take_the_place_of_the_logits():
    model, never = wrapped().eval(), plain().eval()
    found, expected = (m(ids(), labels=ids(), output_hidden_states=True) for m in (model, never))
    assert torch.equal(found.logits, expected.logits)


# The loss without logits


@pytest.mark.parametrize("model_class", [LlamaModel, LlamaForCausalLM])
def test_second_derivatives_are_refused(model_class):
    model = wrapped(model_class, config={"attn_implementation": "eager"}).lighthouse(False)
    loss = model(LONG).loss
    weight = model.base_model.layers[0].mlp.up_proj.weight
    with pytest.raises(NotImplementedError, match="no second derivatives"):
        torch.autograd.grad(loss, weight, create_graph=True)


def test_the_gradient_is_scaled_in_float32():
    hidden, layer = torch.randn(1, 8, 16).bfloat16().requires_grad_(), torch.nn.Linear(16, VOCABULARY).bfloat16()
    labels, number = torch.randint(VOCABULARY, (1, 8)), 98_303  # whose inverse bfloat16 has by 0.1 %
    (one,) = torch.autograd.grad(next_token_loss(layer, hidden, labels, num_items_in_batch=1), hidden)
    (found,) = torch.autograd.grad(next_token_loss(layer, hidden, labels, num_items_in_batch=number), hidden)
    assert torch.equal(found, (one.float() * (torch.ones(()) / number)).bfloat16())


def doubled(module, inputs, output):
    return 2 * output


def test_hooks_on_a_bare_models_embedding_are_the_embeddings():
    def made():
        model = plain(LlamaModel)
        model.embed_tokens.register_forward_hook(doubled)
        return model

    model, never = LighthouseWrapper(made(), **SETTINGS).lighthouse(False), made()
    logits = never(ids()).last_hidden_state @ never.embed_tokens.weight.T
    expected = F.cross_entropy(logits[:, :-1].flatten(0, 1), ids()[:, 1:].flatten())
    torch.testing.assert_close(model(LONG).loss, expected)


def sharding_hook():
    def hook(module, inputs):
        return None

    hook.__module__ = "torch.distributed.fsdp._fully_shard._fsdp_state"
    return hook


def test_hooks_that_gather_shards_are_no_loss_of_its_own(said):
    model = plain()
    model.lm_head.register_forward_pre_hook(sharding_hook())
    assert LighthouseWrapper(model, **SETTINGS)(LONG).logits is None
    bare = plain(LlamaModel)
    bare.embed_tokens.register_forward_pre_hook(sharding_hook())
    bare.embed_tokens.register_forward_hook(doubled)
    with pytest.raises(ValueError, match="embedding is sharded and has a hook, .*doubled"):
        LighthouseWrapper(bare, **SETTINGS)(LONG)
    assert said == []


# A forward on the instance


def test_a_forward_that_comes_onto_the_instance_is_refused():
    model = wrapped()
    model.forward = types.MethodType(LlamaForCausalLM.forward, model)
    for look in (model.train, lambda: model.lighthouse(True)):
        with pytest.raises(ValueError, match="got its own forward on the instance after"):
            look()


@pytest.mark.parametrize("how", ["compiled", "decorated", "partial"])
def test_a_forward_on_the_instance_that_leads_to_ours_is_taken_off(how):
    spy = Spy()
    model = wrapped(spy=spy)
    model.forward = {
        "compiled": lambda f: torch.compile(f, backend="eager"),
        "decorated": lambda f: functools.wraps(f)(lambda *args, **kwargs: f(*args, **kwargs)),
        "partial": functools.partial,
    }[how](model.forward)
    model.train()
    assert spy.since(lambda: model(LONG)) == LIGHTHOUSE_LAYERS
    model.unwrap()
    assert "forward" not in vars(model) and torch.equal(model(ids()).logits, plain()(ids()).logits)


# Compiled as a whole


def with_loss_function(model):
    model.loss_function = lambda logits, labels, vocab_size, **kwargs: 7 + 0 * logits.sum()


def test_compiled_code_takes_a_loss_of_the_models_own():
    model = wrapped(config=ONE_LAYER)
    with_loss_function(model)
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    assert compiled(LONG).loss.item() == 7


def test_compiled_code_looks_at_what_was_changed_before_it():
    model = wrapped(config=ONE_LAYER)
    module = model.model.layers[0].self_attn
    module.forward = types.MethodType(type(module).forward, module)
    with pytest.raises(Exception, match="has its own forward on the instance"):
        torch.compile(model, backend="aot_eager", fullgraph=True)(LONG)


@pytest.mark.slow  # three graphs of any length
def test_compiled_for_any_length_a_short_batch_says_why_it_is_dense(said):
    model = wrapped(config=ONE_LAYER, min_tokens=50, max_share=0.9)
    compiled = torch.compile(model, backend="aot_eager", dynamic=True)
    for batch in (SHORT, LONG):
        compiled(batch).loss.backward()
    assert ["fewer than 50 tokens" in message for message in said] == [True]


# What is counted


def test_compiled_forwards_leave_the_share_unsaid(said):
    model = wrapped(config=ONE_LAYER)
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    model(LONG)
    model.lighthouse(False)
    compiled(LONG)
    model.unwrap()
    assert said == []


def test_training_in_eval_counts_where_lighthouse_acts(said):
    model = wrapped(eval="lighthouse").eval()
    model(**LONG, labels=ids(), use_cache=False).loss.backward()
    assert model.take_used() == (True, False)
    model.unwrap()
    assert "no step of dense attention" in said[-1]


def test_saving_right_after_the_switch_says_that_it_is_not_ready(said, tmp_path):
    model = wrapped(config=ONE_LAYER)
    model(LONG)
    model.lighthouse(False).save_pretrained(tmp_path / "early")
    assert len(said) == 1 and "not ready for dense attention" in said[0]
    model(LONG)
    model.save_pretrained(tmp_path / "late")
    assert len(said) == 1


# What is not refused


def test_what_no_attention_reads_is_taken():
    zeros = torch.zeros(2, TOKENS, dtype=torch.long)
    found = wrapped()({**LONG, "token_type_ids": zeros, "special_tokens_mask": zeros}).loss
    assert torch.equal(found, wrapped()(LONG).loss)


class Weighted(LlamaForCausalLM):
    def forward(self, input_ids=None, labels=None, sample_weights=None, **kwargs):
        out = super().forward(input_ids=input_ids, labels=labels, **kwargs)
        out.loss = out.loss * sample_weights.mean()
        return out


def test_arguments_of_the_models_own_forward_are_taken():
    spy = Spy()
    model = LighthouseWrapper(plain(Weighted), **SETTINGS, inner=spy, loss="model")
    found = model({**LONG, "sample_weights": torch.full((2,), 3.0)}).loss
    torch.testing.assert_close(found, 3 * wrapped()(LONG).loss)
    assert spy.calls == LIGHTHOUSE_LAYERS


class WithAnotherHead(LlamaForCausalLM):
    def __init__(self, made):
        super().__init__(made)
        self.further = LlamaDecoderLayer(made, 9)

    def forward(self, *args, **kwargs):
        out = super().forward(*args, output_hidden_states=True, **kwargs)
        hidden = out.hidden_states[0]
        turns = self.model.rotary_emb(hidden, torch.arange(hidden.shape[1])[None])
        out.loss = out.loss + self.further(hidden, position_embeddings=turns).square().mean()
        return out


def test_attention_outside_the_row_of_layers_stays_dense():
    spy = Spy()
    model = LighthouseWrapper(plain(WithAnotherHead), **SETTINGS, inner=spy, loss="model")
    found = model(LONG).loss
    assert spy.calls == LIGHTHOUSE_LAYERS and torch.isfinite(found)
    model.lighthouse(False)
    torch.testing.assert_close(model(LONG).loss, plain(WithAnotherHead)(ids(), labels=ids()).loss)


def test_fake_tensors_are_one_document():
    model = wrapped(config=ONE_LAYER)
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        fake = {name: mode.from_tensor(value) for name, value in LONG.items()}
        assert model(fake).loss.shape == ()


def test_a_copied_state_runs_nowhere():
    model = wrapped()
    model._lighthouse.enter(acts=True)
    other = copy.deepcopy(model)
    assert not other._lighthouse.running and other._lighthouse.name != model._lighthouse.name
