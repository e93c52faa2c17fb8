import pytest
import torch


@pytest.fixture(autouse=True)
def fresh_compiler():
    """Each test compiles for itself: recompilations counted in one must not come from another."""
    yield
    torch._dynamo.reset()
