"""Finds and loads the native library, which registers the operators torch.ops.lighthouse.*."""

from __future__ import annotations

import os
import re
from collections.abc import Iterable
from pathlib import Path

import torch

LIBRARY = "liblighthouse.so"
NAMESPACE = "lighthouse"
OLDEST_TORCH = (2, 10)


class NativeLibraryError(ImportError):
    """The native library is missing or does not load; the message says where it was searched for, and what to do."""


def load(folders: Iterable[str]) -> Path:
    """Loads the library from the first of the package's folders that has it (an editable install has two)."""
    version = tuple(int("".join(filter(str.isdigit, part)) or 0) for part in torch.__version__.split(".")[:2])
    if version < OLDEST_TORCH:
        raise NativeLibraryError(
            f"lighthouse needs torch {OLDEST_TORCH[0]}.{OLDEST_TORCH[1]} or later and found {torch.__version__}: "
            'pip install --upgrade "torch>=2.10"'
        )
    paths = [Path(folder) / LIBRARY for folder in folders]
    path = next((path for path in paths if path.is_file()), None)
    if path is None:
        looked = "\n  ".join(map(str, paths))
        raise NativeLibraryError(
            f"the native library {LIBRARY} does not exist; looked for\n  {looked}\n"
            "It is built by installing: run `pip install .` in a checkout (`make test` in a development checkout)."
        )
    if os.path.realpath(path) not in torch.ops.loaded_libraries:
        _check_that_the_namespace_is_free()
    try:
        torch.ops.load_library(str(path))
    except OSError as error:
        raise NativeLibraryError(
            f"the native library {path} does not load: {error}\n"
            f"It may be damaged or built for another machine (torch here is {torch.__version__}): reinstall with "
            "`pip install --force-reinstall --no-deps lighthouse-attn`."
        ) from error
    return path


def _check_that_the_namespace_is_free() -> None:
    """Refuses to register operators twice: loading the library would then end the process."""
    operators = sorted(name for name in torch._C._dispatch_get_all_op_names() if name.startswith(f"{NAMESPACE}::"))
    if operators:
        found = f"{operators[0]} already exists"
    else:
        try:
            torch.library.Library(NAMESPACE, "DEF")._destroy()
            return
        except RuntimeError as error:
            found = " ".join(re.findall(r"Previous registration .*?registered at [^;]*", str(error))) or str(error)
    raise NativeLibraryError(
        f"the namespace torch.ops.{NAMESPACE}, in which lighthouse registers its operators, is taken in this process: "
        f"{found}. It is a second copy of lighthouse, or another package that uses the name: import only one of them."
    )
