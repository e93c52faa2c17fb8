"""The functional call against the oracle, under autograd, autocast, compile and checkpointing, and with bad input."""

import logging
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._python_dispatch import TorchDispatchMode

import lighthouse
from cases import dense, rand_qkv
from lighthouse.core import operators
from lighthouse.core.method import Method, check_pool_ratios, check_select_topk
from lighthouse.core.sequences import Sequences

# STYLE's rule: what the same dtype costs in plain torch, twice over.
FACTOR, EPSILON = 2.0, 1e-6


def oracle(
    query, key, value, grad=None, *, pool_ratios=(1 / 4, 1 / 16), select_topk=1 / 64, cover_start=True, scale=0.0
):
    """Output and gradients in float64 with the choice that the tensors' own dtype makes."""
    scores = torch.ops.lighthouse.score(query.detach(), key.detach())
    wide = [tensor.detach().double().contiguous() for tensor in (query, key, value)]
    settings_ = (check_pool_ratios(pool_ratios), *check_select_topk(select_topk), cover_start, scale)
    output = torch.ops.lighthouse.reference_attention(*wide, *scores, *settings_)
    if grad is None:
        return output
    grads = torch.ops.lighthouse.reference_attention_backward(*wide, *scores, *settings_, grad.double().contiguous())
    return output, *grads


def run(query, key, value, grad, **options):
    """Output and gradients of the functional call."""
    leaves = [tensor.detach().requires_grad_() for tensor in (query, key, value)]
    output = lighthouse.attention(*leaves, **options)
    output.backward(grad)
    return output.detach(), *(leaf.grad for leaf in leaves)


CASES = {
    "one_token": (1, {}),
    "two_tokens": (2, {}),
    "below_a_coarsest_window": (15, {}),
    "one_coarsest_window": (16, {}),
    "one_token_past_a_window": (257, {}),
    "nothing_divides": (1013, {}),
    "one_level": (100, {"pool_ratios": ()}),
    "two_levels": (130, {"pool_ratios": (1 / 8,), "select_topk": 3}),
    "eight_levels": (600, {"pool_ratios": [2.0**-i for i in range(1, 8)], "select_topk": 2}),
    "windows_of_three": (200, {"pool_ratios": (1 / 3, 1 / 9), "select_topk": 5}),
    "more_parents_than_entries": (100, {"select_topk": 4096}),
    "several_strata": (1200, {"pool_ratios": (0.5, 0.25), "select_topk": 260}),
    "all_tokens": (90, {"select_topk": 1.0}),
    "start_not_covered": (300, {"cover_start": False}),
    "own_scale": (300, {"scale": 0.5}),
}


@pytest.mark.parametrize("case", CASES)
def test_float64_equals_the_oracle(case):
    tokens, options = CASES[case]
    query, key, value = rand_qkv(tokens, batch=2, query_heads=4, kv_heads=2, layout="tokens")
    grad = torch.randn(query.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    ours = run(query, key, value, grad, **options)
    for mine, theirs in zip(ours, oracle(query, key, value, grad, **options), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-10, atol=1e-12)


@settings(max_examples=60, deadline=None)
@given(
    tokens=st.integers(1, 300),
    factors=st.lists(st.integers(2, 6), max_size=4),
    topk=st.one_of(st.integers(1, 300), st.floats(0.001, 1.0)),
    kv_heads=st.integers(1, 3),
    group=st.integers(1, 3),
    cover_start=st.booleans(),
    seed=st.integers(0, 100),
)
def test_any_setting_equals_the_oracle(tokens, factors, topk, kv_heads, group, cover_start, seed):
    window, ratios = 1, []
    for factor in factors:
        window *= factor
        ratios.append(1 / window)
    query, key, value = rand_qkv(tokens, query_heads=kv_heads * group, kv_heads=kv_heads, head_dim=4, seed=seed)
    options = {"pool_ratios": ratios, "select_topk": topk, "cover_start": cover_start}
    grad = torch.ones_like(query)
    for mine, theirs in zip(
        run(query, key, value, grad, **options), oracle(query, key, value, grad, **options), strict=True
    ):
        torch.testing.assert_close(mine, theirs, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_the_error_is_that_of_the_dtype(dtype):
    query, key, value = rand_qkv(700, query_heads=4, kv_heads=2, head_dim=32, dtype=dtype)
    grad = torch.randn(query.shape, generator=torch.Generator().manual_seed(1)).to(dtype)
    leaves = [tensor.detach().requires_grad_() for tensor in (query, key, value)]
    dense(*leaves).backward(grad)
    plain = (dense(query, key, value), *(leaf.grad for leaf in leaves))
    wide = [tensor.double().requires_grad_() for tensor in (query, key, value)]
    dense(*wide).backward(grad.double())
    exact = (dense(*wide), *(leaf.grad for leaf in wide))

    def error(mine, true):
        return ((mine.double() - true).norm() / true.norm()).item()

    allowed = max(error(mine, true) for mine, true in zip(plain, exact, strict=True)) * FACTOR + EPSILON
    for mine, true in zip(run(query, key, value, grad), oracle(query, key, value, grad), strict=True):
        assert mine.dtype == dtype
        assert error(mine, true) <= allowed


def test_gradcheck():
    query, key, value = (t.requires_grad_() for t in rand_qkv(40, query_heads=2, kv_heads=1, head_dim=4))
    scores = torch.ops.lighthouse.score(query.detach(), key.detach())  # the choice stays while inputs are nudged
    call = lambda *qkv: lighthouse.attention(*qkv, select_topk=2, scores=scores)  # noqa: E731
    torch.autograd.gradcheck(call, (query, key, value))


def test_gradgradcheck():
    """A gradient of a gradient goes through the registered operators; PyTorch's math backend has one too."""
    query, key, value = (t.requires_grad_() for t in rand_qkv(40, query_heads=2, kv_heads=1, head_dim=4))
    scores = torch.ops.lighthouse.score(query.detach(), key.detach())
    call = lambda *qkv: lighthouse.attention(*qkv, select_topk=2, scores=scores)  # noqa: E731
    with sdpa_kernel(SDPBackend.MATH):
        torch.autograd.gradgradcheck(call, (query, key, value), fast_mode=True)


def test_eager_mode_gives_the_registered_operators_bits():
    query, key, value = (t.requires_grad_() for t in rand_qkv(700, query_heads=4, kv_heads=2, layout="tokens"))
    windows, topk = (1, 4, 16), (1, 64)
    choice = torch.ops.lighthouse.select(*torch.ops.lighthouse.score(query, key), windows, *topk, True)
    chosen = operators.choose(query, key, Sequences(Method(), 2, 700), None)
    assert torch.equal(chosen.mask, choice[0]) and torch.equal(chosen.prefix, choice[1])
    length = lighthouse.plan(700).length
    short = (query[:, :, :length].contiguous(),)
    for verb, tensors, rest in (
        ("gather", (query, key, value), (*choice, windows, length)),
        ("scatter", short, (*choice, windows)),
    ):
        results = []
        for outputs in (
            getattr(operators, verb)(*tensors, chosen),
            getattr(torch.ops.lighthouse, verb)(*tensors, *rest),
        ):
            outputs = outputs if isinstance(outputs, tuple) else (outputs,)
            grads = torch.autograd.grad(outputs, tensors[: len(outputs)], [output.detach() for output in outputs])
            results.append((*outputs, *grads))
        assert all(map(torch.equal, *results))


def test_no_gradient_is_recorded_for_the_choice():
    query, key, _ = (t.requires_grad_() for t in rand_qkv(100))
    selection = lighthouse.select(query, key)
    assert not selection.mask.requires_grad and not selection.prefix.requires_grad


def test_one_level_is_dense_attention():
    query, key, value = rand_qkv(200, query_heads=4, kv_heads=2)
    torch.testing.assert_close(lighthouse.attention(query, key, value, pool_ratios=()), dense(query, key, value))


def test_no_token_sees_a_later_one():
    """With the choice held, changing tokens from t on leaves the output before t as it was, bit for bit."""
    query, key, value = rand_qkv(400)
    scores = torch.ops.lighthouse.score(query, key)
    before = lighthouse.attention(query, key, value, scores=scores)
    for t in (1, 77, 128, 399):
        changed = [tensor.clone() for tensor in (query, key, value)]
        for tensor in changed:
            tensor[:, :, t:] = 9.0
        after = lighthouse.attention(*changed, scores=scores)
        assert torch.equal(before[:, :, :t], after[:, :, :t])
        assert not torch.equal(before[:, :, t:], after[:, :, t:])


@pytest.mark.parametrize("layout", ["heads", "tokens"])
def test_the_output_is_contiguous_when_transposed(layout):
    output = lighthouse.attention(*rand_qkv(100, batch=2, query_heads=4, kv_heads=2, layout=layout))
    assert output.transpose(1, 2).is_contiguous()


class NoCopies(TorchDispatchMode):
    """Fails on any operator that copies a tensor."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        assert func.overloadpacket not in (torch.ops.aten.clone, torch.ops.aten.copy_, torch.ops.aten._to_copy), func
        return func(*args, **(kwargs or {}))


def test_strided_inputs_are_read_in_place():
    wide = torch.randn(1, 100, 3, 4, 24, dtype=torch.float64)
    query, key, value = (wide[:, :, i, :, 4:20].transpose(1, 2) for i in range(3))
    contiguous = [tensor.contiguous() for tensor in (query, key, value)]
    with NoCopies():
        output = lighthouse.attention(query, key, value)
    assert torch.equal(output, lighthouse.attention(*contiguous))


def test_the_same_bits_for_any_number_of_threads():
    query, key, value = rand_qkv(3000, query_heads=4, kv_heads=2, head_dim=32, dtype=torch.float32)
    scores = [torch.ops.lighthouse.score(query, key)]
    choice = torch.ops.lighthouse.select(*scores[0], (1, 4, 16), 1, 64, True)
    length = lighthouse.plan(3000).length
    order = [0, 2, 1, 3]
    threads = torch.get_num_threads()
    results = []
    try:
        for count in (1, 2, 3, 7):
            torch.set_num_threads(count)
            subs = torch.ops.lighthouse.gather(query, key, value, *choice, (1, 4, 16), length)
            results.append(
                [
                    *torch.ops.lighthouse.score(query, key),
                    *torch.ops.lighthouse.select(*scores[0], (1, 4, 16), 1, 64, True),
                    *subs,
                    *torch.ops.lighthouse.gather_backward(*subs, *choice, (1, 4, 16), order, order, order),
                    torch.ops.lighthouse.scatter(subs[0], *choice, (1, 4, 16)),
                    torch.ops.lighthouse.scatter_backward(query, *choice, (1, 4, 16), length, order),
                ]
            )
    finally:
        torch.set_num_threads(threads)
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


def test_only_short_tensors_mask_and_prefix_are_kept():
    tokens = 2048
    query, key, value = (t.requires_grad_() for t in rand_qkv(tokens, query_heads=4, kv_heads=2, dtype=torch.float32))
    length = lighthouse.plan(tokens).length
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: kept.append(tensor) or tensor, lambda tensor: tensor):
        lighthouse.attention(query, key, value)
    assert any(length in tensor.shape for tensor in kept)
    for tensor in kept:
        if tokens in tensor.shape:
            assert tensor.dtype in (torch.uint8, torch.int32) and tensor.shape == (1, 2, tokens)
        else:
            assert tensor.numel() <= 4 * length * 8


def test_scores_replace_the_norms():
    query, key, value = rand_qkv(640, dtype=torch.float32)
    ones = torch.ones(1, 1, 640)
    wanted = ones.clone()
    wanted[..., 320:336] = 5.0
    options = {"select_topk": 2, "cover_start": False}
    entries = lighthouse.select(query, key, scores=(wanted, ones), **options).entries(0, 0)
    assert {(0, token) for token in range(320, 324)} <= set(entries)  # a query parent; lower index first among equals
    by_norm = lighthouse.attention(query, key, value, **options)
    assert not torch.equal(by_norm, lighthouse.attention(query, key, value, scores=(wanted, ones), **options))


def test_an_inner_attention_of_the_users():
    calls = []

    def inner(query, key, value, *, scale, dropout_p, layout):
        calls.append((query.shape, key.shape, scale, dropout_p, layout))
        return dense(query, key, value, scale)

    query, key, value = rand_qkv(640, batch=2, query_heads=4, kv_heads=2)
    length = lighthouse.plan(640).length
    output = lighthouse.attention(query, key, value, inner=inner, scale=0.3, dropout_p=0.25)
    shapes = (torch.Size((2, 4, length, 8)), torch.Size((2, 2, length, 8)))
    assert calls == [(*shapes, 0.3, 0.25, (2, length))]
    torch.testing.assert_close(output, lighthouse.attention(query, key, value, scale=0.3))


def test_autocast_casts_as_torchs_own_attention_does():
    query, key, value = rand_qkv(300, dtype=torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        assert dense(query, key, value).dtype == torch.bfloat16
        output = lighthouse.attention(query, key, value.bfloat16())
    assert output.dtype == torch.bfloat16
    wide = lighthouse.attention(query.bfloat16(), key.bfloat16(), value.bfloat16())
    assert torch.equal(output, wide)


@pytest.mark.parametrize("backend, select_topk", [("aot_eager", 5), ("aot_eager", 1 / 20), ("inductor", 1 / 64)])
def test_compiled_without_a_break_or_a_second_compilation(backend, select_topk):
    compiled = torch.compile(
        lambda q, k, v: lighthouse.attention(q * 1.5, k, v, select_topk=select_topk) + 1,
        fullgraph=True,
        backend=backend,
    )
    with torch._dynamo.config.patch(error_on_recompile=True):
        for tokens in (256, 300, 1111, 4096):
            leaves = [t.requires_grad_() for t in rand_qkv(tokens, query_heads=4, kv_heads=2, dtype=torch.float32)]
            plain = [t.detach().requires_grad_() for t in leaves]
            for leaf in leaves:
                torch._dynamo.mark_dynamic(leaf, 2)
            output = compiled(*leaves)
            expected = lighthouse.attention(plain[0] * 1.5, *plain[1:], select_topk=select_topk) + 1
            torch.testing.assert_close(output, expected)
            output.square().sum().backward()
            expected.square().sum().backward()
            for mine, theirs in zip(leaves, plain, strict=True):
                torch.testing.assert_close(mine.grad, theirs.grad)


def test_checkpointed_gradients_have_the_same_bits():
    query, key, value = rand_qkv(1000, query_heads=4, kv_heads=2, dtype=torch.float32)
    grad = torch.randn_like(query)
    plain = run(query, key, value, grad)
    leaves = [t.detach().requires_grad_() for t in (query, key, value)]
    output = torch.utils.checkpoint.checkpoint(lighthouse.attention, *leaves, use_reentrant=False)
    output.backward(grad)
    for mine, theirs in zip((output, *(leaf.grad for leaf in leaves)), plain, strict=True):
        assert torch.equal(mine, theirs)


def test_nan_and_infinity_do_not_upset_the_choice():
    query, key, value = rand_qkv(640, dtype=torch.float32)
    query[0, 0, 100, 3] = math.nan
    key[0, 0, 200, 1] = math.inf
    selection = lighthouse.select(query, key, select_topk=4)
    entries = torch.ops.lighthouse.reference_select(
        *torch.ops.lighthouse.score(query, key), selection.windows, 4, 0, True, 0, 0
    )
    assert selection.entries(0, 0) == [tuple(entry) for entry in entries.tolist()]
    assert (0, 200) in selection.entries(0, 0)
    assert (0, 100) not in selection.entries(0, 0)


def test_a_last_stride_other_than_one_is_copied_and_said_once(caplog):
    query, key, value = rand_qkv(100)
    odd = query.mT.contiguous().mT
    lighthouse.core.inputs._copied.clear()
    with caplog.at_level(logging.DEBUG, logger="lighthouse"):
        for _ in range(2):
            assert torch.equal(lighthouse.attention(odd, key, value), lighthouse.attention(query, key, value))
    assert [record.message for record in caplog.records] == [
        "query has a last stride other than 1 and is copied (logged once)"
    ]


def test_inside_of_context_parallelism_it_is_refused(tmp_path):
    """Each process would attend within its own shard; one process is enough to be inside."""
    from torch.distributed.tensor.experimental import context_parallel

    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        mesh = torch.distributed.device_mesh.init_device_mesh("cpu", (1,))
        query, key, value = (torch.randn(1, 2, 64, 16) for _ in range(3))
        with context_parallel(mesh, buffers=[query, key, value], buffer_seq_dims=[2, 2, 2]):
            with pytest.raises(ValueError, match="context parallelism is on"):
                lighthouse.attention(query, key, value)
        lighthouse.attention(query, key, value)
    finally:
        torch.distributed.destroy_process_group()
