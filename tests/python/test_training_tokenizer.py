"""Tokenizers: bytes and BPE, marks in a text that stay text, long texts, and what is refused."""

from __future__ import annotations

import json
import re
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("transformers")

from tokenizers import normalizers  # noqa: E402
from transformers import AutoTokenizer  # noqa: E402

from lighthouse.text import data  # noqa: E402
from lighthouse.text.tokenizer import Encoder, _check_text_stays_text, load_tokenizer  # noqa: E402
from lighthouse.training.options import DataOptions  # noqa: E402
from training_tokenizers import END, save_bpe, save_letters, save_whole_words  # noqa: E402

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


def test_ids_with_holes_fit_into_their_type(tmp_path):
    """Fewer than 65,536 tokens, and an id beyond."""
    encoder = Encoder(load_tokenizer(save_letters(tmp_path, th=70_000)))
    assert len(encoder.tokenizer) < 2**16 and encoder.ids == 70_001 and encoder.dtype == np.int32
    [ids] = encoder([b"the sea"])
    assert ids[0] == 70_000 and encoder.tokenizer.decode(ids.tolist()) == "the sea"


class Stand:
    """A tokenizer written in Python that gives the ids it was made with."""

    name_or_path, is_fast, eos_token_id, unk_token_id = "stand", False, 1, None

    def __init__(self, *ids):
        self.ids = list(ids)

    def __len__(self):
        return 9

    def get_vocab(self):
        return {str(number): number for number in range(9)}

    def save_pretrained(self, folder):
        Path(folder, "vocab.txt").write_text("")

    def __call__(self, texts, **options):
        return {"input_ids": [self.ids] * len(texts)}


NO_IDS = [
    ("none", [3, None], "'stand' has no id for some text"),
    ("negative", [3, -1], "'stand' gives the id -1, but its vocabulary has 0 to 8"),
    ("beyond_the_vocabulary", [9], "'stand' gives the id 9, but its vocabulary has 0 to 8"),
]


@pytest.mark.parametrize("ids, message", [n[1:] for n in NO_IDS], ids=[n[0] for n in NO_IDS])
def test_what_is_no_id_is_refused(ids, message):
    with pytest.raises(ValueError, match=message):
        Encoder(Stand(*ids))
    good = Encoder(Stand(3, 4))
    good.tokenizer.ids = ids
    with pytest.raises(ValueError, match=message):  # in a text, late
        good([b"text"])


def test_one_that_adds_marks_by_itself_is_refused():
    adds = Stand(1, 3)
    adds.all_special_ids, adds.all_special_tokens = [1], ["</s>"]
    with pytest.raises(ValueError, match="tokenizer='stand' adds '</s>' to a text although"):
        _check_text_stays_text("stand", Encoder(adds))


def test_the_identity_is_all_that_a_tokenizer_saves_and_gives():
    one, same, other_ids, other_file = Stand(3), Stand(3), Stand(4), Stand(3)
    other_file.save_pretrained = lambda folder: Path(folder, "merges.txt").write_text("t h")
    assert Encoder(one).identity == Encoder(same).identity
    assert len({Encoder(stand).identity for stand in (one, other_ids, other_file)}) == 3


def test_a_tokenizer_that_changes_text_is_said_to(tmp_path, encoder):
    assert encoder.loses == ""
    lowers = load_tokenizer(save_letters(tmp_path, normalizer=normalizers.Lowercase()))
    assert "'The light of" in Encoder(lowers).loses and "is decoded as 'the light of" in Encoder(lowers).loses


def test_many_unknown_tokens_are_said(tmp_path):
    tokenizer = load_tokenizer(
        save_letters(tmp_path / "tokenizer", letters="aehilTtfousncrkbydwv;.1234 ", unk_token="<unk>")
    )
    for number in range(9):
        (tmp_path / str(number)).write_text(f"{number} " + "the sea by night, and a ship\n" * 50)
    options = DataOptions(data=[str(tmp_path / str(number)) for number in range(9)], held_out=2)
    said = str(data.find_corpus(options, context=128, seed=0, tokenizer=tokenizer))
    assert re.search(r"\nNote: \d+\.\d% of the held-out tokens are the unknown token '<unk>'\.", said)


def without_end_mark(folder: Path) -> str:
    return save_bpe(folder, eos_token=None)


def of_class(name: str):
    def save(folder: Path) -> str:
        (folder / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": name}))
        return str(folder)

    return save


REFUSED = [
    ("a_missing_folder", lambda folder: "./nowhere", OSError, "tokenizer='./nowhere' cannot be loaded"),
    ("an_empty_folder", str, ValueError, "tokenizer=.* is a folder without a tokenizer"),
    ("no_end_mark", without_end_mark, ValueError, "has no end token"),
    ("an_end_mark_that_is_a_word", save_whole_words, ValueError, "encodes '</s>' in a text as its special token 1"),
    ("no_vocabulary", of_class("LlamaTokenizer"), ValueError, "cannot encode text, with 3 tokens in all"),
    ("a_missing_package", of_class("MarianTokenizer"), ValueError, "requires the SentencePiece library"),
]


@pytest.mark.parametrize("save, error, message", [r[1:] for r in REFUSED], ids=[r[0] for r in REFUSED])
def test_refused(tmp_path, save, error, message):
    with pytest.raises(error, match=message):
        load_tokenizer(save(tmp_path))
