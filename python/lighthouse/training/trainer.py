"""Transformers' Trainer as a run needs it: whole and finite checkpoints, a stop after a step, more in the logs."""

from __future__ import annotations

import copy
from collections.abc import Sized
from pathlib import Path
from typing import cast

import torch
from accelerate.utils import gather_object
from torch import nn
from torch.optim.lr_scheduler import LambdaLR
from torch.utils.data import IterableDataset, RandomSampler, SequentialSampler
from transformers import PrinterCallback, ProgressCallback, Trainer, TrainerCallback
from transformers.trainer_callback import ExportableState

from lighthouse.core.files import remove
from lighthouse.text import data
from lighthouse.training import checkpoints
from lighthouse.training.callbacks import FirstNotFinite, Lines, PlainLines, Record, StopOnSignal, memory
from lighthouse.training.options import PretrainOptions, TrainingOptions
from lighthouse.training.result import NotFinite
from lighthouse.training.space import checkpoint_bytes, space_for


class RunTrainer(Trainer):
    """Transformers' Trainer whose checkpoints are whole and finite, that stops after a step, and logs more."""

    def __init__(
        self,
        *,
        options: PretrainOptions,
        corpus: data.Corpus,
        tokens_per_step: int,
        folder: Path,
        record: Record,
        stop: StopOnSignal,
        args: TrainingOptions,
        **kwargs,
    ):
        self.options, self.corpus, self.folder = options, corpus, folder
        self.tokens_per_step, self.rows_per_step = tokens_per_step, tokens_per_step // options.context
        self.rows_of_a_pass = self._rows_of_a_pass(kwargs["train_dataset"])
        args.per_device_eval_batch_size = rows_to_evaluate(len(kwargs["eval_dataset"]), args)
        super().__init__(args=args, **kwargs)
        self.record = record
        self.stop = stop
        self.plan = options.method.plan(options.context)
        self.not_finite = FirstNotFinite(args.device)
        self.places: list[tuple[int, torch.Tensor]] = []  # (step, places of a batch) since the last check
        self.open_loss = _OpenLoss(self)
        self.add_callback(self.open_loss)
        self.remove_callback(PrinterCallback if args.disable_tqdm else ProgressCallback)
        self.add_callback(PlainLines() if args.disable_tqdm else Lines())

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        if "loss" in logs:
            step = self.state.global_step
            share = self.record.lighthouse_share(step)  # means over the steps, as the loss is
            logs["lighthouse"] = int(share) if share in (0, 1) else share
            logs["kept_share"] = share * self.plan.kept_share + (1 - share)
            length = share * self.plan.length + (1 - share) * self.plan.tokens
            logs["sub_length"] = int(length) if share in (0, 1) else length
            steps_per_second = self.record.steps_per_second(step)
            if steps_per_second is not None:
                logs["tokens_per_second"] = steps_per_second * self.tokens_per_step
            logs |= memory()
        super().log(logs, start_time)

    def _evaluate(self, trial, ignore_keys_for_eval, skip_scheduler=False):
        """A resumed run does not evaluate at its start, which alone skips the scheduler: the run had begun before."""
        if not skip_scheduler or self.state.global_step == 0:
            return super()._evaluate(trial, ignore_keys_for_eval, skip_scheduler=skip_scheduler)
        if self.is_world_process_zero() and not (self.record.held_out and self.record.held_out[0]["step"] == 0):
            print("eval_on_start: this run began without it; there is no loss before its first step.", flush=True)

    def training_step(self, model, inputs, *args, **kwargs):
        if "place" in inputs:  # where the rows are in the text: for `_rows_of`, not for the model
            self.places.append((self.state.global_step + 1, inputs.pop("place")))
        loss = super().training_step(model, inputs, *args, **kwargs)
        self.not_finite.note("loss", loss, self.state.global_step + 1)
        return loss

    def prediction_step(self, model, inputs, prediction_loss_only, ignore_keys=None):
        """The plain cross entropy, even if training uses another, such as label smoothing. Rows have one length."""
        inputs = self._prepare_inputs(inputs)
        with torch.no_grad(), self.compute_loss_context_manager():
            loss = model(**inputs).loss
        return loss.detach().mean(), None, None  # the mean over the GPUs of one process

    def _rows_of_a_pass(self, rows) -> int | None:
        """How many rows one pass trains on: so many that all steps are whole. None for a stream.

        So each step has the tokens that it counts for. Which rows are left out changes from pass to pass, unless
        they are taken in order: then it is the last ones.
        """
        if isinstance(rows, IterableDataset):
            return None
        of_a_step = self.rows_per_step
        if len(rows) < of_a_step:
            raise ValueError(
                f"a step needs {of_a_step:,} rows (per_device_train_batch_size x gradient_accumulation_steps x "
                f"devices), and the text has only {len(rows):,}: use fewer rows, a shorter context or more text"
            )
        return len(rows) // of_a_step * of_a_step

    def create_accelerator_and_postprocess(self) -> None:
        given = copy.deepcopy(self.args.accelerator_config)
        super().create_accelerator_and_postprocess()  # which writes into it, and the options are kept with the run
        self.args.accelerator_config = given

    def _load_optimizer_and_scheduler(self, checkpoint) -> None:
        """Loads both as saved, then sets the rate by the present schedule, which other steps may have stretched.

        The saved rate is the earlier schedule's: 0 at its end, so the first step would train nothing.
        """
        super()._load_optimizer_and_scheduler(checkpoint)
        schedule = getattr(self.lr_scheduler, "scheduler", self.lr_scheduler)  # within DeepSpeed's
        if checkpoint is None or not isinstance(schedule, LambdaLR):
            return  # a schedule by the loss, say, which depends on no number of steps
        rates = [
            base * rate(schedule.last_epoch) for base, rate in zip(schedule.base_lrs, schedule.lr_lambdas, strict=True)
        ]
        for group, rate in zip(schedule.optimizer.param_groups, rates, strict=True):
            if isinstance(group["lr"], torch.Tensor):
                group["lr"].fill_(rate)
            else:
                group["lr"] = rate
        schedule._last_lr = rates

    def _get_train_sampler(self, train_dataset=None):
        if self.rows_of_a_pass is None:
            return None
        if getattr(self.args, "train_sampling_strategy", "random") == "sequential":
            return SequentialSampler(range(self.rows_of_a_pass))
        return RandomSampler(cast(Sized, self.train_dataset), num_samples=self.rows_of_a_pass)

    def _get_grad_norm(self, *args, **kwargs):
        norm = super()._get_grad_norm(*args, **kwargs)
        if not self.args.fp16:  # fp16's scaler tries too large a scale on purpose and skips such a step
            whole = norm.full_tensor() if hasattr(norm, "full_tensor") else norm  # of a DTensor
            self.not_finite.note("gradient norm", whole, self.state.global_step + 1)
        return norm

    def _maybe_log_save_evaluate(self, *args, **kwargs):
        control = self.control
        if control.should_log or control.should_evaluate or control.should_save:
            self.check_finite(weights=control.should_save)
        super()._maybe_log_save_evaluate(*args, **kwargs)
        if self.stop.agreed:
            # Not by `should_training_stop`: the Trainer would end as if all was done, and with load_best_model_at_end
            # and save_total_limit=1 remove the checkpoint again.
            raise self.stop.end(f"after step {self.state.global_step}")

    def check_finite(self, weights: bool) -> None:
        """Raises `NotFinite` if a step since the start was not, or with `weights` one of these is not."""
        found = self.not_finite.found(self.accelerator.gather)
        if found is not None:
            step, what = found
            raise NotFinite(f"step {step}: the {what} is not finite, on {self._rows_of(step)}")
        self.places.clear()
        if weights:
            finite = torch.ones((), dtype=torch.bool, device=self.args.device)
            for weight in cast(nn.Module, self.model).parameters():
                local = weight.to_local() if hasattr(weight, "to_local") else weight  # of a DTensor
                finite &= torch.isfinite(local.detach()).all()
            if not self.accelerator.gather(finite[None]).all():
                raise NotFinite(f"step {self.state.global_step}: a weight is not finite after this step")

    def _rows_of(self, step: int) -> str:
        """What the text of the `step`-th step was, in all processes."""
        describe = getattr(self.corpus, "describe", str)
        places = [place for of, batch in self.places if of == step for place in batch.tolist()]
        return "; ".join(gather_object([describe(place) for place in places])) or "unknown rows"

    def _save_checkpoint(self, model, trial) -> None:
        args, folder = self.args, self.folder
        checkpoint = folder / f"{checkpoints.PREFIX_CHECKPOINT_DIR}-{self.state.global_step}"
        self.open_loss.take()
        limit, args.save_total_limit = args.save_total_limit, None  # the oldest goes when this one is whole
        try:
            with space_for(checkpoint.name, folder, checkpoint_bytes(self.model, args)):
                try:
                    super()._save_checkpoint(model, trial)
                    self.accelerator.wait_for_everyone()
                    if args.should_save:
                        checkpoints.seal(checkpoint)
                except BaseException:
                    remove(checkpoint)
                    raise
        finally:
            args.save_total_limit = limit
        if args.should_save:
            checkpoints.rotate(folder, limit, self.state.best_model_checkpoint)


def rows_to_evaluate(rows: int, args: TrainingOptions) -> int:
    """Rows per device in each evaluation batch: as many as asked for, or fewer (printed).

    With several processes the last batch would be padded with repeated rows, whose losses would enter the mean.
    """
    wanted, processes = args.per_device_eval_batch_size, args.world_size
    if processes == 1:
        return wanted
    found = next(size for size in range(wanted, 0, -1) if size == 1 or rows % (size * processes) == 0)
    if found != wanted and args.process_index == 0:
        print(
            f"per_device_eval_batch_size is lowered from {wanted} to {found}: with {wanted}, {rows} held-out rows on "
            f"{processes} processes would leave an incomplete batch.",
            flush=True,
        )
    return found


class _OpenLoss(TrainerCallback, ExportableState):
    """The sum of the losses since the last log, kept in the checkpoint.

    Otherwise the next log after resuming would be the mean of fewer steps than an undisturbed run's. With several
    processes it is their mean, rounded once more.
    """

    def __init__(self, trainer: Trainer):
        self.trainer = trainer
        self.sum, self.since = 0.0, 0

    def take(self) -> None:
        self.sum = self.trainer.accelerator.gather(self.trainer._tr_loss).mean().item()
        self.since = self.trainer._globalstep_last_logged

    def state(self) -> dict:
        return {"args": {}, "attributes": {"sum": self.sum, "since": self.since}}

    def on_train_begin(self, args, state, control, **kwargs):
        saved = state.stateful_callbacks.get(type(self).__name__)
        if saved is not None and state.global_step > 0:
            self.trainer._tr_loss += saved["attributes"]["sum"]
            self.trainer._globalstep_last_logged = saved["attributes"]["since"]
