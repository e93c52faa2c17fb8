"""Prints the folder of torch's headers in the environment of the Python that runs this, without importing torch."""

import importlib.metadata
import importlib.util
import os
import re
import sys

NEEDED = (2, 10)

spec = importlib.util.find_spec("torch")
if spec is None or spec.origin is None:
    sys.exit(f"{sys.prefix} has no torch")
version = importlib.metadata.version("torch")
if tuple(int(part) for part in re.findall(r"\d+", version)[:2]) < NEEDED:
    sys.exit(f"torch {version} in {sys.prefix} is too old")
print(os.path.join(os.path.dirname(spec.origin), "include"))
