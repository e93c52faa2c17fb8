"""The page of a report: one HTML file that needs no other, and its Markdown twin."""

from __future__ import annotations

import base64
import re

import pytest

pytest.importorskip("matplotlib")

from lighthouse.report.page import Check, Page, new_figure  # noqa: E402


@pytest.fixture(scope="module")
def page():
    page = Page("A <title> & more", "What was done with `--steps 3`.")
    page.section("Speed")
    page.table(("run", "loss|time"), [("dense", 2.5), ("<b>two</b>", "1:30")], "nats per token")
    figure = new_figure()
    figure.add_subplot().plot([1, 2])
    page.figure("time", figure, 'loss "against" time')
    page.checklist(
        [
            Check("it is faster", True, "1.47 times"),
            Check("it is better", False, "2.54 against 2.50"),
            Check("it is quiet", None, "?"),
        ]
    )
    page.code("lighthouse compare --steps <N>\n")
    return page


def test_the_page_needs_nothing_else(page):
    assert not re.search(r'(src|href)="(?!data:)', page.html()) and "url(" not in page.html()
    [picture] = re.findall(r'src="data:image/png;base64,([^"]+)"', page.html())
    assert base64.b64decode(picture) == page.files()["time.png"] != b""


def test_text_is_text_in_the_page(page):
    for part in (
        "A &lt;title&gt; &amp; more",
        "<code>--steps 3</code>",
        "<td>&lt;b&gt;two&lt;/b&gt;</td>",
        "&lt;N&gt;",
    ):
        assert part in page.html(), part
    assert 'alt="loss &#34;against&#34; time"' in page.html()


def test_a_failed_check_is_shown_as_failed(page):
    assert '<li class="passed"><strong>it is faster</strong>' in page.html()
    assert '<li class="failed"><strong>it is better: failed</strong><br>2.54 against 2.50' in page.html()
    assert "- [x] **it is faster**: 1.47 times\n- [ ] **it is better: failed**: 2.54 against 2.50" in page.markdown()


def test_a_check_that_could_not_be_made_is_neither_ticked_nor_failed(page):
    assert '<li class="open"><strong>it is quiet: not checked</strong><br>?' in page.html()
    assert "- [ ] **it is quiet: not checked**: ?" in page.markdown()


def test_the_markdown_twin(page):
    files = page.files()
    assert list(files) == ["report.html", "report.md", "time.png"]
    text = files["report.md"].decode()
    for part in ("# A <title> & more\n", "| run | loss\\|time |\n| --- | ---: |\n| dense | 2.5 |", "](time.png)"):
        assert part in text, part
    assert text.endswith("```\nlighthouse compare --steps <N>\n```\n")
