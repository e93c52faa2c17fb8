"""The local window: exact attention to the last tokens, added to the pyramid's (METHOD 5a), on a CPU and on a GPU."""

import functools
import logging

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode

import lighthouse
from cases import Calls, dense, rand_qkv
from chains import ALLOWED, error, forward_backward, leaves, like, poison
from lighthouse.core import inputs as core_inputs
from lighthouse.core import local
from lighthouse.core.inner import causal_sdpa
from lighthouse.core.local import BLOCKS, FLASH, WHOLE, kernel_for
from lighthouse.core.method import Method
from lighthouse.core.settings import LighthouseSettings

NOTHING = (0, 0)  # select_topk=0


def exact(inputs, grad, window, topk=(1, 64), windows=(1, 4, 16), scale=0.0):
    """The oracle's output and gradients, by the choice of the inputs' own device and dtype."""
    wide = [tensor.detach().cpu().double().contiguous() for tensor in inputs]
    scores = [score.cpu() for score in torch.ops.lighthouse.score(*(tensor.detach() for tensor in inputs[:2]))]
    settings = (*wide, *scores, windows, *topk, True, scale)
    return (
        torch.ops.lighthouse.reference_attention(*settings, window),
        *torch.ops.lighthouse.reference_attention_backward(
            *settings, grad.detach().cpu().double().contiguous(), window
        ),
    )


def select_topk(topk):
    return topk[0] / topk[1] if topk[1] else topk[0]


def assert_right(inputs, window, topk=(1, 64), allowed=None):
    grad = like(inputs[0])
    poison(inputs[0].device, 64)
    attention = functools.partial(lighthouse.attention, local_window=window, select_topk=select_topk(topk))
    found = forward_backward(attention, inputs, grad)
    assert found[0].transpose(1, 2).is_contiguous()
    for mine, true in zip(found, exact(inputs, grad, window, topk), strict=True):
        assert torch.isfinite(mine).all()
        if true.norm() > 1e-9:  # a single key's gradient is zero
            assert error(mine, true) <= (allowed or ALLOWED[mine.dtype])
        else:
            assert mine.norm() <= 1e-2


def plain(query, key, value, *, scale, dropout_p, layout, window=None):
    """An inner attention of the user's, in plain torch."""
    at = torch.arange(query.shape[2], device=query.device)
    ago = at[:, None] - at
    hidden = (ago < 0) | (ago >= (window or query.shape[2]))
    key, value = (tensor.repeat_interleave(query.shape[1] // key.shape[1], 1) for tensor in (key, value))
    weights = (query @ key.mT * (scale or query.shape[3] ** -0.5)).masked_fill(hidden, -torch.inf).softmax(-1)
    return weights @ value


LENGTHS = {
    "one_token": (1, 1),
    "a_window_of_one": (70, 1),
    "shorter_than_the_window": (50, 64),
    "as_long_as_the_window": (64, 64),
    "one_token_past_the_window": (65, 64),
    "one_token_past_two_blocks": (129, 100),
    "many_blocks": (1030, 256),
    "a_window_of_almost_all": (300, 299),
}


@pytest.mark.parametrize("topk", [(1, 8), NOTHING], ids=["beside_a_pyramid", "alone"])
@pytest.mark.parametrize("name", LENGTHS)
def test_the_sum_is_the_oracles(name, topk):
    tokens, window = LENGTHS[name]
    inputs = [t.requires_grad_() for t in rand_qkv(tokens, batch=2, query_heads=4, kv_heads=2)]
    assert_right(inputs, window, topk, allowed=1e-12)


@pytest.mark.parametrize("layout", ["heads", "tokens", "padded", "every_second"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_every_dtype_in_any_memory(dtype, layout):
    assert_right(leaves(torch.device("cpu"), 300, dtype=dtype, layout=layout, head_dim=24), 100, (1, 8))


def test_many_pieces_of_work_give_what_one_gives(monkeypatch):
    inputs = [t.requires_grad_() for t in rand_qkv(700, batch=2, query_heads=4, kv_heads=2)]
    attention = functools.partial(lighthouse.attention, local_window=90)
    whole = forward_backward(attention, inputs)
    monkeypatch.setitem(local.NUMBERS, "cpu", 1)
    for one, many in zip(whole, forward_backward(attention, inputs), strict=True):
        torch.testing.assert_close(one, many, rtol=0, atol=1e-12)


def test_the_same_bits_on_every_run():
    inputs = leaves(torch.device("cpu"), 2000, dtype=torch.float32, query_heads=2, kv_heads=1)
    attention = functools.partial(lighthouse.attention, local_window=200)
    first, *others = (forward_backward(attention, inputs) for _ in range(3))
    assert all(torch.equal(a, b) for run in others for a, b in zip(first, run, strict=True))


def test_without_a_window_nothing_changes():
    inputs = [t.requires_grad_() for t in rand_qkv(200)]
    with Calls() as calls:
        lighthouse.attention(*inputs, local_window=0)
    assert not any("local" in str(operator) for operator in calls.of)


@pytest.mark.parametrize("topk", [1 / 8, 0])
def test_an_inner_attention_of_the_users_is_called_for_the_window_too(topk):
    inputs = [t.requires_grad_() for t in rand_qkv(200, query_heads=4, kv_heads=2)]
    options = {"local_window": 30, "select_topk": topk}
    stock = forward_backward(lambda *qkv: lighthouse.attention(*qkv, **options), inputs)
    users = forward_backward(lambda *qkv: lighthouse.attention(*qkv, inner=plain, **options), inputs)
    for mine, theirs in zip(stock, users, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=0, atol=1e-12)
    assert users[0].transpose(1, 2).is_contiguous()


def test_the_scale_is_the_windows_too():
    inputs = [t.requires_grad_() for t in rand_qkv(200)]
    grad = like(inputs[0])
    found = forward_backward(lambda *qkv: lighthouse.attention(*qkv, local_window=30, scale=0.7), inputs, grad)
    for mine, true in zip(found, exact(inputs, grad, 30, scale=0.7), strict=True):
        assert error(mine, true) < 1e-12


def test_dropout_drops_the_same_weights_in_the_backward():
    query, key, value = (t.requires_grad_() for t in rand_qkv(300))

    def dropped(value):
        torch.manual_seed(3)
        return lighthouse.attention(query, key, value, local_window=40, select_topk=0, dropout_p=0.5)

    # Linear in the values: the gradient is right if it gives the output's change.
    step = torch.randn_like(value)
    moved = (dropped(value + step) - dropped(value)).sum()
    (grad,) = torch.autograd.grad(dropped(value).sum(), value)
    torch.testing.assert_close(moved, (grad * step).sum(), rtol=1e-9, atol=1e-9)
    kept = lighthouse.attention(query, key, value, local_window=40, select_topk=0)
    assert not torch.equal(dropped(value), kept)
    mean = torch.stack([dropped_once(query, key, value, seed) for seed in range(300)]).mean(0)
    assert (mean - kept).abs().mean() < 0.1 * kept.abs().mean()


def dropped_once(query, key, value, seed):
    torch.manual_seed(seed)
    with torch.no_grad():
        return lighthouse.attention(query, key, value, local_window=40, select_topk=0, dropout_p=0.5)


def test_autocast_casts_as_for_the_pyramid():
    inputs = leaves(torch.device("cpu"), 200, dtype=torch.float32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = lighthouse.attention(*inputs, local_window=50)
    narrow = [tensor.detach().bfloat16() for tensor in inputs]
    assert torch.equal(found, lighthouse.attention(*narrow, local_window=50))


def test_a_backward_under_autocast_is_not_narrowed():
    inputs = leaves(torch.device("cpu"), 200, dtype=torch.float32)
    output = lighthouse.attention(*inputs, local_window=50, select_topk=0)
    grad = like(output)
    plainly = torch.autograd.grad(output, inputs, grad, retain_graph=True)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        under = torch.autograd.grad(output, inputs, grad)
    assert all(torch.equal(a, b) for a, b in zip(plainly, under, strict=True))


@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize("topk", [1 / 8, 0])
def test_compiled_in_one_graph(topk, dynamic):
    attention = functools.partial(lighthouse.attention, local_window=40, select_topk=topk)
    compiled = torch.compile(attention, fullgraph=True, dynamic=dynamic)
    for tokens in (200, 333) if dynamic else (200,):
        inputs = leaves(torch.device("cpu"), tokens, dtype=torch.float32)
        grad = like(inputs[0])
        results = (forward_backward(call, inputs, grad) for call in (compiled, attention))
        for a, b in zip(*results, strict=True):
            torch.testing.assert_close(a, b)


def test_checkpointing_keeps_the_choice():
    inputs = [t.requires_grad_() for t in rand_qkv(300)]
    attention = functools.partial(lighthouse.attention, local_window=40)

    def again(*qkv):
        return checkpoint(attention, *qkv, use_reentrant=False, context_fn=lighthouse.checkpoint_contexts)

    with Calls() as calls:
        found = forward_backward(again, inputs)
    assert (calls["select"], calls["attend"]) == (1, 2)
    assert all(torch.equal(a, b) for a, b in zip(found, forward_backward(attention, inputs), strict=True))


def test_sums_are_made_in_one_pass():
    inputs = [t.requires_grad_() for t in rand_qkv(300)]
    with torch.autograd.profiler.profile(record_shapes=True) as profile:
        forward_backward(functools.partial(lighthouse.attention, local_window=40), inputs)
    names = [event.name for event in profile.function_events]
    assert names.count("lighthouse::gather_backward") == names.count("lighthouse::scatter_backward") == 1
    assert not [
        event for event in profile.function_events if event.name == "aten::add" and len(event.input_shapes[0]) == 4
    ]


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize("scores", [False, True], ids=["norms", "scores"])
@pytest.mark.parametrize("window", [0, 40])
def test_one_function_is_the_verbs(window, scores, dtype):
    """The verbs are called one by one for an inner attention that is passed in, PyTorch's own too."""
    query, key, value = (t.requires_grad_() for t in rand_qkv(300, batch=2, query_heads=4, kv_heads=2, dtype=dtype))
    own = torch.rand(2, 2, 2, 300).unbind() if scores else None
    attention = functools.partial(lighthouse.attention, local_window=window, select_topk=1 / 8, scores=own)
    one = forward_backward(attention, (query, key, value), like(query))
    verbs = forward_backward(functools.partial(attention, inner=causal_sdpa), (query, key, value), like(query))
    assert torch.equal(one[0], verbs[0])
    for mine, theirs in zip(one[1:], verbs[1:], strict=True):
        # There a window's gradients are rounded before they are added, and its own output is at hand.
        allowed = 1e-12 if dtype == torch.float64 else ALLOWED[dtype]
        assert torch.equal(mine, theirs) or (window and error(mine, theirs.double()) < allowed)


@pytest.mark.parametrize("window", [0, 40])
def test_what_is_kept(window):
    """With a window query, key and value, but neither an output as long as the text nor the sub-sequence."""
    inputs = leaves(torch.device("cpu"), 640, dtype=torch.float32)
    kept = {}

    def keep(tensor):
        kept[tensor.data_ptr()] = tensor
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        output = lighthouse.attention(*inputs, local_window=window)
    long = {tensor.data_ptr() for tensor in kept.values() if tensor.ndim == 4 and tensor.shape[2] == 640}
    short = [tensor for tensor in kept.values() if tensor.ndim == 4 and tensor.shape[2] < 640]
    assert long == ({tensor.data_ptr() for tensor in inputs} if window else set())
    assert len(short) == (1 if window else 4)
    first, second = (torch.autograd.grad(output.sum(), inputs, retain_graph=again) for again in (True, False))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    with pytest.raises(RuntimeError, match="second time"):
        torch.autograd.grad(output.sum(), inputs)


@pytest.mark.parametrize(("window", "topk"), [(20, 0), (20, 1 / 8), (0, 1 / 8)])
def test_a_second_derivative_is_refused(window, topk):
    """Also where the gradient does not depend on the first one's, and where it is asked for by inputs."""
    query, key, value = (t.requires_grad_() for t in rand_qkv(100))
    refused = pytest.raises(
        NotImplementedError, match="a second derivative .* through PyTorch's fused attention, or thro"
    )
    for of in (query, key, value):
        for power in (1, 2):
            with refused:
                output = lighthouse.attention(query, key, value, local_window=window, select_topk=topk)
                (grad,) = torch.autograd.grad(output.pow(power).sum(), value, create_graph=True)
                torch.autograd.grad(grad.square().sum(), of)

    def loss(query):
        return lighthouse.attention(query, key, value, local_window=window, select_topk=topk).sum()

    with refused:
        torch.autograd.functional.hessian(loss, query.detach())


def test_dropout_drops_the_same_weights_when_compiled_code_runs_again():
    query, key, value = leaves(torch.device("cpu"), 200, dtype=torch.float32)
    attention = functools.partial(lighthouse.attention, local_window=40, select_topk=0, dropout_p=0.5)
    compiled = torch.compile(
        lambda *qkv: checkpoint(attention, *qkv, use_reentrant=False), backend="aot_eager_decomp_partition"
    )

    def dropped(value):
        torch.manual_seed(3)
        return compiled(query, key, value)

    step = torch.randn_like(value)  # linear in the values
    moved = (dropped((value + step).detach().requires_grad_()) - dropped(value)).sum()
    (grad,) = torch.autograd.grad(dropped(value).sum(), value)
    torch.testing.assert_close(moved, (grad * step).sum(), rtol=1e-4, atol=1e-3)


def test_values_of_another_mean_than_zero():
    """Their products with a gradient cancel in the softmax's, whatever was rounded before."""
    inputs = [t.detach() for t in leaves(torch.device("cpu"), 600, dtype=torch.bfloat16)]
    inputs[2] = inputs[2] + 5
    assert_right([t.requires_grad_() for t in inputs], 100)


@pytest.mark.parametrize("layout", ["heads", "tokens"])
@pytest.mark.parametrize("window", [0, 40])
def test_gradients_lie_in_memory_as_their_inputs(window, layout):
    inputs = leaves(torch.device("cpu"), 200, dtype=torch.float32, layout=layout)
    output, *grads = forward_backward(functools.partial(lighthouse.attention, local_window=window), inputs)
    assert [grad.stride() for grad in grads] == [tensor.stride() for tensor in inputs]
    assert output.transpose(1, 2).is_contiguous()


def test_fake_tensors_outside_of_their_mode():
    with FakeTensorMode():
        inputs = [torch.empty(1, 2, 200, 16, requires_grad=True) for _ in range(3)]
    output = lighthouse.attention(*inputs, local_window=40)
    assert [grad.shape for grad in torch.autograd.grad(output.sum(), inputs)] == [t.shape for t in inputs]


@pytest.mark.parametrize("topk", [1 / 8, 0])
def test_operations_are_counted(topk):
    query, key, value = leaves(torch.device("cpu"), 640, dtype=torch.float32, head_dim=32)
    with FlopCounterMode(display=False) as counter:
        output = lighthouse.attention(query, key, value, local_window=40, select_topk=topk)
        forward = counter.get_total_flops()
        output.sum().backward()
    length = lighthouse.plan(640, select_topk=topk, local_window=40).length
    assert forward == 4 * 4 * 32 * (length**2 + 640 * 40)
    assert counter.get_total_flops() == 3.5 * forward


def test_a_window_of_all_tokens_is_plain_attention():
    query, key, value = (t.requires_grad_() for t in rand_qkv(100, query_heads=4, kv_heads=2))
    assert (kernel_for(query, 100, 0.0), kernel_for(query, 99, 0.0), kernel_for(query, 100, 0.1)) == (
        WHOLE,
        BLOCKS,
        BLOCKS,
    )
    alone = functools.partial(lighthouse.attention, local_window=100, select_topk=0)
    grad = like(query)
    for mine, theirs in zip(
        forward_backward(alone, (query, key, value), grad),
        forward_backward(dense, (query, key, value), grad),
        strict=True,
    ):
        assert torch.equal(mine, theirs)


REFUSED = {
    "negative": ({"local_window": -1}, ValueError, "local_window=-1: 0 \\(none\\) to 2\\^31 tokens"),
    "not whole": ({"local_window": 2.5}, TypeError, "local_window=2.5: a whole number"),
    "a switch": ({"local_window": True}, TypeError, "local_window=True: a whole number"),
    "too long": ({"local_window": 2**31 + 1}, ValueError, "local_window=2147483649: 0"),
    "nothing at all": ({"select_topk": 0}, ValueError, "select_topk=0 chooses nothing.*local_window above 0"),
    "a share of nothing": (
        {"select_topk": 0.0, "local_window": 5},
        ValueError,
        "for a number of parents write 0",
    ),
    "an inner without a window": (
        {"local_window": 5, "inner": lambda query, key, value, *, scale, dropout_p, layout: query},
        ValueError,
        "local_window=5: this inner attention has no keyword window",
    ),
}


class OldModule(torch.nn.Module):
    def forward(self, query, key, value, *, scale, dropout_p, layout):
        return query


REFUSED["a module without a window"] = (
    {"local_window": 5, "inner": OldModule()},
    ValueError,
    "local_window=5: this inner attention has no keyword window",
)


def test_a_wrapper_refuses_such_an_inner_before_the_first_step():
    with pytest.raises(ValueError, match="this inner attention has no keyword window"):
        LighthouseSettings(inner=OldModule())
    LighthouseSettings(Method(), inner=OldModule())


@pytest.mark.parametrize("name", REFUSED)
def test_bad_input(name):
    options, kind, message = REFUSED[name]
    with pytest.raises(kind, match=message):
        lighthouse.attention(*rand_qkv(50), **options)


BARE = {
    "heads that do not divide": ({"key": (1, 3, 20, 8), "value": (1, 3, 20, 8)}, "query heads a multiple"),
    "another length": ({"key": (1, 2, 21, 8)}, "all else the same"),
    "another value": ({"value": (1, 1, 20, 8)}, "all else the same"),
    "three dimensions": ({"query": (4, 20, 8)}, r"\[batch, heads, tokens, head_dim\]"),
    "no window": ({"window": 0}, "window=0"),
    "a scale of 0": ({"scale": 0.0}, "scale=0.0"),
    "no such kernel": ({"kernel": "fast"}, "one of flash, blocks, whole"),
}


@pytest.mark.parametrize("name", BARE)
def test_the_operator_alone_refuses_what_it_cannot_do(name):
    change, message = BARE[name]
    given = {"query": (1, 4, 20, 8), "key": (1, 2, 20, 8), "value": (1, 2, 20, 8), "window": 5, "scale": None} | change
    tensors = (torch.randn(given[each]) for each in ("query", "key", "value"))
    with pytest.raises(ValueError, match=message):
        torch.ops.lighthouse.local_attention(
            *tensors, given["window"], given["scale"], 0.0, given.get("kernel", BLOCKS)
        )


def test_a_window_that_covers_all_is_said_once(caplog, monkeypatch):
    monkeypatch.setattr(core_inputs, "_said_of_local_window", [])
    with caplog.at_level(logging.WARNING, "lighthouse"):
        for _ in range(2):
            lighthouse.attention(*rand_qkv(50), local_window=50)
            lighthouse.attention(*rand_qkv(51), local_window=50)
    (said,) = caplog.messages
    assert "local_window=50 covers all 50 tokens" in said


# On a GPU.

KERNELS = {
    "bfloat16": (torch.bfloat16, 64, FLASH),
    "float16": (torch.float16, 128, FLASH),
    "an_odd_head_dim": (torch.bfloat16, 40, FLASH),
    "the_longest_head_dim": (torch.bfloat16, 256, FLASH),
    "float32": (torch.float32, 64, BLOCKS),
    "float32_long_head_dim": (torch.float32, 200, BLOCKS),
}


@pytest.mark.parametrize("topk", [(1, 8), NOTHING], ids=["beside_a_pyramid", "alone"])
@pytest.mark.parametrize("name", KERNELS)
def test_kernels_of_a_gpu(cuda, name, topk):
    dtype, head_dim, kernel = KERNELS[name]
    for kv_heads in (4, 2):
        inputs = leaves(cuda, 700, dtype=dtype, head_dim=head_dim, kv_heads=kv_heads, batch=2)
        assert kernel_for(inputs[0], 100, 0.0) == kernel
        assert_right(inputs, 100, topk)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("name", LENGTHS)
def test_lengths_on_a_gpu(cuda, name, dtype):
    tokens, window = LENGTHS[name]
    if tokens > 1:
        assert_right(leaves(cuda, tokens, dtype=dtype, head_dim=64), window, (1, 8))


@pytest.mark.parametrize("layout", ["heads", "tokens", "fused", "padded", "every_second"])
def test_memory_on_a_gpu(cuda, layout):
    assert_right(leaves(cuda, 300, dtype=torch.bfloat16, layout=layout, head_dim=64), 100, (1, 8))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_compiled_on_a_gpu(cuda, dtype):
    attention = functools.partial(lighthouse.attention, local_window=100, select_topk=1 / 8)
    compiled = torch.compile(attention, fullgraph=True, dynamic=True)
    for tokens in (700, 900, 1111):
        inputs = leaves(cuda, tokens, dtype=dtype, head_dim=64)
        grad = like(inputs[0])
        found = forward_backward(compiled, inputs, grad)
        for mine, true in zip(found, exact(inputs, grad, 100, (1, 8)), strict=True):
            assert error(mine, true) <= ALLOWED[dtype]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_in_a_cuda_graph(cuda, dtype):
    attention = functools.partial(lighthouse.attention, local_window=100, select_topk=1 / 8)
    inputs = leaves(cuda, 700, dtype=dtype, head_dim=64)
    grad = like(inputs[0])
    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        for _ in range(3):
            forward_backward(attention, inputs, grad)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        found = forward_backward(attention, inputs, grad)
    with torch.no_grad():
        for tensor in inputs:
            tensor.copy_(torch.randn_like(tensor))
    graph.replay()
    for mine, true in zip(found, exact(inputs, grad, 100, (1, 8)), strict=True):
        assert error(mine, true) <= ALLOWED[dtype]


def test_the_same_bits_on_a_gpu_where_they_are_asked_for(cuda):
    inputs = leaves(cuda, 4000, dtype=torch.bfloat16, head_dim=64)
    attention = functools.partial(lighthouse.attention, local_window=256, select_topk=0)
    torch.use_deterministic_algorithms(True)
    try:
        runs = [forward_backward(attention, inputs, like(inputs[0])) for _ in range(3)]
    finally:
        torch.use_deterministic_algorithms(False)
    assert all(torch.equal(a, b) for run in runs[1:] for a, b in zip(runs[0], run, strict=True))


def test_a_kernel_that_is_switched_off_is_not_used(cuda):
    inputs = leaves(cuda, 300, dtype=torch.bfloat16, head_dim=64)
    assert kernel_for(inputs[0], 100, 0.0) == FLASH
    with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
        assert kernel_for(inputs[0], 100, 0.0) == BLOCKS
        assert_right(inputs, 100, (1, 8))
