"""What a wrapped model does differently from the plain one, as a class over the plain model's.

Each forward is decided once, here: Lighthouse acts, or the plain model runs with its own attention and masks. The
decision is the attention's name in the model's configuration. It stays after the forward, because gradient
checkpointing runs the layers again in the backward and has to find the same name. Where another call has changed it in
between, `use_reentrant=False` raises torch's RuntimeError; reentrant checkpointing would silently give wrong
gradients, and is refused.

Two configurations: the model's, a copy of its own since the one it came with may be shared with other models, and the
one that dense layers hold, which names a dense attention while the model's names Lighthouse.
"""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from typing import Any

import torch
from transformers import PreTrainedModel
from transformers.modeling_outputs import CausalLMOutputWithPast

from lighthouse.core.devices import check_device
from lighthouse.core.settings import LEAST_DENSE_SHARE, LighthouseSettings
from lighthouse.huggingface import batches, checks, looking, originals, trainers
from lighthouse.huggingface.architectures import architecture_of
from lighthouse.huggingface.attention_interface import NAME
from lighthouse.huggingface.checkpointing import forget_choices, keep_choices
from lighthouse.huggingface.class_swap import unswap
from lighthouse.huggingface.loss import OutputLayer, next_token_loss
from lighthouse.huggingface.signatures import positional_names, with_labels
from lighthouse.huggingface.state import State, Stateful, Used, say_once

# What this Transformers calls a key-value cache in an output.
_CACHE = "cache" if "cache" in CausalLMOutputWithPast.__dataclass_fields__ else "past_key_values"


class WrappedModel(Stateful):
    """Over a model of Transformers: Lighthouse while it trains, and a loss that never holds the logits."""

    _lighthouse: State

    # The way out

    def unwrap(self) -> PreTrainedModel:
        """The plain model: this object, with its former class and attention. Works under `fully_shard` too.

        The configuration stays the model's own copy, equal in content to the one it came with but for later changes.
        Nothing of Lighthouse stays on the plain model, so a second `model.unwrap()` is an AttributeError;
        `lighthouse.unwrap(model)` raises a clear ValueError. Warns if the model was trained with Lighthouse but not, or
        hardly, with dense attention after that.
        """
        state = self._lighthouse
        self._say_if_not_ready()
        self._forget_forward()
        state.enabled = False
        state.name_attention(acts=False)
        looking.seat_layers(self)  # a layer that was put in since has a configuration of its own
        module: Any
        for module in self.modules():
            module.__dict__.pop("lighthouse_seat", None)
            if getattr(module, "config", None) is state.dense_config:
                module.config = state.config
        for module in self.modules():
            if isinstance(module, OutputLayer):
                unswap(module)
        forget_choices(self)
        self.loss_type = state.loss_type  # type: ignore[assignment]  # which may be None
        del self._lighthouse
        unswap(self)
        return self

    def _say_if_not_ready(self) -> None:
        state = self._lighthouse
        if not state.ready:
            say_once(
                state.name,
                "this model was trained with Lighthouse and with no step of dense attention after it: it is not ready "
                "for the dense attention it now has; continue training with model.lighthouse(False) before unwrap()",
            )
        elif state.hardly_dense is not None:
            forwards, dense = state.hardly_dense
            say_once(
                state.name,
                f"of this model's {forwards:,} training forwards only {dense:,} had dense attention: with "
                f"less than {LEAST_DENSE_SHARE:.0%} it is hardly ready for it; continue training before using it",
            )

    def _forget_forward(self) -> None:
        """A `forward` on the instance that holds the wrapped class's, as accelerate and `torch.compile` leave it."""
        former = self.__dict__.pop("_original_forward", None)  # accelerate's name for what it found
        if former is not None:
            del self.forward
            if not looking.leads_to_ours(former):
                self.forward = former
        elif looking.leads_to_ours(vars(self).get("forward")):
            del self.forward

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

    def take_used(self) -> Used:
        """Which attention the training forwards since the last call of this ran: `(lighthouse, dense)`.

        Both are true where some ran the one and some the other, neither where there were none. In compiled code too.
        """
        return self._lighthouse.take_used()

    def train(self, mode: bool = True) -> WrappedModel:
        super().train(mode)
        self._settle()
        return self

    def set_attn_implementation(self, attn_implementation: str | dict, *args, **kwargs) -> None:
        """Sets the attention that runs wherever Lighthouse does not act: one of Transformers' own.

        Raises `ValueError` for Lighthouse itself, and for an attention function of the user's own.
        """
        named = attn_implementation.get("") if isinstance(attn_implementation, dict) else attn_implementation
        if named == NAME:
            raise ValueError(
                f"attn_implementation={attn_implementation!r}: a dense attention is needed, for where Lighthouse does "
                "not act; to switch Lighthouse on: model.lighthouse(True)"
            )
        state = self._lighthouse
        state.name_attention(acts=False)
        before = state.former
        super().set_attn_implementation(attn_implementation, *args, **kwargs)
        state.former = self.config._attn_implementation
        try:
            originals.check_attention_functions(state.former, looking.attention_modules(self)[0])
        except ValueError:
            super().set_attn_implementation(before)
            state.former = before
            raise
        finally:
            self._settle()

    def save_pretrained(self, *args, **kwargs) -> None:
        """Saves the plain model. Logs once if no dense training has followed Lighthouse: others run it dense.

        Not for the checkpoints of a Trainer with a `LighthouseCallback`, which says it at the end of training.
        """
        state = self._lighthouse
        if (state.enabled or not state.ready) and not trainers.keeps_a_checkpoint():
            still = " and Lighthouse is still on" if state.enabled else ""
            say_once(
                state.name,
                f"the plain model is saved{still}: without dense steps (lighthouse(False), then continue training) its "
                "weights are not ready for dense attention, which every other program uses",
            )
        super().save_pretrained(*args, **kwargs)

    def _set_gradient_checkpointing(self, *args, **kwargs) -> None:
        super()._set_gradient_checkpointing(*args, **kwargs)
        keep_choices(self)

    def _settle(self) -> None:
        """Names the attention that the next forward is expected to need, so that compiled code finds it named."""
        state = self._lighthouse
        looking.look_again(self)
        looking.seat_others(self)
        state.name_attention(state.enabled and (self.training or state.settings.eval == "lighthouse"))

    def __setstate__(self, state: dict) -> None:
        super().__setstate__(state)
        if "_lighthouse" in vars(self):  # a copy, or from a file: its layers are copies too, and without a seat
            looking.seat_layers(self)
            looking.remember(self)

    def extra_repr(self) -> str:
        state = self._lighthouse
        return "\n".join(filter(None, (super().extra_repr(), f"{state.settings}, enabled={state.enabled}")))

    # The forward

    @classmethod
    def namespace(cls, plain: Any) -> dict:
        signature = inspect.signature(plain.forward)
        names = positional_names(plain)

        def forward(self, *args, **kwargs):
            return self._call(names, args, kwargs)

        made: Any = forward
        made.__signature__ = with_labels(signature)  # Trainer reads here which columns the model takes
        made.__doc__ = plain.forward.__doc__
        made.is_lighthouse = True
        own: dict[str, Any] = {"forward": forward}
        if hasattr(plain, "generate"):

            def generate(self, *args, **kwargs):
                looking.look_again(self)  # once for all its tokens
                with _Generating(self._lighthouse):
                    return plain.generate(self, *args, **kwargs)

            made = generate
            made.__doc__ = plain.generate.__doc__
            made.__signature__ = inspect.signature(plain.generate)
            own["generate"] = generate
        return own

    def _call(self, names: list[str], args: tuple, kwargs: dict):
        call, is_batch = batches.named(args, kwargs, names)
        if is_batch and call.get("labels") is None and call.get("shift_labels") is None:
            call["labels"] = batches.labels_of(call)
        state = self._lighthouse
        if torch.compiler.is_compiling():
            looking.look_while_tracing(state.name)
        elif not state.is_generating():
            looking.look_again(self)
        alone = not is_batch and len(args) == 1 and not kwargs
        if alone and self.training and torch.is_grad_enabled() and state.settings.loss == "chunked":
            say_once(
                state.name,
                'model(ids) is called like the plain model and gives no loss: model({"input_ids": ids}) gives it, and '
                "holds no logits",
            )
        wants_loss = call.get("labels") is not None or call.get("shift_labels") is not None
        chunked = wants_loss and self._loss_is_ours(call)
        if not state.is_generating():
            batches.check(self, call, chunked)
        if is_batch and not chunked and call.get("labels") is None:
            call["labels"] = call["shift_labels"]  # without labels the model's own forward makes no loss of them
        # By default Transformers fills a cache in training too.
        no_cache = call.get("use_cache") is None and (self.training or chunked) and not checks.has_cache(call)
        acts = self._acts({**call, "use_cache": False} if no_cache else call, names)
        if no_cache and (acts or call.get("position_ids") is None):
            call["use_cache"] = False  # dense with position_ids: they mean something else to it without a cache
        if acts and call.get("attention_mask") is not None:
            call["attention_mask"] = None  # it hides nothing: _acts has checked
        # In eval() it counts only if Lighthouse acts: an evaluation without no_grad trains nothing.
        if torch.is_grad_enabled() and (self.training or acts):
            state.note_training(acts)
        outer = state.enter(acts)
        try:
            return self._with_loss(call) if chunked else super().forward(**call)
        finally:
            state.leave(outer)

    def _acts(self, call: dict, names: Sequence[str]) -> bool:
        """Whether Lighthouse acts in this forward; where it does, everything it cannot honour has been refused.

        `names` are those that the plain forward takes.
        """
        state = self._lighthouse
        settings = state.settings
        if not state.enabled or state.is_generating():
            return False
        if self.training:  # where the plain model runs too: another call may come before the backward
            checks.check_checkpointing(architecture_of(self).body(self))
        elif settings.eval == "dense":
            if not trainers.evaluates():
                say_once(state.name, 'in eval() attention is dense; eval="lighthouse" would keep Lighthouse')
            return False
        use_cache = call.get("use_cache")
        if use_cache is None:
            use_cache = self.config.use_cache
        if use_cache or checks.has_cache(call):
            say_once(state.name, "with a key-value cache attention is dense")
            return False
        name = "input_ids" if call.get("input_ids") is not None else "inputs_embeds"
        tokens = call.get(name)
        if tokens is None:
            return False  # the plain model says what is missing
        device = tokens.device.type
        if not settings.pays(tokens.shape[1], device):
            if torch.compiler.is_compiling():
                looking.say_why_dense_while_tracing(state.name, device)
            else:
                looking.say_why_dense(self, tokens.shape[1], device)
            return False
        check_device(name, tokens.device)
        checks.check_call(call, tokens.shape[0], tokens.shape[1], self.config, names)
        if not self.training:
            say_once(
                state.name,
                'Lighthouse acts in eval() because of eval="lighthouse": losses are not comparable with dense ones',
            )
        return True

    def _loss_is_ours(self, call: dict) -> bool:
        """Whether the loss without logits is used: not if the model's own, or some of the logits, are asked for."""
        state = self._lighthouse
        if not architecture_of(self).has_head(self):
            if call.get("ignore_index") is not None:
                raise ValueError("ignore_index is given: for a bare model mark ignored labels with -100")
            return True
        kept = call.get("logits_to_keep")
        if state.settings.loss != "chunked" or not (kept is None or (isinstance(kept, int) and kept == 0)):
            return False
        if call.get("ignore_index") is not None:
            return False
        # Evaluations that ask for hidden states would find them in place of the logits.
        if not self.training and call.get("output_hidden_states", self.config.output_hidden_states):
            return False
        # Only such an evaluation holds the logits; the loss is then the model's own too, as everything in it is.
        if not self.training and trainers.wants_predictions():
            return False
        if state.own_loss is not None:
            say_once(
                state.name,
                f'{state.own_loss}: the model\'s own loss is used, which holds all logits; set loss="model" to silence '
                "this",
            )
            return False
        return True

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
        layer = architecture.output_layer(self)
        loss = next_token_loss(
            layer,
            outputs.last_hidden_state,
            labels,
            num_items_in_batch=items,
            shift_labels=shift_labels,
            # Those of a bare model's embedding are made for its rows.
            past_hooks=not architecture.has_head(self) and originals.may_pass_hooks(layer),
        )
        cache = {} if call.get("use_cache") is False else {_CACHE: outputs[_CACHE]}
        result = CausalLMOutputWithPast(
            loss=loss, logits=None, hidden_states=outputs.hidden_states, attentions=outputs.attentions, **cache
        )
        if return_dict is None:
            return_dict = self.config.return_dict
        return result if return_dict else result.to_tuple()


class _Generating:
    """While text is generated the plain attention runs, in train() too."""

    def __init__(self, state: State):
        self.state = state

    def __enter__(self) -> None:
        state = self.state
        if state.enabled:
            say_once(state.name, "generate runs with dense attention")
        self.before = state.config._attn_implementation, state.start_generating()

    def __exit__(self, *_) -> None:
        name, outer = self.before
        self.state.stop_generating(outer)
        self.state.name_attention(acts=name == NAME)
