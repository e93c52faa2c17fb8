"""What a run adds to the Trainer: the switch to dense, the clock, and a readable line per log.

All of it counts by `state.global_step`, which a checkpoint brings back: a resumed run does what an undisturbed one
does.
"""

from __future__ import annotations

from time import perf_counter

from transformers import ProgressCallback, TrainerCallback
from transformers.trainer_callback import ExportableState

LIGHTHOUSE = "lighthouse"
DENSE = "dense"


class SwitchToDense(TrainerCallback):
    """Lighthouse on in the steps before `switch_step`, off from it on. Optimizer and schedule are untouched.

    `switch_step` is a number of optimizer steps and not a share: a share would move with `max_steps`. An evaluation is
    asked for right before the switch.
    """

    def __init__(self, switch_step: int):
        self.switch_step = switch_step

    def on_step_begin(self, args, state, control, model=None, **kwargs):
        wanted = state.global_step < self.switch_step
        if model.lighthouse_enabled != wanted:
            model.lighthouse(wanted)

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == self.switch_step and args.eval_strategy != "no":
            control.should_evaluate = True
        return control


class Record(TrainerCallback, ExportableState):
    """Training seconds, steps of each stage, and the dense held-out loss against both.

    The clock runs while steps are made, fetching their data included, and stands still during evaluation and saving.
    Checkpoints carry the record.
    """

    def __init__(self, switch_step: int = 0):
        self.switch_step = switch_step
        self.stages = {}  # name: {"steps": ..., "seconds": ...}
        self.held_out = []  # {"step": ..., "seconds": ..., "stage": ..., "loss": ...}
        self._mark = None
        self._logged = (0, 0.0)  # steps and seconds at the last log

    @property
    def seconds(self) -> float:
        """Training seconds until now, in all stages."""
        return sum(stage["seconds"] for stage in self.stages.values())

    def stage_of(self, step: int) -> str:
        """The stage of the `step`-th step, counted from 1."""
        return LIGHTHOUSE if step <= self.switch_step else DENSE

    def steps_per_second(self, steps: int) -> float | None:
        """Since the last call; None where no time has passed since."""
        before, since = self._logged
        self._logged = steps, self.seconds
        return (steps - before) / (self.seconds - since) if self.seconds > since and steps > before else None

    def state(self) -> dict:
        return {
            "args": {"switch_step": self.switch_step},
            "attributes": {"stages": self.stages, "held_out": self.held_out},
        }

    def on_train_begin(self, args, state, control, **kwargs):
        saved = state.stateful_callbacks.get(type(self).__name__)
        if saved is not None and state.global_step > 0:
            self.stages, self.held_out = saved["attributes"]["stages"], saved["attributes"]["held_out"]
        self._logged = state.global_step, self.seconds
        self._mark = perf_counter()

    def on_step_end(self, args, state, control, **kwargs):
        now = perf_counter()
        stage = self.stages.setdefault(self.stage_of(state.global_step), {"steps": 0, "seconds": 0.0})
        stage["steps"] += 1
        stage["seconds"] += now - self._mark
        self._mark = now

    def on_evaluate(self, args, state, control, metrics=None, **kwargs):
        point = {
            "step": state.global_step,
            "seconds": self.seconds,
            "stage": self.stage_of(max(1, state.global_step)),
            "loss": metrics["eval_loss"],
        }
        if not self.held_out or self.held_out[-1]["step"] != state.global_step:
            self.held_out.append(point)
        self._mark = perf_counter()

    def on_save(self, args, state, control, **kwargs):
        self._mark = perf_counter()


class Lines(ProgressCallback):
    """The Trainer's progress bar, with a line a person can read where it prints the log as a dictionary."""

    def on_log(self, args, state, control, logs=None, **kwargs):
        if not state.is_world_process_zero or self.training_bar is None:
            return
        step = f"step {state.global_step:>{len(str(state.max_steps))}}/{state.max_steps}"
        if "eval_loss" in logs:
            self.training_bar.write(f"{step}  dense held-out loss {logs['eval_loss']:.4f}")
        elif "loss" in logs:
            stage = "Lighthouse" if logs.get("lighthouse") else "dense"
            line = f"{step}  {stage:10}  loss {float(logs['loss']):.4f}  rate {float(logs['learning_rate']):.2e}"
            if "tokens_per_second" in logs:
                line += f"  {logs['tokens_per_second']:,.0f} tokens/s"
            self.training_bar.write(line)
