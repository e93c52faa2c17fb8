"""A report that is one HTML file without anything from elsewhere, and the same as Markdown with its pictures beside it.

    page = Page("Comparison", "Two runs from the same weights.")
    page.section("Speed")
    page.text("Where the `dense` run stood.")
    page.table(("run", "time"), [("dense", "2:12"), ("two-stage", "1:30")])
    page.figure("time", figure, "loss against time")             # a matplotlib Figure
    page.checklist([Check("the speed-up is there", True, "1.47 times")])
    for name, content in page.files().items(): ...               # report.html, report.md, time.png

Every text is escaped; only `code` between backticks is markup. Pictures are seen at a phone's width too: in a `Figure`
of about 5.5 x 3.8 inches, as `new_figure` gives it, letters stay readable there.
"""

from __future__ import annotations

import base64
import html
import io
import re
from collections.abc import Sequence
from dataclasses import dataclass

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
        """A word for what is not ticked, else nothing."""
        return {True: "", False: "failed", None: "not checked"}[self.passed]


class Page:
    """A title, what is said below it, and parts in the order in which they are added."""

    def __init__(self, title: str, lead: str = ""):
        self.title = title
        self._html: list[str] = []
        self._markdown: list[str] = [f"# {title}"]
        self._pictures: dict[str, bytes] = {}
        if lead:
            self.text(lead)

    def section(self, heading: str) -> None:
        self._add(f"<h2>{_inline(heading)}</h2>", f"## {heading}")

    def text(self, text: str) -> None:
        """A paragraph."""
        self._add(f"<p>{_inline(text)}</p>", text)

    def code(self, text: str) -> None:
        """Lines as they are: a command, a file."""
        text = text.rstrip("\n")
        self._add(f"<pre>{html.escape(text)}</pre>", f"```\n{text}\n```")

    def table(self, head: Sequence, rows: Sequence[Sequence], caption: str = "") -> None:
        """Cells are turned into text. The first column names the row, the others stand to the right."""
        cells = [[str(cell) for cell in row] for row in rows]

        def line(row, tag):
            return "<tr>" + "".join(f"<{tag}>{_inline(cell)}</{tag}>" for cell in row) + "</tr>"

        body = "".join(line(row, "td") for row in cells)
        below = f'<p class="caption">{_inline(caption)}</p>' if caption else ""
        table = f"<table><thead>{line(map(str, head), 'th')}</thead><tbody>{body}</tbody></table>"
        marks = ["---", *["---:"] * (len(head) - 1)]
        lines = [_markdown_row(map(str, head)), _markdown_row(marks), *map(_markdown_row, cells)]
        self._add(f'<div class="wide">{table}</div>{below}', "\n".join(lines) + (f"\n\n{caption}" if caption else ""))

    def figure(self, name: str, figure: Figure, alt: str) -> None:
        """A picture, `name.png` in Markdown; `alt` says what is seen, also below it."""
        picture = _png(figure)
        self._pictures[f"{name}.png"] = picture
        source = f"data:image/png;base64,{base64.b64encode(picture).decode()}"
        self._add(
            f'<figure><img alt="{html.escape(alt)}" src="{source}"><figcaption>{_inline(alt)}</figcaption></figure>',
            f"![{alt}]({name}.png)",
        )

    def checklist(self, checks: Sequence[Check]) -> None:
        """What holds is ticked; what does not, or could not be checked, is said to; the evidence stands behind each."""
        kind = {"": "passed", "failed": "failed", "not checked": "open"}
        heads = [check.what + (f": {check.verdict}" if check.verdict else "") for check in checks]
        lines = [
            f'<li class="{kind[check.verdict]}"><strong>{_inline(head)}</strong><br>{_inline(check.evidence)}</li>'
            for head, check in zip(heads, checks, strict=True)
        ]
        marks = [
            f"- [{'x' if check.passed else ' '}] **{head}**: {check.evidence}"
            for head, check in zip(heads, checks, strict=True)
        ]
        self._add(f'<ul class="checks">{"".join(lines)}</ul>', "\n".join(marks))

    def html(self) -> str:
        return _FRAME.format(title=html.escape(self.title), body="\n".join(self._html))

    def markdown(self) -> str:
        return "\n\n".join(self._markdown) + "\n"

    def files(self) -> dict[str, bytes]:
        """By name: the page, its Markdown, and the pictures that this names."""
        texts = {HTML: self.html(), MARKDOWN: self.markdown()}
        return {name: text.encode() for name, text in texts.items()} | self._pictures

    def _add(self, as_html: str, as_markdown: str) -> None:
        self._html.append(as_html)
        self._markdown.append(as_markdown)


def new_figure(inches: tuple[float, float] = INCHES) -> Figure:
    """An empty figure with a canvas, which needs no display."""
    figure = Figure(figsize=inches, dpi=160, layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def _png(figure: Figure) -> bytes:
    target = io.BytesIO()
    figure.savefig(target, format="png")
    return target.getvalue()


def _inline(text: str) -> str:
    return re.sub("`([^`]+)`", r"<code>\1</code>", html.escape(str(text)))


def _markdown_row(cells) -> str:
    return "| " + " | ".join(cell.replace("|", "\\|").replace("\n", " ") for cell in cells) + " |"


_FRAME = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">
<title>{title}</title>
<style>
body {{ font: 16px/1.5 system-ui, sans-serif; max-width: 74rem; margin: 1.5rem auto; padding: 0 1rem; color: #111827;
  overflow-wrap: break-word }}
h1 {{ font-size: 1.6rem; line-height: 1.25 }}
h2 {{ font-size: 1.2rem; margin-top: 2rem; border-bottom: 1px solid #e5e7eb; padding-bottom: .2rem }}
p {{ max-width: 46rem }}
.wide {{ overflow-x: auto; margin: 1rem 0 .4rem }}
table {{ border-collapse: collapse; font-variant-numeric: tabular-nums; font-size: .92rem }}
th, td {{ padding: .25rem .7rem; border-bottom: 1px solid #e5e7eb; text-align: right; vertical-align: top }}
th:first-child, td:first-child {{ text-align: left; padding-left: 0 }}
figure {{ display: inline-block; width: min(100%, 35rem); margin: .5rem 1rem .5rem 0; vertical-align: top }}
img {{ width: 100% }}
figcaption, .caption {{ color: #4b5563; font-size: .92rem; margin-top: 0 }}
pre {{ background: #f3f4f6; padding: .7rem; font-size: .85rem; white-space: pre-wrap; overflow-wrap: anywhere }}
code {{ background: #f3f4f6; padding: 0 .2em; overflow-wrap: anywhere }}
.checks {{ list-style: none; padding: 0; max-width: 46rem }}
.checks li {{ position: relative; padding: .3rem 0 .3rem 2rem }}
.checks li::before {{ position: absolute; left: .2rem; font-weight: bold; font-size: 1.2rem; line-height: 1.3 }}
.passed::before {{ content: "\\2713"; color: #047857 }}
.failed::before {{ content: "\\2717"; color: #b91c1c }}
.failed strong {{ color: #b91c1c }}
.open::before {{ content: "?"; color: #b45309 }}
.open strong {{ color: #b45309 }}
</style></head><body>
<h1>{title}</h1>
{body}
</body></html>
"""
