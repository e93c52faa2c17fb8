"""What a wrapped model does differently from the plain one, as a class laid over the plain model's.

Each forward is decided once, here: Lighthouse acts, or the plain model runs with its own attention and masks. The
decision is the attention's name in the model's configuration. It is left standing after the forward, because gradient
checkpointing runs the layers again in the backward and has to find the same name. Where another call has changed it in
between, `use_reentrant=False` raises torch's RuntimeError; reentrant checkpointing would give wrong gradients in
silence, and is refused.

Two configurations: the model's, a copy of its own since the one it came with may be shared with other models, and the
one that dense layers hold, which names a dense attention while the model's names Lighthouse.
"""

from __future__ import annotations

import copy
import inspect
import itertools
import logging
from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from transformers import PretrainedConfig, PreTrainedModel
from transformers.loss.loss_utils import ForCausalLMLoss
from transformers.modeling_outputs import CausalLMOutputWithPast

from lighthouse.class_swap import Swapped, swap, unswap
from lighthouse.devices import check_device
from lighthouse.huggingface import checks
from lighthouse.huggingface.architectures import Architecture, architecture_of
from lighthouse.huggingface.attention_interface import NAME, dense_name
from lighthouse.huggingface.checkpointing import forget_choices, keep_choices
from lighthouse.huggingface.loss import IGNORE_INDEX, OutputLayer, next_token_loss
from lighthouse.wrapper import LighthouseSettings

logger = logging.getLogger("lighthouse")

_numbers = itertools.count(1)


@dataclass
class _State:
    """What a wrapped model remembers beside its plain attributes."""

    settings: LighthouseSettings
    former: str  # the attention the model came with
    config: PretrainedConfig  # the model's own
    dense_config: PretrainedConfig  # what its dense layers hold
    loss_type: str | None  # the one the model came with
    enabled: bool = True
    generating: bool = False
    # Of this model in this process. A string, since the compiler may take a number for a variable.
    name: str = field(default_factory=lambda: f"model {next(_numbers)}")

    def __getstate__(self) -> dict:
        return {key: value for key, value in vars(self).items() if key != "name"}

    def __setstate__(self, state: dict) -> None:
        vars(self).update(state, name=f"model {next(_numbers)}")

    def name_attention(self, acts: bool) -> None:
        model, dense = (NAME, dense_name(self.former)) if acts else (self.former, self.former)
        for config, wanted in ((self.config, model), (self.dense_config, dense)):
            if config._attn_implementation != wanted:
                config._attn_implementation = wanted


class WrappedModel(Swapped):
    """Over a model of Transformers: Lighthouse while it trains, and a loss that never holds the logits."""

    _lighthouse: _State

    # The way out

    def unwrap(self) -> PreTrainedModel:
        """The plain model: this object, with its former class and attention. Works under `fully_shard` too.

        The configuration stays the model's own copy, equal in content to the one it came with but for later changes.
        Nothing of Lighthouse stays on the plain model, so a second `model.unwrap()` is an AttributeError;
        `lighthouse.unwrap(model)` says it in a clear ValueError.
        """
        state = self._lighthouse
        architecture = architecture_of(self)
        self._forget_forward()
        state.enabled = False
        state.name_attention(acts=False)
        for module in architecture.attention(architecture.body(self)):
            module.__dict__.pop("lighthouse_settings", None)
        for module in self.modules():
            if getattr(module, "config", None) is state.dense_config:
                module.config = state.config
        for module in self.modules():
            if isinstance(module, OutputLayer):
                unswap(module)
        forget_choices(self)
        self.loss_type = state.loss_type
        del self._lighthouse
        unswap(self)
        return self

    def _forget_forward(self) -> None:
        """`accelerate` leaves a `forward` on the instance (mixed precision) that holds the wrapped class's."""
        former = self.__dict__.pop("_original_forward", None)
        if former is None:
            return
        self.__dict__.pop("forward", None)
        if getattr(former, "__func__", None) is not type(self).forward:
            self.forward = former

    # The switch

    def lighthouse(self, enabled: bool) -> WrappedModel:
        """Switches Lighthouse off or on, in place, and returns the model; parameters and optimizer are untouched.

        While it is off the model trains with its plain attention and masks; the loss stays as it was set. Under
        gradient checkpointing a switch between a forward and its backward makes the backward a RuntimeError.
        Raises `ValueError` where it would be switched on under reentrant checkpointing.
        """
        if not isinstance(enabled, bool):
            raise TypeError(f"lighthouse({enabled!r}): True or False is needed")
        if enabled and self.training:
            checks.check_checkpointing(architecture_of(self).body(self))
        self._lighthouse.enabled = enabled
        self._settle()
        return self

    @property
    def lighthouse_enabled(self) -> bool:
        """Whether Lighthouse is switched on. In `eval()` it may be on and yet not act (`eval="dense"`)."""
        return self._lighthouse.enabled

    @property
    def lighthouse_settings(self) -> LighthouseSettings:
        """What the model was wrapped with; `dense_layers` is the number in effect."""
        return self._lighthouse.settings

    def train(self, mode: bool = True) -> WrappedModel:
        super().train(mode)
        self._settle()
        return self

    def set_attn_implementation(self, attn_implementation: str | dict, *args, **kwargs) -> None:
        """Sets the attention that runs wherever Lighthouse does not act. Raises `ValueError` for Lighthouse itself."""
        named = attn_implementation.get("") if isinstance(attn_implementation, dict) else attn_implementation
        if named == NAME:
            raise ValueError(
                f"attn_implementation={attn_implementation!r}: a dense attention is needed, for where Lighthouse does "
                "not act; to switch Lighthouse on: model.lighthouse(True)"
            )
        state = self._lighthouse
        state.name_attention(acts=False)
        super().set_attn_implementation(attn_implementation, *args, **kwargs)
        state.former = self.config._attn_implementation
        self._settle()

    def save_pretrained(self, *args, **kwargs) -> None:
        """The plain model's files. Says once if Lighthouse is still on: others will run these weights dense."""
        if self._lighthouse.enabled:
            _say_once(
                self._lighthouse.name,
                "what is saved is the plain model, and Lighthouse is still on: without steps of dense attention "
                "(lighthouse(False), then train on) its weights are not ready for the dense attention that others run",
            )
        super().save_pretrained(*args, **kwargs)

    def _set_gradient_checkpointing(self, *args, **kwargs) -> None:
        super()._set_gradient_checkpointing(*args, **kwargs)
        keep_choices(self)

    def _settle(self) -> None:
        """Names the attention that the next forward is expected to need, so that compiled code finds it named."""
        state = self._lighthouse
        state.name_attention(state.enabled and (self.training or state.settings.eval == "lighthouse"))

    def extra_repr(self) -> str:
        state = self._lighthouse
        return "\n".join(filter(None, (super().extra_repr(), f"{state.settings}, enabled={state.enabled}")))

    # The forward

    @classmethod
    def namespace(cls, plain: type) -> dict:
        signature = inspect.signature(plain.forward)
        names = [
            name
            for name, parameter in signature.parameters.items()
            if parameter.kind is parameter.POSITIONAL_OR_KEYWORD and name != "self"
        ]

        def forward(self, *args, **kwargs):
            return self._call(names, args, kwargs)

        forward.__signature__ = _with_labels(signature)  # Trainer reads here which columns the model takes
        forward.__doc__ = plain.forward.__doc__
        own = {"forward": forward}
        if hasattr(plain, "generate"):

            def generate(self, *args, **kwargs):
                with _Generating(self._lighthouse):
                    return plain.generate(self, *args, **kwargs)

            generate.__doc__ = plain.generate.__doc__
            generate.__signature__ = inspect.signature(plain.generate)
            own["generate"] = generate
        return own

    def _call(self, names: list[str], args: tuple, kwargs: dict):
        batch = args[0] if args and isinstance(args[0], Mapping) else None
        if batch is not None:
            if len(args) > 1:
                raise TypeError("model(batch) takes one mapping; further arguments are given by name")
            call = {**batch, **kwargs}
            if call.get("labels") is None and call.get("shift_labels") is None:
                call["labels"] = _labels_of(call)
        else:
            if len(args) > len(names):
                raise TypeError(f"forward takes at most {len(names)} positional arguments, {len(args)} were given")
            call = {**dict(zip(names, args, strict=False)), **kwargs}

        state = self._lighthouse
        wants_loss = call.get("labels") is not None or call.get("shift_labels") is not None
        chunked = wants_loss and self._loss_is_ours(call)
        if call.get("use_cache") is None and (self.training or chunked) and call.get("past_key_values") is None:
            call["use_cache"] = False
        acts = self._acts(call)
        state.name_attention(acts)
        if acts and call.get("attention_mask") is not None:
            call["attention_mask"] = None  # it hides nothing: _acts has looked
        if chunked:
            return self._with_loss(call)
        return super().forward(**call)

    def _acts(self, call: dict) -> bool:
        """Whether Lighthouse acts in this forward; where it does, everything it cannot honour has been refused."""
        state = self._lighthouse
        settings = state.settings
        if not state.enabled or state.generating:
            return False
        if self.training:  # where the plain model runs too: another call may come before the backward
            checks.check_checkpointing(architecture_of(self).body(self))
        elif settings.eval == "dense":
            _say_once(state.name, 'in eval() attention is dense; eval="lighthouse" would keep Lighthouse')
            return False
        use_cache = call.get("use_cache")
        if use_cache is None:
            use_cache = self.config.use_cache
        if use_cache or call.get("past_key_values") is not None:
            _say_once(state.name, "with a key-value cache attention is dense")
            return False
        name = "input_ids" if call.get("input_ids") is not None else "inputs_embeds"
        tokens = call.get(name)
        if tokens is None:
            return False  # the plain model says what is missing
        device = tokens.device.type
        if not settings.pays(tokens.shape[1], device):
            _say_once(
                state.name,
                f"sequences of fewer than {settings.least_tokens(device)} tokens (min_tokens), or whose sub-sequence "
                f"is longer than {settings.max_share} of them (max_share), run with dense attention",
            )
            return False
        check_device(name, tokens.device)
        checks.check_call(call, tokens.shape[1], self.config)
        if not self.training:
            _say_once(
                state.name,
                'in eval() Lighthouse acts, as eval="lighthouse" asks for: losses do not compare with dense ones',
            )
        return True

    def _loss_is_ours(self, call: dict) -> bool:
        """Not where the model has its own and that, or some of the logits, is asked for."""
        if not architecture_of(self).has_head(self):
            return True
        kept = call.get("logits_to_keep")
        return self._lighthouse.settings.loss == "chunked" and (kept is None or (isinstance(kept, int) and kept == 0))

    def _with_loss(self, call: dict):
        architecture = architecture_of(self)
        labels = call.pop("labels", None)
        shift_labels = call.pop("shift_labels", None)
        items = call.pop("num_items_in_batch", None)
        return_dict = call.pop("return_dict", None)
        call.pop("logits_to_keep", None)
        if architecture.has_head(self):
            outputs = architecture.body(self)(**call, return_dict=True)
        else:
            outputs = super().forward(**call, return_dict=True)
        loss = next_token_loss(
            architecture.output_layer(self),
            outputs.last_hidden_state,
            labels,
            num_items_in_batch=items,
            shift_labels=shift_labels,
        )
        # Named only where there is one: later versions of Transformers call it otherwise, and warn.
        cache = {} if call.get("use_cache") is False else {"past_key_values": outputs.past_key_values}
        result = CausalLMOutputWithPast(
            loss=loss, logits=None, hidden_states=outputs.hidden_states, attentions=outputs.attentions, **cache
        )
        if return_dict is None:
            return_dict = self.config.return_dict
        return result if return_dict else result.to_tuple()


class _Generating:
    """While text is generated the plain attention runs, in train() too."""

    def __init__(self, state: _State):
        self.state = state

    def __enter__(self) -> None:
        state = self.state
        self.before = state.generating, state.config._attn_implementation
        if state.enabled:
            _say_once(state.name, "generate runs with dense attention")
        state.generating = True
        state.name_attention(acts=False)

    def __exit__(self, *_) -> None:
        self.state.generating, name = self.before
        self.state.name_attention(acts=name == NAME)


def wrap(model: PreTrainedModel, settings: LighthouseSettings) -> PreTrainedModel:
    """Lays `WrappedModel` over `model`, in place. `lighthouse.LighthouseWrapper` is the way in for users.

    Raises `TypeError` or `ValueError` before anything is changed.
    """
    if isinstance(model, WrappedModel):
        raise ValueError(
            f"this {type(model).__name__} is wrapped already, with {model.lighthouse_settings}; "
            "unwrap it first for other settings"
        )
    architecture = architecture_of(model)
    _check_model(model, architecture, settings)
    body = architecture.body(model)
    attention = architecture.attention(body)
    settings = settings.for_layers(len(attention))

    former = model.config._attn_implementation
    own, dense = copy.deepcopy(model.config), copy.deepcopy(model.config)
    shared = model.config
    for module in model.modules():
        if getattr(module, "config", None) is shared:
            module.config = own
    for index, module in enumerate(attention):
        if settings.acts_in_layer(index, len(attention)):
            module.lighthouse_settings = settings
        else:
            module.config = dense
    swap(architecture.output_layer(model), OutputLayer)
    swap(model, WrappedModel)
    model._lighthouse = _State(
        settings=settings, former=former, config=own, dense_config=dense, loss_type=model.loss_type
    )
    # Trainer counts the predicted tokens by this: a bare model would be given one too many per sequence.
    model.loss_type = "ForCausalLM"
    keep_choices(model)
    model._settle()
    return model


def _check_model(model: PreTrainedModel, architecture: Architecture, settings: LighthouseSettings) -> None:
    name = type(model).__name__
    checks.check_config(model.config)
    if "forward" in vars(model):
        raise ValueError(
            f"this {name} has a forward of its own on the instance, as Liger or accelerate leave it: wrap it before"
        )
    for module in architecture.body(model).modules():
        if isinstance(module, WrappedModel):
            raise ValueError(f"a part of this {name} is wrapped already: unwrap it, then wrap the whole")
    if architecture.has_head(model):
        if settings.loss == "chunked" and model.loss_function is not ForCausalLMLoss:
            raise ValueError(f'this {name} has a loss function of its own: loss="model" uses it')
    elif settings.loss == "model":
        raise ValueError(
            f'loss="model": a {name} has no loss of its own; take "chunked" or a {architecture.causal.__name__}'
        )


def _labels_of(call: dict) -> torch.Tensor:
    """The input ids as labels; what a mask `[B, N]` hides is not predicted."""
    labels = call.get("input_ids")
    if labels is None:
        raise ValueError("the batch has neither labels nor input_ids: one of them is needed for the loss")
    mask = call.get("attention_mask")
    if isinstance(mask, torch.Tensor) and mask.shape == labels.shape:
        labels = labels.masked_fill(mask == 0, IGNORE_INDEX)
    return labels


def _with_labels(signature: inspect.Signature) -> inspect.Signature:
    """The plain forward's signature, with `labels` where it has none."""
    parameters = dict(signature.parameters)
    if "labels" not in parameters:
        labels = inspect.Parameter("labels", inspect.Parameter.KEYWORD_ONLY, default=None)
        rest = [name for name, parameter in parameters.items() if parameter.kind is parameter.VAR_KEYWORD]
        last = {name: parameters.pop(name) for name in rest}
        parameters = {**parameters, "labels": labels, **last}
    return signature.replace(parameters=list(parameters.values()))


_said: set[tuple[str, str]] = set()


@torch.compiler.assume_constant_result
def _say_once(name: str, message: str) -> None:
    """Logs a warning once per model and process. Compiled code says it while it is compiled."""
    if (name, message) not in _said:
        _said.add((name, message))
        logger.warning("Lighthouse: %s", message)
