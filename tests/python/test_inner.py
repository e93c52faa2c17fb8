"""The default inner attention: whose backend runs, and that the costly one is never taken in silence."""

import warnings

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.attention import SDPBackend, sdpa_kernel

import lighthouse
from cases import Calls, dense, rand_qkv
from lighthouse.core import inner


@pytest.fixture(autouse=True)
def fresh():
    inner._backend.cache_clear()
    inner._say_if_math.cache_clear()


def case(**changes):
    query, key, _ = rand_qkv(64, query_heads=4, kv_heads=2, dtype=torch.float32)
    return inner._Case(*inner._case(query, True, 0.0))._replace(**changes)


def test_the_backend_can_be_asked_for_and_is_the_users():
    query, key, _ = rand_qkv(64, query_heads=4, kv_heads=2, dtype=torch.float32)
    assert lighthouse.inner_backend(query, key) == SDPBackend.FLASH_ATTENTION
    with sdpa_kernel(SDPBackend.MATH):
        assert lighthouse.inner_backend(query, key) == SDPBackend.MATH
    assert lighthouse.inner_backend(query.requires_grad_(), key, dropout_p=0.5) == SDPBackend.MATH


UNREAL = {
    "fake": lambda: FakeTensorMode(),
    "a_users_mode": lambda: Calls(),
    "on_meta_by_default": lambda: torch.device("meta"),
}


@pytest.mark.parametrize("name", UNREAL)
def test_what_is_found_out_is_of_real_tensors(name):
    """It is kept for all later calls, whatever the first one ran under; and a mode does not see the question."""
    inputs = rand_qkv(64, query_heads=4, kv_heads=2, dtype=torch.float32)
    with UNREAL[name]() as mode:
        lighthouse.attention(*([torch.empty(t.shape) for t in inputs] if name == "fake" else inputs))
    assert lighthouse.inner_backend(*inputs[:2]) == SDPBackend.FLASH_ATTENTION
    if isinstance(mode, Calls):
        assert not [str(operator) for operator in mode.of if "empty" in str(operator) or "choice" in str(operator)]


def test_a_device_that_is_not_there_is_not_asked(caplog):
    inputs = [tensor.to("meta") for tensor in rand_qkv(64, dtype=torch.float32)]
    assert lighthouse.attention(*inputs).is_meta
    assert not caplog.records
    with pytest.raises(ValueError, match="query is on meta: PyTorch can be asked only about a CPU or GPU that exists"):
        lighthouse.inner_backend(*inputs[:2])


def test_the_backend_is_that_of_the_call_under_autocast():
    query, key, _ = rand_qkv(64, dtype=torch.float32)
    asked = []
    with pytest.MonkeyPatch.context() as patch, torch.autocast("cpu", torch.bfloat16):
        patch.setattr(inner, "_backend", lambda case, allowed: asked.append(case) or SDPBackend.FLASH_ATTENTION)
        lighthouse.inner_backend(query, key.requires_grad_())
        lighthouse.attention(query, key, key)
    assert asked[0] == asked[1] and asked[0].dtype == torch.bfloat16 and asked[0].gradient


def test_the_order_that_a_user_gives_is_obeyed():
    with sdpa_kernel([SDPBackend.MATH, SDPBackend.FLASH_ATTENTION], set_priority=True):
        first = inner._allowed()
    assert first != inner._allowed()


def test_only_math_is_said_once(caplog):
    with sdpa_kernel(SDPBackend.MATH):
        assert [inner._is_math(*case()) for _ in range(2)] == [True, True]
    assert not inner._is_math(*case())
    assert [record.levelname for record in caplog.records] == ["WARNING"]
    assert "only PyTorch's math backend supports float32, head_dim to 64 on cpu" in caplog.text


@pytest.mark.parametrize("dynamic", [False, True])
def test_the_question_is_answered_while_tracing(dynamic):
    query, key, value = rand_qkv(64, query_heads=4, kv_heads=2, dtype=torch.float32)

    def by_backend(query):
        return query + (1 if inner._is_math(*inner._case(query, True, 0.0)) else 2)

    def within_math(query):
        with sdpa_kernel(SDPBackend.MATH):
            return by_backend(query)

    compiled = {
        f: torch.compile(f, fullgraph=True, backend="eager", dynamic=dynamic) for f in (by_backend, within_math)
    }
    assert torch.equal(compiled[by_backend](query), query + 2)
    assert torch.equal(compiled[within_math](query), query + 1)


def test_heads_repeated_for_the_others_sake_give_the_same():
    """In float32 on CUDA the memory-efficient backend of older PyTorch wants as many key heads as query heads."""
    query, key, value = (t.requires_grad_() for t in rand_qkv(64, query_heads=4, kv_heads=2, dtype=torch.float32))
    layout = lighthouse.SubSequences(1, 64)
    with sdpa_kernel(SDPBackend.MATH):
        output = inner.causal_sdpa(query, key, value, scale=None, dropout_p=0.0, layout=layout)
    expected = dense(query, key, value)
    torch.testing.assert_close(output, expected)
    grads = [torch.autograd.grad(out, (query, key, value), torch.ones_like(out)) for out in (output, expected)]
    for mine, theirs in zip(*grads, strict=True):
        torch.testing.assert_close(mine, theirs)


def test_what_the_faster_ones_lack_is_told():
    def refusing(parameters, debug):
        warnings.warn("needs half precision (Triggered internally at sdp_utils.cpp)", stacklevel=1)
        return False

    assert inner._reason(refusing, None) == "needs half precision"
    assert "prefers the other" in inner._reason(lambda parameters, debug: True, None)
    faster = [name for name, _ in inner._faster_than(SDPBackend.EFFICIENT_ATTENTION)]
    assert faster == ["CUDNN_ATTENTION", "FLASH_ATTENTION"]
    assert len(inner._faster_than(SDPBackend.MATH)) == 3
