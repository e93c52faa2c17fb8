"""What a run adds to the Trainer: the clock, the stop by a signal, and a readable line per log.

All of it counts by `state.global_step`, which a checkpoint brings back: a resumed run does what an undisturbed one
does.
"""

from __future__ import annotations

import math
import os
import signal
import sys
import threading
from collections.abc import Sequence
from dataclasses import asdict
from datetime import timedelta
from time import monotonic, perf_counter
from typing import Any

import torch
import torch.distributed as dist
from transformers import ProgressCallback, TrainerCallback
from transformers.trainer_callback import ExportableState

from lighthouse.huggingface.steps import Steps, forget_forwards, used_in
from lighthouse.training.result import DENSE, LIGHTHOUSE, NotFinite, Stopped


class Record(TrainerCallback, ExportableState):
    """Training seconds, steps and peak memory of each stage, and the dense held-out loss against time and steps.

    A step counts for the stage that its forwards were in, whatever was planned. The clock runs while steps are made,
    fetching their data included, and stands still during evaluation and saving, whose memory does not count either, and
    while something is compiled.
    Checkpoints carry the record: a resumed run's clock continues from the checkpoint's, and the time between the
    checkpoint and the interruption is in no number. They carry the `facts` of their run too, as `run.json` has them, so
    that a checkpoint describes itself wherever it is.
    """

    def __init__(self, switch_step: int = 0, facts: dict | None = None):
        self.switch_step = switch_step
        self.facts = facts or {}
        self.stages: dict[str, dict] = {}  # name: {"steps": ..., "seconds": ..., "peak_memory": bytes or None}
        self.held_out: list[dict] = []  # {"step": ..., "seconds": ..., "stage": ..., "loss": ...}
        self.steps_used = Steps()
        self._mark = 0.0  # seconds on the clock
        self._peaks = False  # whether the peak is that since the mark
        self._timed = (0, 0.0)  # steps and seconds at the last log
        self._logged = (0, 0)  # steps, and those with Lighthouse, at the last log

    @property
    def seconds(self) -> float:
        """Training seconds until now, in all stages."""
        return sum(stage["seconds"] for stage in self.stages.values())

    def stage_of(self, step: int) -> str:
        """The stage that the `step`-th step, counted from 1, was planned for."""
        return LIGHTHOUSE if step <= self.switch_step else DENSE

    def steps_per_second(self, steps: int) -> float | None:
        """Since the last call; None where no time has passed since."""
        before, since = self._timed
        self._timed = steps, self.seconds
        return (steps - before) / (self.seconds - since) if self.seconds > since and steps > before else None

    def lighthouse_share(self, steps: int) -> float:
        """The part of the steps since the last call that Lighthouse acted in."""
        before, used = self._logged
        self._logged = steps, self.steps_used.lighthouse
        return (self.steps_used.lighthouse - used) / max(1, steps - before)

    def state(self) -> dict:
        return {
            "args": {"switch_step": self.switch_step, "facts": self.facts},
            "attributes": {
                "stages": self.stages,
                "held_out": self.held_out,
                "steps_used": asdict(self.steps_used),
                "logged": self._logged,
            },
        }

    def on_train_begin(self, args, state, control, model=None, **kwargs):
        saved = state.stateful_callbacks.get(type(self).__name__)
        if saved is not None and state.global_step > 0:
            attributes = saved["attributes"]
            self.stages, self.held_out = attributes["stages"], attributes["held_out"]
            self.steps_used = steps_in_record(attributes)
            self._logged = tuple(attributes.get("logged", (state.global_step, self.steps_used.lighthouse)))
        self._timed = state.global_step, self.seconds
        if model is not None:
            forget_forwards(model)
        self._set_mark()

    def on_step_end(self, args, state, control, model=None, **kwargs):
        if args.device.type == "cuda" and (control.should_log or control.should_evaluate or control.should_save):
            torch.cuda.synchronize(args.device)  # steps still in flight would be in no stage's seconds
        now = clock()
        used = used_in(model, state.global_step)
        self.steps_used.note(used, state.global_step)
        stage = self.stages.setdefault(LIGHTHOUSE if used.lighthouse else DENSE, {"steps": 0, "seconds": 0.0})
        stage["steps"] += 1
        stage["seconds"] += now - self._mark
        if self._peaks:
            stage["peak_memory"] = max(stage.get("peak_memory") or 0, peak_memory())
        self._mark = now

    def _set_mark(self) -> None:
        self._peaks = reset_peak_memory()
        self._mark = clock()

    def on_evaluate(self, args, state, control, metrics=None, **kwargs):
        if not math.isfinite(metrics["eval_loss"]):
            raise NotFinite(f"step {state.global_step}: the held-out loss is {metrics['eval_loss']}")
        last = self.steps_used.last
        point = {
            "step": state.global_step,
            "seconds": self.seconds,
            "stage": (LIGHTHOUSE if state.global_step == last else DENSE) if state.global_step else self.stage_of(1),
            "loss": metrics["eval_loss"],
        }
        if not self.held_out or self.held_out[-1]["step"] != state.global_step:
            self.held_out.append(point)
        self._set_mark()

    def on_save(self, args, state, control, **kwargs):
        self._set_mark()


def steps_in_record(attributes: dict) -> Steps:
    """The `Steps` of a `Record` in a checkpoint. Earlier versions saved only the stages, Lighthouse's first."""
    if "steps_used" in attributes:
        return Steps(**attributes["steps_used"])
    first, rest = (attributes.get("stages", {}).get(name, {}).get("steps", 0) for name in (LIGHTHOUSE, DENSE))
    return Steps(lighthouse=first, dense=rest, last=first)


class StopOnSignal(TrainerCallback):
    """On Ctrl-C, SIGTERM, or SIGUSR1 as a batch system sends it before its limit: finish the step, save, exit.

    As a context manager it holds the signals' handlers. All processes stop after the same step, whichever of them
    got the signal. A second Ctrl-C or SIGTERM ends the process at once; within `SAME` seconds it counts as the first,
    since launchers hand on to their processes what the whole group was sent.

    Transformers' own `enable_jit_checkpoint` is not enough: it saves in the middle of a step, by each process's own
    flag (the others then wait for it forever), three seconds late, takes no second signal and no Ctrl-C, and the run
    ends as if it were complete.
    """

    SYSTEMS = (signal.SIGTERM, signal.SIGUSR1)
    SIGNALS = (signal.SIGINT, *SYSTEMS)
    SAME = 2.0

    def __init__(self, signals: Sequence[int] = SIGNALS):
        self.signals = signals
        self.received: int | None = None  # by this process
        self.agreed = False  # by all of them
        self._first: dict[int, float] = {}  # when a signal that may come twice came
        self._before: dict[int, Any] = {}
        self._process = os.getpid()
        self._group: Any = None

    def __enter__(self) -> StopOnSignal:
        if threading.current_thread() is threading.main_thread():  # Python allows it nowhere else
            self._before = {
                number: signal.signal(number, self._handle)
                for number in self.signals
                if not (number == signal.SIGINT and signal.getsignal(number) == signal.SIG_IGN)  # in the background
            }
        else:
            print("SIGTERM will end this run without a checkpoint: it is not in the main thread.", file=sys.stderr)
        return self

    def __exit__(self, *error):
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _handle(self, number, frame):
        if number != signal.SIGUSR1:
            now = monotonic()
            if now - self._first.setdefault(number, now) > self.SAME:
                signal.signal(number, signal.default_int_handler if number == signal.SIGINT else signal.SIG_DFL)
                os.kill(os.getpid(), number)
        # Workers that load data inherit this handler, and with it outlive a signal to the whole process group.
        if self.received is None and os.getpid() == self._process:
            what = "Ctrl-C" if number == signal.SIGINT else signal.Signals(number).name
            again = "; a second Ctrl-C ends it at once" if number == signal.SIGINT else ""
            said = f"\n{what}: the run will save a checkpoint after this step and exit{again}.\n"
            os.write(2, said.encode())  # print may be running
        self.received = self.received or number

    def end(self, when: str) -> BaseException:
        """What to raise after the signal; `when` says after what."""
        if self.received == signal.SIGINT:
            return KeyboardInterrupt(f"Interrupted {when}.")
        return Stopped(f"Stopped by a signal {when}.")

    def on_train_begin(self, args, state, control, **kwargs):
        if args.world_size > 1:
            # On the CPU, so that asking at each step does not wait for the device.
            self._group = dist.new_group(backend="gloo", timeout=timedelta(seconds=args.ddp_timeout))

    def on_step_end(self, args, state, control, **kwargs):
        number = torch.tensor(self.received or 0)
        if self._group is not None:
            dist.all_reduce(number, dist.ReduceOp.MAX, group=self._group)
        self.received = int(number) or None
        if self.received is not None and state.global_step < state.max_steps:
            self.agreed = True
            control.should_save = True
        return control


def clock() -> float:
    """Seconds, without those that torch.compile took."""
    dynamo = sys.modules.get("torch._dynamo.utils")  # not imported: nothing was compiled
    return perf_counter() - (dynamo.calculate_time_spent()["total_wall_time"] if dynamo else 0.0)


class FirstNotFinite:
    """The first step whose loss or gradient norm was not finite, noted on the device without waiting for it."""

    WHAT = ("loss", "gradient norm")
    NEVER = torch.iinfo(torch.int64).max

    def __init__(self, device):
        self.steps = torch.full((len(self.WHAT),), self.NEVER, dtype=torch.int64, device=device)

    def note(self, what: str, value: torch.Tensor | float, step: int) -> None:
        """`value` belongs to the `step`-th step, counted from 1."""
        value = torch.as_tensor(value, device=self.steps.device)
        first = self.steps[self.WHAT.index(what)]
        first.copy_(torch.minimum(first, torch.where(torch.isfinite(value), self.NEVER, step)))

    def found(self, gather=lambda steps: steps) -> tuple[int, str] | None:
        """The step and what was not finite in it, by all processes; waits for the device."""
        steps = gather(self.steps[None]).amin(0).tolist()
        step = min(steps)
        return None if step == self.NEVER else (step, self.WHAT[steps.index(step)])


def reset_peak_memory() -> bool:
    """From here on `peak_memory` is the peak; False where the system does not allow it."""
    if torch.cuda.is_initialized():
        torch.cuda.reset_peak_memory_stats()
        return True
    try:
        with open("/proc/self/clear_refs", "w") as file:
            file.write("5")  # the kernel's mark of the most that was resident
    except OSError:
        return False
    return True


def peak_memory() -> int:
    """Bytes: on CUDA the most that PyTorch had allocated, else the most that was resident of the whole process."""
    if torch.cuda.is_initialized():
        return torch.cuda.max_memory_allocated()
    with open("/proc/self/status") as file:
        return next(int(line.split()[1]) * 1024 for line in file if line.startswith("VmHWM:"))


def memory() -> dict[str, float]:
    """GiB, under a name that says of what: on CUDA the most allocated since the last evaluation, else resident now."""
    if torch.cuda.is_initialized():
        return {"peak_memory_gib": torch.cuda.max_memory_allocated() / 2**30}
    with open("/proc/self/statm") as file:
        return {"resident_memory_gib": int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 2**30}


class PlainLines(TrainerCallback):
    """A line a person can read where the Trainer prints its log as a dictionary."""

    def write(self, line: str) -> None:
        print(line, flush=True)

    def on_log(self, args, state, control, logs=None, **kwargs):
        if not state.is_world_process_zero:
            return
        step = f"step {state.global_step:>{len(str(state.max_steps))}}/{state.max_steps}"
        if "eval_loss" in logs:
            self.write(f"{step}  dense held-out loss {logs['eval_loss']:.4f}")
        elif "loss" in logs:
            share = logs.get("lighthouse", 0)  # of the steps that the line covers
            stage = {0: "dense", 1: "Lighthouse"}.get(share, "both")
            line = f"{step}  {stage:10}  loss {float(logs['loss']):.4f}  rate {float(logs['learning_rate']):.2e}"
            if "tokens_per_second" in logs:
                line += f"  {logs['tokens_per_second']:,.0f} tokens/s"
            for name in ("peak_memory_gib", "resident_memory_gib"):
                if name in logs:
                    line += f"  {name.split('_')[0]} {logs[name]:.2f} GiB"
            if share == 1:
                line += f"  kept {logs['kept_share']:.1%}  S {logs['sub_length']:,}"
            elif share:
                line += f"  Lighthouse in {share:.0%} of these steps"
            self.write(line)


class Lines(PlainLines, ProgressCallback):
    """The same above the Trainer's progress bar."""

    def write(self, line: str) -> None:
        if self.training_bar is None:  # before the first step and after the last
            super().write(line)
        else:
            self.training_bar.write(line)
