"""One pre-training run: Lighthouse for a share of the steps, then dense, then the plain model in a folder.

`prepare` checks everything and does no work that lasts; `Run.train` is the Trainer's loop and what comes after it. A
run may be killed at any moment: the folder always holds the last whole checkpoint (`checkpoints`), and the model and
`results.json` appear as a whole, at the end.
"""

from __future__ import annotations

import json
import logging
import sys
import textwrap
from collections.abc import Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from accelerate import PartialState
from transformers import PreTrainedTokenizerBase, TrainerCallback, TrainerState

from lighthouse.core.devices import device_name
from lighthouse.core.files import NO_SPACE, remove, write_whole, write_whole_folder
from lighthouse.core.settings import LighthouseSettings
from lighthouse.huggingface import wrap
from lighthouse.huggingface.steps import not_as_wished, not_ready
from lighthouse.huggingface.switch import SwitchToDense
from lighthouse.huggingface.trainer_state import best_checkpoint, step_of
from lighthouse.text import data
from lighthouse.training import checkpoints, configuration
from lighthouse.training.callbacks import Record, StopOnSignal
from lighthouse.training.checks import check_followed, check_together, memory_of
from lighthouse.training.ending import how_to_go_on, said, saying_how_to_go_on
from lighthouse.training.form import form_of, found_by, tokens_per_step
from lighthouse.training.memory import check_memory
from lighthouse.training.model import check_head_dim, model_notes, model_of, new_config
from lighthouse.training.options import WITHOUT_WARM_UP, PretrainOptions, TrainingOptions
from lighthouse.training.result import RESULTS, DiskFull, HeldOut, PretrainResult, Refused, Stage, versions
from lighthouse.training.resume import (
    FACTS,
    MODEL,
    SETTINGS,
    check_checkpoint,
    check_same,
    check_same_model,
    state_in,
    what_is_new,
    what_is_there,
)
from lighthouse.training.space import check_space, space_for, weight_bytes
from lighthouse.training.terminal import above_the_bar, without_what_a_run_says
from lighthouse.training.trainer import RunTrainer

logger = logging.getLogger(__name__)

WHY_DENSE = (
    "The held-out loss is measured with dense attention, also while Lighthouse is on: which tokens Lighthouse keeps\n"
    "depends on later ones, so losses with it, its stage's training loss too, are not comparable with dense ones."
)


@dataclass(frozen=True)
class Run:
    """A run whose options, text and folder were checked. `str(run)` says what it will do; `train()` does it."""

    options: PretrainOptions
    training: TrainingOptions
    corpus: data.Corpus
    switch_step: int
    checkpoint: str | None
    notes: tuple[str, ...] = ()  # sentences about a resumed run
    earlier: dict | None = None  # the settings that it began with

    @property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        return self.corpus.encoder.tokenizer

    @property
    def folder(self) -> Path:
        return Path(str(self.training.output_dir))

    @property
    def finished(self) -> bool:
        """Whether the checkpoint to resume from has all the steps, so that only the end is left to do."""
        return self.checkpoint is not None and self.state.global_step == self.training.max_steps

    @property
    def state(self) -> TrainerState:
        """The Trainer's state in the checkpoint to resume from; of a new run, the initial one."""
        return TrainerState() if self.checkpoint is None else state_in(self.checkpoint)

    @property
    def tokens_per_step(self) -> int:
        """Of one optimizer step, on all devices."""
        return tokens_per_step(self.options, self.training)

    def settings(self) -> dict:
        """The run's options and what it found (`form`), as kept in its folder and compared on resuming."""
        form = form_of(self.options, self.training)
        return form | {"lighthouse_steps": self.switch_step} | found_by(self.training, self.corpus)

    @property
    def facts(self) -> dict:
        """What a checkpoint records of its run."""
        settings = self.settings()
        return {name: settings[name] for name in FACTS}

    def __str__(self) -> str:
        options, steps = self.options, self.training.max_steps
        lines = [str(self.corpus), *model_notes(options.model, options.context)]
        if self.checkpoint is not None:
            lines.append(f"Continuing from {self.checkpoint}.")
            planned = self.state.max_steps
            if planned != steps:
                same = self.training.lr_scheduler_type in WITHOUT_WARM_UP
                what = "is the same" if same else f"now follows the schedule of {steps:,} steps"
                lines.append(f"max_steps was {planned:,}, is now {steps:,}: the learning rate {what}.")
            if options.stream:
                lines.append("The text's sizes and samples are unchanged; a streamed text is not compared as a whole.")
        lines += self.notes
        if self.switch_step == 0:
            return "\n".join([*lines, f"{steps:,} steps of {self.tokens_per_step:,} tokens, all dense."])
        layers = f" (dense layers at each end: {options.dense_layers})" if options.dense_layers else ""
        lines.append(
            f"{steps:,} steps of {self.tokens_per_step:,} tokens: {self.switch_step:,} with Lighthouse{layers}, "
            f"{steps - self.switch_step:,} dense."
        )
        lines.append(str(options.method.plan(options.context)))
        if not LighthouseSettings(options.method).pays(options.context, self.training.device.type):
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
            callbacks: further ones for the Trainer, called after those of the run. What one raises ends the run.
            keep_model: without it no model is saved, and the result has no `model_folder`.
            stop: of a caller with several runs: a signal in the last step of one lets it end, and is in
                `stop.received`.

        Raises:
            Refused, a `ValueError`: the text or the model was found unfit when its rows or weights were made.
            DiskFull, NotFinite, TextFailed: the run cannot continue; the last whole checkpoint is as it was.
            Stopped: SIGTERM or SIGUSR1 was received, and a checkpoint saved.
            KeyboardInterrupt: Ctrl-C, and a checkpoint saved; at a second Ctrl-C without one.
        """
        record, stop = Record(self.switch_step, self.facts), stop or StopOnSignal()
        with ExitStack() as held:
            with self._begins(held):
                trainer = self._trainer(record, stop, callbacks)
            with saying_how_to_go_on(trainer, self.folder), without_what_a_run_says():
                if self.finished:
                    trainer.state = self.state
                    record.on_train_begin(self.training, trainer.state, trainer.control)
                else:
                    with stop, above_the_bar():
                        trainer.train(resume_from_checkpoint=self.checkpoint)
                return self._finish(trainer, record, keep_model)

    @contextmanager
    def _begins(self, held: ExitStack):
        """What comes before the first step, and may take long. The folder is marked: a kill is an interruption too.

        An error removes the mark again. The folder is this run's alone as long as it is `held`.
        """
        main, new = self.training.process_index == 0, not (self.folder / SETTINGS).exists()
        if main:
            print(self._given, self, sep="\n", flush=True)
        PartialState().wait_for_everyone()  # all have read the folder; from here on it changes
        if main:
            self._take_folder(held)
        try:
            if main and new:
                self._write_settings()
            yield
            if main:
                checkpoints.remove_unfinished(self.folder)
                if self.checkpoint is not None:  # a kill may have come between a checkpoint and the removal of an older
                    best = self.state.best_model_checkpoint
                    checkpoints.rotate(self.folder, self.training.save_total_limit, best)
                self._write_settings()
        except Exception as error:
            if main and new:
                with suppress(OSError):
                    for name in (SETTINGS, configuration.CONFIGURATION):
                        remove(self.folder / name)
                    self.folder.rmdir()
            if isinstance(error, OSError) and error.errno in NO_SPACE:
                raise DiskFull(said(error)) from error
            if isinstance(error, (ValueError, OSError, ImportError)):
                raise Refused(said(error)) from error
            raise
        except KeyboardInterrupt:
            if main:
                print(f"\nInterrupted before the first step. {how_to_go_on(self.folder)}", file=sys.stderr, flush=True)
            raise

    def _take_folder(self, held: ExitStack) -> None:
        try:
            held.enter_context(checkpoints.alone_in(self.folder))
            if self.earlier is None and (self.folder / SETTINGS).exists():
                raise FileExistsError(f"output_dir={str(self.folder)!r} holds a run that another process has started")
        except OSError as error:
            raise (DiskFull if error.errno in NO_SPACE else Refused)(said(error)) from error

    @property
    def _resolved(self) -> str:
        return configuration.text_of(configuration.resolved(self.options, self.training))

    @property
    def _name(self) -> str:
        if 0 < self.switch_step < self.training.max_steps:
            return "two-stage"
        return "lighthouse-only" if self.switch_step else "dense"

    @property
    def _given(self) -> str:
        """The run's folder, and what was asked for: what else there is stands in the file."""
        chosen = [*configuration.given(self.options, self.training), "all else as by default"]
        text = f"{self.folder}: {', '.join(chosen)} ({configuration.CONFIGURATION} has every option)"
        return textwrap.fill(text, 120, break_long_words=False, break_on_hyphens=False)

    def _write_settings(self) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        write_whole(self.folder / SETTINGS, json.dumps(self.settings(), indent=2) + "\n")
        write_whole(self.folder / configuration.CONFIGURATION, self._resolved)

    def _trainer(self, record: Record, stop: StopOnSignal, callbacks: Sequence[TrainerCallback]) -> RunTrainer:
        """Makes the rows, in the first process that comes, and the model."""
        options, training = self.options, self.training
        # Not in main_process_first: the others would wait in a collective, which times out. Here they wait for a file.
        train_rows, held_out_rows = data.rows_of(self.corpus)
        if self.earlier is not None:
            check_same(self.earlier, self.settings())  # of the rows, which are known only now
        said = self.corpus.passes(training.max_steps, self.tokens_per_step)
        if said and training.process_index == 0:
            print(said, flush=True)
        model = model_of(new_config(options.model, options.context, self.tokenizer), training.seed)
        if self.checkpoint is not None:
            check_same_model(self.checkpoint, model)
        if self.finished:
            model = type(model).from_pretrained(self._last_or_best(), dtype=model.dtype)
        check_space(model, training, self.folder, finished=self.finished)
        # A dense run too is wrapped, with Lighthouse off: for the loss that holds no logits. What is asked for is done,
        # also where dense attention would be as fast: no limits here.
        settings = LighthouseSettings(options.method, options.dense_layers, min_tokens=0, max_share=1.0)
        wrapped = wrap(model, settings).lighthouse(self.switch_step > 0)
        if options.compile_layers and not training.torch_compile:
            for layer in model.model.layers:
                layer.compile(fullgraph=True, dynamic=False)  # in place: no name changes
        return RunTrainer(
            model=wrapped,
            args=training,
            train_dataset=train_rows,
            eval_dataset=held_out_rows,
            data_collator=data.collate,
            callbacks=[SwitchToDense(self.switch_step, each_loss_saved=True), record, stop, *callbacks],
            options=options,
            corpus=self.corpus,
            tokens_per_step=self.tokens_per_step,
            folder=self.folder,
            record=record,
            stop=stop,
        )

    def _last_or_best(self) -> str:
        """The checkpoint of a finished run whose model is saved."""
        return str(best_checkpoint(self.state, self.training) or self.checkpoint)

    def _finish(self, trainer: RunTrainer, record: Record, keep_model: bool) -> PretrainResult:
        trainer.check_finite(weights=True)
        if not record.held_out or record.held_out[-1]["step"] != trainer.state.global_step:
            trainer.evaluate()
        state = trainer.state
        sharded = trainer.is_fsdp_enabled or trainer.is_deepspeed_enabled
        weights = trainer.accelerator.get_state_dict(trainer.model_wrapped) if sharded else None  # by all processes
        plain = trainer.accelerator.unwrap_model(trainer.model)
        plain = plain.unwrap()
        plain.config.use_cache = True  # off in training only
        best = best_checkpoint(state, self.training)
        model_step = state.global_step if best is None else step_of(best)
        used = record.steps_used
        warnings = [
            *not_ready(model_step, used.last, used.lighthouse),
            *not_as_wished(min(self.switch_step, state.global_step), used),
        ]
        peaks = torch.tensor([[stage.get("peak_memory") or 0 for stage in record.stages.values()]])
        peaks = trainer.accelerator.gather(peaks.to(self.training.device)).amax(0).tolist()
        result = PretrainResult(
            name=self._name,
            model_folder=str(self.folder / MODEL) if keep_model else None,
            context=self.options.context,
            steps=state.global_step,
            switch_step=self.switch_step,
            model_step=model_step,
            stages={
                name: Stage(stage["steps"], stage["seconds"], stage["steps"] * self.tokens_per_step, peak or None)
                for (name, stage), peak in zip(record.stages.items(), peaks, strict=True)
            },
            held_out=[HeldOut(**point) for point in record.held_out],
            settings=self.settings(),
            warnings=warnings,
            device=device_name(self.training.device),
            versions=versions(),
        )
        if trainer.is_world_process_zero():
            for warning in warnings:
                logger.warning(warning)

            def write(folder: Path) -> None:
                plain.save_pretrained(folder, state_dict=weights)
                self.tokenizer.save_pretrained(folder)

            with space_for("the model", self.folder, weight_bytes(plain)):
                if keep_model:
                    write_whole_folder(self.folder / MODEL, write)
                    result = replace(result, weights=checkpoints.weights_in(self.folder / MODEL))
                result.save(self.folder / RESULTS)  # the last of all: with it the run is finished
        return result


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


def prepare(
    options: PretrainOptions | None = None,
    training: TrainingOptions | None = None,
    *,
    corpus: data.Corpus | None = None,
) -> Run:
    """Checks a run entirely and does no work yet; `pretrain` says what `options` and `training` are.

    Args:
        corpus: `Run.corpus` of another run. If this one has the same text, tokenizer, context and seed by its options,
            they are not looked for again; if not, the run's own are found.

    Raises:
        FileNotFoundError: the text's folder does not exist, or there is nothing to resume.
        FileExistsError: the output folder already holds a run.
        ValueError: too little text, an option that does not fit, more memory than there is, or a resumed run with
            other settings than it began with.
    """
    options, training = options or PretrainOptions(), training or TrainingOptions()
    check_together(options, training)
    if options.uses_lighthouse:
        check_head_dim(options.model, options.context, training.device.type)
    earlier, checkpoint = what_is_there(training)
    of_text = {"context": options.context, "seed": training.seed}
    if corpus is not None and corpus.key != data.key_of(options, **of_text):
        corpus = None
    tokenizer = corpus.encoder.tokenizer if corpus else data.load_tokenizer(options.tokenizer)
    config = new_config(options.model, options.context, tokenizer)
    check_followed(training, config)
    switch_step = options.lighthouse_steps(training.max_steps, tokens_per_step(options, training))
    if earlier is not None and options.switch.share is not None:
        switch_step = earlier["lighthouse_steps"]  # it stays where it was when the number of steps changes
    # The larger stage: what a local window keeps is as much as dense attention, and the sub-sequence comes on top.
    dense = switch_step == 0 or (switch_step < training.max_steps and not options.method.local_window)
    check_memory(memory_of(options, training, config, dense=dense), training.device)
    corpus = corpus or data.find_corpus(options, **of_text, tokenizer=tokenizer)
    run = Run(options, training, corpus, switch_step, checkpoint)
    if earlier is not None:
        check_same(earlier, run.settings())
        run = replace(run, notes=tuple(what_is_new(earlier, run.settings())), earlier=earlier)
        if checkpoint is not None:
            check_checkpoint(checkpoint, training)
    return run
