"""The version of the installed package."""

from importlib.metadata import PackageNotFoundError, version

try:
    VERSION = version("lighthouse-attn")
except PackageNotFoundError:  # sources on the path that are not installed
    VERSION = "0+unknown"
