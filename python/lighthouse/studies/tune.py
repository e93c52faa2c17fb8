"""A study of settings: each a short two-stage run, judged by its dense held-out loss at equal time or equal tokens.

    from lighthouse.studies.tune import TuneOptions, tune

    result = tune(options, TrainingOptions(output_dir="runs/tune", max_steps=200), TuneOptions(trials=20))

Optuna proposes the settings and keeps them in SQLite in the study's folder; `Run.train` trains them. Any number of
processes of a machine may work on one study, and each may be killed at any moment.
"""

from __future__ import annotations

import gc
import json
import math
import warnings
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import IO

import optuna
import torch
from accelerate.utils.memory import clear_device_cache
from optuna.trial import FrozenTrial, TrialState
from transformers import LlamaConfig

from lighthouse.core.devices import device_name
from lighthouse.core.files import remove, write_whole
from lighthouse.core.method import Method
from lighthouse.report.known import known
from lighthouse.report.studied import COMPLETE, FAILED, PRUNED, SKIPPED, TOLERANCE, UNEQUAL, StudyResult, Trial, judged
from lighthouse.report.study import page_of
from lighthouse.speed.layer import Layer
from lighthouse.studies.budget import TIMED, WARM_UP, PerStep, seconds_of, steps_in, time_steps, too_few_of
from lighthouse.studies.search import Setting, Space, with_values
from lighthouse.studies.storage import StudyFolder, importance, take_lock, trial_of, was_trained
from lighthouse.studies.trial import Judge, SameRows, Say, Unequal, made_quiet, out_of_memory, output_into
from lighthouse.studies.tune_options import RANGES, TuneOptions
from lighthouse.text.data import Corpus
from lighthouse.training import configuration
from lighthouse.training.callbacks import StopOnSignal
from lighthouse.training.depends import FREE_ON_RESUME
from lighthouse.training.form import tokens_per_step
from lighthouse.training.memory import DoesNotFit
from lighthouse.training.model import head_dim_of, new_config
from lighthouse.training.options import PretrainOptions, TrainingOptions
from lighthouse.training.result import NotFinite, RunFailed, read_json
from lighthouse.training.resume import check_same
from lighthouse.training.run import Run, prepare
from lighthouse.training.space import check_writable

DEFAULT_TRIALS = 20
NOT_PRUNED = 4  # complete trials, of the same share, before any is pruned
RANDOM_AFTER = 25  # settings skipped in a row: TPE is stuck where nothing is left
GIVE_UP_AFTER = 200


def tune(
    options: PretrainOptions | None = None,
    training: TrainingOptions | None = None,
    tuning: TuneOptions | None = None,
    *,
    say: Say = print,
) -> StudyResult:
    """Tries settings around the given one and returns the results; the report is in `training.output_dir`.

    Args:
        options, training: of the given setting, as for `pretrain`. `max_steps` are those of a trial.
        tuning: what is searched, and how trials are judged.
        say: called with a line per trial.

    Raises:
        ValueError, FileNotFoundError, FileExistsError: as `prepare_study` does, before any work.
        RunFailed: the study cannot continue; `training.resume` continues it once the cause is fixed.
    """
    return prepare_study(options, training, tuning).run(say)


def prepare_study(
    options: PretrainOptions | None = None, training: TrainingOptions | None = None, tuning: TuneOptions | None = None
) -> Study:
    """Checks a study entirely and does no work yet.

    Raises:
        ValueError: an option that does not fit, nothing to search, or a study that was started with other options.
        FileExistsError, FileNotFoundError: the folder holds a study already, or there is none to resume.
    """
    options, training, tuning = options or PretrainOptions(), training or TrainingOptions(), tuning or TuneOptions()
    if not options.uses_lighthouse or options.lighthouse_only:
        raise ValueError("settings are judged after a dense stage: both stages are needed, for example --share 0.6")
    if training.world_size > 1:
        raise ValueError(
            f"{training.world_size} processes by torchrun: a trial is trained by one process; start "
            "lighthouse tune --resume once for each device instead, as docs/tune.md shows"
        )
    for name in ("resume_from_checkpoint", "load_best_model_at_end"):
        if getattr(training, name):
            raise ValueError(f"{name}={getattr(training, name)!r}: trials start anew and are judged at their end")
    check_writable("output_dir", known(training.output_dir))
    space = Space.of(options, training, _as_it_began(training, tuning))
    if tuning.seconds is None:
        why = too_few_of(options, training, training.max_steps)
        if why is not None:
            raise ValueError(f"max_steps={training.max_steps}: {why}; use more --max_steps, or another --share")
    quiet = made_quiet(training, Path(known(training.output_dir)) / "given")
    given = prepare(options, quiet)
    fixed = given.settings()
    free = FREE_ON_RESUME - {"max_steps"}
    fixed = {name: value for name, value in fixed.items() if name not in free}
    fixed |= {name: value for name, value in asdict(tuning).items() if name != "trials"}
    if tuning.judge == "time":  # a time means something else on a faster machine
        fixed |= {"machine": device_name(training.device), "torch": torch.__version__}
    layer = _layer_of(new_config(options.model, options.context, given.tokenizer), training)
    study = Study(options, training, tuning, space, layer, given.corpus, json.loads(json.dumps(fixed)))
    study.check_folder()
    return study


def _as_it_began(training: TrainingOptions, tuning: TuneOptions) -> TuneOptions:
    """What the version that began a study could not search stays as given when the study continues."""
    file = StudyFolder(Path(known(training.output_dir))).fixed
    if not training.resume or not file.is_file():
        return tuning
    earlier = read_json(file)
    unknown = [name for name, options in RANGES.items() if not earlier.keys() & set(options)]
    return replace(tuning, fixed=[*tuning.fixed, *unknown])


def _layer_of(config: LlamaConfig, training: TrainingOptions) -> Layer:
    heads, kv_heads = config.num_attention_heads, config.num_key_value_heads or config.num_attention_heads
    return Layer(heads, kv_heads, head_dim_of(config), "bfloat16" if training.bf16 or training.fp16 else "float32")


@dataclass(frozen=True)
class Study:
    """A study whose options, text and folder were checked. `str(study)` says what is searched; `run()` runs it."""

    options: PretrainOptions
    training: TrainingOptions
    tuning: TuneOptions
    space: Space
    layer: Layer  # the model's attention
    corpus: Corpus
    fixed: dict  # options that all processes of the study must share

    @property
    def folder(self) -> Path:
        return Path(known(self.training.output_dir))

    @property
    def files(self) -> StudyFolder:
        return StudyFolder(self.folder)

    @property
    def go_on(self) -> str:
        """The command that continues the study, also from further processes."""
        return f"lighthouse tune --config {self.files.configuration} --resume"

    @property
    def begun(self) -> bool:
        """Whether there is anything to continue."""
        return self.files.fixed.is_file()

    def __str__(self) -> str:
        grid = self.tuning.sampler == "grid"
        count = f"{len(self._first()):,} settings of a grid" if grid else "TPE"
        if self.limit is not None:
            count += f", {self.limit} are trained"
        return f"{count}, the given setting first: {self.space.given}\n{self.space}"

    @property
    def limit(self) -> int | None:
        """How many trials are trained; None for all of a grid."""
        if self.tuning.trials is None and self.tuning.sampler == "tpe":
            return DEFAULT_TRIALS
        return self.tuning.trials

    def check_folder(self) -> None:
        """Raises if the folder holds a study without `resume`, or none with it."""
        folder, file = f"output_dir={str(self.folder)!r}", self.files.fixed
        if not self.training.resume:
            if file.exists():
                raise FileExistsError(
                    f"{folder} holds a study already: use another folder with --output_dir, continue that study "
                    "with --resume, or delete the folder"
                )
            return
        if not file.is_file():
            raise FileNotFoundError(f"{folder} holds no study to resume: start it without --resume")
        earlier = read_json(file)
        try:
            check_same(earlier, self.fixed, frozenset())
        except ValueError as error:
            raise ValueError(f"{folder}: {error}. To change them, start a new study in another --output_dir") from None

    def run(self, say: Say = print, status: Say = lambda line: None) -> StudyResult:
        """Trains settings until there are enough, writes the report and returns what was found.

        Args:
            say: called with a line per trial.
            status: called repeatedly with the progress of the running trial.
        """
        optuna.logging.set_verbosity(optuna.logging.WARNING)
        self.files.trials.mkdir(parents=True, exist_ok=True)
        stop = StopOnSignal(StopOnSignal.SYSTEMS)  # Ctrl-C ends a trial at once: it has no checkpoints
        with self.files.locked(say):  # of a new study as long as steps are timed
            study = self._open(stop, say, status)
        sampler = study.sampler
        while stop.received is None and (claimed := self._claim(study, sampler, say)) is not None:
            with claimed.log:
                self._try(study, claimed, stop, say, status)
        if stop.received is not None:  # in the last step of a trial, which then ends as if nothing was
            raise stop.end("after a trial")
        with self.files.locked():
            return self._conclude(study)

    # The database

    def _open(self, stop: StopOnSignal, say: Say, status: Say) -> optuna.Study:
        """The study in the folder, begun if it is new: its options, its first trials, its budget."""
        self.check_folder()  # another process may have begun meanwhile
        if not self.files.fixed.exists():
            values = {**asdict(self.tuning), **configuration.resolved(self.options, self.training)}
            values = {name: value for name, value in values.items() if value not in (None, [])}
            write_whole(self.files.configuration, configuration.text_of(values))
            write_whole(self.files.fixed, json.dumps(self.fixed, indent=1) + "\n")
        pruner: optuna.pruners.BasePruner = optuna.pruners.NopPruner()
        if self.tuning.pruner == "median":
            pruner = optuna.pruners.MedianPruner(n_startup_trials=NOT_PRUNED, n_min_trials=NOT_PRUNED)
        study = self.files.open(pruner)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
            # `group`: the ratios of levels that not every trial has. Processes must not draw the same numbers.
            seed = self.training.seed + len(study.get_trials(deepcopy=False))
            study.sampler = optuna.samplers.TPESampler(seed=seed, multivariate=True, group=True, constant_liar=True)
        if "budget" not in study.user_attrs:
            study.set_user_attr("budget", self._budget(study, stop, say, status))
        if "first" not in study.user_attrs:
            first = self._first()
            # Those queued by a process that was killed here. Optuna's own check of each takes minutes for a grid.
            there = [trial.user_attrs["parameters"] for trial in study.get_trials(deepcopy=False)]
            for setting in first:
                parameters = self.space.parameters(setting)
                given = {"given": True} if setting is first[0] else {}
                if parameters not in there:
                    study.enqueue_trial(parameters, user_attrs={"parameters": parameters, **given})
            study.set_user_attr("first", len(first))
        return study

    def _first(self) -> list[Setting]:
        if self.tuning.sampler == "tpe":
            return [self.space.given]
        return self.space.grid(self.tuning.grid_values, self.training.seed)

    def _claim(self, study: optuna.Study, sampler: optuna.samplers.BaseSampler, say: Say) -> _Claimed | None:
        """The next setting to train, locked by this process; None if there are enough or none is left."""
        skipped: list[str] = []
        while True:
            with self.files.locked():
                self.files.sweep(study, say)
                trials = study.get_trials(deepcopy=False)
                waiting = any(trial.state == TrialState.WAITING for trial in trials)
                trained = sum(trial.state != TrialState.WAITING and was_trained(trial) for trial in trials)
                done = self.limit is not None and trained >= self.limit
                exhausted = len(skipped) >= GIVE_UP_AFTER
                if done or exhausted or (self.tuning.sampler == "grid" and not waiting):
                    _say_skipped(skipped, say)
                    if exhausted:
                        say(
                            f"{len(skipped)} settings in a row were pointless or already tried: the ranges have no new "
                            "settings. Wider ranges need a new study."
                        )
                    return None
                stuck = len(skipped) >= RANDOM_AFTER
                study.sampler = optuna.samplers.RandomSampler(seed=len(trials)) if stuck else sampler
                trial = study.ask()
                setting = self.space.suggest(trial)
                trial.set_user_attr("setting", str(setting))
                trial.set_user_attr("options", self.space.values(setting))
                trial.set_user_attr("parameters", trial.params)
                reason = None
                if not trial.user_attrs.get("given") and "interruptions" not in trial.user_attrs:
                    reason = self.space.pointless(setting) or self._known(setting, trial, trials)
                if reason is None:
                    _say_skipped(skipped, say)
                    return _Claimed(trial, setting, known(take_lock(self.files.log(trial.number))))
                trial.set_user_attr(SKIPPED, reason)
                study.tell(trial, state=TrialState.FAIL)
                skipped.append(reason)

    def _known(self, setting: Setting, trial: optuna.Trial, trials: Sequence[FrozenTrial]) -> str | None:
        """Why earlier trials make this one unnecessary."""
        for earlier in trials:
            if SKIPPED in earlier.user_attrs or not was_trained(earlier):
                continue
            if earlier.params == trial.params:
                return f"the same as trial {earlier.number}"
            if "out of memory" in earlier.user_attrs.get(FAILED, ""):
                # Memory grows with rows, of the dense stage too, and with what a layer keeps of each.
                values = earlier.user_attrs["options"]
                kept = self._kept(Method.of(values))
                if setting.batch >= values[self.space.batch_option] and self._kept(setting.method) >= kept:
                    return f"needs no less memory than trial {earlier.number}, which ran out of it"
        return None

    def _kept(self, method: Method) -> int:
        """Bytes that a layer with Lighthouse keeps of a sequence between forward and backward."""
        context = self.options.context
        return self.layer.kept(context, method.length(context), local=method.local_window > 0)

    # Training

    def _try(self, study: optuna.Study, claimed: _Claimed, stop: StopOnSignal, say: Say, status: Say) -> None:
        """Trains the claimed setting and tells the study how it ended."""
        trial, setting = claimed.trial, claimed.setting
        what, folder = f"trial {trial.number}: {setting}", self.files.log(trial.number).with_suffix("")
        state, end, why, judge = TrialState.FAIL, FAILED, None, None
        if self.options.compile_layers or self.training.torch_compile:
            torch.compiler.reset()  # PyTorch compiles a layer for eight cases at most, and refuses the next
        try:
            with output_into(claimed.log):
                options, training = with_values(self.options, self.training, self.space.values(setting))
                seconds_per_step, most = None, math.inf
                if self.tuning.judge == "time":
                    seconds_per_step = self._seconds_per_step(study, setting, folder / "timing", stop, status)
                    trial.set_user_attr("seconds_per_step", seconds_per_step)
                    most = (1 + TOLERANCE) * study.user_attrs["budget"]
                training.max_steps = steps_in(study.user_attrs["budget"], options, training, seconds_per_step)
                run = self._prepared(options, made_quiet(training, folder))
                evaluations = self.tuning.evaluations
                before = evaluations * self.space.shares.index(setting.share) if self.space.shares else 0
                judge = Judge(
                    trial, run.switch_step, training.max_steps, evaluations, status, what, most=most, before=before
                )
                same = SameRows(study, run, self.files.locked)
                run.train(callbacks=[judge, same], keep_model=False, stop=stop)
            state = TrialState.COMPLETE
        except optuna.TrialPruned as pruned:
            state, end, why = TrialState.PRUNED, PRUNED, str(pruned)
        except Unequal as error:
            end, why = UNEQUAL, str(error)
        except (DoesNotFit, NotFinite) as error:
            why = str(error).split(". ")[0].split("\n")[0]
        except (RuntimeError, MemoryError) as error:
            if not out_of_memory(error):
                raise
            why = f"out of memory: {(str(error).strip() or type(error).__name__).splitlines()[0]}"
        gc.collect()
        clear_device_cache()  # else the next trial would lack the memory of a failed one
        if judge is not None:
            trial.set_user_attr("steps", judge.steps)
            trial.set_user_attr("tokens", judge.steps * run.tokens_per_step)
            trial.set_user_attr("seconds", judge.seconds)
            trial.set_user_attr("held_out", judge.held_out)
            trial.set_user_attr("switch_step", run.switch_step)
            trial.set_user_attr("stages", judge.stages)
        if why:
            trial.set_user_attr(end, why)
        loss = known(judge).held_out[-1]["loss"] if state == TrialState.COMPLETE else None
        study.tell(trial, loss, state=state)
        say(self._line(study, trial.number))

    def _prepared(self, options: PretrainOptions, training: TrainingOptions) -> Run:
        """A run on the study's text, which is found once."""
        return prepare(options, training, corpus=self.corpus)

    def _line(self, study: optuna.Study, number: int) -> str:
        trials = self._trials(study)
        trial = trials[number]
        best = min((known(t.loss) for t in trials if t.state == COMPLETE), default=None)
        end = trial.state if trial.why is None else f"{trial.state}: {trial.why}"
        if trial.state == COMPLETE and trial.loss == best:
            end = "complete, best so far"
        loss = "      " if trial.loss is None else f"{trial.loss:.4f}"
        seconds = 0.0 if trial.seconds is None else trial.seconds
        given = "  (given)" if trial.given else ""
        return f"trial {number:>3}  {trial.setting}{given}  loss {loss}  {seconds:7.1f} s  {end}"

    def _budget(self, study: optuna.Study, stop: StopOnSignal, say: Say, status: Say) -> float:
        """Seconds, or tokens, of each trial."""
        options, training = self.options, self.training
        if self.tuning.judge == "tokens":
            return training.max_steps * tokens_per_step(options, training)
        say(f"Timing {WARM_UP + TIMED} steps of each stage of the given setting, to find the time for each trial.")
        folder = self.files.trials / "given"
        try:
            with open(folder.with_suffix(".log"), "a", encoding="utf-8") as log, output_into(log):
                per_step = self._seconds_per_step(study, self.space.given, folder, stop, status)
        except (RuntimeError, MemoryError) as error:
            if not out_of_memory(error):
                raise
            raise RunFailed(
                f"The given setting, {self.space.given}, runs out of memory: give one that fits. {error}"
            ) from None
        budget = self.tuning.seconds or seconds_of(options, training, training.max_steps, per_step)
        try:
            steps = steps_in(budget, options, training, per_step)
        except Unequal as error:
            # Else the folder would keep these options, with which no study can run.
            for path in (self.files.fixed, self.files.configuration, self.files.database):
                remove(path)
            raise RunFailed(
                f"seconds={budget:g}: {error}. That is the given setting: use more --seconds or an earlier switch; "
                "--share moves the switch with the number of steps."
            ) from None
        say(f"Each trial has {budget:.1f} s of training: {steps:,} steps of the given setting.")
        return budget

    def _seconds_per_step(
        self, study: optuna.Study, setting: Setting, folder: Path, stop: StopOnSignal, status: Say
    ) -> PerStep:
        """By stage: measured in `folder`, or what was found before for the same method and batch."""
        key = f"seconds per step: {replace(setting, learning_rate=0.0, share=None)}"
        if key in study.user_attrs:
            return study.user_attrs[key]
        options, training = with_values(self.options, self.training, self.space.values(setting))
        status(f"{setting}: timing {2 * (WARM_UP + TIMED)} steps")
        found = time_steps(options, training, folder, stop, self._prepared)
        study.set_user_attr(key, found)
        return found

    # What was found

    def _trials(self, study: optuna.Study) -> list[Trial]:
        given = self.space.values(self.space.given)
        trials = [trial_of(trial, given) for trial in study.get_trials(deepcopy=False)]
        return judged(trials, self.tuning.judge, study.user_attrs["budget"])

    def _conclude(self, study: optuna.Study) -> StudyResult:
        """Writes results, report and, where a trial is comparable, the best setting's file; returns the results."""
        trials = self._trials(study)
        result = StudyResult(
            folder=str(self.folder),
            judge=self.tuning.judge,
            budget=study.user_attrs["budget"],
            sampler=self.tuning.sampler,
            device=device_name(self.training.device),
            trials=trials,
            importance={self.space.label(name): share for name, share in importance(study, trials).items()},
            notes=self.space.notes,
        )
        result.save(result.results)
        best_file = None
        remove(self.files.best)  # the best trial so far may no longer be comparable
        if result.best is not None:
            best_file = self.files.best
            write_whole(best_file, self._best_text(result.best, len(result.of(COMPLETE))))
        for name, content in page_of(result, best_file).files().items():
            write_whole(self.folder / name, content)
        return result

    def _best_text(self, best: Trial, comparable: int) -> str:
        options, training = with_values(self.options, self.training, best.options)
        training.max_steps = known(best.steps)
        values = configuration.resolved(options, training)
        del values["output_dir"]  # the study's
        head = [
            f"Trial {best.number} of the study in {self.folder}: dense held-out loss {best.loss:.4f} after "
            f"{best.steps} steps,",
            f"the best of {comparable} comparable trials. A longer run: lighthouse pretrain --config FILE --steps N",
        ]
        return "".join(f"# {line}\n" for line in head) + configuration.text_of(values)


@dataclass(frozen=True)
class _Claimed:
    """A setting that this process trains; `log` is open and locked."""

    trial: optuna.Trial
    setting: Setting
    log: IO[str]


def _say_skipped(reasons: list[str], say: Say) -> None:
    if reasons:
        one = len(reasons) == 1
        say(f"skipped {len(reasons)} setting{'' if one else 's'}{'' if one else ', the last'}: {reasons[-1]}")
