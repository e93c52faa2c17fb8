"""One pre-training run: Lighthouse for a share of the steps, then dense, then the plain model in a folder.

`prepare` checks everything and does no work that lasts; `Run.train` is the Trainer's loop and what comes behind it. A
run may be killed at any moment: the folder always holds the last whole checkpoint (`checkpoints`), and the model and
`results.json` appear as a whole, at the end.
"""

from __future__ import annotations

import json
import logging
import math
import os
import sys
from collections.abc import Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, fields
from pathlib import Path

import torch
from accelerate import PartialState
from accelerate.utils import gather_object
from transformers import (
    PreTrainedTokenizerBase,
    PrinterCallback,
    ProgressCallback,
    Trainer,
    TrainerCallback,
    TrainerState,
    TrainingArguments,
    get_scheduler,
)
from transformers.integrations import get_reporting_integration_callbacks
from transformers.trainer_callback import ExportableState
from transformers.utils.generic import ExplicitEnum

import lighthouse.huggingface  # noqa: F401  the wrapper would import it only when a run has begun
from lighthouse import LighthouseWrapper
from lighthouse.plan import plan
from lighthouse.training import checkpoints, configuration, data
from lighthouse.training.callbacks import (
    FirstNotFinite,
    Lines,
    PlainLines,
    Record,
    StopOnSignal,
    SwitchToDense,
    memory,
)
from lighthouse.training.memory import MemoryEstimate, check_memory, estimate
from lighthouse.training.model import check_head_dim, empty_model, model_notes, model_of, new_config
from lighthouse.training.options import PretrainOptions, TrainingOptions
from lighthouse.training.result import (
    LIGHTHOUSE,
    RESULTS,
    DiskFull,
    HeldOut,
    NotFinite,
    PretrainResult,
    Refused,
    Stage,
    Stopped,
)
from lighthouse.wrapper import LighthouseSettings

logger = logging.getLogger(__name__)

# Options of the Trainer that may be others when a run goes on, since no loss depends on them. All that are not here,
# those of later versions of Transformers too, must be as they were.
FREE_ON_RESUME = frozenset(
    # Where it goes on from and how far. More steps stretch the schedule of the learning rate, which is said.
    "resume resume_from_checkpoint output_dir max_steps num_train_epochs "
    # What is printed, logged, reported and published.
    "logging_strategy logging_steps logging_first_step log_on_each_node logging_nan_inf_filter log_level "
    "log_level_replica disable_tqdm report_to run_name project trackio_space_id trackio_bucket_id "
    "trackio_static_space_id include_num_input_tokens_seen skip_memory_metrics debug do_train do_eval do_predict "
    "push_to_hub hub_token hub_private_repo hub_model_id hub_strategy hub_always_push hub_revision "
    # When the held-out loss is measured, in batches of which size, and when checkpoints are saved.
    "eval_strategy eval_steps eval_delay eval_on_start eval_accumulation_steps eval_do_concat_batches "
    "eval_use_gather_object prediction_loss_only include_for_metrics batch_eval_metrics per_device_eval_batch_size "
    "save_strategy save_steps save_total_limit save_on_each_node load_best_model_at_end metric_for_best_model "
    "greater_is_better "
    # How rows are fetched, not which or in what order.
    "dataloader_num_workers dataloader_pin_memory dataloader_persistent_workers dataloader_prefetch_factor "
    "dataloader_multiprocessing_context "
    # Memory for time, or what is kept as the kind of device and the number of processes below.
    "gradient_checkpointing gradient_checkpointing_kwargs activation_checkpointing activation_checkpointing_kwargs "
    "torch_empty_cache_steps ddp_timeout local_rank use_cpu".split()
)

# Options of the Trainer that would break what this file promises, and why.
REFUSED = {
    "auto_find_batch_size": "the steps' tokens would change within the run",
    "enable_jit_checkpoint": "SIGTERM saves a checkpoint already, and in a way that resumes to the same losses",
    "ignore_data_skip": "a resumed run would begin the text again",
    "restore_callback_states_from_checkpoint": "what a run keeps is restored already",
    "save_only_model": "no run could go on from such checkpoints",
}

SETTINGS = "run.json"
STATE = "trainer_state.json"
MODEL = "model"

# Where accelerate runs copies in place of shards, without a word.
NOT_SHARDED_ON = frozenset({"cpu", "mps"})

WHY_DENSE = (
    "The held-out loss is measured with dense attention, also while Lighthouse is on: which tokens Lighthouse keeps\n"
    "depends on later ones, so losses seen under it, that stage's training loss too, do not compare with dense ones."
)


@dataclass(frozen=True)
class Run:
    """A run whose options, text and folder were found good. `str(run)` tells what it will do; `train()` does it."""

    options: PretrainOptions
    training: TrainingOptions
    tokenizer: PreTrainedTokenizerBase
    corpus: data.Corpus
    switch_step: int
    checkpoint: str | None

    @property
    def folder(self) -> Path:
        return Path(self.training.output_dir)

    @property
    def finished(self) -> bool:
        """Whether the checkpoint to go on from has all the steps, so that only the end is left to do."""
        return self.checkpoint is not None and _steps_in(self.checkpoint) == self.training.max_steps

    @property
    def tokens_per_step(self) -> int:
        """Of one optimizer step, on all devices."""
        return tokens_per_step(self.options, self.training)

    def settings(self) -> dict:
        """All options and what follows from them, as it is kept in the run's folder and compared on resuming."""
        training = self.training.to_dict()
        names = [f.name for f in fields(TrainingArguments) if f.init and f.name != "resume_from_checkpoint"]
        settings = asdict(self.options) | {name: training[name] for name in names}
        settings |= {
            "tokens_per_step": self.tokens_per_step,
            "lighthouse_steps": self.switch_step,
            "text": self.corpus.fingerprint,
            "processes": self.training.world_size,
            "device": self.training.device.type,
        }
        return json.loads(json.dumps(settings, default=str))

    def __str__(self) -> str:
        options, steps = self.options, self.training.max_steps
        lines = [str(self.corpus), *model_notes(options.model, options.context)]
        if self.checkpoint is not None:
            lines.append(f"Going on from {self.checkpoint}.")
            planned = TrainerState.load_from_json(str(Path(self.checkpoint) / STATE)).max_steps
            if planned != steps:
                lines.append(f"max_steps was {planned:,}, is {steps:,}: the learning rate is now that of so many.")
        if self.switch_step == 0:
            return "\n".join([*lines, f"{steps:,} steps of {self.tokens_per_step:,} tokens, all dense."])
        lines.append(
            f"{steps:,} steps of {self.tokens_per_step:,} tokens: {self.switch_step:,} with Lighthouse "
            f"(dense layers at each end: {options.dense_layers}), {steps - self.switch_step:,} dense."
        )
        settings = LighthouseSettings(pool_ratios=options.pool_ratios, select_topk=options.select_topk)
        lines.append(str(plan(options.context, pool_ratios=options.pool_ratios, select_topk=options.select_topk)))
        if not settings.pays(options.context, self.training.device.type):
            lines.append(f"Note: at {options.context:,} tokens with these settings dense attention is as fast.")
        return "\n".join([*lines, WHY_DENSE])

    def train(
        self,
        *,
        callbacks: Sequence[TrainerCallback] = (),
        keep_model: bool = True,
        stop: StopOnSignal | None = None,
    ) -> PretrainResult:
        """Trains, saves the plain model with its tokenizer and the results, and returns these.

        Args:
            callbacks: further ones for the Trainer, called behind those of the run. What one raises ends the run.
            keep_model: without it no model is saved, and the result has no `model_folder`.
            stop: of a caller with several runs: a signal in the last step of one lets it end, and is in
                `stop.received`.

        Raises:
            Refused, a `ValueError`: the text or the model was found unfit when it was cut or made.
            DiskFull, NotFinite: the run cannot go on; the last whole checkpoint is as it was.
            Stopped: SIGTERM or SIGUSR1 was received, and a checkpoint saved.
        """
        record, stop = Record(self.switch_step), stop or StopOnSignal()
        with self._begins():
            trainer = self._trainer(record, stop, callbacks)
        with self._ends(trainer):
            if self.finished:
                trainer.state = TrainerState.load_from_json(str(Path(self.checkpoint) / STATE))
                record.on_train_begin(self.training, trainer.state, trainer.control)
            else:
                with stop:
                    trainer.train(resume_from_checkpoint=self.checkpoint)
            return self._finish(trainer, record, keep_model)

    @contextmanager
    def _begins(self):
        """What comes ahead of the first step, and may take long. The folder is marked: a kill is an interruption too.

        What is found wrong takes the mark away again.
        """
        main, new = self.training.process_index == 0, not (self.folder / SETTINGS).exists()
        if main:
            print(self._resolved, self, sep="\n", flush=True)
        PartialState().wait_for_everyone()  # all have looked at the folder; from here on it changes
        try:
            if main and new:
                self._write_settings()
            yield
            if main:
                checkpoints.remove_unfinished(self.folder)
                if self.checkpoint is not None:  # a kill may have come between a checkpoint and the removal of an older
                    best = TrainerState.load_from_json(str(Path(self.checkpoint) / STATE)).best_model_checkpoint
                    checkpoints.rotate(self.folder, self.training.save_total_limit, best)
                self._write_settings()
        except Exception as error:
            if main and new:
                with suppress(OSError):
                    for name in (SETTINGS, configuration.CONFIGURATION):
                        checkpoints.remove(self.folder / name)
                    self.folder.rmdir()
            if isinstance(error, OSError) and error.errno in checkpoints.NO_SPACE:
                raise DiskFull(str(error)) from error
            if isinstance(error, (ValueError, OSError, ImportError)):
                raise Refused(str(error)) from error
            raise
        except KeyboardInterrupt:
            if main:
                print(f"\nInterrupted ahead of the first step. {self._how_to_go_on()}", file=sys.stderr, flush=True)
            raise

    @property
    def _resolved(self) -> str:
        return configuration.text_of(configuration.resolved(self.options, self.training))

    def _write_settings(self) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        checkpoints.write_whole(self.folder / SETTINGS, json.dumps(self.settings(), indent=2) + "\n")
        checkpoints.write_whole(self.folder / configuration.CONFIGURATION, self._resolved)

    def _trainer(self, record: Record, stop: StopOnSignal, callbacks: Sequence[TrainerCallback]) -> _Trainer:
        """The rows are cut, by the first process that comes, and the model is made."""
        options, training = self.options, self.training
        # Not in main_process_first: the others would wait in a collective, which times out. Here they wait for a file.
        train_rows, held_out_rows = data.rows_of(self.corpus)
        model = model_of(new_config(options.model, options.context, self.tokenizer), training.seed)
        if self.checkpoint is not None:
            _check_same_model(self.checkpoint, model)
        if self.finished:
            model = type(model).from_pretrained(self._last_or_best(), dtype=model.dtype)
        self._check_space(model)
        # A dense run too is wrapped, with Lighthouse off: for the loss that holds no logits. What is asked for is done,
        # also where dense attention would be as fast: no limits here.
        model = LighthouseWrapper(
            model,
            pool_ratios=options.pool_ratios,
            select_topk=options.select_topk,
            dense_layers=options.dense_layers,
            min_tokens=0,
            max_share=1.0,
        )
        model.lighthouse(self.switch_step > 0)
        if options.compile_layers and not training.torch_compile:
            for layer in model.base_model.layers:
                layer.compile(fullgraph=True, dynamic=False)  # in place: no name changes
        return _Trainer(
            model=model,
            args=training,
            train_dataset=train_rows,
            eval_dataset=held_out_rows,
            data_collator=data.collate,
            callbacks=[SwitchToDense(self.switch_step), record, stop, *callbacks],
            run=self,
            record=record,
            stop=stop,
        )

    @contextmanager
    def _ends(self, trainer: Trainer):
        """Says of a run that ends before its time where it can go on from."""
        try:
            yield
        except BaseException as error:
            with suppress(Exception):
                trainer.callback_handler.on_train_end(trainer.args, trainer.state, trainer.control)  # logs, the bar
            main = trainer.is_world_process_zero()
            if isinstance(error, NotFinite):
                raise NotFinite(
                    f"{error}. Nothing of it was saved. {self._how_to_go_on()} It meets the same rows again: with "
                    "another learning_rate or max_grad_norm, or without these rows, it is another run, in another "
                    "output_dir."
                ) from None
            if isinstance(error, DiskFull):
                raise DiskFull(f"{error} {self._how_to_go_on()}") from error.__cause__
            if isinstance(error, OSError) and error.errno in checkpoints.NO_SPACE:  # of a log, say
                raise DiskFull(f"{error}. {self._how_to_go_on()}") from error
            if isinstance(error, (Stopped, KeyboardInterrupt)) and main:
                what = error if isinstance(error, Stopped) else f"Interrupted behind step {trainer.state.global_step}."
                print(f"\n{what} {self._how_to_go_on()}", file=sys.stderr, flush=True)
            raise

    def _how_to_go_on(self) -> str:
        last = checkpoints.last_whole(self.folder)
        if last is None:
            return f"There is no whole checkpoint in {self.folder} yet: with --resume the same command begins again."
        return f"The last whole checkpoint is {last}: the same command with --resume goes on from there."

    def _last_or_best(self) -> str:
        """Of a finished run, the checkpoint whose model is saved."""
        best = TrainerState.load_from_json(str(Path(self.checkpoint) / STATE)).best_model_checkpoint
        return best if self.training.load_best_model_at_end and best and Path(best).is_dir() else self.checkpoint

    def _check_space(self, model) -> None:
        """Refuses a run that cannot save one checkpoint, and warns of one that cannot keep all it is to keep."""
        training, free = self.training, checkpoints.free_bytes(self.folder)
        if training.process_index != 0:
            return
        weights, one, saves = _weight_bytes(model), 0, 0
        if training.save_strategy != "no" and not self.finished:
            one = checkpoint_bytes(model, training)
            saves = 1
            if training.save_strategy == "steps":
                every = training.save_steps
                every = every if every >= 1 else math.ceil(every * training.max_steps)
                saves = math.ceil(training.max_steps / every)
            if training.save_total_limit:
                there = len(checkpoints.checkpoints_in(self.folder))
                saves = max(1, min(saves, training.save_total_limit + 1 - there))  # one more while the oldest is there
        if free < max(one, weights):
            raise DiskFull(
                f"output_dir={str(self.folder)!r}: a checkpoint needs about {_gb(one)} and the model {_gb(weights)}, "
                f"and {_gb(free)} are free there: make room, or take another output_dir"
            )
        if free < saves * one + weights:
            logger.warning(
                f"output_dir={str(self.folder)!r}: {saves} more checkpoints of about {_gb(one)} and the model of "
                f"{_gb(weights)} will not fit into the {_gb(free)} that are free: lower save_total_limit or make room"
            )

    def _finish(self, trainer: _Trainer, record: Record, keep_model: bool) -> PretrainResult:
        trainer.check_finite(weights=True)
        if not record.held_out or record.held_out[-1]["step"] != trainer.state.global_step:
            trainer.evaluate()
        state, options = trainer.state, self.options
        best = self.training.load_best_model_at_end and state.best_model_checkpoint is not None
        sharded = trainer.is_fsdp_enabled or trainer.is_deepspeed_enabled
        weights = trainer.accelerator.get_state_dict(trainer.model_wrapped) if sharded else None  # by all processes
        plain = trainer.accelerator.unwrap_model(trainer.model)
        plain = plain.unwrap()
        plain.config.use_cache = True  # off in training only
        warnings = []
        if self.switch_step >= state.global_step:
            warnings.append(
                f"All {state.global_step:,} steps used Lighthouse: the model had no dense stage and is not ready for "
                "dense attention, which is what any other program runs it with."
            )
        peaks = torch.tensor([[stage.get("peak_memory") or 0 for stage in record.stages.values()]])
        peaks = trainer.accelerator.gather(peaks.to(self.training.device)).amax(0).tolist()
        result = PretrainResult(
            name="dense" if self.switch_step == 0 else "lighthouse-only" if options.lighthouse_only else "two-stage",
            model_folder=str(self.folder / MODEL) if keep_model else None,
            context=options.context,
            steps=state.global_step,
            switch_step=self.switch_step,
            model_step=checkpoints.step_of(Path(state.best_model_checkpoint)) if best else state.global_step,
            stages={
                name: Stage(stage["steps"], stage["seconds"], stage["steps"] * self.tokens_per_step, peak or None)
                for (name, stage), peak in zip(record.stages.items(), peaks, strict=True)
            },
            held_out=[HeldOut(**point) for point in record.held_out],
            settings=self.settings(),
            warnings=warnings,
        )
        if trainer.is_world_process_zero():
            for warning in warnings:
                logger.warning(warning)

            def write(folder: Path) -> None:
                plain.save_pretrained(folder, state_dict=weights)
                self.tokenizer.save_pretrained(folder)

            with _space_for("the model", self.folder, _weight_bytes(plain)):
                if keep_model:
                    checkpoints.write_whole_folder(self.folder / MODEL, write)
                result.save(self.folder / RESULTS)  # the last of all: with it the run is at its end
        return result


class _Trainer(Trainer):
    """Transformers' Trainer whose checkpoints are whole and finite, that stops behind a step, and logs more."""

    def __init__(self, *, run: Run, record: Record, stop: StopOnSignal, args: TrainingOptions, **kwargs):
        super().__init__(args=args, **kwargs)
        self.run = run
        self.record = record
        self.stop = stop
        self.plan = plan(run.options.context, pool_ratios=run.options.pool_ratios, select_topk=run.options.select_topk)
        self.not_finite = FirstNotFinite(args.device)
        self.places = []  # (step, places of a batch) since the last check
        self.open_loss = _OpenLoss(self)
        self.add_callback(self.open_loss)
        self.remove_callback(PrinterCallback if args.disable_tqdm else ProgressCallback)
        self.add_callback(PlainLines() if args.disable_tqdm else Lines())

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        if "loss" in logs:
            step = self.state.global_step
            lighthouse = self.record.stage_of(step) == LIGHTHOUSE
            logs["lighthouse"] = int(lighthouse)
            logs["kept_share"] = self.plan.kept_share if lighthouse else 1.0
            logs["sub_length"] = self.plan.length if lighthouse else self.plan.tokens
            steps_per_second = self.record.steps_per_second(step)
            if steps_per_second is not None:
                logs["tokens_per_second"] = steps_per_second * self.run.tokens_per_step
            logs |= memory()
        super().log(logs, start_time)

    def training_step(self, model, inputs, *args, **kwargs):
        if "place" in inputs:  # where the rows are in the text: for `_rows_of`, not for the model
            self.places.append((self.state.global_step + 1, inputs.pop("place")))
        loss = super().training_step(model, inputs, *args, **kwargs)
        self.not_finite.note("loss", loss, self.state.global_step + 1)
        return loss

    def _get_grad_norm(self, *args, **kwargs):
        norm = super()._get_grad_norm(*args, **kwargs)
        if not self.args.fp16:  # whose scaler tries too large a scale on purpose, and leaves such a step out
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
            raise Stopped(f"Stopped by a signal behind step {self.state.global_step}.")

    def check_finite(self, weights: bool) -> None:
        """Raises `NotFinite` if a step since the start was not, or with `weights` one of these is not."""
        found = self.not_finite.found(self.accelerator.gather)
        if found is not None:
            step, what = found
            raise NotFinite(f"step {step}: the {what} is not finite, on {self._rows_of(step)}")
        self.places.clear()
        if weights:
            finite = torch.ones((), dtype=torch.bool, device=self.args.device)
            for weight in self.model.parameters():
                local = weight.to_local() if hasattr(weight, "to_local") else weight  # of a DTensor
                finite &= torch.isfinite(local.detach()).all()
            if not self.accelerator.gather(finite[None]).all():
                raise NotFinite(f"step {self.state.global_step}: a weight is not finite behind it")

    def _rows_of(self, step: int) -> str:
        """What the text of the `step`-th step was, in all processes."""
        describe = getattr(self.run.corpus, "describe", str)
        places = [place for of, batch in self.places if of == step for place in batch.tolist()]
        return "; ".join(gather_object([describe(place) for place in places])) or "rows that are not known"

    def _save_checkpoint(self, model, trial) -> None:
        args, folder = self.args, self.run.folder
        checkpoint = folder / f"{checkpoints.PREFIX_CHECKPOINT_DIR}-{self.state.global_step}"
        self.open_loss.take()
        limit, args.save_total_limit = args.save_total_limit, None  # the oldest goes when this one is whole
        try:
            with _space_for(checkpoint.name, folder, checkpoint_bytes(self.model, args)):
                try:
                    super()._save_checkpoint(model, trial)
                    self.accelerator.wait_for_everyone()
                    if args.should_save:
                        checkpoints.seal(checkpoint)
                except BaseException:
                    checkpoints.remove(checkpoint)
                    raise
        finally:
            args.save_total_limit = limit
        if args.should_save:
            checkpoints.rotate(folder, limit, self.state.best_model_checkpoint)


class _OpenLoss(TrainerCallback, ExportableState):
    """The sum of the losses since the last log, kept in the checkpoint.

    Else the next log after resuming would be the mean of fewer steps than an undisturbed run's. With several processes
    it is their mean, rounded once more.
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


@contextmanager
def _space_for(what: str, folder: Path, needed: int):
    """Makes `DiskFull` of what a full disk raises. PyTorch's writer gives no error number: the free space tells."""
    try:
        yield
    except Exception as error:
        free = checkpoints.free_bytes(folder)
        if getattr(error, "errno", None) in checkpoints.NO_SPACE or "os error 28" in str(error) or free < needed:
            raise DiskFull(
                f"output_dir={str(folder)!r} has no space for {what}: about {_gb(needed)} are needed, {_gb(free)} are "
                "free now. What was half written is removed. Make room, or lower save_total_limit."
            ) from error
        raise


def _weight_bytes(model) -> int:
    return sum(weight.numel() * weight.element_size() for weight in model.parameters())


def checkpoint_bytes(model, training: TrainingOptions) -> int:
    """About how large a checkpoint is: the weights, and of AdamW two numbers of 4 bytes for each."""
    states = 8 if training.optim in ("adamw_torch", "adamw_torch_fused") else 0
    return _weight_bytes(model) + states * sum(weight.numel() for weight in model.parameters() if weight.requires_grad)


def _gb(size: int) -> str:
    return f"{size / 1e9:.1f} GB" if size >= 1e8 else f"{size / 1e6:.1f} MB"


def tokens_per_step(options: PretrainOptions, training: TrainingOptions) -> int:
    rows = training.train_batch_size * training.gradient_accumulation_steps * training.world_size
    return rows * options.context


def pretrain(options: PretrainOptions | None = None, training: TrainingOptions | None = None) -> PretrainResult:
    """Pre-trains a Llama from scratch, first with Lighthouse and then dense, and saves the plain model.

    Args:
        options: model, text and Lighthouse; by default those of `PretrainOptions()`.
        training: Transformers' `TrainingArguments` with our defaults; by default those of `TrainingOptions()`.

    Returns:
        Seconds, tokens per second of each stage, and the dense held-out loss in nats per token. The same is in
        `results.json` in `training.output_dir`, and the model in `model` there, as any Hugging Face folder.

    Raises:
        ValueError, FileNotFoundError, FileExistsError: as `prepare` does, before any work.
    """
    return prepare(options, training).train()


def prepare(options: PretrainOptions | None = None, training: TrainingOptions | None = None) -> Run:
    """Checks a run entirely and does no work yet; `pretrain` says what the arguments are.

    Raises:
        FileNotFoundError: the text's folder does not exist, or there is nothing to resume.
        FileExistsError: the output folder holds a run already.
        ValueError: too little text, an option that does not fit, more memory than there is, or a resumed run with
            other settings than it began with.
    """
    options, training = options or PretrainOptions(), training or TrainingOptions()
    for name, why in REFUSED.items():
        if getattr(training, name, False):
            raise ValueError(f"{name}=True: {why}; leave it out")
    _check_processes(options, training)
    if options.uses_lighthouse:
        check_head_dim(options.model, options.context, training.device.type)
    training.logging_nan_inf_filter = False  # it hides what is to stop the run, and waits for the device in each step
    training.remove_unused_columns = False  # a row's place in the text is one
    earlier, checkpoint = _what_is_there(training)
    tokenizer = data.load_tokenizer(options.tokenizer)
    config = new_config(options.model, options.context, tokenizer)
    _check_parts(training, config)
    switch_step = options.lighthouse_steps(training.max_steps, tokens_per_step(options, training))
    if earlier is not None and _switches_at_a_share(options):
        switch_step = earlier["lighthouse_steps"]  # it stays where it was when the number of steps changes
    check_memory(_memory(options, training, config, dense=switch_step < training.max_steps), training.device)
    corpus = data.find_corpus(options, context=options.context, seed=training.seed, tokenizer=tokenizer)
    run = Run(options, training, tokenizer, corpus, switch_step, checkpoint)
    if earlier is not None:
        check_same(earlier, run.settings())
        if checkpoint is not None and _steps_in(checkpoint) > training.max_steps:
            raise ValueError(
                f"max_steps={training.max_steps}: {checkpoint!r} has {_steps_in(checkpoint)} steps already; "
                "ask for as many or more"
            )
    return run


def _check_processes(options: PretrainOptions, training: TrainingOptions) -> None:
    """Refuses what would be done otherwise than asked for, without a word."""
    device = training.device.type
    if training.fsdp and (device in NOT_SHARDED_ON or training.world_size == 1):
        raise ValueError(
            f"fsdp with {training.world_size} process on a {device} device: shards are made by several processes on "
            "accelerators (torchrun --nproc_per_node 8 -m lighthouse.cli pretrain ...); without --fsdp each process "
            "holds a copy"
        )
    if options.stream and training.dataloader_num_workers > 1:
        raise ValueError(
            f"dataloader_num_workers={training.dataloader_num_workers} with stream: each would read all of the text; "
            "one reads ahead"
        )


def _check_parts(training: TrainingOptions, config) -> None:
    """The Trainer's own parts that it would make only when all else is ready: here, their packages and arguments."""
    with _named("report_to", training.report_to):
        for callback in get_reporting_integration_callbacks(training.report_to):
            callback()
    with _named("optim", training.optim):
        Trainer.get_optimizer_cls_and_kwargs(training, empty_model(config))
    with _named("lr_scheduler_kwargs", training.lr_scheduler_kwargs):
        optimizer = torch.optim.SGD([torch.zeros(1)], lr=training.learning_rate)
        steps = {"num_warmup_steps": training.get_warmup_steps(training.max_steps)}
        get_scheduler(
            training.lr_scheduler_type,
            optimizer,
            **steps,
            num_training_steps=training.max_steps,
            scheduler_specific_kwargs=training.lr_scheduler_kwargs,
        )


@contextmanager
def _named(name: str, value):
    """Says of a fault which option it is of."""
    try:
        yield
    except (ImportError, RuntimeError, TypeError, ValueError) as error:
        value = value.value if isinstance(value, ExplicitEnum) else value
        raise ValueError(f"{name}={value!r}: {error}") from error


def _memory(options: PretrainOptions, training: TrainingOptions, config, *, dense: bool) -> MemoryEstimate:
    """Of the larger of a run's stages, the dense one where there is one."""
    settings = LighthouseSettings(
        pool_ratios=options.pool_ratios, select_topk=options.select_topk, dense_layers=options.dense_layers
    )
    sharded = bool(training.fsdp) or training.deepspeed is not None
    return estimate(
        config,
        options.context,
        rows=training.per_device_train_batch_size,
        bf16=training.bf16,
        lighthouse=None if dense else settings,
        gradient_checkpointing=training.gradient_checkpointing or getattr(training, "activation_checkpointing", False),
        optimizer=training.optim.value if isinstance(training.optim, ExplicitEnum) else str(training.optim),
        accumulation=training.gradient_accumulation_steps,
        compiled=training.torch_compile or options.compile_layers,
        shards=training.world_size if sharded else 1,
    )


def _switches_at_a_share(options: PretrainOptions) -> bool:
    """Only then does the switch depend on `max_steps`: a step, a number of tokens or "never" stay what they are."""
    fixed = options.lighthouse_only or options.switch_step is not None or options.switch_tokens is not None
    return options.uses_lighthouse and not fixed


def _what_is_there(training: TrainingOptions) -> tuple[dict | None, str | None]:
    """The settings of the run in the output folder and the checkpoint to go on from; None where there is none."""
    folder = Path(training.output_dir)
    if folder.exists() and not folder.is_dir():
        raise FileExistsError(f"output_dir={str(folder)!r} is a file: a folder is needed")
    # Asked for by the environment too: every process looks before one of them writes.
    names = os.listdir(folder) if folder.is_dir() else []
    there = checkpoints.checkpoints_in(folder)
    if not training.resume and training.resume_from_checkpoint is None:
        if SETTINGS in names or RESULTS in names or MODEL in names or there:
            raise FileExistsError(
                f"output_dir={str(folder)!r} holds a run already: take another folder with --output_dir, go on with "
                "that run with --resume, or delete the folder"
            )
        return None, None
    say = _say if training.process_index == 0 else lambda message: None
    if training.resume_from_checkpoint is None:
        checkpoint = checkpoints.last_whole(folder, say)
        if checkpoint is None and SETTINGS in names:
            say(f"{folder} holds a run that was interrupted before its first whole checkpoint: it begins again.")
            return json.loads((folder / SETTINGS).read_text(encoding="utf-8")), None
        if checkpoint is None:
            raise FileNotFoundError(
                f"output_dir={str(folder)!r} holds no checkpoint to resume from: start the run without --resume"
            )
    else:
        checkpoint = Path(training.resume_from_checkpoint)
        _check_checkpoint(checkpoint, folder, there, SETTINGS in names)
    settings = checkpoint.parent / SETTINGS
    if not settings.is_file():
        raise FileNotFoundError(
            f"{str(settings)!r} is missing: {str(checkpoint)!r} is not from a run of lighthouse pretrain"
        )
    return json.loads(settings.read_text(encoding="utf-8")), str(checkpoint)


def _check_checkpoint(checkpoint: Path, folder: Path, there: list[Path], holds_a_run: bool) -> None:
    """Raises if the checkpoint that was asked for by name cannot be gone on from in `folder`."""
    name = f"resume_from_checkpoint={str(checkpoint)!r}"
    if not checkpoint.is_dir():
        raise FileNotFoundError(f"{name} is not a folder with a whole checkpoint")
    fault = checkpoints.fault_of(checkpoint)
    if fault is not None:
        raise FileNotFoundError(f"{name} is not a folder with a whole checkpoint: {fault}")
    if checkpoint.parent.resolve() != folder.resolve():
        if holds_a_run:
            raise FileExistsError(
                f"output_dir={str(folder)!r} holds another run than {name}: take the checkpoint's own folder, or a new "
                "one"
            )
        return
    later = [path.name for path in there if checkpoints.step_of(path) > checkpoints.step_of(checkpoint)]
    if later:
        raise FileExistsError(
            f"{name}: there are later ones, {', '.join(later)}, which would be mixed with the new: remove them, or go "
            "on in a new output_dir"
        )


def _say(message: str) -> None:
    print(message, flush=True)


def _steps_in(checkpoint: str | Path) -> int:
    """The optimizer steps that a checkpoint has behind it."""
    return TrainerState.load_from_json(str(Path(checkpoint) / STATE)).global_step


def check_same(earlier: dict, now: dict, free: frozenset[str] = FREE_ON_RESUME) -> None:
    """Raises `ValueError` that lists the settings, but for those in `free`, in which two runs differ.

    Settings that only one of the two has belong to another version of Transformers and are not compared.
    """
    free = free | {"lighthouse_steps"}  # which follows from the options
    differ = [
        f"{name} was {earlier[name]!r}, is {now[name]!r}"
        for name in now
        if name in earlier and name not in free and earlier[name] != now[name]
    ]
    if differ:
        raise ValueError("a resumed run goes on with the settings it began with: " + "; ".join(differ))


def _check_same_model(checkpoint: str | Path, model) -> None:
    """The options may name a file that holds another configuration than it did."""
    if not (Path(checkpoint) / "config.json").is_file():
        return  # sharded by the Trainer, whose loading then compares the weights' names and shapes
    earlier, now = type(model.config).from_pretrained(checkpoint).to_dict(), model.config.to_dict()
    free = {"architectures", "dtype", "transformers_version", "use_cache"}  # written or changed by saving and wrapping
    differ = [
        f"{name} was {earlier.get(name)!r}, is {now.get(name)!r}"
        for name in sorted(earlier.keys() | now.keys())
        if name not in free and not name.startswith("_") and earlier.get(name) != now.get(name)
    ]
    if differ:
        raise ValueError("a resumed run goes on with the model it began with: " + "; ".join(differ))
