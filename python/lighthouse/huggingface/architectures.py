"""The models that can be wrapped, and where their parts are.

One entry per architecture. A model belongs here if its attention is causal self-attention over the whole sequence and
goes through Transformers' `AttentionInterface`. One whose attention normalises queries and keys per head (QK-norm)
needs scores from before that normalisation, and does not belong here yet.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

from torch import nn
from transformers import LlamaForCausalLM, LlamaModel, PretrainedConfig, PreTrainedModel
from transformers.models.llama.modeling_llama import LlamaAttention


@dataclass(frozen=True)
class Architecture:
    """Where a wrapped model's parts are.

    `bare` is the class without an output layer, `causal` the one with it; `body(model)` is what gives hidden states,
    `attention(body)` its self-attention modules, first layer first, which are of `attention_class`.
    """

    name: str
    bare: type[PreTrainedModel]
    causal: type[PreTrainedModel]
    attention_class: type[nn.Module]
    body: Callable[[Any], PreTrainedModel]
    attention: Callable[[Any], list[nn.Module]]

    def has_head(self, model: PreTrainedModel) -> bool:
        """Whether the model has an output layer of its own."""
        return isinstance(model, self.causal)

    def output_layer(self, model: PreTrainedModel) -> nn.Module:
        """The module whose weight makes logits: of a bare model, the input embedding."""
        return model.get_output_embeddings() if self.has_head(model) else model.get_input_embeddings()


def _attributes(layers: Iterable[nn.Module], name: str) -> list[nn.Module]:
    for index, layer in enumerate(layers):
        if not isinstance(getattr(layer, name, None), nn.Module):
            raise ValueError(f"layer {index} is a {type(layer).__name__} without {name}: Lighthouse needs one in each")
    return [getattr(layer, name) for layer in layers]


ARCHITECTURES = (
    Architecture(
        name="Llama",
        bare=LlamaModel,
        causal=LlamaForCausalLM,
        attention_class=LlamaAttention,
        body=lambda model: model if isinstance(model, LlamaModel) else model.model,
        attention=lambda body: _attributes(body.layers[: body.config.num_hidden_layers], "self_attn"),
    ),
)


def architecture_of(model: nn.Module) -> Architecture:
    """The entry for `model`. Raises `TypeError` if it is not a Transformers model, `ValueError` if not supported."""
    for architecture in ARCHITECTURES:
        if isinstance(model, (architecture.bare, architecture.causal)):
            return architecture
    name = type(model).__name__
    if isinstance(model, PreTrainedModel):
        raise ValueError(
            f"a {name} cannot be wrapped: of the models of Transformers only Llama's can so far ({KNOWN}); in a model "
            "of your own call lighthouse.attention"
        )
    modules = model.modules() if isinstance(model, nn.Module) else ()
    inside = next((type(module).__name__ for module in modules if isinstance(module, _CLASSES)), None)
    if inside is not None:
        raise TypeError(f"model is a {name} around a {inside}: wrap the {inside} first, then make the {name}")
    raise TypeError(f"model is {_what(model)}: a model of Transformers is needed, {KNOWN}")


_CLASSES = tuple(made for entry in ARCHITECTURES for made in (entry.bare, entry.causal))
KNOWN = ", ".join(made.__name__ for made in _CLASSES)


def _what(model: Any) -> str:
    """In place of a model, and the way to one where there is."""
    name = type(model).__name__
    if isinstance(model, type):
        return f"the class {model.__name__}, of which no model was made yet"
    if isinstance(model, str):
        return f"the text {model!r}, perhaps for LlamaForCausalLM.from_pretrained"
    if isinstance(model, PretrainedConfig):
        return f"a {name}, of which LlamaForCausalLM(config) makes a model"
    return f"a {name}"
