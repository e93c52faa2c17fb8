"""A study of settings: each a short two-stage run, judged by its dense held-out loss at equal time or equal tokens.

    from lighthouse.studies.tune import TuneOptions, tune

    result = tune(options, TrainingOptions(output_dir="runs/tune", max_steps=200), TuneOptions(trials=20))

Optuna proposes the settings and keeps them in SQLite in the study's folder; `Run.train` trains them. Any number of
processes of a machine may work on one study, and each may be killed at any moment.

Equal time is made beforehand: the schedule of the learning rate and the switch need the number of steps. So a few steps
of each stage are timed, and a trial gets as many steps as fit into the budget, with a whole schedule. What it really
took stands beside its loss, and a trial that took more or less than each has is not compared (`study.judged`).

The trap is a dead process: Optuna leaves its trial "running" for ever. Each running trial's log is locked by its
process, and the system takes the lock away with the process. Who finds a trial running and unlocked, counts it as
interrupted and lines its setting up again.
"""

from __future__ import annotations

import bisect
import copy
import fcntl
import gc
import json
import math
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import IO

import optuna
import torch
from accelerate.utils.memory import clear_device_cache
from optuna.trial import TrialState
from sqlalchemy import URL

from lighthouse.core.devices import device_name
from lighthouse.core.method import check_select_topk
from lighthouse.core.plan import sub_length
from lighthouse.report.studied import (
    COMPLETE,
    FAILED,
    INTERRUPTED,
    PRUNED,
    RUNNING,
    SKIPPED,
    TOLERANCE,
    UNEQUAL,
    WAITING,
    StudyResult,
    Trial,
    judged,
    too_few,
)
from lighthouse.report.study import page_of
from lighthouse.studies.search import Setting, Space
from lighthouse.studies.trial import (
    Judge,
    SameRows,
    Say,
    StepClock,
    Timed,
    Unequal,
    made_quiet,
    other_text,
    out_of_memory,
    output_into,
    take_lock,
)
from lighthouse.studies.tune_options import TuneOptions
from lighthouse.training import checkpoints, configuration
from lighthouse.training.callbacks import StopOnSignal
from lighthouse.training.memory import DoesNotFit
from lighthouse.training.options import PretrainOptions, TrainingOptions
from lighthouse.training.result import DENSE, LIGHTHOUSE, HeldOut, NotFinite, RunFailed, Stopped
from lighthouse.training.resume import FREE_ON_RESUME, check_same
from lighthouse.training.run import Run, prepare, tokens_per_step

DATABASE = "study.db"
FIXED = "study.json"
CONFIGURATION = "study.yaml"
BEST = "best.yaml"
TRIALS = "trials"
NAME = "lighthouse"

DEFAULT_TRIALS = 20
WARM_UP, TIMED = 2, 4  # steps of each stage before a trial
NOT_PRUNED = 4  # complete trials before any is pruned
RANDOM_AFTER = 25  # settings skipped in a row: TPE is stuck where nothing is left
GIVE_UP_AFTER = 200
INTERRUPTIONS = 3  # of one setting: a fourth process is not risked on it
FEWEST_FOR_IMPORTANCE = 4

STATES = {
    TrialState.COMPLETE: COMPLETE,
    TrialState.PRUNED: PRUNED,
    TrialState.RUNNING: RUNNING,
    TrialState.WAITING: WAITING,
}


def tune(
    options: PretrainOptions | None = None,
    training: TrainingOptions | None = None,
    tuning: TuneOptions | None = None,
    *,
    say: Say = print,
) -> StudyResult:
    """Tries settings around the given one and returns what was found; the report is in `training.output_dir`.

    Args:
        options, training: of the given setting, as for `pretrain`. `max_steps` are those of a trial.
        tuning: what is searched, and how it is judged.
        say: is told a line per trial.

    Raises:
        ValueError, FileNotFoundError, FileExistsError: as `prepare_study` does, before any work.
        RunFailed: the study cannot go on; `training.resume` goes on with it when that is mended.
    """
    return prepare_study(options, training, tuning).run(say)


def prepare_study(
    options: PretrainOptions | None = None, training: TrainingOptions | None = None, tuning: TuneOptions | None = None
) -> Study:
    """Checks a study entirely and does no work yet.

    Raises:
        ValueError: an option that does not fit, nothing to search, or a study that was begun with other options.
        FileExistsError, FileNotFoundError: the folder holds a study already, or there is none to resume.
    """
    options, training, tuning = options or PretrainOptions(), training or TrainingOptions(), tuning or TuneOptions()
    if not options.uses_lighthouse or options.lighthouse_only:
        raise ValueError("settings are judged behind a dense stage: both stages are needed, --share 0.6 for one")
    if training.world_size > 1:
        raise ValueError(
            f"{training.world_size} processes by torchrun: a trial is trained by one; start lighthouse tune --resume "
            "once for each device instead, as docs/tune.md shows"
        )
    for name in ("resume_from_checkpoint", "load_best_model_at_end"):
        if getattr(training, name):
            raise ValueError(f"{name}={getattr(training, name)!r}: trials begin anew and are judged at their end")
    space = Space.of(options, training, tuning)
    if tuning.seconds is None:
        why = _too_few(options, training, training.max_steps)
        if why is not None:
            raise ValueError(f"max_steps={training.max_steps}: {why}; take more --max_steps, or another --share")
    quiet = made_quiet(training, Path(training.output_dir) / "given")
    fixed = prepare(options, quiet).settings()
    free = FREE_ON_RESUME - {"max_steps"}
    fixed = {name: value for name, value in fixed.items() if name not in free}
    fixed |= {name: value for name, value in asdict(tuning).items() if name != "trials"}
    if tuning.judge == "time":  # which says nothing on a machine that is faster
        fixed |= {"machine": device_name(training.device), "torch": torch.__version__}
    study = Study(options, training, tuning, space, json.loads(json.dumps(fixed)))
    study.check_folder()
    return study


@dataclass(frozen=True)
class Study:
    """A study whose options, text and folder were found good. `str(study)` tells what is searched; `run()` does it."""

    options: PretrainOptions
    training: TrainingOptions
    tuning: TuneOptions
    space: Space
    fixed: dict  # what a process that shares the study must have alike

    @property
    def folder(self) -> Path:
        return Path(self.training.output_dir)

    @property
    def go_on(self) -> str:
        """The command that goes on with the study, and with which further processes share it."""
        return f"lighthouse tune --config {self.folder / CONFIGURATION} --resume"

    @property
    def begun(self) -> bool:
        """Whether there is anything to go on with."""
        return (self.folder / FIXED).is_file()

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
        """Raises if the folder does not hold what `resume` says it does."""
        folder, file = f"output_dir={str(self.folder)!r}", self.folder / FIXED
        if not self.training.resume:
            if file.exists():
                raise FileExistsError(
                    f"{folder} holds a study already: take another folder with --output_dir, go on with that study "
                    "with --resume, or delete the folder"
                )
            return
        if not file.is_file():
            raise FileNotFoundError(f"{folder} holds no study to resume: start it without --resume")
        earlier = json.loads(file.read_text(encoding="utf-8"))
        try:
            check_same(earlier, self.fixed, frozenset())
        except ValueError as error:
            raise ValueError(f"{folder}: {error}. With others it is another study, in another --output_dir") from None

    def run(self, say: Say = print, status: Say = lambda line: None) -> StudyResult:
        """Trains settings until there are enough, writes the report and returns what was found.

        Args:
            say: is told a line per trial.
            status: is told again and again where the running trial is.
        """
        optuna.logging.set_verbosity(optuna.logging.WARNING)
        (self.folder / TRIALS).mkdir(parents=True, exist_ok=True)
        stop = StopOnSignal()
        with self._locked(say):  # of a new study as long as steps are timed
            study = self._open(stop, say, status)
        sampler = study.sampler
        while stop.received is None and (claimed := self._claim(study, sampler, say)) is not None:
            with claimed.log:
                self._try(study, claimed, stop, say, status)
        if stop.received is not None:  # in the last step of a trial, which then ends as if nothing was
            raise Stopped("Stopped by a signal behind a trial.")
        with self._locked():
            return self._conclude(study)

    # The folder and the database

    @contextmanager
    def _locked(self, say: Say = lambda line: None) -> Iterator[None]:
        """One process at a time: it looks at what there is and adds to it."""
        path = self.folder / "lock"
        file = take_lock(path)
        if file is None:
            say("Waiting for another process that is at the study's folder.")
            file = open(path, "a", encoding="utf-8")
        with file:
            fcntl.flock(file, fcntl.LOCK_EX)
            yield

    def _open(self, stop: StopOnSignal, say: Say, status: Say) -> optuna.Study:
        """The study in the folder, begun if it is new: its options, its first trials, its budget."""
        self.check_folder()  # another process may have begun meanwhile
        if not (self.folder / FIXED).exists():
            values = {**asdict(self.tuning), **configuration.resolved(self.options, self.training)}
            values = {name: value for name, value in values.items() if value not in (None, [])}
            checkpoints.write_whole(self.folder / CONFIGURATION, configuration.text_of(values))
            checkpoints.write_whole(self.folder / FIXED, json.dumps(self.fixed, indent=1) + "\n")
        url = URL.create("sqlite", database=str(self.folder / DATABASE)).render_as_string()
        storage = optuna.storages.RDBStorage(url, engine_kwargs={"connect_args": {"timeout": 60}})
        pruner = optuna.pruners.NopPruner()
        if self.tuning.pruner == "median":
            # The first loss behind the switch says how far the jump was and not how far the recovery goes.
            pruner = optuna.pruners.MedianPruner(n_startup_trials=NOT_PRUNED, n_warmup_steps=2)
        study = optuna.create_study(
            storage=storage, study_name=NAME, direction="minimize", pruner=pruner, load_if_exists=True
        )
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
            # `group`: the ratios of levels that not every trial has. Processes must not draw the same numbers.
            seed = self.training.seed + len(study.get_trials(deepcopy=False))
            study.sampler = optuna.samplers.TPESampler(seed=seed, multivariate=True, group=True, constant_liar=True)
        if "budget" not in study.user_attrs:
            study.set_user_attr("budget", self._budget(study, stop, say, status))
        if "first" not in study.user_attrs:
            first = self._first()
            # Those that a process which was killed here lined up. Optuna's own look, at each, takes minutes for a grid.
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

    def _log(self, number: int) -> Path:
        return self.folder / TRIALS / f"{number:04}.log"

    def _sweep(self, study: optuna.Study, say: Say) -> None:
        """Lines up again what processes that are no more were at."""
        running = study.get_trials(deepcopy=False, states=(TrialState.RUNNING,))
        left = {trial.number for trial in running if self._is_free(trial.number)}
        # Read again: one may have ended, and given its lock back, since it was read.
        for trial in study.get_trials(deepcopy=False, states=(TrialState.RUNNING,)):
            if trial.number not in left:
                continue
            attributes = trial.user_attrs
            # Without a setting it was killed at its beginning, with a reason at its end. Told last: a kill between the
            # two lines has its setting tried twice and not never.
            if "parameters" in attributes and not {"skipped", FAILED, UNEQUAL} & attributes.keys():
                checkpoints.remove(self._log(trial.number).with_suffix(""))
                self._line_up_again(study, trial, say)
            study.tell(trial.number, state=TrialState.FAIL)

    def _is_free(self, number: int) -> bool:
        """Whether no process is at the trial."""
        lock = take_lock(self._log(number))
        if lock is not None:
            lock.close()
        return lock is not None

    def _line_up_again(self, study: optuna.Study, trial: optuna.trial.FrozenTrial, say: Say) -> None:
        attributes = trial.user_attrs
        times = attributes.get("interruptions", 0) + 1
        if times >= INTERRUPTIONS:
            say(f"trial {trial.number}: interrupted {times} times by now, its setting is not tried again")
            return
        again = {name: attributes[name] for name in ("parameters", "given") if name in attributes}
        study.enqueue_trial(attributes["parameters"], user_attrs={"interruptions": times, **again})
        say(f"trial {trial.number}: was interrupted, its setting is tried again")

    def _claim(self, study: optuna.Study, sampler, say: Say) -> _Claimed | None:
        """The next setting to train, locked as this process's; None where there are enough, or none is left."""
        skipped: list[str] = []
        while True:
            with self._locked():
                self._sweep(study, say)
                trials = study.get_trials(deepcopy=False)
                waiting = any(trial.state == TrialState.WAITING for trial in trials)
                trained = sum(trial.state != TrialState.WAITING and _trained(trial) for trial in trials)
                done = self.limit is not None and trained >= self.limit
                exhausted = len(skipped) >= GIVE_UP_AFTER
                if done or exhausted or (self.tuning.sampler == "grid" and not waiting):
                    _say_skipped(skipped, say)
                    if exhausted:
                        say(
                            f"{len(skipped)} settings in a row were pointless or tried before: the ranges hold nothing "
                            "new. Wider ones are another study."
                        )
                    return None
                stuck = len(skipped) >= RANDOM_AFTER
                study.sampler = optuna.samplers.RandomSampler(seed=len(trials)) if stuck else sampler
                trial = study.ask()
                setting = self.space.suggest(trial)
                trial.set_user_attr("setting", str(setting))
                trial.set_user_attr("options", self._values(setting))
                trial.set_user_attr("parameters", trial.params)
                reason = None
                if not trial.user_attrs.get("given") and "interruptions" not in trial.user_attrs:
                    reason = self.space.pointless(setting) or self._known(setting, trial, trials)
                if reason is None:
                    log = take_lock(self._log(trial.number))
                    _say_skipped(skipped, say)
                    return _Claimed(trial, setting, log)
                trial.set_user_attr("skipped", reason)
                study.tell(trial, state=TrialState.FAIL)
                skipped.append(reason)

    def _known(self, setting: Setting, trial: optuna.Trial, trials: Sequence) -> str | None:
        """Why earlier trials tell how this one would end."""
        for earlier in trials:
            if "skipped" in earlier.user_attrs or not _trained(earlier):
                continue
            if earlier.params == trial.params:
                return f"the same as trial {earlier.number}"
            if "out of memory" in earlier.user_attrs.get("failed", ""):
                # Memory grows with rows, of the dense stage too, and with the sub-sequence.
                length, batch = earlier.user_attrs["memory"]
                if setting.batch >= batch and self._length(setting) >= length:
                    return f"needs no less memory than trial {earlier.number}, which ran out of it"
        return None

    def _length(self, setting: Setting) -> int:
        return sub_length(self.options.context, (1, *setting.windows), check_select_topk(setting.select_topk))

    # Training

    def _values(self, setting: Setting) -> dict:
        """The setting as options by name."""
        return {
            "pool_ratios": [f"1/{window}" for window in setting.windows],
            "select_topk": setting.select_topk,
            "learning_rate": setting.learning_rate,
            self.space.batch_option: setting.batch,
        }

    def _with(self, values: dict) -> tuple[PretrainOptions, TrainingOptions]:
        """The study's options with a setting's in their place."""
        ours = {name: values[name] for name in ("pool_ratios", "select_topk")}
        training = copy.deepcopy(self.training)
        for name in values.keys() - ours.keys():
            setattr(training, name, values[name])
        return replace(self.options, **ours), training

    def _try(self, study: optuna.Study, claimed: _Claimed, stop: StopOnSignal, say: Say, status: Say) -> None:
        """Trains the claimed setting and tells the study how it ended."""
        trial, setting = claimed.trial, claimed.setting
        what, folder = f"trial {trial.number}: {setting}", self._log(trial.number).with_suffix("")
        state, end, why, judge = TrialState.FAIL, FAILED, None, None
        try:
            with output_into(claimed.log):
                options, training = self._with(self._values(setting))
                seconds_per_step, most = None, math.inf
                if self.tuning.judge == "time":
                    seconds_per_step = self._seconds_per_step(study, setting, folder / "timing", stop, status)
                    trial.set_user_attr("seconds_per_step", seconds_per_step)
                    most = (1 + TOLERANCE) * study.user_attrs["budget"]
                training.max_steps = self._steps(study.user_attrs["budget"], options, training, seconds_per_step)
                run = self._prepared(options, made_quiet(training, folder))
                judge = Judge(
                    trial, run.switch_step, training.max_steps, self.tuning.evaluations, status, what, most=most
                )
                same = SameRows(study, run, self._locked)
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
        clear_device_cache()  # else what a failed trial held would be missing in the next
        if judge is not None:
            trial.set_user_attr("steps", judge.steps)
            trial.set_user_attr("tokens", judge.steps * run.tokens_per_step)
            trial.set_user_attr("seconds", judge.seconds)
            trial.set_user_attr("held_out", judge.held_out)
            trial.set_user_attr("switch_step", run.switch_step)
            trial.set_user_attr("stages", judge.stages)
        if end == FAILED and why:
            trial.set_user_attr("memory", (self._length(setting), setting.batch))
        if why:
            trial.set_user_attr(end, why)
        loss = judge.held_out[-1]["loss"] if state == TrialState.COMPLETE else None
        study.tell(trial, loss, state=state)
        say(self._line(study, trial.number))

    def _prepared(self, options: PretrainOptions, training: TrainingOptions) -> Run:
        """A run of a trial. The text is looked at again: trials on other text would not compare."""
        run = prepare(options, training)
        text = run.settings()["text"]
        if text != self.fixed["text"]:
            raise other_text(self.fixed["text"], text)
        return run

    def _line(self, study: optuna.Study, number: int) -> str:
        trials = self._trials(study)
        trial = trials[number]
        best = min((t.loss for t in trials if t.state == COMPLETE), default=None)
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
        say(f"Timing {WARM_UP + TIMED} steps of each stage of the given setting, for the time that each trial has.")
        folder = self.folder / TRIALS / "given"
        try:
            with open(folder.with_suffix(".log"), "a", encoding="utf-8") as log, output_into(log):
                per_step = self._seconds_per_step(study, self.space.given, folder, stop, status)
        except (RuntimeError, MemoryError) as error:
            if not out_of_memory(error):
                raise
            raise RunFailed(
                f"The given setting, {self.space.given}, runs out of memory: give one that fits. {error}"
            ) from None
        budget = self.tuning.seconds or _seconds(options, training, training.max_steps, per_step)
        try:
            steps = self._steps(budget, options, training, per_step)
        except Unequal as error:
            # Else these options would be the folder's, where only others do.
            for name in (FIXED, CONFIGURATION, DATABASE):
                checkpoints.remove(self.folder / name)
            raise RunFailed(
                f"seconds={budget:g}: {error}. That is the given setting: take more --seconds or an earlier switch; "
                "--share moves it with the number of steps."
            ) from None
        say(f"Each trial has {budget:.1f} s of training: {steps:,} steps of the given setting.")
        return budget

    def _steps(self, budget: float, options, training, seconds_per_step: dict | None) -> int:
        """How many steps fit into the budget, to the nearest. Raises `Unequal` where these say nothing."""
        if seconds_per_step is None:
            steps = round(budget / tokens_per_step(options, training))
        else:
            most = 2 + int(budget / min(seconds_per_step.values()))
            numbers = range(1, most + 1)
            steps = bisect.bisect_right(
                numbers, budget, key=lambda steps: _seconds(options, training, steps - 0.5, seconds_per_step)
            )
        why = _too_few(options, training, steps)
        if why is not None:
            of_each = f"{budget:,.0f} tokens" if seconds_per_step is None else f"{budget:,.1f} s"
            raise Unequal(f"{of_each} are {why}")
        return steps

    def _seconds_per_step(
        self, study: optuna.Study, setting: Setting, folder: Path, stop: StopOnSignal, status: Say
    ) -> dict[str, float]:
        """By stage: measured in `folder`, or what was found before for the same levels, parents and batch."""
        key = f"seconds per step: {replace(setting, learning_rate=0.0)}"
        if key in study.user_attrs:
            return study.user_attrs[key]
        options, training = self._with(self._values(setting))
        steps = WARM_UP + TIMED
        options = replace(options, switch_step=steps, switch_tokens=None)
        training.max_steps = 2 * steps
        status(f"{setting}: timing {2 * steps} steps")
        clock = StepClock(training.device)
        checkpoints.remove(folder)
        try:
            run = self._prepared(options, made_quiet(training, folder))
            run.train(callbacks=[clock], keep_model=False, stop=stop)
        except Timed:
            pass
        finally:
            checkpoints.remove(folder)
        # The fastest: what the device can do, whoever else uses it just now.
        found = {LIGHTHOUSE: min(clock.seconds[WARM_UP:steps]), DENSE: min(clock.seconds[steps + WARM_UP :])}
        study.set_user_attr(key, found)
        return found

    # What was found

    def _trials(self, study: optuna.Study) -> list[Trial]:
        trials = [_trial_of(trial) for trial in study.get_trials(deepcopy=False)]
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
            importance=self._importance(study, trials),
            notes=self.space.notes,
        )
        result.save(result.results)
        best_file = None
        checkpoints.remove(self.folder / BEST)  # a trial that was best may not be comparable by now
        if result.best is not None:
            best_file = self.folder / BEST
            checkpoints.write_whole(best_file, self._best_text(result))
        for name, content in page_of(result, best_file).files().items():
            checkpoints.write_whole(self.folder / name, content)
        return result

    def _best_text(self, result: StudyResult) -> str:
        best = result.best
        options, training = self._with(best.options)
        training.max_steps = best.steps
        values = configuration.resolved(options, training)
        del values["output_dir"]  # the study's
        head = [
            f"Trial {best.number} of the study in {self.folder}: dense held-out loss {best.loss:.4f} behind "
            f"{best.steps} steps,",
            f"the best of {len(result.of(COMPLETE))} comparable trials. A longer run: lighthouse pretrain --config "
            "FILE --steps N",
        ]
        return "".join(f"# {line}\n" for line in head) + configuration.text_of(values)

    def _importance(self, study: optuna.Study, trials: Sequence[Trial]) -> dict[str, float]:
        """Each parameter's share in what makes a trial one of the best, by PED-ANOVA; empty for too few trials."""
        complete = [trial.number for trial in trials if trial.state == COMPLETE]
        if len(complete) < FEWEST_FOR_IMPORTANCE:
            return {}
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            of_them = optuna.create_study(direction="minimize")
            of_them.add_trials([study.get_trials(deepcopy=False)[number] for number in complete])
            found = optuna.importance.get_param_importances(of_them)
        return {self.space.label(name): share for name, share in found.items()}


@dataclass(frozen=True)
class _Claimed:
    """A setting that this process trains; `log` is open and locked."""

    trial: optuna.Trial
    setting: Setting
    log: IO


def _too_few(options: PretrainOptions, training: TrainingOptions, steps: int) -> str | None:
    return too_few(steps, options.lighthouse_steps(steps, tokens_per_step(options, training)))


def _seconds(options: PretrainOptions, training: TrainingOptions, steps: float, per_step: dict[str, float]) -> float:
    """What so many steps take."""
    lighthouse = options.lighthouse_steps(steps, tokens_per_step(options, training))
    return lighthouse * per_step[LIGHTHOUSE] + (steps - lighthouse) * per_step[DENSE]


def _trained(trial) -> bool:
    """Whether a trial counts: it was trained or is being trained, to whatever end but an interruption."""
    return trial.state != TrialState.FAIL or bool({FAILED, UNEQUAL} & trial.user_attrs.keys())


def _say_skipped(reasons: list[str], say: Say) -> None:
    if reasons:
        one = len(reasons) == 1
        say(f"skipped {len(reasons)} setting{'' if one else 's'}{'' if one else ', the last'}: {reasons[-1]}")


def _trial_of(trial: optuna.trial.FrozenTrial) -> Trial:
    attributes = trial.user_attrs
    state = STATES.get(trial.state)
    if state is None:
        state = next((end for end in (FAILED, UNEQUAL, SKIPPED) if end in attributes), INTERRUPTED)
    return Trial(
        number=trial.number,
        state=state,
        setting=attributes.get("setting", ""),
        options=attributes.get("options", {}),
        parameters=trial.params,
        given=attributes.get("given", False),
        why=attributes.get(state),
        loss=trial.value if state == COMPLETE else None,
        seconds=attributes.get("seconds"),
        steps=attributes.get("steps"),
        tokens=attributes.get("tokens"),
        held_out=[HeldOut(**point) for point in attributes.get("held_out", [])],
        seconds_per_step=attributes.get("seconds_per_step"),
        switch_step=attributes.get("switch_step"),
        stages=attributes.get("stages", {}),
    )
