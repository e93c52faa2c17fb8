"""`lighthouse doctor`: whether Lighthouse can train on this machine, and the command that mends what is not fine.

The checks run in another process: `examine` starts a Python, which goes through `CHECKS` and reports line
by line, and starts a fresh one after a failure. So a library that kills the process when it is loaded, a kernel that
hangs, or a GPU left unusable by the check before is one failed line, and the checks behind it still run.

The trap: this file has to work where the rest does not. At its top it imports the standard library alone, never this
package or torch, and it also runs by itself: `python .../lighthouse/doctor.py`, where `import lighthouse` fails.
"""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import functools
import importlib
import importlib.util
import json
import math
import mmap
import os
import platform
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import textwrap
import threading
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from importlib import metadata
from pathlib import Path
from typing import NamedTuple, NoReturn

OK, NOTE, FAILED = "ok", "note", "failed"

DISTRIBUTION = "lighthouse-attn"
OLDEST_PYTHON = (3, 10)
OLDEST_TORCH = (2, 10)
CORRECT_CUDNN = 91501  # the first whose gradients are right at any length: PyTorch prefers FlashAttention before it

REINSTALL = "pip install --force-reinstall --no-deps lighthouse-attn (in a checkout: `.` for the name)"
INSTALL_EXTRA = 'pip install "lighthouse-attn[train]"'
NO_GPU_WANTED = "to train on the CPU all the same: CUDA_VISIBLE_DEVICES= lighthouse doctor"

SECONDS_FOR_A_CHECK = 60
GIB = 2**30
LITTLE = GIB  # of memory or disk, below which nothing can be trained

# What is computed to see whether it works: nothing divides, heads are grouped.
TOKENS, QUERY_HEADS, KEY_HEADS, HEAD_DIM = 701, 4, 2, 64
FACTOR, EPSILON = 2.0, 1e-6  # times the error that the same dtype makes in plain torch,
MOST = 1e-2  # and that cannot be more: PyTorch's own may be what is wrong


@dataclass(frozen=True)
class Line:
    """What one check found. `needed` is whether Lighthouse cannot train here when it has failed."""

    check: str
    status: str
    found: str
    fix: str | None = None
    needed: bool = True
    device: str | None = None

    @property
    def stops(self) -> bool:
        return self.status == FAILED and self.needed

    def __str__(self) -> str:
        name = self.check if self.device is None else f"{self.check} {self.device}"
        width = max(60, min(shutil.get_terminal_size((120, 24)).columns, 120))
        options = {"width": width, "break_long_words": False, "break_on_hyphens": False}
        indent = " " * 31
        text = textwrap.fill(
            self.found, initial_indent=f"{self.status:8}{name:23}", subsequent_indent=indent, **options
        )
        if self.fix is None:
            return text
        return text + "\n" + textwrap.fill(f"-> {self.fix}", initial_indent=indent, subsequent_indent=indent, **options)


def can_train(lines: Iterable[Line]) -> bool:
    """Whether Lighthouse can train here: nothing that it needs has failed.

    A machine without a GPU can, slowly. One with GPUs of which Lighthouse can use none cannot: a run there would not do
    what its owner expects.
    """
    return not any(line.stops for line in lines)


# The checks. Each gives lines; what it raises is its failed line.


def check_python() -> Iterator[Line]:
    version = platform.python_version()
    found = f"{version}, {platform.system()} {platform.machine()}, {sys.executable}"
    if sys.version_info < OLDEST_PYTHON:
        oldest = ".".join(map(str, OLDEST_PYTHON))
        yield Line(
            "python", FAILED, f"{found}: {oldest} or later is needed", "python3.12 -m venv venv, and install there"
        )
    elif platform.system() != "Linux":
        yield Line("python", FAILED, f"{found}: the package is for Linux", "on Windows: in WSL 2")
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
        yield Line("torch", FAILED, f"installed, but does not import: {_said(error)}", f"{upgrade} --force-reinstall")
        return
    if _numbers(version)[:2] < OLDEST_TORCH:
        yield Line("torch", FAILED, f"{version}: 2.10 or later is needed", upgrade)
        return
    yield Line("torch", OK, f"{version}, {_built_for(torch)}; {torch.get_num_threads()} threads")


def check_driver() -> Iterator[Line]:
    """The driver and what it makes possible, and why torch sees no GPU where there is one."""
    import torch

    hidden = os.environ.get("CUDA_VISIBLE_DEVICES")
    if hidden is not None and hidden.strip() in ("", "-1"):
        yield Line("driver", NOTE, f"CUDA_VISIBLE_DEVICES={hidden!r} hides every GPU: training is on the CPU, slowly")
        return
    if torch.version.hip is not None and torch.cuda.is_available():
        found = f"torch is {_built_for(torch)}: Lighthouse has kernels for CUDA and the CPU"
        yield Line("driver", FAILED, found, NO_GPU_WANTED.replace("CUDA_", "HIP_"))
        return
    cuda, version, gpus = driver_cuda(), *nvidia_smi()
    gpus = gpus or gpus_on_the_bus()
    about = f"{version or 'of unknown version'}, for CUDA up to {_dotted(cuda)}" if cuda else "none (no libcuda.so.1)"
    if torch.cuda.is_available():
        yield Line("driver", OK, f"{about}; torch is {_built_for(torch)} and sees {_count(torch.cuda.device_count())}")
        return
    if not gpus and not cuda:
        yield Line("driver", NOTE, "no NVIDIA GPU and no driver: training is on the CPU, slowly")
        return
    there = f"{', '.join(gpus) or 'no GPU listed'}; driver: {about}"
    if torch.version.cuda is None:
        found = f"torch is {_built_for(torch)} and cannot use the GPU ({there})"
        yield Line("driver", FAILED, found, f"pip install --upgrade --force-reinstall torch; {NO_GPU_WANTED}")
        return
    try:
        torch.cuda.init()
        why = "torch sees no GPU"
    except Exception as error:
        why = _said(error)
    if not cuda:
        fix = "install NVIDIA's driver; in a container: `docker run --gpus all`, which brings the host's"
    elif cuda < _cuda_number(torch.version.cuda):
        fix = (
            f"install a driver for CUDA {torch.version.cuda} or later, or a torch built for {_dotted(cuda)} or earlier"
        )
    else:
        fix = "nvidia-smi shows what the driver sees; after an update of the driver: reboot"
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
            fix = "nvidia-smi lists the processes that hold it"
            yield Line("gpu", NOTE, f"{found}: others use it", fix, device=f"cuda:{index}")
        else:
            yield Line("gpu", OK, found, device=f"cuda:{index}")


def check_cudnn() -> Iterator[Line]:
    import torch

    if torch.version.cuda is None:
        yield Line("cudnn", NOTE, f"none: torch is {_built_for(torch)}", needed=False)
        return
    upgrade = f"pip install --upgrade nvidia-cudnn-cu{torch.version.cuda.split('.')[0]}"
    try:
        number = torch.backends.cudnn.version()
    except Exception as error:
        yield Line("cudnn", FAILED, _said(error), upgrade, needed=False)
        return
    if number is None:
        yield Line("cudnn", FAILED, "torch finds none: FlashAttention is used", upgrade, needed=False)
        return
    version = f"{number // 10_000}.{number // 100 % 100}.{number % 100}"
    if number < CORRECT_CUDNN:
        found = (
            f"{version}: before 9.15.1 its attention's gradients are wrong at odd lengths; PyTorch prefers "
            "FlashAttention therefore, which is slower on Hopper and later"
        )
        yield Line("cudnn", NOTE, found, upgrade, needed=False)
    else:
        yield Line("cudnn", OK, f"{version}: gradients are right at any length")


def check_library() -> Iterator[Line]:
    """The package, its native library, and the kernels that this has for the CPU and for each GPU."""
    try:
        import lighthouse
        from lighthouse import devices, operators
    except Exception as error:
        yield Line("library", FAILED, _said(error), REINSTALL)
        return
    import torch

    dispatch = {"CPU": torch._C.DispatchKey.CPU, "CUDA": torch._C.DispatchKey.CUDA}
    verbs = ("score", "select", "gather", "gather_backward", "scatter", "scatter_backward")
    missing = {
        name: [
            verb
            for verb in verbs
            if not getattr(torch.ops.lighthouse, verb).default.has_kernel_for_dispatch_key(dispatch[name])
        ]
        for name in dispatch
    }
    found = f"lighthouse {lighthouse.__version__}, {operators.LIBRARY_PATH}"
    if missing["CPU"]:
        yield Line("library", FAILED, f"{found}: no CPU kernels for {', '.join(missing['CPU'])}", REINSTALL)
        return
    yield Line("library", OK, found)
    yield Line("kernels", OK, f"all operators; this CPU has {torch.backends.cpu.get_cpu_capability()}", device="cpu")
    built = devices.architectures()
    if not built or missing["CUDA"]:
        of_build = "this build has no CUDA kernels: no nvcc of CUDA 12.8 or later was found when it was built"
    else:
        of_build = f"compiled for {', '.join(built)}"
    count = torch.cuda.device_count()
    if not count:
        yield Line("kernels", NOTE if not built else OK, of_build, device="cuda")
        return
    reasons = [of_build if missing["CUDA"] else _no_code(torch, devices, index) for index in range(count)]
    for index, reason in enumerate(reasons):
        if reason is None:
            yield Line("kernels", OK, of_build, device=f"cuda:{index}")
            continue
        major, minor = torch.cuda.get_device_capability(index)
        fix = (
            "with nvcc of CUDA 12.8 or later in PATH, in a checkout: pip install --force-reinstall --no-deps . "
            f"-C cmake.define.LIGHTHOUSE_CUDA_ARCHITECTURES={major}{minor}-real"
            if (major, minor) >= (8, 0)
            else "none: compute capability 8.0 or later is needed"
        )
        usable = None in reasons  # then the others are a waste, not an obstacle
        fix += f"; {NO_GPU_WANTED}" if not usable else f"; CUDA_VISIBLE_DEVICES={reasons.index(None)} trains on another"
        yield Line("kernels", FAILED, reason, fix, needed=not usable, device=f"cuda:{index}")


def check_backends() -> Iterator[Line]:
    """PyTorch's attentions one by one, forward and backward at an odd length against float64."""
    import torch
    from torch.nn.attention import SDPBackend

    backends = {
        "cpu": (SDPBackend.FLASH_ATTENTION, SDPBackend.MATH),
        "cuda": (
            SDPBackend.CUDNN_ATTENTION,
            SDPBackend.FLASH_ATTENTION,
            SDPBackend.EFFICIENT_ATTENTION,
            SDPBackend.MATH,
        ),
    }
    for device, dtype in _devices(torch):
        inputs, grad = _inputs(torch, device, dtype, QUERY_HEADS)
        exact = _run(_attention_of(torch, SDPBackend.MATH), *_wide(inputs, grad))
        for backend in backends[device.type]:
            yield _backend_line(torch, backend, inputs, grad, exact, str(device))


def _backend_line(torch, backend, inputs, grad, exact, device) -> Line:
    name = {"CUDNN": "cudnn", "FLASH": "flash", "EFFICIENT": "efficient", "MATH": "math"}[backend.name.split("_")[0]]
    dtype = str(inputs[0].dtype).removeprefix("torch.")
    with warnings.catch_warnings(record=True) as said:  # PyTorch's reasons against a backend
        warnings.simplefilter("always")
        try:
            results = _run(_attention_of(torch, backend), inputs, grad)
            if device != "cpu":
                torch.cuda.synchronize(device)
        except Exception as error:
            reasons = " ".join(dict.fromkeys(str(warning.message).split(" (Triggered")[0] for warning in said))
            found = f"does not run in {dtype}: {reasons or _said(error)}"
            return Line(f"sdpa {name}", NOTE, found, needed=False, device=device)
    found, allowed = _largest_error(results, exact), FACTOR * MOST
    if found <= allowed:
        text = f"forward and backward right in {dtype} (error {found:.1e}, allowed {allowed:.1e})"
        return Line(f"sdpa {name}", OK, text, device=device)
    text = f"wrong in {dtype}: error {found:.1e} against float64, allowed {allowed:.1e}"
    fix = "torch.nn.attention.sdpa_kernel keeps training off it"
    return Line(f"sdpa {name}", FAILED, text, fix, needed=False, device=device)


def check_self_test() -> Iterator[Line]:
    """Lighthouse itself, on each device that it has code for, against the oracle in float64."""
    import torch

    from lighthouse import devices, inner_backend

    for device, half in _devices(torch):
        if device.type == "cuda" and _no_code(torch, devices, device.index) is not None:
            continue  # said above
        try:
            errors = [_self_test(torch, device, dtype) for dtype in (torch.float32, half)]
            (query, key, _), _ = _inputs(torch, device, half, KEY_HEADS)
            backend = inner_backend(query, key).name.lower()
        except Exception as error:
            fix = f"{REINSTALL}; if it stays, report it with these lines"
            yield Line("self-test", FAILED, _said(error), fix, device=str(device))
            continue
        text = f"choice, output and gradients equal the reference ({', '.join(errors)}); inner attention: {backend}"
        if backend == "math" and device.type == "cuda":
            text += ", whose memory grows with the square of the sub-sequence"
        yield Line("self-test", OK, text, device=str(device))


def _self_test(torch, device, dtype) -> str:
    """Raises `ArithmeticError` where the reference is not met; gives the error found."""
    import lighthouse
    from lighthouse.settings import POOL_RATIOS, SELECT_TOPK, check_pool_ratios, check_select_topk

    windows, topk = check_pool_ratios(POOL_RATIOS), check_select_topk(SELECT_TOPK)
    ops, name = torch.ops.lighthouse, str(dtype).removeprefix("torch.")
    inputs, grad = _inputs(torch, device, dtype, KEY_HEADS)
    wide, wide_grad = _wide(inputs, grad)
    query, key, _ = wide

    scores = [score.cpu() for score in ops.score(inputs[0].detach(), inputs[1].detach())]
    norms = query.norm(dim=-1).unflatten(1, (KEY_HEADS, -1)).amax(2), key.norm(dim=-1)
    if not all(torch.allclose(mine.double(), norm, rtol=1e-5) for mine, norm in zip(scores, norms, strict=True)):
        raise ArithmeticError(f"{name}: the scores are not the norms")
    chosen = lighthouse.select(inputs[0].detach(), inputs[1].detach())
    for head in range(KEY_HEADS):
        entries = ops.reference_select(*scores, windows, *topk, True, 0, head).tolist()
        if chosen.entries(0, head) != [tuple(entry) for entry in entries]:
            raise ArithmeticError(f"{name}: other entries than the reference's are chosen")

    reference = (*(tensor.detach() for tensor in wide), *scores, windows, *topk, True, 0.0)
    exact = ops.reference_attention(*reference), *ops.reference_attention_backward(*reference, wide_grad)
    repeated, _ = _inputs(torch, device, dtype, QUERY_HEADS)
    dense = functools.partial(torch.nn.functional.scaled_dot_product_attention, is_causal=True)
    plain = _largest_error(_run(dense, repeated, grad), _run(dense, *_wide(repeated, grad)))
    allowed = FACTOR * min(plain, MOST) + EPSILON
    found = _largest_error(_run(lighthouse.attention, inputs, grad), exact)
    if not found <= allowed:  # NaN is not, either
        raise ArithmeticError(f"{name}: error {found:.1e} against the reference, {allowed:.1e} is allowed")
    return f"{name}: error {found:.1e}"


def check_flash_attn() -> Iterator[Line]:
    """Whether an installed flash-attn works: wheels are for one CUDA and one torch, and often not for those here."""
    version = _version_of("flash-attn")
    if version is None and importlib.util.find_spec("flash_attn") is None:
        yield Line("flash-attn", OK, "not installed, and not needed: PyTorch has FlashAttention of its own")
        return
    import torch

    built = cuda_of_extension("flash_attn_2_cuda")
    found = f"{version or 'of unknown version'}, built for CUDA {built or 'of unknown version'}"
    fix = (
        "pip uninstall flash-attn; or for this torch: "
        "pip install --no-build-isolation --no-cache-dir --force-reinstall --no-deps flash-attn"
    )
    ours = None if torch.version.cuda is None else int(torch.version.cuda.split(".")[0])
    try:
        function = importlib.import_module("flash_attn").flash_attn_func
    except Exception as error:
        why = _said(error)
        if built is not None and built != ours:
            why += f" (it is for CUDA {built}, torch {_built_for(torch)})"
        elif "undefined symbol" in why:
            why += f" (it was built for another torch than {torch.__version__})"
        yield Line("flash-attn", FAILED, f"{found}, does not import: {why}", fix, needed=False)
        return
    if built is not None and built != ours:
        yield Line("flash-attn", FAILED, f"{found}, but torch is {_built_for(torch)}", fix, needed=False)
        return
    if not torch.cuda.is_available():
        yield Line("flash-attn", NOTE, f"{found}; imports, and cannot run without a GPU", needed=False)
        return
    device, dtype = torch.device("cuda:0"), torch.bfloat16
    inputs, grad = _inputs(torch, device, dtype, QUERY_HEADS)
    try:  # a wheel without code for this GPU is noticed here only: "no kernel image is available"
        _run(lambda *qkv: function(*(t.transpose(1, 2) for t in qkv), causal=True).transpose(1, 2), inputs, grad)
        torch.cuda.synchronize()
    except Exception as error:
        yield Line("flash-attn", FAILED, f"{found}, does not run: {_said(error)}", fix, needed=False)
        return
    yield Line("flash-attn", OK, f"{found}; forward and backward run")


def check_train_extra() -> Iterator[Line]:
    """What `LighthouseWrapper` and `lighthouse pretrain` need, by the package's own list."""
    listed = train_requirements()
    if listed is None:
        found = f"{DISTRIBUTION} is not installed, its sources are on the path: what it needs is not known"
        yield Line("train extra", NOTE, found, INSTALL_EXTRA, needed=False)
        return
    purpose = "LighthouseWrapper and lighthouse pretrain need it; lighthouse.attention does not"
    missing, there = [], []
    for name, oldest in listed:
        version = _version_of(name)
        if version is None:
            missing.append(name)
        elif oldest is not None and _numbers(version) < _numbers(oldest):
            found = f"{version}: {oldest} or later is needed"
            yield Line(name, FAILED, found, f'pip install --upgrade "{name}>={oldest}"', needed=False)
        elif name == "transformers":
            try:
                importlib.import_module(name)
            except Exception as error:
                fix = f"pip install --upgrade --force-reinstall {name}"
                yield Line(name, FAILED, f"{version}, does not import: {_said(error)}", fix, needed=False)
            else:
                yield Line(name, OK, version)
        else:
            there.append(f"{name} {version}")
    if "transformers" in missing:
        missing.remove("transformers")
        yield Line("transformers", NOTE, f"not installed: {purpose}", INSTALL_EXTRA, needed=False)
    if missing:
        found = f"not installed: {', '.join(missing)}" + (f"; installed: {', '.join(there)}" if there else "")
        yield Line("train extra", NOTE, found, INSTALL_EXTRA, needed=False)
    elif there:
        yield Line("train extra", OK, ", ".join(there))


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


class Check(NamedTuple):
    look: Callable[[], Iterator[Line]]
    needs: tuple[str, ...] = ()  # the checks behind whose failure this one cannot say anything
    needed: bool = True  # whether Lighthouse cannot train where the check itself breaks


CHECKS = {
    "python": Check(check_python),
    "torch": Check(check_torch),
    "driver": Check(check_driver, ("torch",)),
    "gpus": Check(check_gpus, ("torch", "driver")),
    "cudnn": Check(check_cudnn, ("torch",), needed=False),
    "library": Check(check_library, ("torch",)),
    "sdpa": Check(check_backends, ("torch",), needed=False),
    "self-test": Check(check_self_test, ("torch", "library")),
    "flash-attn": Check(check_flash_attn, ("torch",), needed=False),
    "train extra": Check(check_train_extra, needed=False),
    "memory": Check(check_memory, needed=False),
    "disk": Check(check_disk, needed=False),
}


# What the checks ask the machine.


def driver_cuda() -> int | None:
    """The latest CUDA that the driver supports, as 12080 for 12.8; None where there is no driver."""
    try:
        library = ctypes.CDLL("libcuda.so.1")
    except OSError:
        return None
    number = ctypes.c_int()
    return number.value if library.cuDriverGetVersion(ctypes.byref(number)) == 0 else None


def nvidia_smi() -> tuple[str | None, list[str]]:
    """The driver's version and the names of the GPUs; None and none where nvidia-smi is not there or fails."""
    command = ["nvidia-smi", "--query-gpu=driver_version,name", "--format=csv,noheader"]
    try:
        said = subprocess.run(command, capture_output=True, text=True, timeout=20, check=True).stdout
    except (OSError, subprocess.SubprocessError):
        return None, []
    rows = [line.split(", ", 1) for line in said.splitlines() if ", " in line]
    return (rows[0][0], [row[1] for row in rows]) if rows else (None, [])


def gpus_on_the_bus(root: Path = Path("/sys/bus/pci/devices")) -> list[str]:
    """NVIDIA's GPUs that the kernel sees, with or without a driver."""
    found = []
    for device in sorted(root.glob("*")):
        with contextlib.suppress(OSError):
            is_display = (device / "class").read_text().startswith("0x03")
            if is_display and (device / "vendor").read_text().strip() == "0x10de":
                found.append(f"NVIDIA GPU at PCI {device.name}")
    return found


def cuda_of_extension(module: str) -> int | None:
    """The CUDA, by its major version, whose runtime an extension module is linked to, read without loading it."""
    spec = importlib.util.find_spec(module)
    if spec is None or spec.origin is None or not Path(spec.origin).is_file() or not Path(spec.origin).stat().st_size:
        return None
    with open(spec.origin, "rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
        named = re.search(rb"libcudart\.so\.(\d+)", content)
        return int(named[1]) if named else None


def train_requirements() -> list[tuple[str, str | None]] | None:
    """The `train` extra as (distribution, oldest version), or None where the package is not installed."""
    try:
        requirements = metadata.requires(DISTRIBUTION) or []
    except metadata.PackageNotFoundError:
        return None
    pattern = re.compile(r"([\w.-]+)\s*(?:>=\s*([\d.]+))?.*extra\s*==\s*['\"]train['\"]")
    return [match.groups() for match in map(pattern.match, requirements) if match]


def free_memory() -> int:
    """Bytes that this process can still take: of the machine, and of its container."""
    fields = dict(line.split(":", 1) for line in Path("/proc/meminfo").read_text().splitlines())
    free = int(fields["MemAvailable"].split()[0]) * 1024
    for folder, limit, used in (
        ("/sys/fs/cgroup", "memory.max", "memory.current"),
        ("/sys/fs/cgroup/memory", "memory.limit_in_bytes", "memory.usage_in_bytes"),
    ):
        with contextlib.suppress(OSError, ValueError):  # not there, or "max"
            limit, used = (int(Path(folder, name).read_text()) for name in (limit, used))
            stat = dict(line.split() for line in Path(folder, "memory.stat").read_text().splitlines())
            free = min(free, limit - used + int(stat["inactive_file"]))  # cached files are given back
    return max(free, 0)


# What the checks compute with. torch is handed on: this file cannot import it at its top.


def _devices(torch) -> list[tuple]:
    """Every device and the dtype that attention's backends are tried in there."""
    cuda = [(torch.device("cuda", index), torch.bfloat16) for index in range(torch.cuda.device_count())]
    return [(torch.device("cpu"), torch.bfloat16), *cuda]


def _inputs(torch, device, dtype, key_heads):
    generator = torch.Generator().manual_seed(0)

    def rand(heads):
        tensor = torch.randn(1, TOKENS, heads, HEAD_DIM, generator=generator).to(device, dtype)
        return tensor.transpose(1, 2)

    inputs = [rand(heads).requires_grad_() for heads in (QUERY_HEADS, key_heads, key_heads)]
    return inputs, rand(QUERY_HEADS)


def _wide(inputs, grad):
    """The same numbers in float64 on the CPU."""
    wide = [tensor.detach().cpu().double().contiguous().requires_grad_() for tensor in inputs]
    return wide, grad.cpu().double().contiguous()


def _attention_of(torch, backend):
    def attention(query, key, value):
        with torch.nn.attention.sdpa_kernel(backend):
            return torch.nn.functional.scaled_dot_product_attention(query, key, value, is_causal=True)

    return attention


def _run(attention, inputs, grad):
    """Output and gradients."""
    import torch

    output = attention(*inputs)
    return output.detach(), *torch.autograd.grad(output, inputs, grad)


def _largest_error(results, exact) -> float:
    """Of output and gradients, relative to the exact ones; NaN where any has one."""
    errors = []
    for mine, true in zip(results, exact, strict=True):
        errors.append(((mine.cpu().double() - true).norm() / true.norm()).item())
    return math.nan if any(map(math.isnan, errors)) else max(errors)


def _no_code(torch, devices, index) -> str | None:
    return devices.missing_for_capability(*torch.cuda.get_device_capability(index))


# Words.


def _said(error: BaseException) -> str:
    words = " ".join(str(error).split())
    if len(words) > 600:
        words = words[:600] + " ..."
    return (
        words
        if type(error).__name__ in ("NativeLibraryError", "ArithmeticError")
        else f"{type(error).__name__}: {words}"
    )


def _numbers(version: str) -> tuple[int, ...]:
    return tuple(int(part) for part in re.match(r"\d+(?:\.\d+)*", version)[0].split("."))


def _version_of(distribution: str) -> str | None:
    try:
        return metadata.version(distribution)
    except metadata.PackageNotFoundError:
        return None


def _built_for(torch) -> str:
    if torch.version.hip is not None:
        return f"built for ROCm {torch.version.hip}"
    return f"built for CUDA {torch.version.cuda}" if torch.version.cuda else "built for the CPU alone"


def _dotted(cuda: int) -> str:
    return f"{cuda // 1000}.{cuda % 1000 // 10}"


def _cuda_number(version: str) -> int:
    major, minor = _numbers(version)[:2]
    return 1000 * major + 10 * minor


def _count(gpus: int) -> str:
    return "one GPU" if gpus == 1 else f"{gpus} GPUs"


# Processes.


def examine(checks: Iterable[str] = tuple(CHECKS), seconds: float = SECONDS_FOR_A_CHECK) -> Iterator[Line]:
    """Runs the checks, names of `CHECKS` in its order, and gives their lines as they come.

    A check that takes longer than `seconds` is ended and has failed. One that cannot say anything because an earlier
    one failed is a note.
    """
    failed: set[str] = set()
    waiting = list(checks)
    while waiting:
        name = waiting[0]
        reason = next((need for need in CHECKS[name].needs if need in failed), None)
        if reason is not None:
            yield Line(name, NOTE, f"not checked, because of {reason}", needed=False)
            waiting.pop(0)
            continue
        for name, line in _in_one_process(_until_blocked(waiting, failed), seconds):
            if line is None:
                waiting.remove(name)
                continue
            if line.stops:
                failed.add(line.check)
            yield line


def _until_blocked(names: list[str], failed: set[str]) -> list[str]:
    for count, name in enumerate(names):
        if failed.intersection(CHECKS[name].needs):
            return names[:count]
    return list(names)


def _in_one_process(names: list[str], seconds: float) -> Iterator[tuple[str, Line | None]]:
    """Lines of the checks as (check, line), and (check, None) at the end of each, up to the first that fails."""
    path = [entry or os.getcwd() for entry in sys.path] + [str(Path(__file__).resolve().parents[1])]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(path), "TOKENIZERS_PARALLELISM": "false"}
    with tempfile.TemporaryFile() as noise:
        process = subprocess.Popen(
            [sys.executable, __file__, "--in-this-process", *names],
            stdout=subprocess.PIPE,
            stderr=noise,
            text=True,
            env=environment,
        )
        late = threading.Event()

        def end():
            late.set()
            process.kill()

        def watched() -> threading.Timer:
            clock = threading.Timer(seconds, end)
            clock.start()
            return clock

        running, clock = names[0], watched()
        try:
            for said in process.stdout:
                report = json.loads(said)
                if report["line"] is not None:
                    yield running, Line(**report["line"])
                    continue
                clock.cancel()
                yield running, None
                running = next(iter(names[names.index(running) + 1 :]), None)
                clock = watched()
            status = process.wait()
        finally:
            clock.cancel()
            process.kill()
            process.wait()
            process.stdout.close()
        if status == 0 or running is None:
            return
        noise.seek(0)
        last = noise.read().decode(errors="replace").strip().splitlines()[-1:]
        why = f"gave no answer within {seconds:g} s" if late.is_set() else f"the process died: {_ending(status)}"
        fix = {"library": REINSTALL, "torch": "pip install --force-reinstall torch"}.get(running)
        yield running, Line(running, FAILED, "; ".join([why, *last]), fix, needed=CHECKS[running].needed)
        yield running, None


def _ending(status: int) -> str:
    if status >= 0:
        return f"exit status {status}"
    number = signal.Signals(-status)
    return f"{number.name} ({signal.strsignal(number)})"


def _answer(names: list[str]) -> NoReturn:
    """The other side of `_in_one_process`. Ends behind the first check that fails."""
    reports = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what libraries print is no report

    def report(name, line):
        reports.write(json.dumps({"check": name, "line": line and asdict(line)}) + "\n")
        reports.flush()

    for name in names:
        failed = False
        try:
            for line in CHECKS[name].look():
                failed |= line.status == FAILED
                report(name, line)
        except Exception as error:
            failed = True
            report(name, Line(name, FAILED, _said(error), needed=CHECKS[name].needed))
        report(name, None)
        if failed:
            break
    reports.flush()
    os._exit(0)  # past what broken libraries do at the end of a process


EXAMPLE = """\
examples:
  lighthouse doctor
  lighthouse doctor --json doctor.json
  lighthouse doctor --json - 2>/dev/null

exit status: 0 Lighthouse can train here (without a GPU: on the CPU, slowly), 1 it cannot, 2 the call was not understood
"""


def main(arguments: Sequence[str]) -> int:
    """Runs `lighthouse doctor` and returns the exit status. Here and not in `cli`, which needs the whole package."""
    parser = argparse.ArgumentParser(
        prog="lighthouse doctor",
        description="Says line by line what of this machine is fine for training with Lighthouse, what is not, and the "
        "command that mends it.",
        epilog=EXAMPLE,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--json", metavar="FILE", help="write the lines there too; - is standard output")
    options = parser.parse_args(list(arguments))
    if options.json not in (None, "-") and not Path(options.json).parent.is_dir():
        parser.error(f"argument --json: {options.json!r}: the folder {str(Path(options.json).parent)!r} does not exist")
    out = sys.stderr if options.json == "-" else sys.stdout
    lines = []
    for line in examine():
        lines.append(line)
        print(line, file=out, flush=True)
    print(f"\n{verdict(lines)}", file=out)
    if options.json is not None:
        text = json.dumps({"can_train": can_train(lines), "lines": [asdict(line) for line in lines]}, indent=2) + "\n"
        try:
            sys.stdout.write(text) if options.json == "-" else Path(options.json).write_text(text, encoding="utf-8")
        except OSError as error:
            print(f"lighthouse doctor: error: --json {options.json!r}: {error.strerror}", file=sys.stderr)
            return 1
    return 0 if can_train(lines) else 1


def verdict(lines: Sequence[Line]) -> str:
    """The last line."""
    stopping = [line for line in lines if line.stops]
    if stopping:
        names = dict.fromkeys(line.check for line in stopping)
        return f"Lighthouse cannot train here: {', '.join(names)} failed."
    places = [line.device for line in lines if line.check == "self-test" and line.status == OK]
    text = f"Lighthouse can train here, on {' and '.join(places)}"
    if places == ["cpu"]:
        text += " alone, slowly"
    others = dict.fromkeys(line.check for line in lines if line.status == FAILED)
    return f"{text}. Failed, but not needed: {', '.join(others)}." if others else f"{text}."


if __name__ == "__main__":
    # Run as a file, this folder is on the path, where `settings` or `inputs` would be taken for other packages' own.
    here = Path(__file__).resolve().parent
    sys.path[:] = [entry for entry in sys.path if entry == "" or Path(entry).resolve() != here]
    if sys.argv[1:2] == ["--in-this-process"]:
        _answer(sys.argv[2:])
    sys.exit(main(sys.argv[1:]))
