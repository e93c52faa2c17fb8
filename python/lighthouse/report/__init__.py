"""A comparison of runs for people: a table for the terminal and a picture."""

from lighthouse.report.picture import draw
from lighthouse.report.table import same_time, table

__all__ = ["draw", "same_time", "table"]
