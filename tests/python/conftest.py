import logging
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from lighthouse.core import devices


def why_not_on_cuda() -> str | None:
    """What keeps the tests from a GPU, or None."""
    if not torch.cuda.is_available():
        return "no GPU that PyTorch can use"
    if not devices.has_cuda_kernels():
        return "this build of lighthouse has no CUDA kernels"
    return devices.missing_for_capability(*torch.cuda.get_device_capability())


def pytest_collection_modifyitems(items):
    for item in items:
        parameters = getattr(item, "callspec", None)
        if "cuda" in item.fixturenames or (parameters and parameters.params.get("device") == "cuda"):
            item.add_marker("gpu")


@pytest.fixture(autouse=True)
def fresh_compiler():
    """Each test compiles for itself: recompilations counted in one must not come from another."""
    yield
    if "torch._dynamo" in sys.modules:  # or nothing was compiled; importing it takes a second
        torch._dynamo.reset()


@pytest.fixture(scope="module")
def one_thread():
    """On models as small as the tests' a second thread costs more than it brings."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def text(tmp_path_factory) -> Path:
    """A folder of text for a small run."""
    from training_runs import write_text  # needs Transformers

    return write_text(tmp_path_factory.mktemp("text"))


@pytest.fixture
def small_disk(tmp_path):
    """A function that gives a folder whose filesystem has so many MB, from then on."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mounted = []

    def size(megabytes: float) -> Path:
        option = f"size={int(megabytes * 1e6)}"
        remount = ["-o", f"remount,{option}"] if mounted else ["-t", "tmpfs", "-o", option, "none"]
        done = subprocess.run(["mount", *remount, str(folder)], capture_output=True, text=True)
        if done.returncode != 0:
            pytest.skip(f"no filesystem can be mounted here: {done.stderr.strip()}")
        mounted.append(folder)
        return folder

    yield size
    if mounted:
        subprocess.run(["umount", "--lazy", str(folder)], check=True)


@pytest.fixture(scope="session")
def cuda() -> torch.device:
    """The GPU; without one that the library has kernels for, the test is skipped."""
    reason = why_not_on_cuda()
    if reason is not None:
        pytest.skip(reason)
    return torch.device("cuda", torch.cuda.current_device())


@pytest.fixture(scope="session", params=["cpu", "cuda"])
def device(request) -> torch.device:
    """The CPU and, where there is one, the GPU."""
    return torch.device("cpu") if request.param == "cpu" else request.getfixturevalue("cuda")


@pytest.fixture
def said(monkeypatch):
    """What a wrapped model logs, as a list of messages, with nothing said before."""
    from lighthouse.huggingface import state  # needs Transformers

    messages = []
    handler = logging.Handler()
    handler.emit = lambda record: messages.append(record.getMessage())
    monkeypatch.setattr(state, "_said", set())
    logger = logging.getLogger("lighthouse")
    logger.addHandler(handler)
    yield messages
    logger.removeHandler(handler)
