"""Where the kernels run, and what they take there.

What is found out about a device is found out once. While `torch.compile` traces it is a constant.
"""

from __future__ import annotations

import functools

import torch

from lighthouse.operators import CHOICE

MAX_HEAD_DIM = 256  # on CUDA, and there a multiple of 8: rows are read 16 bytes at a time


def check_device(name: str, device: torch.device) -> None:
    """The kernels run there. Raises ValueError."""
    if device.type == "cuda":
        missing = _missing_on_cuda(device.index)
        if missing is not None:
            raise ValueError(f"{name} is on {device}, and {missing}: move the tensors to the CPU, or train dense there")
    elif device.type not in ("cpu", "meta"):
        raise ValueError(f"{name} is on {device}: only CPU and CUDA tensors can be taken")


def check_on_cuda(name: str, dtype: torch.dtype, head_dim: int) -> None:
    """The CUDA kernels take such tensors. Raises ValueError."""
    if dtype == torch.float64:
        raise ValueError(
            f"{name} has dtype float64: on CUDA float32, bfloat16 or float16 is needed; float64 runs on the CPU"
        )
    if head_dim % 8 or head_dim > MAX_HEAD_DIM:
        raise ValueError(
            f"{name} has head_dim {head_dim}: on CUDA a multiple of 8 up to {MAX_HEAD_DIM} is needed; "
            "pad with zeros and pass the scale of the unpadded one, or move the tensors to the CPU"
        )


@torch.compiler.assume_constant_result
def _missing_on_cuda(index: int | None) -> str | None:
    """What keeps this library from running on that GPU, or None."""
    if not has_cuda_kernels():
        return (
            "this build of lighthouse has no CUDA kernels (no nvcc was found when it was installed; with one in PATH "
            "`pip install --force-reinstall --no-deps .` builds them)"
        )
    if not torch.cuda.is_available():  # a fake tensor, traced where no GPU is
        return None
    return missing_for_capability(*torch.cuda.get_device_capability(index))


@functools.cache
def has_cuda_kernels() -> bool:
    """Whether this build of the library has kernels for CUDA."""
    return all(operator.has_kernel_for_dispatch_key(torch._C.DispatchKey.CUDA) for operator in CHOICE)


def missing_for_capability(major: int, minor: int) -> str | None:
    """None where the library has code for GPUs of this compute capability, else what is there and what is needed.

    Code for sm_80, sm_100 and sm_120 runs on later ones of the same major version, that for sm_90a on 9.0 alone; PTX of
    the last is compiled by the driver for whatever comes later.
    """
    if major in (8, 10) or (major, minor) == (9, 0) or major >= 12:
        return None
    return (
        f"that GPU has compute capability {major}.{minor}, for which lighthouse has no kernels (it has them for 8.x, "
        "9.0, 10.x, 12.x and later)"
    )
