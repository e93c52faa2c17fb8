"""What a wrapped model is called with, a batch or the plain model's arguments, made into arguments by name and checked.

Without these checks a batch of the wrong kind fails inside of a layer, with a message that names neither the batch nor
the mistake. Values are read on a CPU, where it costs nothing, and of the first batch elsewhere: reading them waits for
the device, but an id outside of the vocabulary is a device-side assertion there, after which the process is lost.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn

from lighthouse.huggingface import originals, trainers
from lighthouse.huggingface.architectures import architecture_of
from lighthouse.huggingface.loss import IGNORE_INDEX
from lighthouse.huggingface.state import Stateful

A_BATCH = (
    'a batch is a mapping of tensors, such as {"input_ids": ids}, or {"input_ids": ids, "labels": labels}, with ids '
    "[batch, tokens]; one tensor of ids in a tuple or list is taken too"
)

_WHOLE = (torch.int32, torch.int64)  # what an embedding and a cross entropy take

# Labels that are the next tokens in so many places are no accident.
_SURELY_SHIFTED = 8


def named(args: tuple, kwargs: dict, names: Sequence[str]) -> tuple[dict[str, Any], bool]:
    """The arguments of a call by name, and whether it is `model(batch)`, which always gives a loss.

    `names` are the plain model's positional arguments. Raises `TypeError` for what is neither, and `TypeError` or
    `ValueError` for ids and embeddings that are no tensors of the right kind and shape.
    """
    first = args[0] if args else None
    if isinstance(first, (tuple, list)):
        if len(first) != 1 or not isinstance(first[0], torch.Tensor):
            raise TypeError(f"the batch is {_described(first)}: {A_BATCH}")
        first = {"input_ids": first[0]}
    is_batch = isinstance(first, Mapping)
    if is_batch and len(args) > 1:
        raise TypeError("model(batch) takes one mapping; further arguments are given by name")
    if len(args) > len(names):
        raise TypeError(f"forward takes at most {len(names)} positional arguments, {len(args)} were given")
    given: Any = first if is_batch else zip(names, args, strict=False)
    call = {**dict(given), **kwargs}
    _check_inputs(call)
    return call, is_batch


def labels_of(call: Mapping[str, Any]) -> torch.Tensor:
    """The input ids as labels; what a mask `[B, N]` hides is not predicted."""
    labels = call.get("input_ids")
    if labels is None:
        given = [name for name, value in call.items() if value is not None]
        only = f", only {', '.join(given)}" if given else ""
        raise ValueError(
            f"the batch has neither labels nor input_ids{only}: one of them is needed for the loss; {A_BATCH}"
        )
    mask = call.get("attention_mask")
    if isinstance(mask, torch.Tensor) and mask.shape == labels.shape:
        labels = labels.masked_fill(mask == 0, IGNORE_INDEX)
    return labels


def check(model: Stateful, call: Mapping[str, Any], chunked: bool) -> None:
    """Refuses, before the first layer runs, what none could take and what a Trainer would ask for in vain.

    `chunked` says that the loss is the one without logits. Raises `TypeError` or `ValueError`.
    """
    state, architecture = model._lighthouse, architecture_of(model)
    _check_one_input(call, model.config.hidden_size)
    name, labels = _given_labels(call)
    if chunked:
        _check_whole_numbers(name, labels)
    if labels is None and trainers.expects_loss() and originals.is_own(type(model).plain_class.forward):
        raise ValueError(
            "the Trainer's batch has no labels, so there is no loss: give each row labels=input_ids, or the Trainer "
            "data_collator=DataCollatorForLanguageModeling(tokenizer, mlm=False)"
        )
    needs = None if architecture.has_head(model) else trainers.needs_logits()
    if needs is not None:
        raise ValueError(
            f"the Trainer's {needs}: a bare {type(model).__name__} has no logits to give; use a "
            f"{architecture.causal.__name__}"
        )
    if torch.compiler.is_compiling():
        return
    embedding, ids = model.get_input_embeddings(), call.get("input_ids")
    _check_weights(model, embedding)
    if ids is not None and (ids.is_cpu or not state.saw_ids):
        _check_ids(ids, model, embedding)
        state.saw_ids = True
    if chunked and (labels.is_cpu or not state.saw_labels):
        _check_labels(call, architecture.output_layer(model))
        state.saw_labels = True


def _check_inputs(call: Mapping[str, Any]) -> None:
    ids, embeddings = call.get("input_ids"), call.get("inputs_embeds")
    if isinstance(ids, Mapping):
        raise TypeError(f"input_ids is a {type(ids).__name__}, a whole batch: call model(batch) or model(**batch)")
    if ids is not None:
        _check_whole_numbers("input_ids", ids)
        if ids.dim() != 2:
            one = "; for one sequence: input_ids[None]" if ids.dim() == 1 else ""
            raise ValueError(f"input_ids is {list(ids.shape)}: [batch, tokens] is needed{one}")
        if 0 in ids.shape:
            raise ValueError(f"input_ids is {list(ids.shape)}: at least one sequence and one token are needed")
    if embeddings is not None and not (isinstance(embeddings, torch.Tensor) and embeddings.dim() == 3):
        found = list(embeddings.shape) if isinstance(embeddings, torch.Tensor) else f"a {type(embeddings).__name__}"
        raise ValueError(f"inputs_embeds is {found}: a tensor [batch, tokens, hidden_size] is needed")


def _check_one_input(call: Mapping[str, Any], width: int) -> None:
    """Raises `ValueError` or `TypeError` unless there are ids or embeddings, and these are what the model has."""
    ids, embeddings = call.get("input_ids"), call.get("inputs_embeds")
    if (ids is None) == (embeddings is None):
        names = [name for name, value in call.items() if value is not None]
        only = f", only {', '.join(names)}" if names else ""
        found = f"neither input_ids nor inputs_embeds was given{only}" if ids is None else "both were given"
        raise ValueError(f"{found}: exactly one of input_ids and inputs_embeds is needed; {A_BATCH}")
    if embeddings is not None and not embeddings.is_floating_point():
        raise TypeError(f"inputs_embeds is of {embeddings.dtype}: embeddings are needed; token ids are input_ids")
    if embeddings is not None and embeddings.shape[2] != width:
        raise ValueError(f"inputs_embeds is {list(embeddings.shape)}: the model's hidden_size is {width}")


def _check_weights(model: nn.Module, embedding: nn.Module) -> None:
    """Raises `ValueError` for a model whose weights were never made."""
    weight = getattr(embedding, "weight", None)
    if isinstance(weight, torch.Tensor) and weight.is_meta and not hasattr(embedding, "_hf_hook"):
        raise ValueError(
            f'this {type(model).__name__} is on device "meta", without weights: make it on a device, or load its '
            "weights, first"
        )


def _check_ids(ids: torch.Tensor, model: Stateful, embedding: nn.Module) -> None:
    """Raises `ValueError` for token ids that the model's `embedding` does not have."""
    tokens = getattr(embedding, "num_embeddings", None)
    if not isinstance(tokens, int) or not _can_be_read(ids):
        return
    tokens = max(tokens, model.config.vocab_size)  # a part of it, where tensor parallelism has split it
    wrong = ids[(ids < 0) | (ids >= tokens)]
    if wrong.numel():
        raise ValueError(
            f"input_ids has {wrong[0].item()}, the model's vocabulary is 0 to {tokens - 1}: the tokenizer is not the "
            "model's; make the model with vocab_size=len(tokenizer), or model.resize_token_embeddings(len(tokenizer))"
        )


def _given_labels(call: Mapping[str, Any]) -> tuple[str, Any]:
    """The labels that count, and their name."""
    name = "labels" if call.get("shift_labels") is None else "shift_labels"
    return name, call.get(name)


def _check_labels(call: Mapping[str, Any], layer: nn.Module) -> None:
    """Raises `ValueError` for labels that the output `layer` has no logits for, or that are shifted already."""
    (name, labels), ids = _given_labels(call), call.get("input_ids")
    if not _can_be_read(labels):
        return
    classes = getattr(layer, "out_features", getattr(layer, "num_embeddings", None))
    above = labels >= classes if isinstance(classes, int) else torch.zeros_like(labels, dtype=torch.bool)
    wrong = labels[((labels < 0) & (labels != IGNORE_INDEX)) | above]
    if wrong.numel():
        raise ValueError(
            f"{name} has {wrong[0].item()}: token ids that the model has are needed, or {IGNORE_INDEX} for tokens that "
            "the loss ignores"
        )
    if name == "labels" and ids is not None and _can_be_read(ids) and ids.shape == labels.shape:
        ids, given = ids.to(labels.device), labels[:, :-1] != IGNORE_INDEX
        here, now, following = labels[:, :-1][given], ids[:, :-1][given], ids[:, 1:][given]
        if here.numel() >= _SURELY_SHIFTED and not torch.equal(here, now):
            if torch.equal(here, following):
                raise ValueError(
                    "labels are the next tokens already, and the loss shifts them itself: the model would learn the "
                    "token after the next; give labels=input_ids, or shift_labels=labels"
                )


def _check_whole_numbers(name: str, given: Any) -> None:
    if not isinstance(given, torch.Tensor):
        way = {
            "list": f"torch.tensor({name})",
            "tuple": f"torch.tensor({name})",
            "ndarray": f"torch.from_numpy({name})",
            "str": "the tokenizer makes them of text",
        }.get(type(given).__name__)
        raise TypeError(
            f"{name} is a {type(given).__name__}: a tensor of token ids [batch, tokens] is needed"
            + (f"; {way}" if way else "")
        )
    if given.dtype not in _WHOLE:
        way = "; embeddings are given as inputs_embeds" if given.is_floating_point() and name == "input_ids" else ""
        raise TypeError(f"{name} is of {given.dtype}: whole numbers are needed, {name}.long(){way}")


def _can_be_read(tensor: torch.Tensor) -> bool:
    """Not what only stands for a tensor: a fake one, or one without data."""
    return type(tensor) is torch.Tensor and not tensor.is_meta


def _described(given: Sequence) -> str:
    kinds = dict.fromkeys("a tensor" if isinstance(item, torch.Tensor) else type(item).__name__ for item in given)
    inside = " and ".join(list(kinds)[:3])
    return f"a {type(given).__name__} of {len(given)}" + (f" ({inside})" if kinds else "")
