import logging

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


@pytest.fixture(autouse=True)
def fresh_compiler():
    """Each test compiles for itself: recompilations counted in one must not come from another."""
    yield
    torch._dynamo.reset()


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
