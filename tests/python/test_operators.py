"""The operators one by one: what PyTorch asks of an operator, and what the native library may need of PyTorch."""

import shutil
import subprocess
import sys

import pytest
import torch

import lighthouse
from cases import rand_qkv
from lighthouse.core import library as _library
from lighthouse.core import operators
from lighthouse.core.plan import sub_length

WINDOWS, TOPK = (1, 4, 16), (1, 16)
TOKENS = 70

REFUSED = (RuntimeError, ValueError)  # std::invalid_argument arrives as either, by torch's version


def chosen(query, key):
    scores = torch.ops.lighthouse.score(query, key)
    return torch.ops.lighthouse.select(*scores, WINDOWS, *TOPK, True)


def samples(dtype, layout):
    """One call of each operator: name to arguments."""
    query, key, value = rand_qkv(TOKENS, batch=2, query_heads=4, kv_heads=2, dtype=dtype, layout=layout)
    mask, prefix = chosen(query, key)
    length = sub_length(TOKENS, WINDOWS, TOPK)
    subs = torch.ops.lighthouse.gather(query, key, value, mask, prefix, WINDOWS, length)
    order = operators.memory_order(query)
    grad = lambda tensors: tuple(t.detach().clone().requires_grad_() for t in tensors)  # noqa: E731
    return {
        "score": (query, key),
        "select": (*torch.ops.lighthouse.score(query, key), WINDOWS, *TOPK, True),
        "gather": (*grad((query, key, value)), mask, prefix, WINDOWS, length),
        "gather_backward": (*grad(subs), mask, prefix, WINDOWS, order, order, order),
        "scatter": (*grad(subs[:1]), mask, prefix, WINDOWS),
        "scatter_backward": (*grad((query,)), mask, prefix, WINDOWS, length, order),
    }


NAMES = ("score", "select", "gather", "gather_backward", "scatter", "scatter_backward")


@pytest.mark.parametrize("layout", ["heads", "tokens"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64], ids=str)
@pytest.mark.parametrize("name", NAMES)
def test_opcheck(name, dtype, layout):
    torch.library.opcheck(getattr(torch.ops.lighthouse, name).default, samples(dtype, layout)[name])


@pytest.mark.parametrize("name", ["gather", "gather_backward", "scatter", "scatter_backward"])
def test_gradcheck_to_second_order(name):
    operator = getattr(torch.ops.lighthouse, name)
    arguments = samples(torch.float64, "tokens")[name]
    torch.autograd.gradcheck(operator, arguments, fast_mode=True)
    torch.autograd.gradgradcheck(operator, arguments, fast_mode=True)


@pytest.mark.parametrize("layout", ["heads", "tokens"])
def test_gradients_have_their_inputs_strides(layout):
    query, key, value = rand_qkv(TOKENS, batch=2, query_heads=4, kv_heads=2, layout=layout)
    for tensor in (query, key, value):
        tensor.requires_grad_()
    received = []
    for tensor in (query, key, value):
        tensor.register_hook(lambda grad: received.append(grad.stride()))
    lighthouse.attention(query, key, value).sum().backward()
    assert sorted(received) == sorted(tensor.stride() for tensor in (query, key, value))


def test_a_choice_that_is_none_is_refused_before_memory_is_touched():
    query, key, value = rand_qkv(TOKENS, dtype=torch.float32)
    mask, prefix = chosen(query, key)
    length = sub_length(TOKENS, WINDOWS, TOPK)
    gather = torch.ops.lighthouse.gather
    stray = mask.clone()
    stray[0, 0, 1] |= 4  # no window of 16 ends at token 1
    for bad in (
        (mask, prefix + 1, length),
        (mask, prefix, length - 1),
        (torch.full_like(mask, 255), prefix, length),
        (stray, prefix, length),
        (torch.zeros_like(mask), prefix, length),
    ):
        with pytest.raises(REFUSED, match="are not a choice of"):
            gather(query, key, value, *bad[:2], WINDOWS, bad[2])


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda a: (a[0].half(), *a[1:]), "dtype"),
        (lambda a: (a[0][..., :4], *a[1:]), "head_dim"),
        (lambda a: (a[0].mT.contiguous().mT, *a[1:]), "last stride"),
        (lambda a: (a[0][0], *a[1:]), "dimensions"),
        (lambda a: (a[0][:, :, :3], *a[1:]), "sizes"),
        (lambda a: (*a[:3], a[3].int(), *a[4:]), "mask must be a contiguous uint8"),
        (lambda a: (*a[:5], (1, 3, 7), a[6]), r"windows\[2\]=7"),
        (lambda a: (*a[:5], (2, 4), a[6]), r"windows\[0\]=2"),
    ],
)
def test_the_operators_check_again(change, message):
    arguments = samples(torch.float32, "heads")["gather"]
    detached = tuple(a.detach() if isinstance(a, torch.Tensor) else a for a in arguments)
    with pytest.raises(REFUSED, match=message):
        torch.ops.lighthouse.gather(*change(detached))


ASSERTED = "CUDA error: device-side assert triggered"  # of an earlier kernel, and then of every call

# What is said, on a GPU, what the device answers to another call, and whether it is for want of memory.
FAILURES = {
    "torchs_own_words": (
        "CUDA out of memory. Tried to allocate 2 GiB (originally from aoti_torch_empty_strided(...)",
        True,
        None,
        True,
    ),
    "the_drivers_words": ("CUDA error: out of memory (originally from aten::new_empty", True, None, True),
    "a_tensor_without_words": (
        "aoti_torch_empty_strided(4, sizes.data(), ...) API call failed at tensors.h, line 114",
        True,
        None,
        True,
    ),
    "scratch_without_words": (
        'torch_call_dispatcher("aten::new_empty", "", stack.data(), ...) API call failed',
        True,
        None,
        True,
    ),
    "no_kernel": ("CUDA error: no kernel image is available for execution on the device", True, None, False),
    "an_earlier_failure": (f"{ASSERTED} (originally from aten::new_empty", True, ASSERTED, False),
    "an_earlier_failure_without_words": ("aoti_torch_empty_strided(...) API call failed", True, ASSERTED, ASSERTED),
    "on_the_cpu": (
        "DefaultCPUAllocator: can't allocate memory (originally from aoti_torch_empty_strided(...)",
        False,
        None,
        False,
    ),
}


@pytest.mark.parametrize("case", FAILURES)
def test_want_of_gpu_memory_is_known(case, monkeypatch):
    message, on_cuda, answer, out_of_memory = FAILURES[case]

    def mem_get_info():
        if answer is not None:
            raise RuntimeError(answer)

    monkeypatch.setattr(torch.cuda, "mem_get_info", mem_get_info)
    if isinstance(out_of_memory, str):
        with pytest.raises(RuntimeError, match=out_of_memory):
            operators.is_out_of_memory(message, on_cuda)
    else:
        assert operators.is_out_of_memory(message, on_cuda) == out_of_memory


def test_the_library_needs_only_torchs_stable_functions():
    """Every symbol it leaves undefined and that torch would resolve is one of the C functions of the stable ABI."""
    listing = subprocess.run(
        ["nm", "-D", "--undefined-only", str(operators.LIBRARY_PATH)], capture_output=True, text=True, check=True
    ).stdout
    symbols = [line.split()[-1].split("@")[0] for line in listing.splitlines()]
    assert any(symbol.startswith("aoti_torch_") for symbol in symbols), "nothing of torch: is this our library?"
    demangled = subprocess.run(["c++filt"], input="\n".join(symbols), capture_output=True, text=True, check=True).stdout
    beyond = [
        name
        for symbol, name in zip(symbols, demangled.splitlines(), strict=True)
        if symbol.startswith("_Z") and any(part in name for part in ("at::", "c10::", "torch::", "caffe2::", "pybind"))
    ]
    assert beyond == []
    python = [symbol for symbol in symbols if symbol.startswith(("Py", "_Py"))]
    assert python == []


def test_it_needs_no_library_but_torch_and_the_systems():
    listing = subprocess.run(["readelf", "-d", str(operators.LIBRARY_PATH)], capture_output=True, text=True, check=True)
    needed = {line.split("[")[1].rstrip("]") for line in listing.stdout.splitlines() if "(NEEDED)" in line}
    system = {"libstdc++.so.6", "libm.so.6", "libgcc_s.so.1", "libc.so.6", "libpthread.so.0", "ld-linux-x86-64.so.2"}
    assert "libtorch.so" in needed
    assert needed - system == {"libtorch.so"}
    assert "RPATH" not in listing.stdout and "RUNPATH" not in listing.stdout


def test_a_missing_library_says_where_it_was_looked_for(tmp_path):
    with pytest.raises(lighthouse.NativeLibraryError, match="does not exist; looked for") as error:
        _library.load([str(tmp_path / "a"), str(tmp_path / "b")])
    assert str(tmp_path / "a" / "liblighthouse.so") in str(error.value)
    assert "pip install ." in str(error.value)


def test_a_damaged_library_says_so(tmp_path, monkeypatch):
    monkeypatch.setattr(_library, "NAMESPACE", "lighthouse_elsewhere")
    (tmp_path / "liblighthouse.so").write_bytes(b"not a library")
    with pytest.raises(lighthouse.NativeLibraryError, match="does not load") as error:
        _library.load([str(tmp_path)])
    assert "reinstall" in str(error.value)


def test_a_second_copy_is_refused_before_it_ends_the_process(tmp_path):
    shutil.copy(operators.LIBRARY_PATH, tmp_path)
    with pytest.raises(lighthouse.NativeLibraryError, match="taken in this process: lighthouse::.* already exists"):
        _library.load([str(tmp_path)])
    assert _library.load([str(operators.LIBRARY_PATH.parent)]) == operators.LIBRARY_PATH  # the same one again is none


def test_a_namespace_that_someone_else_has_is_refused_with_the_place(monkeypatch):
    monkeypatch.setattr(_library, "NAMESPACE", "lighthouse_of_another")
    for _ in range(2):  # to look leaves nothing behind
        _library._check_that_the_namespace_is_free()
    other = torch.library.Library(_library.NAMESPACE, "DEF")
    with pytest.raises(
        lighthouse.NativeLibraryError, match=r"registered at .*test_operators.py.*import only one of them"
    ):
        _library._check_that_the_namespace_is_free()
    other._destroy()


def test_an_import_after_someone_elses_is_an_error_and_no_crash():
    code = "import torch; other = torch.library.Library('lighthouse', 'DEF'); import lighthouse"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert result.returncode == 1
    assert "NativeLibraryError: the namespace torch.ops.lighthouse" in result.stderr


def test_an_old_torch_is_named(monkeypatch):
    monkeypatch.setattr(torch, "__version__", "2.9.1")
    with pytest.raises(lighthouse.NativeLibraryError, match="needs torch 2.10 or later and found 2.9.1"):
        _library.load([])


def test_importing_needs_torch_alone():
    code = (
        "import sys; sys.modules['transformers'] = sys.modules['numpy'] = None; import lighthouse, torch; "
        "x = torch.rand(1, 1, 64, 8); lighthouse.attention(x, x, x); print('ok')"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert result.stdout.strip() == "ok", result.stderr


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda a: (a[0], a[1], a[2], a[3].repeat(1, 1, 2), a[4].repeat(1, 1, 2)), "query has sizes"),
        (lambda a: (a[0], a[1][:, :0], a[2][:, :0], a[3][:, :0], a[4][:, :0]), "empty"),
        (lambda a: (a[0], a[1], a[2], a[3][:, :, :9].contiguous(), a[4][:, :, :9].contiguous()), "query has sizes"),
        (lambda a: (a[0], a[1][..., :4].contiguous(), a[2][..., :4].contiguous(), a[3], a[4]), "head_dim"),
        (lambda a: (a[0][:, :3].contiguous(), *a[1:]), "key has 2 heads, query 3"),
        (lambda a: (*a[:3], a[3][0], a[4][0]), "dimensions"),
    ],
)
def test_the_oracle_checks_what_its_loops_follow(change, message):
    query, key, value = rand_qkv(TOKENS, query_heads=4, kv_heads=2)
    scores = torch.ops.lighthouse.score(query, key)
    with pytest.raises(REFUSED, match=message):
        torch.ops.lighthouse.reference_attention(*change((query, key, value, *scores)), WINDOWS, *TOPK, True, 0.0)


def test_one_call_is_score_select_and_gather():
    """Bit for bit, gradients too, which the operator has by itself and in eager code's own function."""
    inputs = [tensor.requires_grad_() for tensor in rand_qkv(200, batch=2, query_heads=4, kv_heads=2)]
    settings, length = ((1, 4, 16), 1, 16, True), lighthouse.plan(200, select_topk=1 / 16).length
    ops = torch.ops.lighthouse
    *subs, mask, prefix = ops.choose_and_gather(*inputs, *settings, length)
    expected = ops.select(*ops.score(*inputs[:2]), *settings)
    assert torch.equal(mask, expected[0]) and torch.equal(prefix, expected[1])
    gathered = ops.gather(*inputs, *expected, settings[0], length)
    grads = [torch.randn_like(sub) for sub in subs]
    for mine, theirs in zip(subs, gathered, strict=True):
        assert torch.equal(mine, theirs)
    for mine, theirs in zip(
        torch.autograd.grad(subs, inputs, grads), torch.autograd.grad(gathered, inputs, grads), strict=True
    ):
        assert torch.equal(mine, theirs)
    with pytest.raises(Exception, match="length=7: the sub-sequence of 200 tokens has"):
        ops.choose_and_gather(*inputs, *settings, 7)


@pytest.mark.parametrize("name", ["scatter", "gather_backward"])
def test_what_is_added_is_the_last_term(name):
    """One rounding of the whole sum, in float32: not that of the result plus that of what is added."""
    query, key, value = (tensor.bfloat16() for tensor in rand_qkv(100, query_heads=4, kv_heads=2))
    ops, windows = torch.ops.lighthouse, (1, 4, 16)
    mask, prefix = ops.select(*ops.score(query, key), windows, 1, 8, True)
    length = lighthouse.plan(100, select_topk=1 / 8).length
    subs = ops.gather(query, key, value, mask, prefix, windows, length)
    choice = (mask, prefix, windows)
    if name == "scatter":
        added = torch.randn(1, 100, 4, 8).bfloat16().transpose(1, 2)
        found, without = ops.scatter(subs[0], *choice, added), ops.scatter(subs[0].float(), *choice)
        assert torch.equal(found, (without + added.float()).bfloat16())
        return
    orders = [operators.memory_order(tensor) for tensor in (query, key, value)]
    added = [torch.randn(tensor.shape).bfloat16() for tensor in (query, key, value)]
    found = ops.gather_backward(*subs, *choice, *orders, *added)
    without = ops.gather_backward(*(sub.float() for sub in subs), *choice, *orders)
    for mine, sum_, term in zip(found, without, added, strict=True):
        assert torch.equal(mine, (sum_ + term.float()).bfloat16())
    with pytest.raises(Exception, match="added_key is missing or too much"):
        ops.gather_backward(*subs, *choice, *orders, added[0])
