"""The switch from Lighthouse to dense attention: when it happens, and what is done then.

The trap is the resumed run: a share of the steps moves when there are more of them. So the step is worked out once and
kept, and compared with `state.global_step`.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from torch import nn
from transformers import TrainerCallback

from lighthouse.core.settings import check_whole_number
from lighthouse.huggingface.wrapped import WrappedModel


@dataclass(frozen=True)
class Switch:
    """Lighthouse in the first steps: a share of them, a number, or until so many tokens were trained on, in whole ones.

    With none of the three Lighthouse is used to the end. `share_name` is the option's name, for messages.

    Raises ValueError or TypeError naming the option, the rule and the value.
    """

    share: float | None = None
    step: int | None = None
    tokens: int | None = None
    share_name: str = "switch_share"

    def __post_init__(self) -> None:
        for name, value in (("switch_step", self.step), ("switch_tokens", self.tokens)):
            check_whole_number(name, value)
        if self.share is not None:
            if isinstance(self.share, bool) or not isinstance(self.share, (int, float)):
                raise TypeError(f"{self.share_name}={self.share!r}: a number is needed")
            if not (math.isfinite(self.share) and 0 <= self.share <= 1):
                raise ValueError(f"{self.share_name}={self.share}: a share of the steps, 0 to 1, is needed")

    @property
    def is_used(self) -> bool:
        """Whether any step may use Lighthouse."""
        return all(value is None or value > 0 for value in (self.share, self.step, self.tokens))

    def steps(self, max_steps: int, tokens_per_step: int | None = None) -> int | None:
        """How many steps use Lighthouse, of which there may be fewer; None if that depends on their tokens."""
        if self.share is not None:
            return round(self.share * max_steps)
        if self.step is not None:
            return self.step
        if self.tokens is not None:
            return None if tokens_per_step is None else -(-self.tokens // tokens_per_step)
        return max_steps


class SwitchToDense(TrainerCallback):
    """Lighthouse on in the first `step` optimizer steps, off after them. Optimizer and schedule are untouched.

    Where the Trainer evaluates at all, it also does so right before the switch: the last dense loss of that stage. With
    `load_best_model_at_end` a checkpoint is saved there too (with `each_loss_saved`, at every evaluation), or the
    Trainer could count a loss as the best although no checkpoint was saved at it, and load another one. `step` is None
    as long as it is not known.
    """

    switches_to_dense = True  # a wrapped model looks for this

    def __init__(self, step: int | None, *, each_loss_saved: bool = False):
        self.step, self.each_loss_saved = step, each_loss_saved

    def on_step_begin(self, args, state, control, model=None, **kwargs):
        model = wrapped_in(model)
        wanted = self.step is None or state.global_step < self.step
        if model.lighthouse_enabled != wanted:
            model.lighthouse(wanted)

    def on_step_end(self, args, state, control, model=None, **kwargs):
        at_the_switch = state.global_step == self.step and args.eval_strategy != "no"
        control.should_evaluate |= at_the_switch
        if args.load_best_model_at_end and (at_the_switch or (self.each_loss_saved and control.should_evaluate)):
            control.should_save = True
        return control


def wrapped_in(model) -> WrappedModel:
    """The wrapped model itself, inside of what DDP, DeepSpeed, PEFT or the compiler may have put around it."""
    if isinstance(model, WrappedModel):
        return model
    modules = model.modules() if isinstance(model, nn.Module) else ()
    inside = [module for module in modules if isinstance(module, WrappedModel)]
    if not inside:
        raise ValueError(
            f"the Trainer's {type(model).__name__} is not wrapped: call LighthouseWrapper(model, ...) before making "
            "the Trainer"
        )
    if len(inside) > 1:
        raise ValueError(
            f"the Trainer's {type(model).__name__} has {len(inside)} wrapped models in it, and the switch is for one: "
            "switch them by model.lighthouse(False) in a callback of your own"
        )
    return inside[0]
