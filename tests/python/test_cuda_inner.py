"""Which of PyTorch's attentions runs on the sub-sequence on a GPU, and that its results are right."""

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.attention import SDPBackend, sdpa_kernel

import lighthouse
from cases import Calls, dense
from chains import DTYPES, FACTOR, forward_backward, leaves
from lighthouse.core import inner

GIB = 2**30

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


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_fake_tensors_do_not_decide_for_real_ones(cuda, dtype):
    """What PyTorch says is kept for all later calls, also where the first one is made of fake tensors."""
    inputs = leaves(cuda, 300, dtype=dtype, head_dim=64)
    inner._backend.cache_clear()
    truth = lighthouse.inner_backend(*inputs[:2])
    inner._backend.cache_clear()
    with FakeTensorMode():
        lighthouse.attention(*(torch.empty(t.shape, dtype=dtype, device=cuda, requires_grad=True) for t in inputs))
    assert lighthouse.inner_backend(*inputs[:2]) == truth
