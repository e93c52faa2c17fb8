"""`LighthouseCallback`: the switch from Lighthouse to dense attention, for any script with Transformers' `Trainer`.

    model = LighthouseWrapper(model, pool_ratios=[1/4, 1/16])
    Trainer(model=model, ..., callbacks=[LighthouseCallback(switch_share=0.6)]).train()
    model = model.unwrap()

What it knows is kept in each checkpoint's `trainer_state.json`, so that a resumed run switches where it was to.
"""

from __future__ import annotations

import json
import logging
from dataclasses import asdict
from pathlib import Path

from transformers.trainer_callback import ExportableState

from lighthouse.huggingface.processes import strangers
from lighthouse.huggingface.steps import Steps, forget_forwards, not_as_wished, not_ready, tokens_counted, used_in
from lighthouse.huggingface.switch import Switch, SwitchToDense, wrapped_in
from lighthouse.huggingface.trainer_state import STATE, best_checkpoint, step_of

logger = logging.getLogger("lighthouse")

# What `export` reports of a checkpoint; the others are not numbers, or say how the model was trained and not what with.
SAVED_SETTINGS = ("dense_layers", "eval")


class LighthouseCallback(SwitchToDense, ExportableState):
    """`SwitchToDense` at a share of the steps, a step or a number of tokens, which also reports what the steps did.

    Args, one of which is given:
        switch_share: share of the optimizer steps that use Lighthouse, 0 to 1.
        switch_step: number of optimizer steps that use Lighthouse.
        switch_tokens: Lighthouse until this many tokens were trained on, in whole steps. Needs
            `TrainingArguments(include_num_input_tokens_seen="all")`, by which the Trainer counts them on all devices.

    A resumed run switches where the first one would have; a share, step or number that differs from the checkpoint's
    counts as a new wish. `step` is the switch's, None as long as it depends on tokens to come.

    `steps` counts the steps in which Lighthouse acted and those that were dense, as with too short sequences; each
    checkpoint keeps it and `lighthouse export` reports it. None in a run that was resumed from a checkpoint without
    these numbers. The end of training logs why the model is not ready for use, if it is not.

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
        self.switch = Switch(switch_share, switch_step, switch_tokens)
        super().__init__(None)
        self.tokens: int | None = None  # trained on at the switch, where the Trainer counts them
        self.settings: dict = {}
        self.steps: Steps | None = Steps()
        self.on_steps = 0  # in which Lighthouse was on, by a former share or step too
        self.counted: str | None = None  # which tokens the Trainer has counted from the first step on
        self.told_until = 0  # the step up to which all of this is known
        self.loaded: dict | None = None  # what the best checkpoint records, if the Trainer has loaded it

    def state(self) -> dict:
        steps = None if self.steps is None else asdict(self.steps)
        names = ("step", "tokens", "settings", "on_steps", "counted", "told_until", "loaded")
        return {
            "args": self.given,
            "attributes": {name: getattr(self, name) for name in names} | {"steps": steps},
        }

    def on_train_begin(self, args, state, control, model=None, **kwargs):
        why_not = strangers(args.world_size)
        if why_not is not None:
            logger.warning("Lighthouse: %s", why_not)
        model = wrapped_in(model)
        forget_forwards(model)
        settings = model.lighthouse_settings
        self.settings = settings.method.values() | {name: getattr(settings, name) for name in SAVED_SETTINGS}
        saved = state.stateful_callbacks.get(type(self).__name__)
        self.step = self.tokens = self.loaded = None
        self.on_steps, self.told_until = 0, state.global_step
        self.steps = Steps() if state.global_step == 0 else None
        attributes = saved["attributes"] if state.global_step > 0 and isinstance(saved, dict) else {}
        self.counted = args.include_num_input_tokens_seen if args.include_num_input_tokens_seen != "no" else None
        if state.global_step > 0:
            before = state.num_input_tokens_seen > 0 and tokens_counted(attributes, state.log_history)
            self.counted = self.counted if before in (True, self.counted) else None
        if attributes:
            if attributes.get("steps") is not None:
                self.steps = Steps(**attributes["steps"])
                model._lighthouse.trained_before(self.steps, state.global_step, args.gradient_accumulation_steps)
            former = state.global_step if attributes["step"] is None else attributes["step"]
            self.on_steps = attributes.get("on_steps", min(former, state.global_step))
            self._say_what_changed(attributes["settings"], state)
            if saved["args"] == self.given:
                self.step, self.tokens = attributes["step"], attributes["tokens"]
        if self.step is not None:
            return
        self.step = self.switch.steps(state.max_steps)
        if self.step is None:
            self._check_tokens_are_counted(args, state)
            self._switch_by_tokens(state)

    def on_step_end(self, args, state, control, model=None, **kwargs):
        used = used_in(wrapped_in(model), state.global_step)
        if self.steps is not None:
            self.steps.note(used, state.global_step)
        self.on_steps += self.step is None or state.global_step <= self.step
        self.told_until = state.global_step
        if self.step is None:
            self._switch_by_tokens(state)
        if state.global_step == self.step:
            self.tokens = state.num_input_tokens_seen or None
        return super().on_step_end(args, state, control)

    def on_train_end(self, args, state, control, model=None, **kwargs):
        if state.global_step == 0:
            return
        last = state.global_step if self.step is None else min(self.step, state.global_step)
        lighthouse, said = None, []
        if self.steps is not None:
            last, lighthouse, said = self.steps.last, self.steps.lighthouse, not_as_wished(self.on_steps, self.steps)
        best = best_checkpoint(state, args)
        step = state.global_step if best is None else step_of(best)
        if best is not None and step < state.global_step:
            self.loaded, inside = _told_by(best), wrapped_in(model)._lighthouse  # for `unwrap` and `export`
            its = self.loaded["stateful_callbacks"].get(type(self).__name__, {}).get("attributes", {})
            if its.get("steps") is not None:
                inside.trained_before(Steps(**its["steps"]), step, args.gradient_accumulation_steps)
            if step <= last:
                inside.ready = False
                said.append(
                    f"The model now has the best checkpoint's weights, of step {step:,}, from before the dense stage."
                )
        said += not_ready(step, last, lighthouse)
        # The Trainer does so in checkpoints alone; `save_state` writes it too.
        state.stateful_callbacks[type(self).__name__] = self.state()
        if state.is_world_process_zero:
            for sentence in said:
                logger.warning("Lighthouse: %s", sentence)

    def _say_what_changed(self, earlier: dict, state) -> None:
        """A resumed run may have a model with other settings."""
        changed = [
            f"{name} was {earlier[name]!r}, is {value!r}"
            for name, value in self.settings.items()
            if name in earlier and earlier[name] != value
        ]
        if changed and state.is_world_process_zero:
            logger.warning("Lighthouse: since step %s of this run %s", f"{state.global_step:,}", "; ".join(changed))

    def _switch_by_tokens(self, state) -> None:
        if state.num_input_tokens_seen >= self.switch.tokens:
            self.step = state.global_step

    def _check_tokens_are_counted(self, args, state) -> None:
        wish = f"switch_tokens={self.given['switch_tokens']}"
        if args.include_num_input_tokens_seen == "no":
            raise ValueError(
                f'{wish}: the Trainer does not count tokens; set TrainingArguments(include_num_input_tokens_seen="all")'
            )
        if state.global_step > 0 and self.counted is None:
            raise ValueError(
                f"{wish}: the {state.global_step} steps of the checkpoint were made without counting their tokens "
                f"as {args.include_num_input_tokens_seen!r} does; use switch_step"
            )


def _told_by(checkpoint: Path) -> dict:
    """The part of a checkpoint's state that records how its weights were trained."""
    told = {"global_step": step_of(checkpoint), "num_input_tokens_seen": 0, "stateful_callbacks": {}}
    if not (checkpoint / STATE).is_file():
        return told
    state = json.loads((checkpoint / STATE).read_text(encoding="utf-8"))
    ours = {LighthouseCallback.__name__: state["stateful_callbacks"].get(LighthouseCallback.__name__, {})}
    return {name: state[name] for name in told} | {"stateful_callbacks": ours}
