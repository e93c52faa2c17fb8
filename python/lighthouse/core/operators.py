"""The operators torch.ops.lighthouse.* as PyTorch sees them: sizes for tracing, and the gradient of each.

The numbers are made in C++ (src/torch/operators.cpp has the schemas). Shapes: query side `[B, Hq, N, D]`, key side
`[B, Hkv, N, D]`, scores, mask and prefix `[B, Hkv, N]`; `_sub` is S long instead of N.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.utils.checkpoint import checkpoint

from lighthouse.core import library as _library
from lighthouse.core.local import Local, define
from lighthouse.core.sequences import Sequences

LIBRARY_PATH = _library.load(sys.modules["lighthouse"].__path__)
_OPERATORS = torch.ops.lighthouse
CHOICE = (_OPERATORS.score.default, _OPERATORS.select.default)  # which checkpointing never recomputes

HEADS_FIRST = (0, 1, 2, 3)
TOKENS_FIRST = (0, 2, 1, 3)


def memory_order(tensor: Tensor) -> list[int]:
    """The tensor's dimensions from the slowest in memory to the fastest, the head dimension last."""
    return order_of(tensor.stride())


def order_of(strides: tuple[int, ...]) -> list[int]:
    return [*sorted(range(3), key=lambda i: -strides[i]), 3]


def with_unit_stride(tensor: Tensor) -> Tensor:
    """The tensor itself if its head dimension is contiguous, else a copy with a contiguous one."""
    return tensor if tensor.stride(-1) == 1 else tensor.contiguous()


def empty(like: Tensor, length, order) -> Tensor:
    batch, heads, _, head_dim = like.shape
    return torch.empty_permuted((batch, heads, length, head_dim), order, dtype=like.dtype, device=like.device)


@torch.library.register_fake("lighthouse::score")
def _(query, key):
    scores = key.new_empty(key.shape[:3], dtype=torch.float32)
    return scores, torch.empty_like(scores)


@torch.library.register_fake("lighthouse::select")
def _(query_score, key_score, windows, topk_numerator, topk_denominator, cover_start, documents=None):
    return query_score.new_empty(query_score.shape, dtype=torch.uint8), query_score.new_empty(
        query_score.shape, dtype=torch.int32
    )


@torch.library.register_fake("lighthouse::choose_and_gather")
def _(query, key, value, windows, topk_numerator, topk_denominator, cover_start, length):
    subs = (empty(tensor, length, HEADS_FIRST) for tensor in (query, key, value))
    return *subs, key.new_empty(key.shape[:3], dtype=torch.uint8), key.new_empty(key.shape[:3], dtype=torch.int32)


@torch.library.register_fake("lighthouse::gather")
def _(query, key, value, mask, prefix, windows, length, documents=None):
    return tuple(empty(tensor, length, HEADS_FIRST) for tensor in (query, key, value))


@torch.library.register_fake("lighthouse::gather_backward")
def _(
    grad_query_sub,
    grad_key_sub,
    grad_value_sub,
    mask,
    prefix,
    windows,
    query_order,
    key_order,
    value_order,
    added_query=None,
    added_key=None,
    added_value=None,
    documents=None,
):
    tokens = mask.shape[2]
    return (
        empty(grad_query_sub, tokens, query_order),
        empty(grad_key_sub, tokens, key_order),
        empty(grad_value_sub, tokens, value_order),
    )


@torch.library.register_fake("lighthouse::scatter")
def _(output_sub, mask, prefix, windows, added=None, documents=None):
    return empty(output_sub, mask.shape[2], TOKENS_FIRST)


@torch.library.register_fake("lighthouse::scatter_backward")
def _(grad_output, mask, prefix, windows, length, order, documents=None):
    return empty(grad_output, length, order)


LIBRARY = torch.library.Library("lighthouse", "FRAGMENT")
define(LIBRARY)


# Gradients. Every verb is linear, so each one's gradient is the other of its pair, to any order; scores and the choice
# have none. Only mask and prefix are kept. Each formula is used twice: registered, for torch.compile, and by the
# functions below for eager mode, where what `register_autograd` generates costs 5 to 20 microseconds a call.


def _no_gradient(ctx, inputs, output):
    ctx.mark_non_differentiable(*output)


def _gather_setup(ctx, inputs, output):
    query, key, value, mask, prefix, ctx.windows, _, ctx.documents = inputs
    ctx.save_for_backward(mask, prefix)
    ctx.orders = [memory_order(tensor) for tensor in (query, key, value)]


def _choose_setup(ctx, inputs, output):
    ctx.documents = None
    ctx.windows, ctx.orders = inputs[3], [memory_order(tensor) for tensor in inputs[:3]]
    ctx.save_for_backward(*output[3:])
    ctx.mark_non_differentiable(*output[3:])


def _choose_backward(ctx, *grads):
    return *_gather_backward(ctx, *grads[:3])[:7], None


def _gather_backward(ctx, *grads):
    dense = [with_unit_stride(grad) for grad in grads]
    nothing = None, None, None  # added
    grads = in_backward(
        _OPERATORS.gather_backward, *dense, *ctx.saved_tensors, ctx.windows, *ctx.orders, *nothing, ctx.documents
    )
    return *grads, *[None] * 5


def _gather_backward_setup(ctx, inputs, output):
    query_sub, _, _, mask, prefix, ctx.windows, *_ = inputs
    ctx.save_for_backward(mask, prefix)
    ctx.length, ctx.adds, ctx.documents = query_sub.shape[2], inputs[-2] is not None, inputs[-1]


def _gather_backward_backward(ctx, *grads):
    dense = [with_unit_stride(grad) for grad in grads]
    added = grads if ctx.adds else [None] * 3
    again = _OPERATORS.gather(*dense, *ctx.saved_tensors, ctx.windows, ctx.length, ctx.documents)
    return *again, *[None] * 6, *added, None


def _scatter_setup(ctx, inputs, output):
    output_sub, mask, prefix, ctx.windows, added, ctx.documents = inputs
    ctx.save_for_backward(mask, prefix)
    ctx.length, ctx.order, ctx.adds = output_sub.shape[2], memory_order(output_sub), added is not None


def _scatter_backward(ctx, grad):
    choice = *ctx.saved_tensors, ctx.windows, ctx.length, ctx.order, ctx.documents
    grad_sub = in_backward(_OPERATORS.scatter_backward, with_unit_stride(grad), *choice)
    return grad_sub, None, None, None, grad if ctx.adds else None, None


def _scatter_backward_setup(ctx, inputs, output):
    _, mask, prefix, ctx.windows, _, _, ctx.documents = inputs
    ctx.save_for_backward(mask, prefix)


def _scatter_backward_backward(ctx, grad):
    again = _OPERATORS.scatter(with_unit_stride(grad), *ctx.saved_tensors, ctx.windows, None, ctx.documents)
    return again, *[None] * 6


def _local_setup(ctx, inputs, output):
    query, key, value, *ctx.local = inputs
    ctx.save_for_backward(query, key, value, *output)
    ctx.mark_non_differentiable(*output[1:])


def _local_backward(ctx, grad, *_):
    grads = in_backward(_OPERATORS.local_attention_backward, with_unit_stride(grad), *ctx.saved_tensors, *ctx.local)
    return *grads, None, None, None, None


def no_second_gradient(ctx, *_):
    raise NotImplementedError(
        "a second derivative (create_graph=True) through PyTorch's fused attention, or through a local window, is not "
        "supported, since those kernels have none: use local_window=0 and an inner attention that has one"
    )


def refuse_forward_mode(inputs) -> None:
    """PyTorch would silently use a tangent of zero where there is no forward-mode formula."""
    if forward_ad._current_level < 0:  # the usual case costs least
        return
    if any(isinstance(x, Tensor) and forward_ad.unpack_dual(x).tangent is not None for x in inputs):
        raise NotImplementedError(
            "forward-mode derivatives (torch.func.jvp, torch.autograd.forward_ad) through Lighthouse attention are not "
            "supported: use torch.autograd.grad"
        )


class _ReverseMode(torch.library.Library):
    """Registers autograd kernels that refuse forward mode before they do anything."""

    def impl(self, op_name, fn, *args, **kwargs):
        def kernel(keyset, *inputs):
            refuse_forward_mode(inputs)
            return fn(keyset, *inputs)

        super().impl(op_name, kernel, *args, **kwargs)


REVERSE_MODE = _ReverseMode("lighthouse", "FRAGMENT")

for _name, _inputs in (("score", 2), ("select", 7)):
    torch.library.register_autograd(
        f"lighthouse::{_name}", lambda ctx, *_, count=_inputs: (None,) * count, setup_context=_no_gradient
    )

for _name, _backward, _setup in (
    ("choose_and_gather", _choose_backward, _choose_setup),
    ("gather", _gather_backward, _gather_setup),
    ("gather_backward", _gather_backward_backward, _gather_backward_setup),
    ("scatter", _scatter_backward, _scatter_setup),
    ("scatter_backward", _scatter_backward_backward, _scatter_backward_setup),
    ("local_attention", _local_backward, _local_setup),
    ("local_attention_backward", no_second_gradient, lambda ctx, inputs, output: None),
):
    torch.library.register_autograd(f"lighthouse::{_name}", _backward, setup_context=_setup, lib=REVERSE_MODE)


# The operators as `lighthouse.attention` calls them.


_DERIVATIVES = (torch._C._functorch.TransformType.Grad, torch._C._functorch.TransformType.Jvp)


def traced() -> bool:
    """Whether something traces through autograd: `torch.compile` and vmap see only the registered operators.

    The derivatives of `torch.func` see neither: forward mode would silently find a tangent of zero.
    """
    if torch.compiler.is_compiling():
        return True
    if not torch._C._are_functorch_transforms_active():
        return False
    if any(level.key() in _DERIVATIVES for level in torch._C._functorch.get_interpreter_stack()):
        raise NotImplementedError(
            "torch.func.grad, vjp and jvp through lighthouse.attention are not supported: use torch.autograd.grad"
        )
    return True


@torch.compiler.assume_constant_result
def exporting() -> bool:
    """Whether `torch.export` traces. (What torch 2.11 compiles finds `is_exporting()` true, exported or not.)"""
    return torch.compiler.is_exporting()


def without_gradient(operator, *inputs):
    """Bypasses the operator's autograd function, which would record nothing here but costs time."""
    if traced():
        return operator(*inputs)
    try:
        with torch._C._AutoDispatchBelowAutograd():
            return operator(*inputs)
    except torch.OutOfMemoryError:
        raise
    except RuntimeError as error:
        if is_out_of_memory(str(error), inputs[0].is_cuda):
            raise torch.OutOfMemoryError(f"CUDA out of memory. {operator.__name__}: {error}") from error
        raise


def is_out_of_memory(message: str, on_cuda: bool) -> bool:
    """Whether an operator failed because GPU memory ran out; callers may catch `torch.OutOfMemoryError`.

    The stable ABI knows one kind of error, and before torch 2.15 not its words, which are on stderr then: a failed
    allocation. An earlier kernel's failure arrives in the next allocation too, but then the device refuses all further
    calls and says why: PyTorch's own error (`torch.AcceleratorError`) is raised instead of an answer.
    """
    if not on_cuda or "out of memory" in message:
        return on_cuda
    if "CUDA error" in message or not any(call in message for call in ("aoti_torch_empty", "aten::new_empty")):
        return False
    torch.cuda.mem_get_info()
    return True


def in_backward(operator, *inputs):
    """Differentiable itself if the caller asked for it (`create_graph`)."""
    refuse_forward_mode(inputs)
    return operator(*inputs) if torch.is_grad_enabled() else without_gradient(operator, *inputs)


def _eager(name: str, operator, setup, backward) -> type[torch.autograd.Function]:
    """The operator with its gradient for eager code, by the formula that is registered for compiled code."""

    def forward(ctx, *inputs):  # one with setup_context takes 20 microseconds more
        output = without_gradient(operator, *inputs)
        setup(ctx, inputs, output)
        return output

    return type(
        name, (torch.autograd.Function,), {"forward": staticmethod(forward), "backward": staticmethod(backward)}
    )


_Gather = _eager("_Gather", _OPERATORS.gather, _gather_setup, _gather_backward)
_Scatter = _eager("_Scatter", _OPERATORS.scatter, _scatter_setup, _scatter_backward)
_Local = _eager("_Local", _OPERATORS.local_attention, _local_setup, _local_backward)


@dataclass(frozen=True, eq=False)
class Selection:
    """The entries chosen, one choice per batch row and key-value head.

    Attributes:
        mask: `[B, Hkv, N]` uint8; bit l of a token says that the entry of level l whose window ends there is chosen.
        prefix: `[B, Hkv, N]` int32; the position in the sub-sequence of the first such entry.
        sequences: what was chosen from.
    """

    mask: Tensor
    prefix: Tensor
    sequences: Sequences

    @property
    def length(self) -> int:
        """S, the same for every row and head."""
        return self.sequences.length

    @property
    def windows(self) -> tuple[int, ...]:
        """Tokens per entry of each level, finest first."""
        return self.sequences.method.windows

    def entries(self, batch: int, head: int, document: int | None = None) -> list[tuple[int, int]]:
        """The chosen (level, index) pairs of one row and key-value head, in causal order, S of them.

        Of packed documents those of one, by its number, those without tokens not counted; indices count from its start.
        """
        mask = self.mask[batch, head]
        if self.sequences.of_tokens:
            if document is None:
                raise ValueError(
                    f"document=None: one of {len(self.sequences.of_tokens)} documents, from 0 on, is needed"
                )
            mask = mask[slice(*self.sequences.of_tokens[document])]
        bits_of = mask.tolist()
        return [
            (level, token // window)
            for token, bits in enumerate(bits_of)
            if bits
            for level, window in enumerate(self.windows)
            if bits >> level & 1
        ]


def choose(query: Tensor, key: Tensor, sequences: Sequences, scores: tuple[Tensor, Tensor] | None) -> Selection:
    """The choice for inputs that have been checked; by the norms where `scores` is None."""
    if scores is None:
        scores = without_gradient(_OPERATORS.score, query.detach(), key.detach())
    method = sequences.method
    settings = method.windows, *method.topk, method.cover_start, sequences.table
    mask, prefix = without_gradient(_OPERATORS.select, *scores, *settings)
    return Selection(mask, prefix, sequences)


def gather(query: Tensor, key: Tensor, value: Tensor, selection: Selection) -> tuple[Tensor, Tensor, Tensor]:
    """`torch.ops.lighthouse.gather` with its gradient."""
    choice = selection.mask, selection.prefix, selection.windows, selection.length, selection.sequences.table
    inputs = query, key, value, *choice
    refuse_forward_mode(inputs)
    return _OPERATORS.gather(*inputs) if traced() else _Gather.apply(*inputs)


def local_attention(query: Tensor, key: Tensor, value: Tensor, local: Local) -> Tensor:
    """`torch.ops.lighthouse.local_attention` with its gradient: the output, `[B, Hq, N, D]`."""
    inputs = query, key, value, *local
    refuse_forward_mode(inputs)
    return (_OPERATORS.local_attention(*inputs) if traced() else _Local.apply(*inputs))[0]


def scatter(output_sub: Tensor, selection: Selection, added: Tensor | None = None) -> Tensor:
    """`torch.ops.lighthouse.scatter` with its gradient; `added` `[B, Hq, N, D]` is added in the same pass.

    Compiled code recomputes the output in the backward. The next matmul would otherwise save it, one full-length tensor
    per layer, although it follows from the sub-sequence's output, which attention saves anyway.
    """
    inputs = output_sub, selection.mask, selection.prefix, selection.windows, added, selection.sequences.table
    refuse_forward_mode(inputs)
    if not traced():
        return _Scatter.apply(*inputs)
    if torch.compiler.is_dynamo_compiling() and not exporting():
        return checkpoint(_OPERATORS.scatter, *inputs, use_reentrant=False)
    return _OPERATORS.scatter(*inputs)
