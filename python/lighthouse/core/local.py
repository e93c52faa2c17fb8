"""Exact causal attention of each token over the last W tokens, by kernels of PyTorch's (METHOD 5a).

`kernel_for` names the kernel of a case, and `torch.ops.lighthouse.local_attention` runs it: FlashAttention's own window
for half types on CUDA; elsewhere the queries of `BLOCK` tokens at a time on the keys that they see, by matrix products.
(The memory-efficient kernel has a window too, but its gradient takes as long as without: on an H100 43 ms at 98,304
tokens, 8 heads of 128 and a window of 256, where FlashAttention takes 2.0.)

Matrix products have the same bits on every run with the same number of threads. FlashAttention adds up a gradient in an
order that differs from run to run, or with `torch.use_deterministic_algorithms(True)` in one.
"""

from __future__ import annotations

import logging
import math
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.backends import cuda as backends

from lighthouse.core.kernels import CPU, KERNELS, Saved, head_dim_limit

logger = logging.getLogger("lighthouse")

_ATEN = torch.ops.aten

FLASH, BLOCKS, WHOLE = "flash", "blocks", "whole"

BLOCK = 64  # queries that share their keys: fewer pairs outside of the window against longer matrix products
# Of the weights that are held at a time: on a CPU some that stay in its caches, on a GPU many for each launch.
NUMBERS = {"cpu": 1 << 20, "cuda": 1 << 24}

FLASH_HEAD_DIM = 256  # the longest that FlashAttention takes


def kernel_for(query: Tensor, window: int, dropout_p: float) -> str:
    """The kernel for `query` `[B, Hq, N, D]`, from its device, dtype and head dimension, and what the user allows."""
    if query.is_cpu and window >= query.shape[2] and not dropout_p:
        return WHOLE
    half = query.dtype in (torch.bfloat16, torch.float16)
    if query.is_cuda and half:
        if _flash_allowed(query.device, head_dim_limit(query)):
            return FLASH
        _say_that_it_is_slower()
    return BLOCKS


# Between forward and backward of a layer these tensors are kept besides query, key and value: output, sums, dropout's
# seed and offset. Where they can be made again, or are not needed, they are empty.


def kept_of(made: tuple[Tensor, ...], kernel: str, dropout_p: float) -> tuple[Tensor, ...]:
    """Of what `forward` made, what `backward_of_kept` needs, as many tensors."""
    output, logsumexp, *random = made
    if kernel == BLOCKS:
        return output.new_empty(0), logsumexp, *random
    if kernel == FLASH and not dropout_p:
        return *(tensor.new_empty(0) for tensor in (output, logsumexp)), *random
    return output, logsumexp, *random


def backward_of_kept(grad, query, key, value, kept, local: Local):
    """The gradients of query, key and value.

    FlashAttention's needs its output, which is made again: a tensor as long as the text would be kept for each layer,
    and to take it from the layer's output loses digits.
    """
    output, *saved = kept
    if local.kernel == FLASH and not local.dropout_p:
        output, *saved = forward(query, key, value, *local)
    return backward(*(grad, query, key, value, output, *saved, *local))


class Local(NamedTuple):
    """A local window: the arguments of the operators after their tensors."""

    window: int
    scale: float | None
    dropout_p: float
    kernel: str

    @classmethod
    def of(cls, query: Tensor, window: int, scale: float | None, dropout_p: float) -> Local:
        return cls(window, scale, dropout_p, kernel_for(query, window, dropout_p) if window else BLOCKS)


@torch.compiler.assume_constant_result
def _flash_allowed(device: torch.device, head_dim: int) -> bool:
    capability = torch.cuda.get_device_capability(device)
    # Where a multiprocessor has less shared memory its gradient ends at 192.
    most = FLASH_HEAD_DIM if capability in ((8, 0), (9, 0), (10, 0), (10, 3)) else 192
    return backends.flash_sdp_enabled() and capability >= (8, 0) and head_dim <= most


@torch.compiler.assume_constant_result
def _say_that_it_is_slower() -> None:
    """Once, while tracing too."""
    if not _said:
        _said.append(True)
        logger.warning(
            "Lighthouse: FlashAttention cannot be used for a local window here (it is switched off, the heads are too "
            "long for this GPU, or the GPU is older than compute capability 8.0): matrix products compute it, which is "
            "slower (logged once)"
        )


_said: list[bool] = []


class _Flash:
    """FlashAttention in tensors `[B, N, H, D]`; grouped heads are its own. (On CUDA D is a multiple of 8.)"""

    @staticmethod
    def _arguments(tensors: tuple[Tensor, ...], scale: float | None, window: int):
        options = {"scale": scale, "window_size_left": window - 1, "window_size_right": 0}
        return [tensor.transpose(1, 2) for tensor in tensors], options

    @classmethod
    def forward(cls, query, key, value, window, scale, dropout_p):
        tokens = query.shape[2]
        tensors, options = cls._arguments((query, key, value), scale, window)
        output, *saved, _ = _ATEN._flash_attention_forward(
            *tensors, None, None, tokens, tokens, dropout_p, True, False, **options
        )
        return output.contiguous().transpose(1, 2), *saved

    @classmethod
    def backward(cls, grad, query, key, value, output, saved, window, scale, dropout_p):
        tokens = query.shape[2]
        tensors, options = cls._arguments((grad, query, key, value, output), scale, window)
        grads = _ATEN._flash_attention_backward(
            *tensors, saved.logsumexp, None, None, tokens, tokens, dropout_p, True, saved.seed, saved.offset, **options
        )
        return tuple(each.contiguous().transpose(1, 2) for each in grads)


class _Chunk:
    """Some blocks of one key-value head: their queries, the keys that they see, and the weights of both.

    Queries of one block `[blocks, G * BLOCK, D]` see keys `[blocks, BLOCK + W - 1, D]`, which overlap. Tokens before
    the first and after the last are zeros; what a query before them would see is masked.
    """

    def __init__(self, first: int, blocks: int, group: int, window: int, tokens: int):
        self.first, self.blocks, self.group, self.window, self.tokens = first, blocks, group, window, tokens
        self.last = min(first + blocks * BLOCK, tokens)

    def queries(self, tensor: Tensor, *, wide: bool = False) -> Tensor:
        """Of `[G, N, D]`; in float32 at least if `wide`."""
        rows = _padded(tensor[:, self.first : self.last], 0, self.blocks * BLOCK - self.last + self.first, wide)
        return rows.unflatten(1, (self.blocks, BLOCK)).transpose(0, 1).flatten(1, 2)

    def keys(self, tensor: Tensor, *, wide: bool = False) -> Tensor:
        """Of `[N, D]`; `[blocks, BLOCK + W - 1, D]`, which overlap in memory."""
        start, end = self.first - self.window + 1, self.first + self.blocks * BLOCK
        rows = _padded(tensor[max(start, 0) : self.last], max(-start, 0), end - self.last, wide)
        return rows.unfold(0, BLOCK + self.window - 1, BLOCK).transpose(1, 2)

    def mask(self, like: Tensor) -> Tensor:
        """0 where a query sees a key, minus infinity elsewhere: `[1 or blocks, G * BLOCK, BLOCK + W - 1]`."""
        query = torch.arange(BLOCK, device=like.device)[:, None]
        key = torch.arange(BLOCK + self.window - 1, device=like.device)
        seen = ((key >= query) & (key < query + self.window))[None]
        if self.first < self.window - 1:
            block = torch.arange(self.blocks, device=like.device)[:, None, None]
            seen = seen & (self.first + block * BLOCK + key >= self.window - 1)
        mask = like.new_zeros(seen.shape).masked_fill_(~seen, -math.inf)
        return mask.repeat(1, self.group, 1) if self.group > 1 else mask

    def tokens_of(self, rows: Tensor) -> Tensor:
        """`queries` backwards: `[blocks, G * BLOCK, ...]` to `[G, tokens of this chunk, ...]`."""
        return rows.unflatten(1, (self.group, BLOCK)).transpose(0, 1).flatten(1, 2)[:, : self.last - self.first]

    def add_keys(self, sums: Tensor, rows: Tensor) -> None:
        """Adds `[blocks, BLOCK + W - 1, D]` to `sums`, whose row 0 is token 1 - W, in one order."""
        for start in range(0, rows.shape[1], BLOCK):
            part = rows[:, start : start + BLOCK]
            first = self.first + start
            sums[first : first + self.blocks * BLOCK].unflatten(0, (self.blocks, BLOCK))[:, : part.shape[1]] += part


def _padded(rows: Tensor, before: int, after: int, wide: bool) -> Tensor:
    rows = _wide(rows) if wide else rows
    return F.pad(rows, (0, 0, before, after)) if before or after else rows


def _wide_dtype(tensor: Tensor) -> torch.dtype:
    return torch.float64 if tensor.dtype == torch.float64 else torch.float32


def _wide(tensor: Tensor) -> Tensor:
    return tensor.to(_wide_dtype(tensor))


def _weights(rows: Tensor, keys: Tensor, mask: Tensor, scale: float) -> Tensor:
    return torch.baddbmm(mask, rows, keys.transpose(1, 2), alpha=scale)


def _attend(query: Tensor, key: Tensor, value: Tensor, mask: Tensor, scale: float, kept: Tensor | None):
    """Attention of each block, and the log of each row's sum of weights. `kept`: what dropout multiplies weights by.

    PyTorch's attention for CPUs where it can.
    """
    if query.is_cpu and kept is None:
        output, sums = _ATEN._scaled_dot_product_flash_attention_for_cpu(
            query[None], key[None], value[None], 0.0, False, attn_mask=mask[None].to(query.dtype), scale=scale
        )
        return output[0], sums[0]
    weights = _weights(_wide(query), _wide(key), _wide(mask), scale)
    sums = weights.logsumexp(-1, keepdim=True)
    weights.sub_(sums).exp_()
    return (weights if kept is None else weights.mul_(kept)) @ _wide(value), sums.squeeze(-1)


def tokens_first(tensor: Tensor) -> Tensor:
    """`[B, H, N, D]` whose `.transpose(1, 2)` is contiguous; a copy if need be."""
    return tensor.transpose(1, 2).contiguous().transpose(1, 2)


def _empty_like(tensor: Tensor) -> Tensor:
    """Contiguous as `[B, N, H, D]`."""
    return torch.empty_like(tensor.transpose(1, 2), memory_format=torch.contiguous_format).transpose(1, 2)


class _Blocks:
    """Matrix products of `BLOCK` queries with the keys that they see, in float32 or float64."""

    @staticmethod
    def _chunks(query: Tensor, key: Tensor, window: int):
        """(batch, key-value head, its query heads, chunk) for all of them."""
        tokens, group = query.shape[2], query.shape[1] // key.shape[1]
        window = min(window, tokens)
        blocks = -(-tokens // BLOCK)
        at_once = max(1, min(blocks, NUMBERS[query.device.type] // (group * BLOCK * (BLOCK + window - 1))))
        for batch in range(query.shape[0]):
            for head in range(key.shape[1]):
                heads = slice(head * group, (head + 1) * group)
                for block in range(0, blocks, at_once):
                    chunk = _Chunk(block * BLOCK, min(at_once, blocks - block), group, window, tokens)
                    yield batch, head, heads, chunk

    @classmethod
    def forward(cls, query, key, value, window, scale, dropout_p):
        scale = scale or 1 / math.sqrt(query.shape[3])
        output = _empty_like(query)
        logsumexp = query.new_empty(query.shape[:3], dtype=_wide_dtype(query))
        seed = torch.randint(2**62, (1,)) if dropout_p else torch.empty(0, dtype=torch.int64)  # on the CPU: it is read
        random = _random(seed, query.device)
        for batch, head, heads, chunk in cls._chunks(query, key, window):
            rows, at = chunk.queries(query[batch, heads]), (batch, heads, slice(chunk.first, chunk.last))
            keys, values = chunk.keys(key[batch, head]), chunk.keys(value[batch, head])
            kept = _kept(rows, keys, dropout_p, random)
            result, sums = _attend(rows, keys, values, chunk.mask(rows), scale, kept)
            output[at] = chunk.tokens_of(result).to(output.dtype)
            logsumexp[at] = chunk.tokens_of(sums)
        return output, logsumexp, seed, torch.empty(0, dtype=torch.int64)

    @classmethod
    def backward(cls, grad, query, key, value, output, saved, window, scale, dropout_p):
        scale = scale or 1 / math.sqrt(query.shape[3])
        grad_query, grad_key, grad_value = map(_empty_like, (query, key, value))
        tokens, dtype = query.shape[2], _wide_dtype(query)
        window = min(window, tokens)
        length = (-(-tokens // BLOCK) + (BLOCK + window - 2) // BLOCK) * BLOCK
        key_sums, value_sums = (query.new_empty(length, query.shape[3], dtype=dtype) for _ in range(2))
        random = _random(saved.seed, query.device)
        for batch, head, heads, chunk in cls._chunks(query, key, window):
            if chunk.first == 0:
                key_sums.zero_()
                value_sums.zero_()
            rows, keys = chunk.queries(query[batch, heads], wide=True), chunk.keys(key[batch, head], wide=True)
            values, grads = chunk.keys(value[batch, head], wide=True), chunk.queries(grad[batch, heads], wide=True)
            sums = chunk.queries(saved.logsumexp[batch, heads, :, None])
            kept = _kept(rows, keys, dropout_p, random)
            weights = _weights(rows, keys, chunk.mask(rows), scale).sub_(sums).exp_()
            if dtype != query.dtype:
                weights.div_(weights.sum(-1, keepdim=True))  # PyTorch's sums may be of logits that it has rounded
            grad_weights = grads @ values.transpose(1, 2)
            if kept is not None:
                grad_weights.mul_(kept)
            common = (weights * grad_weights).sum(-1, keepdim=True)  # needs no output, which is rounded
            chunk.add_keys(value_sums, (weights if kept is None else weights * kept).transpose(1, 2) @ grads)
            grad_logits = grad_weights.sub_(common).mul_(weights).mul_(scale)
            chunk.add_keys(key_sums, grad_logits.transpose(1, 2) @ rows)
            grad_query[batch, heads, chunk.first : chunk.last] = chunk.tokens_of(grad_logits @ keys)
            if chunk.last == tokens:
                grad_key[batch, head] = key_sums[window - 1 :][:tokens]
                grad_value[batch, head] = value_sums[window - 1 :][:tokens]
        return grad_query, grad_key, grad_value


def _random(seed: Tensor, device: torch.device) -> torch.Generator | None:
    """The numbers of a dropout, the same in the backward; None without one."""
    return torch.Generator(device).manual_seed(int(seed)) if seed.numel() else None


def _kept(rows: Tensor, keys: Tensor, dropout_p: float, random: torch.Generator | None) -> Tensor | None:
    """What dropout multiplies the weights of a chunk by."""
    if random is None:
        return None
    shape = rows.shape[0], rows.shape[1], keys.shape[1]
    drawn = torch.rand(shape, generator=random, device=rows.device, dtype=_wide_dtype(rows))
    return (drawn >= dropout_p).to(drawn.dtype) / (1 - dropout_p)


class _Whole:
    """PyTorch's causal attention for CPUs, where the window covers all tokens."""

    @staticmethod
    def forward(query, key, value, window, scale, dropout_p):
        output, saved = KERNELS[CPU].forward(query, key, value, scale, 0.0)
        return tokens_first(output), *saved

    @staticmethod
    def backward(grad, query, key, value, output, saved, window, scale, dropout_p):
        return tuple(map(tokens_first, KERNELS[CPU].backward(grad, query, key, value, output, saved, scale, 0.0)))


_KERNELS: dict[str, Any] = {FLASH: _Flash, BLOCKS: _Blocks, WHOLE: _Whole}


# The operators. Python's, since the kernels are PyTorch's: to `torch.compile` each is one call, whatever the lengths.


def _checked(query, key, value, window, scale, dropout_p, kernel):
    """`forward` for what comes from anywhere."""
    sizes = query.shape[0], key.shape[1], *query.shape[2:]
    if query.ndim != 4 or key.shape != sizes or value.shape != sizes or query.shape[1] % key.shape[1]:
        raise ValueError(
            f"query {list(query.shape)}, key {list(key.shape)} and value {list(value.shape)}: [batch, heads, tokens, "
            "head_dim] is needed, the query heads a multiple of the key heads and all else the same"
        )
    if window < 1 or kernel not in _KERNELS or (scale is not None and not 0 < scale < math.inf):
        raise ValueError(
            f"window={window}, scale={scale}, kernel={kernel!r}: a window of at least 1, a finite scale above 0 or "
            f"None, and one of {', '.join(_KERNELS)} are needed"
        )
    return forward(query, key, value, window, scale, dropout_p, kernel)


def forward(query, key, value, window, scale, dropout_p, kernel):
    """The output and what its gradient needs."""
    query, key, value = (_aligned(tensor, kernel) for tensor in (query, key, value))
    with torch.autocast(query.device.type, enabled=False):
        return _KERNELS[kernel].forward(query, key, value, window, scale, dropout_p)


def backward(grad_output, query, key, value, output, logsumexp, seed, offset, window, scale, dropout_p, kernel):
    """The gradients of query, key and value."""
    saved = Saved(logsumexp, seed, offset)
    grad_output, query, key, value = (_aligned(tensor, kernel) for tensor in (grad_output, query, key, value))
    with torch.autocast(query.device.type, enabled=False):
        return _KERNELS[kernel].backward(grad_output, query, key, value, output, saved, window, scale, dropout_p)


def _aligned(tensor: Tensor, kernel: str) -> Tensor:
    """A copy where FlashAttention would read 16 bytes from an address that is no multiple of them."""
    step = 16 // tensor.element_size()
    if kernel != FLASH or not any(size % step for size in (*tensor.stride()[:3], tensor.storage_offset())):
        return tensor
    return tensor.contiguous()


def _fake(query, key, value, window, scale, dropout_p, kernel):
    if kernel != BLOCKS:
        return _KERNELS[kernel].forward(query, key, value, window, scale, dropout_p)
    seed, offset = (torch.empty(count, dtype=torch.int64) for count in (1 if dropout_p else 0, 0))
    return _empty_like(query), query.new_empty(query.shape[:3], dtype=_wide_dtype(query)), seed, offset


def _fake_backward(grad_output, query, key, value, output, logsumexp, seed, offset, window, scale, dropout_p, kernel):
    if kernel != BLOCKS:
        saved = Saved(logsumexp, seed, offset)
        return _KERNELS[kernel].backward(grad_output, query, key, value, output, saved, window, scale, dropout_p)
    return tuple(map(_empty_like, (query, key, value)))


def define(library: torch.library.Library) -> None:
    """Makes `local_attention` and `local_attention_backward` operators of a library; gradients are joined elsewhere."""
    seeded = (torch.Tag.nondeterministic_seeded,)
    library.define(
        "local_attention(Tensor query, Tensor key, Tensor value, int window, float? scale, float dropout_p, str kernel)"
        " -> (Tensor output, Tensor logsumexp, Tensor seed, Tensor offset)",
        tags=seeded,
    )
    library.define(
        "local_attention_backward(Tensor grad_output, Tensor query, Tensor key, Tensor value, Tensor output, "
        "Tensor logsumexp, Tensor seed, Tensor offset, int window, float? scale, float dropout_p, str kernel)"
        " -> (Tensor grad_query, Tensor grad_key, Tensor grad_value)"
    )
    for name, function, fake in (
        ("local_attention", _checked, _fake),
        ("local_attention_backward", backward, _fake_backward),
    ):
        library.impl(name, function, "CPU")
        library.impl(name, function, "CUDA")
        torch.library.register_fake(f"{library.ns}::{name}", fake, lib=library)
