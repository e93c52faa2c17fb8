"""How much memory a training step needs, before it is tried.

The estimate counts weights, gradients, optimizer and loss, and what autograd keeps of each layer between forward and
backward, as Transformers' Llama computes it. The trap is to refuse what would fit: what PyTorch needs in addition (its
context, fragments, buffers of the data and of communication) is left out, so the number is a lower bound, and a run is
refused only if it is clearly above the whole memory of the device.

Its error: what autograd keeps is estimated within 1 % (a test counts it). The peak measured in a fresh process on a CPU
was 1.00 to 1.08 times the estimate, without the process's own half a GiB: 5M and 39M parameters, 512 to 8,192 tokens,
384 and 32,000 classes; dense and Lighthouse, float32, autocast and bfloat16, with and without checkpointing. On an H200
the compiled 30-layer model of bench/model_step.py took 72.9 GiB dense at 98,304 tokens, 57.1 with the published method
and 74.4 with a local window; the estimates are 72.7, 56.9 and 73.9.

PyTorch's own count, torch.distributed._tools.mem_tracker over a step on fake tensors, takes 2 to 11 s for the models
nano and small (torch 2.15, one thread), finds 26 to 31 % more for a dense step on a CPU, and does not see what compiled
code recomputes. So the bytes are counted here, for Llama.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from transformers import LlamaConfig

from lighthouse.core.settings import LighthouseSettings
from lighthouse.huggingface.loss import chunk_tokens
from lighthouse.training.model import empty_model, head_dim_of

GIB = 2**30

# An estimate above the memory by less than this is not refused.
MARGIN = 1.1

# Optimizer states, in numbers per weight, by how the Trainer's names for them begin; of others nothing is counted.
STATES = {"adamw_8bit": 0.5, "adamw_bnb": 0.5, "adamw": 2, "lion": 1, "rmsprop": 1, "adagrad": 1}

CHOICE_BYTES = 5  # per token and key-value head between forward and backward: a byte and an integer
CHECKPOINTED_CHOICE_BYTES = 13  # the scores too
LOGIT_BYTES = 12  # per logit where all are held: in the model's dtype, in float32, and their gradients


class DoesNotFit(ValueError):
    """A training step needs clearly more memory than there is."""


@dataclass(frozen=True)
class MemoryEstimate:
    """Bytes of a training step on one device. `str()` is a short table.

    `activations` is what the forward keeps for the backward, by part; `loss` and `backward` are the most that the loss
    and one layer's backward add to it.
    """

    weights: int
    gradients: int
    optimizer: int
    activations: dict[str, int]
    loss: int
    backward: int
    last_layer: int  # what is left of the activations when the gradients are complete
    accumulates: bool
    what: str

    @property
    def peak(self) -> int:
        """The most at once: where the backward begins, with all activations, or where it ends, with all gradients."""
        begin = sum(self.activations.values()) + max(self.loss, self.backward)
        if self.accumulates:
            begin += self.gradients
        return self.weights + self.optimizer + max(begin, self.gradients + self.last_layer)

    def __str__(self) -> str:
        rows = {"weights": self.weights, "optimizer": self.optimizer, "gradients": self.gradients}
        rows |= {f"activations: {part}": size for part, size in self.activations.items()}
        rows |= {"loss": self.loss, "one layer's backward": self.backward, "at once, at least": self.peak}
        width = max(map(len, rows))
        lines = [f"  {name:{width}}  {size / GIB:9.2f} GiB" for name, size in rows.items()]
        return "\n".join([f"{self.what}:", *lines])


def estimate(
    config: LlamaConfig,
    context: int,
    *,
    rows: int = 1,
    dtype: torch.dtype = torch.float32,
    bf16: bool = False,
    lighthouse: LighthouseSettings | None = None,
    gradient_checkpointing: bool = False,
    optimizer: str = "adamw_torch_fused",
    accumulation: int = 1,
    compiled: bool = False,
    logits: bool = False,
    shards: int = 1,
) -> MemoryEstimate:
    """The memory of a training step of `rows` sequences of `context` tokens on one device: a lower bound.

    Args:
        config: the model; its vocabulary is the tokenizer's.
        rows: sequences in a forward (`per_device_train_batch_size`).
        dtype: of weights, gradients and optimizer states.
        bf16: bfloat16 autocast, as Trainer has it with `--bf16`.
        lighthouse: the settings of the layers it acts in, or None for a dense step. The dense one is the larger
            without a local window, the smaller with one.
        gradient_checkpointing: of each layer only its input is kept, and its choice.
        optimizer: Trainer's name for it (`training.optim`).
        accumulation: forwards per step (`gradient_accumulation_steps`).
        compiled: `torch.compile`, which keeps less.
        logits: the plain model's loss, which holds all logits; a wrapped model's does not.
        shards: processes that weights, gradients and states are sharded over.
    """
    tokens, layers = rows * context, config.num_hidden_layers
    width, inner = config.hidden_size, config.intermediate_size
    heads, kv_heads = config.num_attention_heads, config.num_key_value_heads or config.num_attention_heads
    head_dim = head_dim_of(config)
    model = empty_model(config)
    count = sum(parameter.numel() for parameter in model.parameters())
    in_layers = sum(p.numel() for p in model.model.layers.parameters() if p.ndim == 2)

    stream = dtype.itemsize  # of the residual stream
    product = 2 if bf16 else stream  # of what matrix products read and write
    parts = _dense_layer(width, inner, heads, kv_heads, head_dim, stream, product, bf16, compiled)
    settings = None if lighthouse is None else lighthouse.for_layers(layers)
    acting = 0 if settings is None else sum(settings.acts_in_layer(layer, layers) for layer in range(layers))
    if settings is not None:
        # The pyramid keeps the sub-sequence instead of the tokens, and the choice; what follows keeps the output, which
        # compiled code makes again. A local window keeps what dense attention does, and of the sub-sequence the output.
        method = settings.method
        share, output = method.length(context) / context, product * heads * head_dim
        if not method.local_window:
            sub = parts["attention"] * share + (0 if compiled else output)
        else:
            sub = parts["attention"] + ((output + 4 * heads) * share if method.chooses else 0)
        sub += CHOICE_BYTES * kv_heads if method.chooses else 0
    layer = sum(parts.values())
    last_norm = tokens * width * ((stream if compiled else 4 + stream) + product)
    if gradient_checkpointing:
        choosing = acting if settings is not None and settings.method.chooses else 0
        kept = layers * width * stream + choosing * CHECKPOINTED_CHOICE_BYTES * kv_heads
        activations = {"inputs of layers": tokens * kept}
    else:
        activations = {name: tokens * layers * size for name, size in parts.items()}
        if settings is not None:
            dense = layers - acting
            activations["attention"] = int(tokens * (dense * parts["attention"] + acting * sub))
        if bf16 and not compiled:
            activations["weights in bfloat16"] = 2 * in_layers
    activations["last norm"] = last_norm

    held = count * dtype.itemsize // shards
    what = "dense" if settings is None else "Lighthouse"
    return MemoryEstimate(
        weights=held,
        gradients=held,
        optimizer=int(held * next((n for name, n in STATES.items() if optimizer.startswith(name)), 0)),
        activations=activations,
        loss=_loss(tokens, config.vocab_size, width, stream, dtype.itemsize, bf16, logits),
        backward=tokens * (width * stream + inner * product + (layer if gradient_checkpointing else 0)),
        last_layer=tokens * layer,
        accumulates=accumulation > 1,
        what=f"A {what} step of {rows} x {context:,} tokens, {count / 1e6:,.1f}M parameters",
    )


def _dense_layer(width, inner, heads, kv_heads, head_dim, stream, product, bf16, compiled) -> dict[str, int]:
    """Bytes per token that a layer keeps, by part."""
    attention = product * head_dim * 2 * (heads + kv_heads) + 4 * heads  # query, key, value, output; the softmax's sums
    if compiled:  # norms and activations are computed again
        return {
            "norms": 2 * width * stream,
            "projections": 2 * width * product,
            "attention": attention,
            "feed-forward": 3 * inner * product,
        }
    # A norm keeps its input in float32, and what it has normalised before the multiplication with its weight.
    norms = 2 * width * (4 + stream) + 2 * 4
    # Autocast makes a copy for each of the five products.
    projections = 5 * width * product if bf16 and stream != product else 2 * width * product
    return {
        "norms": norms,
        "projections": projections,
        "attention": attention,
        "feed-forward": 4 * inner * product,
    }


def _loss(tokens, vocabulary, width, stream, weight, bf16, logits) -> int:
    """The most that the loss holds; without logits, as `loss.py` computes it."""
    if logits:
        return tokens * vocabulary * LOGIT_BYTES
    matrix = vocabulary * width
    step = min(tokens, chunk_tokens(vocabulary))
    gradients = tokens * width * stream + 4 * matrix
    stretch = step * vocabulary * 8  # logits and their logarithmic softmax, float32
    forward = gradients + stretch + (2 * matrix if bf16 and weight != 2 else 0)
    backward = 2 * gradients + (weight * matrix if weight != 4 else 0)
    return max(forward, backward)


def check_memory(needed: MemoryEstimate, device: torch.device | str) -> None:
    """Raises `DoesNotFit`, a `ValueError`, where a step needs over a tenth more than the device has in all."""
    device = torch.device(device)
    there = device_memory(device)
    if there is None or needed.peak <= MARGIN * there:
        return
    ways = ["a shorter --context"]
    if "inputs of layers" not in needed.activations:
        ways.append("--gradient_checkpointing true")
    ways.append("a smaller --per_device_train_batch_size, or a smaller --model")
    raise DoesNotFit(
        f"out of memory: a training step needs at least {needed.peak / GIB:,.1f} GiB, but {_named(device)} has "
        f"{there / GIB:,.1f} GiB in all: use {', '.join(ways)}.\n{needed}"
    )


def device_memory(device: torch.device | str) -> int | None:
    """Bytes of memory of a GPU, or of the machine that this process may use; None where that is not known."""
    device = torch.device(device)
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).total_memory
    if device.type != "cpu":
        return None
    total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return min([total, *_cgroup_limits()])


def _cgroup_limits(root: Path = Path("/sys/fs/cgroup"), own: Path = Path("/proc/self/cgroup")) -> Iterator[int]:
    """The limits of this process's control groups and of those around them, of either version."""
    try:
        lines = own.read_text().splitlines()
    except OSError:
        return
    for line in lines:
        _, controllers, path = line.split(":", 2)
        if controllers and "memory" not in controllers.split(","):
            continue
        base, name = (root / "memory", "memory.limit_in_bytes") if controllers else (root, "memory.max")
        folder = base / path.lstrip("/")
        # In a container the path may be one of the host, which is not there: its own group is then the root.
        for group in (folder, *folder.parents):
            if group == root.parent:
                break
            try:
                yield int((group / name).read_text())
            except (OSError, ValueError):  # not there, or "max"
                continue


def _named(device: torch.device) -> str:
    return f"{device} ({torch.cuda.get_device_name(device)})" if device.type == "cuda" else "this machine"
