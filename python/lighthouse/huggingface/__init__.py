"""Lighthouse in models of Hugging Face Transformers.

`wrapping.py` wraps a model, `wrapped.py` is what a wrapped model does, `state.py` what it remembers, `looking.py` the
check that it is unchanged, `attention_interface.py` the attention in its layers, `architectures.py` the supported
models. `originals.py` checks what Lighthouse replaces, `batches.py` what a model is called with, `checks.py` what of
that Lighthouse cannot honour; `trainers.py` finds what a Trainer that calls the model wants. `loss.py` is the loss
without logits, `switch.py` the switch to dense attention in a Trainer, `callback.py` the callback for any Trainer
script, `steps.py` what the steps used, `trainer_state.py` what a Trainer saves. `needed.py` fails where Transformers is
missing or too old. Export is in `lighthouse.export`.
"""

import lighthouse.huggingface.needed  # noqa: F401  # before what an old Transformers does not have
from lighthouse.huggingface.architectures import ARCHITECTURES, Architecture, architecture_of
from lighthouse.huggingface.callback import LighthouseCallback
from lighthouse.huggingface.wrapped import WrappedModel
from lighthouse.huggingface.wrapping import wrap

__all__ = ["ARCHITECTURES", "Architecture", "LighthouseCallback", "WrappedModel", "architecture_of", "wrap"]
