"""Lighthouse in models of Hugging Face Transformers.

`wrapped.py` is what a wrapped model does, `attention_interface.py` how the attention gets into its layers,
`architectures.py` the models it knows, `checks.py` what it refuses, `loss.py` the loss without logits, `callback.py`
the switch to dense in a Trainer. `export.py`, the way to a plain folder, needs the `train` extra: import it by name.
"""

from lighthouse.huggingface.architectures import ARCHITECTURES, Architecture, architecture_of
from lighthouse.huggingface.callback import LighthouseCallback
from lighthouse.huggingface.wrapped import WrappedModel, wrap

__all__ = ["ARCHITECTURES", "Architecture", "LighthouseCallback", "WrappedModel", "architecture_of", "wrap"]
