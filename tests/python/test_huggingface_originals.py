"""What Lighthouse replaces is what it takes it for: an attention, loss or layer of another kind is refused or kept."""

import functools
import types

import pytest
import torch
import torch.nn.functional as F
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import CheckpointImpl, checkpoint_wrapper
from torch.utils.checkpoint import checkpoint
from transformers import AttentionInterface, AttentionMaskInterface, LlamaForCausalLM
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.loss import loss_utils
from transformers.models.llama.modeling_llama import LlamaAttention, LlamaDecoderLayer

from lighthouse import LighthouseWrapper
from small_llama import (
    LIGHTHOUSE_LAYERS,
    MODELS,
    SETTINGS,
    TOKENS,
    VOCABULARY,
    Spy,
    ids,
    plain,
    wrapped,
)

pytestmark = pytest.mark.usefixtures("one_thread")


def attend(module, query, key, value, attention_mask, **kwargs):
    return F.scaled_dot_product_attention(query, key, value, is_causal=True, enable_gqa=True).transpose(1, 2), None


class Subclass(LlamaAttention):
    def forward(self, *args, **kwargs):
        return super().forward(*args, **kwargs)


class Renamed(LlamaAttention):
    pass


def decorated(function):
    @functools.wraps(function)
    def call(*args, **kwargs):
        return function(*args, **kwargs)

    return call


# An attention of its own


def first_attention(model):
    return model.base_model.layers[1].self_attn


def subclass(model, monkeypatch):
    first_attention(model).__class__ = Subclass


def instance(model, monkeypatch):
    module = first_attention(model)
    module.forward = types.MethodType(LlamaAttention.forward, module)


def dense_layer(model, monkeypatch):
    model.base_model.layers[0].self_attn.__class__ = Subclass


def patched(model, monkeypatch):
    monkeypatch.setattr(LlamaAttention, "forward", Subclass.forward)


def patched_by_a_decorator(model, monkeypatch):
    monkeypatch.setattr(LlamaAttention, "forward", decorated(LlamaAttention.forward))


def not_causal(model, monkeypatch):
    first_attention(model).is_causal = False


def registered(model, monkeypatch):
    monkeypatch.setitem(AttentionInterface._global_mapping, "mine", attend)
    model.config._attn_implementation = "mine"


def registered_mask(model, monkeypatch):
    monkeypatch.setitem(AttentionInterface._global_mapping, "documents", sdpa_attention_forward)
    monkeypatch.setitem(AttentionMaskInterface._global_mapping, "documents", lambda *args, **kwargs: None)
    model.config._attn_implementation = "documents"


def registered_as_the_mask_of_sdpa(model, monkeypatch):
    monkeypatch.setitem(AttentionMaskInterface._global_mapping, "sdpa", lambda *args, **kwargs: None)


def transformers_own_by_another_name(model, monkeypatch):
    monkeypatch.setitem(AttentionInterface._global_mapping, "other", sdpa_attention_forward)
    model.config._attn_implementation = "other"


class Called(LlamaAttention):
    def __call__(self, *args, **kwargs):
        return super().__call__(*args, **kwargs)


def call_of_its_own(model, monkeypatch):
    first_attention(model).__class__ = Called


def registered_as_sdpa(model, monkeypatch):
    monkeypatch.setitem(AttentionInterface._global_mapping, "sdpa", attend)


def registered_as_lighthouse(model, monkeypatch):
    monkeypatch.setitem(AttentionInterface._global_mapping, "lighthouse", attend)


def eager_replaced(model, monkeypatch):
    model.config._attn_implementation = "eager"
    monkeypatch.setitem(LlamaAttention.forward.__wrapped__.__globals__, "eager_attention_forward", attend)


def context_parallel(model, monkeypatch):
    def sdpa(*args, **kwargs):
        return attend(*args, **kwargs)

    sdpa.__module__ = "torch.distributed.tensor.experimental._context_parallel._attention"
    monkeypatch.setattr(F, "scaled_dot_product_attention", sdpa)


def shared_by_two_layers(model, monkeypatch):
    model.base_model.layers[2].self_attn = model.base_model.layers[1].self_attn


REPLACED = [
    (subclass, "attention of layer 1, a Subclass, has its own forward"),
    (instance, "layer 1, a LlamaAttention, has its own forward on the instance"),
    (dense_layer, "layer 0, a Subclass, has its own forward"),
    (patched, "layer 0, a LlamaAttention, has its own forward, .*Subclass.forward"),
    (patched_by_a_decorator, "layer 0, a LlamaAttention, has its own forward"),
    (not_causal, "layer 1, a LlamaAttention, has is_causal=False"),
    (registered, 'attention "mine" is .*attend, not one of Transformers'),
    (registered_mask, 'attention "documents" has a mask made by .*<lambda>, not by Transformers'),
    (registered_as_the_mask_of_sdpa, 'attention "sdpa" has a mask made by .*<lambda>'),
    (transformers_own_by_another_name, 'attention "other" was registered by its user'),
    (call_of_its_own, "layer 1, a Called, has its own __call__"),
    (registered_as_sdpa, 'attention "sdpa" is .*attend, not one of .*sequence parallelism'),
    (registered_as_lighthouse, 'attention "lighthouse" in Transformers. registry is .*attend'),
    (eager_replaced, 'attention "eager" is .*attend'),
    (context_parallel, "context parallelism is on"),
    (shared_by_two_layers, "one attention module is in several layers"),
]
NAMED = (registered, registered_mask, transformers_own_by_another_name, eager_replaced)
BEFORE = pytest.mark.parametrize(("replace", "message"), REPLACED, ids=[case[0].__name__ for case in REPLACED])
AFTER = pytest.mark.parametrize(
    ("replace", "message"),
    [(r, "config._attn_implementation was set to" if r in NAMED else m) for r, m in REPLACED],
    ids=[case[0].__name__ for case in REPLACED],
)


@BEFORE
def test_an_attention_of_its_own_is_refused_at_wrapping(replace, message, monkeypatch):
    model = plain()
    replace(model, monkeypatch)
    former = model.config._attn_implementation
    with pytest.raises(ValueError, match=message):
        LighthouseWrapper(model, **SETTINGS)
    assert type(model) is LlamaForCausalLM and model.config._attn_implementation == former
    assert not any("lighthouse_seat" in vars(module) for module in model.modules())


@AFTER
def test_an_attention_of_its_own_is_refused_after_wrapping(replace, message, monkeypatch):
    model = wrapped().lighthouse(False)
    replace(model, monkeypatch)
    for look in (lambda: model.lighthouse(True), model.train, lambda: model({"input_ids": ids()})):
        model._lighthouse.enabled = True
        with pytest.raises(ValueError, match=message):
            look()


def test_an_attention_function_chosen_after_wrapping_is_refused(monkeypatch):
    model = wrapped()
    monkeypatch.setitem(AttentionInterface._global_mapping, "mine", attend)
    with pytest.raises(ValueError, match='attention "mine" is .*attend'):
        model.set_attn_implementation("mine")
    assert model.config._attn_implementation == "lighthouse"
    assert model.unwrap().config._attn_implementation == "sdpa"


def test_a_subclass_without_a_forward_is_the_plain_attention():
    spy, model = Spy(), plain()
    for layer in model.model.layers:
        layer.self_attn.__class__ = Renamed
    LighthouseWrapper(model, **SETTINGS, inner=spy)({"input_ids": ids()})
    assert spy.calls == LIGHTHOUSE_LAYERS


def test_a_layer_without_attention_is_refused():
    model = plain()
    model.model.layers[2] = torch.nn.Identity()
    with pytest.raises(ValueError, match="layer 2 is a Identity without self_attn"):
        LighthouseWrapper(model, **SETTINGS)


# A loss of its own


class Scaled(LlamaForCausalLM):
    def forward(self, *args, labels=None, **kwargs):
        out = super().forward(*args, **kwargs)
        out.logits = 0.25 * out.logits
        if labels is not None:
            out.loss = self.loss_function(out.logits, labels, self.config.vocab_size)
        return out


class ZLoss(LlamaForCausalLM):
    def forward(self, *args, labels=None, **kwargs):
        out = super().forward(*args, labels=labels, **kwargs)
        if labels is not None:
            out.loss = out.loss + 0.1 * out.logits.logsumexp(-1).pow(2).mean()
        return out


def with_hook(model):
    model.lm_head.register_forward_hook(lambda module, inputs, logits: 0.25 * logits)


def with_pre_hook(model):
    model.lm_head.register_forward_pre_hook(lambda module, inputs: (0.25 * inputs[0],))


def with_backward_hook(model):
    model.lm_head.register_full_backward_hook(lambda module, grad_input, grad_output: (0.25 * grad_input[0],))


def with_instance_forward(model):
    multiply = model.lm_head.forward
    model.lm_head.forward = lambda hidden: 0.25 * multiply(hidden)


def with_loss_function(model):
    model.loss_function = lambda logits, labels, vocab_size, **kwargs: logits.float().pow(2).mean()


OWN_LOSSES = [
    ("scaled_logits", Scaled, None, "this Scaled has its own forward"),
    ("a_term_more", ZLoss, None, "this ZLoss has its own forward"),
    ("hook", LlamaForCausalLM, with_hook, "the output layer has hooks"),
    ("pre_hook", LlamaForCausalLM, with_pre_hook, "the output layer has hooks"),
    ("backward_hook", LlamaForCausalLM, with_backward_hook, "the output layer has hooks"),
    ("instance_forward", LlamaForCausalLM, with_instance_forward, "the output layer has its own forward"),
    ("loss_function", LlamaForCausalLM, with_loss_function, "has its own loss function"),
]


@pytest.mark.parametrize(
    ("model_class", "change", "message"), [c[1:] for c in OWN_LOSSES], ids=[c[0] for c in OWN_LOSSES]
)
def test_a_loss_of_its_own_is_not_passed_by(model_class, change, message, said):
    def made():
        model = plain(model_class)
        with torch.no_grad():
            model.lm_head.weight *= 30  # so that a scaled logit shows
        return model

    def changed(model):
        if change is not None:
            change(model)
        return model

    never = changed(made())
    expected = never(ids(), labels=ids()).loss
    with pytest.raises(ValueError, match=f'{message}.*loss="model"'):
        LighthouseWrapper(changed(made()), **SETTINGS)
    model = LighthouseWrapper(changed(made()), **SETTINGS, loss="model").lighthouse(False)
    assert torch.equal(model(ids(), labels=ids()).loss, expected)

    if change is None:
        return
    model = LighthouseWrapper(made(), **SETTINGS)
    assert model(ids(), labels=ids()).logits is None
    changed(model)
    model.lighthouse(False)
    for _ in range(2):
        assert torch.equal(model(ids(), labels=ids()).loss, expected)
    assert len(said) == 1 and "the model's own loss is used" in said[0]


def test_a_replaced_cross_entropy_is_not_passed_by(monkeypatch):
    def fixed_cross_entropy(source, target, num_items_in_batch=None, ignore_index=-100, **kwargs):
        return 7 * source.float().logsumexp(-1).mean()

    monkeypatch.setattr(loss_utils, "fixed_cross_entropy", fixed_cross_entropy)
    with pytest.raises(ValueError, match='the cross entropy was replaced: use loss="model"'):
        wrapped()


# Labels


LABELS = [
    ("one_longer", lambda: torch.randint(VOCABULARY, (2, TOKENS + 1))),
    ("one_shorter", lambda: torch.randint(VOCABULARY, (2, TOKENS - 1))),
    ("three_rows_for_two", lambda: torch.randint(VOCABULARY, (3, TOKENS))),
    ("one_row_for_two", lambda: torch.randint(VOCABULARY, (1, TOKENS))),
    ("as_many_in_another_shape", lambda: torch.randint(VOCABULARY, (4, TOKENS // 2))),
    ("flat", lambda: torch.randint(VOCABULARY, (2 * TOKENS,))),
]


@pytest.mark.parametrize("model_class", MODELS)
@pytest.mark.parametrize("enabled", [True, False], ids=["on", "off"])
@pytest.mark.parametrize("name", ["labels", "shift_labels"])
@pytest.mark.parametrize("labels", [case[1] for case in LABELS], ids=[case[0] for case in LABELS])
def test_labels_of_another_shape_are_refused(model_class, enabled, name, labels):
    model = wrapped(model_class).lighthouse(enabled)
    for training in (True, False):
        model.train(training)
        with torch.set_grad_enabled(training), pytest.raises(ValueError, match=rf"{name} is \[.*, the batch \[2, 64\]"):
            model(input_ids=ids(), **{name: labels()})


# What tells documents apart, makes a cache, or is not known


def calls(**extra):
    return {"input_ids": ids(), "labels": ids(), **extra}


REFUSED = [
    ("numbered_mask", {"attention_mask": 1 + torch.arange(TOKENS).expand(2, -1) // 40}, "values other than 0 and 1"),
    ("mask_of_another_length", {"attention_mask": torch.ones(2, TOKENS + 1)}, r"attention_mask is \[2, 65\]"),
    ("mask_of_one_row", {"attention_mask": torch.ones(1, TOKENS)}, r"attention_mask is \[1, 64\]"),
    ("additive_mask", {"attention_mask": torch.zeros(2, TOKENS)}, "attention_mask hides tokens"),
    ("seq_idx", {"seq_idx": torch.zeros(2, TOKENS, dtype=torch.int32)}, "seq_idx is given: packed documents"),
    ("cu_seqlens", {"cu_seqlens": torch.tensor([0, 40, 128])}, "cu_seqlens is given: packed documents"),
    ("short_positions", {"position_ids": torch.arange(TOKENS - 1)[None]}, "63 positions for 64 tokens"),
    ("cache_positions_that_jump", {"cache_position": 2 * torch.arange(TOKENS)}, "cache_position restart or jump"),
    (
        "unknown",
        {"document_ids": torch.zeros(2, TOKENS)},
        "document_ids is given: Lighthouse does not know it",
    ),
    ("unknown_number", {"temperature": 2.0}, "temperature is given: Lighthouse does not know it"),
]


@pytest.mark.parametrize("model_class", MODELS)
@pytest.mark.parametrize(("extra", "message"), [case[1:] for case in REFUSED], ids=[case[0] for case in REFUSED])
def test_what_would_be_lost_is_refused(model_class, extra, message):
    model = wrapped(model_class)
    with pytest.raises(ValueError, match=message):
        model(**calls(**extra))


# Reentrant checkpointing


class Reentrant(LlamaDecoderLayer):
    def forward(self, hidden_states, **kwargs):
        return checkpoint(functools.partial(super().forward, **kwargs), hidden_states, use_reentrant=True)


def by_wrapper(model):
    for index, layer in enumerate(model.model.layers):
        model.model.layers[index] = checkpoint_wrapper(layer, checkpoint_impl=CheckpointImpl.REENTRANT)


def by_a_layer_of_its_own(model):
    for layer in model.model.layers:
        layer.__class__ = Reentrant


@pytest.mark.parametrize("change", [by_wrapper, by_a_layer_of_its_own])
@pytest.mark.parametrize("when", ["before", "after"])
def test_reentrant_checkpointing_is_refused_by_any_road(change, when):
    model = plain()
    if when == "before":
        change(model)
    LighthouseWrapper(model, **{**SETTINGS, "min_tokens": 60})
    if when == "after":
        change(model)
    model.model.enable_input_require_grads()
    with pytest.raises(ValueError, match="reentrant.*use_reentrant=False"):
        model(**calls()).loss.backward()
    model.lighthouse(False)
    model(**calls()).loss.backward()  # dense, it is the plain model's affair
    with torch.no_grad():
        model.lighthouse(True)
        model(**calls())


def test_checkpoint_wrapper_without_reentrance_gives_the_same_gradients():
    def gradients(model):
        (model(**calls()).loss + model(input_ids=ids(tokens=40), labels=ids(tokens=40)).loss).backward()
        return [p.grad for p in model.parameters()]

    model = plain()
    for index, layer in enumerate(model.model.layers):
        model.model.layers[index] = checkpoint_wrapper(layer, checkpoint_impl=CheckpointImpl.NO_REENTRANT)
    LighthouseWrapper(model, **SETTINGS)
    for found, expected in zip(gradients(model), gradients(wrapped()), strict=True):
        torch.testing.assert_close(found, expected)
