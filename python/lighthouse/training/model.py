"""Llama models with fresh weights: sizes by name, or a Hugging Face configuration, fitted to the context.

The trap is RoPE: trained from scratch, a model distinguishes positions only as far as its slowest rotation does, so the
longest wavelength has to reach over the context. A named size keeps its base; that of a given configuration is raised
where it is too small, and `model_notes` says so.
"""

from __future__ import annotations

import functools
import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerBase, set_seed
from transformers.activations import ACT2FN
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from lighthouse.core.devices import MAX_HEAD_DIM
from lighthouse.huggingface.architectures import ARCHITECTURES
from lighthouse.huggingface.checks import check_config
from lighthouse.text.tokenizer import byte_tokenizer

CONFIG = "config.json"

COUNTS = (
    *("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads"),
    *("num_key_value_heads", "head_dim", "max_position_embeddings"),
)

# What a configuration may say of a forward's output, as training needs it.
PLAIN_OUTPUT = {"output_attentions": False, "output_hidden_states": False, "return_dict": True}


@dataclass(frozen=True)
class Size:
    """A Llama's measures. `parameters` counts them for a vocabulary of bytes, embedding and output matrix included."""

    name: str
    layers: int
    width: int
    heads: int
    kv_heads: int
    head_dim: int
    intermediate: int
    max_context: int
    rope_theta: float
    initializer_range: float = 0.02
    tied: bool = False  # the output matrix is the embedding

    @property
    def parameters(self) -> int:
        attention = 2 * self.width * self.head_dim * (self.heads + self.kv_heads)
        layer = attention + 3 * self.width * self.intermediate + 2 * self.width
        matrices = 1 if self.tied else 2
        return self.layers * layer + matrices * _byte_vocabulary() * self.width + self.width

    def __str__(self) -> str:
        heads = f"{self.heads} x {self.head_dim}"
        return (
            f"{self.name} ({self.parameters / 1e6:.1f}M: {self.layers} layers of {self.width}, "
            f"{heads}, up to {self.max_context:,} tokens)"
        )


@functools.cache
def _byte_vocabulary() -> int:
    return len(byte_tokenizer())


# `paper` has the shape of arXiv 2605.06554, which has 530M parameters with a vocabulary of 128,256; `llama-1b` and
# `llama-8b` those of Llama 3.2 1B and Llama 3.1 8B, with plain RoPE.
SIZES = {
    size.name: size
    for size in (
        Size("nano", 4, 128, 1, 1, 64, 512, 65_536, 10_000.0, 0.06),
        Size("tiny", 6, 256, 4, 4, 64, 704, 131_072, 100_000.0),
        Size("small", 12, 512, 8, 8, 64, 1408, 131_072, 500_000.0),
        Size("medium", 24, 1024, 8, 4, 128, 2816, 131_072, 500_000.0),
        Size("paper", 30, 1024, 8, 8, 128, 1536, 1_048_576, 500_000.0),
        Size("llama-1b", 16, 2048, 32, 8, 64, 8192, 1_048_576, 500_000.0, tied=True),
        Size("llama-8b", 32, 4096, 32, 8, 128, 14_336, 1_048_576, 500_000.0),
    )
}


def check_model(name: str, context: int) -> int:
    """The layers of a model that `context` tokens fit; makes no weights and needs no tokenizer.

    `name` is a size, or the path of a configuration of Transformers: a config.json, or a folder that has one.

    Raises:
        ValueError: it is neither, not made for so long a context, or of a kind that Lighthouse does not know.
    """
    config = _config(name, context)[0]
    if name in SIZES:
        return config.num_hidden_layers
    config.pad_token_id = None  # the tokenizer's is used
    try:
        empty_model(config)
    except Exception as error:  # of what nothing above looks at
        raise ValueError(f"model={name!r}: no model can be made of it: {type(error).__name__}: {error}") from error
    return config.num_hidden_layers


def check_head_dim(name: str, context: int, device_type: str) -> None:
    """Lighthouse's kernels take the model's heads on such a device. Raises `ValueError`."""
    head_dim = head_dim_of(_config(name, context)[0])
    if device_type == "cuda" and (head_dim % 8 or head_dim > MAX_HEAD_DIM):
        raise ValueError(
            f"model={name!r} has head_dim {head_dim}: Lighthouse on CUDA needs a multiple of 8 up to {MAX_HEAD_DIM}; "
            "choose another number of heads, or train dense with --dense_only"
        )


def head_dim_of(config: LlamaConfig) -> int:
    """Numbers in a head's vector of a token, as the configuration gives them or they follow."""
    return config.head_dim or config.hidden_size // config.num_attention_heads


def model_notes(name: str, context: int) -> list[str]:
    """A sentence for each change to a given configuration, and for each doubt about it."""
    return _config(name, context)[1]


def new_config(name: str, context: int, tokenizer: PreTrainedTokenizerBase | None = None) -> LlamaConfig:
    """The configuration of a model for `context` tokens in this tokenizer's ids; by default bytes.

    A named size gets the tokenizer's vocabulary, and `context` as its `max_position_embeddings`: it has seen no
    position beyond. A given configuration keeps its own vocabulary, which may be larger than the tokenizer's.

    Raises:
        ValueError: as `check_model` does, or the tokenizer has ids beyond the vocabulary.
    """
    tokenizer = byte_tokenizer() if tokenizer is None else tokenizer
    config = _config(name, context)[0]
    needed = max(len(tokenizer), 1 + max(tokenizer.get_vocab().values()))
    if name in SIZES:
        config.vocab_size = needed
    elif config.vocab_size < needed:
        raise ValueError(
            f"model={name!r} has vocab_size {config.vocab_size}: the tokenizer has ids beyond the vocabulary, up to "
            f"{needed - 1}; raise vocab_size to at least {needed}, or use the model's own tokenizer"
        )
    config.bos_token_id, config.eos_token_id = tokenizer.bos_token_id, tokenizer.eos_token_id
    # The embedding of the padding token is never trained: no other mark may be it.
    pad = tokenizer.pad_token_id
    config.pad_token_id = None if pad in (tokenizer.eos_token_id, tokenizer.bos_token_id) else pad
    return config


def new_model(name: str, context: int, seed: int, tokenizer: PreTrainedTokenizerBase | None = None) -> LlamaForCausalLM:
    """A model of `new_config` with fresh float32 weights on the CPU, which depend on `seed` alone."""
    return model_of(new_config(name, context, tokenizer), seed)


def model_of(config: LlamaConfig, seed: int) -> LlamaForCausalLM:
    """The model of a configuration; each weight is drawn once, where plain construction would draw it twice."""
    model = empty_model(config)
    model.to_empty(device="cpu")
    model.tie_weights()
    set_seed(seed)
    model.init_weights()
    return model


def empty_model(config: LlamaConfig) -> LlamaForCausalLM:
    """The same without memory for its weights, on the `meta` device, to count and measure with."""
    with torch.device("meta"):
        return LlamaForCausalLM(config).to(torch.float32)  # type: ignore[arg-type]  # its decorator hides the types


def _config(name: str, context: int) -> tuple[LlamaConfig, list[str]]:
    """The configuration, new on each call and without its vocabulary if it is a size's, and the notes."""
    if name not in SIZES:
        config = _read(name)
        return config, _fit(name, config, context)
    size = SIZES[name]
    if context > size.max_context:
        raise ValueError(f"context={context}: model {name!r} allows at most {size.max_context} tokens")
    config = LlamaConfig(
        vocab_size=_byte_vocabulary(),
        hidden_size=size.width,
        intermediate_size=size.intermediate,
        num_hidden_layers=size.layers,
        num_attention_heads=size.heads,
        num_key_value_heads=size.kv_heads,
        head_dim=size.head_dim,
        max_position_embeddings=context,
        initializer_range=size.initializer_range,
        rope_parameters={"rope_type": "default", "rope_theta": size.rope_theta},
        tie_word_embeddings=size.tied,
    )
    return config, []


def _read(name: str) -> LlamaConfig:
    """The configuration at a path, checked for what does not depend on the context."""
    path = Path(name)
    if not path.exists():
        raise ValueError(
            f"model={name!r}: give one of {', '.join(SIZES)}, or the path of a {CONFIG} or of a folder with one; this "
            "path does not exist"
        )
    file = path / CONFIG if path.is_dir() else path
    try:
        values = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ValueError(f"model={name!r} is a folder without a {CONFIG}") from None
    except (OSError, ValueError) as error:
        raise ValueError(f"model={name!r} is not a configuration in JSON: {error}") from None
    configs: list[Any] = [entry.causal.config_class for entry in ARCHITECTURES]
    kinds = {config.model_type: config for config in configs}
    kind = values.get("model_type") if isinstance(values, dict) else None
    if kind not in kinds:
        raise ValueError(f"model={name!r} has model_type {kind!r}: Lighthouse supports only {', '.join(kinds)}")
    if values.get("quantization_config"):
        raise ValueError(f"model={name!r} has a quantization_config: weights are trained unquantized; remove it")
    _check_values(name, values)
    try:
        config = kinds[kind].from_dict(values)
    except Exception as error:  # of kinds that differ from version to version
        raise ValueError(f"model={name!r} is not a {kind} configuration: {' '.join(str(error).split())}") from error
    check_config(config)
    for output, plain in PLAIN_OUTPUT.items():
        if getattr(config, output, plain) != plain:
            raise ValueError(
                f"model={name!r} has {output} {getattr(config, output)!r}: a step needs only the loss, by its name; "
                "remove it"
            )
    if config.head_dim % 2 or config.head_dim < 4:
        raise ValueError(f"model={name!r} has head_dim {config.head_dim}: RoPE needs an even number, at least 4")
    if config.num_attention_heads % config.num_key_value_heads:
        raise ValueError(
            f"model={name!r} has num_key_value_heads {config.num_key_value_heads} and num_attention_heads "
            f"{config.num_attention_heads}: the query heads must be a multiple of the key-value heads"
        )
    config.dtype = torch.float32
    return config


def _check_values(name: str, values: dict) -> None:
    """Refuses values of a configuration that Transformers takes and fails with later."""
    for count in COUNTS:
        if isinstance(values.get(count), int) and values[count] < 1:
            raise ValueError(f"model={name!r} has {count} {values[count]}: at least 1 is needed")
    if (act := values.get("hidden_act", "silu")) not in ACT2FN:
        raise ValueError(f"model={name!r} has hidden_act {act!r}: one of {', '.join(sorted(ACT2FN))} is needed")
    dropout = values.get("attention_dropout", 0)
    if isinstance(dropout, (int, float)) and not 0 <= dropout < 1:
        raise ValueError(f"model={name!r} has attention_dropout {dropout}: a share from 0 to below 1 is needed")
    known = sorted({"default", *ROPE_INIT_FUNCTIONS})
    for rope in (values, values.get("rope_parameters"), values.get("rope_scaling")):
        rope = rope if isinstance(rope, dict) else {}
        kind, theta = rope.get("rope_type", rope.get("type", "default")), rope.get("rope_theta", 1.0)
        if kind not in known:
            raise ValueError(
                f"model={name!r} has a RoPE of type {kind!r}, which this version of Transformers does not know: one of "
                f'{", ".join(known)} is needed; for training from scratch use {{"rope_type": "default"}}'
            )
        if isinstance(theta, bool) or not isinstance(theta, (int, float)) or not theta > 0:
            raise ValueError(f"model={name!r} has rope_theta {theta!r}: a number above 0 is needed")


def _fit(name: str, config: LlamaConfig, context: int) -> list[str]:
    """Fits length and RoPE of a given configuration to the context, in place; says what was changed."""
    notes = []
    if config.max_position_embeddings < context:
        notes.append(
            f"max_position_embeddings was {config.max_position_embeddings:,}, is now {context:,}: the context."
        )
        config.max_position_embeddings = context
    rope, head_dim = rope_of(config), head_dim_of(config)
    kind, reach = rope.get("rope_type", "default"), wavelength(config)
    if kind != "default":
        if reach < context:
            raise ValueError(
                f"model={name!r}: the longest wavelength of its RoPE, of type {kind!r}, is {reach:,.0f} tokens, and "
                f"the context has {context:,}: such types stretch trained models; for training from scratch use "
                '"rope_parameters": {"rope_type": "default"}, whose base is then adjusted'
            )
        notes.append(f"RoPE of type {kind!r} is kept as given: it is meant for stretching a trained model.")
    elif reach < context:
        base = _rounded_up((context / (2 * math.pi)) ** (head_dim / (head_dim - 2)))
        notes.append(
            f"rope_theta was {rope['rope_theta']:,.0f}, with a longest wavelength of {reach:,.0f} tokens; it is now "
            f"{base:,.0f}, to cover the context of {context:,}."
        )
        config.rope_parameters = rope | {"rope_theta": base}
    return notes


def rope_of(config: LlamaConfig) -> dict:
    """The parameters of the configuration's RoPE."""
    return dict(config.rope_parameters or {})


def wavelength(config: LlamaConfig) -> float:
    """Tokens in the longest period of the configuration's RoPE."""
    rope, head_dim = rope_of(config), head_dim_of(config)
    kind = rope.get("rope_type", "default")
    if kind != "default":
        return 2 * math.pi / ROPE_INIT_FUNCTIONS[kind](config, "cpu")[0].min().item()
    return 2 * math.pi * rope["rope_theta"] ** ((head_dim - 2) / head_dim)


def _rounded_up(number: float) -> float:
    """To two digits."""
    unit = 10.0 ** (math.floor(math.log10(number)) - 1)
    return math.ceil(number / unit) * unit
