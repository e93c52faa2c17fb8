"""The baseline and the two-stage run of one or several seeds, one after the other, and the model to ship.

    from lighthouse.studies.compare import compare, compare_defaults

    comparison = compare(PretrainOptions(data="books"), TrainingOptions(output_dir="runs/compare", max_steps=500))

Both runs of a seed have the same first weights, text, order of it, steps and schedule: they differ in the attention
alone. Each is a whole run of `lighthouse pretrain` in its own folder, `seed-0/dense` and `seed-0/two-stage`, and is
resumed like one; the report is made when all are finished.
"""

from __future__ import annotations

import copy
import ctypes
import gc
import itertools
import json
import os
from collections.abc import Callable, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch

from lighthouse.core.files import NO_SPACE, write_whole
from lighthouse.core.method import Method
from lighthouse.export.card import settings_shown
from lighthouse.export.export import ExportFailed, NoSpace, export
from lighthouse.export.plain import NEW_TOKENS, PlainProcessFailed, inference
from lighthouse.report import comparison as report
from lighthouse.report.compared import Comparison, Pair, Stripped
from lighthouse.report.known import known
from lighthouse.text.data import Corpus, find_corpus, key_of
from lighthouse.text.tokenizer import load_tokenizer
from lighthouse.training.callbacks import StopOnSignal
from lighthouse.training.depends import FREE_BETWEEN_RUNS
from lighthouse.training.form import form_of, found_by
from lighthouse.training.options import PretrainOptions, TrainingOptions
from lighthouse.training.result import RESULTS, DiskFull, PretrainResult, Stopped
from lighthouse.training.resume import MODEL, SETTINGS, check_same
from lighthouse.training.run import Run, prepare

DENSE, TWO_STAGE = "dense", "two-stage"

HOW_TO_GO_ON = "The same command with --resume continues from there."


def compare_defaults(folder: str | Path = "runs/compare", *, resume: bool = False) -> dict:
    """Options, by name, of a comparison that two processor cores finish in minutes.

    The output folder is the first of `folder`, `folder-2`, ... that does not exist; to resume, the last that does.
    """
    return {
        "model": "nano",
        "context": 4096,
        "held_out": 8,
        "share": 0.65,
        "max_steps": 240,
        "max_grad_norm": 0.3,
        "eval_on_start": True,
        "output_dir": _latest(Path(folder)) if resume else _free(Path(folder)),
    }


def compare(
    options: PretrainOptions | None = None,
    training: TrainingOptions | None = None,
    *,
    seeds: Sequence[int] | None = None,
    say: Callable[[str], None] = lambda message: None,
) -> Comparison | None:
    """Trains each seed dense and in two stages, strips and exports a model, and writes the report.

    Args:
        options, training: as for `pretrain`. `training.output_dir` is the folder of all runs; with `training.resume`
            finished runs in it are read, and an interrupted one continues.
        seeds: of the weights and of the order of the text; by default only `training.seed`.
        say: called with a line for each part of the work.

    Returns:
        The results; None in all processes but the first. The folder then has `report.html`, `report.md` with its
        pictures, `results.json`, and the exported model of the best two-stage run in `model`.

    Raises:
        ValueError, FileNotFoundError, FileExistsError: before any work, as `prepare` does, and for options with which
            nothing can be compared.
        RunFailed: as `Run.train` does; a full disk at the end too.
    """
    return prepare_comparison(options, training, seeds=seeds).run(say)


def prepare_comparison(
    options: PretrainOptions | None = None,
    training: TrainingOptions | None = None,
    *,
    seeds: Sequence[int] | None = None,
) -> Plan:
    """Checks all runs of a comparison and does no work yet; the arguments are those of `compare`."""
    options, training = options or PretrainOptions(), training or TrainingOptions()
    seeds = [training.seed] if seeds is None else list(seeds)
    _check(options, training, seeds)
    folder = Path(known(training.output_dir))
    _check_folder(folder, training.resume)
    runs: list[Run | PretrainResult] = []
    corpus: Corpus | None = None
    for seed in seeds:
        for name in (DENSE, TWO_STAGE):
            its = replace(options, dense_only=name == DENSE)
            run, corpus = _prepare_one(its, training, folder / f"seed-{seed}" / name, seed, corpus)
            runs.append(run)
    return Plan(folder, seeds, runs, training.process_index == 0)


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
    if folder.exists() and not folder.is_dir():
        raise FileExistsError(f"output_dir={str(folder)!r} is a file: a folder is needed")
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
    if resume and not there:
        raise FileNotFoundError(f"output_dir={str(folder)!r} holds no comparison to resume: start it without --resume")
    above = next(path for path in (folder.absolute(), *folder.absolute().parents) if path.exists())
    if not os.access(above, os.W_OK):
        raise PermissionError(f"output_dir={str(folder)!r}: {str(above)!r} cannot be written to")


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
        earlier.append(json.loads((folder / SETTINGS).read_text(encoding="utf-8")))
    for its in earlier:
        try:
            check_same(its, settings, FREE_BETWEEN_RUNS)
        except ValueError as error:
            raise ValueError(f"{folder} belongs to another comparison: {error}") from None
    return found, corpus


@dataclass(frozen=True)
class Plan:
    """A checked comparison: each seed's dense and two-stage run, or the result of one that is finished."""

    folder: Path
    seeds: list[int]
    runs: list[Run | PretrainResult]
    first_process: bool  # which makes the report

    def run(self, say: Callable[[str], None] = lambda message: None) -> Comparison | None:
        """Does the work that is not done yet. Returns and raises as `compare` does."""
        results, stop = [], StopOnSignal()
        for number, run in enumerate(self.runs):
            seed, kind = self.seeds[number // 2], (DENSE, TWO_STAGE)[number % 2]
            name = f"Run {number + 1} of {len(self.runs)}: seed {seed}, {kind}"
            if isinstance(run, PretrainResult):
                say(f"{name}: already finished, with {run.loss:.4f}.")
                results.append(run)
                continue
            say(name)
            _give_back_memory()
            results.append(run.train(stop=stop))
            if stop.received is not None:  # in the last step of a run, which it let end
                raise Stopped(f"Stopped by a signal after {name.lower()}.")
        if not self.first_process:
            return None
        pairs = [Pair(*each) for each in zip(self.seeds, results[::2], results[1::2], strict=True)]
        with _full_disk_is_said(self.folder):
            return self._finish(pairs, say)

    def _finish(self, pairs: list[Pair], say: Callable[[str], None]) -> Comparison:
        say("Exporting the plain model and timing it against one built by Transformers alone ...")
        _give_back_memory()
        best = min(pairs, key=lambda pair: known(pair.two_stage.loss))
        run_folder = self.folder / f"seed-{best.seed}" / TWO_STAGE
        config = json.loads((run_folder / MODEL / "config.json").read_text(encoding="utf-8"))
        found = Comparison(
            layers=config["num_hidden_layers"],
            pairs=pairs,
            stripped=strip(best, run_folder, self.folder / MODEL),
        )
        checks = report.checklist(found)
        for name, content in report.page(found, checks).files().items():
            write_whole(self.folder / name, content)
        found.save(self.folder / RESULTS, checklist=[asdict(check) for check in checks])
        return found


def strip(pair: Pair, run_folder: Path, folder: Path) -> Stripped:
    """Exports the model of a pair's two-stage run, and times it beside a plain one. Raises `NoSpace`."""
    run = pair.two_stage
    try:
        exported = export(run_folder, folder, force=True)
    except NoSpace:
        raise
    except ExportFailed as error:
        return Stripped(pair.seed, None, None, [], [], f"not exported: {error}")
    card = (folder / "README.md").read_text(encoding="utf-8")
    wanted = {
        "the modification of training": "modification of training only",
        f"the switch after step {run.switch_step:,}": f"after step {run.switch_step:,}.",
        "the settings": "\n".join(
            f"| {name} | {value} |"
            for name, value in settings_shown(Method.of(run.settings), run.settings["dense_layers"])
        ),
        f"the {pair.which} loss {run.loss:.4f}": f"| {run.model_step:,} | {run.loss:.4f} |",
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
        return Stripped(pair.seed, exported, None, names, lacks, f"inference: {error}")
    return Stripped(pair.seed, exported, speed, names, lacks)


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
