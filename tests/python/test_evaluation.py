"""What an evaluation measures: token losses against plain logits, and the three measures on models of known answers."""

from __future__ import annotations

import json
import math
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    CohereConfig,
    Gemma2Config,
    GPT2Config,
    GPTNeoXConfig,
    GraniteConfig,
    MistralConfig,
    Qwen2Config,
)

from lighthouse.evaluation import Evaluation, EvaluationSettings, evaluate
from lighthouse.evaluation.copies import distances, ordinary_tokens
from lighthouse.evaluation.losses import TokenLosses, dense
from lighthouse.evaluation.passkeys import HIDDEN, lengths
from lighthouse.evaluation.positions import stretches
from lighthouse.evaluation.results import PARTS, CopyAt, CopyLoss
from lighthouse.huggingface.loss import OutputLayer
from lighthouse.report.evaluated import figures, summary
from lighthouse.report.page import png_of
from lighthouse.text.tokenizer import Encoder, byte_tokenizer, load_tokenizer
from small_llama import LIMIT, VOCABULARY, ids, plain, wrapped
from training_tokenizers import save_bpe

pytestmark = pytest.mark.usefixtures("one_thread")

BYTES = 384  # ids of the tokenizer of bytes


def text(rows: int = 3, tokens: int = 512, seed: int = 0) -> torch.Tensor:
    """Random lower-case letters and spaces, as bytes."""
    return torch.randint(97 + 3, 123 + 3, (rows, tokens), generator=torch.Generator().manual_seed(seed))


class Known(nn.Module):
    """A model whose logits `logits_of(ids)` `[B, N, V]` are known; its output layer passes on what it is given."""

    def __init__(self, logits_of, vocabulary: int = BYTES):
        super().__init__()
        self.head, self.logits_of = nn.Identity(), logits_of
        self.weight = nn.Parameter(torch.zeros(1, vocabulary))
        self.device, self.dtype = torch.device("cpu"), torch.float32

    def get_output_embeddings(self):
        return self.head

    def forward(self, input_ids, use_cache):
        return SimpleNamespace(logits=self.head(self.logits_of(input_ids)))


def copier(reach: int, known: float = 20.0):
    """A model that expects what followed the same six tokens before, at most `reach` tokens back; else nothing."""

    def logits_of(batch):
        logits = torch.zeros(*batch.shape, BYTES)
        for row, found in zip(batch.tolist(), logits, strict=True):
            seen = {}
            for t in range(5, len(row)):
                gram = tuple(row[t - 5 : t + 1])
                if gram in seen and t - seen[gram] <= reach:
                    found[t, row[seen[gram] + 1]] = known
                seen[gram] = t
        return logits

    return Known(logits_of)


# Losses ----------------------------------------------------------------------------------------------------------

SMALL = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
SMALL |= {"num_key_value_heads": 1, "vocab_size": VOCABULARY, "max_position_embeddings": LIMIT, "pad_token_id": 0}
NEOX = {name: value for name, value in SMALL.items() if name != "num_key_value_heads"}
GPT2 = {"n_embd": 32, "n_layer": 2, "n_head": 2, "n_positions": LIMIT, "vocab_size": VOCABULARY}
# Whether the model's logits are those of its output layer.
MODELS = [
    ("qwen2", Qwen2Config(**SMALL), True),
    ("mistral", MistralConfig(**SMALL, sliding_window=None), True),
    ("gpt2_with_dropout", GPT2Config(**GPT2, resid_pdrop=0.5, attn_pdrop=0.5), True),
    ("gpt_neox", GPTNeoXConfig(**NEOX), True),
    ("gemma2_caps_its_logits", Gemma2Config(**SMALL, head_dim=16, final_logit_softcapping=2.0), False),
    ("cohere_scales_its_logits", CohereConfig(**SMALL, logit_scale=0.5), False),
    ("granite_scales_its_logits", GraniteConfig(**SMALL, logits_scaling=2.0), False),
]


def losses_of_logits(model, batch):
    with torch.no_grad():
        logits = model.eval()(input_ids=batch, use_cache=False).logits.float()
    return F.cross_entropy(logits[:, :-1].flatten(0, 1), batch[:, 1:].flatten(), reduction="none").view(len(batch), -1)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("config, in_blocks", [m[1:] for m in MODELS], ids=[m[0] for m in MODELS])
def test_losses_are_those_of_the_models_own_logits(config, in_blocks, dtype, monkeypatch, said):
    monkeypatch.setattr("lighthouse.evaluation.losses.chunk_tokens", lambda vocabulary: 50)
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config).to(dtype)
    with torch.no_grad():
        model.get_output_embeddings().weight.mul_(20)  # logits that a cap changes
    batch = ids(rows=3, tokens=70)
    with dense(model):
        losses = TokenLosses(model, batch)
        found, likeliest = losses(batch)
    assert losses.in_blocks is in_blocks
    assert sum("logits" in message for message in said) == (not in_blocks)
    torch.testing.assert_close(
        found, losses_of_logits(model, batch), rtol=1e-5, atol=2e-2 if dtype != torch.float32 else 1e-5
    )
    assert 0 < likeliest.sum() < likeliest.numel()


def test_losses_at_some_positions_are_the_same(monkeypatch):
    monkeypatch.setattr("lighthouse.evaluation.losses.chunk_tokens", lambda vocabulary: 4)
    model, batch, at = plain(), ids(rows=2), torch.tensor([[1, 63, 7], [20, 20, 2]])
    with dense(model):
        losses = TokenLosses(model, batch)
        whole, some = losses(batch), losses(batch, at)
    for all_of_it, found in zip(whole, some, strict=True):
        torch.testing.assert_close(found, all_of_it.gather(1, at - 1))


def test_logits_are_never_made_for_all_tokens(monkeypatch):
    """Of 64 tokens the output layer sees 1 in the forward, and then blocks of 8; the comparison has 64 once."""
    monkeypatch.setattr("lighthouse.evaluation.losses.chunk_tokens", lambda vocabulary: 8)
    model, seen = plain(), []
    model.lm_head.register_forward_hook(lambda module, given, made: seen.append(made.numel() // VOCABULARY))
    with dense(model):
        losses = TokenLosses(model, ids(rows=1))
        seen.clear()
        losses(ids(rows=1))
    assert max(seen) == 8 and sum(seen) == 1 + 63


def test_a_wrapped_model_is_evaluated_dense_and_left_as_it_was():
    rows = ids(rows=2, tokens=LIMIT)
    settings = EvaluationSettings(parts=("loss",))
    model = wrapped(eval="lighthouse", min_tokens=0).train()
    before = model.training, model.lighthouse_enabled, model.config._attn_implementation
    state = {name: value.clone() for name, value in model.state_dict().items()}
    found = evaluate(model, rows, settings=settings)
    assert found == evaluate(plain(), rows, settings=settings)
    assert (model.training, model.lighthouse_enabled, model.config._attn_implementation) == before
    assert all(torch.equal(state[name], value) for name, value in model.state_dict().items())
    assert model.take_used() == (False, False)
    model.lighthouse(False)
    evaluate(model, rows, settings=settings)
    assert not model.lighthouse_enabled
    assert isinstance(model.lm_head, nn.Linear) and not model.lm_head._forward_pre_hooks


def test_an_output_layer_that_gives_the_loss_too(said):
    model = wrapped()
    batch = ids(rows=1)
    model(input_ids=batch, labels=batch)  # its class is swapped at the first loss
    assert isinstance(model.lm_head, OutputLayer)
    with dense(model):
        assert TokenLosses(model, batch).in_blocks


def test_compiled_layers_run_as_they_are():
    """Three lengths; compiled anew for each, `fullgraph` layers would reach the compiler's limit."""
    model, compiled = plain(), []

    def backend(graph, inputs):
        compiled.append(1)
        return graph

    for layer in model.model.layers:
        layer.compile(backend=backend, fullgraph=True, dynamic=False)
    rows = [ids(rows=1, tokens=tokens) for tokens in (16, 32, 64)]
    settings = EvaluationSettings(parts=("loss",))
    found = [evaluate(model, row, settings=settings).loss.loss for row in rows]
    assert not compiled
    assert found == [evaluate(plain(), row, settings=settings).loss.loss for row in rows]
    model(input_ids=rows[0])
    assert compiled  # afterwards as before


def test_autocast_is_the_dtype_of_the_products():
    rows, settings = ids(rows=1), EvaluationSettings(parts=("loss",))
    half = evaluate(plain(), rows, settings=settings, autocast=torch.bfloat16).loss.loss
    whole = evaluate(plain(), rows, settings=settings).loss.loss
    assert half != whole and half == pytest.approx(whole, rel=1e-2)


# Places ----------------------------------------------------------------------------------------------------------

# Of a context: the stretches' first positions, the distances, the lengths of texts with a key.
CONTEXTS = [
    (16_384, [0, 1024, 2048, 4096, 8192], [256, 512, 1024, 2048, 4096, 8192], [1024, 2048, 4096, 8192, 16_384]),
    (98_304, [0] + [1024 << i for i in range(7)], [256 << i for i in range(9)], [6144 << i for i in range(5)]),
    (1024, [0, 256, 512], [256, 512], [256, 512, 1024]),
    (1000, [0, 128, 256, 512], [128, 256, 512], [250 * 2, 1000]),
    (256, [0, 64, 128], [64], [256]),
    (16, [0, 4, 8], [], []),
    (2, [0], [], []),
]


@pytest.mark.parametrize("context, starts, apart, long", CONTEXTS, ids=[str(c[0]) for c in CONTEXTS])
def test_places(context, starts, apart, long):
    found = stretches(context)
    assert [start for start, _ in found] == starts and found[-1][1] == context
    assert all(a[1] == b[0] for a, b in zip(found, found[1:], strict=False))
    assert distances(context) == apart and lengths(context) == long


# Measures --------------------------------------------------------------------------------------------------------


def test_the_loss_of_a_stretch_is_that_of_its_tokens():
    model, rows = plain(), ids(rows=3, tokens=100)
    found = evaluate(model, rows, settings=EvaluationSettings(parts=("loss",))).loss
    loss = losses_of_logits(model, rows).double()
    assert found.loss == pytest.approx(loss.mean().item()) and found.rows == 3
    assert [s.start for s in found.stretches] == [0, 16, 32, 64]
    for stretch in found.stretches:
        its = loss[:, max(stretch.start - 1, 0) : stretch.stop - 1]
        assert stretch.loss == pytest.approx(its.mean().item())
        assert stretch.error == pytest.approx(its.mean(1).std().item() / math.sqrt(3))
    sizes = [s.stop - s.start - (s.start == 0) for s in found.stretches]
    assert sum(s.loss * n for s, n in zip(found.stretches, sizes, strict=True)) / 99 == pytest.approx(found.loss)


def test_a_model_copies_as_far_as_it_reaches():
    found = evaluate(
        copier(reach=300), text(tokens=1100), settings=EvaluationSettings(parts=("copy",), passages=4)
    ).copy
    assert [at.distance for at in found.distances] == [256, 512]
    near, far = found.distances
    assert near.second < 0.01 and near.gain == pytest.approx(math.log(BYTES), abs=0.1)
    assert far.gain == pytest.approx(0, abs=0.1) and near.error < 0.1
    assert found.measurable and found.reach == 256
    assert found.chance == math.log(36) and found.alphabet == "letters and digits"
    nothing = evaluate(
        copier(reach=60), text(tokens=1100), settings=EvaluationSettings(parts=("copy",), passages=4)
    ).copy
    assert not nothing.measurable and nothing.reach == 0


def test_only_the_distance_differs_between_distances():
    """The second appearance stands at the same place, with the same passage, in the same text."""
    seen = []

    def logits_of(batch):
        seen.append(batch.clone())
        return torch.zeros(*batch.shape, BYTES)

    rows = text(rows=2, tokens=1024)
    evaluate(Known(logits_of), rows, settings=EvaluationSettings(parts=("copy",), passages=3))
    by_distance = torch.cat([batch for batch in seen if batch.shape[1] == 1024]).view(2, 3, 1024)
    letters = {byte + 3 for byte in b"abcdefghijklmnopqrstuvwxyz0123456789"}
    for number, (near, far) in enumerate(by_distance.unbind(1)):
        changed_near, changed_far = (found != rows[number % 2] for found in (near, far))
        last = 1024 - 128 - 64
        assert torch.equal(near[last:], far[last:]) and changed_near[last:].any()
        [place] = [p for p in range(last, 1024 - 63) if torch.equal(near[p : p + 64], near[p - 256 : p - 192])]
        assert torch.equal(far[place : place + 64], far[place - 512 : place - 448])
        assert set(near[place : place + 64].tolist()) <= letters
        assert changed_near.sum() <= 128 and changed_far.sum() <= 128


def test_a_key_is_found_as_far_as_the_model_reaches():
    settings = EvaluationSettings(parts=("passkey",), depths=3, trials=4)
    found = evaluate(copier(reach=400), text(tokens=1024), settings=settings).passkey
    grid = {(cell.length, cell.depth): cell for cell in found.cells}
    assert list(grid) == [(length, depth) for length in (256, 512, 1024) for depth in (0, 0.5, 1)]
    for (length, depth), cell in grid.items():
        near = length == 256 or depth == 1 or (length, depth) == (512, 0.5)
        assert cell.accuracy == near, (length, depth)
        assert cell.gain > 30 if near else cell.gain == pytest.approx(0, abs=1e-3), (length, depth)
    assert found.accuracy == pytest.approx(sum(cell.accuracy for cell in found.cells) / 9)


def test_a_model_that_likes_some_digits_knows_no_key():
    likes = torch.zeros(BYTES)
    likes[torch.arange(10) + ord("0") + 3] = torch.linspace(0, 9, 10)
    model = Known(lambda batch: likes.expand(*batch.shape, -1))
    found = evaluate(model, text(), settings=EvaluationSettings(parts=("passkey",), trials=6)).passkey
    assert all(cell.gain == pytest.approx(0, abs=1e-4) and cell.accuracy == 0 for cell in found.cells)


def test_the_first_token_of_a_row_stays_the_first_and_the_other_key_is_nowhere():
    seen = []

    def logits_of(batch):
        seen.append(batch.clone())
        return torch.zeros(*batch.shape, BYTES)

    rows = text(tokens=256)
    rows[:, 0] = 2
    evaluate(Known(logits_of), rows, settings=EvaluationSettings(parts=("passkey",), trials=2, depths=2))
    texts = [bytes((row[1:] - 3).tolist()).decode() for batch in seen[1:] for row in batch]
    assert len(texts) == 8 and all(row[0] == 2 for batch in seen[1:] for row in batch)
    for with_key, with_other in zip(texts[::2], texts[1::2], strict=True):
        key = with_key[-5:]
        assert HIDDEN.format(key=key) in with_key and HIDDEN.format(key=key) in with_other
        assert with_key[:-5] == with_other[:-5] and with_other[-5:] not in with_other[:-5]


def test_passages_of_a_vocabulary_have_no_special_token(tmp_path):
    tokenizer = load_tokenizer(save_bpe(tmp_path))
    found, said = ordinary_tokens(Encoder(tokenizer), 10_000)
    assert said == "tokens of the vocabulary"
    assert not set(found.tolist()) & set(tokenizer.all_special_ids) and len(found) == len(tokenizer) - 1
    assert ordinary_tokens(Encoder(tokenizer), 40)[0].max() < 40


def test_a_tokenizer_of_words(tmp_path):
    """Keys of several tokens each, and texts that begin with whatever their tokenizer makes of a line."""
    tokenizer = load_tokenizer(save_bpe(tmp_path))
    model = plain(vocab_size=len(tokenizer), max_position_embeddings=512)
    rows = torch.randint(5, len(tokenizer), (2, 512), generator=torch.Generator().manual_seed(0))
    found = evaluate(model, rows, tokenizer, EvaluationSettings(trials=2, depths=2, passages=2))
    assert found.copy.chance == math.log(len(ordinary_tokens(Encoder(tokenizer), len(tokenizer))[0]))
    assert all(math.isfinite(cell.gain) for cell in found.passkey.cells)


# All of it -------------------------------------------------------------------------------------------------------


def test_the_same_again_and_through_json():
    model = plain(vocab_size=BYTES, max_position_embeddings=512)
    settings = EvaluationSettings(passages=2, trials=2, depths=2)
    random = torch.get_rng_state()
    first, second = (evaluate(model, text(), settings=settings) for _ in range(2))
    assert first == second and torch.equal(random, torch.get_rng_state())
    assert Evaluation.from_json(json.loads(json.dumps(first.to_json()))) == first
    other = evaluate(model, text(), settings=EvaluationSettings(passages=2, trials=2, depths=2, seed=1))
    assert other.loss == first.loss and other.copy != first.copy and other.passkey != first.passkey


def test_what_is_known_is_not_measured_again():
    model = plain(vocab_size=BYTES, max_position_embeddings=512)
    settings, parts = EvaluationSettings(passages=2, trials=2, depths=2), {}
    whole = evaluate(model, text(), settings=settings, found=parts.__setitem__)
    assert list(parts) == list(PARTS) == ["loss", "copy", "passkey"]
    again, known = [], {name: parts[name] for name in ("loss", "passkey")}
    assert evaluate(model, text(), settings=settings, known=known, found=lambda n, p: again.append(n)) == whole
    assert again == ["copy"]


REACHES = [
    ("all", [3.0, 2.0, 0.6], True, 1024),
    ("near", [3.0, 0.4, 0.1], True, 256),
    ("with_a_gap", [3.0, 0.4, 2.0], True, 256),
    ("far_alone", [0.1, 0.4, 2.0], True, 0),
    ("none", [0.1, 0.5, 0.2], False, 0),
]


@pytest.mark.parametrize("gains, measurable, reach", [r[1:] for r in REACHES], ids=[r[0] for r in REACHES])
def test_reach(gains, measurable, reach):
    at = [CopyAt(256 << i, 4.0, 4.0 - gain, 0.1) for i, gain in enumerate(gains)]
    found = CopyLoss(at, 32, 64, 8, "letters and digits", math.log(36))
    assert (found.measurable, found.reach) == (measurable, reach)
    [said] = summary(Evaluation(4096, 1, {}, copy=found))
    assert ("not measurable" in said) is not measurable
    assert ("up to 1K tokens" in said) is (reach == 1024)


def test_pictures_of_one_and_of_several():
    model = plain(vocab_size=BYTES, max_position_embeddings=512)
    settings = EvaluationSettings(passages=2, trials=2, depths=2)
    found = evaluate(model, text(), settings=settings)
    some = evaluate(model, text(), settings=EvaluationSettings(parts=("loss",)))
    for shown in ({"a": found}, {"a": found, "b": some, "c": found}):
        drawn = figures(shown)
        assert list(drawn) == ["loss", "copy", "passkey"]
        assert all(png_of(figure).startswith(b"\x89PNG") for figure in drawn.values())
        assert len(drawn["passkey"].axes) == 2 * (len(shown) - ("b" in shown))
    assert list(figures({"b": some})) == ["loss"] and len(summary(found)) == 3


def bare():
    model = plain()
    return model.model


def broken():
    model = plain()
    model.lm_head.weight.data[3] = math.inf
    return model


REFUSED = [
    (
        "too_short_for_copies",
        plain,
        ids(tokens=200),
        {"parts": ("copy",)},
        "context=200: the part 'copy' needs at least 256",
    ),
    ("too_short_for_keys", plain, ids(tokens=200), {"parts": ("passkey",)}, "the part 'passkey' needs at least 256"),
    ("one_token", plain, ids(tokens=1), {"parts": ("loss",)}, "context=1: the part 'loss' needs at least 2"),
    ("no_rows", plain, ids()[:0], {"parts": ("loss",)}, r"rows has shape \[0, 64\]: at least one sequence"),
    ("one_sequence", plain, ids()[0], {"parts": ("loss",)}, r"rows has shape \[64\]"),
    (
        "a_larger_vocabulary",
        plain,
        ids() + 1,
        {"parts": ("loss",)},
        "rows has ids up to 61: the model's vocabulary has 0 to 60",
    ),
    ("no_output_layer", bare, ids(), {"parts": ("loss",)}, "LlamaModel without an output layer"),
    ("not_finite", broken, ids(), {"parts": ("loss",)}, "losses are not finite in torch.float32"),
    ("an_unknown_part", plain, ids(), {"parts": ("speed",)}, "parts='speed': one of loss, copy, passkey"),
    ("a_part_twice", plain, ids(), {"parts": ("loss", "loss")}, "each once"),
    ("no_part", plain, ids(), {"parts": ()}, "at least one part"),
    ("an_odd_number_of_keys", plain, ids(), {"trials": 3}, "trials=3: an even number"),
    ("one_depth", plain, ids(), {"depths": 1}, "depths=1: at least 2"),
    ("no_passage", plain, ids(), {"passages": 0}, "passages=0: at least 1"),
]


@pytest.mark.parametrize("model, rows, settings, message", [r[1:] for r in REFUSED], ids=[r[0] for r in REFUSED])
def test_refused(model, rows, settings, message):
    with pytest.raises((ValueError, TypeError), match=message):
        evaluate(model(), rows, byte_tokenizer(), EvaluationSettings(**settings))
