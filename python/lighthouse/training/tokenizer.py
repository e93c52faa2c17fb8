"""Tokenizers by folder or name, and UTF-8 text to ids with them.

Without a name bytes are the tokens, byte + 3 as ByT5Tokenizer has it, computed without the tokenizer itself, which does
under a megabyte a second. The trap: a tokenizer usually reads text such as "</s>" as its own end mark. Here a mark in
a text stays text, and a tokenizer that cannot do so is refused.
"""

from __future__ import annotations

import hashlib
import json

import numpy as np
from transformers import AutoTokenizer, ByT5Tokenizer, PreTrainedTokenizerBase

from lighthouse.training.model import byte_tokenizer

SAMPLE = "The light of a house on the rock; 1234 ships see it.\n"


def load_tokenizer(name: str | None) -> PreTrainedTokenizerBase:
    """The tokenizer in a folder, or of that name on the Hub; bytes for None.

    Raises:
        OSError: there is no such folder or name, or the Hub cannot be reached.
        ValueError: it cannot be loaded, has no end mark, or turns text into its own special tokens.
    """
    if name is None:
        return byte_tokenizer()
    try:
        tokenizer = AutoTokenizer.from_pretrained(name)
    except OSError as error:
        raise OSError(f"tokenizer={name!r} cannot be loaded: {error}") from error
    except Exception as error:  # a missing package, which the message names; a file that is no tokenizer
        raise ValueError(f"tokenizer={name!r} cannot be loaded: {str(error).strip()}") from error
    if tokenizer.eos_token_id is None:
        raise ValueError(
            f"tokenizer={name!r} has no end mark (eos_token), which is needed behind each document: "
            "set eos_token and save the tokenizer again"
        )
    _check_text_stays_text(name, Encoder(tokenizer))
    return tokenizer


class Encoder:
    """Text to ids, without special tokens: a call takes pieces of UTF-8 text and returns an array of ids for each.

    `end` is the end mark's id, `dtype` the smallest in which all ids fit, and `identity` a hash that two tokenizers
    share that give the same ids.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase):
        self.tokenizer = tokenizer
        self.end = int(tokenizer.eos_token_id)
        self.dtype = np.dtype(np.uint16 if len(tokenizer) <= 2**16 else np.int32)
        self.is_bytes = isinstance(tokenizer, ByT5Tokenizer)
        self._fast = None
        if not self.is_bytes and tokenizer.is_fast:
            # A copy, whose switches nobody else turns; encode_batch_fast leaves out the offsets that nobody needs.
            self._fast = type(tokenizer.backend_tokenizer).from_str(tokenizer.backend_tokenizer.to_str())
            self._fast.encode_special_tokens = True
            self._fast.no_truncation()
            self._fast.no_padding()
        self.identity = self._identity()

    def __call__(self, pieces: list[bytes]) -> list[np.ndarray]:
        if self.is_bytes:
            return [np.frombuffer(piece, np.uint8).astype(self.dtype) + self.tokenizer.offset for piece in pieces]
        texts = [piece.decode("utf-8") for piece in pieces]
        if self._fast is not None:
            encoded = [encoding.ids for encoding in self._fast.encode_batch_fast(texts, add_special_tokens=False)]
        else:
            encoded = self.tokenizer(
                texts,
                add_special_tokens=False,
                split_special_tokens=True,
                truncation=False,
                return_attention_mask=False,
                verbose=False,  # of more tokens than model_max_length: rows are cut afterwards
            )["input_ids"]
        return [np.asarray(ids, dtype=self.dtype) for ids in encoded]

    def _identity(self) -> str:
        kind = "bytes" if self.is_bytes else type(self.tokenizer).__name__
        if self.is_bytes:
            described = self.tokenizer.offset
        elif self._fast is not None:
            described = self._fast.to_str()
        else:
            described = sorted(self.tokenizer.get_vocab().items())
        return hashlib.sha256(json.dumps([kind, self.end, described]).encode()).hexdigest()[:32]


def _check_text_stays_text(name: str, encode: Encoder) -> None:
    tokenizer = encode.tokenizer
    if encode.is_bytes:
        return
    [sample] = encode([SAMPLE.encode()])
    if len(sample) == 0 or (sample == (-1 if tokenizer.unk_token_id is None else tokenizer.unk_token_id)).all():
        raise ValueError(f"tokenizer={name!r} knows no text, {len(tokenizer)} tokens in all: its vocabulary is missing")
    for token, number in zip(tokenizer.all_special_tokens, tokenizer.all_special_ids, strict=True):
        if number == tokenizer.unk_token_id:
            continue
        [ids] = encode([f"a {token} b{token}c\n".encode()])
        if number in ids:
            raise ValueError(
                f"tokenizer={name!r} reads {token!r} in a text as its special token {number}: a document could end "
                "where its text says so; use a tokenizer that can split its special tokens"
            )
