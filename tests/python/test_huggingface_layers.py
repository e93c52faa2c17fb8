"""Layers that come and go in a wrapped model, and what it tells of what ran."""

import copy
import pickle
import re

import pytest
import torch
from transformers import LlamaModel
from transformers.models.llama.modeling_llama import LlamaAttention, LlamaDecoderLayer

from small_llama import (
    LAYERS,
    LIGHTHOUSE_LAYERS,
    MODELS,
    Spy,
    config,
    ids,
    wrapped,
)

pytestmark = pytest.mark.usefixtures("one_thread")

# Layers that come and go


def layers_named(model):
    return [layer.self_attn.config._attn_implementation for layer in model.base_model.layers]


def appended_copy(model):
    layer = copy.deepcopy(model.base_model.layers[1])
    layer.self_attn.layer_idx = LAYERS
    model.base_model.layers.append(layer)
    model.config.num_hidden_layers = LAYERS + 1


def copy_of_a_dense_layer_in_the_middle(model):
    model.base_model.layers[2] = copy.deepcopy(model.base_model.layers[0])


def copy_of_a_middle_layer_at_the_end(model):
    model.base_model.layers[3] = copy.deepcopy(model.base_model.layers[1])


def fresh_layer(model):
    model.base_model.layers[1] = LlamaDecoderLayer(config(), 1).train()


def fresh_layer_with_eager(model):
    made = config()
    made._attn_implementation = "eager"
    model.base_model.layers[1] = LlamaDecoderLayer(made, 1).train()


def fresh_attention(model):
    model.base_model.layers[2].self_attn = LlamaAttention(config(), 2).train()


def one_layer_less(model):
    del model.base_model.layers[1]
    model.config.num_hidden_layers = LAYERS - 1


CHANGED = [
    appended_copy,
    copy_of_a_dense_layer_in_the_middle,
    copy_of_a_middle_layer_at_the_end,
    fresh_layer,
    fresh_layer_with_eager,
    fresh_attention,
    one_layer_less,
]


@pytest.mark.parametrize("change", CHANGED)
@pytest.mark.parametrize("model_class", MODELS)
def test_a_changed_layer_follows_the_model(change, model_class):
    spy = Spy()
    model = wrapped(model_class, spy=spy)
    change(model)
    inner, batch = len(model.base_model.layers) - 2, {"input_ids": ids(), "use_cache": False}
    assert spy.since(lambda: model(batch)) == inner
    assert layers_named(model) == ["sdpa", *["lighthouse"] * inner, "sdpa"]
    for dense in (lambda: model.eval(), lambda: model.train().lighthouse(False)):
        dense()
        assert spy.since(lambda: model(batch)) == 0
        assert set(layers_named(model)) == {"sdpa"}
    assert spy.since(lambda: model.lighthouse(True)(batch)) == inner
    model.unwrap()
    assert all(layer.self_attn.config is model.config for layer in model.base_model.layers)
    assert not any("lighthouse_seat" in vars(module) for module in model.modules())
    assert spy.since(lambda: model(ids(), use_cache=False)) == 0


def test_a_layer_put_in_before_unwrap_is_unwrapped_too():
    model = wrapped()
    fresh_layer_with_eager(model)
    copy_of_a_middle_layer_at_the_end(model)
    model.unwrap()
    assert set(layers_named(model)) == {"sdpa"}


@pytest.mark.parametrize(
    "made", [copy.deepcopy, lambda layer: pickle.loads(pickle.dumps(layer))], ids=["copy", "pickle"]
)
def test_a_copied_layer_alone_is_refused(made):
    model = wrapped()
    spare = made(model.model.layers[1])
    model.unwrap()
    model.model.layers[1] = spare
    with pytest.raises(ValueError, match="a copy of a wrapped model's layer and is in no wrapped model"):
        model(ids())


def test_a_copied_model_has_layers_of_its_own():
    spy = Spy()
    model = wrapped(spy=spy)
    other = copy.deepcopy(model)
    model.lighthouse(False)
    assert spy.since(lambda: model({"input_ids": ids()})) == 0
    assert other.lighthouse_settings.inner.since(lambda: other({"input_ids": ids()})) == LIGHTHOUSE_LAYERS
    other.unwrap()
    model.lighthouse(True)
    assert spy.since(lambda: model({"input_ids": ids()})) == LIGHTHOUSE_LAYERS


def test_a_change_that_leaves_no_layer_to_lighthouse_is_refused():
    model = wrapped()
    model.model.layers = model.model.layers[:2]
    model.config.num_hidden_layers = 2
    with pytest.raises(ValueError, match="dense_layers=1: .*none is left"):
        model({"input_ids": ids()})


# What ran


@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
def test_what_ran_is_told(compiled):
    model = wrapped(min_tokens=50, config={"num_hidden_layers": 1})
    run = torch.compile(model, backend="aot_eager", fullgraph=True) if compiled else model
    long, short = {"input_ids": ids()}, {"input_ids": ids(tokens=40)}
    assert model.take_used() == (False, False)
    run(long)
    assert model.take_used() == (True, False) and model.take_used() == (False, False)
    run(short)
    assert model.take_used() == (False, True)
    run(long), run(short)
    assert model.take_used() == (True, True)
    with torch.no_grad():
        run(long)
    model.eval()
    run(long)
    assert model.take_used() == (False, False)
    model.train().lighthouse(False)
    run(long)
    assert model.take_used() == (False, True)


UNWRAPPED = [
    ("never_trained", 0, 0, None),
    ("dense_only", 0, 3, None),
    ("no_dense_step", 3, 0, "no step of dense attention after it"),
    ("enough_dense_steps", 3, 2, None),
    ("hardly_a_dense_step", 50, 1, "of this model's 51 training forwards only 1 had dense attention.*5%"),
]


@pytest.mark.parametrize(("lighthouse", "dense", "message"), [c[1:] for c in UNWRAPPED], ids=[c[0] for c in UNWRAPPED])
def test_a_model_that_is_not_ready_for_dense_attention_is_said(lighthouse, dense, message, said):
    model = wrapped(LlamaModel, config={"num_hidden_layers": 1})
    batch = {"input_ids": ids(1)}
    for _ in range(lighthouse):
        model(batch)
    model.lighthouse(False)
    for _ in range(dense):
        model(batch)
    model.unwrap()
    assert len(said) == (message is not None)
    assert message is None or re.search(message, said[0])


def test_dense_steps_before_the_last_with_lighthouse_do_not_make_it_ready(said):
    model = wrapped().lighthouse(False)
    model({"input_ids": ids()})
    model.lighthouse(True)({"input_ids": ids()})
    model.lighthouse(False).unwrap()
    assert len(said) == 1 and "no step of dense attention after it" in said[0]


def test_a_compiled_model_that_had_no_dense_step_says_so(said):
    model = wrapped(config={"num_hidden_layers": 1})
    torch.compile(model, backend="aot_eager", fullgraph=True)({"input_ids": ids()})
    model.unwrap()
    assert len(said) == 1 and "no step of dense attention after it" in said[0]
