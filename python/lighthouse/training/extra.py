"""Whether the extras are installed. Looks without importing, since importing it all takes seconds."""

from importlib.util import find_spec

EXTRAS = {
    "train": ("transformers", "accelerate", "datasets", "tensorboard", "matplotlib", "rich"),
    "tune": ("optuna",),
}


def require_train_extra() -> None:
    """Raises `ImportError` that names what is missing and the command that installs it."""
    _require("train", "pre-training")


def require_tune_extra() -> None:
    """The same of what tuning needs: the `train` extra too, which the `tune` extra installs."""
    _require("tune", "tuning")


def _require(extra: str, what: str) -> None:
    missing = [name for name in EXTRAS[extra] if find_spec(name) is None]
    if missing:
        raise ImportError(
            f'{what} needs {", ".join(missing)}, not installed here: pip install "lighthouse-attn[{extra}]"'
        )
