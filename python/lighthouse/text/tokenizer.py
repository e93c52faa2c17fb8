"""Tokenizers by folder or name, and documents to ids with them.

Without a name bytes are the tokens, byte + 3 as ByT5Tokenizer has it, computed without the tokenizer itself, which does
under a megabyte a second. The trap: a tokenizer usually encodes text such as "</s>" as its own end token. Here it
stays text, and a tokenizer that cannot do so is refused.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import tempfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from transformers import AutoTokenizer, ByT5Tokenizer, PreTrainedTokenizerBase

from lighthouse.text.documents import Documents

SAMPLE = "The light of a house on the rock; 1234 ships see it.\n"
# Its ids are part of a tokenizer's identity: another version of the tokenizers library may give different ones.
SAMPLES = [SAMPLE, "  def f(x):\n\treturn x != 1.5e-3  # naïve\r\n", "Ελλάδα, Москва, 灯台の光 🌊 ﬁn\u00a0½\n"]
FILES = re.compile(
    r"^(tokenizer|vocab|merges|spiece|sentencepiece).*|\.model$"
)  # by one of these it may be a tokenizer's
BATCH = 2**22  # bytes tokenized at a time


def byte_tokenizer() -> ByT5Tokenizer:
    """Bytes as tokens: needs no files and no network. Its ids are 0 to `len(tokenizer) - 1`."""
    return ByT5Tokenizer()


def load_tokenizer(name: str | None) -> PreTrainedTokenizerBase:
    """The tokenizer in a folder, or of that name on the Hub; bytes for None.

    Raises:
        OSError: there is no such folder or name, or the Hub cannot be reached.
        ValueError: it cannot be loaded, has no end token, turns text into its own special tokens, adds them by itself,
            or gives ids outside its vocabulary.
    """
    if name is None:
        return byte_tokenizer()
    try:
        tokenizer = AutoTokenizer.from_pretrained(name)
    except OSError as error:
        raise OSError(f"tokenizer={name!r} cannot be loaded: {' '.join(str(error).split())}") from error
    except Exception as error:  # a missing package, which the message names; a file that is no tokenizer
        if os.path.isdir(name) and not any(FILES.search(file) for file in os.listdir(name)):
            raise ValueError(f"tokenizer={name!r} is a folder without a tokenizer (tokenizer.json)") from error
        raise ValueError(f"tokenizer={name!r} cannot be loaded: {' '.join(str(error).split())}") from error
    if tokenizer.eos_token_id is None:
        raise ValueError(
            f"tokenizer={name!r} has no end token (eos_token), which is needed after each document: "
            "set eos_token and save the tokenizer again"
        )
    _check_text_stays_text(name, Encoder(tokenizer))
    return tokenizer


class Encoder:
    """Text to ids, without special tokens: a call takes pieces of UTF-8 text and returns an array of ids for each.

    `end` is the end token's id, `ids` one more than the highest id, `dtype` the smallest in which all of them fit, and
    `identity` a hash that is equal for tokenizers that give the same ids.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase):
        self.tokenizer = tokenizer
        self.end = int(tokenizer.eos_token_id)
        # Not the number of tokens: ids may have holes.
        self.ids = 1 + max(self.end, len(tokenizer) - 1, *tokenizer.get_vocab().values())
        self.dtype = np.dtype(np.uint16 if self.ids <= 2**16 else np.int32)
        self.is_bytes = isinstance(tokenizer, ByT5Tokenizer)
        self._fast = None
        if not self.is_bytes and tokenizer.is_fast:
            # A copy, so that nobody else changes its settings; encode_batch_fast leaves out the offsets.
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
        return [self._checked(ids) for ids in encoded]

    @property
    def unknown(self) -> int | None:
        """The id that stands for text without a token; None where bytes are the tokens or there is no such id."""
        return None if self.is_bytes else self.tokenizer.unk_token_id

    @property
    def loses(self) -> str:
        """A sentence if decoding does not give the text back, else nothing."""
        if self.is_bytes:
            return ""
        [ids] = self([SAMPLE.encode()])
        back = str(self.tokenizer.decode(ids.tolist(), clean_up_tokenization_spaces=False))
        if back.strip() == SAMPLE.strip():
            return ""
        return f"Note: the tokenizer changes text: {SAMPLE!r} is decoded as {back!r}, and the model learns that."

    def _checked(self, ids: list[int]) -> np.ndarray:
        name = f"tokenizer={self.tokenizer.name_or_path!r}"
        try:
            found = np.asarray(ids, dtype=np.int64)
        except TypeError:
            raise ValueError(
                f"{name} has no id for some text, not even an unknown token: give it an unk_token"
            ) from None
        if found.size and (found.min() < 0 or found.max() >= self.ids):
            wrong = found[(found < 0) | (found >= self.ids)][0]
            raise ValueError(f"{name} gives the id {wrong}, but its vocabulary has 0 to {self.ids - 1}: it is damaged")
        return found.astype(self.dtype)

    def _identity(self) -> str:
        if self.is_bytes:
            return _hash(["bytes", self.end, self.tokenizer.offset])
        kind = f"{type(self.tokenizer).__module__}.{type(self.tokenizer).__qualname__}"
        if self._fast is not None:
            described = self._fast.to_str()
        else:  # all that it saves: a vocabulary alone has no merges, scores or settings
            with tempfile.TemporaryDirectory() as folder:
                self.tokenizer.save_pretrained(folder)
                files = sorted(path for path in Path(folder).rglob("*") if path.is_file())
                described = [(path.name, hashlib.sha256(path.read_bytes()).hexdigest()) for path in files]
        ids = [found.tolist() for text in SAMPLES for found in self([text.encode()])]
        return _hash([kind, self.end, described, ids])


def tokens_of(text: Documents, encoder: Encoder, batch: int | None = None) -> Iterator[tuple[int, int, np.ndarray]]:
    """Yields `(document, offset, ids)`, in order: `ids` `[T]` are the document's tokens from `offset`.

    An end token follows the last piece of each document. `batch` bytes are tokenized at a time, by default `BATCH`.
    """
    batch = BATCH if batch is None else batch
    waiting: list[tuple[int, bytes | None]] = []  # None after the last piece
    size = 0
    end = np.array([encoder.end], dtype=encoder.dtype)
    position = 0

    def encoded():
        nonlocal position
        ids_of = iter(encoder([piece for _, piece in waiting if piece is not None]))
        for number, piece in waiting:
            ids = end if piece is None else next(ids_of)
            yield number, position, ids
            position = 0 if piece is None else position + len(ids)
        waiting.clear()

    for number, pieces in text:
        some = False
        for piece in pieces:
            some = True
            waiting.append((number, piece))
            size += len(piece)
            if size >= batch:
                yield from encoded()
                size = 0
        if some:
            waiting.append((number, None))
    yield from encoded()


def _check_text_stays_text(name: str, encode: Encoder) -> None:
    tokenizer = encode.tokenizer
    if encode.is_bytes:
        return
    [sample] = encode([SAMPLE.encode()])
    if len(sample) == 0 or (sample == (-1 if tokenizer.unk_token_id is None else tokenizer.unk_token_id)).all():
        raise ValueError(
            f"tokenizer={name!r} cannot encode text, with {len(tokenizer)} tokens in all: its vocabulary is missing"
        )
    special = dict(zip(tokenizer.all_special_ids, tokenizer.all_special_tokens, strict=True))
    special.pop(tokenizer.unk_token_id, None)
    added = [special[number] for number in sample.tolist() if number in special]
    if added:
        raise ValueError(
            f"tokenizer={name!r} adds {added[0]!r} to a text although no special tokens were asked for; documents "
            "are tokenized in pieces, so it would appear inside them: switch this off and save the tokenizer again"
        )
    for number, token in special.items():
        [ids] = encode([f"a {token} b{token}c\n".encode()])
        if number in ids:
            raise ValueError(
                f"tokenizer={name!r} encodes {token!r} in a text as its special token {number}, so a document could "
                "end in the middle; use a tokenizer that can split its special tokens"
            )


def _hash(parts) -> str:
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:32]
