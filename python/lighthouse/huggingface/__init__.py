"""Lighthouse in models of Hugging Face Transformers.

`wrapping.py` is the way into a wrapped model, `wrapped.py` what it does, `state.py` what it remembers,
`attention_interface.py` how the attention gets into its layers, `architectures.py` the models it knows, `originals.py`
what it replaces and `checks.py` what it is called with, each refused where it does not fit, `loss.py` the loss without
logits, `callback.py` the switch to dense in a Trainer, `trainer_state.py` what that leaves. `export.py`, the way to a
plain folder, needs the `train` extra: import it by name.
"""

from lighthouse.huggingface.architectures import ARCHITECTURES, Architecture, architecture_of
from lighthouse.huggingface.callback import LighthouseCallback
from lighthouse.huggingface.wrapped import WrappedModel
from lighthouse.huggingface.wrapping import wrap

__all__ = ["ARCHITECTURES", "Architecture", "LighthouseCallback", "WrappedModel", "architecture_of", "wrap"]
