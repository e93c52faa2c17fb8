"""What is shown to people: tables for the terminal, pictures, and pages that need no other file."""

from lighthouse.report.table import table

__all__ = ["table"]
