"""The checks of packages: lighthouse with its native library, flash-attn, and what the `train` extra lists.

Each gives lines; what it raises is its failed line.
"""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Iterator

from lighthouse_doctor.computing import QUERY_HEADS, inputs_of, no_code, run
from lighthouse_doctor.facts import (
    DISTRIBUTION,
    built_for,
    cuda_of_extension,
    numbers,
    said_by,
    train_requirements,
    version_of,
)
from lighthouse_doctor.line import FAILED, NO_GPU_WANTED, NOTE, OK, REINSTALL, Line

INSTALL_EXTRA = 'pip install "lighthouse-attn[train]"'


def check_library() -> Iterator[Line]:
    """The package, its native library, and the kernels that this has for the CPU and for each GPU."""
    try:
        import lighthouse
        from lighthouse.core import devices, operators
    except Exception as error:
        yield Line("library", FAILED, said_by(error), REINSTALL)
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
    reasons = [of_build if missing["CUDA"] else no_code(torch, devices, index) for index in range(count)]
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
        usable = None in reasons  # then GPUs without kernels are unused, not an obstacle
        fix += f"; {NO_GPU_WANTED}" if not usable else f"; CUDA_VISIBLE_DEVICES={reasons.index(None)} trains on another"
        yield Line("kernels", FAILED, reason, fix, needed=not usable, device=f"cuda:{index}")


def check_flash_attn() -> Iterator[Line]:
    """Whether an installed flash-attn works: wheels are for one CUDA and one torch, and often not for those here."""
    version = version_of("flash-attn")
    if version is None and importlib.util.find_spec("flash_attn") is None:
        yield Line("flash-attn", OK, "not installed, and not needed: PyTorch has its own FlashAttention")
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
        why = said_by(error)
        if built is not None and built != ours:
            why += f" (it is for CUDA {built}, torch {built_for(torch)})"
        elif "undefined symbol" in why:
            why += f" (it was built for a torch other than {torch.__version__})"
        yield Line("flash-attn", FAILED, f"{found}, does not import: {why}", fix, needed=False)
        return
    if built is not None and built != ours:
        yield Line("flash-attn", FAILED, f"{found}, but torch is {built_for(torch)}", fix, needed=False)
        return
    if not torch.cuda.is_available():
        yield Line("flash-attn", NOTE, f"{found}; it imports, but cannot run without a GPU", needed=False)
        return
    device, dtype = torch.device("cuda:0"), torch.bfloat16
    inputs, grad = inputs_of(torch, device, dtype, QUERY_HEADS)
    try:  # a wheel without code for this GPU is noticed here only: "no kernel image is available"
        run(lambda *qkv: function(*(t.transpose(1, 2) for t in qkv), causal=True).transpose(1, 2), inputs, grad)
        torch.cuda.synchronize()
    except Exception as error:
        yield Line("flash-attn", FAILED, f"{found}, does not run: {said_by(error)}", fix, needed=False)
        return
    yield Line("flash-attn", OK, f"{found}; forward and backward run")


def check_train_extra() -> Iterator[Line]:
    """What `LighthouseWrapper` and `lighthouse pretrain` need, by the package's own list."""
    listed = train_requirements()
    if listed is None:
        found = f"{DISTRIBUTION} is not installed, only its sources are on the path: its requirements are not known"
        yield Line("train extra", NOTE, found, INSTALL_EXTRA, needed=False)
        return
    purpose = "LighthouseWrapper and lighthouse pretrain need it; lighthouse.attention does not"
    missing, there = [], []
    for name, oldest in listed:
        version = version_of(name)
        if version is None:
            missing.append(name)
        elif oldest is not None and numbers(version) < numbers(oldest):
            found = f"{version}: {oldest} or later is needed"
            yield Line(name, FAILED, found, f'pip install --upgrade "{name}>={oldest}"', needed=False)
        elif name == "transformers":
            try:
                importlib.import_module(name)
            except Exception as error:
                fix = f"pip install --upgrade --force-reinstall {name}"
                yield Line(name, FAILED, f"{version}, does not import: {said_by(error)}", fix, needed=False)
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
