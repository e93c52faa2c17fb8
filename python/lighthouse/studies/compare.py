"""The arms of a comparison, for one or several seeds, one run after the other; and the model to ship.

    from lighthouse.studies.compare import compare, compare_defaults

    comparison = compare(PretrainOptions(data="books"), TrainingOptions(output_dir="runs/compare", max_steps=500))

All runs of a seed have the same first weights, text, order of it, steps and schedule: they differ in the attention
alone (`arms`). Each is a whole run of `lighthouse pretrain` in its own folder, `seed-0/dense`, `seed-0/window` and so
on, and is resumed like one. When all are finished, each model is evaluated, one is exported, and the report is made.
"""

from __future__ import annotations

import copy
import ctypes
import gc
import itertools
from collections.abc import Callable, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path

import torch

from lighthouse.core.files import NO_SPACE, write_whole
from lighthouse.core.method import Method
from lighthouse.export.card import settings_shown
from lighthouse.export.export import ExportFailed, NoSpace, export
from lighthouse.export.plain import NEW_TOKENS, PlainProcessFailed, inference
from lighthouse.report import standings
from lighthouse.report.checklist import checklist
from lighthouse.report.compared import Comparison, Seed, Stripped, arm_to_ship, which_loss
from lighthouse.report.comparison import page
from lighthouse.report.known import known
from lighthouse.studies.arms import DEFAULT_ARMS, checked, options_of
from lighthouse.studies.evaluated import NotEvaluated, evaluate_run
from lighthouse.text.data import Corpus, find_corpus, key_of
from lighthouse.text.tokenizer import load_tokenizer
from lighthouse.training.callbacks import StopOnSignal
from lighthouse.training.depends import FREE_BETWEEN_RUNS
from lighthouse.training.form import form_of, found_by
from lighthouse.training.options import PretrainOptions, TrainingOptions
from lighthouse.training.result import RESULTS, DiskFull, PretrainResult, read_json
from lighthouse.training.resume import MODEL, SETTINGS, check_same
from lighthouse.training.run import Run, prepare
from lighthouse.training.space import check_writable

OLD_ARM = "two-stage"  # of comparisons that had two arms

HOW_TO_GO_ON = "The same command with --resume continues from there."


def compare_defaults(folder: str | Path = "runs/compare", *, resume: bool = False) -> dict:
    """Options, by name, of a comparison that two processor cores finish in minutes.

    With Lighthouse in all of its four layers so short a run ended higher (docs/compare.md): two stay dense. The output
    folder is the first of `folder`, `folder-2`, ... that does not exist; to resume, the last that does.
    """
    return {
        "model": "nano",
        "context": 4096,
        "held_out": 8,
        "share": 0.65,
        "dense_layers": 1,
        "max_steps": 240,
        "max_grad_norm": 0.3,
        "eval_on_start": True,
        "output_dir": _latest(Path(folder)) if resume else _free(Path(folder)),
    }


def compare(
    options: PretrainOptions | None = None,
    training: TrainingOptions | None = None,
    *,
    arms: Sequence[str] = DEFAULT_ARMS,
    seeds: Sequence[int] | None = None,
    say: Callable[[str], None] = lambda message: None,
) -> Comparison | None:
    """Trains each arm with each seed, evaluates the models, strips and exports one, and writes the report.

    Args:
        options, training: as for `pretrain`. `training.output_dir` is the folder of all runs; with `training.resume`
            finished runs in it are read, and an interrupted one continues.
        arms: "dense", the baseline, and at least one of "window", "published" and "lighthouse" (`studies.arms`).
        seeds: of the weights and of the order of the text; by default only `training.seed`.
        say: called with a line for each part of the work.

    Returns:
        The results; None in all processes but the first. The folder then has `report.html`, `report.md` with its
        pictures, `results.json`, and in `model` the exported model of the lighthouse run with the lowest loss, or
        without that arm, of the other arm with the lowest loss.

    Raises:
        ValueError, FileNotFoundError, FileExistsError: before any work, as `prepare` does, and for options with which
            nothing can be compared.
        RunFailed: as `Run.train` does; a full disk at the end too.
    """
    return prepare_comparison(options, training, arms=arms, seeds=seeds).run(say)


def prepare_comparison(
    options: PretrainOptions | None = None,
    training: TrainingOptions | None = None,
    *,
    arms: Sequence[str] = DEFAULT_ARMS,
    seeds: Sequence[int] | None = None,
) -> Plan:
    """Checks all runs of a comparison and does no work yet; the arguments are those of `compare`."""
    options, training = options or PretrainOptions(), training or TrainingOptions()
    seeds = [training.seed] if seeds is None else list(seeds)
    arms = checked(arms)
    _check(options, training, seeds)
    its = options_of(options, arms)
    folder = Path(known(training.output_dir))
    _check_folder(folder, training.resume)
    runs: list[PlannedRun] = []
    corpus: Corpus | None = None
    for seed in seeds:
        for arm in arms:
            place = folder / f"seed-{seed}" / arm
            run, corpus = _prepare_one(its[arm], training, place, seed, corpus)
            runs.append(PlannedRun(seed, arm, place, run, corpus))
    return Plan(folder, runs, training)


def _check(options: PretrainOptions, training: TrainingOptions, seeds: list[int]) -> None:
    if not options.uses_lighthouse:
        raise ValueError("a comparison needs steps with Lighthouse: give a share above 0 and leave out dense_only")
    if options.lighthouse_only:
        raise ValueError("a comparison needs dense steps after those with Lighthouse: leave out lighthouse_only")
    if training.eval_strategy == "no":
        raise ValueError("eval_strategy='no': a comparison needs held-out losses; use steps")
    if training.resume_from_checkpoint is not None:
        raise ValueError(
            f"resume_from_checkpoint={training.resume_from_checkpoint!r}: a comparison has several runs, which "
            "continue with resume"
        )
    if not seeds or len(set(seeds)) < len(seeds):
        raise ValueError(f"seeds={seeds}: one seed or several different ones are needed")
    wrong = [seed for seed in seeds if not 0 <= seed < 2**32]
    if wrong:
        raise ValueError(f"seeds={seeds}: {wrong[0]} is not a seed; seeds are whole numbers from 0 to 2**32 - 1")


def _check_folder(folder: Path, resume: bool) -> None:
    check_writable("output_dir", folder)
    there = list(folder.glob("seed-*"))
    if (folder / SETTINGS).exists() or (not there and any((folder / name).exists() for name in (MODEL, RESULTS))):
        raise FileExistsError(
            f"output_dir={str(folder)!r} holds something else, a run or its results: use another folder with "
            "--output_dir"
        )
    if there and not resume:
        raise FileExistsError(
            f"output_dir={str(folder)!r} holds a comparison already: use another folder with --output_dir, continue "
            "it with --resume, or delete the folder"
        )
    older = [path for path in there if (path / OLD_ARM).exists()]
    if older:
        raise FileExistsError(
            f"output_dir={str(folder)!r} holds a comparison of an earlier version, with {older[0].name}/{OLD_ARM}, "
            "which is not an arm: use another folder with --output_dir"
        )
    if resume and not there:
        raise FileNotFoundError(f"output_dir={str(folder)!r} holds no comparison to resume: start it without --resume")


def _prepare_one(
    options: PretrainOptions, training: TrainingOptions, folder: Path, seed: int, corpus: Corpus | None
) -> tuple[Run | PretrainResult, Corpus]:
    """A run that is to be trained, or the result of one that is finished; and its text, which `corpus` may be."""
    training = copy.deepcopy(training)
    training.seed, training.output_dir = seed, str(folder)
    finished = (folder / RESULTS).is_file() and (folder / MODEL).is_dir()
    begun = (folder / SETTINGS).is_file()
    training.resume = begun and not finished
    if finished:
        result = PretrainResult.load(folder / RESULTS)
        earlier, settings = [result.settings], form_of(options, training)
        key = key_of(options, context=options.context, seed=seed)
        if corpus is None or corpus.key != key:
            tokenizer = load_tokenizer(options.tokenizer)
            corpus = find_corpus(options, context=options.context, seed=seed, tokenizer=tokenizer)
        settings |= found_by(training, corpus)
        found: Run | PretrainResult = result
    else:
        found = run = prepare(options, training, corpus=corpus)
        earlier, settings, corpus = [], run.settings(), run.corpus
    steps, first = training.max_steps, settings["lighthouse_steps"]
    if not options.dense_only and not 0 < first < steps:
        raise ValueError(
            f"{first:,} of {steps:,} steps would use Lighthouse: a comparison needs some with Lighthouse and dense "
            "steps after them"
        )
    if begun:
        earlier.append(read_json(folder / SETTINGS))
    for its in earlier:
        try:
            check_same(its, settings, FREE_BETWEEN_RUNS)
        except ValueError as error:
            raise ValueError(f"{folder} belongs to another comparison: {error}") from None
    return found, corpus


@dataclass(frozen=True)
class PlannedRun:
    """A run that is to be trained, or the result of one that is finished; and its text."""

    seed: int
    arm: str
    folder: Path
    run: Run | PretrainResult
    corpus: Corpus


@dataclass(frozen=True)
class Plan:
    """A checked comparison: the runs of each seed, arm by arm."""

    folder: Path
    runs: list[PlannedRun]
    training: TrainingOptions

    def run(self, say: Callable[[str], None] = lambda message: None) -> Comparison | None:
        """Does the work that is not done yet. Returns and raises as `compare` does."""
        stop = StopOnSignal()
        found: dict[int, Seed] = {}
        for number, planned in enumerate(self.runs, 1):
            run, name = planned.run, f"Run {number} of {len(self.runs)}: seed {planned.seed}, {planned.arm}"
            if isinstance(run, PretrainResult):
                say(f"{name}: already finished, with {run.loss:.4f}.")
                result = run
            else:
                say(name)
                _give_back_memory()
                result = run.train(stop=stop)
                if stop.received is not None:  # in the last step of a run, which it let end
                    raise stop.end(f"after {name.lower()}")
            seed = found.setdefault(planned.seed, Seed(planned.seed, {}))
            seed.runs[planned.arm] = replace(result, name=planned.arm)
        if self.training.process_index > 0:  # the first makes the report
            return None
        with _full_disk_is_said(self.folder):
            return self._finish(list(found.values()), say)

    def _finish(self, seeds: list[Seed], say: Callable[[str], None]) -> Comparison:
        not_evaluated = self._evaluate({seed.seed: seed for seed in seeds}, say)
        say("Exporting the plain model and timing it against one built by Transformers alone ...")
        _give_back_memory()
        arm = arm_to_ship(seeds)
        best = min(seeds, key=lambda seed: known(seed.runs[arm].loss))
        run_folder = self.folder / f"seed-{best.seed}" / arm
        config = read_json(run_folder / MODEL / "config.json")
        found = Comparison(
            layers=config["num_hidden_layers"],
            seeds=seeds,
            stripped=strip(best.seed, best.runs[arm], run_folder, self.folder / MODEL),
            not_evaluated=not_evaluated,
        )
        checks = checklist(found)
        for name, content in page(found, checks).files().items():
            write_whole(self.folder / name, content)
        found.save(
            self.folder / RESULTS,
            standings=standings.numbers(found),
            checklist=[asdict(check) for check in checks],
        )
        return found

    def _evaluate(self, seeds: dict[int, Seed], say: Callable[[str], None]) -> list[str]:
        """Evaluates each model, or reads what was found before; returns sentences about those that could not be."""
        why_not = []
        for planned in self.runs:
            seed, name = seeds[planned.seed], f"seed {planned.seed}, {planned.arm}"
            begins = partial(say, f"Evaluating {name}: loss by position, copies by distance ...")
            _give_back_memory()
            try:
                seed.evaluations[planned.arm] = evaluate_run(
                    planned.folder, seed.runs[planned.arm], planned.corpus, self.training, begins
                )
            except NotEvaluated as error:
                why_not.append(f"{name.capitalize()}: not evaluated, {error}.")
        return why_not


def strip(seed: int, run: PretrainResult, run_folder: Path, folder: Path) -> Stripped:
    """Exports the model of a run, and times it beside a plain one. Raises `NoSpace`."""
    try:
        exported = export(run_folder, folder, force=True)
    except NoSpace:
        raise
    except ExportFailed as error:
        return Stripped(seed, None, None, [], [], f"not exported: {error}")
    card = (folder / "README.md").read_text(encoding="utf-8")
    wanted = {
        "the modification of training": "modification of training only",
        f"the switch after step {run.switch_step:,}": f"after step {run.switch_step:,}.",
        "the settings": "\n".join(
            f"| {name} | {value} |"
            for name, value in settings_shown(Method.of(run.settings), run.settings["dense_layers"])
        ),
        f"the {which_loss(run)} loss {run.loss:.4f}": f"| {run.model_step:,} | {run.loss:.4f} |",
    }
    names = [name for name, text in wanted.items() if text in card]
    lacks = [name for name in wanted if name not in names]
    new_tokens = min(NEW_TOKENS, run.context // 4)
    try:
        speed = inference(
            folder,
            prompt=run.context - new_tokens,
            new_tokens=new_tokens,
            device=run.settings["device"],
            dtype="bfloat16" if run.settings["bf16"] else "float32",
        )
    except PlainProcessFailed as error:
        return Stripped(seed, exported, None, names, lacks, f"inference: {error}")
    return Stripped(seed, exported, speed, names, lacks)


@contextmanager
def _full_disk_is_said(folder: Path):
    """The runs are finished, so resuming does only the end."""
    try:
        yield
    except (NoSpace, OSError) as error:
        if isinstance(error, OSError) and error.errno not in NO_SPACE:
            raise
        raise DiskFull(f"no space for the model and the report in {folder}: {error}. {HOW_TO_GO_ON}") from error


def _give_back_memory() -> None:
    """Frees the memory of an earlier run, so that the next one neither lacks it nor counts it as its own."""
    gc.collect()
    with suppress(OSError, AttributeError):  # another C library has no such function
        ctypes.CDLL(None).malloc_trim(0)
    if torch.cuda.is_initialized():
        torch.cuda.empty_cache()


def _names(folder: Path):
    yield folder
    for number in itertools.count(2):
        yield folder.with_name(f"{folder.name}-{number}")


def _free(folder: Path) -> str:
    return str(next(name for name in _names(folder) if not name.exists()))


def _latest(folder: Path) -> str:
    there = list(itertools.takewhile(Path.exists, _names(folder)))
    return str(there[-1] if there else folder)
