"""Lighthouse Attention: training-only attention for very long sequences.

from lighthouse import LighthouseWrapper

model = LighthouseWrapper(LlamaModel(config), pool_ratios=[0.5, 0.25, 0.125], select_topk=1024)
loss = model(batch).loss
model = model.unwrap()
"""

from lighthouse.core.attention import attention
from lighthouse.core.checkpointing import checkpoint_contexts
from lighthouse.core.inner import inner_backend
from lighthouse.core.library import NativeLibraryError
from lighthouse.core.method import Method, plan
from lighthouse.core.operators import Selection
from lighthouse.core.plan import Plan
from lighthouse.core.selection import select
from lighthouse.core.sequences import SubSequences
from lighthouse.core.version import VERSION
from lighthouse.wrapper import LighthouseWrapper, unwrap

__version__ = VERSION

__all__ = [
    "LighthouseWrapper",
    "Method",
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
