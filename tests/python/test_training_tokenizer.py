"""Tokenizers: bytes and BPE, marks in a text that stay text, long texts, and what is refused."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("transformers")

from transformers import AutoTokenizer  # noqa: E402

from lighthouse.training.tokenizer import Encoder, load_tokenizer  # noqa: E402
from training_tokenizers import END, save_bpe, save_whole_words  # noqa: E402

TEXTS = [
    ("words", "the light of a house on the rock\n"),
    ("other_alphabets", "naïve façade, 灯台 and\ttabs\r\n"),
    ("blanks", "  \n\n   x"),
    ("a_mark", f"a </s> b{END}c <pad> <extra_id_0>"),
    ("a_long_text", "the sea by the rock " * 2000),
]


@pytest.fixture(scope="module", params=["bytes", "bytes_from_a_folder", "bpe", "bpe_without_backend"])
def encoder(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp("tokenizer")
    if request.param == "bytes":
        return Encoder(load_tokenizer(None))
    if request.param == "bytes_from_a_folder":
        load_tokenizer(None).save_pretrained(folder)
        return Encoder(load_tokenizer(str(folder)))
    encoder = Encoder(load_tokenizer(save_bpe(folder)))
    if request.param == "bpe_without_backend":
        encoder._fast = None  # the way of tokenizers written in Python
    return encoder


@pytest.mark.parametrize("text", [t[1] for t in TEXTS], ids=[t[0] for t in TEXTS])
def test_a_text_is_its_tokens_and_no_special_one(encoder, text, recwarn, caplog):
    [ids] = encoder([text.encode()])
    assert encoder.tokenizer.decode(ids.tolist()) == text
    assert not set(ids.tolist()) & set(encoder.tokenizer.all_special_ids)
    assert not recwarn.list and not caplog.records  # nothing about model_max_length


def test_a_text_without_marks_is_what_transformers_makes_of_it(encoder):
    text = "the light of a house, 灯台\n"
    assert encoder([text.encode()])[0].tolist() == encoder.tokenizer(text, add_special_tokens=False)["input_ids"]


def test_pieces_keep_their_order_and_number(encoder):
    pieces = [word.encode() for word in ("the sea", "", "a rock", "x" * 5000)]
    alone = [encoder([piece])[0] for piece in pieces]
    assert [a.tolist() for a in encoder(pieces)] == [a.tolist() for a in alone]
    assert all(ids.dtype == np.uint16 for ids in alone)


def test_the_identity_is_the_tokens_and_not_the_folder(tmp_path):
    one, same = (Encoder(load_tokenizer(save_bpe(tmp_path / name))) for name in "ab")
    assert one.identity == same.identity != Encoder(load_tokenizer(None)).identity
    file = tmp_path / "b" / "tokenizer.json"
    file.write_text(file.read_text().replace('"add_prefix_space": false', '"add_prefix_space": true'))
    assert Encoder(AutoTokenizer.from_pretrained(tmp_path / "b")).identity != one.identity


def without_end_mark(folder: Path) -> str:
    return save_bpe(folder, eos_token=None)


def of_class(name: str):
    def save(folder: Path) -> str:
        (folder / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": name}))
        return str(folder)

    return save


REFUSED = [
    ("a_missing_folder", lambda folder: "./nowhere", OSError, "tokenizer='./nowhere' cannot be loaded"),
    ("an_empty_folder", str, ValueError, "tokenizer=.* cannot be loaded: "),
    ("no_end_mark", without_end_mark, ValueError, "has no end mark"),
    ("an_end_mark_that_is_a_word", save_whole_words, ValueError, "reads '</s>' in a text as its special token 1"),
    ("no_vocabulary", of_class("LlamaTokenizer"), ValueError, "knows no text, 3 tokens in all"),
    ("a_missing_package", of_class("MarianTokenizer"), ValueError, "requires the SentencePiece library"),
]


@pytest.mark.parametrize("save, error, message", [r[1:] for r in REFUSED], ids=[r[0] for r in REFUSED])
def test_refused(tmp_path, save, error, message):
    with pytest.raises(error, match=message):
        load_tokenizer(save(tmp_path))
