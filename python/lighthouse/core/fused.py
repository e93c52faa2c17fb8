"""Attention by PyTorch's kernels as one function with one gradient: fewer launches, and fewer tensors kept.

Kept between forward and backward are the choice, the sub-sequence's output and, without a local window, its query, key
and value. A window's gradient needs query, key and value of the tokens; so then the sub-sequence is gathered from them
again.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from lighthouse.core import local
from lighthouse.core import operators as its
from lighthouse.core.documents import backward_by_length, count_of_lengths, forward_by_length
from lighthouse.core.kernels import KERNELS, Saved
from lighthouse.core.sequences import Sequences

_OPERATORS = torch.ops.lighthouse
_CHOOSE_AND_GATHER = _OPERATORS.choose_and_gather.default
_SCORE, _SELECT = _OPERATORS.score.default, _OPERATORS.select.default
_GATHER, _GATHER_BACKWARD = _OPERATORS.gather.default, _OPERATORS.gather_backward.default
_SCATTER, _SCATTER_BACKWARD = _OPERATORS.scatter.default, _OPERATORS.scatter_backward.default


class Stock(NamedTuple):
    """The arguments after the tensors. `kernel` is one of `KERNELS`; a `local_window` of 0 is none."""

    windows: tuple[int, ...]
    kernel: str
    scale: float | None
    dropout_p: float
    local_window: int
    local_kernel: str
    documents: Sequences | None = None

    @property
    def local(self) -> local.Local:
        return local.Local(self.local_window, self.scale, self.dropout_p, self.local_kernel)

    @property
    def table(self) -> Tensor | None:
        return None if self.documents is None else self.documents.table


def _inner(subs, stock: Stock) -> tuple[Tensor, ...]:
    """The sub-sequence's output, and what its gradient needs: three tensors, of documents three for each length."""

    def forward(*rows):
        output, saved = KERNELS[stock.kernel].forward(*rows, stock.scale, stock.dropout_p)
        return output, *saved

    if stock.documents is None:
        return forward(*subs)
    query, key, value = subs
    return forward_by_length(forward, query, key, value, stock.documents.of_entries)


def _inner_backward(grad, subs, output_sub, saved, stock: Stock) -> tuple[Tensor, Tensor, Tensor]:
    def backward(grad, *rows):
        *inputs, logsumexp, seed, offset = rows
        saved = Saved(logsumexp, seed, offset)
        return KERNELS[stock.kernel].backward(grad, *inputs, saved, stock.scale, stock.dropout_p)

    if stock.documents is None:
        return backward(grad, *subs, output_sub, *saved)
    return backward_by_length(backward, (grad, *subs, output_sub), saved, stock.documents.of_entries)


def _local(query, key, value, stock: Stock, local_forward: Callable) -> tuple[Tensor, ...]:
    """The same of a local window, with four tensors."""

    def forward(*rows, of: local.Local | None = None):
        of = of or local.Local.of(rows[0], *stock.local[:3])
        made = local_forward(*rows, *of)
        return made[0], *local.kept_of(made, of.kernel, of.dropout_p)

    if stock.documents is None:
        return forward(query, key, value, of=stock.local)
    return forward_by_length(forward, query, key, value, stock.documents.of_tokens)


def _local_backward(grad, query, key, value, kept, stock: Stock) -> tuple[Tensor, Tensor, Tensor]:
    def backward(grad, query, key, value, *kept):
        return local.backward_of_kept(grad, query, key, value, kept, local.Local.of(query, *stock.local[:3]))

    if stock.documents is None:
        return local.backward_of_kept(grad, query, key, value, kept, stock.local)
    return backward_by_length(backward, (grad, query, key, value), kept, stock.documents.of_tokens)


def _attend(query, key, value, subs, mask, prefix, stock: Stock, local_forward: Callable) -> tuple[Tensor, ...]:
    """The output, the sub-sequence's, what its gradient needs, and what that of a window needs."""
    output_sub, *saved = _inner(subs, stock)
    added, local_kept = None, []
    if stock.local_window:
        added, *local_kept = _local(query, key, value, stock, local_forward)
    output = _SCATTER(output_sub, mask, prefix, stock.windows, added, stock.table)
    return output, output_sub, *saved, *local_kept


def _choose_and_attend(query, key, value, scores, sequences: Sequences, stock: Stock) -> tuple[Tensor, list[Tensor]]:
    """The output, and what the gradient keeps."""
    method = sequences.method
    if scores is None and stock.documents is None:
        *subs, mask, prefix = _CHOOSE_AND_GATHER(
            *(query, key, value, method.windows, *method.topk, method.cover_start, sequences.length)
        )
    else:
        scores = scores or _SCORE(query, key)
        mask, prefix = _SELECT(*scores, method.windows, *method.topk, method.cover_start, stock.table)
        subs = _GATHER(query, key, value, mask, prefix, method.windows, sequences.length, stock.table)
    output, *saved = _attend(query, key, value, subs, mask, prefix, stock, local.forward)
    return output, [mask, prefix, *saved, *((query, key, value) if stock.local_window else subs)]


def _backward(grad, kept: list[Tensor], orders, stock: Stock):
    """The gradients of query, key and value, their dimensions in memory in these orders. Empties `kept`.

    Each tensor is let go of as soon as it is not needed: what is held at once adds to the step's peak.
    """
    mask, prefix, output_sub, *rest = kept
    kept.clear()
    of_inner = 3 if stock.documents is None else 3 * count_of_lengths(stock.documents.of_entries)
    saved, rest = rest[:of_inner], rest[of_inner:]
    choice, length, table = (mask, prefix, stock.windows), output_sub.shape[2], stock.table
    added: tuple[Tensor | None, ...] = (None, None, None)
    if stock.local_window:
        *local_kept, query, key, value = rest
        added = _local_backward(grad, query, key, value, local_kept, stock)
        del rest, local_kept
        subs = _GATHER(query, key, value, *choice, length, table)
        del query, key, value
    else:
        subs, rest = rest, []
    grad_sub = _SCATTER_BACKWARD(grad, *choice, length, its.memory_order(output_sub), table)
    del grad
    grads = _inner_backward(grad_sub, subs, output_sub, saved, stock)
    del grad_sub, subs, output_sub, saved
    return _GATHER_BACKWARD(*map(its.with_unit_stride, grads), *choice, *orders, *added, table)


class _Attention(torch.autograd.Function):
    """For eager code."""

    @staticmethod
    def forward(ctx, query, key, value, scores, sequences, stock):
        output, kept = its.without_gradient(_choose_and_attend, query, key, value, scores, sequences, stock)
        ctx.save_for_backward(*kept)
        ctx.strides, ctx.stock = [tensor.stride() for tensor in (query, key, value)], stock
        return output

    @staticmethod
    def backward(ctx, grad):
        its.refuse_forward_mode((grad,))
        if torch.is_grad_enabled():  # create_graph: what is kept of the sub-sequence has no graph
            its.no_second_gradient(ctx)
        orders = [its.order_of(strides) for strides in ctx.strides]
        kept = list(ctx.saved_tensors)
        ctx.maybe_clear_saved_tensors()  # unless the caller retains the graph
        grads = its.without_gradient(_backward, its.with_unit_stride(grad), kept, orders, ctx.stock)
        return *grads, None, None, None


# After a choice, with a window: an operator, for `torch.compile` and for checkpointing that keeps the choice.

its.LIBRARY.define(
    "attend(Tensor query, Tensor key, Tensor value, Tensor mask, Tensor prefix, int[] windows, SymInt length, "
    "str kernel, float? scale, float dropout_p, int local_window, str local_kernel)"
    " -> (Tensor output, Tensor output_sub, Tensor logsumexp, Tensor seed, Tensor offset, Tensor local_output, "
    "Tensor local_logsumexp, Tensor local_seed, Tensor local_offset)",
    tags=(torch.Tag.nondeterministic_seeded,),
)
its.LIBRARY.define(
    "attend_backward(Tensor grad, Tensor mask, Tensor prefix, Tensor output_sub, Tensor logsumexp, Tensor seed, "
    "Tensor offset, Tensor local_output, Tensor local_logsumexp, Tensor local_seed, Tensor local_offset, Tensor query, "
    "Tensor key, Tensor value, int[] windows, str kernel, float? scale, float dropout_p, int local_window, "
    "str local_kernel)"
    " -> (Tensor grad_query, Tensor grad_key, Tensor grad_value)"
)


def _attend_operator(query, key, value, mask, prefix, windows, length, *stock, local_forward=local.forward):
    subs = _GATHER(query, key, value, mask, prefix, windows, length)
    return _attend(query, key, value, subs, mask, prefix, Stock(windows, *stock), local_forward)


def _attend_fake(*inputs):
    return _attend_operator(*inputs, local_forward=_OPERATORS.local_attention.default)


def _attend_backward_operator(grad, *rest):
    orders = [its.memory_order(tensor) for tensor in rest[10:13]]
    return _backward(grad, list(rest[:13]), orders, Stock(*rest[13:]))


def _attend_backward_fake(*inputs):
    return tuple(its.empty(tensor, tensor.shape[2], its.memory_order(tensor)) for tensor in inputs[11:14])


def _attend_setup(ctx, inputs, output):
    query, key, value, mask, prefix, windows, _, *stock = inputs
    ctx.save_for_backward(mask, prefix, *output[1:], query, key, value)
    ctx.mark_non_differentiable(*output[1:])
    ctx.stock = windows, *stock


def _attend_backward(ctx, grad, *_):
    grad = its.with_unit_stride(grad)
    return *its.in_backward(_OPERATORS.attend_backward.default, grad, *ctx.saved_tensors, *ctx.stock), *[None] * 9


for _name, _run, _fake in (
    ("attend", _attend_operator, _attend_fake),
    ("attend_backward", _attend_backward_operator, _attend_backward_fake),
):
    for _device in ("CPU", "CUDA"):
        its.LIBRARY.impl(_name, _run, _device)
    torch.library.register_fake(f"lighthouse::{_name}", _fake)
torch.library.register_autograd(
    "lighthouse::attend", _attend_backward, setup_context=_attend_setup, lib=its.REVERSE_MODE
)
torch.library.register_autograd(
    "lighthouse::attend_backward",
    its.no_second_gradient,
    setup_context=lambda ctx, inputs, output: None,
    lib=its.REVERSE_MODE,
)


def attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    sequences: Sequences,
    scores: tuple[Tensor, Tensor] | None,
    kernel: str | None,
    window: local.Local,
) -> Tensor | None:
    """The output `[B, Hq, N, D]` by one of `KERNELS`, with a local window if it is above 0.

    None where the verbs have to be called one by one: PyTorch has no such kernel, or something looks through the call
    (`torch.compile` and selective checkpointing, which without a window keep and recompute other tensors; exporting).
    """
    if kernel is None or its.exporting() or sequences.length == 1:  # cuDNN takes no single row
        return None
    documents = None if sequences.table is None else sequences
    stock = Stock(
        sequences.method.windows, kernel, window.scale, window.dropout_p, window.window, window.kernel, documents
    )
    plain = all(type(tensor) in (Tensor, torch.nn.Parameter) for tensor in (query, key, value))
    if plain and not its.traced() and not torch._C._len_torch_dispatch_stack():
        its.refuse_forward_mode((query, key, value))
        return _Attention.apply(query, key, value, scores, sequences, stock)
    if not window.window or documents is not None:
        return None
    choice = its.choose(query, key, sequences, scores)
    inputs = query, key, value, choice.mask, choice.prefix, stock.windows, choice.length, *stock[1:6]
    its.refuse_forward_mode(inputs)
    return _OPERATORS.attend.default(*inputs)[0]
