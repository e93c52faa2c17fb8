"""`lighthouse doctor`: each failure is made to happen, and the line says what it is and how to fix it.

Broken packages and libraries are really broken, in copies and in processes of their own; only GPUs that are not here
are pretended, by what torch says of them.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch.nn.attention import SDPBackend

import lighthouse
import lighthouse_doctor
from lighthouse.cli import main
from lighthouse.core import devices, operators
from lighthouse_doctor import can_train, computing, facts, machine, packages

pytestmark = pytest.mark.usefixtures("one_thread")

PACKAGES = [Path(module.__file__).parent for module in (lighthouse, lighthouse_doctor)]
INSTALLED = Path(torch.__file__).parents[1]
LIST = """
import json, sys
from lighthouse_doctor import examine
for line in examine(sys.argv[1:]):
    print(json.dumps([line.check, line.status, line.found, line.fix, line.stops]))
"""
COMMAND = "import sys; from lighthouse_doctor.command import lighthouse; sys.exit(lighthouse())"


def python(*arguments, path=()):
    """Runs Python where `path` comes before all else. The environment's own links to this checkout do not count."""
    return subprocess.run(
        [sys._base_executable, *map(str, arguments)],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(map(str, [*path, INSTALLED]))},
        capture_output=True,
        text=True,
    )


def examine(*checks, path=()):
    """The lines of some checks, each as (check, status, found, fix, stops), in a process of its own."""
    done = python("-c", LIST, *checks, path=(*path, PACKAGES[0].parent))
    assert done.returncode == 0, done.stderr
    return [json.loads(line) for line in done.stdout.splitlines()]


def one(lines):
    (line,) = lines
    return line


def copy_of_the_packages(folder: Path) -> Path:
    """Gives the path of the library in it."""
    for package in PACKAGES:
        shutil.copytree(package, folder / package.name, ignore=shutil.ignore_patterns("__pycache__", "*.so"))
    return Path(shutil.copy(operators.LIBRARY_PATH, folder / "lighthouse"))


def package_of(folder: Path, name: str, version: str, code: str, distribution: str | None = None) -> Path:
    """A package with its metadata, to stand before the real one."""
    (folder / name).mkdir(parents=True)
    (folder / name / "__init__.py").write_text(code)
    info = folder / f"{distribution or name}-{version}.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {distribution or name}\nVersion: {version}\n")
    return folder


# The whole command.


def test_a_machine_that_can_train(tmp_path, capfd):
    file = tmp_path / "doctor.json"
    status = main(["doctor", "--json", str(file)])
    said = capfd.readouterr().out
    found = json.loads(file.read_text())
    assert status == 0 and found["can_train"] and "Lighthouse can train here, on cpu" in said
    lines = {(line["check"], line["device"]): line for line in found["lines"]}
    for check in (("torch", None), ("library", None), ("sdpa flash", "cpu"), ("self-test", "cpu"), ("memory", None)):
        assert lines[check]["status"] == "ok", lines[check]
    assert torch.__version__ in lines["torch", None]["found"]
    assert str(operators.LIBRARY_PATH) in lines["library", None]["found"]
    assert "flash_attention" in lines["self-test", "cpu"]["found"]
    if not torch.cuda.is_available():
        assert "training is on the CPU, slowly" in lines["driver", None]["found"] and "only, slowly" in said


def test_a_library_that_kills_the_process_that_loads_it(tmp_path):
    """A copy cut short: the loader maps it and dies of SIGBUS."""
    library = copy_of_the_packages(tmp_path)
    os.truncate(library, library.stat().st_size // 4)
    done = python("-c", COMMAND, "doctor", "--json", "-", path=[tmp_path])
    assert done.returncode == 1
    lines = {line["check"]: line for line in json.loads(done.stdout)["lines"]}
    assert lines["library"]["status"] == "failed" and "the process died: SIG" in lines["library"]["found"]
    assert lines["library"]["fix"].startswith("pip install --force-reinstall --no-deps")
    assert lines["torch"]["status"] == lines["sdpa math"]["status"] == "ok"
    assert lines["self-test"]["found"] == "not checked, because of library"
    assert "Lighthouse cannot train here: library failed." in done.stderr


WRONG = [
    ("an_option", ["--nonsense"], "--nonsense"),
    ("a_folder_that_is_not_there", ["--json", "no/such/doctor.json"], "the folder 'no/such' does not exist"),
]


@pytest.mark.parametrize("arguments, message", [w[1:] for w in WRONG], ids=[w[0] for w in WRONG])
def test_a_wrong_option(arguments, message, capsys):
    with pytest.raises(SystemExit) as stop:
        main(["doctor", *arguments])
    assert stop.value.code == 2 and message in capsys.readouterr().err


def test_help_ends_with_examples(capsys):
    with pytest.raises(SystemExit) as stop:
        main(["doctor", "--help"])
    said = capsys.readouterr().out
    assert stop.value.code == 0 and "lighthouse doctor --json doctor.json" in said and "exit status" in said


# Processes.


def test_a_check_that_hangs():
    line = one(lighthouse_doctor.examine(["torch"], seconds=0.05))
    assert line.stops and "gave no answer within 0.05 s" in line.found


# The library.

BROKEN_LIBRARIES = [
    ("missing", lambda library: library.unlink(), "liblighthouse.so does not exist; looked for"),
    ("not_a_library", lambda library: library.write_bytes(b"not a library" * 99), "does not load"),
]


@pytest.mark.parametrize("harm, message", [b[1:] for b in BROKEN_LIBRARIES], ids=[b[0] for b in BROKEN_LIBRARIES])
def test_a_broken_library(tmp_path, harm, message):
    library = copy_of_the_packages(tmp_path)
    harm(library)
    check, status, found, fix, stops = one(examine("library", path=[tmp_path]))
    assert (check, status, stops) == ("library", "failed", True)
    assert message in found and fix.startswith("pip install --force-reinstall")


# Python and torch.


def test_an_old_python(monkeypatch):
    monkeypatch.setattr(sys, "version_info", (3, 9, 1))
    assert "3.10 or later is needed" in one(machine.check_python()).found


TORCHES = [
    ("too_old", "__version__ = '2.9.1+cu128'", "2.9.1+cu128: 2.10 or later is needed"),
    (
        "a_library_of_cuda_missing",
        "raise ImportError('libcudart.so.12: cannot open shared object file')",
        "installed, but does not import: ImportError: libcudart.so.12",
    ),
    ("the_process_dies", "import os; os.kill(os.getpid(), 11)", "the process died: SIGSEGV"),
]


@pytest.mark.parametrize("code, message", [t[1:] for t in TORCHES], ids=[t[0] for t in TORCHES])
def test_a_torch_that_does_not_do(tmp_path, code, message):
    path = [package_of(tmp_path, "torch", "2.9.1", code)]
    torchs, library, memory = examine("torch", "library", "memory", path=path)
    assert torchs[1] == "failed" and torchs[4] and message in torchs[2] and "pip install" in torchs[3]
    assert library[1:3] == ["note", "not checked, because of torch"]
    assert memory[1] == "ok"


def test_no_torch(monkeypatch):
    monkeypatch.setattr(machine.importlib.util, "find_spec", lambda name: None)
    line = one(machine.check_torch())
    assert line.stops and line.found == "not installed" and line.fix == 'pip install --upgrade "torch>=2.10"'


# The driver and GPUs. `cuda` is what the driver supports.


@pytest.fixture
def pretended(monkeypatch, tmp_path):
    """Pretends a GPU, a driver and a torch that cannot use them."""

    def pretend(*, cuda=None, smi=(), bus=(), torch_cuda="12.8", hip=None, error="", hidden=None, available=False):
        def init():
            if error:
                raise RuntimeError(error)

        if hidden is None:
            monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
        else:
            monkeypatch.setenv("CUDA_VISIBLE_DEVICES", hidden)
        commands = tmp_path / "commands"
        commands.mkdir()
        if smi:
            (commands / "nvidia-smi").write_text("#!/bin/sh\n" + "".join(f"echo '{line}'\n" for line in smi))
            (commands / "nvidia-smi").chmod(0o755)
        for name, kind, vendor in bus:
            device = tmp_path / "bus" / name
            device.mkdir(parents=True)
            (device / "class").write_text(kind + "\n")
            (device / "vendor").write_text(vendor + "\n")
        on_the_bus = facts.gpus_on_the_bus(tmp_path / "bus")
        monkeypatch.setenv("PATH", str(commands))
        monkeypatch.setattr(machine, "gpus_on_the_bus", lambda: on_the_bus)
        monkeypatch.setattr(machine, "driver_cuda", lambda: cuda)
        monkeypatch.setattr(torch.version, "cuda", torch_cuda)
        monkeypatch.setattr(torch.version, "hip", hip)
        monkeypatch.setattr(torch.cuda, "is_available", lambda: available)
        monkeypatch.setattr(torch.cuda, "device_count", lambda: int(available))
        monkeypatch.setattr(torch.cuda, "init", init)

    return pretend


H100 = "570.86.10, NVIDIA H100 80GB HBM3"
ON_THE_BUS = ("0000:01:00.0", "0x030200", "0x10de")
OTHERS_ON_THE_BUS = [("0000:02:00.0", "0x020000", "0x10de"), ("0000:03:00.0", "0x030000", "0x1002")]
DRIVERS = [
    ("fine", {"cuda": 12080, "smi": [H100], "available": True}, "ok", "570.86.10, for CUDA up to 12.8", None),
    ("none_and_no_gpu", {"bus": OTHERS_ON_THE_BUS}, "note", "no NVIDIA GPU and no driver", None),
    ("hidden", {"cuda": 12080, "smi": [H100], "hidden": ""}, "note", "CUDA_VISIBLE_DEVICES='' hides every GPU", None),
    ("no_driver", {"bus": [ON_THE_BUS]}, "failed", "GPU at PCI 0000:01:00.0; driver: none", "install NVIDIA's driver"),
    (
        "too_old",
        {"cuda": 12040, "smi": [H100], "error": "The NVIDIA driver on your system is too old (found version 12040)."},
        "failed",
        "is too old (found version 12040). (NVIDIA H100",
        "a driver for CUDA 12.8 or later, or a torch built for 12.4 or earlier",
    ),
    (
        "torch_for_the_cpu",
        {"cuda": 12080, "smi": [H100], "torch_cuda": None},
        "failed",
        "torch is built for the CPU only and cannot use the GPU (NVIDIA H100",
        "pip install --upgrade --force-reinstall torch",
    ),
    (
        "gpu_lost",
        {"cuda": 13000, "smi": [H100], "error": "No CUDA GPUs are available"},
        "failed",
        "No CUDA GPUs are available",
        "reboot",
    ),
    ("rocm", {"torch_cuda": None, "hip": "6.4", "available": True}, "failed", "ROCm 6.4", "HIP_VISIBLE_DEVICES="),
]


@pytest.mark.parametrize("what, status, found, fix", [d[1:] for d in DRIVERS], ids=[d[0] for d in DRIVERS])
def test_drivers(pretended, what, status, found, fix):
    pretended(**what)
    line = one(machine.check_driver())
    assert line.status == status and found in line.found and line.stops == (status == "failed")
    assert (line.fix is None) if fix is None else (fix in line.fix and "VISIBLE_DEVICES=" in line.fix)


@pytest.fixture
def gpus(monkeypatch):
    """Pretends GPUs: (compute capability, GiB free)."""

    def pretend(*which):
        monkeypatch.setattr(torch.cuda, "device_count", lambda: len(which))
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index: which[index][0])
        monkeypatch.setattr(torch.cuda, "mem_get_info", lambda index: (which[index][1] * 2**30, 80 * 2**30))
        monkeypatch.setattr(
            torch.cuda,
            "get_device_properties",
            lambda index: SimpleNamespace(name="A GPU", major=which[index][0][0], minor=which[index][0][1]),
        )

    return pretend


def test_a_gpu_that_others_use(gpus):
    gpus(((9, 0), 79), ((9, 0), 3))
    free, taken = machine.check_gpus()
    assert (free.status, free.found) == ("ok", "A GPU, compute capability 9.0, 79.0 of 80.0 GiB free")
    assert taken.status == "note" and taken.device == "cuda:1" and "3.0 of 80.0 GiB free" in taken.found


KERNELS = [  # capabilities, architectures built for, (status, stops) of each GPU
    ("code_for_it", [(9, 0)], ("90a-real",), [("ok", False)]),
    ("no_code_for_it", [(12, 0)], ("90a-real",), [("failed", True)]),
    ("too_old_for_any", [(7, 5)], ("80-real", "90a-real"), [("failed", True)]),
    ("one_of_two", [(7, 5), (9, 0)], ("90a-real",), [("failed", False), ("ok", False)]),
    ("library_without_cuda", [(9, 0)], (), [("failed", True)]),
]


@pytest.mark.parametrize("capabilities, built, expected", [k[1:] for k in KERNELS], ids=[k[0] for k in KERNELS])
def test_code_for_gpus(gpus, monkeypatch, capabilities, built, expected):
    gpus(*((capability, 79) for capability in capabilities))
    monkeypatch.setattr(devices, "architectures", lambda: built)
    has = operators._OPERATORS.score.default.has_kernel_for_dispatch_key(torch._C.DispatchKey.CUDA)
    if built and not has:
        pytest.skip("this build of lighthouse has no CUDA kernels")
    lines = [line for line in packages.check_library() if (line.device or "").startswith("cuda:")]
    assert [(line.status, line.stops) for line in lines] == expected
    assert can_train(lines) == (not any(stops for _, stops in expected))
    for capability, line in zip(capabilities, lines, strict=True):
        if line.status == "failed":
            assert (("8.0 or later is needed" if capability < (8, 0) else "nvcc") in line.fix) and "VISIBLE" in line.fix


CUDNNS = [
    ("before_the_fix", 91500, "note", "9.15.0: before 9.15.1 cuDNN's attention gives wrong gradients at odd lengths"),
    ("the_fix", 91501, "ok", "9.15.1"),
    ("none", None, "failed", "torch finds none"),
]


@pytest.mark.parametrize("number, status, found", [c[1:] for c in CUDNNS], ids=[c[0] for c in CUDNNS])
def test_cudnn(monkeypatch, number, status, found):
    monkeypatch.setattr(torch.version, "cuda", "12.8")
    monkeypatch.setattr(torch.backends.cudnn, "version", lambda: number)
    line = one(machine.check_cudnn())
    assert line.status == status and found in line.found and not line.stops
    assert status == "ok" or line.fix == "pip install --upgrade nvidia-cudnn-cu12"


# Attention.


def test_an_attention_that_does_not_run_says_why():
    inputs, grad = computing.inputs_of(torch, torch.device("cpu"), torch.bfloat16, 4)
    line = computing._backend_line(torch, SDPBackend.EFFICIENT_ATTENTION, inputs, grad, inputs, "cpu")
    assert line.status == "note" and "does not run in bfloat16: RuntimeError: No " in line.found


def test_an_attention_with_wrong_gradients(monkeypatch):
    right = torch.nn.functional.scaled_dot_product_attention

    def wrong(query, key, value, **options):
        if value.dtype == torch.bfloat16:
            value = value.clone()
            value.register_hook(lambda grad: grad.index_fill(2, torch.tensor([700]), 1.0))  # the last of an odd length
        return right(query, key, value, **options)

    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", wrong)
    for line in computing.check_backends():
        if line.device == "cpu":
            assert line.status == "failed" and "wrong in bfloat16" in line.found and not line.stops


WRONGS = [
    ("output", "attention", lambda right: lambda *qkv, **o: 1.05 * right(*qkv, **o), "float32: error"),
    ("not_a_number", "attention", lambda right: lambda *qkv, **o: right(*qkv, **o) * torch.nan, "error nan"),
    ("choice", "select", lambda right: lambda *qk, **o: right(*(t.flip(2) for t in qk), **o), "different entries"),
]


@pytest.mark.parametrize("name, change, message", [w[1:] for w in WRONGS], ids=[w[0] for w in WRONGS])
def test_operators_that_are_wrong(monkeypatch, name, change, message):
    monkeypatch.setattr(lighthouse, name, change(getattr(lighthouse, name)))
    lines = [line for line in computing.check_self_test() if line.device == "cpu"]
    assert one(lines).stops and message in lines[0].found and "pip install --force-reinstall" in lines[0].fix


# Packages.

FLASH_ATTN = [  # the package's code, CUDA it is linked to, status, what is said
    (
        "undefined_symbol",
        "raise ImportError('flash_attn_2_cuda.so: undefined symbol: _ZN3c105ErrorC2E')",
        None,
        "undefined symbol: _ZN3c105ErrorC2E (it was built for a torch other than",
    ),
    (
        "its_cuda_is_missing",
        "raise ImportError('libcudart.so.9: cannot open shared object file')",
        9,
        "built for CUDA 9, does not import: ImportError: libcudart.so.9: cannot open shared object file (it is for",
    ),
    ("another_cuda_that_imports", "def flash_attn_func(*_, **__): ...", 9, "built for CUDA 9, but torch is built for"),
    ("the_process_dies", "import os; os.abort()", None, "the process died: SIGABRT"),
]
TORCH = "__version__ = '2.12.0'\nclass version: cuda, hip = '12.8', None\n"  # importing the real one takes a second


@pytest.mark.parametrize("code, cuda, message", [f[1:] for f in FLASH_ATTN], ids=[f[0] for f in FLASH_ATTN])
def test_a_flash_attn_that_does_not_fit(tmp_path, code, cuda, message):
    folder = package_of(package_of(tmp_path, "torch", "2.12.0", TORCH), "flash_attn", "2.8.3", code)
    if cuda is not None:
        (folder / "flash_attn_2_cuda.abi3.so").write_bytes(b"\x7fELF...\0libcudart.so.%d\0libc.so.6\0" % cuda)
    check, status, found, _, stops = one(examine("flash-attn", path=[folder]))
    assert (check, status, stops) == ("flash-attn", "failed", False) and message in found


def test_an_old_transformers(tmp_path):
    path = [package_of(tmp_path, "transformers", "4.40.1", "")]
    line = next(line for line in examine("train extra", path=path) if line[0] == "transformers")
    assert line[1:] == ["failed", "4.40.1: 5.2 or later is needed", 'pip install --upgrade "transformers>=5.2"', False]


def test_a_transformers_that_does_not_import(tmp_path):
    path = [package_of(tmp_path, "transformers", "5.9.0", "import no_such_module")]
    line = next(line for line in examine("train extra", path=path) if line[0] == "transformers")
    assert line[1] == "failed" and "does not import: ModuleNotFoundError: No module named 'no_such_module'" in line[2]


def test_extras_that_are_missing(monkeypatch):
    there = packages.version_of
    monkeypatch.setattr(packages, "version_of", lambda n: None if n in ("transformers", "datasets") else there(n))
    lines = {line.check: line for line in packages.check_train_extra()}
    for name, found in (("transformers", "not installed: Lighthouse"), ("train extra", "not installed: datasets;")):
        assert lines[name].status == "note" and lines[name].found.startswith(found)
        assert lines[name].fix == 'pip install "lighthouse-attn[train]"'


# Memory and disk.


def test_little_memory(monkeypatch):
    monkeypatch.setattr(machine, "free_memory", lambda: 2**29)
    line = one(machine.check_memory())
    assert line.status == "note" and line.found == "0.5 GiB free"


def test_a_full_disk(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(machine.shutil, "disk_usage", lambda folder: SimpleNamespace(free=2**20))
    assert one(machine.check_disk()).status == "note"


def test_a_folder_that_cannot_be_written(monkeypatch):
    monkeypatch.chdir("/proc")  # not even by root
    line = one(machine.check_disk())
    assert line.status == "note" and "but nothing can be written" in line.found and "--output_dir" in line.fix
