"""`LighthouseCallback`: the switch from Lighthouse to dense attention, for any script with Transformers' `Trainer`.

    model = LighthouseWrapper(model, pool_ratios=[1/4, 1/16])
    Trainer(model=model, ..., callbacks=[LighthouseCallback(switch_share=0.6)]).train()
    model = model.unwrap()

The trap is the resumed run: a share of `max_steps` moves when `max_steps` is raised. So the step is worked out once,
kept in each checkpoint's `trainer_state.json`, and compared with `state.global_step`.
"""

from __future__ import annotations

import logging
import math
from dataclasses import asdict, fields

from transformers import TrainerCallback
from transformers.trainer_callback import ExportableState

from lighthouse.huggingface.steps import Steps, forget_forwards, not_as_wished, not_ready, used_in
from lighthouse.huggingface.wrapped import WrappedModel
from lighthouse.processes import strangers

logger = logging.getLogger("lighthouse")

# What `export` tells of a checkpoint; the others are not numbers, or say how the model was trained and not what with.
SAVED_SETTINGS = ("pool_ratios", "select_topk", "dense_layers", "cover_start", "eval")


class LighthouseCallback(TrainerCallback, ExportableState):
    """Lighthouse on in the first steps, off from the switch on. Optimizer and schedule are untouched.

    Where the Trainer evaluates at all, it also does so right before the switch: the last dense loss of that stage.

    Args, one of which is given:
        switch_share: share of the optimizer steps that use Lighthouse, 0 to 1.
        switch_step: number of optimizer steps that use Lighthouse.
        switch_tokens: Lighthouse until so many tokens were trained on, in whole steps. Needs
            `TrainingArguments(include_num_input_tokens_seen="all")`, by which the Trainer counts them on all devices.

    A resumed run switches where the first one would have; another share, step or number than the checkpoint has counts
    as a new wish. `step` is the switch's, None as long as it depends on tokens to come.

    `steps` counts what the steps did, which is kept in each checkpoint too and told by `lighthouse export`: in which
    Lighthouse acted and which were dense, as those are whose sequences are too short. None in a run that was resumed
    from a checkpoint without these numbers. What keeps the model from use is logged at the end.

    Raises `ValueError` at the start of training if the model is not wrapped, or the tokens are not counted.
    """

    def __init__(
        self,
        *,
        switch_share: float | None = None,
        switch_step: int | None = None,
        switch_tokens: int | None = None,
    ):
        self.given = {"switch_share": switch_share, "switch_step": switch_step, "switch_tokens": switch_tokens}
        said = [name for name, value in self.given.items() if value is not None]
        if len(said) != 1:
            raise ValueError(
                f"{' and '.join(said) or 'nothing'} given: exactly one of {', '.join(self.given)} is needed"
            )
        for name in ("switch_step", "switch_tokens"):
            value = self.given[name]
            if value is not None and (isinstance(value, bool) or not isinstance(value, int)):
                raise TypeError(f"{name}={value!r}: a whole number is needed")
            if value is not None and value < 0:
                raise ValueError(f"{name}={value}: a number from 0 on is needed")
        if switch_share is not None:
            if isinstance(switch_share, bool) or not isinstance(switch_share, (int, float)):
                raise TypeError(f"switch_share={switch_share!r}: a number is needed")
            if not (math.isfinite(switch_share) and 0 <= switch_share <= 1):
                raise ValueError(f"switch_share={switch_share}: a share of the steps, 0 to 1, is needed")
        self.step: int | None = None
        self.tokens: int | None = None  # trained on at the switch, where the Trainer counts them
        self.settings: dict = {}
        self.steps: Steps | None = Steps()

    def state(self) -> dict:
        steps = None if self.steps is None else asdict(self.steps)
        return {
            "args": self.given,
            "attributes": {"step": self.step, "tokens": self.tokens, "settings": self.settings, "steps": steps},
        }

    def on_train_begin(self, args, state, control, model=None, **kwargs):
        why_not = strangers(args.world_size)
        if why_not is not None:
            logger.warning("Lighthouse: %s", why_not)
        model = _wrapped_in(model)
        forget_forwards(model)
        settings = model.lighthouse_settings
        known = {f.name for f in fields(settings)}
        self.settings = {name: getattr(settings, name) for name in SAVED_SETTINGS if name in known}
        saved = state.stateful_callbacks.get(type(self).__name__)
        self.step = self.tokens = None
        self.steps = Steps() if state.global_step == 0 else None
        if state.global_step > 0 and isinstance(saved, dict):
            attributes = saved["attributes"]
            if attributes.get("steps") is not None:
                self.steps = Steps(**attributes["steps"])
            self._say_what_changed(attributes["settings"], state)
            if saved["args"] == self.given:
                self.step, self.tokens = attributes["step"], attributes["tokens"]
        if self.step is not None:
            return
        if self.given["switch_step"] is not None:
            self.step = self.given["switch_step"]
        elif self.given["switch_share"] is not None:
            self.step = round(self.given["switch_share"] * state.max_steps)
        else:
            self._check_tokens_are_counted(args, state)
            self._switch_by_tokens(state)

    def on_step_begin(self, args, state, control, model=None, **kwargs):
        model = _wrapped_in(model)
        wanted = self.step is None or state.global_step < self.step
        if model.lighthouse_enabled != wanted:
            model.lighthouse(wanted)

    def on_step_end(self, args, state, control, model=None, **kwargs):
        used = used_in(_wrapped_in(model), state.global_step)
        if self.steps is not None:
            self.steps.note(used, state.global_step)
        if self.step is None:
            self._switch_by_tokens(state)
        if state.global_step == self.step:
            self.tokens = state.num_input_tokens_seen or None
            if args.eval_strategy != "no":
                control.should_evaluate = True
        return control

    def on_train_end(self, args, state, control, model=None, **kwargs):
        if state.global_step == 0:
            return
        wished = state.global_step if self.step is None else min(self.step, state.global_step)
        last, lighthouse, said = wished, None, []
        if self.steps is not None:
            last, lighthouse, said = self.steps.last, self.steps.lighthouse, not_as_wished(wished, self.steps)
        best = best_step(args, state)
        if best is not None and best <= last:
            _wrapped_in(model)._lighthouse.ready = False  # for `unwrap` and `export`
            said.append(f"The model is now the best checkpoint's, of step {best:,}, from before the dense stage.")
        said += not_ready(state.global_step if best is None else best, last, lighthouse)
        if state.is_world_process_zero:
            for sentence in said:
                logger.warning("Lighthouse: %s", sentence)

    def _say_what_changed(self, earlier: dict, state) -> None:
        """A resumed run may be given a model that was wrapped otherwise."""
        plain = {name: list(value) if isinstance(value, tuple) else value for name, value in self.settings.items()}
        changed = [
            f"{name} was {earlier[name]!r}, is {value!r}"
            for name, value in plain.items()
            if name in earlier and earlier[name] != value
        ]
        if changed and state.is_world_process_zero:
            logger.warning("Lighthouse: since step %s of this run %s", f"{state.global_step:,}", "; ".join(changed))

    def _switch_by_tokens(self, state) -> None:
        if state.num_input_tokens_seen >= self.given["switch_tokens"]:
            self.step = state.global_step

    def _check_tokens_are_counted(self, args, state) -> None:
        wish = f"switch_tokens={self.given['switch_tokens']}"
        if args.include_num_input_tokens_seen == "no":
            raise ValueError(
                f"{wish}: the Trainer does not count tokens; "
                'TrainingArguments(include_num_input_tokens_seen="all") makes it do so'
            )
        if state.global_step > 0 and state.num_input_tokens_seen == 0:
            raise ValueError(
                f"{wish}: the {state.global_step} steps of the checkpoint were made without counting their tokens; "
                "give switch_step"
            )


def best_step(args, state) -> int | None:
    """The step whose weights the Trainer has loaded at its end, where it was told to take the best."""
    if not args.load_best_model_at_end or state.best_model_checkpoint is None:
        return None
    return state.best_global_step


def _wrapped_in(model) -> WrappedModel:
    """The wrapped model itself, inside of what DDP, DeepSpeed or the compiler may have put around it."""
    inside = model
    while inside is not None and not isinstance(inside, WrappedModel):
        inside = getattr(inside, "_orig_mod", getattr(inside, "module", None))
    if inside is None:
        raise ValueError(
            f"the Trainer's {type(model).__name__} is not wrapped: model = LighthouseWrapper(model, ...) before the "
            "Trainer is made"
        )
    return inside
