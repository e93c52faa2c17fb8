"""A comparison of runs for people: a table for the terminal and a picture."""

from lighthouse.report.picture import draw
from lighthouse.report.table import table

__all__ = ["draw", "table"]
