"""The model that is evaluated: which one it is, its tokenizer, its run if it is from one, and then its weights.

The trap is a tokenizer that is not the model's: the losses would be those of noise. Without a tokenizer bytes are taken
only where the vocabulary is one of bytes.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from transformers import AutoConfig, AutoModelForCausalLM, PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

from lighthouse.text.tokenizer import Encoder, load_tokenizer
from lighthouse.training.result import read_json
from lighthouse.training.resume import SETTINGS

TOKENIZER_FILES = ("tokenizer_config.json", "tokenizer.json")
MOST_OF_BYTES = 512  # ids of a vocabulary that may be one of bytes


@dataclass(frozen=True)
class Found:
    """A model before its weights are read. `run` are the settings of the run whose folder it lies in, if any."""

    name: str
    place: str  # a folder, or a name on the Hub
    config: PretrainedConfig
    encoder: Encoder
    run: dict | None

    @property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        return self.encoder.tokenizer

    @property
    def most_tokens(self) -> int | None:
        """Positions that the model was made for; None where its configuration does not say."""
        return getattr(self.config, "max_position_embeddings", None)

    @property
    def begin(self) -> int | None:
        """The token that belongs before a text, as the tokenizer adds it by itself. Our runs train without one."""
        if self.run is not None or self.encoder.is_bytes or self.tokenizer.bos_token_id is None:
            return None
        return (
            self.tokenizer.bos_token_id if self.tokenizer("a")["input_ids"][0] == self.tokenizer.bos_token_id else None
        )

    def load(self, dtype: str | None, device: str) -> PreTrainedModel:
        """The model with its weights, in their own dtype or another.

        Raises:
            ValueError: the weights are damaged or incomplete.
        """
        name = f"model={self.name!r}"
        try:
            loaded: Any = AutoModelForCausalLM.from_pretrained(
                self.place, dtype=dtype or "auto", local_files_only=Path(self.place).is_dir(), output_loading_info=True
            )
        except SafetensorError as error:
            raise ValueError(f"{name}: its weights cannot be read, the file is damaged: {error}") from None
        except OSError as error:
            raise ValueError(f"{name} cannot be loaded: {error}") from error
        except Exception as error:  # of kinds that differ from model to model, as a missing package
            raise ValueError(f"{name} cannot be loaded: {type(error).__name__}: {error}") from error
        model, loading = loaded
        missing = sorted(loading["missing_keys"])
        if missing:
            raise ValueError(
                f"{name}: {len(missing)} of its weights are missing, for example {missing[0]}: they would be random "
                "numbers; give a complete model"
            )
        return model.to(device)


def find_model(name: str, place: str | Path, tokenizer: str | None = None) -> Found:
    """Reads the configuration and the tokenizer, by default the one beside the model, of its run, or bytes.

    `name` is the model as the user gave it, `place` the folder or the name on the Hub where it is.

    Raises:
        ValueError: there is no such model, no tokenizer for it, or the tokenizer has ids outside its vocabulary.
        OSError: the tokenizer cannot be loaded.
    """
    folder = Path(place)
    try:
        config = AutoConfig.from_pretrained(place, local_files_only=folder.is_dir()).get_text_config()
    except Exception as error:  # OSError, and what a configuration raises of its own
        why = str(error).splitlines()[0].rstrip(".")
        raise ValueError(
            f"model={name!r} cannot be read: {why}; a folder with a config.json, a run, or a name is needed"
        ) from error
    run = _run_around(folder) if folder.is_dir() else None
    if tokenizer is None:
        beside = not folder.is_dir() or any((folder / file).is_file() for file in TOKENIZER_FILES)
        tokenizer = str(place) if beside else None if run is None else run["tokenizer"]
    encoder = Encoder(load_tokenizer(tokenizer))
    if tokenizer is None and run is None and config.vocab_size > MOST_OF_BYTES:
        raise ValueError(
            f"model={name!r} has a vocabulary of {config.vocab_size:,} and no tokenizer beside it: name its tokenizer"
        )
    if encoder.ids > config.vocab_size:
        raise ValueError(
            f"tokenizer={tokenizer or 'bytes'!r} has ids up to {encoder.ids - 1:,}, but the vocabulary of "
            f"model={name!r} has {config.vocab_size:,}: name the model's own tokenizer"
        )
    return Found(name, str(place), config, encoder, run)


def weights_digest(model: PreTrainedModel) -> str:
    """By which the same weights are recognized, wherever they lie."""
    digest = hashlib.blake2b(digest_size=16)
    for name, weight in model.state_dict().items():
        digest.update(name.encode())
        digest.update(weight.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy())
    return digest.hexdigest()


def _run_around(folder: Path) -> dict | None:
    file = folder.absolute().parent / SETTINGS
    return read_json(file) if file.is_file() else None
