"""The version of the installed package."""

from importlib.metadata import PackageNotFoundError, version

try:
    VERSION = version("lighthouse-attn")
except PackageNotFoundError:  # the sources on the path without an installation
    VERSION = "0+unknown"
