"""From a checkpoint or a wrapped model to a plain Hugging Face folder, complete and checked, or none at all.

    from lighthouse.export.export import export

    export("runs/books", "books-small")
    export(model, "books-small", tokenizer=tokenizer)     # a wrapped model in memory, which stays as it is

The folder is written under another name, loaded in a process that cannot import this package (`plain_process.py`),
compared with the source, and only then renamed. Logits have the same bits only with the same number of threads, the
same attention and weights aligned alike, so all three are set on both sides.

Needs the `train` extra.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from transformers import PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

from lighthouse.core.files import NO_SPACE, free_bytes, write_whole_folder
from lighthouse.export.card import model_card
from lighthouse.export.plain import PlainProcessFailed, in_plain_process
from lighthouse.export.source import (
    CONFIG,
    GENERATION_CONFIG,
    Source,
    checkpoint_in,
    from_checkpoint,
    from_model,
    is_sharded,
)
from lighthouse.text.tokenizer import load_tokenizer
from lighthouse.training.space import check_writable

logger = logging.getLogger("lighthouse")

DTYPES = ("float32", "bfloat16", "float16")

TEXT = "The light of a house on the rock by the sea turns and returns; 1234 ships see it from afar.\n"
CHECKED_TOKENS = 64


class ExportFailed(RuntimeError):
    """Nothing was exported: no space, or the exported folder does not give the source's logits."""


class NoSpace(ExportFailed):
    """The disk is full, or too small from the start."""


@dataclass(frozen=True)
class Exported:
    """What was exported. `check` says what was compared, `warnings` what keeps the model from being used.

    Lighthouse acted in `lighthouse_steps` of the `step` steps of the weights, last in `switch_step`.
    """

    folder: str
    source: str
    model_class: str
    parameters: int
    dtype: str
    tokenizer: str | None
    step: int | None
    switch_step: int | None
    bytes: int
    check: str
    warnings: list[str]
    lighthouse_steps: int | None = None


def export(
    model: str | os.PathLike | PreTrainedModel,
    folder: str | os.PathLike,
    *,
    tokenizer: str | os.PathLike | PreTrainedTokenizerBase | None = None,
    dtype: str | torch.dtype | None = None,
    force: bool = False,
    say: Callable[[str], None] = lambda message: None,
) -> Exported | None:
    """Writes a plain Hugging Face folder: weights in safetensors, tokenizer, configurations, model card.

    Args:
        model: a checkpoint folder of any Trainer, a run's folder of `lighthouse pretrain` (its model, or if it is not
            finished the last whole checkpoint), or a model in memory, wrapped or plain, which is not changed. One that
            FSDP2 has sharded is exported by calling this in all processes; the first writes.
        folder: the folder to write. Its parents are made.
        tokenizer: a tokenizer, its folder or its name on the Hub. By default the one beside the checkpoint or of its
            run.
        dtype: "float32", "bfloat16" or "float16"; by default the source's.
        force: replaces a model that `folder` holds.
        say: called with a line for each part of the work.

    Returns:
        What was exported; None in all processes but the first.

    Raises:
        FileNotFoundError, FileExistsError, NotADirectoryError: a path.
        TypeError, ValueError: a model, checkpoint, tokenizer or dtype that does not fit.
        ExportFailed: no space, or the written folder does not give the source's logits. Nothing is left of it.
    """
    dtype = _dtype_of(dtype)
    first = not torch.distributed.is_initialized() or torch.distributed.get_rank() == 0
    if not first and (isinstance(model, (str, os.PathLike)) or not is_sharded(model)):
        return None
    folder = Path(os.path.abspath(folder))
    source_folder: Path | None = None
    if isinstance(model, (str, os.PathLike)):
        source_folder = checkpoint_in(Path(model))
        described = partial(from_checkpoint, source_folder)
    else:
        described = partial(from_model, model)
    _check_folder(folder, source_folder, force)
    check_writable("folder", folder.parent if folder.exists() else folder)  # it is written beside its place first
    if isinstance(tokenizer, (str, os.PathLike)):
        tokenizer = load_tokenizer(os.fspath(tokenizer))
    source = described(tokenizer)

    say(f"reading {source.name}")
    weights = source.weights()  # of shards by all processes
    if not first:
        return None
    if dtype is None:
        dtype = next(iter(weights.values())).dtype
    cast = any(weight.is_floating_point() and weight.dtype != dtype for weight in weights.values())
    weights = {name: _cast(weight, dtype) for name, weight in weights.items()}
    ids = _ids(source)
    _clean(source.config)
    warnings = source.history.warnings()
    if source.tokenizer is None:
        warnings.append("The folder has no tokenizer: none was given, and none is beside the checkpoint.")

    size = sum(weight.numel() * weight.element_size() for weight in weights.values())
    parameters, exported = 0, None

    def write(partial: Path) -> None:
        nonlocal parameters, exported
        partial.mkdir()
        say(f"writing {folder}")
        plain = _plain_model(source, weights, dtype)
        if source.generation_config is not None:
            plain.generation_config = source.generation_config
        if plain.can_generate():
            plain.generation_config.use_cache = True
        plain.save_pretrained(partial)
        _make_readable(partial)
        parameters = plain.num_parameters()
        del plain
        if source.tokenizer is not None:
            source.tokenizer.save_pretrained(partial)
        _check_no_trace(partial)
        say("loading it in a process without this package and comparing")
        which = "the source's weights" + (f" in {str(dtype).removeprefix('torch.')}" if cast else "")
        check = _check(partial, source, {name: weight.float() for name, weight in weights.items()}, ids, which)
        exported = Exported(
            folder=str(folder),
            source=source.name,
            model_class=source.model_class.__name__,
            parameters=parameters,
            dtype=str(dtype).removeprefix("torch."),
            tokenizer=type(source.tokenizer).__name__ if source.tokenizer is not None else None,
            step=source.history.step,
            switch_step=source.history.switch_step,
            bytes=size,
            check=check,
            warnings=warnings,
            lighthouse_steps=source.history.steps_with_lighthouse,
        )
        model_card(exported, source.history).save(partial / "README.md")

    with _space(folder, size):
        folder.parent.mkdir(parents=True, exist_ok=True)
        write_whole_folder(folder, write)
    for warning in warnings:
        logger.warning("Lighthouse: %s", warning)
    return exported


# What is asked for


def _dtype_of(dtype: str | torch.dtype | None) -> torch.dtype | None:
    name = str(dtype).removeprefix("torch.")
    if dtype is not None and name not in DTYPES:
        raise ValueError(f"dtype={name!r}: one of {', '.join(DTYPES)} is needed")
    return None if dtype is None else getattr(torch, name)


def _check_folder(folder: Path, source: Path | None, force: bool) -> None:
    name = f"folder={str(folder)!r}"
    if source is not None and (source.resolve() == folder.resolve() or folder.resolve() in source.resolve().parents):
        raise FileExistsError(f"{name} holds what is to be exported, {str(source)!r}: use another folder")
    if not folder.exists() or (folder.is_dir() and not any(folder.iterdir())):
        return
    if not folder.is_dir():
        raise FileExistsError(f"{name} is a file: use another name")
    if not force:
        raise FileExistsError(f"{name} already exists: use another folder, or replace it with --force (force=True)")
    if not (folder / CONFIG).is_file():
        raise FileExistsError(f"{name} has no {CONFIG}: only a model's folder is replaced; use another folder")


# What is written


def _cast(weight: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    return weight.to(dtype) if weight.is_floating_point() else weight


def _clean(config: PretrainedConfig) -> None:
    config.use_cache = True  # off in training only
    config._name_or_path = ""


def _make_readable(folder: Path) -> None:
    """Safetensors makes weights readable only by their owner, but another user often deploys them."""
    mode = (folder / CONFIG).stat().st_mode
    for file in folder.glob("*.safetensors"):
        file.chmod(mode)


def _plain_model(source: Source, weights: dict[str, torch.Tensor], dtype: torch.dtype) -> PreTrainedModel:
    loaded: Any = source.model_class.from_pretrained(
        None,
        config=type(source.config).from_dict(source.config.to_dict()),
        state_dict=dict(weights),
        dtype=dtype,
        attn_implementation="sdpa",
        output_loading_info=True,
    )
    model, loading = loaded
    faults = {name: sorted(map(str, found)) for name, found in loading.items() if found}
    if faults:
        raise ValueError(f"{source.name} does not fit a plain {source.model_class.__name__}: {faults}")
    return model


def _ids(source: Source) -> list[int]:
    """The ids of the text that is checked; without a tokenizer, ids from all over the vocabulary."""
    vocabulary = source.config.vocab_size
    length = min(CHECKED_TOKENS, source.config.max_position_embeddings)
    if source.tokenizer is None:
        return [(7919 * place + 1) % vocabulary for place in range(length)]
    ids = source.tokenizer(TEXT, add_special_tokens=False)["input_ids"]
    if max(ids) >= vocabulary:
        raise ValueError(
            f"tokenizer={type(source.tokenizer).__name__} gives the id {max(ids):,} for {TEXT[:20]!r}, but the model's "
            f"vocabulary ends at {vocabulary - 1:,}: it is not the model's tokenizer"
        )
    return ids[:length]


def _check_no_trace(folder: Path) -> None:
    for name in (CONFIG, GENERATION_CONFIG):
        path = folder / name
        if path.is_file() and "lighthouse" in path.read_text(encoding="utf-8").lower():
            raise ExportFailed(f"{name} would contain the word 'lighthouse': rename it in the model's configuration")


def _check(
    folder: Path, source: Source, weights: dict[str, torch.Tensor], ids: list[int], which: str = "the source's weights"
) -> str:
    """Compares the folder with these weights; returns what was compared. Raises `ExportFailed`."""
    model = _plain_model(source, weights, torch.float32).eval()
    for weight in model.parameters():
        weight.data = weight.data.clone()  # as there: aligned alike
    with torch.inference_mode(), torch.autocast("cpu", enabled=False):
        expected = model(torch.tensor([ids]), use_cache=False)[0]
    causal = model.can_generate()
    del model, weights
    what = "logits" if causal else "hidden states"
    request = {
        "folder": str(folder),
        "auto_class": "AutoModelForCausalLM" if causal else "AutoModel",
        "ids": ids,
        "text": TEXT,
        "has_tokenizer": source.tokenizer is not None,
    }
    try:
        found = in_plain_process("logits", request, cpu_only=True)
    except PlainProcessFailed as error:
        raise ExportFailed(f"the exported model cannot be loaded without this package: {error}") from None
    if found["faults"] or found["class"] != source.model_class.__name__:
        raise ExportFailed(f"the exported model is loaded as {found['class']} with {found['faults']}")
    if source.tokenizer is not None:
        if found["tokens"] != source.tokenizer(TEXT, add_special_tokens=False)["input_ids"]:
            raise ExportFailed(f"the exported tokenizer gives different ids than the source's for {TEXT!r}")
    if not torch.isfinite(expected).all():
        raise ExportFailed(f"{source.name}: its {what} are not finite on {TEXT!r}, or not in the dtype asked for")
    if not torch.equal(expected, found["logits"]):
        worst = (expected - found["logits"]).abs().max().item()
        raise ExportFailed(f"the exported model's {what} differ from the source's by up to {worst:.3g}")
    shape = " x ".join(f"{size:,}" for size in expected.shape[1:])
    return (
        f"loaded in a process that cannot import lighthouse, the folder gives the {what} of {which} bit for bit: "
        f"{shape} numbers for a fixed text of {len(ids)} tokens, on the CPU in float32"
    )


class _space:
    """Refuses a disk that is too small, and raises `NoSpace` if it gets full."""

    def __init__(self, folder: Path, size: int):
        self.folder, self.size = folder, size

    def __enter__(self) -> None:
        free = free_bytes(self.folder)
        if free < self.size:
            raise NoSpace(self._message(free))

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        # The writer of safetensors gives no error number, but names it.
        if isinstance(error, Exception) and (getattr(error, "errno", None) in NO_SPACE or "os error 28" in str(error)):
            raise NoSpace(self._message(free_bytes(self.folder))) from error

    def _message(self, free: int) -> str:
        return (
            f"folder={str(self.folder)!r} has no space for the model: about {self.size / 1e6:,.1f} MB are needed, "
            f"{free / 1e6:,.1f} MB are free. Nothing is left there. Free some space, or use another folder or dtype"
        )
