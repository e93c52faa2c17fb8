"""For the tests on a GPU: all operators one after another, tensors as they lie in memory, and what is compared.

Needs torch alone, as the tests do: a machine with a GPU need not have the rest.
"""

from __future__ import annotations

import math

import torch

import lighthouse
from cases import rand_qkv
from lighthouse.core import operators
from lighthouse.core.plan import sub_length

DTYPES = (torch.float32, torch.bfloat16, torch.float16)

# What the same dtype costs on the CPU or in plain torch, twice over.
FACTOR, EPSILON = 2.0, 1e-6


def error(mine, exact) -> float:
    difference = (mine.detach().cpu().double() - exact.cpu()).norm()
    return (difference / exact.norm().cpu().clamp_min(1e-30)).item()


LAYOUTS = ("heads", "tokens", "unaligned", "padded", "fused", "every_second")


def placed(tensor, layout):
    """The same numbers elsewhere in memory."""
    batch, heads, tokens, head_dim = tensor.shape
    if layout == "heads":
        return tensor.contiguous()
    if layout == "tokens":  # as models have them
        return tensor.transpose(1, 2).contiguous().transpose(1, 2)
    view = {
        "unaligned": lambda: tensor.new_zeros(tensor.numel() + 1)[1:].view(tensor.shape),
        "padded": lambda: tensor.new_zeros(batch, tokens, heads, head_dim + 3)[..., :head_dim].transpose(1, 2),
        "fused": lambda: tensor.new_zeros(batch, tokens, 3, heads, head_dim)[:, :, 1].transpose(1, 2),
        "every_second": lambda: tensor.new_zeros(batch, heads, 2 * tokens, head_dim)[:, :, ::2],
    }[layout]()
    return view.copy_(tensor)


def poison(device, mebibytes=256) -> None:
    """What PyTorch's allocator hands out next on a GPU holds NaN."""
    if device.type == "cuda":
        blocks = [torch.full((size << 18,), math.nan, device=device) for size in (*[1] * mebibytes, 4, 16, 32, 64)]
        del blocks


def chain(query, key, value, windows, topk, cover_start=True, scores=None):
    """Every operator's results by name; what a gradient would come from are the inputs and results themselves."""
    ops = torch.ops.lighthouse
    scores = ops.score(query, key) if scores is None else tuple(score.to(query.device) for score in scores)
    mask, prefix = ops.select(*scores, windows, *topk, cover_start)
    length = sub_length(query.shape[2], windows, topk)
    subs = ops.gather(query, key, value, mask, prefix, windows, length)
    orders = [operators.memory_order(tensor) for tensor in (query, key, value)]
    return {
        "select": (mask, prefix),
        "gather": subs,
        "gather_backward": ops.gather_backward(*subs, mask, prefix, windows, *orders),
        "scatter": (ops.scatter(subs[0], mask, prefix, windows),),
        "scatter_backward": (ops.scatter_backward(query, mask, prefix, windows, length, orders[0]),),
    }


_BITS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def bits(tensor):
    return tensor.detach().cpu().contiguous().view(_BITS[tensor.element_size()])


def differing(found, expected) -> dict[str, int]:
    """By operator, how many numbers have other bits; empty where none has."""
    counts = {
        name: sum(int((bits(a) != bits(b)).sum()) for a, b in zip(results, expected[name], strict=True))
        for name, results in found.items()
    }
    return {name: count for name, count in counts.items() if count}


def assert_cpu_bits(device, inputs, windows, topk, cover_start=True, layouts=("heads",) * 3):
    """The operators there, twice, against the CPU's on dense memory; by the CPU's scores, which are added otherwise."""
    scores = torch.ops.lighthouse.score(*inputs[:2])
    expected = chain(*inputs, windows, topk, cover_start, scores)
    there = [placed(tensor.to(device), layout) for tensor, layout in zip(inputs, layouts, strict=True)]
    found = chain(*there, windows, topk, cover_start, scores)
    assert not differing(found, expected), "not the CPU's bits"
    assert not differing(chain(*there, windows, topk, cover_start, scores), found), "other bits in a second run"
    for mine, tensor in zip(found["gather_backward"], there, strict=True):
        order, wanted = ([i for i in operators.memory_order(t) if t.shape[i] > 1] for t in (mine, tensor))
        assert order == wanted, "a gradient in another order than its input"


def leaves(device, tokens, *, dtype, layout="tokens", query_heads=4, kv_heads=2, head_dim=32, batch=1, seed=0):
    """Inputs that require gradients."""
    sizes = {"query_heads": query_heads, "kv_heads": kv_heads, "head_dim": head_dim, "batch": batch, "seed": seed}
    layouts = (layout,) * 3 if isinstance(layout, str) else layout
    inputs = rand_qkv(tokens, dtype=torch.float32, **sizes)
    return [
        placed(tensor.to(dtype).to(device), layout).requires_grad_()
        for tensor, layout in zip(inputs, layouts, strict=True)
    ]


def like(tensor, seed=1):
    """Random numbers in the tensor's shape, dtype and device."""
    return torch.randn(tensor.shape, generator=torch.Generator().manual_seed(seed)).to(tensor.device, tensor.dtype)


def forward_backward(call, inputs, grad=None):
    output = call(*inputs)
    return output, *torch.autograd.grad(output, inputs, torch.ones_like(output) if grad is None else grad)


def exact_attention(inputs, grad, windows=(1, 4, 16), topk=(1, 64), cover_start=True):
    """Output and gradients in float64, by the choice of the inputs' own device and dtype."""
    wide = [tensor.detach().cpu().double().contiguous() for tensor in inputs]
    scores = [score.cpu() for score in torch.ops.lighthouse.score(*(tensor.detach() for tensor in inputs[:2]))]
    settings = (windows, *topk, cover_start, 0.0)
    return (
        torch.ops.lighthouse.reference_attention(*wide, *scores, *settings),
        *torch.ops.lighthouse.reference_attention_backward(
            *wide, *scores, *settings, grad.detach().cpu().double().contiguous()
        ),
    )


# Of the norm of a result: what a dtype may cost any shape.
ALLOWED = {torch.float32: 3e-4, torch.bfloat16: 5e-2, torch.float16: 1e-2}


def assert_right(inputs, windows=(1, 4, 16), topk=(1, 64)):
    """Output and gradients of the functional call, in memory that held NaN before."""
    grad = like(inputs[0])
    numerator, denominator = topk
    settings = {"pool_ratios": [1 / window for window in windows[1:]]}
    settings["select_topk"] = numerator / denominator if denominator else numerator
    poison(inputs[0].device, 64)
    found = forward_backward(lambda *qkv: lighthouse.attention(*qkv, **settings), inputs, grad)
    for mine, true in zip(found, exact_attention(inputs, grad, windows, topk), strict=True):
        assert torch.isfinite(mine).all()
        assert error(mine, true) <= ALLOWED[mine.dtype]
