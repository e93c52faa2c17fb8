"""Compiled, exported and checkpointed on a GPU."""

import pytest
import torch
from torch.autograd import forward_ad
from torch.utils.checkpoint import checkpoint

import lighthouse
from cases import CONTEXTS, MM, Calls, Layer
from chains import error, leaves
from lighthouse.core import inner


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


def test_dynamic_shapes(device):
    """Every number is symbolic, those of the settings' defaults too."""
    compiled = torch.compile(lighthouse.attention, dynamic=True, fullgraph=True, backend="aot_eager")
    for tokens in (300, 333):
        inputs = leaves(device, tokens, dtype=torch.float32, head_dim=64)
        assert_close(through(compiled, inputs), through(lighthouse.attention, inputs), allowed=1e-4)


class Attention(torch.nn.Module):
    def forward(self, query, key, value):
        return lighthouse.attention(query, key, value)


def test_exported(device):
    """In the program is the attention alone, not what PyTorch's choice of a backend was asked with."""
    inner._backend.cache_clear()
    inputs = tuple(tensor.detach() for tensor in leaves(device, 300, dtype=torch.float32, head_dim=64))
    exported = torch.export.export(Attention(), inputs, strict=False)
    for program in (exported, exported.run_decompositions()):
        assert not [node for node in program.graph.nodes if node.name.startswith(("empty", "wrap_with"))]
        assert_close([program.module()(*inputs)], [lighthouse.attention(*inputs)], allowed=1e-4)


@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
def test_forward_mode_is_refused(device, compiled):
    query, key, value = (tensor.detach() for tensor in leaves(device, 64, dtype=torch.float32, head_dim=64))
    call = torch.compile(lighthouse.attention, backend="aot_eager") if compiled else lighthouse.attention
    with forward_ad.dual_level(), pytest.raises(NotImplementedError, match="use torch.autograd.grad"):
        call(query, key, forward_ad.make_dual(value, torch.ones_like(value)))
