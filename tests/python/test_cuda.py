"""The GPU against the CPU, and what only a GPU can do. `device` cases run on both, so that the tests prove themselves.

PYTHONPATH=python python3 -m pytest tests/python/test_cuda.py
"""

import pytest
import torch
import torch._dynamo.testing
import torch.nn.functional as F
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.checkpoint import checkpoint

import lighthouse
from cases import CONTEXTS, MM, Calls, Layer, dense, rand_qkv
from lighthouse import inner, operators
from lighthouse.plan import sub_length
from lighthouse.settings import check_pool_ratios, check_select_topk
from small_llama import TOKENS, Spy, ids, wrapped

GIB = 2**30
DTYPES = (torch.float32, torch.bfloat16, torch.float16)

# STYLE's rule: what the same dtype costs on the CPU or in plain torch, twice over.
FACTOR, EPSILON = 2.0, 1e-6


def error(mine, exact) -> float:
    difference = (mine.detach().cpu().double() - exact.cpu()).norm()
    return (difference / exact.norm().clamp_min(1e-30)).item()


def assert_as_good(mine, plain, exact):
    """Not worse than twice the CPU's error in the same dtype, or the rounding of the exact result."""
    allowed = max(error(plain, exact), error(exact.to(plain.dtype), exact))
    assert mine.dtype == plain.dtype and mine.shape == plain.shape
    assert error(mine, exact) <= FACTOR * allowed + EPSILON


def strided(tensor, layout):
    """The same numbers in memory as models have them; "sliced" is not even aligned to 16 bytes."""
    if layout == "heads":
        return tensor
    if layout == "tokens":
        return tensor.transpose(1, 2).contiguous().transpose(1, 2)
    batch, heads, tokens, head_dim = tensor.shape
    wide = tensor.new_zeros(batch, tokens, heads + 1, head_dim + 3)
    view = wide[:, :, 1:, 3:].transpose(1, 2)
    return view.copy_(tensor)


def verbs(device, query, key, value, windows, topk, cover_start, scores=None):
    """Every operator's results there, by name; gradients take the inputs themselves for what comes from behind."""
    ops = torch.ops.lighthouse
    query, key, value = (
        tensor.to(device, copy=True) if tensor.device != device else tensor for tensor in (query, key, value)
    )
    found = {"score": ops.score(query, key)}
    scores = tuple(score.to(device) for score in scores or found["score"])
    mask, prefix = found["select"] = ops.select(*scores, windows, *topk, cover_start)
    length = sub_length(query.shape[2], windows, topk)
    subs = found["gather"] = ops.gather(query, key, value, mask, prefix, windows, length)
    orders = [operators.memory_order(tensor) for tensor in (query, key, value)]
    found["gather_backward"] = ops.gather_backward(*subs, mask, prefix, windows, *orders)
    found["scatter"] = (ops.scatter(subs[0], mask, prefix, windows),)
    found["scatter_backward"] = (ops.scatter_backward(query, mask, prefix, windows, length, orders[0]),)
    return found


def compare_verbs(device, inputs, layout, windows, topk, cover_start):
    query, key, value = inputs
    there = [strided(tensor.to(device), layout) for tensor in inputs]
    plain = verbs(torch.device("cpu"), *inputs, windows, topk, cover_start)
    found = verbs(device, *there, windows, topk, cover_start, scores=plain["score"])
    exact = verbs(
        torch.device("cpu"), *(tensor.double() for tensor in inputs), windows, topk, cover_start, scores=plain["score"]
    )
    for mine, theirs in zip(found["select"], plain["select"], strict=True):
        assert torch.equal(mine.cpu(), theirs)
    for name in ("score", "gather", "gather_backward", "scatter", "scatter_backward"):
        for mine, theirs, true in zip(found[name], plain[name], exact[name], strict=True):
            assert_as_good(mine, theirs, true.double())
    for mine, tensor in zip(found["gather_backward"], there, strict=True):
        orders = [[i for i in operators.memory_order(t) if t.shape[i] > 1] for t in (mine, tensor)]
        assert orders[0] == orders[1]
    again = verbs(device, *there, windows, topk, cover_start, scores=plain["score"])
    for name, results in found.items():
        assert all(map(torch.equal, results, again[name])), f"{name} gave other bits the second time"


@settings(
    max_examples=120 if torch.cuda.is_available() else 12,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
@given(
    tokens=st.integers(1, 1200),
    factors=st.lists(st.integers(2, 6), max_size=4),
    topk=st.one_of(st.integers(1, 600), st.floats(0.001, 1.0)),
    batch=st.integers(1, 2),
    kv_heads=st.integers(1, 3),
    group=st.integers(1, 4),
    head_dim=st.sampled_from([8, 16, 24, 64, 72, 128, 192, 200, 256]),
    dtype=st.sampled_from(DTYPES),
    layout=st.sampled_from(["heads", "tokens", "sliced"]),
    cover_start=st.booleans(),
    seed=st.integers(0, 1000),
)
def test_operators_equal_the_cpus(
    device, tokens, factors, topk, batch, kv_heads, group, head_dim, dtype, layout, cover_start, seed
):
    windows = [1]
    for factor in factors:
        windows.append(windows[-1] * factor)
    inputs = rand_qkv(
        tokens, batch=batch, query_heads=kv_heads * group, kv_heads=kv_heads, head_dim=head_dim, dtype=dtype, seed=seed
    )
    compare_verbs(device, inputs, layout, tuple(windows), check_select_topk(topk), cover_start)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_scores_have_the_same_bits_wherever_rows_lie(device, dtype):
    query, key, _ = (tensor.to(device) for tensor in rand_qkv(300, query_heads=4, head_dim=72, dtype=dtype))
    expected = torch.ops.lighthouse.score(query, key)
    for query_layout, key_layout in (("tokens", "tokens"), ("sliced", "heads"), ("heads", "sliced")):
        found = torch.ops.lighthouse.score(strided(query, query_layout), strided(key, key_layout))
        assert all(map(torch.equal, found, expected))


# tokens, pool_ratios, select_topk, what else
LARGE = {
    "sub_sequence_above_65535": (70_000, (1 / 4, 1 / 16), 1.0, {}),
    "one_stratum_of_62500_entries": (1_000_000, (1 / 4, 1 / 16), 4, {}),
    "windows_of_65536": (300_000, (1 / 256, 1 / 65_536), 2, {}),
    "a_window_that_is_prime": (30_000, (1 / 67,), 1 / 64, {}),
    "eight_levels_and_many_strata": (40_000, [2.0**-i for i in range(1, 8)], 0.2, {}),
    "more_rows_than_a_grid_is_high": (20, (1 / 4,), 2, {"batch": 70_000}),
    "a_group_of_64": (3_000, (1 / 4, 1 / 16), 1 / 64, {"query_heads": 64}),
}


@pytest.mark.parametrize("case", LARGE)
def test_large_ones_equal_the_cpus(cuda, case):
    tokens, ratios, topk, sizes = LARGE[case]
    inputs = rand_qkv(tokens, dtype=torch.float32, **sizes)
    compare_verbs(cuda, inputs, "tokens", check_pool_ratios(ratios), check_select_topk(topk), True)


def test_equal_and_odd_scores_are_chosen_alike(device):
    """Ties, infinities, NaN and both zeros: only the order of picking decides."""
    generator = torch.Generator().manual_seed(0)
    odd = torch.tensor([0.0, -0.0, 1.0, 1.0, 2.0, float("inf"), float("-inf"), float("nan")])
    scores = [odd[torch.randint(0, len(odd), (2, 3, 5000), generator=generator)] for _ in range(2)]
    for windows, topk in (((1, 4, 16), (1, 64)), ((1, 2, 4, 8), (300, 0)), ((1, 3), (1, 3))):
        here = torch.ops.lighthouse.select(*scores, windows, *topk, True)
        there = torch.ops.lighthouse.select(*(score.to(device) for score in scores), windows, *topk, True)
        assert all(torch.equal(mine, theirs.cpu()) for mine, theirs in zip(here, there, strict=True))


def test_above_two_to_the_31_elements(cuda):
    """The last head of the large tensors is what it is alone; nothing this size is compared on the CPU."""
    if torch.cuda.mem_get_info()[0] < 30 * GIB:
        pytest.skip("30 GiB of free GPU memory are needed")
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


# The functional call


def leaves(device, tokens, *, dtype, query_heads=4, kv_heads=2, head_dim=32, seed=0):
    """As Transformers passes them: [B, N, H, D] in memory."""
    options = {"query_heads": query_heads, "kv_heads": kv_heads, "head_dim": head_dim, "seed": seed}
    return [
        t.to(dtype).to(device).requires_grad_()
        for t in rand_qkv(tokens, dtype=torch.float32, layout="tokens", **options)
    ]


def forward_backward(call, inputs, grad=None):
    output = call(*inputs)
    return output, *torch.autograd.grad(output, inputs, torch.ones_like(output) if grad is None else grad)


@pytest.mark.parametrize("kv_heads", [2, 4])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_error_is_that_of_the_dtype(device, dtype, kv_heads):
    inputs = leaves(device, 700, dtype=dtype, kv_heads=kv_heads)
    grad = torch.randn(inputs[0].shape, generator=torch.Generator().manual_seed(1)).to(device, dtype)
    wide = [tensor.detach().cpu().double().contiguous() for tensor in inputs]
    exact_dense = forward_backward(dense, [t.clone().requires_grad_() for t in wide], grad.cpu().double())
    plain = forward_backward(dense, inputs, grad)
    allowed = FACTOR * max(map(error, plain, (t.detach() for t in exact_dense))) + EPSILON
    scores = [score.cpu() for score in torch.ops.lighthouse.score(*(tensor.detach() for tensor in inputs[:2]))]
    reference = (*wide, *scores, (1, 4, 16), 1, 64, True, 0.0)
    exact = (
        torch.ops.lighthouse.reference_attention(*reference),
        *torch.ops.lighthouse.reference_attention_backward(*reference, grad.cpu().double().contiguous()),
    )
    for mine, true in zip(forward_backward(lighthouse.attention, inputs, grad), exact, strict=True):
        assert mine.dtype == dtype
        assert error(mine, true) <= allowed


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


def test_nothing_waits_for_the_device(cuda):
    inputs = leaves(cuda, 98_304, dtype=torch.bfloat16, query_heads=8, kv_heads=8, head_dim=128)
    grad = torch.randn_like(inputs[0])
    forward_backward(lighthouse.attention, inputs, grad)
    torch.cuda.set_sync_debug_mode("error")
    try:
        results = forward_backward(lighthouse.attention, inputs, grad)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert all(torch.isfinite(result).all() for result in results)


def test_two_runs_give_the_same_bits(cuda):
    """With PyTorch's attention told to be deterministic: by default the order of its sums in the backward is not."""
    inputs = leaves(cuda, 5000, dtype=torch.bfloat16, head_dim=128)
    torch.use_deterministic_algorithms(True)
    try:
        first, second = (forward_backward(lighthouse.attention, inputs) for _ in range(2))
    finally:
        torch.use_deterministic_algorithms(False)
    assert all(map(torch.equal, first, second))


def test_two_streams(cuda):
    batches = [leaves(cuda, 20_000, dtype=torch.bfloat16, head_dim=64, seed=seed) for seed in range(2)]
    with torch.no_grad():
        expected = [lighthouse.attention(*inputs) for inputs in batches]
        torch.cuda.synchronize()
        streams = [torch.cuda.Stream() for _ in batches]
        found = []
        for _ in range(5):
            for stream, inputs in zip(streams, batches, strict=True):
                with torch.cuda.stream(stream):
                    found.append(lighthouse.attention(*inputs))
        torch.cuda.synchronize()
    for i, output in enumerate(found):
        assert torch.equal(output, expected[i % 2])


def test_a_device_that_is_not_the_current_one(cuda):
    if torch.cuda.device_count() < 2:
        pytest.skip("two GPUs are needed")
    other = torch.device("cuda", (cuda.index + 1) % torch.cuda.device_count())
    here, there = (forward_backward(lighthouse.attention, leaves(d, 3000, dtype=torch.float32)) for d in (cuda, other))
    assert torch.cuda.current_device() == cuda.index
    for mine, theirs in zip(there, here, strict=True):
        assert mine.device == other
        torch.testing.assert_close(mine.to(cuda), theirs)


def test_captured_in_a_cuda_graph(cuda):
    """Forward and backward, replayed on other numbers, which make another choice."""
    inputs = leaves(cuda, 4000, dtype=torch.bfloat16, head_dim=64)
    grad = torch.randn_like(inputs[0])
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            forward_backward(lighthouse.attention, inputs, grad)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = forward_backward(lighthouse.attention, inputs, grad)
    for seed in (1, 2):
        with torch.no_grad():
            for tensor, other in zip(
                inputs, leaves(cuda, 4000, dtype=torch.bfloat16, head_dim=64, seed=seed), strict=True
            ):
                tensor.copy_(other)
        graph.replay()
        expected = forward_backward(lighthouse.attention, inputs, grad)
        assert torch.equal(captured[0], expected[0])
        for mine, theirs in zip(captured[1:], expected[1:], strict=True):
            torch.testing.assert_close(mine, theirs, rtol=2e-2, atol=2e-2)


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


def test_not_enough_memory_is_torchs_own_error(cuda):
    key = torch.empty(1, 1, 2**20, 256, dtype=torch.bfloat16, device=cuda)
    query = key.expand(1, 1024, -1, -1)  # the output alone would have 512 GiB
    with pytest.raises(torch.OutOfMemoryError):
        lighthouse.attention(query, key, key, select_topk=1.0)
    torch.cuda.empty_cache()


# Which attention runs inside


ATEN = {
    SDPBackend.CUDNN_ATTENTION: torch.ops.aten._scaled_dot_product_cudnn_attention.default,
    SDPBackend.FLASH_ATTENTION: torch.ops.aten._scaled_dot_product_flash_attention.default,
    SDPBackend.EFFICIENT_ATTENTION: torch.ops.aten._scaled_dot_product_efficient_attention.default,
}
FASTEST = (SDPBackend.CUDNN_ATTENTION, SDPBackend.FLASH_ATTENTION)


def default_backend():
    major, _ = torch.cuda.get_device_capability()
    return FASTEST[0] if major in (9, 10) and torch.backends.cudnn.version() > 91500 else FASTEST[1]


@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
@pytest.mark.parametrize("kv_heads", [2, 4])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_inner_attention_is_the_fastest_that_takes_the_case(cuda, dtype, kv_heads, compiled):
    inputs = leaves(cuda, 2000, dtype=dtype, kv_heads=kv_heads, head_dim=64)
    expected = SDPBackend.EFFICIENT_ATTENTION if dtype == torch.float32 else default_backend()
    assert lighthouse.inner_backend(*inputs[:2]) == expected
    call = (
        torch.compile(lighthouse.attention, fullgraph=True, backend="aot_eager") if compiled else lighthouse.attention
    )
    with Calls() as calls:
        forward_backward(call, inputs)
    assert {backend for backend, operator in ATEN.items() if calls.of.get(operator)} == {expected}


@pytest.mark.parametrize("backend", ATEN, ids=lambda backend: backend.name)
def test_a_users_choice_is_obeyed(cuda, backend):
    inputs = leaves(cuda, 2000, dtype=torch.bfloat16, kv_heads=4, head_dim=64)
    with sdpa_kernel(backend), Calls() as calls:
        assert lighthouse.inner_backend(*inputs[:2]) == backend
        forward_backward(lighthouse.attention, inputs)
    assert calls.of.get(ATEN[backend]) == 1


def test_the_choice_is_logged(cuda, caplog):
    inner._backend.cache_clear()
    inner._say_if_math.cache_clear()
    inputs = leaves(cuda, 300, dtype=torch.float32)
    with caplog.at_level("DEBUG", logger="lighthouse"):
        lighthouse.attention(*inputs)
    assert "EFFICIENT_ATTENTION; CUDNN_ATTENTION: " in caplog.text and "; FLASH_ATTENTION: " in caplog.text


def test_float32_with_grouped_heads_holds_no_square_of_logits(cuda):
    inputs = leaves(cuda, 16_384, dtype=torch.float32, head_dim=64)
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    forward_backward(lambda *qkv: lighthouse.attention(*qkv, pool_ratios=()), inputs)  # S is N
    assert torch.cuda.max_memory_allocated() - before < GIB  # the logits alone would have 4


@pytest.mark.parametrize("head_dim", [8, 64, 72, 128, 136, 192, 256])
def test_gradients_of_the_inner_attention_are_right_at_odd_lengths(cuda, head_dim):
    """cuDNN's were not, before 9.15.1, for lengths that are no multiple of 128: PyTorch must not choose it there."""
    for tokens in (1, 2, 65, 127, 129, 193, 1000):
        inputs = leaves(cuda, tokens, dtype=torch.bfloat16, head_dim=head_dim)
        wide = [tensor.detach().double().requires_grad_() for tensor in inputs]
        exact = forward_backward(dense, wide)
        with sdpa_kernel(SDPBackend.MATH):
            plain = forward_backward(dense, inputs)
        found = forward_backward(lambda *qkv: lighthouse.attention(*qkv, pool_ratios=()), inputs)
        allowed = 1e-2 * max(true.norm() for true in exact)  # of one token the gradients of query and key are zero
        for mine, theirs, true in zip(found, plain, exact, strict=True):
            assert (mine - true).norm() <= FACTOR * (theirs - true).norm() + allowed


# Compiled and checkpointed


def through(call, inputs, steps=1):
    """Output and gradients of a call, of a scalar made of it; the last of several steps."""
    for _ in range(steps):
        for tensor in inputs:
            tensor.grad = None
        output = call(*inputs)
        output.float().square().mean().backward()
    return output.detach(), *(tensor.grad for tensor in inputs)


def assert_close(found, expected, allowed=1e-2):
    for mine, theirs in zip(found, expected, strict=True):
        assert error(mine, theirs.double()) <= allowed


def test_compiled_for_any_length(device):
    call = lambda q, k, v: lighthouse.attention(q * 1.5, k, v, select_topk=1 / 20) + 1  # noqa: E731
    compiled = torch.compile(call, fullgraph=True, backend="aot_eager" if device.type == "cpu" else "inductor")
    dtype = torch.float32 if device.type == "cpu" else torch.bfloat16
    with torch._dynamo.config.patch(error_on_recompile=True):
        for tokens in (256, 300, 1111, 4096):
            inputs = leaves(device, tokens, dtype=dtype)
            for tensor in inputs:
                torch._dynamo.mark_dynamic(tensor, 2)
            found = through(compiled, inputs)
            assert_close(found, through(call, inputs))


def test_compiled_into_cuda_graphs(cuda):
    layer = Layer(width=256).to(cuda, torch.bfloat16)
    x = torch.randn(1, 3000, 256, device=cuda, dtype=torch.bfloat16, requires_grad=True)
    expected = through(layer, [x])
    torch._dynamo.utils.counters.clear()
    found = through(torch.compile(layer, fullgraph=True, mode="reduce-overhead"), [x], steps=4)
    assert torch._dynamo.utils.counters["inductor"]["cudagraph_skips"] == 0
    assert_close(found, expected)


@pytest.mark.parametrize(("mode", "dtype"), [("default", torch.float32), ("reduce-overhead", torch.bfloat16)])
def test_a_wrapped_llama_compiled(cuda, mode, dtype):
    """Every token is another: equal ones have equal scores, and rounding then decides which of them is chosen."""
    changes = {"num_hidden_layers": 1, "hidden_size": 128, "max_position_embeddings": 4096, "vocab_size": 4096}
    model = wrapped(config=changes, select_topk=1 / 16).to(cuda, dtype)
    exact = wrapped(config=changes, select_topk=1 / 16).to(cuda)
    torch._dynamo.utils.counters.clear()
    counter = torch._dynamo.testing.CompileCounterWithBackend("inductor")
    compiled = torch.compile(model, fullgraph=True, **({"backend": counter} if mode == "default" else {"mode": mode}))

    def gradients(call, module, tokens, steps=1):
        for _ in range(steps):
            torch.compiler.cudagraph_mark_step_begin()
            module.zero_grad()
            batch = torch.randperm(4096, generator=torch.Generator().manual_seed(1))[None, :tokens].to(cuda)
            if mode == "default":
                torch._dynamo.mark_dynamic(batch, 1)
            loss = call({"input_ids": batch}).loss
            loss.backward()
        return [loss.detach().clone(), *(parameter.grad.clone() for parameter in module.parameters())]

    for tokens in (1024, 1536, 1000) if mode == "default" else (1024,):
        expected = gradients(exact, exact, tokens)
        found, plain = gradients(compiled, model, tokens, steps=3), gradients(model, model, tokens)
        for mine, eager, true in zip(found, plain, expected, strict=True):
            assert error(mine, true.double()) <= FACTOR * error(eager, true.double()) + 1e-3
    if mode == "default":
        assert counter.frame_count == 1, "compiled once, whatever the length"
    else:
        assert torch._dynamo.utils.counters["inductor"]["cudagraph_skips"] == 0


@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
@pytest.mark.parametrize("name", CONTEXTS)
def test_checkpointing_makes_the_choice_once(cuda, name, compiled):
    layer = Layer(width=256).to(cuda, torch.bfloat16)
    x = torch.randn(1, 3000, 256, device=cuda, dtype=torch.bfloat16, requires_grad=True)

    def call(x):
        return checkpoint(layer, x, use_reentrant=False, context_fn=CONTEXTS[name])

    expected = through(layer, [x])
    run = torch.compile(call, fullgraph=True, backend="aot_eager") if compiled else call
    with Calls() as calls:
        found = through(run, [x])
    assert (calls["score"], calls["select"], calls["gather"]) == (1, 1, 2)
    assert calls.of[MM] >= 6
    assert_close(found, expected)


def test_the_wrapper_runs_dense_where_it_does_not_pay(cuda):
    spy = Spy()
    model = wrapped(spy=spy, min_tokens=None).to(cuda)
    model({"input_ids": ids().to(cuda)}).loss.backward()
    assert spy.calls == 0
    model = wrapped(spy=spy, min_tokens=TOKENS).to(cuda)
    model({"input_ids": ids().to(cuda)}).loss.backward()
    assert spy.calls == 2
    assert F.softmax(model.eval()(ids().to(cuda)).logits, -1).isfinite().all()
