"""What a wrapped model refuses before any layer runs, and what it allows."""

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from transformers import (
    DataCollatorWithFlattening,
    LlamaForCausalLM,
)

import lighthouse
from small_llama import (
    LAYERS,
    LIGHTHOUSE_LAYERS,
    LIMIT,
    MODELS,
    TOKENS,
    Spy,
    ids,
    plain,
    wrapped,
)

pytestmark = pytest.mark.usefixtures("one_thread")

both = pytest.mark.parametrize("model_class", MODELS)


# What is refused


def mask_with_a_hole():
    mask = torch.ones(2, TOKENS, dtype=torch.long)
    mask[1, 3] = 0
    return mask


def two_documents():
    return torch.cat([torch.arange(40), torch.arange(TOKENS - 40)]).expand(2, -1)


REFUSED = [
    ("padding_left", {"attention_mask": torch.ones(2, TOKENS).flip(1).cumsum(1) > 3}, "attention_mask hides tokens"),
    ("one_hidden_token", {"attention_mask": mask_with_a_hole()}, "attention_mask hides tokens"),
    ("labels_for_the_mask", {"attention_mask": ids()}, "other than 0 and 1.*labels in its place are given by name"),
    ("mask_4d", {"attention_mask": torch.ones(2, 1, TOKENS, TOKENS).tril()}, "attention_mask has 4 dimensions"),
    ("mask_dict", {"attention_mask": {"full_attention": None}}, "attention_mask is a dict"),
    ("packed_positions", {"position_ids": two_documents()}, "position_ids restart"),
    ("constant_positions", {"position_ids": torch.zeros(1, TOKENS, dtype=torch.long)}, "position_ids restart"),
    ("cu_seq_lens_q", {"cu_seq_lens_q": torch.tensor([0, TOKENS])}, "cu_seq_lens_q is given"),
    ("cu_seq_lens_k", {"cu_seq_lens_k": torch.tensor([0, TOKENS])}, "cu_seq_lens_k is given"),
    ("max_length_q", {"max_length_q": TOKENS}, "max_length_q is given"),
    ("sliding_window", {"sliding_window": 16}, "sliding_window is given"),
    ("soft_capping", {"softcap": 30.0}, "softcap is given"),
    ("attention_sinks", {"s_aux": torch.zeros(2)}, "s_aux is given"),
    ("not_causal", {"is_causal": False}, "is_causal=False"),
    ("attention_weights", {"output_attentions": True}, "output_attentions=True"),
]

refused = pytest.mark.parametrize(
    ("extra", "message"), [case[1:] for case in REFUSED], ids=[case[0] for case in REFUSED]
)


@both
@refused
def test_what_it_cannot_honour_is_refused_before_any_layer(model_class, extra, message):
    spy = Spy()
    model = wrapped(model_class, spy=spy)
    reached = []
    model.base_model.embed_tokens.register_forward_hook(lambda *_: reached.append(1))
    with pytest.raises(ValueError, match=message):
        model({"input_ids": ids(), **extra})
    with pytest.raises(ValueError, match=message):
        model(ids(), labels=ids(), **extra)
    assert not reached and spy.calls == 0
    model({"input_ids": ids()})  # and it goes on
    assert spy.calls == LIGHTHOUSE_LAYERS


@pytest.mark.parametrize("state", ["switched_off", "eval", "too_short_to_pay"])
@pytest.mark.parametrize("name", ["padding_left", "one_hidden_token", "mask_4d", "packed_positions"])
def test_the_plain_model_honours_masks_itself(state, name):
    extra = next(case[1] for case in REFUSED if case[0] == name)
    if name == "mask_4d":
        extra = {"attention_mask": torch.ones(2, 1, TOKENS, TOKENS, dtype=torch.bool).tril(10)}
    model, never = wrapped(min_tokens=TOKENS + 1 if state == "too_short_to_pay" else 0), plain()
    if state == "switched_off":
        model.lighthouse(False)
    elif state == "eval":
        model.eval(), never.eval()
    extra = {**extra, "use_cache": False}  # position ids mark documents only where there is no cache
    assert torch.equal(model(ids(), **extra).logits, never(ids(), **extra).logits)
    assert not torch.equal(model(ids(), **extra).logits, never(ids(), use_cache=False).logits)


ALLOWED = [
    ("mask_of_ones", {"attention_mask": torch.ones(2, TOKENS, dtype=torch.long)}),
    ("mask_of_true", {"attention_mask": torch.ones(2, TOKENS, dtype=torch.bool)}),
    ("positions_from_zero", {"position_ids": torch.arange(TOKENS)[None]}),
    ("positions_of_a_later_part", {"position_ids": torch.arange(TOKENS)[None] + 50}),
    ("no_sliding_window", {"sliding_window": None, "cu_seq_lens_q": None}),
    ("causal", {"is_causal": True}),
]


@pytest.mark.parametrize("extra", [case[1] for case in ALLOWED], ids=[case[0] for case in ALLOWED])
def test_what_changes_nothing_is_allowed(extra):
    spy = Spy()
    model = wrapped(spy=spy)
    loss = model({"input_ids": ids(), **extra}).loss
    assert spy.calls == LIGHTHOUSE_LAYERS
    if "later" not in str(extra):
        torch.testing.assert_close(loss, wrapped()({"input_ids": ids()}).loss)


def test_the_flattening_collator_is_refused():
    features = [{"input_ids": list(range(1, 31))}, {"input_ids": list(range(1, 35))}]
    for flash in (False, True):
        batch = DataCollatorWithFlattening(return_flash_attn_kwargs=flash)(features)
        with pytest.raises(ValueError, match="cu_seq_lens" if flash else "position_ids restart"):
            wrapped()(batch)


def test_attention_weights_asked_for_in_the_config_are_refused():
    model = wrapped(config={"attn_implementation": "eager", "output_attentions": True})
    with pytest.raises(ValueError, match="output_attentions=True"):
        model({"input_ids": ids()})
    assert len(model.lighthouse(False)(ids()).attentions) == LAYERS


def test_sequences_longer_than_the_model_are_refused():
    model = wrapped()
    model({"input_ids": ids(tokens=LIMIT)})
    with pytest.raises(ValueError, match=f"{LIMIT + 1} tokens, the model allows {LIMIT}"):
        model({"input_ids": ids(tokens=LIMIT + 1)})
    model.lighthouse(False)({"input_ids": ids(tokens=LIMIT + 1)})


def test_dynamic_rope_has_no_limit():
    rope = {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 10000.0}
    model = wrapped(config={"rope_parameters": rope})
    assert torch.isfinite(model({"input_ids": ids(tokens=LIMIT + 1)}).loss)


def test_a_device_without_kernels_is_refused_before_any_layer(monkeypatch):
    """A fake tensor stands for the GPU that is not needed to see the error."""
    monkeypatch.setattr(lighthouse.core.devices, "has_cuda_kernels", lambda: False)
    model = wrapped(min_tokens=TOKENS)
    model.model.embed_tokens.register_forward_pre_hook(lambda *_: pytest.fail("the model ran"))
    with FakeTensorMode():
        tokens = {tokens: torch.zeros(1, tokens, dtype=torch.long, device="cuda") for tokens in (TOKENS, TOKENS - 1)}
        embeddings = torch.zeros(1, TOKENS, 32, device="cuda")
    with pytest.raises(ValueError, match="input_ids is on cuda.* no CUDA kernels"):
        model({"input_ids": tokens[TOKENS]})
    with pytest.raises(ValueError, match="inputs_embeds is on cuda.* no CUDA kernels"):
        model(inputs_embeds=embeddings)
    with pytest.raises(pytest.fail.Exception, match="the model ran"):  # dense, as it would not pay
        model({"input_ids": tokens[TOKENS - 1]})


# Past the wrapper's own forward


PARTS = [
    ("body", lambda model: model.model),
    ("body_in_eval", lambda model: model.get_decoder().eval()),
    ("shared_layers", lambda model: with_layers_of(model)),
]


def with_layers_of(model):
    other = plain().model
    other.layers = model.model.layers
    return other.eval()


@pytest.mark.parametrize("part", [case[1] for case in PARTS], ids=[case[0] for case in PARTS])
def test_a_part_called_directly_is_refused_where_lighthouse_would_act(part):
    model, never = wrapped(), plain()
    model({"input_ids": ids()}).loss.backward()
    with pytest.raises(ValueError, match="part of a wrapped model and was called directly"):
        part(model)(ids(), use_cache=False)
    for dense in (lambda: model.lighthouse(False), lambda: model.lighthouse(True).eval(), model.unwrap):
        dense()
        assert torch.equal(part(model)(ids())[0], never.model(ids())[0])


def test_a_part_called_directly_still_refuses_masks():
    body = wrapped().model
    with pytest.raises(ValueError, match="attention_mask hides tokens"):
        body(ids(), attention_mask=mask_with_a_hole())
    with pytest.raises(ValueError, match="mask"):
        body(ids(), attention_mask=torch.ones(2, 1, TOKENS, TOKENS))
    with pytest.raises(ValueError, match="position_ids restart"):
        body(ids(), position_ids=two_documents(), use_cache=False)


def test_the_name_alone_is_refused():
    model = LlamaForCausalLM(plain().config)
    model.config._attn_implementation = "lighthouse"
    with pytest.raises(ValueError, match="LighthouseWrapper"):
        model(ids())
