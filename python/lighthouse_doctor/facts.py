"""What the checks find on the machine, and how they word it: driver, GPUs on the bus, libraries, versions, memory."""

from __future__ import annotations

import contextlib
import ctypes
import importlib.util
import mmap
import re
import subprocess
from importlib import metadata
from pathlib import Path

DISTRIBUTION = "lighthouse-attn"


def driver_cuda() -> int | None:
    """The latest CUDA that the driver supports, as 12080 for 12.8; None if there is no driver."""
    try:
        library = ctypes.CDLL("libcuda.so.1")
    except OSError:
        return None
    number = ctypes.c_int()
    return number.value if library.cuDriverGetVersion(ctypes.byref(number)) == 0 else None


def nvidia_smi() -> tuple[str | None, list[str]]:
    """The driver's version and the names of the GPUs; None and none if nvidia-smi does not exist or fails."""
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
    return [(match[1], match[2]) for match in map(pattern.match, requirements) if match]


def free_memory() -> int:
    """Bytes that this process can still use, of the machine and of its container."""
    fields = dict(line.split(":", 1) for line in Path("/proc/meminfo").read_text().splitlines())
    free = int(fields["MemAvailable"].split()[0]) * 1024
    for folder, *names in (
        ("/sys/fs/cgroup", "memory.max", "memory.current"),
        ("/sys/fs/cgroup/memory", "memory.limit_in_bytes", "memory.usage_in_bytes"),
    ):
        with contextlib.suppress(OSError, ValueError):  # no such file, or "max"
            limit, used = (int(Path(folder, name).read_text()) for name in names)
            stat = dict(line.split() for line in Path(folder, "memory.stat").read_text().splitlines())
            free = min(free, limit - used + int(stat["inactive_file"]))  # cached files are given back
    return max(free, 0)


# Words and numbers


def said_by(error: BaseException) -> str:
    words = " ".join(str(error).split())
    if len(words) > 600:
        words = words[:600] + " ..."
    return (
        words
        if type(error).__name__ in ("NativeLibraryError", "ArithmeticError")
        else f"{type(error).__name__}: {words}"
    )


def numbers(version: str) -> tuple[int, ...]:
    found = re.match(r"\d+(?:\.\d+)*", version)
    if found is None:
        raise ValueError(f"version={version!r}: it does not begin with a number")
    return tuple(int(part) for part in found[0].split("."))


def version_of(distribution: str) -> str | None:
    try:
        return metadata.version(distribution)
    except metadata.PackageNotFoundError:
        return None


def built_for(torch) -> str:
    if torch.version.hip is not None:
        return f"built for ROCm {torch.version.hip}"
    return f"built for CUDA {torch.version.cuda}" if torch.version.cuda else "built for the CPU only"


def dotted(cuda: int) -> str:
    return f"{cuda // 1000}.{cuda % 1000 // 10}"


def cuda_number(version: str) -> int:
    major, minor = numbers(version)[:2]
    return 1000 * major + 10 * minor


def count_of(gpus: int) -> str:
    return "one GPU" if gpus == 1 else f"{gpus} GPUs"
