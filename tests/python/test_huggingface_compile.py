"""torch.compile without graph breaks, activation checkpointing, and the switch under both."""

import pytest
import torch
from transformers import LlamaForCausalLM, LlamaModel

from small_llama import LIGHTHOUSE_LAYERS, MODELS, TOKENS, Spy, ids, plain, wrapped

pytestmark = pytest.mark.usefixtures("one_thread")

ONE_LAYER = {"num_hidden_layers": 1}  # compiling takes its time by the layer

both = pytest.mark.parametrize("model_class", MODELS)


def gradients(model, call) -> dict[str, torch.Tensor]:
    model.zero_grad()
    call().loss.backward()
    return {name: p.grad.clone() for name, p in model.named_parameters()}


def assert_same(found, expected, exactly=True):
    for name, value in expected.items():
        if exactly:
            assert torch.equal(found[name], value), name
        else:
            torch.testing.assert_close(
                found[name], value, rtol=1e-4, atol=1e-6, msg=lambda t, name=name: f"{name}: {t}"
            )


@pytest.mark.parametrize(("model_class", "layers"), [(LlamaModel, 1), (LlamaForCausalLM, 3)])
def test_compiled_whole_it_gives_the_same(model_class, layers):
    model = wrapped(model_class, config={"num_hidden_layers": layers})
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    for enabled in (True, False):
        model.lighthouse(enabled)
        expected = gradients(model, lambda: model({"input_ids": ids()}))
        assert_same(gradients(model, lambda: compiled({"input_ids": ids()})), expected, exactly=False)


def test_compiled_by_inductor():
    model = wrapped(config=ONE_LAYER)
    compiled = torch.compile(model, fullgraph=True)
    batch = {"input_ids": ids(), "attention_mask": torch.ones(2, TOKENS, dtype=torch.long)}
    expected = gradients(model, lambda: model(batch))
    assert_same(gradients(model, lambda: compiled(batch)), expected, exactly=False)
    batch["attention_mask"][1, 5] = 0
    with pytest.raises(RuntimeError, match="attention_mask hides tokens"):
        compiled(batch)


def test_the_switch_costs_one_graph_and_no_break():
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    model = wrapped(config=ONE_LAYER)
    compiled = torch.compile(model, fullgraph=True, backend=counter)
    for enabled, graphs in ((True, 1), (True, 1), (False, 2), (True, 2), (False, 2)):
        model.lighthouse(enabled)
        compiled(ids(), labels=ids()).loss.backward()
        assert counter.frame_count == graphs


@pytest.mark.slow  # four graphs
def test_other_lengths_compile_without_a_break():
    model = wrapped(min_tokens=32, config=ONE_LAYER)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    for tokens in (64, 80, 96, 16):
        expected = model({"input_ids": ids(tokens=tokens)}).loss
        torch.testing.assert_close(compiled({"input_ids": ids(tokens=tokens)}).loss, expected)


def test_any_length_is_compiled_once():
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    model = wrapped(config=ONE_LAYER)
    compiled = torch.compile(model, fullgraph=True, backend=counter)
    for tokens in (64, 80, 97):
        batch = ids(tokens=tokens)
        torch._dynamo.mark_dynamic(batch, 1)
        compiled({"input_ids": batch}).loss.backward()
    assert counter.frame_count == 1


def test_compiled_evaluation_is_the_plain_model():
    spy = Spy()
    model, never = wrapped(spy=spy, config=ONE_LAYER).eval(), plain(**ONE_LAYER).eval()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    mask = torch.ones(2, TOKENS, dtype=torch.long)
    mask[0, :5] = 0
    with torch.no_grad():
        out, expected = (m(ids(), attention_mask=mask, use_cache=False) for m in (compiled, never))
    torch.testing.assert_close(out.logits[1], expected.logits[1])
    torch.testing.assert_close(out.logits[0, 5:], expected.logits[0, 5:])
    assert spy.calls == 0


COMPILED_REFUSALS = [
    ("padding", "attention_mask", (torch.ones(2, TOKENS).flip(1).cumsum(1) > 3).long(), "hides tokens"),
    ("padding_as_bool", "attention_mask", torch.ones(2, TOKENS).flip(1).cumsum(1) > 3, "hides tokens"),
    ("numbered", "attention_mask", 1 + torch.arange(TOKENS).expand(2, -1) // 40, "values other than 0 and 1"),
    ("packed", "position_ids", torch.arange(TOKENS)[None] % 40, "position_ids restart"),
]


@pytest.mark.parametrize("name", ["attention_mask", "position_ids"])
def test_compiled_code_refuses_too(name):
    compiled = torch.compile(wrapped(config=ONE_LAYER), fullgraph=True, backend="aot_eager")
    for case, its, value, message in COMPILED_REFUSALS:
        if its == name:
            right = torch.ones_like(value)
            compiled({"input_ids": ids(), name: right.cumsum(1) if name == "position_ids" else right})
            with pytest.raises(RuntimeError) as refused:
                compiled({"input_ids": ids(), name: value})
            assert message in str(refused.value), case


@both
def test_checkpointing_gives_the_same_bits(model_class):
    spy = Spy()
    model = wrapped(model_class, spy=spy, config={"attention_dropout": 0.1})

    def seeded():
        torch.manual_seed(3)
        return model({"input_ids": ids()})

    expected = gradients(model, seeded)
    model.gradient_checkpointing_enable({"use_reentrant": False})
    spy.queries.clear()
    assert_same(gradients(model, seeded), expected)
    assert spy.calls == 2 * LIGHTHOUSE_LAYERS  # once more in the backward


REENTRANT = [
    ("said", {"use_reentrant": True}),
    ("by_torch_default", {"preserve_rng_state": True}),
]


@both
@pytest.mark.parametrize("arguments", [case[1] for case in REENTRANT], ids=[case[0] for case in REENTRANT])
def test_reentrant_checkpointing_is_refused(model_class, arguments):
    """Its backward would run whatever attention the last call left, in silence."""
    spy = Spy()
    model = wrapped(model_class, spy=spy, min_tokens=TOKENS)
    model.gradient_checkpointing_enable(arguments)
    for tokens in (TOKENS, TOKENS - 1):  # the short one runs dense, but its backward might come after a long one
        with pytest.raises(ValueError, match='gradient_checkpointing_enable.*"use_reentrant": False'):
            model({"input_ids": ids(tokens=tokens)})
    model.eval()({"input_ids": ids()})
    model.train().lighthouse(False)({"input_ids": ids()}).loss.backward()
    with pytest.raises(ValueError, match="reentrant"):
        model.lighthouse(True)
    assert not model.lighthouse_enabled and spy.calls == 0
    model.gradient_checkpointing_enable({"use_reentrant": False})
    model.lighthouse(True)({"input_ids": ids()}).loss.backward()
    assert spy.calls == 2 * LIGHTHOUSE_LAYERS


def test_checkpointing_compiles_whole():
    model = wrapped(config=ONE_LAYER)
    model.gradient_checkpointing_enable({"use_reentrant": False})
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    expected = gradients(model, lambda: model({"input_ids": ids()}))
    assert_same(gradients(model, lambda: compiled({"input_ids": ids()})), expected, exactly=False)


def test_checkpointing_through_both_stages():
    spy = Spy()
    model, other = wrapped(spy=spy), wrapped()
    model.gradient_checkpointing_enable({"use_reentrant": False})
    for enabled in (True, False, True):
        model.lighthouse(enabled), other.lighthouse(enabled)
        assert_same(
            gradients(model, lambda: model({"input_ids": ids()})), gradients(other, lambda: other({"input_ids": ids()}))
        )


CHANGES = [
    ("switch", lambda model: model.lighthouse(False)),
    ("evaluation", lambda model: model.eval()({"input_ids": ids()})),
    ("short_dense_batch", lambda model: model({"input_ids": ids(tokens=TOKENS - 1)})),
]


@pytest.mark.parametrize("change", [case[1] for case in CHANGES], ids=[case[0] for case in CHANGES])
def test_a_change_between_forward_and_backward_is_loud_under_checkpointing(change):
    """The backward runs the layers again: with another attention its gradients would be wrong."""
    model = wrapped(min_tokens=TOKENS)
    model.gradient_checkpointing_enable({"use_reentrant": False})
    loss = model({"input_ids": ids()}).loss
    change(model)
    with pytest.raises(RuntimeError, match="checkpoint"):
        loss.backward()
