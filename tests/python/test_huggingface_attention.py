"""When Lighthouse acts in a wrapped model, in which layers, and what it refuses: a spy counts its inner attentions."""

import re

import pytest
import torch
import torch.nn.functional as F
from transformers import (
    AttentionInterface,
    BatchEncoding,
    DynamicCache,
    LlamaForCausalLM,
    LlamaModel,
)

import lighthouse
from lighthouse.huggingface import originals
from lighthouse.huggingface.attention_interface import dense_name, lighthouse_attention
from small_llama import (
    LAYERS,
    LIGHTHOUSE_LAYERS,
    MODELS,
    SUB_LENGTH,
    TOKENS,
    VOCABULARY,
    Spy,
    ids,
    plain,
    wrapped,
)

pytestmark = pytest.mark.usefixtures("one_thread")

both = pytest.mark.parametrize("model_class", MODELS)


def layers_where_it_acts(model, spy, call) -> list[int]:
    """The layers in whose attention the spy is called while `call()` runs."""
    acting, before, handles = [], {}, []
    for index, layer in enumerate(model.base_model.layers):

        def enter(module, args, kwargs, index=index):
            before[index] = spy.calls

        def leave(module, args, kwargs, output, index=index):
            if spy.calls > before[index]:
                acting.append(index)

        handles.append(layer.self_attn.register_forward_pre_hook(enter, with_kwargs=True))
        handles.append(layer.self_attn.register_forward_hook(leave, with_kwargs=True))
    call()
    for handle in handles:
        handle.remove()
    return acting


# Where it acts


@both
def test_it_acts_in_the_middle_layers(model_class):
    spy = Spy()
    model = wrapped(model_class, spy=spy)
    assert layers_where_it_acts(model, spy, lambda: model({"input_ids": ids()})) == [1, 2]
    assert spy.queries == [(2, 2, SUB_LENGTH, 16)] * LIGHTHOUSE_LAYERS


def test_it_acts_everywhere_without_dense_layers():
    spy = Spy()
    model = wrapped(spy=spy, dense_layers=0)
    assert layers_where_it_acts(model, spy, lambda: model({"input_ids": ids()})) == list(range(LAYERS))


def test_a_layer_computes_the_functional_call():
    query, key, value = torch.randn(2, 2, 50, 16), torch.randn(2, 1, 50, 16), torch.randn(2, 1, 50, 16)
    settings = {"pool_ratios": (1 / 2, 1 / 4), "select_topk": 4}
    outputs = []
    for cover_start in (True, False):
        module = wrapped(cover_start=cover_start).model.layers[1].self_attn
        module.lighthouse_seat.state.enter(acts=True)  # as in the model's forward
        out, weights = lighthouse_attention(module, query, key, value, None, scaling=0.3)
        expected = lighthouse.attention(query, key, value, scale=0.3, cover_start=cover_start, **settings)
        assert weights is None and out.shape == (2, 50, 2, 16) and out.is_contiguous()
        assert torch.equal(out, expected.transpose(1, 2))
        outputs.append(out)
    assert not torch.equal(*outputs)


def test_scale_and_dropout_arrive():
    seen = {}

    def inner(query, key, value, *, scale, dropout_p, layout):
        seen.update(scale=scale, dropout_p=dropout_p, length=layout.length)
        return F.scaled_dot_product_attention(query, key, value, is_causal=True, enable_gqa=True)

    model = wrapped(spy=inner, config={"attention_dropout": 0.25})
    model({"input_ids": ids()})
    assert seen == {"scale": 16**-0.5, "dropout_p": 0.25, "length": SUB_LENGTH}


@both
def test_one_level_is_the_dense_model(model_class):
    spy = Spy()
    model = wrapped(model_class, spy=spy, pool_ratios=())
    hidden = model(ids(), use_cache=False)[0]
    assert spy.calls == LIGHTHOUSE_LAYERS
    torch.testing.assert_close(hidden, plain(model_class)(ids())[0])


def test_bfloat16_and_autocast():
    spy = Spy()
    model = wrapped(spy=spy)
    with torch.autocast("cpu", torch.bfloat16):
        model({"input_ids": ids()}).loss.backward()
    assert all(torch.isfinite(p.grad).all() for p in model.parameters())
    loss = wrapped(spy=spy).bfloat16()({"input_ids": ids()}).loss
    assert torch.isfinite(loss) and spy.calls == 2 * LIGHTHOUSE_LAYERS


# Where the plain model runs


def test_the_switch(said):
    spy = Spy()
    model, never = wrapped(spy=spy), plain()
    assert model.lighthouse_enabled
    assert model.lighthouse(False) is model and not model.lighthouse_enabled
    out = model(ids(), labels=ids())
    assert spy.calls == 0 and not said
    assert torch.equal(model(ids()).logits, never(ids()).logits)
    torch.testing.assert_close(out.loss, never(ids(), labels=ids()).loss)
    model.lighthouse(True)(ids(), labels=ids())
    assert spy.calls == LIGHTHOUSE_LAYERS


def test_the_switch_leaves_parameters_and_optimizer_alone():
    model = wrapped()
    before = [id(p) for p in model.parameters()]
    optimizer = torch.optim.AdamW(model.parameters())
    for enabled in (True, False, True):
        model.lighthouse(enabled)({"input_ids": ids()}).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    assert [id(p) for p in model.parameters()] == before
    assert all(state["step"] == 3 for state in optimizer.state.values())


@both
@pytest.mark.parametrize("former", ["sdpa", "eager"])
def test_eval_is_the_plain_model_and_says_so_once(model_class, former, said):
    spy = Spy()
    model = wrapped(model_class, spy=spy, config={"attn_implementation": former}).eval()
    never = plain(model_class, attn_implementation=former).eval()
    mask = torch.ones(2, TOKENS, dtype=torch.long)
    mask[0, :9] = 0
    with torch.no_grad():
        for _ in range(2):
            out, expected = (m(ids(), attention_mask=mask) for m in (model, never))
            assert torch.equal(out[0], expected[0])
            assert type(out) is type(expected)
            assert out.past_key_values.get_seq_length() == TOKENS
    assert spy.calls == 0
    assert len(said) == 1 and "eval()" in said[0]
    assert model.config._attn_implementation == former
    assert model.train().config._attn_implementation == "lighthouse"


def test_another_model_says_it_again(said):
    for _ in range(2):
        model = wrapped().eval()
        model(ids())
        model(ids())
    assert len(said) == 2


def test_eval_keeps_lighthouse_when_asked():
    spy = Spy()
    model = wrapped(spy=spy, eval="lighthouse").eval()
    with torch.no_grad():
        out = model({"input_ids": ids()})
        assert spy.calls == LIGHTHOUSE_LAYERS and out.past_key_values is None
        assert spy.since(lambda: model(ids(), use_cache=False)) == LIGHTHOUSE_LAYERS
        assert spy.since(lambda: model(ids())) == 0  # a key-value cache, by the model's configuration


@pytest.mark.parametrize("mode", ["train", "eval", "eval_with_lighthouse", "switched_off"])
@pytest.mark.parametrize("use_cache", [True, False])
def test_generate_is_the_plain_models(mode, use_cache, said):
    spy = Spy()
    model, never = wrapped(spy=spy, eval="lighthouse" if mode == "eval_with_lighthouse" else "dense"), plain()
    for m in (model, never):
        m.train(mode == "train")
    if mode == "switched_off":
        model.lighthouse(False)
    arguments = {"max_new_tokens": 8, "do_sample": False, "use_cache": use_cache, "eos_token_id": None}
    mask = torch.ones(2, TOKENS, dtype=torch.long)
    mask[1, :20] = 0
    for _ in range(2):
        tokens = model.generate(ids(), attention_mask=mask, **arguments)
        assert torch.equal(tokens, never.generate(ids(), attention_mask=mask, **arguments))
    assert spy.calls == 0
    assert [("generate" in message) for message in said] == ([] if mode == "switched_off" else [True])
    model.lighthouse(True).train()({"input_ids": ids()})
    assert spy.calls == LIGHTHOUSE_LAYERS


def test_a_key_value_cache_is_dense_in_training_too(said):
    spy = Spy()
    model, never = wrapped(spy=spy), plain()
    for cache in ({"use_cache": True}, {"past_key_values": DynamicCache(config=never.config)}):
        first = model(ids(), **cache)
        second = model(ids(tokens=1), past_key_values=first.past_key_values)
        assert second.past_key_values.get_seq_length() == TOKENS + 1
    expected = never(torch.cat([ids(), ids(tokens=1)], 1)).logits[:, -1]
    torch.testing.assert_close(second.logits[:, -1], expected)
    assert spy.calls == 0 and len(said) == 1 and "cache" in said[0]
    model(ids(), labels=ids())
    assert spy.calls == LIGHTHOUSE_LAYERS


@both
@pytest.mark.parametrize("enabled", [True, False])
def test_training_builds_no_cache(model_class, enabled):
    model = wrapped(model_class).lighthouse(enabled)
    assert model.config.use_cache
    assert model(ids()).past_key_values is None
    assert model({"input_ids": ids()}).past_key_values is None


PAYS = [
    ("shorter_than_min_tokens", {"min_tokens": TOKENS + 1}, TOKENS, "64 tokens.*min_tokens=65"),
    ("as_long_as_min_tokens", {"min_tokens": TOKENS}, TOKENS, None),
    ("sub_sequence_above_max_share", {"max_share": 0.49}, TOKENS, "64 tokens has 32 entries, 50%.*max_share=0.49"),
    ("sub_sequence_at_max_share", {"max_share": SUB_LENGTH / TOKENS}, TOKENS, None),
    ("default_for_the_device", {"min_tokens": None, "config": {"max_position_embeddings": 1024}}, TOKENS, "=512"),
]


@pytest.mark.parametrize(("settings", "tokens", "why"), [case[1:] for case in PAYS], ids=[case[0] for case in PAYS])
def test_where_it_does_not_pay_the_plain_model_runs(settings, tokens, why, said):
    spy = Spy()
    model, never = wrapped(spy=spy, **settings), plain()
    said.clear()
    for _ in range(2):
        out = model(input_ids=ids(tokens=tokens))
    assert spy.calls == (0 if why else 2 * LIGHTHOUSE_LAYERS)
    assert len(said) == (1 if why else 0)
    if why:
        assert re.search(why, said[0]) and "dense attention runs" in said[0]
        assert torch.equal(out.logits, never(ids(tokens=tokens)).logits)


DYNAMIC = {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 10000.0}
NEVER = [
    ("min_tokens_above_the_models_limit", {"min_tokens": 129}, "128 tokens.*min_tokens=129.*never acts"),
    ("more_budget_than_the_model_has_tokens", {"select_topk": 64}, "128 tokens has .*max_share=1 .*never acts"),
    ("acts_at_the_limit_alone", {"min_tokens": 128}, None),
    ("no_limit", {"min_tokens": 129, "config": {"rope_parameters": DYNAMIC}}, None),
]


@pytest.mark.parametrize(("settings", "why"), [case[1:] for case in NEVER], ids=[case[0] for case in NEVER])
def test_settings_with_which_it_never_acts_are_said_at_once(settings, why, said):
    wrapped(**settings)
    assert len(said) == (1 if why else 0)
    assert why is None or re.search(why, said[0])


def test_lengths_are_decided_one_by_one():
    spy = Spy()
    model = wrapped(spy=spy, min_tokens=TOKENS)
    acted = [spy.since(lambda n=n: model({"input_ids": ids(tokens=n)}).loss.backward()) for n in (64, 32, 65, 1, 100)]
    assert acted == [2, 0, 2, 0, 2]


def test_the_dense_attention_can_be_changed():
    model = wrapped()
    model.set_attn_implementation("eager")
    assert model.config._attn_implementation == "lighthouse"
    assert model.eval().config._attn_implementation == "eager"
    assert model.unwrap().config._attn_implementation == "eager"


@pytest.mark.parametrize("name", ["lighthouse", {"": "lighthouse"}], ids=["name", "dict"])
def test_lighthouse_is_not_the_dense_attention(name):
    model = wrapped().eval()
    with pytest.raises(ValueError, match="lighthouse.*a dense attention is needed.*model.lighthouse\\(True\\)"):
        model.set_attn_implementation(name)
    assert model._lighthouse.former == model.config._attn_implementation == "sdpa"
    assert model.unwrap().config._attn_implementation == "sdpa"


DENSE_NAMES = [
    ("sdpa", "sdpa"),
    ("flash_attention_2", "flash_attention_2"),
    ("eager", "sdpa"),
    ("flex_attention", "sdpa"),
]


@pytest.mark.parametrize(("former", "name"), DENSE_NAMES)
def test_dense_layers_run_an_attention_that_needs_no_mask(former, name):
    assert dense_name(former) == name


@pytest.mark.parametrize("former", ["flash_attention_2", "sdpa", "eager"])
def test_dense_layers_run_the_former_attention(former, monkeypatch):
    """Flash attention is not at hand on a CPU: another function stands in under its name."""
    called = []

    def stand_in(module, query, key, value, attention_mask, scaling=None, **kwargs):
        assert attention_mask is None
        called.append((module.layer_idx, module.config._attn_implementation))
        return F.scaled_dot_product_attention(query, key, value, is_causal=True, enable_gqa=True).transpose(1, 2), None

    model = wrapped()
    model._lighthouse.former = former
    monkeypatch.setattr(originals, "check_attention_function", lambda name, module: None)
    monkeypatch.setitem(AttentionInterface._global_mapping, dense_name(former), stand_in)
    model({"input_ids": ids()})
    assert called == [(0, dense_name(former)), (LAYERS - 1, dense_name(former))]


# How it is called


@both
def test_a_batch_can_be_any_mapping(model_class):
    model = wrapped(model_class)
    expected = model(input_ids=ids(), labels=ids()).loss
    for batch in ({"input_ids": ids()}, BatchEncoding({"input_ids": ids()}), {"input_ids": ids(), "labels": None}):
        assert torch.equal(model(batch).loss, expected)
    assert torch.equal(model({"input_ids": ids()}, attention_mask=torch.ones(2, TOKENS)).loss, expected)
    assert not torch.equal(model({"input_ids": ids(), "labels": ids(seed=9)}).loss, expected)
    with pytest.raises(TypeError, match="one mapping"):
        model({"input_ids": ids()}, None)
    with pytest.raises(ValueError, match="neither labels nor input_ids"):
        model({"inputs_embeds": torch.zeros(2, TOKENS, 32)})


@both
def test_it_can_be_called_like_the_plain_model(model_class):
    spy = Spy()
    model, never = wrapped(model_class, spy=spy).lighthouse(False), plain(model_class)
    for args, kwargs in (((ids(),), {}), ((ids(), None), {"output_hidden_states": True}), ((), {"input_ids": ids()})):
        out, expected = model(*args, **kwargs), never(*args, **kwargs, use_cache=False)
        assert out.keys() == expected.keys()
        assert torch.equal(out[0], expected[0])
    assert model(ids(), return_dict=False)[0].shape == expected[0].shape
    embeds = model.get_input_embeddings()(ids())
    assert torch.equal(model.lighthouse(True)(inputs_embeds=embeds)[0], model(ids())[0])
    assert spy.calls == 2 * LIGHTHOUSE_LAYERS
    with pytest.raises(TypeError, match="positional"):
        model(*[None] * 20)
    with pytest.raises(ValueError, match="neither input_ids nor inputs_embeds"):
        model()


def test_hidden_states_come_with_the_loss():
    for model_class in (LlamaModel, LlamaForCausalLM):
        out = wrapped(model_class)({"input_ids": ids()}, output_hidden_states=True)
        assert len(out.hidden_states) == LAYERS + 1 and out.logits is None
        values = wrapped(model_class)({"input_ids": ids()}, return_dict=False)
        assert isinstance(values, tuple) and values[0].ndim == 0


@both
def test_a_model_that_returns_tuples_gives_the_loss(model_class):
    model = wrapped(model_class, config={"return_dict": False})
    values = model({"input_ids": ids()})
    assert isinstance(values, tuple)
    assert torch.equal(values[0], wrapped(model_class)({"input_ids": ids()}).loss)
    assert torch.equal(values[0], model({"input_ids": ids()}, return_dict=True).loss)


def test_what_is_trained_learns():
    model = wrapped(LlamaModel)
    optimizer = torch.optim.AdamW(model.parameters(), 1e-2)
    batch = {"input_ids": torch.arange(TOKENS).remainder(VOCABULARY).expand(2, -1)}
    losses = []
    for _ in range(12):
        loss = model(batch).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < 0.8 * losses[0]
