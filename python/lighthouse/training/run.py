"""One pre-training run: Lighthouse for a share of the steps, then dense, then the plain model in a folder.

`prepare` checks everything and does no work that lasts; `Run.train` is the Trainer's loop and what comes behind it.
"""

from __future__ import annotations

import json
import os
from dataclasses import asdict, dataclass
from pathlib import Path

from transformers import ProgressCallback, Trainer, TrainerState

import lighthouse.huggingface  # noqa: F401  the wrapper would import it only when a run has begun
from lighthouse import LighthouseWrapper
from lighthouse.plan import plan
from lighthouse.training import data
from lighthouse.training.callbacks import LIGHTHOUSE, Lines, Record, SwitchToDense
from lighthouse.training.model import byte_tokenizer, new_model
from lighthouse.training.options import PretrainOptions, TrainingOptions
from lighthouse.training.result import RESULTS, HeldOut, PretrainResult, Stage
from lighthouse.wrapper import LighthouseSettings

# Options of the Trainer that a resumed run must keep, as far as they are plain values.
OPTIMIZATION = (
    "learning_rate",
    "weight_decay",
    "adam_beta1",
    "adam_beta2",
    "max_grad_norm",
    "warmup_steps",
    "optim",
    "lr_scheduler_type",
)

SETTINGS = "run.json"
STATE = "trainer_state.json"  # the last file that the Trainer writes into a checkpoint
MODEL = "model"

WHY_DENSE = (
    "The held-out loss is measured with dense attention, also while Lighthouse is on: which tokens Lighthouse keeps\n"
    "depends on later ones, so losses seen under it, that stage's training loss too, do not compare with dense ones."
)


@dataclass(frozen=True)
class Run:
    """A run whose options, text and folder were found good. `str(run)` tells what it will do; `train()` does it."""

    options: PretrainOptions
    training: TrainingOptions
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
        """What decides the outcome, as it is kept in the run's folder and compared on resuming."""
        return asdict(self.options) | {
            "seed": self.training.seed,
            "tokens_per_step": self.tokens_per_step,
            "switch_step": self.switch_step,
            "text": self.corpus.fingerprint,
            **{name: getattr(self.training, name) for name in OPTIMIZATION},
        }

    def __str__(self) -> str:
        options, steps = self.options, self.training.max_steps
        lines = [str(self.corpus)]
        if self.checkpoint is not None:
            lines.append(f"Going on from {self.checkpoint}.")
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

    def train(self) -> PretrainResult:
        """Trains, saves the plain model with its tokenizer and the results, and returns these."""
        options, training = self.options, self.training
        if training.process_index == 0:
            print(self, flush=True)
        with training.main_process_first(desc="cutting the text"):
            train_rows, held_out_rows = data.rows_of(self.corpus)
        model = new_model(options.model, options.context, training.seed)
        if self.finished:
            model = type(model).from_pretrained(self.checkpoint, dtype=model.dtype)
        if self.switch_step > 0:
            # What is asked for is done, also where dense attention would be as fast: no limits here.
            model = LighthouseWrapper(
                model,
                pool_ratios=options.pool_ratios,
                select_topk=options.select_topk,
                dense_layers=options.dense_layers,
                min_tokens=0,
                max_share=1.0,
            )
        record = Record(self.switch_step)
        trainer = _Trainer(
            model=model,
            args=training,
            train_dataset=train_rows,
            eval_dataset=held_out_rows,
            data_collator=data.collate,
            callbacks=[SwitchToDense(self.switch_step), record] if self.switch_step > 0 else [record],
            record=record,
            tokens_per_step=self.tokens_per_step,
        )
        self._keep_settings(trainer)
        if self.finished:
            trainer.state = TrainerState.load_from_json(str(Path(self.checkpoint) / STATE))
            record.on_train_begin(training, trainer.state, trainer.control)
        else:
            trainer.train(resume_from_checkpoint=self.checkpoint)
        return self._finish(trainer, record)

    def _keep_settings(self, trainer: Trainer) -> None:
        if trainer.is_world_process_zero():
            self.folder.mkdir(parents=True, exist_ok=True)
            text = json.dumps(self.settings(), indent=2) + "\n"
            (self.folder / SETTINGS).write_text(text, encoding="utf-8")

    def _finish(self, trainer: Trainer, record: Record) -> PretrainResult:
        if not record.held_out or record.held_out[-1]["step"] != trainer.state.global_step:
            trainer.evaluate()
        state = trainer.state
        best = self.training.load_best_model_at_end and state.best_model_checkpoint is not None
        plain = trainer.accelerator.unwrap_model(trainer.model)
        if self.switch_step > 0:
            plain = plain.unwrap()
        plain.config.use_cache = True  # off in training only
        result = PretrainResult(
            name="two-stage" if self.switch_step > 0 else "dense",
            model_folder=str(self.folder / MODEL),
            context=self.options.context,
            steps=state.global_step,
            switch_step=self.switch_step,
            model_step=_steps_in(state.best_model_checkpoint) if best else state.global_step,
            stages={
                name: Stage(stage["steps"], stage["seconds"], stage["steps"] * self.tokens_per_step)
                for name, stage in record.stages.items()
            },
            held_out=[HeldOut(**point) for point in record.held_out],
            settings=self.settings(),
        )
        if trainer.is_world_process_zero():
            plain.save_pretrained(result.model_folder)
            byte_tokenizer().save_pretrained(result.model_folder)
            result.save(self.folder / RESULTS)
        return result


class _Trainer(Trainer):
    """Transformers' Trainer that also logs the stage and the tokens per second, and logs readably."""

    def __init__(self, *, record: Record, tokens_per_step: int, **kwargs):
        super().__init__(**kwargs)
        self.record = record
        self.tokens_per_step = tokens_per_step
        if not self.args.disable_tqdm:
            self.remove_callback(ProgressCallback)
            self.add_callback(Lines())

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        if "loss" in logs:
            step = self.state.global_step
            logs["lighthouse"] = int(self.record.stage_of(step) == LIGHTHOUSE)
            steps_per_second = self.record.steps_per_second(step)
            if steps_per_second is not None:
                logs["tokens_per_second"] = steps_per_second * self.tokens_per_step
        super().log(logs, start_time)


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
        ValueError: too little text, or a resumed run with other settings than it began with.
    """
    options, training = options or PretrainOptions(), training or TrainingOptions()
    earlier, checkpoint = _what_is_there(training)
    folder = options.data[0] if options.data else None
    corpus = data.find_corpus(folder, context=options.context, held_out=options.held_out, seed=training.seed)
    switch_step = options.lighthouse_steps(training.max_steps, tokens_per_step(options, training))
    if earlier is not None and options.uses_lighthouse and not options.lighthouse_only:
        switch_step = earlier["switch_step"]  # it stays where it was when the number of steps changes
    run = Run(options, training, corpus, switch_step, checkpoint)
    if earlier is not None:
        _check_same(earlier, run.settings())
        if _steps_in(checkpoint) > training.max_steps:
            raise ValueError(
                f"max_steps={training.max_steps}: {checkpoint!r} has {_steps_in(checkpoint)} steps already; "
                "ask for as many or more"
            )
    return run


def _what_is_there(training: TrainingOptions) -> tuple[dict | None, str | None]:
    """The settings of the run in the output folder and its last checkpoint, or two times None for a new run."""
    folder = Path(training.output_dir)
    if folder.exists() and not folder.is_dir():
        raise FileExistsError(f"output_dir={str(folder)!r} is a file: a folder is needed")
    # Asked for by the environment too: every process looks before one of them writes.
    names = os.listdir(folder) if folder.is_dir() else []
    resume = training.resume or training.resume_from_checkpoint is not None
    if not resume:
        if SETTINGS in names or RESULTS in names or MODEL in names or any(n.startswith("checkpoint-") for n in names):
            raise FileExistsError(
                f"output_dir={str(folder)!r} holds a run already: take another folder with --output_dir, go on with "
                "that run with --resume, or delete the folder"
            )
        return None, None
    checkpoint = training.resume_from_checkpoint
    if checkpoint is None:
        checkpoint = _last_whole_checkpoint(folder)
    elif not (Path(checkpoint) / STATE).is_file():
        raise FileNotFoundError(f"resume_from_checkpoint={checkpoint!r} is not a folder with a whole checkpoint")
    elif SETTINGS in names and Path(checkpoint).parent.resolve() != folder.resolve():
        raise FileExistsError(
            f"output_dir={str(folder)!r} holds another run than resume_from_checkpoint={checkpoint!r}: "
            "take the checkpoint's own folder, or a new one"
        )
    if checkpoint is None:
        raise FileNotFoundError(f"output_dir={str(folder)!r} holds no checkpoint to resume from")
    settings = Path(checkpoint).parent / SETTINGS
    if not settings.is_file():
        raise FileNotFoundError(
            f"{str(settings)!r} is missing: {checkpoint!r} is not from a run of lighthouse pretrain"
        )
    return json.loads(settings.read_text(encoding="utf-8")), checkpoint


def _last_whole_checkpoint(folder: Path) -> str | None:
    """The last checkpoint that was written to its end; what was interrupted is passed over, and said."""
    for checkpoint in sorted(folder.glob("checkpoint-*"), key=_number_of, reverse=True):
        if (checkpoint / STATE).is_file():
            return str(checkpoint)
        print(f"{checkpoint} was not written to its end and is passed over.", flush=True)
    return None


def _number_of(checkpoint: Path) -> int:
    number = checkpoint.name.removeprefix("checkpoint-")
    return int(number) if number.isdigit() else -1


def _steps_in(checkpoint: str | Path) -> int:
    """The optimizer steps that a checkpoint has behind it."""
    return json.loads((Path(checkpoint) / STATE).read_text(encoding="utf-8"))["global_step"]


def _check_same(earlier: dict, now: dict) -> None:
    differ = [f"{name} was {earlier.get(name)!r}, is {now[name]!r}" for name in now if earlier.get(name) != now[name]]
    if differ:
        raise ValueError("a resumed run goes on with the settings it began with: " + "; ".join(differ))
