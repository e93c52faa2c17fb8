"""A report that is one HTML file without anything from elsewhere, and the same as Markdown with its pictures beside it.

    page = Page("Comparison", "Two runs from the same weights.")
    page.section("Speed")
    page.text("How the `dense` run ended.")
    page.table(("run", "time"), [("dense", "2:12"), ("two-stage", "1:30")])
    page.figure("time", figure, "loss against time")             # a matplotlib Figure
    page.checklist([Check("faster than dense", True, "1.47 times")])
    for name, content in page.files().items(): ...               # report.html, report.md, time.png

Every text is escaped; only `code` between backticks is markup. Letters stay readable at a phone's width in a `Figure`
of about 5.5 x 3.8 inches, as `new_figure` gives it.
"""

from __future__ import annotations

import base64
import io
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup, escape
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

HTML, MARKDOWN = "report.html", "report.md"
INCHES = (5.5, 3.8)


@dataclass(frozen=True)
class Check:
    """A line of a checklist: what is claimed, whether this report's evidence shows it, and that evidence.

    `passed` is None where the check could not be made: nothing is shown, for or against it.
    """

    what: str
    passed: bool | None
    evidence: str

    @property
    def verdict(self) -> str:
        """A word for a line that is not ticked, else nothing."""
        return {True: "", False: "failed", None: "not checked"}[self.passed]


class Page:
    """A title, the lead below it, and parts in the order in which they are added."""

    def __init__(self, title: str, lead: str = ""):
        self.title = title
        self._parts: list[tuple[str, Any]] = []  # as templates/page.html.j2 takes them
        self._markdown: list[str] = [f"# {title}"]
        self._figures: dict[str, Figure] = {}
        if lead:
            self.text(lead)

    def section(self, heading: str) -> None:
        self._add("section", heading, f"## {heading}")

    def text(self, text: str) -> None:
        """A paragraph."""
        self._add("text", text, text)

    def code(self, text: str) -> None:
        """Lines as they are: a command, a file."""
        text = text.rstrip("\n")
        self._add("code", text, f"```\n{text}\n```")

    def table(self, head: Sequence[Any], rows: Sequence[Sequence[Any]], caption: str = "") -> None:
        """Cells are turned into text. The first column names the row, the others stand to the right."""
        marks = ["---", *["---:"] * (len(head) - 1)]
        lines = map(_markdown_row, (head, marks, *rows))
        markdown = "\n".join(lines) + (f"\n\n{caption}" if caption else "")
        self._add("table", {"head": head, "rows": rows, "caption": caption}, markdown)

    def figure(self, name: str, figure: Figure, alt: str) -> None:
        """A picture, `name.png` in Markdown; `alt` describes it, also below it."""
        self._figures[f"{name}.png"] = figure
        self._add("figure", {"alt": alt, "name": f"{name}.png"}, f"![{alt}]({name}.png)")

    def checklist(self, checks: Sequence[Check]) -> None:
        """Lines that hold are ticked; others say that they failed or were not checked; the evidence follows each."""
        kind = {"": "passed", "failed": "failed", "not checked": "open"}
        heads = [check.what + (f": {check.verdict}" if check.verdict else "") for check in checks]
        shown = list(zip(checks, heads, strict=True))
        lines = [{"kind": kind[check.verdict], "head": head, "evidence": check.evidence} for check, head in shown]
        marks = [f"- [{'x' if check.passed else ' '}] **{head}**: {check.evidence}" for check, head in shown]
        self._add("checklist", lines, "\n".join(marks))

    def html(self) -> str:
        pictures = {name: base64.b64encode(picture).decode() for name, picture in self._pictures.items()}
        return render("page.html.j2", title=self.title, parts=self._parts, pictures=pictures)

    def markdown(self) -> str:
        return "\n\n".join(self._markdown) + "\n"

    def files(self) -> dict[str, bytes]:
        """By name: the page, its Markdown, and the pictures that this names."""
        texts = {HTML: self.html(), MARKDOWN: self.markdown()}
        return {name: text.encode() for name, text in texts.items()} | self._pictures

    @cached_property
    def _pictures(self) -> dict[str, bytes]:
        """Drawn when first asked for, after the last part was added."""
        return {name: png_of(figure) for name, figure in self._figures.items()}

    def _add(self, kind: str, part: Any, markdown: str) -> None:
        self._parts.append((kind, part))
        self._markdown.append(markdown)


def render(template: str, **values: Any) -> str:
    """A page of `templates`, with every value escaped."""
    pages = Environment(
        loader=FileSystemLoader(Path(__file__).parent / "templates"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    pages.filters["inline"] = _inline
    return pages.get_template(template).render(values) + "\n"


def new_figure(inches: tuple[float, float] = INCHES) -> Figure:
    """An empty figure with a canvas, which needs no display."""
    figure = Figure(figsize=inches, dpi=160, layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def png_of(figure: Figure) -> bytes:
    target = io.BytesIO()
    figure.savefig(target, format="png")
    return target.getvalue()


def _inline(text: Any) -> Markup:
    return Markup(re.sub("`([^`]+)`", r"<code>\1</code>", str(escape(str(text)))))


def _markdown_row(cells: Iterable[Any]) -> str:
    return "| " + " | ".join(str(cell).replace("|", "\\|").replace("\n", " ") for cell in cells) + " |"
