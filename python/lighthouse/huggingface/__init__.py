"""Lighthouse in models of Hugging Face Transformers.

`wrapped.py` is what a wrapped model does, `attention_interface.py` how the attention gets into its layers,
`architectures.py` the models it knows, `checks.py` what it refuses, `loss.py` the loss without logits.
"""

from lighthouse.huggingface.architectures import ARCHITECTURES, Architecture, architecture_of
from lighthouse.huggingface.wrapped import WrappedModel, wrap

__all__ = ["ARCHITECTURES", "Architecture", "WrappedModel", "architecture_of", "wrap"]
