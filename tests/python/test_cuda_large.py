"""Tensors on a GPU that outgrow 32 bits or one launch, where the CPU would take minutes: looked at where that shows."""

import pytest
import torch

from chains import placed, poison
from lighthouse.core import operators
from lighthouse.core.plan import sub_length

GIB = 2**30


@pytest.fixture(autouse=True)
def give_back():
    yield
    torch.cuda.empty_cache()


def need(gibibytes):
    if torch.cuda.mem_get_info()[0] < gibibytes * GIB:
        pytest.skip(f"{gibibytes} GiB of free GPU memory are needed")


def whole_numbers(*shape, device):
    """Of which no sum rounds."""
    return torch.randint(-3, 4, shape, device=device, dtype=torch.int8).to(torch.bfloat16)


def test_above_two_to_the_31_elements_in_many_heads(cuda):
    """The last head of the large tensors is what it is alone; nothing this size is compared on the CPU."""
    need(30)
    ops, windows, topk, heads, tokens = torch.ops.lighthouse, (1, 4, 16), (1, 64), 17, 2**20
    query = torch.randn(1, tokens, heads, 128, device=cuda, dtype=torch.bfloat16).transpose(1, 2)
    key, value = (torch.randn(1, 1, tokens, 128, device=cuda, dtype=torch.bfloat16) for _ in range(2))
    assert query.numel() > 2**31
    last = query[:, -1:]
    scores = ops.score(query, key)
    norms = torch.stack([query[:, head].float().norm(dim=-1) for head in range(heads)], dim=1).amax(1, keepdim=True)
    torch.testing.assert_close(scores[0], norms)
    choice = ops.select(*scores, windows, *topk, True)
    length = sub_length(tokens, windows, topk)
    subs = ops.gather(query, key, value, *choice, windows, length)
    assert torch.equal(subs[0][:, -1:], ops.gather(last, key, value, *choice, windows, length)[0])
    out = ops.scatter(subs[0], *choice, windows)
    assert torch.equal(out[:, -1:], ops.scatter(subs[0][:, -1:].contiguous(), *choice, windows))
    del out
    order, key_order = operators.memory_order(query), operators.memory_order(key)
    grad = ops.gather_backward(*subs, *choice, windows, order, key_order, key_order)[0]
    alone = ops.gather_backward(subs[0][:, -1:].contiguous(), *subs[1:], *choice, windows, order, key_order, key_order)
    assert torch.equal(grad[:, -1:], alone[0])
    del grad
    grad_sub = ops.scatter_backward(query, *choice, windows, length, order)
    assert torch.equal(grad_sub[:, -1:], ops.scatter_backward(last, *choice, windows, length, order))


def test_above_two_to_the_31_elements_in_one_head(cuda):
    need(40)
    ops, windows, topk, tokens = torch.ops.lighthouse, (1, 4, 16), (1000, 0), 2**23 + 21
    x = whole_numbers(1, 1, tokens, 256, device=cuda)
    assert x.numel() > 2**31
    mask, prefix = ops.select(*ops.score(x, x), windows, *topk, True)
    length = sub_length(tokens, windows, topk)
    tail = tokens % windows[-1]
    subs = ops.gather(x, x, x, mask, prefix, windows, length)
    for sub in subs:  # the last entries: what no window holds, and before it the last full window
        assert torch.equal(sub[0, 0, -tail:], x[0, 0, -tail:])
        assert torch.equal(sub[0, 0, -tail - 1], x[0, 0, -tail - 16 : -tail].float().mean(0).bfloat16())
    del sub
    for grad in ops.gather_backward(*subs, mask, prefix, windows, [0, 1, 2, 3], [0, 2, 1, 3], [2, 0, 1, 3]):
        assert torch.equal(grad[0, 0, -tail:], x[0, 0, -tail:])
        assert torch.isfinite(grad[0, 0, -100_000:]).all() and torch.isfinite(grad[0, 0, ::4096]).all()
    del grad
    output = ops.scatter(subs[0], mask, prefix, windows)
    assert torch.isfinite(output[0, 0, -100_000:]).all() and torch.isfinite(output[0, 0, ::4096]).all()


def test_more_pieces_of_a_sequence_than_a_grid_is_high(cuda):
    """A row of 256 numbers that is not aligned leaves a block one unit of 16 tokens, and a grid has 65,535 blocks."""
    need(8)
    ops, windows, topk, tokens = torch.ops.lighthouse, (1, 4, 16), (64, 0), 65_535 * 16 + 1000
    x = placed(whole_numbers(1, 1, tokens, 256, device=cuda), "unaligned")
    scores = torch.rand(1, 1, tokens, device=cuda)
    mask, prefix = ops.select(scores, scores, windows, *topk, True)
    length = sub_length(tokens, windows, topk)
    poison(cuda)
    sub = ops.gather(x, x, x, mask, prefix, windows, length)[0]
    output = ops.scatter(placed(sub, "unaligned"), mask, prefix, windows)
    last = tokens // 16 * 16 - 1
    place = int(prefix[0, 0, last]) + (int(mask[0, 0, last]) & 0b11).bit_count()
    assert torch.equal(sub[0, 0, place], x[0, 0, last - 15 : last + 1].float().mean(0).bfloat16())
    assert torch.isfinite(sub).all() and torch.isfinite(output).all()
