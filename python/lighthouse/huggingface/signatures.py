"""The arguments of a plain model's forward, as a wrapped model accepts them."""

from __future__ import annotations

import inspect
from typing import Any


def positional_names(plain: Any) -> list[str]:
    """Names of the arguments of `plain.forward`, or of the nearest base that names them if it has `*args`."""
    for cls in plain.__mro__:
        parameters = inspect.signature(cls.forward).parameters.values()
        if not any(parameter.kind is parameter.VAR_POSITIONAL for parameter in parameters):
            break
    return [p.name for p in parameters if p.kind is p.POSITIONAL_OR_KEYWORD and p.name != "self"]


def with_labels(signature: inspect.Signature) -> inspect.Signature:
    """The plain forward's signature, with `labels` where it has none."""
    parameters = dict(signature.parameters)
    if "labels" not in parameters:
        labels = inspect.Parameter("labels", inspect.Parameter.KEYWORD_ONLY, default=None)
        rest = [name for name, parameter in parameters.items() if parameter.kind is parameter.VAR_KEYWORD]
        last = {name: parameters.pop(name) for name in rest}
        parameters = {**parameters, "labels": labels, **last}
    return signature.replace(parameters=list(parameters.values()))
