"""Dense attention as the benchmarks of models call it, and the check before any timing."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from lighthouse.speed.sides import check  # noqa: F401


def dense(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """PyTorch's causal attention; on CUDA only cuDNN's is allowed, so that it is known what was timed."""
    grouped = True if query.shape[1] != key.shape[1] else False  # noqa: SIM210 - a plain bool also while tracing
    if not query.is_cuda:
        return F.scaled_dot_product_attention(query, key, value, is_causal=True, enable_gqa=grouped)
    with sdpa_kernel(SDPBackend.CUDNN_ATTENTION):
        return F.scaled_dot_product_attention(query, key, value, is_causal=True, enable_gqa=grouped)
