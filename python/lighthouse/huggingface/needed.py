"""Fails where Transformers is missing or older than the package needs, before anything else is imported from it.

An old one would fail later, by a name that it does not have or by an error about a batch that is right.
"""

from __future__ import annotations

from lighthouse_doctor.facts import numbers, train_requirements

INSTALL = 'pip install "lighthouse-attn[train]"'


def check_transformers() -> None:
    """Raises `ImportError` naming the version that is found, the one that is needed, and the command to run."""
    try:
        import transformers
    except ImportError as error:
        if error.name == "transformers" and isinstance(error, ModuleNotFoundError):
            said = f"LighthouseWrapper needs Transformers, which is not installed: {INSTALL}"
        else:
            said = f"Transformers is installed but does not import: {error}; pip install --upgrade transformers"
        raise ImportError(said) from error
    found, oldest = transformers.__version__, dict(train_requirements() or ()).get("transformers")
    if oldest is not None and numbers(found) < numbers(oldest):
        raise ImportError(
            f"Transformers {found} is installed, {oldest} or later is needed: "
            f'pip install --upgrade "transformers>={oldest}"'
        )


check_transformers()
