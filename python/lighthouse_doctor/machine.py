"""The checks of the machine itself: Python, torch, the driver, GPUs, cuDNN, memory, disk.

Each gives lines; what it raises is its failed line.
"""

from __future__ import annotations

import importlib.util
import os
import platform
import shutil
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

from lighthouse_doctor.facts import (
    built_for,
    count_of,
    cuda_number,
    dotted,
    driver_cuda,
    free_memory,
    gpus_on_the_bus,
    numbers,
    nvidia_smi,
    said_by,
)
from lighthouse_doctor.line import FAILED, NO_GPU_WANTED, NOTE, OK, Line

OLDEST_PYTHON = (3, 10)
OLDEST_TORCH = (2, 10)
CORRECT_CUDNN = 91501  # the first with correct gradients at every length; before it PyTorch prefers FlashAttention

GIB = 2**30
LITTLE = GIB  # of memory or disk: with less nothing can be trained


def check_python() -> Iterator[Line]:
    version = platform.python_version()
    found = f"{version}, {platform.system()} {platform.machine()}, {sys.executable}"
    if sys.version_info < OLDEST_PYTHON:
        oldest = ".".join(map(str, OLDEST_PYTHON))
        yield Line(
            "python", FAILED, f"{found}: {oldest} or later is needed", "python3.12 -m venv venv, and install there"
        )
    elif platform.system() != "Linux":
        yield Line("python", FAILED, f"{found}: the package is for Linux", "on Windows: use WSL 2")
    else:
        yield Line("python", OK, found)


def check_torch() -> Iterator[Line]:
    upgrade = 'pip install --upgrade "torch>=2.10"'
    if importlib.util.find_spec("torch") is None:
        yield Line("torch", FAILED, "not installed", upgrade)
        return
    try:
        import torch

        version = torch.__version__
    except Exception as error:
        yield Line("torch", FAILED, f"installed, but does not import: {said_by(error)}", f"{upgrade} --force-reinstall")
        return
    if numbers(version)[:2] < OLDEST_TORCH:
        yield Line("torch", FAILED, f"{version}: 2.10 or later is needed", upgrade)
        return
    yield Line("torch", OK, f"{version}, {built_for(torch)}; {torch.get_num_threads()} threads")


def check_driver() -> Iterator[Line]:
    """The driver and what it supports, and why torch does not see a GPU that exists."""
    import torch

    hidden = os.environ.get("CUDA_VISIBLE_DEVICES")
    if hidden is not None and hidden.strip() in ("", "-1"):
        yield Line("driver", NOTE, f"CUDA_VISIBLE_DEVICES={hidden!r} hides every GPU: training is on the CPU, slowly")
        return
    if torch.version.hip is not None and torch.cuda.is_available():
        found = f"torch is {built_for(torch)}: Lighthouse has kernels for CUDA and the CPU"
        yield Line("driver", FAILED, found, NO_GPU_WANTED.replace("CUDA_", "HIP_"))
        return
    cuda, version, gpus = driver_cuda(), *nvidia_smi()
    gpus = gpus or gpus_on_the_bus()
    about = f"{version or 'of unknown version'}, for CUDA up to {dotted(cuda)}" if cuda else "none (no libcuda.so.1)"
    if torch.cuda.is_available():
        yield Line("driver", OK, f"{about}; torch is {built_for(torch)} and sees {count_of(torch.cuda.device_count())}")
        return
    if not gpus and not cuda:
        yield Line("driver", NOTE, "no NVIDIA GPU and no driver: training is on the CPU, slowly")
        return
    there = f"{', '.join(gpus) or 'no GPU listed'}; driver: {about}"
    if torch.version.cuda is None:
        found = f"torch is {built_for(torch)} and cannot use the GPU ({there})"
        yield Line("driver", FAILED, found, f"pip install --upgrade --force-reinstall torch; {NO_GPU_WANTED}")
        return
    try:
        torch.cuda.init()
        why = "torch sees no GPU"
    except Exception as error:
        why = said_by(error)
    if not cuda:
        fix = "install NVIDIA's driver; in a container: `docker run --gpus all`, which brings the host's"
    elif cuda < cuda_number(torch.version.cuda):
        fix = f"install a driver for CUDA {torch.version.cuda} or later, or a torch built for {dotted(cuda)} or earlier"
    else:
        fix = "nvidia-smi shows what the driver sees; after a driver update: reboot"
    yield Line("driver", FAILED, f"torch cannot use the GPU: {why} ({there})", f"{fix}; {NO_GPU_WANTED}")


def check_gpus() -> Iterator[Line]:
    import torch

    for index in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(index)
        free, total = torch.cuda.mem_get_info(index)
        found = (
            f"{properties.name}, compute capability {properties.major}.{properties.minor}, "
            f"{free / GIB:.1f} of {total / GIB:.1f} GiB free"
        )
        if free < total / 2:
            fix = "nvidia-smi lists the processes that use it"
            yield Line("gpu", NOTE, f"{found}: other processes use it", fix, device=f"cuda:{index}")
        else:
            yield Line("gpu", OK, found, device=f"cuda:{index}")


def check_cudnn() -> Iterator[Line]:
    import torch

    if torch.version.cuda is None:
        yield Line("cudnn", NOTE, f"none: torch is {built_for(torch)}", needed=False)
        return
    upgrade = f"pip install --upgrade nvidia-cudnn-cu{torch.version.cuda.split('.')[0]}"
    try:
        number = torch.backends.cudnn.version()
    except Exception as error:
        yield Line("cudnn", FAILED, said_by(error), upgrade, needed=False)
        return
    if number is None:
        yield Line("cudnn", FAILED, "torch finds none: FlashAttention is used", upgrade, needed=False)
        return
    version = f"{number // 10_000}.{number // 100 % 100}.{number % 100}"
    if number < CORRECT_CUDNN:
        found = (
            f"{version}: before 9.15.1 cuDNN's attention gives wrong gradients at odd lengths; PyTorch therefore "
            "prefers FlashAttention, which is slower on Hopper and later"
        )
        yield Line("cudnn", NOTE, found, upgrade, needed=False)
    else:
        yield Line("cudnn", OK, f"{version}: gradients are correct at every length")


def check_memory() -> Iterator[Line]:
    free = free_memory()
    status, fix = (OK, None) if free >= LITTLE else (NOTE, "end what uses it: ps -eo pid,rss,args --sort=-rss | head")
    yield Line("memory", status, f"{free / GIB:.1f} GiB free", fix, needed=False)


def check_disk() -> Iterator[Line]:
    folder = Path.cwd()
    free = shutil.disk_usage(folder).free
    found = f"{free / GIB:.1f} GiB free in {folder}, where runs are written"
    try:
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        fix = "another folder: lighthouse pretrain --output_dir"
        yield Line("disk", NOTE, f"{found}, but nothing can be written: {error.strerror}", fix, needed=False)
        return
    if free < LITTLE:
        yield Line("disk", NOTE, found, "another folder: lighthouse pretrain --output_dir", needed=False)
    else:
        yield Line("disk", OK, found)
