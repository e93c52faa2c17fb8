"""Documents of their own lengths in one row (METHOD 7a), from Python."""

import functools
import itertools

import pytest
import torch

import chains
import lighthouse
from cases import rand_qkv
from chains import forward_backward, like
from lighthouse.core.attention import _by_rows, _of_documents
from lighthouse.core.inner import causal_sdpa
from lighthouse.core.method import Method
from lighthouse.core.sequences import Sequences
from test_local_window import plain

LENGTHS = {
    "one": [300],
    "two": [170, 130],
    "several": [100, 1, 0, 149, 50],
    "of_one_token": [1] * 40,
    "shorter_than_a_window": [15] * 8,
    "of_one_length": [64] * 5,
}


def bounds_of(lengths):
    return [0, *itertools.accumulate(lengths)]


def leaves(tokens, dtype=torch.float32, **options):
    return [t.requires_grad_() for t in rand_qkv(tokens, query_heads=4, kv_heads=2, dtype=dtype, **options)]


def each_alone(inputs, grad, lengths, options):
    """Outputs and gradients of each document by itself, one behind the other."""
    parts = []
    for (start, end), length in zip(itertools.pairwise(bounds_of(lengths)), lengths, strict=True):
        if not length:
            continue
        own = [t.detach()[:, :, start:end].clone().requires_grad_() for t in inputs]
        mine = dict(options)
        if isinstance(mine["select_topk"], int) and mine["select_topk"]:
            mine["select_topk"] = max(1, mine["select_topk"] * length // sum(lengths))
        parts.append(forward_backward(lambda *qkv, m=mine: lighthouse.attention(*qkv, **m), own, grad[:, :, start:end]))
    return [torch.cat(each, dim=2) for each in zip(*parts, strict=True)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize("topk", [1 / 8, 9], ids=["a_share", "a_number"])
@pytest.mark.parametrize("name", LENGTHS)
def test_each_is_attended_to_as_if_alone(name, topk, dtype):
    lengths = LENGTHS[name]
    inputs, options = leaves(sum(lengths), dtype), {"select_topk": topk}
    grad = like(inputs[0])
    packed = functools.partial(lighthouse.attention, cu_seqlens=bounds_of(lengths), **options)
    for mine, alone in zip(
        forward_backward(packed, inputs, grad), each_alone(inputs, grad, lengths, options), strict=True
    ):
        assert torch.equal(mine, alone)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("topk", [1 / 8, 9, 0], ids=["a_share", "a_number", "the_window_alone"])
@pytest.mark.parametrize("name", LENGTHS)
def test_a_local_window_stays_within_its_document(name, topk, dtype):
    lengths = LENGTHS[name]
    inputs, options = leaves(sum(lengths), dtype), {"select_topk": topk, "local_window": 20}
    grad = like(inputs[0])
    packed = functools.partial(lighthouse.attention, cu_seqlens=bounds_of(lengths), **options)
    for mine, alone in zip(
        forward_backward(packed, inputs, grad), each_alone(inputs, grad, lengths, options), strict=True
    ):
        assert torch.equal(mine, alone)


@pytest.mark.parametrize("window", [0, 20])
@pytest.mark.parametrize("topk", [1 / 8, 9], ids=["a_share", "a_number"])
@pytest.mark.parametrize("name", LENGTHS)
def test_rows_of_a_batch_are_the_same(name, topk, window):
    """What a GPU does so far."""
    lengths = LENGTHS[name]
    inputs, method = leaves(sum(lengths)), Method(select_topk=topk, local_window=window)
    scores = torch.rand(2, 1, 2, sum(lengths)).unbind()
    sequences = Sequences.of_documents(method, lengths)
    for own in (None, scores):
        options = {"scale": 0.3, "scores": own, "dropout_p": 0.0, "inner": None}
        found = forward_backward(lambda *qkv, o=options: _by_rows(*qkv, sequences, **o), inputs)
        together = functools.partial(
            lighthouse.attention, cu_seqlens=bounds_of(lengths), select_topk=topk, local_window=window, scores=own
        )
        for mine, theirs in zip(found, forward_backward(functools.partial(together, scale=0.3), inputs), strict=True):
            assert torch.equal(mine, theirs)


FORMS = {
    "a_list": list,
    "a_tuple": tuple,
    "int32": lambda bounds: torch.tensor(bounds, dtype=torch.int32),
    "int64": torch.tensor,
    "padded_with_the_last": lambda bounds: torch.tensor([*bounds, bounds[-1], bounds[-1]], dtype=torch.int32),
}


@pytest.mark.parametrize("form", FORMS)
def test_forms_of_the_boundaries(form):
    inputs, bounds = leaves(300), bounds_of(LENGTHS["several"])
    found, expected = (
        forward_backward(functools.partial(lighthouse.attention, cu_seqlens=each), inputs)
        for each in (FORMS[form](bounds), bounds)
    )
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


@pytest.mark.parametrize("window", [0, 20])
def test_nothing_of_another_document_is_seen(window):
    lengths = LENGTHS["several"]
    inputs = leaves(300)
    attention = functools.partial(lighthouse.attention, cu_seqlens=bounds_of(lengths), local_window=window)
    grad = like(inputs[0])
    before = forward_backward(attention, inputs, grad)
    for start, end in itertools.pairwise(bounds_of(lengths)):
        changed = [t.detach().clone() for t in inputs]
        for tensor in changed:
            tensor[:, :, start:end] = torch.nan
        after = forward_backward(attention, [t.requires_grad_() for t in changed], grad)
        others = torch.arange(300)
        others = others[(others < start) | (others >= end)]
        for a, b in zip(before, after, strict=True):
            assert torch.equal(a[:, :, others], b[:, :, others])


def test_padding_is_zero_and_gives_no_gradient():
    method = Method(local_window=20, select_topk=9)
    sequences = Sequences.of_documents(method, [30, 100, 0, 50, 20], padding=[True, False, False, False, True])
    assert sequences.of_tokens == ((30, 130), (130, 180)) and sequences.tokens == 200
    inputs = leaves(200)
    grad = like(inputs[0])
    found = forward_backward(lambda *qkv: _of_documents(*qkv, sequences, None, None, 0.0, None), inputs, grad)
    text = [t.detach()[:, :, 30:180].clone().requires_grad_() for t in inputs]
    expected = forward_backward(
        lambda *qkv: lighthouse.attention(*qkv, cu_seqlens=[0, 100, 150], local_window=20, select_topk=9),
        text,
        grad[:, :, 30:180],
    )
    for mine, theirs in zip(found, expected, strict=True):
        assert torch.equal(mine[:, :, 30:180], theirs)
        assert mine[:, :, :30].count_nonzero() == mine[:, :, 180:].count_nonzero() == 0


def test_a_number_of_parents_is_shared_out_within_the_rows_as_they_came():
    one = Sequences.of_documents(Method(select_topk=8), [100, 100, 200], rows=[0, 0, 1])
    each = [Method(select_topk=k).length(n) for k, n in ((4, 100), (4, 100), (8, 200))]
    assert [end - first for first, end in one.of_entries] == each
    assert one.length == sum(each)


@pytest.mark.parametrize("window", [0, 20])
def test_an_inner_attention_of_the_users_sees_each_document_alone(window):
    inputs, bounds = leaves(300, torch.float64), bounds_of(LENGTHS["several"])
    attention = functools.partial(lighthouse.attention, cu_seqlens=bounds, local_window=window)
    stock, users = (forward_backward(functools.partial(attention, inner=i), inputs) for i in (None, plain))
    for mine, theirs in zip(users, stock, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=0, atol=1e-12)
    again = forward_backward(functools.partial(attention, inner=causal_sdpa), inputs)
    for mine, theirs in zip(again, stock, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=0, atol=1e-13)


def test_the_choice_of_each_document():
    query, key, _ = leaves(300)
    lengths = LENGTHS["several"]
    packed = lighthouse.select(query, key, select_topk=1 / 8, cu_seqlens=bounds_of(lengths))
    text = [(a, b) for a, b in itertools.pairwise(bounds_of(lengths)) if b > a]
    for document, (start, end) in enumerate(text):
        alone = lighthouse.select(query[:, :, start:end], key[:, :, start:end], select_topk=1 / 8)
        for head in range(2):
            assert packed.entries(0, head, document) == alone.entries(0, head)
    with pytest.raises(ValueError, match="one of 4 documents"):
        packed.entries(0, 0)


def test_scores_of_the_users():
    inputs, bounds = leaves(300), bounds_of(LENGTHS["two"])
    scores = torch.rand(2, 1, 2, 300).unbind()
    packed = lighthouse.attention(*inputs, cu_seqlens=bounds, scores=scores)
    alone = [
        lighthouse.attention(*(t[:, :, a:b] for t in inputs), scores=tuple(s[:, :, a:b] for s in scores))
        for a, b in itertools.pairwise(bounds)
    ]
    assert torch.equal(packed, torch.cat(alone, dim=2))


@pytest.mark.parametrize("operator", ["gather", "scatter", "gather_backward", "scatter_backward", "select"])
def test_the_operators_pass_their_checks_with_documents(operator):
    ops = torch.ops.lighthouse
    method = Method(select_topk=1 / 8)
    sequences = Sequences.of_documents(method, LENGTHS["two"])
    query, key, value = leaves(300, torch.float64)
    scores = ops.score(query.detach(), key.detach())
    table, windows, length = sequences.table, method.windows, sequences.length
    mask, prefix = ops.select(*scores, windows, *method.topk, True, table)
    sub = torch.randn(1, 4, length, 8, dtype=torch.float64, requires_grad=True)
    subs = sub, *(torch.randn(1, 2, length, 8, dtype=torch.float64, requires_grad=True) for _ in range(2))
    choice, orders = (mask, prefix, windows), [[0, 1, 2, 3]] * 3
    arguments = {
        "select": (*scores, windows, *method.topk, True, table),
        "gather": (query, key, value, *choice, length, table),
        "scatter": (sub, *choice, None, table),
        "gather_backward": (*subs, *choice, *orders, None, None, None, table),
        "scatter_backward": (query, *choice, length, [0, 1, 2, 3], table),
    }[operator]
    torch.library.opcheck(getattr(ops, operator).default, arguments)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("window", [0, 100])
def test_on_a_gpu(cuda, window, dtype):
    lengths = [300, 1, 0, 700, 300, 64]
    inputs = chains.leaves(cuda, sum(lengths), dtype=dtype, head_dim=64)
    grad, options = like(inputs[0]), {"select_topk": 1 / 8, "local_window": window}
    bounds = torch.tensor(bounds_of(lengths), dtype=torch.int32, device=cuda)
    found = forward_backward(functools.partial(lighthouse.attention, cu_seqlens=bounds, **options), inputs, grad)
    torch.testing.assert_close(found, tuple(each_alone(inputs, grad, lengths, options)), rtol=0.02, atol=0.02)


REFUSED = {
    "no_tensor": ("0 300", TypeError, "cu_seqlens is a str"),
    "floats": (torch.tensor([0.0, 300.0]), TypeError, "float32 tensor of 1 dimensions: whole numbers"),
    "two_dimensions": (torch.tensor([[0, 300]]), TypeError, "of 2 dimensions"),
    "a_fraction": ([0, 1.5, 300], TypeError, "cu_seqlens holds 1.5"),
    "a_truth": ([False, 300], TypeError, "cu_seqlens holds False"),
    "one_boundary": ([0], ValueError, "has 1 boundaries"),
    "none": ([], ValueError, "has 0 boundaries"),
    "not_from_the_start": ([1, 300], ValueError, "the first 1, the last 300: it must begin with 0"),
    "not_to_the_end": ([0, 299], ValueError, "end with the 300 tokens"),
    "falling": ([0, 200, 100, 300], ValueError, "falls from 200 to 100: boundaries must not decrease"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_bad_boundaries(name):
    bounds, kind, message = REFUSED[name]
    with pytest.raises(kind, match=message):
        lighthouse.attention(*rand_qkv(300), cu_seqlens=bounds)


def test_more_than_one_row():
    with pytest.raises(ValueError, match="cu_seqlens with a batch of 2: packed documents are one row"):
        lighthouse.attention(*rand_qkv(300, batch=2), cu_seqlens=[0, 300])


def test_documents_without_a_token():
    for padding in ([False, True], [True, True]):
        with pytest.raises(ValueError, match="no document has a token"):
            Sequences.of_documents(Method(), [0, 5], padding=padding)


def test_a_table_for_other_windows():
    sequences = Sequences.of_documents(Method(), [300])
    query, key, _ = rand_qkv(300, kv_heads=2)
    scores = torch.ops.lighthouse.score(query, key)
    for windows, message in (((1, 2), "described for other windows"), ((1, 4, 16), "300 tokens in 1 row, the tensors")):
        given = scores if windows == (1, 2) else [score[:, :, :299].contiguous() for score in scores]
        with pytest.raises(Exception, match=message):
            torch.ops.lighthouse.select(*given, windows, 1, 8, True, sequences.table)
