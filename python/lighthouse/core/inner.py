"""The attention of the sub-sequence: PyTorch's own by default, and which of its backends runs (METHOD 5).

On CUDA PyTorch chooses among cuDNN, FlashAttention and the memory-efficient kernel by itself, from 2.10 on in the order
that is fastest on the device and, for cuDNN, from the first version on whose gradients are right for any length. A
user's `torch.nn.attention.sdpa_kernel` is obeyed too. If none of these supports the input, PyTorch falls back to the
math backend, which makes S x S logits. It is avoided if repeating the key heads is enough; else a warning is logged.
"""

from __future__ import annotations

import functools
import logging
import warnings
from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.backends import cuda as backends
from torch.nn.attention import SDPBackend
from torch.utils._python_dispatch import _disable_current_modes

from lighthouse.core.inputs import autocast_dtype
from lighthouse.core.kernels import CPU, KERNELS, head_dim_limit
from lighthouse.core.local import Local
from lighthouse.core.operators import local_attention
from lighthouse.core.sequences import SubSequences

logger = logging.getLogger("lighthouse")


InnerAttention = Callable[..., Tensor]
"""`inner(query, key, value, *, scale, dropout_p, layout) -> output`: plain causal attention on query `[B, Hq, S, D]`,
key and value `[B, Hkv, S, D]`; output like query; `layout` is a `SubSequences`. For a local window it is called on the
whole sequences with the keyword `window`: each row sees so many, itself among them."""


def causal_sdpa(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    scale: float | None,
    dropout_p: float,
    layout: SubSequences,
    window: int | None = None,
) -> Tensor:
    """The default inner attention: PyTorch's own, causal, with grouped heads."""
    if window:
        return local_attention(query, key, value, Local.of(query, window, scale, dropout_p))
    grouped = True if query.shape[1] != key.shape[1] else False  # noqa: SIM210 - a plain bool also while tracing
    if _is_math(*_case(query, grouped, dropout_p)) and grouped:
        key, value = (tensor.repeat_interleave(query.shape[1] // key.shape[1], dim=1) for tensor in (key, value))
        grouped = False
    return F.scaled_dot_product_attention(
        query, key, value, dropout_p=dropout_p, is_causal=True, scale=scale, enable_gqa=grouped
    )


class _Case(NamedTuple):
    """All that PyTorch's choice of a backend depends on, except lengths; `head_dim` is its limit."""

    device: torch.device
    dtype: torch.dtype
    head_dim: int
    grouped: bool
    dropout: bool
    gradient: bool

    def __str__(self) -> str:
        words = [str(self.dtype).removeprefix("torch."), f"head_dim to {self.head_dim}"]
        words += [name for name in ("grouped", "dropout", "gradient") if getattr(self, name)]
        return f"{', '.join(words)} on {self.device}"

    def tensors(self) -> tuple[Tensor, Tensor, Tensor]:
        """Small inputs of this case, with which to ask PyTorch instead of the real ones."""

        def tensor(heads: int) -> Tensor:
            shape = (1, heads, 128, self.head_dim)
            return torch.empty(shape, dtype=self.dtype, device=self.device, requires_grad=self.gradient)

        kv_heads = 1 if self.grouped else 2
        return tensor(2), tensor(kv_heads), tensor(kv_heads)


def _case(query: Tensor, grouped: bool, dropout_p: float) -> tuple:
    return (
        query.device,
        query.dtype,
        head_dim_limit(query),
        grouped,
        True if dropout_p > 0 else False,  # noqa: SIM210 - a plain bool also while tracing
        query.requires_grad and torch.is_grad_enabled(),
    )


def inner_backend(query: Tensor, key: Tensor, *, dropout_p: float = 0.0) -> SDPBackend:
    """The backend of PyTorch's attention that the sub-sequence of these inputs runs on, when `inner` is None.

    Args:
        query: `[B, Hq, N, D]` as `lighthouse.attention` takes it; its values are not read.
        key: `[B, Hkv, N, D]`.
        dropout_p: as in `lighthouse.attention`.

    Raises:
        ValueError: PyTorch cannot be asked: the device does not exist (meta tensors, fake CUDA tensors without a GPU).

    The same is logged at level DEBUG, once for each kind of input, with the reasons against the faster ones.
    """
    case = _Case(*_case(query, query.shape[1] != key.shape[1], dropout_p))
    case = case._replace(
        dtype=autocast_dtype(query), gradient=case.gradient or (key.requires_grad and torch.is_grad_enabled())
    )
    backend = _backend(case, _allowed())
    if backend == SDPBackend.MATH and case.grouped:
        backend = _backend(case._replace(grouped=False), _allowed())
    if backend is None:
        raise ValueError(f"query is on {case.device}: PyTorch can be asked only about a CPU or GPU that exists")
    return backend


def stock_kernel(query: Tensor, key: Tensor, dropout_p: float) -> str | None:
    """The kernel of `KERNELS` that runs for these inputs by PyTorch's choice; None if it has to be called otherwise."""
    return _kernel(*_case(query, True if query.shape[1] != key.shape[1] else False, dropout_p))  # noqa: SIM210


@torch.compiler.assume_constant_result
def _kernel(*case) -> str | None:
    """Takes constants and gives one, so that it can be traced."""
    case = _Case(*case)
    backend = _backend(case._replace(gradient=True), _allowed())
    name = (
        CPU if backend == SDPBackend.FLASH_ATTENTION and case.device.type == "cpu" else getattr(backend, "name", None)
    )
    return name if name in KERNELS else None


@torch.compiler.assume_constant_result
def _is_math(*case) -> bool:
    """Whether PyTorch has only the math backend for a case. Takes constants and gives one, so that it can be traced."""
    case, allowed = _Case(*case), _allowed()
    if _backend(case, allowed) != SDPBackend.MATH:
        return False
    _say_if_math(case._replace(grouped=False), allowed)
    return True


def _allowed() -> tuple:
    """The backends that the user allows PyTorch to choose from."""
    return (
        tuple(torch._C._get_sdp_priority_order()),
        backends.cudnn_sdp_enabled(),
        backends.flash_sdp_enabled(),
        backends.mem_efficient_sdp_enabled(),
        backends.math_sdp_enabled(),
        torch.are_deterministic_algorithms_enabled(),
    )


@functools.cache
def _backend(case: _Case, allowed: tuple) -> SDPBackend | None:
    """What PyTorch chooses for a case, under what is allowed now; None if the device does not exist: nothing is
    calculated then, and the shapes are those of any backend.

    The answer is kept for all later calls, so it is asked of real tensors, outside of whatever traces or fakes this
    call (`torch.export`, `make_fx`, `FakeTensorMode`, a mode of the user's), which does not see the question either.
    """
    there = case.device.type == "cpu" or (case.device.type == "cuda" and torch.cuda.is_available())
    if not there:
        return None
    dropout_p = 0.5 if case.dropout else 0.0
    with torch._C.DisableTorchFunction(), _disable_current_modes(), torch.set_grad_enabled(case.gradient):
        query, key, value = case.tensors()
        chosen = SDPBackend(
            torch._fused_sdp_choice(query, key, value, None, dropout_p, True, scale=None, enable_gqa=case.grouped)
        )
        if query.is_cuda and logger.isEnabledFor(logging.DEBUG):
            parameters = backends.SDPAParams(query, key, value, None, dropout_p, True, case.grouped)
            reasons = [f"; {name}: {_reason(can, parameters)}" for name, can in _faster_than(chosen)]
            logger.debug("inner attention of %s: %s%s", case, chosen.name, "".join(reasons))
    return chosen


_BACKENDS = {
    SDPBackend.CUDNN_ATTENTION: backends.can_use_cudnn_attention,
    SDPBackend.FLASH_ATTENTION: backends.can_use_flash_attention,
    SDPBackend.EFFICIENT_ATTENTION: backends.can_use_efficient_attention,
}


def _faster_than(chosen: SDPBackend) -> list[tuple[str, Callable]]:
    order = list(_BACKENDS)
    before = order[: order.index(chosen)] if chosen in _BACKENDS else order
    return [(backend.name, _BACKENDS[backend]) for backend in before]


def _reason(can_use: Callable, parameters) -> str:
    """Why PyTorch rejects a backend; it gives its reasons as warnings."""
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        if can_use(parameters, True):
            return "available, but PyTorch prefers the other on this device"
    return " ".join(str(warning.message).split(" (Triggered internally")[0] for warning in said) or "cannot"


@functools.cache
def _say_if_math(case: _Case, allowed: tuple) -> None:
    if _backend(case, allowed) == SDPBackend.MATH:
        logger.warning(
            "Lighthouse: only PyTorch's math backend supports %s; its memory grows with the square of the "
            "sub-sequence's length. The other backends support bfloat16 or float16 with a head_dim up to 128, or pass "
            "your own attention as `inner=`",
            case,
        )
