"""Models by name and by configuration: what they become at a context, and what is refused."""

from __future__ import annotations

import json
import math
import re

import pytest
import torch

pytest.importorskip("transformers")

from transformers import LlamaForCausalLM  # noqa: E402

from lighthouse.training import model as models  # noqa: E402
from lighthouse.training.model import (  # noqa: E402
    SIZES,
    byte_tokenizer,
    check_head_dim,
    check_model,
    empty_model,
    model_notes,
    new_config,
    new_model,
    wavelength,
)

SMALL = {
    "model_type": "llama",
    "vocab_size": 400,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 4096,
    "rope_parameters": {"rope_type": "default", "rope_theta": 10_000.0},
}


def written(folder, **changes) -> str:
    values = {name: value for name, value in (SMALL | changes).items() if value is not None}
    (folder / "config.json").write_text(json.dumps(values))
    return str(folder)


@pytest.mark.parametrize("name", SIZES)
def test_a_size_is_what_it_says(name):
    size = SIZES[name]
    model = empty_model(new_config(name, size.max_context))
    assert sum(parameter.numel() for parameter in model.parameters()) == size.parameters
    assert model.config.max_position_embeddings == size.max_context and model.config.head_dim == size.head_dim
    assert check_model(name, size.max_context) == size.layers and model_notes(name, size.max_context) == []
    check_head_dim(name, size.max_context, "cuda")


@pytest.mark.parametrize("name", [name for name in SIZES if name != "nano"])
def test_the_slowest_rotation_reaches_over_the_longest_context(name):
    assert wavelength(new_config(name, 64)) >= SIZES[name].max_context


KNOWN = [("paper", 530e6), ("llama-1b", 1236e6), ("llama-8b", 8030e6)]


@pytest.mark.parametrize("name, parameters", KNOWN, ids=[k[0] for k in KNOWN])
def test_with_llamas_vocabulary_it_has_the_parameters_it_is_known_for(name, parameters):
    config = new_config(name, 1024)
    config.vocab_size = 128_256
    assert sum(p.numel() for p in empty_model(config).parameters()) == pytest.approx(parameters, rel=0.002)


@pytest.mark.parametrize("tied", [False, True], ids=["own_head", "tied_head"])
def test_weights_are_what_plain_construction_makes_and_depend_on_the_seed_alone(tmp_path, tied):
    name = written(tmp_path, tie_word_embeddings=tied)
    config = new_config(name, 128)
    torch.manual_seed(5)
    first, plain = new_model(name, 128, seed=1), LlamaForCausalLM(config)
    again, other = new_model(name, 128, seed=1), new_model(name, 128, seed=2)
    assert [n for n, _ in first.named_parameters()] == [n for n, _ in plain.named_parameters()]
    assert (first.lm_head.weight is first.model.embed_tokens.weight) == tied
    for (n, a), (_, b), c, d in zip(
        first.named_parameters(), plain.named_parameters(), again.parameters(), other.parameters(), strict=True
    ):
        assert a.dtype == torch.float32 and torch.equal(a, c), n
        assert a.ndim == 1 or not torch.equal(a, d), n
        assert a.std().item() == pytest.approx(b.std().item(), rel=0.1) and a.requires_grad, n
    for (n, a), (_, b) in zip(first.named_buffers(), plain.named_buffers(), strict=True):
        assert torch.equal(a, b), n


def test_each_weight_is_drawn_once(monkeypatch):
    drawn = []
    for name in ("normal_", "uniform_"):
        function = getattr(torch.Tensor, name)

        def count(tensor, *args, function=function, **kwargs):
            if tensor.device.type != "meta":
                drawn.append(tensor.numel())
            return function(tensor, *args, **kwargs)

        monkeypatch.setattr(torch.Tensor, name, count)
    model = new_model("nano", 128, seed=0)
    assert sum(drawn) == sum(p.numel() for p in model.parameters() if p.ndim > 1)


FITTED = [
    # context, the configuration's RoPE, max_position_embeddings and rope_theta afterwards, what is said
    ("all_fits", 4096, {}, 4096, 10_000, []),
    ("shorter_than_it_allows", 1024, {}, 4096, 10_000, []),
    ("longer", 8192, {}, 8192, 10_000, ["max_position_embeddings was 4,096, is now 8,192"]),
    (
        "far_longer",
        100_000,
        {},
        100_000,
        64_000,
        ["max_position", "rope_theta was 10,000, .* 19,869 .*; it is now 64"],
    ),
    ("kept_large_base", 100_000, {"rope_theta": 5e5}, 100_000, 500_000, ["max_position_embeddings"]),
    ("linear", 4096, {"rope_type": "linear", "factor": 4.0}, 4096, 10_000, ["'linear' is kept as given"]),
    ("dynamic", 8192, {"rope_type": "dynamic", "factor": 4.0}, 8192, 10_000, ["max_", "'dynamic' is kept"]),
]


@pytest.mark.parametrize("context, rope, limit, base, said", [c[1:] for c in FITTED], ids=[c[0] for c in FITTED])
def test_a_configuration_is_fitted_to_the_context(tmp_path, context, rope, limit, base, said):
    name = written(tmp_path, rope_parameters=SMALL["rope_parameters"] | rope)
    config = new_config(name, context)
    assert config.max_position_embeddings == limit and config.rope_parameters["rope_theta"] == base
    assert wavelength(config) >= context
    notes = model_notes(name, context)
    assert len(notes) == len(said)
    for note, pattern in zip(notes, said, strict=True):
        assert re.search(pattern, note), note


def test_wavelength_is_the_models():
    model = new_model("nano", 128, seed=0)
    assert wavelength(model.config) == pytest.approx(2 * math.pi / model.model.rotary_emb.inv_freq.min().item())


def test_a_configuration_keeps_its_vocabulary_and_takes_the_tokenizers_marks(tmp_path):
    config = new_config(written(tmp_path, bos_token_id=7, eos_token_id=8, torch_dtype="bfloat16"), 128)
    tokenizer = byte_tokenizer()
    assert config.vocab_size == 400
    assert (config.pad_token_id, config.bos_token_id, config.eos_token_id) == (0, None, tokenizer.eos_token_id)
    assert new_model(str(tmp_path / "config.json"), 128, seed=0).dtype == torch.float32


def test_the_end_mark_is_trained_where_it_also_pads(tmp_path):
    tokenizer = byte_tokenizer()
    tokenizer.pad_token = tokenizer.eos_token
    model = new_model("nano", 128, 0, tokenizer)
    model(input_ids=torch.full((1, 8), tokenizer.eos_token_id), labels=torch.arange(8)[None]).loss.backward()
    assert model.model.embed_tokens.weight.grad[tokenizer.eos_token_id].any()


REFUSED = [
    # the name or the configuration's changes, the context, what is said
    ("an_unknown_name", "huge", 128, "model='huge': give one of nano, tiny, .*path of a config.json .*does not exist"),
    ("too_long_a_context", "nano", 65_537, "context=65537: model 'nano' allows at most 65536 tokens"),
    ("another_kind", {"model_type": "qwen2"}, 128, "model_type 'qwen2': Lighthouse supports only llama"),
    ("no_kind", {"model_type": None}, 128, "model_type None: Lighthouse supports only llama"),
    ("odd_heads", {"num_attention_heads": 3}, 128, "is not a llama configuration: .*64.* not a multiple of .*3"),
    ("uneven_groups", {"num_key_value_heads": 3}, 128, "num_key_value_heads 3 and num_attention_heads 4: .*multiple"),
    ("a_tiny_head_dim", {"head_dim": 2}, 128, "head_dim 2: RoPE needs an even number"),
    ("text_for_a_number", {"hidden_size": "wide"}, 128, "is not a llama configuration: .*hidden_size"),
    ("quantized", {"quantization_config": {"bits": 4}}, 128, "quantization_config: weights are trained unquantized"),
    ("attention_weights", {"output_attentions": True}, 128, "output_attentions True: a step needs only the loss"),
    ("all_layers_states", {"output_hidden_states": True}, 128, "output_hidden_states True: .*remove it"),
    ("no_names_of_outputs", {"return_dict": False}, 128, "return_dict False: a step needs only the loss, by its name"),
    ("a_sliding_window", {"sliding_window": 64}, 128, "config.sliding_window=64: sliding windows are not supported"),
    ("an_old_rope", {"rope_scaling": {"type": "su", "factor": 2.0}}, 128, "RoPE of type 'su', .* not know: .* yarn is"),
    (
        "a_rope_of_no_kind",
        {"rope_parameters": {"rope_type": "su"}},
        128,
        'RoPE of type \'su\', .*"rope_type": "default"',
    ),
    ("a_rope_without_its_factor", {"rope_parameters": {"rope_type": "yarn"}}, 128, "Missing required keys .*'factor'"),
    ("a_base_in_quotes", {"rope_parameters": {"rope_theta": "1e4"}}, 128, "rope_theta '1e4': a number above 0"),
    ("a_base_below_zero", {"rope_parameters": None, "rope_theta": -1.0}, 128, "rope_theta -1.0: a number above 0"),
    ("no_key_value_heads", {"num_key_value_heads": 0}, 128, "num_key_value_heads 0: at least 1 is needed"),
    ("no_layers", {"num_hidden_layers": 0}, 128, "num_hidden_layers 0: at least 1 is needed"),
    ("no_such_activation", {"hidden_act": "swish2"}, 128, "hidden_act 'swish2': one of .* silu, .* is needed"),
    ("all_dropped", {"attention_dropout": 1.0}, 128, "attention_dropout 1.0: a share from 0 to below 1"),
    (
        "stretched_too_little",
        {"rope_parameters": {"rope_type": "linear", "rope_theta": 10_000.0, "factor": 2.0}},
        100_000,
        "of type 'linear', is 39,738 tokens, and the context has 100,000: .*use \"rope_parameters\"",
    ),
]


@pytest.mark.parametrize("given, context, message", [r[1:] for r in REFUSED], ids=[r[0] for r in REFUSED])
def test_refused(tmp_path, given, context, message):
    with pytest.raises(ValueError, match=message):
        check_model(written(tmp_path, **given) if isinstance(given, dict) else given, context)


def test_a_padding_mark_beyond_the_vocabulary_is_replaced_and_no_error(tmp_path):
    assert check_model(written(tmp_path, pad_token_id=9999), 128) == 3


def test_what_no_model_can_be_made_of_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(models, "empty_model", lambda config: {}["of a later version"])
    with pytest.raises(ValueError, match="no model can be made of it: KeyError: 'of a later version'"):
        check_model(written(tmp_path), 128)


def test_what_is_no_configuration_is_refused(tmp_path):
    with pytest.raises(ValueError, match="is a folder without a config.json"):
        check_model(str(tmp_path), 128)
    (tmp_path / "config.json").write_text("layers: 3")
    with pytest.raises(ValueError, match="is not a configuration in JSON: Expecting value"):
        check_model(str(tmp_path), 128)
    (tmp_path / "config.json").write_text("[]")
    with pytest.raises(ValueError, match="model_type None"):
        check_model(str(tmp_path), 128)


def test_a_tokenizer_beyond_the_vocabulary_is_refused(tmp_path):
    with pytest.raises(ValueError, match="vocab_size 383: the tokenizer has ids beyond the vocabulary, up to 383; "):
        new_config(written(tmp_path, vocab_size=383), 128)


HEADS = [("of_20", 20, True), ("of_264", 264, True), ("of_256", 256, False), ("of_24", 24, False)]


@pytest.mark.parametrize("head_dim, refused", [h[1:] for h in HEADS], ids=[h[0] for h in HEADS])
def test_heads_that_the_gpu_kernels_do_not_take(tmp_path, head_dim, refused):
    name = written(tmp_path, head_dim=head_dim)
    check_head_dim(name, 128, "cpu")
    if refused:
        with pytest.raises(
            ValueError, match=f"head_dim {head_dim}: Lighthouse on CUDA needs a multiple of 8 up to 256"
        ):
            check_head_dim(name, 128, "cuda")
    else:
        check_head_dim(name, 128, "cuda")


def test_the_help_names_every_size():
    for size in SIZES.values():
        assert str(size).startswith(f"{size.name} (") and f"up to {size.max_context:,} tokens" in str(size)
    assert models.SIZES["paper"].max_context >= 1_048_576
