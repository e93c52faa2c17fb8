"""What looks through the functional call: `torch.compile`, `torch.export`, `make_fx`, vmap; and derivatives in forward
mode, which neither the call nor an operator may take for zero."""

import pytest
import torch
from torch.autograd import forward_ad
from torch.fx.experimental.proxy_tensor import make_fx

import lighthouse
from cases import rand_qkv
from test_operators import samples


def qkv(tokens=300, *, batch=1, query_heads=4, kv_heads=2, head_dim=8, **options):
    sizes = {"batch": batch, "query_heads": query_heads, "kv_heads": kv_heads, "head_dim": head_dim}
    return rand_qkv(tokens, dtype=torch.float32, **sizes, **options)


# Compiled

# What changes from call to call, as arguments of `qkv` or of the functional call; the first call's are its defaults.
CHANGING = {
    "length": [{"tokens": tokens} for tokens in (513, 17)],
    "sizes": [{"batch": 3, "head_dim": 72}, {"query_heads": 2}],
    "scale": [{"scale": scale} for scale in (0.1, 0.3)],
    "select_topk": [{"select_topk": topk} for topk in (1 / 32, 5)],
    "pool_ratios": [{"pool_ratios": ratios} for ratios in ((1 / 2, 1 / 6), ())],
    "cover_start": [{"cover_start": False}],
}


@pytest.mark.parametrize("name", CHANGING)
def test_dynamic_shapes(name):
    """With `dynamic=True` every number is symbolic, those of the settings and their defaults too."""
    compiled = torch.compile(lighthouse.attention, fullgraph=True, dynamic=True, backend="eager")
    for change in [{}, *CHANGING[name]]:
        options = {key: value for key, value in change.items() if key not in qkv.__kwdefaults__ and key != "tokens"}
        inputs = qkv(**{key: value for key, value in change.items() if key not in options})
        torch.testing.assert_close(compiled(*inputs, **options), lighthouse.attention(*inputs, **options))


def test_dynamic_shapes_have_gradients():
    compiled = torch.compile(lambda *qkv: lighthouse.attention(*qkv), fullgraph=True, dynamic=True, backend="aot_eager")
    for tokens in (300, 333):
        results = []
        for call in (compiled, lighthouse.attention):
            leaves = [tensor.requires_grad_() for tensor in qkv(tokens)]
            output = call(*leaves)
            results.append((output.detach(), *torch.autograd.grad(output.square().sum(), leaves)))
        for mine, theirs in zip(*results, strict=True):
            torch.testing.assert_close(mine, theirs)


@pytest.mark.parametrize("dynamic", [None, True])
def test_dropout_that_changes(dynamic):
    def inner(query, key, value, *, dropout_p, **_):
        return query * dropout_p

    compiled = torch.compile(lighthouse.attention, fullgraph=True, dynamic=dynamic, backend="eager")
    inputs = qkv()
    for dropout_p in (0.1, 0.2):
        compiled(*inputs, dropout_p=dropout_p)
        mine, theirs = (call(*inputs, dropout_p=dropout_p, inner=inner) for call in (compiled, lighthouse.attention))
        torch.testing.assert_close(mine, theirs)


# Traced otherwise


class Attention(torch.nn.Module):
    def forward(self, query, key, value):
        return lighthouse.attention(query, key, value)


OURS = ("score", "select", "gather", "scatter")


@pytest.mark.parametrize("strict", [False, True], ids=["as_it_runs", "strict"])
def test_exported_for_any_length(strict):
    """What PyTorch's choice of a backend is asked with is not in the program, and no length breaks a condition."""
    tokens = {2: torch.export.Dim("tokens", min=64, max=2**20)}
    exported = torch.export.export(Attention(), tuple(qkv()), strict=strict, dynamic_shapes=(tokens,) * 3)
    for program in (exported, exported.run_decompositions()):
        names = [node.name for node in program.graph.nodes]
        assert [name for name in names if name in OURS] == list(OURS)
        assert not [name for name in names if name.startswith(("empty", "wrap_with", "_set_grad"))]
        for length in (300, 301, 777):
            inputs = qkv(length)
            torch.testing.assert_close(program.module()(*inputs), lighthouse.attention(*inputs))


@pytest.mark.parametrize("mode", ["real", "fake", "symbolic"])
def test_make_fx_records_the_operators_and_their_gradients(mode):
    def gradients(*inputs):
        return torch.autograd.grad(lighthouse.attention(*inputs).square().sum(), inputs)

    traced = make_fx(gradients, tracing_mode=mode)(*(tensor.requires_grad_() for tensor in qkv()))
    inputs = [tensor.neg().requires_grad_() for tensor in qkv(seed=1)]
    for mine, theirs in zip(traced(*inputs), gradients(*inputs), strict=True):
        torch.testing.assert_close(mine, theirs)


@pytest.mark.filterwarnings("ignore:There is a performance drop")
def test_vmap_is_the_call_on_each():
    stacked = [torch.stack([a, b]).requires_grad_() for a, b in zip(qkv(), qkv(seed=1), strict=True)]
    mapped = torch.func.vmap(lighthouse.attention)(*stacked)
    each = torch.stack([lighthouse.attention(*(tensor[i] for tensor in stacked)) for i in range(2)])
    torch.testing.assert_close(mapped, each)
    grads = [torch.autograd.grad(output.square().sum(), stacked) for output in (mapped, each)]
    for mine, theirs in zip(*grads, strict=True):
        torch.testing.assert_close(mine, theirs)


# Derivatives other than autograd's


@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
@pytest.mark.parametrize("derivative", ["grad", "vjp", "jvp"])
def test_derivatives_of_torch_func_are_refused_and_not_silently_zero(derivative, compiled):
    query, key, value = rand_qkv(40)

    def loss(value):
        return lighthouse.attention(query, key, value, select_topk=5).sum()

    def take(value):
        if derivative == "jvp":
            return torch.func.jvp(loss, (value,), (value,))[1]
        return torch.func.grad(loss)(value) if derivative == "grad" else torch.func.vjp(loss, value)[0]

    call = torch.compile(take, backend="aot_eager") if compiled else take
    with pytest.raises(Exception if compiled else NotImplementedError) as refused:
        call(value)
    if not compiled:
        assert "use torch.autograd.grad" in str(refused.value)


FORWARD_MODE = "forward-mode derivatives .* are not supported: use torch.autograd.grad"


def dual(tensor):
    return forward_ad.make_dual(tensor, torch.ones_like(tensor))


@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
@pytest.mark.parametrize("which", range(3), ids=["query", "key", "value"])
def test_forward_mode_is_refused(which, compiled):
    call = torch.compile(lighthouse.attention, backend="aot_eager") if compiled else lighthouse.attention
    with forward_ad.dual_level():
        inputs = [dual(tensor) if i == which else tensor for i, tensor in enumerate(qkv(64))]
        with pytest.raises(NotImplementedError, match=FORWARD_MODE):
            call(*inputs)


def test_forward_over_reverse_is_refused():
    leaves = [tensor.requires_grad_() for tensor in qkv(64)]
    output = lighthouse.attention(*leaves, inner=lambda query, key, value, **_: query * 1.0)
    with forward_ad.dual_level(), pytest.raises(NotImplementedError, match=FORWARD_MODE):
        torch.autograd.grad(output, leaves[0], dual(torch.ones_like(output)))


@pytest.mark.parametrize("name", ["gather", "gather_backward", "scatter", "scatter_backward"])
def test_the_operators_refuse_forward_mode_themselves(name):
    operator = getattr(torch.ops.lighthouse, name)
    first, *others = samples(torch.float64, "heads")[name]
    first, others = first.detach(), [x.detach() if isinstance(x, torch.Tensor) else x for x in others]
    operator(first, *others)
    with forward_ad.dual_level(), pytest.raises(NotImplementedError, match=FORWARD_MODE):
        operator(dual(first), *others)
    with pytest.raises(NotImplementedError, match=FORWARD_MODE):
        torch.func.jvp(lambda x: operator(x, *others), (first,), (first,))
