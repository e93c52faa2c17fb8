"""Whether the `train` extra is installed. Looks without importing, since importing it all takes seconds."""

from importlib.util import find_spec

NEEDED = ("transformers", "accelerate", "datasets", "tensorboard", "matplotlib", "rich")


def require_train_extra() -> None:
    """Raises `ImportError` that names what is missing and the command that installs it."""
    missing = [name for name in NEEDED if find_spec(name) is None]
    if missing:
        raise ImportError(
            f'pre-training needs {", ".join(missing)}, not installed here: pip install "lighthouse-attn[train]"'
        )
