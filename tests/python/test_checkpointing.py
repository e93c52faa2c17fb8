"""Activation checkpointing: the choice is made once, eager and compiled, full and selective, with the same bits."""

import functools

import pytest
import torch
from torch.utils.checkpoint import checkpoint

import lighthouse
from cases import CONTEXTS, MM, Calls, Layer, rand_qkv
from small_llama import LIGHTHOUSE_LAYERS, MODELS, ids, plain, wrapped

pytestmark = pytest.mark.usefixtures("one_thread")


def gradients(call, x):
    layer = Layer()
    x = x.clone().requires_grad_()
    call(layer, x).square().sum().backward()
    return [x.grad, *(parameter.grad for parameter in layer.parameters())]


@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
@pytest.mark.parametrize("name", CONTEXTS)
def test_the_choice_is_made_once(name, compiled):
    x = torch.randn(1, 300, 32, generator=torch.Generator().manual_seed(1))

    def call(layer, x):
        return checkpoint(layer, x, use_reentrant=False, context_fn=CONTEXTS[name])

    def plain_call(layer, x):
        return layer(x)

    if compiled:
        call, plain_call = (torch.compile(f, fullgraph=True, backend="aot_eager") for f in (call, plain_call))
    with Calls() as plain_calls:
        expected = gradients(plain_call, x)
    with Calls() as calls:
        found = gradients(call, x)
    assert (calls["score"], calls["select"], calls["gather"]) == (1, 1, 2)
    assert calls.of[MM] == plain_calls.of[MM] if name != "full" else calls.of[MM] > plain_calls.of[MM]
    for mine, theirs in zip(found, expected, strict=True):
        assert torch.equal(mine, theirs)


def test_without_the_contexts_it_would_be_made_twice():
    query, key, value = (tensor.requires_grad_() for tensor in rand_qkv(300, dtype=torch.float32))
    with Calls() as calls:
        checkpoint(lighthouse.attention, query, key, value, use_reentrant=False).sum().backward()
    assert calls["select"] == 2


def enabled(model, arguments=None):
    model.gradient_checkpointing_enable(arguments)
    return model


WRAPPED = {
    "after_wrapping": lambda model_class: enabled(wrapped(model_class)),
    "after_wrapping_said": lambda model_class: enabled(wrapped(model_class), {"use_reentrant": False}),
    "before_wrapping": lambda model_class: wrapped(model_class, change=lambda m: enabled(m, {"use_reentrant": False})),
}


def assert_keeps_its_choices(model, other, through=lambda model: model):
    def run(model):
        through(model)({"input_ids": ids()}).loss.backward()
        return {name: parameter.grad for name, parameter in model.named_parameters()}

    expected = run(other)
    with Calls() as calls:
        found = run(model)
    assert calls["select"] == calls["score"] == LIGHTHOUSE_LAYERS
    assert calls["gather"] == 2 * LIGHTHOUSE_LAYERS
    for parameter, gradient in expected.items():
        assert torch.equal(found[parameter], gradient), parameter


@pytest.mark.parametrize("name", WRAPPED)
@pytest.mark.parametrize("model_class", MODELS)
def test_a_wrapped_model_keeps_its_choices(model_class, name):
    assert_keeps_its_choices(WRAPPED[name](model_class), wrapped(model_class))


def test_a_wrapped_model_keeps_its_choices_compiled():
    through = functools.partial(torch.compile, fullgraph=True, backend="aot_eager")
    layers = {"num_hidden_layers": LIGHTHOUSE_LAYERS}  # none of them dense: compiling takes its time by the layer
    assert_keeps_its_choices(enabled(wrapped(config=dict(layers))), wrapped(config=dict(layers)), through)


def test_a_context_of_the_users_own_stays():
    own = functools.partial(lighthouse.checkpoint_contexts, [MM])
    model = enabled(wrapped(), {"use_reentrant": False, "context_fn": own})
    assert model.model.layers[1]._gradient_checkpointing_func.keywords["context_fn"] is own


def test_unwrapping_leaves_plain_checkpointing():
    model = enabled(wrapped(), {"use_reentrant": False}).unwrap()
    never = enabled(plain(), {"use_reentrant": False})
    for mine, plains in zip(model.model.layers, never.model.layers, strict=True):
        assert mine._gradient_checkpointing_func.keywords == plains._gradient_checkpointing_func.keywords


def test_compiled_code_makes_its_output_again():
    """It follows from the sub-sequence's, which is kept: of all numbers as long as the text only the input is."""
    layer, x = Layer(), torch.randn(1, 640, 32, requires_grad=True)
    kept = []

    def keep(tensor):
        kept.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        output = torch.compile(layer, fullgraph=True, backend="aot_eager_decomp_partition")(x)
    long = {tensor.data_ptr() for tensor in kept if tensor.is_floating_point() and tensor.numel() == x.numel()}
    assert long == {x.data_ptr()}
    weights = [x, *layer.parameters()]
    torch.testing.assert_close(
        torch.autograd.grad(output.square().sum(), weights), torch.autograd.grad(layer(x).square().sum(), weights)
    )
