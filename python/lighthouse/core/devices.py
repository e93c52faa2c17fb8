"""Where the kernels run, and what they support there.

A device is asked once. While `torch.compile` traces it is a constant.
"""

from __future__ import annotations

import ctypes
import functools
import platform
import re
from pathlib import Path

import torch

from lighthouse.core.operators import LIBRARY_PATH

MAX_HEAD_DIM = 256  # on CUDA, and there a multiple of 8: rows are read 16 bytes at a time


def check_device(name: str, device: torch.device) -> None:
    """The kernels run there. Raises ValueError."""
    if device.type == "cuda":
        missing = _missing_on_cuda(device.index)
        if missing is not None:
            raise ValueError(f"{name} is on {device}, and {missing}: move the tensors to the CPU, or train dense there")
    elif device.type not in ("cpu", "meta"):
        raise ValueError(f"{name} is on {device}: only CPU and CUDA tensors are supported")


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
            "this build of lighthouse has no CUDA kernels (no nvcc of CUDA 12.8 or later was found when it was "
            "installed; with one in PATH `pip install --force-reinstall --no-deps .` builds them)"
        )
    if not torch.cuda.is_available():  # a fake tensor, traced where no GPU is
        return None
    return missing_for_capability(*_capability(index if index is not None else torch.cuda.current_device()))


@functools.cache
def _capability(index: int) -> tuple[int, int]:
    return torch.cuda.get_device_capability(index)


@functools.cache
def architectures() -> tuple[str, ...]:
    """What the CUDA kernels of this build were compiled for, as CMake spells it: `("80-real", ..., "120")`."""
    function = ctypes.CDLL(str(LIBRARY_PATH)).lighthouse_cuda_architectures
    function.restype = ctypes.c_char_p
    return tuple(filter(None, function().decode().split(",")))


def has_cuda_kernels() -> bool:
    """Whether this build of the library has kernels for CUDA."""
    return bool(architectures())


def missing_for_capability(major: int, minor: int, built: tuple[str, ...] | None = None) -> str | None:
    """None where the library has code for GPUs of this compute capability, else what the build has and what is needed.

    Code of an architecture runs on later ones of the same major version, with an "a" only on that one, and PTX, which
    the build has unless CMake was told "-real", is compiled by the driver for later ones.
    """
    built = architectures() if built is None else built
    for name in built:
        [(number, letter, kind)] = re.findall(r"^(\d+)([af]?)(-real|-virtual)?$", name)
        its_major, its_minor = divmod(int(number), 10)
        if (major, minor) == (its_major, its_minor):
            return None
        if letter != "a" and major == its_major and minor > its_minor:
            return None
        if letter == "" and kind != "-real" and (major, minor) > (its_major, its_minor):
            return None
    return (
        f"that GPU has compute capability {major}.{minor}, for which this build of lighthouse has no kernels (it was "
        f"compiled for {', '.join(built)}; CMake's LIGHTHOUSE_CUDA_ARCHITECTURES adds others)"
    )


def device_name(device: torch.device | str) -> str:
    device = torch.device(device)
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    named = next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), "")
    return f"{named or platform.machine()}, {torch.get_num_threads()} threads"
