"""Lighthouse Attention: training-only attention for very long sequences.

from lighthouse import LighthouseWrapper

model = LighthouseWrapper(LlamaModel(config), pool_ratios=[0.5, 0.25, 0.125], select_topk=1024)
loss = model(batch).loss
model = model.unwrap()
"""

from importlib.metadata import PackageNotFoundError, version

from lighthouse._library import NativeLibraryError
from lighthouse.attention import attention
from lighthouse.checkpointing import checkpoint_contexts
from lighthouse.inner import SubSequences, inner_backend
from lighthouse.plan import Plan, plan
from lighthouse.selection import Selection, select
from lighthouse.wrapper import LighthouseWrapper, unwrap

try:
    __version__ = version("lighthouse-attn")
except PackageNotFoundError:  # the sources on the path without an installation
    __version__ = "0+unknown"

__all__ = [
    "LighthouseWrapper",
    "NativeLibraryError",
    "Plan",
    "Selection",
    "SubSequences",
    "attention",
    "checkpoint_contexts",
    "inner_backend",
    "plan",
    "select",
    "unwrap",
]
