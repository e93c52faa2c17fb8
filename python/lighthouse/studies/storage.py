"""A study's folder: its files, Optuna's database, and which trials still have a process.

Optuna leaves the trial of a dead process "running" for ever. So each running trial's log is locked by its process, and
the system releases the lock when the process ends. A process that finds a running trial unlocked counts it as
interrupted and queues its setting again.
"""

# Not by Optuna's heartbeat with its callback that retries: `ask` records none, so a killed trial would never be found;
# with one, a process counts as dead after some time: a study that is resumed at once misses it, and a suspended
# process counts as dead.

from __future__ import annotations

import fcntl
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import optuna
from optuna.distributions import CategoricalDistribution, IntDistribution
from optuna.trial import FrozenTrial, TrialState, create_trial
from sqlalchemy import URL

from lighthouse.core.files import remove
from lighthouse.report.studied import (
    COMPLETE,
    FAILED,
    INTERRUPTED,
    PRUNED,
    RUNNING,
    SKIPPED,
    UNEQUAL,
    WAITING,
    Trial,
)
from lighthouse.studies.trial import Say
from lighthouse.training.result import HeldOut

INTERRUPTIONS = 3  # of one setting: a fourth process is not risked on it
NAME = "lighthouse"
FEWEST_FOR_IMPORTANCE = 4
BEST = 5  # trials, or a tenth where that is more, or half where that is less: what two have in common may be chance

STATES = {
    TrialState.COMPLETE: COMPLETE,
    TrialState.PRUNED: PRUNED,
    TrialState.RUNNING: RUNNING,
    TrialState.WAITING: WAITING,
}


@dataclass(frozen=True)
class StudyFolder:
    """Where a study is kept, by any number of processes of one machine."""

    path: Path

    @property
    def fixed(self) -> Path:
        """The options that all processes of the study must share."""
        return self.path / "study.json"

    @property
    def configuration(self) -> Path:
        """The study's options, as --config takes them."""
        return self.path / "study.yaml"

    @property
    def database(self) -> Path:
        return self.path / "study.db"

    @property
    def best(self) -> Path:
        """The best setting, as --config of a run takes it."""
        return self.path / "best.yaml"

    @property
    def trials(self) -> Path:
        return self.path / "trials"

    def log(self, number: int) -> Path:
        """What a trial prints; without its suffix, the trial's own folder."""
        return self.trials / f"{number:04}.log"

    @contextmanager
    def locked(self, say: Say = lambda line: None) -> Iterator[None]:
        """Held by one process at a time, which reads the study and adds to it."""
        path = self.path / "lock"
        file = take_lock(path)
        if file is None:
            say("Waiting for another process that is using the study's folder.")
            file = open(path, "a", encoding="utf-8")
        with file:
            fcntl.flock(file, fcntl.LOCK_EX)
            yield

    def open(self, pruner: optuna.pruners.BasePruner) -> optuna.Study:
        """The study in the database, which is made if it does not exist."""
        url = URL.create("sqlite", database=str(self.database)).render_as_string()
        storage = optuna.storages.RDBStorage(url, engine_kwargs={"connect_args": {"timeout": 60}})
        return optuna.create_study(
            storage=storage, study_name=NAME, direction="minimize", pruner=pruner, load_if_exists=True
        )

    def sweep(self, study: optuna.Study, say: Say) -> None:
        """Queues again the settings whose processes have ended."""
        running = study.get_trials(deepcopy=False, states=(TrialState.RUNNING,))
        left = {trial.number for trial in running if self._is_free(trial.number)}
        # Read again: one may have ended and released its lock since it was read.
        for trial in study.get_trials(deepcopy=False, states=(TrialState.RUNNING,)):
            if trial.number not in left:
                continue
            attributes = trial.user_attrs
            # Without a setting it was killed at its beginning, with a reason at its end. Told last: a kill between the
            # two lines has its setting tried twice, not never.
            if "parameters" in attributes and not {SKIPPED, FAILED, UNEQUAL} & attributes.keys():
                remove(self.log(trial.number).with_suffix(""))
                _line_up_again(study, trial, say)
            study.tell(trial.number, state=TrialState.FAIL)

    def _is_free(self, number: int) -> bool:
        """Whether no process runs the trial."""
        lock = take_lock(self.log(number))
        if lock is not None:
            lock.close()
        return lock is not None


def _line_up_again(study: optuna.Study, trial: FrozenTrial, say: Say) -> None:
    attributes = trial.user_attrs
    times = attributes.get("interruptions", 0) + 1
    if times >= INTERRUPTIONS:
        say(f"trial {trial.number}: interrupted {times} times, its setting is not tried again")
        return
    again: dict[str, Any] = {name: attributes[name] for name in ("parameters", "given") if name in attributes}
    study.enqueue_trial(attributes["parameters"], user_attrs={"interruptions": times, **again})
    say(f"trial {trial.number}: was interrupted, its setting is tried again")


def take_lock(path: Path) -> IO[str] | None:
    """The file, open and locked as long as this process lives; None where another process has it."""
    file = open(path, "a", encoding="utf-8")
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        file.close()
        return None
    return file


def was_trained(trial: FrozenTrial) -> bool:
    """Whether a trial counts: it is being trained, or ended in any way but by an interruption."""
    return trial.state != TrialState.FAIL or bool({FAILED, UNEQUAL} & trial.user_attrs.keys())


def trial_of(trial: FrozenTrial, given: Mapping[str, Any]) -> Trial:
    """A trial as the database has it, for results and reports.

    An option that it lacks was not searched by the version that made it: it had the `given` setting's.
    """
    attributes = trial.user_attrs
    options = attributes.get("options", {})
    state = STATES.get(trial.state)
    if state is None:
        state = next((end for end in (FAILED, UNEQUAL, SKIPPED) if end in attributes), INTERRUPTED)
    return Trial(
        number=trial.number,
        state=state,
        setting=attributes.get("setting", ""),
        options={**given, **options} if options else {},
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


def importance(study: optuna.Study, trials: Sequence[Trial]) -> dict[str, float]:
    """Each parameter's share in what makes a trial one of the best, by PED-ANOVA; empty for too few trials."""
    complete = [trial.number for trial in trials if trial.state == COMPLETE]
    if len(complete) < FEWEST_FOR_IMPORTANCE:
        return {}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        of_them = optuna.create_study(direction="minimize")
        of_them.add_trials([_with_places(study.get_trials(deepcopy=False)[number]) for number in complete])
        part = min(0.5, max(0.1, BEST / len(complete)))
        evaluator = optuna.importance.PedAnovaImportanceEvaluator(target_quantile=part)
        return optuna.importance.get_param_importances(of_them, evaluator=evaluator)


def _with_places(trial: FrozenTrial) -> FrozenTrial:
    """The same with each candidate's place among the others, smallest first.

    PED-ANOVA smooths unordered choices so much that after a dozen trials it finds nothing in them.
    """
    parameters, distributions = dict(trial.params), dict(trial.distributions)
    for name, distribution in trial.distributions.items():
        if isinstance(distribution, CategoricalDistribution):
            parameters[name] = distribution.choices.index(parameters[name])
            distributions[name] = IntDistribution(0, len(distribution.choices) - 1)
    return create_trial(params=parameters, distributions=distributions, value=trial.value)
