"""Where a model to export comes from: a run's folder, a checkpoint of any Trainer, or a model in memory.

Each is a `Source`. What lies beside the weights may not be theirs: a tokenizer, or another run's settings.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from transformers import AutoTokenizer, GenerationConfig, PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

from lighthouse.export.card import History, history_of_checkpoint, history_of_model
from lighthouse.huggingface.architectures import ARCHITECTURES, architecture_of
from lighthouse.huggingface.trainer_state import step_of
from lighthouse.text.tokenizer import Encoder, load_tokenizer
from lighthouse.training import checkpoints
from lighthouse.training.result import RESULTS, read_json
from lighthouse.training.resume import MODEL, SETTINGS

logger = logging.getLogger("lighthouse")

CONFIG, GENERATION_CONFIG = "config.json", "generation_config.json"
WEIGHTS = ("model.safetensors", "model.safetensors.index.json")
TOKENIZER_FILES = ("tokenizer_config.json", "tokenizer.json")


@dataclass
class Source:
    """What is exported: `weights()` gives the state dict of a plain model, on the CPU."""

    name: str
    model_class: type[PreTrainedModel]
    config: PretrainedConfig
    generation_config: GenerationConfig | None
    weights: Callable[[], dict[str, torch.Tensor]]
    tokenizer: PreTrainedTokenizerBase | None
    history: History


def checkpoint_in(path: Path) -> Path:
    """The folder with the weights that `path` stands for. Raises if there is none."""
    name = f"checkpoint={str(path)!r}"
    if not path.exists():
        raise FileNotFoundError(f"{name} does not exist")
    if not path.is_dir():
        raise NotADirectoryError(f"{name} is a file: the folder of a checkpoint or a run is needed")
    there = checkpoints.checkpoints_in(path)
    if (path / SETTINGS).is_file():  # a run of lighthouse pretrain
        last = checkpoints.last_whole(path, logger.warning)
        if (path / RESULTS).is_file() and (path / MODEL).is_dir():
            steps = read_json(path / RESULTS)["steps"]
            if last is not None and step_of(last) > steps:
                logger.warning(
                    "Lighthouse: the run continued after its model was saved, after step %s; its last checkpoint: %s",
                    f"{steps:,}",
                    last,
                )
            return path / MODEL
        if last is None:
            raise FileNotFoundError(f"{name} is a run without a complete checkpoint yet: continue it with --resume")
        return last
    if there and not (path / CONFIG).is_file():
        raise ValueError(f"{name} holds {len(there)} checkpoints: name one, such as {str(there[-1])!r}")
    if (path.parent / SETTINGS).is_file() and path in checkpoints.checkpoints_in(path.parent):
        fault = checkpoints.fault_of(path)
        if fault is not None:
            raise ValueError(f"{name} is not complete: {fault}; use another checkpoint of that run")
    if not any((path / file).is_file() for file in WEIGHTS):
        raise ValueError(f"{name} {_why_no_weights(path)}")
    if not (path / CONFIG).is_file():
        raise ValueError(f"{name} has no {CONFIG}: copy the one that the run started with into it")
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


def from_checkpoint(folder: Path, tokenizer: PreTrainedTokenizerBase | None) -> Source:
    """Raises `ValueError` if its class is not known; its weights are read later."""
    try:
        config, _ = PretrainedConfig.get_config_dict(folder)
    except OSError as error:
        raise ValueError(f"checkpoint={str(folder)!r} cannot be read: {error}") from error
    classes = {cls.__name__: cls for entry in ARCHITECTURES for cls in (entry.bare, entry.causal)}
    named = (config.get("architectures") or [None])[0]
    if named is None:
        raise ValueError(
            f"checkpoint={str(folder)!r}: its {CONFIG} does not name its class: write "
            '"architectures": ["LlamaForCausalLM"] into it'
        )
    if named not in classes:
        raise ValueError(f"checkpoint={str(folder)!r} is of {named}: one of {', '.join(classes)} is needed")
    model_class = classes[named]
    config_class = model_class.config_class or PretrainedConfig
    generation_config, history = None, history_of_checkpoint(folder)
    if (folder / GENERATION_CONFIG).is_file():
        generation_config = GenerationConfig.from_pretrained(folder)

    def weights() -> dict[str, torch.Tensor]:
        try:
            loaded: Any = model_class.from_pretrained(
                folder, dtype="auto", local_files_only=True, use_safetensors=True, output_loading_info=True
            )
        except SafetensorError as error:
            raise ValueError(
                f"checkpoint={str(folder)!r}: its weights cannot be read, the file is damaged: {error}"
            ) from None
        model, loading = loaded
        faults = {name: sorted(map(str, found)) for name, found in loading.items() if found}
        if faults:
            raise ValueError(f"checkpoint={str(folder)!r} does not fit its {CONFIG}: {faults}")
        return _state_dict(model)

    return Source(
        name=str(folder),
        model_class=model_class,
        config=config_class.from_pretrained(folder),
        generation_config=generation_config,
        weights=weights,
        tokenizer=tokenizer or tokenizer_of(folder, history),
        history=history,
    )


def from_model(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase | None) -> Source:
    """Raises `ValueError` if its weights are shards that only DeepSpeed can gather."""
    architecture = architecture_of(model)
    if any(hasattr(weight, "ds_id") and weight.numel() == 0 for weight in model.parameters()):
        raise ValueError(
            "the model's weights are ZeRO-3's shards: save a checkpoint with stage3_gather_16bit_weights_on_model_save "
            "in DeepSpeed's configuration, and export that"
        )
    model_class = architecture.causal if architecture.has_head(model) else architecture.bare
    generation_config = getattr(model, "generation_config", None)
    return Source(
        name=f"a {model_class.__name__} in memory",
        model_class=model_class,
        config=type(model.config).from_dict(model.config.to_dict()),
        generation_config=None if generation_config is None else GenerationConfig(**generation_config.to_dict()),
        weights=lambda: _state_dict(model),
        tokenizer=tokenizer,
        history=history_of_model(model),
    )


def is_sharded(model: PreTrainedModel) -> bool:
    """By FSDP2, whose shards all processes gather."""
    return any(hasattr(weight, "full_tensor") for weight in model.parameters())


def _state_dict(model: PreTrainedModel) -> dict[str, torch.Tensor]:
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


def tokenizer_of(folder: Path, history: History) -> PreTrainedTokenizerBase | None:
    """The one beside the weights, else that of the run around them, if it is theirs; None where there is none.

    Raises `ValueError` if the run's tokenizer is elsewhere and has changed since training.
    """
    its_run = not history.doubts
    for place in (folder, folder.parent / MODEL) if its_run else (folder,):
        if any((place / file).is_file() for file in TOKENIZER_FILES):
            return AutoTokenizer.from_pretrained(place, local_files_only=True)
    settings = folder.parent / SETTINGS
    if its_run and settings.is_file():
        name = read_json(settings)["tokenizer"]
        tokenizer, trained_with = load_tokenizer(name), history.tokenizer_identity
        if trained_with is None and name is not None:
            history.doubts.append(
                f"The tokenizer is the one now at {name!r}; it is not recorded whether it is the training tokenizer."
            )
        if trained_with not in (None, Encoder(tokenizer).identity):
            raise ValueError(
                f"tokenizer={name!r}, by the {SETTINGS} beside the checkpoint, gives different ids than in training: "
                "restore it, or give the tokenizer of these weights with --tokenizer (tokenizer=)"
            )
        return tokenizer
    return None
