"""Tokenizers made on the spot: byte-level BPE as GPT-2's and Llama 3's, and others that must be refused."""

from __future__ import annotations

from pathlib import Path

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from training_runs import WORDS

END = "<|endoftext|>"


def save_bpe(folder: Path, **changes) -> str:
    """A BPE of 300 tokens that allows 16 in a sequence, in `folder`; returns its path."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=300,
        special_tokens=[END],
        show_progress=False,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )
    tokenizer.train_from_iterator([" ".join(WORDS)] * 9, trainer)
    return _save(tokenizer, folder, **{"eos_token": END, "model_max_length": 16, **changes})


def save_whole_words(folder: Path) -> str:
    """Its words are split at spaces alone, and its end mark is one of them."""
    tokenizer = Tokenizer(
        models.WordLevel({"[UNK]": 0, "</s>": 1, **{w: 2 + n for n, w in enumerate(sorted(set(WORDS)))}}, "[UNK]")
    )
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return _save(tokenizer, folder, eos_token="</s>", unk_token="[UNK]")


def save_letters(folder: Path, letters: str = "", unk_token: str | None = None, normalizer=None, th: int = 257) -> str:
    """Its tokens are bytes, or some letters, and "th", whose id may be given."""
    alphabet = sorted([*letters.replace(" ", "\u0120")] if letters else pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {
        letter: number for number, letter in enumerate([*alphabet, "<eos>", *([unk_token] if unk_token else [])])
    }
    model = models.BPE(vocab=vocabulary | {"th": th}, merges=[("t", "h")], unk_token=unk_token)
    tokenizer = Tokenizer(model)
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    if normalizer is not None:
        tokenizer.normalizer = normalizer
    return _save(tokenizer, folder, eos_token="<eos>", unk_token=unk_token)


def _save(tokenizer: Tokenizer, folder: Path, **names) -> str:
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, **names).save_pretrained(folder)
    return str(folder)
