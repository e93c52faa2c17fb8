"""The functional call on a GPU against float64, in whatever shape and memory its inputs and gradients come."""

import pytest
import torch

import lighthouse
from cases import Calls, dense
from chains import (
    DTYPES,
    EPSILON,
    FACTOR,
    assert_right,
    chain,
    error,
    exact_attention,
    forward_backward,
    leaves,
    like,
    poison,
)


@pytest.mark.parametrize("kv_heads", [2, 4])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_error_is_that_of_the_dtype(device, dtype, kv_heads):
    inputs = leaves(device, 700, dtype=dtype, kv_heads=kv_heads)
    grad = like(inputs[0])
    wide = [tensor.detach().cpu().double().contiguous() for tensor in inputs]
    exact_dense = forward_backward(dense, [t.clone().requires_grad_() for t in wide], grad.cpu().double())
    plain = forward_backward(dense, inputs, grad)
    allowed = FACTOR * max(map(error, plain, (t.detach() for t in exact_dense))) + EPSILON
    for mine, true in zip(
        forward_backward(lighthouse.attention, inputs, grad), exact_attention(inputs, grad), strict=True
    ):
        assert mine.dtype == dtype
        assert error(mine, true) <= allowed


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("head_dim", [8, 40, 64, 72, 96, 128, 136, 192, 200, 256])
def test_odd_head_dims(device, head_dim, dtype):
    inputs = leaves(device, 400, dtype=dtype, query_heads=2, kv_heads=1, head_dim=head_dim)
    assert_right(inputs, topk=(8, 0))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("group", [1, 3, 7, 8])
def test_groups(device, group, dtype):
    assert_right(leaves(device, 300, dtype=dtype, query_heads=2 * group, batch=2), topk=(8, 0))


@pytest.mark.parametrize("tokens", [15, 16, 17, 31, 33, 63, 65, 127, 129, 255, 257])
def test_odd_lengths(device, tokens):
    assert_right(leaves(device, tokens, dtype=torch.bfloat16, query_heads=2, kv_heads=1, head_dim=64))


@pytest.mark.parametrize("tokens", [1, 2])
def test_the_shortest(device, tokens):
    """Gradients of query and key are next to nothing: that they are numbers is enough."""
    inputs = leaves(device, tokens, dtype=torch.bfloat16, head_dim=64)
    assert all(torch.isfinite(result).all() for result in forward_backward(lighthouse.attention, inputs))


SETTINGS = {
    "one_level": (50, (1,), (5, 0)),
    "more_parents_than_entries": (60, (1, 4, 16), (4096, 0)),
    "all_tokens": (60, (1, 4, 16), (1, 1)),
    "a_window_beyond_the_sequence": (100, (1, 256), (3, 0)),
    "a_first_window_of_128": (1000, (1, 128, 256), (3, 0)),
}


@pytest.mark.parametrize("name", SETTINGS)
def test_odd_settings(device, name):
    tokens, windows, topk = SETTINGS[name]
    assert_right(leaves(device, tokens, dtype=torch.float32, query_heads=2, kv_heads=1, head_dim=64), windows, topk)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    "layouts",
    [("unaligned", "heads", "padded"), ("padded", "unaligned", "fused"), ("every_second", "fused", "tokens")],
    ids=", ".join,
)
def test_places_in_memory(device, layouts, dtype):
    assert_right(leaves(device, 333, dtype=dtype, layout=layouts, head_dim=72, batch=2), topk=(8, 0))


EXPANDED = {
    "one_batch": lambda x: x[:1].expand_as(x),
    "one_head": lambda x: x[:, :1].expand_as(x),
    "one_token": lambda x: x[:, :, :1].expand_as(x),
    "one_number": lambda x: x[..., :1].expand_as(x),
    "transposed": lambda x: x.mT.contiguous().mT,
}


@pytest.mark.parametrize("name", EXPANDED)
def test_strides_of_zero_and_last_ones_other_than_one(device, name):
    query, key, value = (x.detach() for x in leaves(device, 300, dtype=torch.bfloat16, head_dim=64, batch=2))
    strided = EXPANDED[name](query)
    results = []
    for tensor in (strided, strided.clone(memory_format=torch.contiguous_format)):
        inputs = [x.detach().requires_grad_() for x in (tensor, key, value)]
        results.append(forward_backward(lighthouse.attention, inputs, like(query)))
    assert torch.equal(results[0][0], results[1][0])
    for mine, theirs in zip(*results, strict=True):  # the inner attention's gradients add in no fixed order
        assert error(mine, theirs.double()) < 1e-2


GRADIENTS = {
    "one_number": lambda make, b, h, n, d: make(1, 1, 1, 1).expand(b, h, n, d),
    "one_row": lambda make, b, h, n, d: make(1, 1, 1, d).expand(b, h, n, d),
    "one_batch": lambda make, b, h, n, d: make(1, h, n, d).expand(b, h, n, d),
    "one_head": lambda make, b, h, n, d: make(b, 1, n, d).expand(b, h, n, d),
    "one_token": lambda make, b, h, n, d: make(b, h, 1, d).expand(b, h, n, d),
    "transposed": lambda make, b, h, n, d: make(b, h, d, n).mT,
    "tokens_first": lambda make, b, h, n, d: make(b, n, h, d).transpose(1, 2),
    "every_second": lambda make, b, h, n, d: make(b, h, n, 2 * d)[..., ::2],
    "unaligned": lambda make, b, h, n, d: make(b, h, n, d + 1)[..., 1:],
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", GRADIENTS)
def test_gradients_in_any_memory(device, name, dtype):
    inputs = leaves(device, 300, dtype=dtype, head_dim=72, batch=2)
    grad = GRADIENTS[name](lambda *shape: torch.randn(shape, device=device).to(dtype), *inputs[0].shape)
    output = lighthouse.attention(*inputs)
    mine = torch.autograd.grad(output, inputs, grad, retain_graph=True)
    for found, plain in zip(mine, torch.autograd.grad(output, inputs, grad.contiguous()), strict=True):
        assert error(found, plain.double()) < (1e-4 if dtype == torch.float32 else 1e-2)


@pytest.mark.parametrize("which", [(0,), (1,), (2,), (1, 2)], ids=["query", "key", "value", "key_and_value"])
def test_gradients_of_some(device, which):
    inputs = leaves(device, 300, dtype=torch.bfloat16, head_dim=64)
    expected = forward_backward(lighthouse.attention, inputs, like(inputs[0]))[1:]
    some = [tensor.detach().requires_grad_(i in which) for i, tensor in enumerate(inputs)]
    output = lighthouse.attention(*some)
    for i, grad in zip(which, torch.autograd.grad(output, [some[i] for i in which], like(output)), strict=True):
        assert error(grad, expected[i].double()) < 1e-2


UNCOVERED = {
    "defaults": (5003, (1, 4, 16), (1, 0)),
    "one_long_window": (5003, (1, 128), (1, 0)),
    "odd_windows": (3001, (1, 3, 15), (700, 0)),
    "eight_levels": (4999, (1, 2, 4, 8, 16, 32, 64, 128), (3, 0)),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", UNCOVERED)
def test_nothing_is_left_unwritten(device, name, dtype):
    """Memory is NaN beforehand; where the start is not covered some tokens have no output, some entries no gradient."""
    tokens, windows, topk = UNCOVERED[name]
    for layout in ("heads", "padded"):
        inputs = [x.detach() for x in leaves(device, tokens, dtype=dtype, layout=layout, query_heads=6, head_dim=72)]
        poison(device, 512)
        for results in chain(*inputs, windows, topk, cover_start=False).values():
            assert all(torch.isfinite(result).all() for result in results)


def test_autocast(device):
    inputs = leaves(device, 300, dtype=torch.float32)
    with torch.autocast(device.type, torch.bfloat16):
        output = lighthouse.attention(*inputs)
    assert output.dtype == torch.bfloat16
    assert torch.equal(output, lighthouse.attention(*(tensor.bfloat16() for tensor in inputs)))
    output.sum().backward()
    assert all(tensor.grad.dtype == torch.float32 for tensor in inputs)


def test_no_copy_of_a_full_tensor(device):
    """Gradients are written in their inputs' strides: autograd copies a leaf's where they differ."""
    inputs = leaves(device, 2000, dtype=torch.float32 if device.type == "cpu" else torch.bfloat16)
    grad = torch.randn_like(inputs[0])
    with Calls() as calls:
        lighthouse.attention(*inputs).backward(grad)
    copies = [
        str(operator)
        for operator in calls.of
        if operator.overloadpacket in (torch.ops.aten.clone, torch.ops.aten.copy_)
    ]
    assert copies == []
    assert all(tensor.grad.stride() == tensor.stride() for tensor in inputs)


BAD_INPUT = {
    "float64": (
        lambda q, k, v: {"query": q.double(), "key": k.double(), "value": v.double()},
        "query has dtype float64",
    ),
    "head_dim": (
        lambda q, k, v: {"query": q[..., :12], "key": k[..., :12], "value": v[..., :12]},
        "head_dim 12: on CUDA",
    ),
    "key_elsewhere": (lambda q, k, v: {"key": k.cpu()}, "key has device cpu, query cuda:"),
    "scores_elsewhere": (
        lambda q, k, v: {"scores": (k.cpu()[..., 0].float(),) * 2},
        r"scores\[0\] is on cpu, key on cuda",
    ),
}


@pytest.mark.parametrize("case", BAD_INPUT)
def test_bad_input(cuda, case):
    change, message = BAD_INPUT[case]
    query, key, value = (tensor.detach() for tensor in leaves(cuda, 64, dtype=torch.bfloat16))
    with pytest.raises(ValueError, match=message):
        lighthouse.attention(**{"query": query, "key": key, "value": value, **change(query, key, value)})
