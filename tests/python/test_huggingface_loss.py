"""The loss without logits: the plain model's loss and gradients, and never a tensor of all logits."""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import LlamaForCausalLM, LlamaModel
from transformers.loss.loss_utils import ForCausalLMLoss

from lighthouse.huggingface import loss as loss_module
from lighthouse.huggingface.loss import OutputLayer, next_token_loss
from small_llama import MODELS, TOKENS, VOCABULARY, ids, plain, wrapped

pytestmark = pytest.mark.usefixtures("one_thread")

both = pytest.mark.parametrize("model_class", MODELS)


@pytest.fixture(autouse=True)
def short_chunks(monkeypatch):
    """Several chunks, the last one short: 128 tokens by 24."""
    monkeypatch.setattr(loss_module, "CHUNK_TOKENS", 24)
    monkeypatch.setattr(loss_module, "CHUNK_LOGITS", 0)


def some_ignored():
    labels = ids().clone()
    labels[0, :50] = -100
    labels[1, 7] = -100
    return labels


CASES = [
    ("all_labels", {"labels": ids()}),
    ("some_ignored", {"labels": some_ignored()}),
    ("items_as_a_tensor", {"labels": some_ignored(), "num_items_in_batch": torch.tensor(200)}),
    ("items_as_an_int", {"labels": ids(), "num_items_in_batch": 77}),
    ("shifted_labels", {"labels": ids(), "shift_labels": ids(seed=5)}),
]
cases = pytest.mark.parametrize("arguments", [case[1] for case in CASES], ids=[case[0] for case in CASES])


@cases
@pytest.mark.parametrize("tied", [False, True], ids=["own_head", "tied_head"])
def test_loss_and_gradients_are_the_plain_models(arguments, tied):
    model = wrapped(config={"tie_word_embeddings": tied}).lighthouse(False)
    never = plain(tie_word_embeddings=tied)
    out, expected = model(ids(), **arguments), never(ids(), **arguments)
    assert out.logits is None
    torch.testing.assert_close(out.loss, expected.loss)
    out.loss.backward()
    expected.loss.backward()
    for (name, p), (_, q) in zip(model.named_parameters(), never.named_parameters(), strict=True):
        torch.testing.assert_close(p.grad, q.grad, msg=lambda text, name=name: f"{name}: {text}")


@cases
def test_a_bare_model_predicts_with_its_embedding(arguments):
    model = wrapped(LlamaModel).lighthouse(False)
    never = plain(LlamaModel)
    out = model(ids(), **arguments)
    logits = never(ids()).last_hidden_state @ never.embed_tokens.weight.T
    expected = ForCausalLMLoss(logits, vocab_size=VOCABULARY, **arguments)
    torch.testing.assert_close(out.loss, expected)
    out.loss.backward()
    expected.backward()
    for (name, p), (_, q) in zip(model.named_parameters(), never.named_parameters(), strict=True):
        torch.testing.assert_close(p.grad, q.grad, msg=lambda text, name=name: f"{name}: {text}")


@both
def test_the_loss_does_not_depend_on_the_chunks(model_class, monkeypatch):
    model = wrapped(model_class)
    chunked = model({"input_ids": ids()}).loss
    monkeypatch.setattr(loss_module, "CHUNK_TOKENS", 1 << 20)
    torch.testing.assert_close(model({"input_ids": ids()}).loss, chunked)


class Largest(TorchDispatchMode):
    """The most numbers that any result had whose last dimension is the vocabulary."""

    def __init__(self):
        super().__init__()
        self.rows = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        for value in result if isinstance(result, (tuple, list)) else (result,):
            if isinstance(value, torch.Tensor) and value.ndim > 1 and value.shape[-1] == VOCABULARY:
                self.rows = max(self.rows, value.numel() // VOCABULARY)
        return result


@both
def test_the_logits_are_never_held(model_class):
    model = wrapped(model_class)
    with Largest() as largest:
        model({"input_ids": ids()}).loss.backward()
    assert 0 < largest.rows <= 32  # 32: the weight's transpose


def test_nothing_of_the_logits_size_is_saved_for_the_backward():
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t.shape) or t, lambda t: t):
        next_token_loss(torch.nn.Linear(8, VOCABULARY), torch.randn(2, TOKENS, 8, requires_grad=True), ids())
    assert saved and not any(len(s) > 1 and s[-1] == VOCABULARY for s in saved)


def test_the_models_own_loss_gives_logits():
    model, never = wrapped(loss="model"), plain()
    model.lighthouse(False)
    out, expected = model(ids(), labels=ids()), never(ids(), labels=ids())
    assert torch.equal(out.loss, expected.loss) and torch.equal(out.logits, expected.logits)
    assert model.lighthouse(True)({"input_ids": ids()}).logits.shape == (2, TOKENS, VOCABULARY)


def test_a_loss_function_of_the_users_is_used():
    model = plain()
    model.loss_function = lambda logits, labels, vocab_size, **_: logits.sum() * 0 + 3
    from lighthouse import LighthouseWrapper

    assert LighthouseWrapper(model, loss="model")({"input_ids": ids()}).loss == 3


def test_hidden_tokens_are_not_predicted_by_default():
    mask = torch.ones(2, TOKENS, dtype=torch.long)
    mask[:, :10] = 0
    labels = ids().masked_fill(mask == 0, -100)
    for model_class in (LlamaModel, LlamaForCausalLM):
        model = wrapped(model_class).eval()
        with torch.no_grad():
            loss = model({"input_ids": ids(), "attention_mask": mask}).loss
            assert torch.equal(loss, model(ids(), attention_mask=mask, labels=labels).loss)


def test_logits_to_keep_is_the_plain_models():
    model = wrapped().eval()
    assert model(ids(), logits_to_keep=1).logits.shape == (2, 1, VOCABULARY)
    assert model(ids(), labels=ids(), logits_to_keep=TOKENS).logits.shape == (2, TOKENS, VOCABULARY)
    assert wrapped(LlamaModel)(ids(), labels=ids(), logits_to_keep=1).loss.isfinite()


def test_all_labels_ignored_is_not_a_number_as_in_the_plain_model():
    labels = torch.full((2, TOKENS), -100)
    assert wrapped()(ids(), labels=labels).loss.isnan() and plain()(ids(), labels=labels).loss.isnan()


def test_a_new_embedding_is_followed():
    model = wrapped(LlamaModel)
    model.set_input_embeddings(torch.nn.Embedding(VOCABULARY, 32))
    model({"input_ids": ids()}).loss.backward()
    assert model.embed_tokens.weight.grad is not None
    assert type(model.unwrap().embed_tokens) is torch.nn.Embedding


def test_an_output_layer_still_gives_logits():
    layer = torch.nn.Linear(8, 5)
    hidden, targets = torch.randn(40, 8), torch.randint(0, 5, (40,))
    before = layer(hidden)
    next_token_loss(layer, hidden[None], targets[None])
    assert isinstance(layer, OutputLayer) and torch.equal(layer(hidden), before)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_the_sum_is_float32(dtype):
    layer = torch.nn.Linear(8, 5, dtype=dtype)
    loss = next_token_loss(layer, torch.randn(1, 400, 8, dtype=dtype), torch.randint(0, 5, (1, 400)))
    assert loss.dtype == torch.float32


def of_many_stretches(dtype, autocast=False, *, ignored=False, bias=False, frozen=()):
    """Errors of loss and gradients against float64, relative: ours in 43 stretches, and plain logits'."""
    generator = torch.Generator().manual_seed(0)
    layer = torch.nn.Linear(48, 200, bias=bias)
    with torch.no_grad():
        layer.weight.normal_(0, 0.3, generator=generator)
    layer = layer.to(dtype)
    layer.weight.requires_grad_("weight" not in frozen)
    hidden = torch.randn(1024, 48, generator=generator).to(dtype).requires_grad_("hidden" not in frozen)
    targets = torch.randint(0, 200, (1024,), generator=generator)
    if ignored:
        targets[::3] = -100
    leaves = [tensor for tensor in (hidden, *layer.parameters()) if tensor.requires_grad]

    def run(loss_of):
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            loss = loss_of()
        return [loss.detach(), *torch.autograd.grad(loss, leaves)]

    plain_loss = run(lambda: torch.nn.functional.cross_entropy(layer(hidden).float(), targets))
    ours = run(lambda: next_token_loss(layer, hidden[None], None, shift_labels=targets[None]))
    wide = [tensor.detach().double().requires_grad_() for tensor in (hidden, *layer.parameters())]
    logits = torch.nn.functional.linear(*wide)
    loss = torch.nn.functional.cross_entropy(logits, targets)
    gradients = torch.autograd.grad(loss, wide)
    true = [loss.detach()]
    true += [g for g, t in zip(gradients, (hidden, *layer.parameters()), strict=True) if t.requires_grad]
    assert [t.dtype for t in ours[1:]] == [t.dtype for t in leaves]
    return [
        [((a.double() - b).norm() / b.norm()).item() for a, b in zip(found, true, strict=True)]
        for found in (ours, plain_loss)
    ]


STRETCHES = [
    ("float32", {"dtype": torch.float32}),
    ("bfloat16", {"dtype": torch.bfloat16}),
    ("autocast", {"dtype": torch.float32, "autocast": True}),
    ("ignored_tokens", {"dtype": torch.bfloat16, "ignored": True}),
    ("a_bias", {"dtype": torch.bfloat16, "bias": True, "ignored": True}),
    ("a_frozen_weight", {"dtype": torch.float32, "frozen": ("weight",)}),
    ("frozen_hidden_states", {"dtype": torch.bfloat16, "frozen": ("hidden",)}),
]


@pytest.mark.parametrize("case", [case[1] for case in STRETCHES], ids=[case[0] for case in STRETCHES])
def test_many_stretches_are_as_exact_as_plain_logits(case):
    """Summed in bfloat16, 43 stretches had four times the error of one."""
    for ours, plain_loss in zip(*of_many_stretches(**case), strict=True):
        assert ours <= 2 * plain_loss + 1e-6


def test_the_backward_can_run_twice():
    layer, hidden = torch.nn.Linear(8, 5), torch.randn(1, 40, 8, requires_grad=True)
    loss = next_token_loss(layer, hidden, torch.randint(0, 5, (1, 40)))
    first = torch.autograd.grad(loss, (hidden, layer.weight), retain_graph=True)
    for a, b in zip(first, torch.autograd.grad(loss, (hidden, layer.weight)), strict=True):
        assert torch.equal(a, b)


def test_without_gradients_none_are_made():
    layer, hidden = torch.nn.Linear(8, VOCABULARY), torch.randn(1, 40, 8)
    with torch.no_grad(), Largest() as largest:
        loss = next_token_loss(layer, hidden, ids(1, 40))
    assert not loss.requires_grad and largest.rows <= 24


def test_an_output_layer_of_another_kind_is_refused():
    class Scaled(torch.nn.Linear):
        def forward(self, hidden):
            return super().forward(hidden) / 2

    message = 'the output layer is a Scaled of test_huggingface_loss: .* use loss="model" for any other layer'
    with pytest.raises(TypeError, match=message):
        next_token_loss(Scaled(8, 5), torch.randn(1, 40, 8), torch.randint(0, 5, (1, 40)))


@pytest.mark.parametrize("count", [None, 0, torch.tensor(0)], ids=["counted", "a_number", "a_tensor"])
def test_where_nothing_is_predicted_no_weight_changes(count):
    """The mean of nothing is no number, as PyTorch's, but its gradient is zero."""
    layer, hidden = torch.nn.Linear(8, 5), torch.randn(1, 40, 8, requires_grad=True)
    loss = next_token_loss(layer, hidden, torch.full((1, 40), -100), num_items_in_batch=count)
    assert loss.isnan()
    loss.backward()
    assert not any(tensor.grad.count_nonzero() for tensor in (hidden, *layer.parameters()))
