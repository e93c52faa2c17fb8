"""What is said where the kernels cannot run. A fake tensor stands for the GPU that is not needed to see the error."""

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

import lighthouse
from lighthouse.core import devices


@pytest.fixture
def fake_cuda():
    """Makes tensors that say they are on a GPU."""
    with FakeTensorMode(allow_non_fake_inputs=True):
        yield lambda **changes: torch.empty(1, 1, 64, changes.pop("head_dim", 8), device="cuda", **changes)


def test_a_build_without_cuda(fake_cuda, monkeypatch):
    monkeypatch.setattr(devices, "has_cuda_kernels", lambda: False)
    tensor = fake_cuda()
    with pytest.raises(ValueError, match="query is on cuda.* no CUDA kernels .*nvcc.*move the tensors to the CPU"):
        lighthouse.attention(tensor, tensor, tensor)


TAKEN = [(8, 0), (8, 6), (8, 9), (9, 0), (10, 0), (10, 3), (12, 0), (12, 1), (13, 0)]
NOT_TAKEN = [(7, 0), (7, 5), (9, 1), (11, 0)]
BUILT = ("80-real", "90a-real", "100-real", "120")  # CMakeLists.txt's default


@pytest.mark.parametrize("capability", TAKEN, ids=str)
def test_gpus_that_the_library_has_code_for(capability):
    assert devices.missing_for_capability(*capability, BUILT) is None


@pytest.mark.parametrize("capability", NOT_TAKEN, ids=str)
def test_gpus_that_it_has_none_for(capability):
    missing = devices.missing_for_capability(*capability, BUILT)
    assert f"{capability[0]}.{capability[1]}, for which this build of lighthouse has no kernels" in missing
    assert "80-real, 90a-real, 100-real, 120" in missing


OTHER_BUILDS = [
    ("a_chosen_one", ("110-real",), (11, 0), True),
    ("an_earlier_minor_version", ("89-real",), (8, 6), False),
    ("ptx_alone", ("90-virtual",), (12, 0), True),
    ("ptx_of_a_later_one", ("120",), (9, 0), False),
    ("a_family", ("100f-real",), (10, 3), True),
    ("nothing", (), (9, 0), False),
]


@pytest.mark.parametrize("built, capability, taken", [b[1:] for b in OTHER_BUILDS], ids=[b[0] for b in OTHER_BUILDS])
def test_other_builds(built, capability, taken):
    assert (devices.missing_for_capability(*capability, built) is None) == taken


def test_the_library_says_what_it_was_compiled_for():
    registered = torch.ops.lighthouse.score.default.has_kernel_for_dispatch_key(torch._C.DispatchKey.CUDA)
    assert registered == devices.has_cuda_kernels() == bool(devices.architectures())
    assert registered == (devices.missing_for_capability(9, 0) is None)  # every build of ours has code for it


BAD_ON_CUDA = {
    "float64": ({"dtype": torch.float64}, "query has dtype float64: on CUDA float32, bfloat16 or float16 is needed"),
    "head_dim_of_12": ({"head_dim": 12}, "query has head_dim 12: on CUDA a multiple of 8 up to 256"),
    "head_dim_of_264": ({"head_dim": 264}, "query has head_dim 264: on CUDA a multiple of 8 up to 256"),
}


@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
@pytest.mark.parametrize("case", BAD_ON_CUDA)
def test_what_the_cuda_kernels_do_not_take(case, compiled, fake_cuda, monkeypatch):
    monkeypatch.setattr(devices, "has_cuda_kernels", lambda: True)
    changes, message = BAD_ON_CUDA[case]
    tensor = fake_cuda(**changes)
    call = torch.compile(lighthouse.attention, fullgraph=True, backend="eager") if compiled else lighthouse.attention
    with pytest.raises(Exception if compiled else ValueError, match=message):
        call(tensor, tensor, tensor)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_sizes_on_cuda_are_known_without_one(dtype, fake_cuda, monkeypatch):
    monkeypatch.setattr(devices, "has_cuda_kernels", lambda: True)
    query, key, value = (fake_cuda(head_dim=64, dtype=dtype) for _ in range(3))
    output = lighthouse.attention(query, key, value)
    assert output.shape == query.shape and output.dtype == dtype and output.device == query.device


@pytest.mark.skipif(not devices.has_cuda_kernels(), reason="a build with CUDA kernels is needed")
def test_a_first_tensor_that_is_on_no_gpu():
    """As where only another argument is on one; said before anything is asked of CUDA."""
    key, cuda = torch.empty(1, 1, 64, 8), torch._C.DispatchKeySet(torch._C.DispatchKey.CUDA)
    with pytest.raises((RuntimeError, ValueError), match="the first tensor is not on a CUDA device"):
        torch.ops.lighthouse.score.default.redispatch(cuda, key, key)


def test_another_kind_of_device():
    with pytest.raises(ValueError, match="query is on xpu:0: only CPU and CUDA tensors"):
        devices.check_device("query", torch.device("xpu:0"))
