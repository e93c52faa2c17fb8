"""A wrapped model with a local window: what its layers compute, and that what a wrapped model promises holds."""

import pytest
import torch

from lighthouse import LighthouseWrapper
from small_llama import LAYERS, MODELS, SETTINGS, TOKENS, Spy, ids, plain

WINDOW = 10


def with_window(model_class, **changes):
    return LighthouseWrapper(plain(model_class), **{**SETTINGS, "local_window": WINDOW, **changes}).train()


def band(window):
    """An additive mask `[1, 1, N, N]` of a causal window, as Transformers' eager attention takes it."""
    at = torch.arange(TOKENS)
    ago = at[:, None] - at
    return torch.zeros(TOKENS, TOKENS).masked_fill((ago < 0) | (ago >= window), -torch.inf)[None, None]


@pytest.mark.parametrize("model_class", MODELS)
def test_a_window_alone_is_the_plain_model_under_a_mask(model_class):
    model = with_window(model_class, select_topk=0)
    expected = plain(model_class, attn_implementation="eager").train()
    result = model(ids(), labels=ids())
    assert model.take_used() == (True, False)  # with Lighthouse and not dense
    base = expected if model_class.__name__ == "LlamaModel" else expected.model
    hidden = base(ids(), attention_mask=band(WINDOW)).last_hidden_state
    mine = model if model_class.__name__ == "LlamaModel" else model.model
    states = []
    handle = mine.norm.register_forward_hook(lambda module, args, output: states.append(output))
    model(ids(), labels=ids())
    handle.remove()
    torch.testing.assert_close(states[0], hidden, rtol=1e-4, atol=1e-5)
    assert result.loss.isfinite()


@pytest.mark.parametrize("model_class", MODELS)
def test_no_layer_is_dense_by_default_and_the_window_is_the_inner_attentions_too(model_class):
    spy = Spy()
    model, stock = with_window(model_class, inner=spy), with_window(model_class)
    losses = [each(ids(), labels=ids()).loss for each in (model, stock)]
    assert spy.calls == 2 * LAYERS  # the sub-sequence and the window of each
    torch.testing.assert_close(*losses)
    for loss in losses:
        loss.backward()
    for mine, theirs in zip(model.parameters(), stock.parameters(), strict=True):
        if theirs.grad is not None:
            torch.testing.assert_close(mine.grad, theirs.grad, rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize("select_topk", [4, 0])
def test_compiled_in_one_graph(select_topk):
    model = with_window(MODELS[1], select_topk=select_topk)
    expected = model(ids(), labels=ids()).loss
    expected.backward()
    grads = [parameter.grad.clone() for parameter in model.parameters()]
    model.zero_grad()
    found = torch.compile(model, fullgraph=True, backend="aot_eager")(ids(), labels=ids()).loss
    found.backward()
    torch.testing.assert_close(found, expected)
    for mine, theirs in zip((parameter.grad for parameter in model.parameters()), grads, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("select_topk", [4, 0])
def test_checkpointing_gives_the_same_bits(select_topk):
    grads = []
    for checkpointing in (False, True):
        model = with_window(MODELS[1], select_topk=select_topk)
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        model(ids(), labels=ids()).loss.backward()
        grads.append([parameter.grad for parameter in model.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*grads, strict=True))


def test_switched_off_and_unwrapped_it_is_the_plain_model():
    model = with_window(MODELS[1])
    model(ids(), labels=ids()).loss.backward()
    model.zero_grad()
    model.lighthouse(False)
    expected = plain(MODELS[1]).eval()
    with torch.no_grad():
        assert torch.equal(model.eval()(ids()).logits, expected(ids()).logits)
        assert torch.equal(model.unwrap()(ids()).logits, expected(ids()).logits)
