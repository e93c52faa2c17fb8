"""From a checkpoint or a wrapped model to a plain Hugging Face folder, whole and checked or not there at all.

    from lighthouse.export.export import export

    export("runs/books", "books-small")
    export(model, "books-small", tokenizer=tokenizer)     # a wrapped model in memory, which stays as it is

The folder is written under another name, loaded in a process that cannot import this package (`plain_process.py`),
compared with the source, and only then renamed. The trap is the check itself: logits have the same bits only with the
same number of threads, the same attention and weights aligned alike, so all three are set on both sides.

Needs the `train` extra.
"""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError
from transformers import AutoTokenizer, GenerationConfig, PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

from lighthouse.export.card import History, history_of_checkpoint, history_of_model, model_card
from lighthouse.export.plain import PlainProcessFailed, in_plain_process
from lighthouse.huggingface.architectures import ARCHITECTURES, architecture_of
from lighthouse.huggingface.trainer_state import step_of
from lighthouse.text.tokenizer import Encoder, load_tokenizer
from lighthouse.training import checkpoints
from lighthouse.training.result import RESULTS
from lighthouse.training.resume import MODEL, SETTINGS

logger = logging.getLogger("lighthouse")

DTYPES = ("float32", "bfloat16", "float16")
CONFIG, GENERATION_CONFIG = "config.json", "generation_config.json"
WEIGHTS = ("model.safetensors", "model.safetensors.index.json")
TOKENIZER_FILES = ("tokenizer_config.json", "tokenizer.json")

TEXT = "The light of a house on the rock by the sea turns and returns; 1234 ships see it from afar.\n"
CHECKED_TOKENS = 64


class ExportFailed(RuntimeError):
    """Nothing was exported: no space, or the exported folder does not give the source's logits."""


class NoSpace(ExportFailed):
    """The disk is full, or too small from the start."""


@dataclass(frozen=True)
class Exported:
    """What was exported. `check` says what was compared, `warnings` what keeps the model from use.

    Lighthouse acted in `lighthouse_steps` of the `step` steps behind the weights, last in `switch_step`.
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


@dataclass
class _Source:
    """What is exported: `weights()` gives the state dict of a plain model, on the CPU."""

    name: str
    model_class: type[PreTrainedModel]
    config: PretrainedConfig
    generation_config: GenerationConfig | None
    weights: Callable[[], dict[str, torch.Tensor]]
    tokenizer: PreTrainedTokenizerBase | None
    history: History


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
            at its end the last whole checkpoint), or a model in memory, wrapped or plain. That stays as it is. One that
            FSDP2 has sharded is exported by calling this in all processes; the first writes.
        folder: where to. Its parents are made.
        tokenizer: a tokenizer, its folder or its name on the Hub. By default the one beside the checkpoint or of its
            run.
        dtype: "float32", "bfloat16" or "float16"; by default the source's.
        force: replaces a model that `folder` holds.
        say: is told of each part of the work.

    Returns:
        What was exported; None in all processes but the first.

    Raises:
        FileNotFoundError, FileExistsError, NotADirectoryError: a path.
        TypeError, ValueError: a model, checkpoint, tokenizer or dtype that does not fit.
        ExportFailed: no space, or the written folder does not give the source's logits. Nothing is left of it.
    """
    dtype = _dtype_of(dtype)
    is_path = isinstance(model, (str, os.PathLike))
    first = not torch.distributed.is_initialized() or torch.distributed.get_rank() == 0
    if not first and (is_path or not _is_sharded(model)):
        return None
    folder = Path(os.path.abspath(folder))
    source_folder = _checkpoint_in(Path(model)) if is_path else None
    _check_folder(folder, source_folder, force)
    if isinstance(tokenizer, (str, os.PathLike)):
        tokenizer = load_tokenizer(os.fspath(tokenizer))
    source = _from_checkpoint(source_folder, tokenizer) if is_path else _from_model(model, tokenizer)

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
        warnings.append("There is no tokenizer in the folder: none was given, and none is beside the checkpoint.")

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
        say("loading it in a process without this package, and comparing")
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
        checkpoints.write_whole_folder(folder, write)
    for warning in warnings:
        logger.warning("Lighthouse: %s", warning)
    return exported


# What is asked for


def _dtype_of(dtype) -> torch.dtype | None:
    name = str(dtype).removeprefix("torch.")
    if dtype is not None and name not in DTYPES:
        raise ValueError(f"dtype={name!r}: one of {', '.join(DTYPES)} is needed")
    return None if dtype is None else getattr(torch, name)


def _check_folder(folder: Path, source: Path | None, force: bool) -> None:
    name = f"folder={str(folder)!r}"
    if source is not None and (source.resolve() == folder.resolve() or folder.resolve() in source.resolve().parents):
        raise FileExistsError(f"{name} holds what is to be exported, {str(source)!r}: take another folder")
    if not folder.exists() or (folder.is_dir() and not any(folder.iterdir())):
        return
    if not folder.is_dir():
        raise FileExistsError(f"{name} is a file: take another name")
    if not force:
        raise FileExistsError(f"{name} exists: take another folder, or replace it with --force (force=True)")
    if not (folder / CONFIG).is_file():
        raise FileExistsError(f"{name} has no {CONFIG}: only a model's folder is replaced; take another folder")


def _checkpoint_in(path: Path) -> Path:
    """The folder with the weights that `path` stands for. Raises where it stands for none."""
    name = f"checkpoint={str(path)!r}"
    if not path.exists():
        raise FileNotFoundError(f"{name} does not exist")
    if not path.is_dir():
        raise NotADirectoryError(f"{name} is a file: the folder of a checkpoint or a run is needed")
    there = checkpoints.checkpoints_in(path)
    if (path / SETTINGS).is_file():  # a run of lighthouse pretrain
        last = checkpoints.last_whole(path, logger.warning)
        if (path / RESULTS).is_file() and (path / MODEL).is_dir():
            steps = json.loads((path / RESULTS).read_text(encoding="utf-8"))["steps"]
            if last is not None and step_of(last) > steps:
                logger.warning(
                    "Lighthouse: the run has gone on since its model was saved, after step %s; its last checkpoint: %s",
                    f"{steps:,}",
                    last,
                )
            return path / MODEL
        if last is None:
            raise FileNotFoundError(f"{name} is a run without a whole checkpoint yet: let it go on with --resume")
        return last
    if there and not (path / CONFIG).is_file():
        raise ValueError(f"{name} holds {len(there)} checkpoints: name one, such as {str(there[-1])!r}")
    if (path.parent / SETTINGS).is_file() and path in checkpoints.checkpoints_in(path.parent):
        fault = checkpoints.fault_of(path)
        if fault is not None:
            raise ValueError(f"{name} is not whole: {fault}; take another checkpoint of that run")
    if not any((path / file).is_file() for file in WEIGHTS):
        raise ValueError(f"{name} {_why_no_weights(path)}")
    if not (path / CONFIG).is_file():
        raise ValueError(f"{name} has no {CONFIG}: copy the one that the run began with into it")
    return path


def _why_no_weights(path: Path) -> str:
    shards = sorted(child.name for child in path.glob("pytorch_model_fsdp_*") if child.is_dir())
    if shards:
        return (
            f"holds FSDP's shards ({shards[0]}) and no model.safetensors: merge them with\n"
            f"    accelerate merge-weights {path / shards[0]} {path}\n"
            f"put the model's {CONFIG} beside them, and export again. A run with state_dict_type FULL_STATE_DICT in "
            "its fsdp_config writes whole checkpoints"
        )
    if list(path.glob("global_step*")):
        return (
            "holds DeepSpeed's shards and no model.safetensors: merge them with\n"
            f"    python {path / 'zero_to_fp32.py'} {path} {path} --safe_serialization\nand export again"
        )
    return "is not a checkpoint: it has no model.safetensors"


# Where it comes from


def _from_checkpoint(folder: Path, tokenizer) -> _Source:
    config, _ = PretrainedConfig.get_config_dict(folder)
    classes = {cls.__name__: cls for entry in ARCHITECTURES for cls in (entry.bare, entry.causal)}
    named = (config.get("architectures") or [None])[0]
    if named is None:
        raise ValueError(
            f"checkpoint={str(folder)!r}: its {CONFIG} does not say of which class it is: write "
            '"architectures": ["LlamaForCausalLM"] into it'
        )
    if named not in classes:
        raise ValueError(f"checkpoint={str(folder)!r} is of {named}: one of {', '.join(classes)} is needed")
    model_class = classes[named]
    generation_config, history = None, history_of_checkpoint(folder)
    if (folder / GENERATION_CONFIG).is_file():
        generation_config = GenerationConfig.from_pretrained(folder)

    def weights() -> dict[str, torch.Tensor]:
        try:
            model, loading = model_class.from_pretrained(
                folder, dtype="auto", local_files_only=True, use_safetensors=True, output_loading_info=True
            )
        except SafetensorError as error:
            raise ValueError(
                f"checkpoint={str(folder)!r}: its weights cannot be read, the file is damaged: {error}"
            ) from None
        faults = {name: sorted(map(str, found)) for name, found in loading.items() if found}
        if faults:
            raise ValueError(f"checkpoint={str(folder)!r} does not fit its {CONFIG}: {faults}")
        return _state_dict(model)

    return _Source(
        name=str(folder),
        model_class=model_class,
        config=model_class.config_class.from_pretrained(folder),
        generation_config=generation_config,
        weights=weights,
        tokenizer=tokenizer or _tokenizer_of(folder, history),
        history=history,
    )


def _from_model(model, tokenizer) -> _Source:
    architecture = architecture_of(model)
    if any(hasattr(weight, "ds_id") and weight.numel() == 0 for weight in model.parameters()):
        raise ValueError(
            "the model's weights are ZeRO-3's shards: save a checkpoint with stage3_gather_16bit_weights_on_model_save "
            "in DeepSpeed's configuration, and export that"
        )
    model_class = architecture.causal if architecture.has_head(model) else architecture.bare
    generation_config = getattr(model, "generation_config", None)
    return _Source(
        name=f"a {model_class.__name__} in memory",
        model_class=model_class,
        config=type(model.config).from_dict(model.config.to_dict()),
        generation_config=None if generation_config is None else GenerationConfig(**generation_config.to_dict()),
        weights=lambda: _state_dict(model),
        tokenizer=tokenizer,
        history=history_of_model(model),
    )


def _is_sharded(model) -> bool:
    return any(hasattr(weight, "full_tensor") for weight in model.parameters())


def _state_dict(model) -> dict[str, torch.Tensor]:
    """On the CPU and whole: FSDP2's shards are gathered by all processes, and kept by the first."""
    first = not torch.distributed.is_initialized() or torch.distributed.get_rank() == 0
    weights = {}
    for name, weight in model.state_dict().items():
        weight = weight.detach()
        if hasattr(weight, "full_tensor"):  # a DTensor
            weight = weight.full_tensor()
        if first:
            weights[name] = weight.cpu()
    return weights


def _tokenizer_of(folder: Path, history: History) -> PreTrainedTokenizerBase | None:
    """The one beside the weights, else that of the run around them, if it is theirs; None where there is none.

    Raises `ValueError` where the run's tokenizer lies elsewhere and is not any more what it was in training.
    """
    its_run = not history.doubts
    for place in (folder, folder.parent / MODEL) if its_run else (folder,):
        if any((place / file).is_file() for file in TOKENIZER_FILES):
            return AutoTokenizer.from_pretrained(place, local_files_only=True)
    settings = folder.parent / SETTINGS
    if its_run and settings.is_file():
        name = json.loads(settings.read_text(encoding="utf-8"))["tokenizer"]
        tokenizer, trained_with = load_tokenizer(name), history.tokenizer_identity
        if trained_with is None and name is not None:
            history.doubts.append(
                f"The tokenizer is the one at {name!r} now; whether it is that of training is not recorded."
            )
        if trained_with not in (None, Encoder(tokenizer).identity):
            raise ValueError(
                f"tokenizer={name!r}, by the {SETTINGS} beside the checkpoint, gives other ids than in training: put "
                "it back to what it was, or give the tokenizer of these weights with --tokenizer (tokenizer=)"
            )
        return tokenizer
    return None


# What is written


def _cast(weight: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    return weight.to(dtype) if weight.is_floating_point() else weight


def _clean(config: PretrainedConfig) -> None:
    config.use_cache = True  # off in training only
    config._name_or_path = ""


def _make_readable(folder: Path) -> None:
    """Safetensors writes weights that nobody but their owner can read; who deploys them is often another."""
    mode = (folder / CONFIG).stat().st_mode
    for file in folder.glob("*.safetensors"):
        file.chmod(mode)


def _plain_model(source: _Source, weights: dict[str, torch.Tensor], dtype: torch.dtype) -> PreTrainedModel:
    model, loading = source.model_class.from_pretrained(
        None,
        config=type(source.config).from_dict(source.config.to_dict()),
        state_dict=dict(weights),
        dtype=dtype,
        attn_implementation="sdpa",
        output_loading_info=True,
    )
    faults = {name: sorted(map(str, found)) for name, found in loading.items() if found}
    if faults:
        raise ValueError(f"{source.name} does not fit a plain {source.model_class.__name__}: {faults}")
    return model


def _ids(source: _Source) -> list[int]:
    """Of the text that is checked; without a tokenizer, ids from all over the vocabulary."""
    vocabulary = source.config.vocab_size
    length = min(CHECKED_TOKENS, source.config.max_position_embeddings)
    if source.tokenizer is None:
        return [(7919 * place + 1) % vocabulary for place in range(length)]
    ids = source.tokenizer(TEXT, add_special_tokens=False)["input_ids"]
    if max(ids) >= vocabulary:
        raise ValueError(
            f"tokenizer={type(source.tokenizer).__name__} has the id {max(ids):,} in {TEXT[:20]!r}, and the model's "
            f"vocabulary ends at {vocabulary - 1:,}: it is not the model's tokenizer"
        )
    return ids[:length]


def _check_no_trace(folder: Path) -> None:
    for name in (CONFIG, GENERATION_CONFIG):
        path = folder / name
        if path.is_file() and "lighthouse" in path.read_text(encoding="utf-8").lower():
            raise ExportFailed(f"{name} would name lighthouse: rename what does so in the model's configuration")


def _check(
    folder: Path, source: _Source, weights: dict[str, torch.Tensor], ids: list[int], which: str = "the source's weights"
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
            raise ExportFailed(f"the exported tokenizer gives other ids than the source's for {TEXT!r}")
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
    """Refuses a disk that is too small, and makes `NoSpace` of one that gets full."""

    def __init__(self, folder: Path, size: int):
        self.folder, self.size = folder, size

    def __enter__(self) -> None:
        free = checkpoints.free_bytes(self.folder)
        if free < self.size:
            raise NoSpace(self._message(free))

    def __exit__(self, kind, error, traceback) -> None:
        # The writer of safetensors gives no error number, but names it.
        if isinstance(error, Exception) and (
            getattr(error, "errno", None) in checkpoints.NO_SPACE or "os error 28" in str(error)
        ):
            raise NoSpace(self._message(checkpoints.free_bytes(self.folder))) from error

    def _message(self, free: int) -> str:
        return (
            f"folder={str(self.folder)!r} has no space for the model: about {self.size / 1e6:,.1f} MB are needed, "
            f"{free / 1e6:,.1f} MB are free. Nothing is left there. Make room, or take another folder or dtype"
        )
