"""The kit of HTML reports: one file, nothing to load, all texts escaped, all numbers there."""

from __future__ import annotations

import io
import re
from html.parser import HTMLParser

import pytest
from PIL import Image

from library.charts import Series, linear_axis, log_axis, number
from library.page import Page

VOID = {"meta", "link", "img"}


class Reader(HTMLParser):
    """Collects what the tests ask of a page, and fails where tags do not close in order."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict]] = []
        self.open: list[str] = []
        self.words: list[str] = []
        self.feed(html)
        assert not self.open

    def handle_starttag(self, tag: str, attrs: list) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.words.append(data)

    @property
    def text(self) -> str:
        return " ".join(self.words)

    def all(self, tag: str) -> list[dict]:
        return [attributes for name, attributes in self.tags if name == tag]


def full_page() -> Page:
    page = Page("A <title>", "about `code` & more")
    page.section("Loss")
    page.line_chart(
        [Series("raw", [(0, 1.0), (1, float("nan")), (2, 0.5)], faint=True), Series("smooth", [(0, 0.9), (2, 0.6)])],
        title="Loss",
        x_label="step",
        y_label="loss",
        marks=[(1, "epoch <1>"), (99, "outside")],
    )
    page.line_chart({"rate": [(0, 1e-4), (1, 0)]}, title="Rate", x_label="step", y_label="rate", log_y=True)
    page.section("Loss")
    page.facts({"steps": 1234, "resumed": False, "name": "<b>"})
    page.table(["picture", "loss"], [["a<b.png", 0.25], ["c.png", None]], caption="Hardest", limit=1)
    page.histogram([3, 3, 80], title="Tokens", x_label="tokens", marks=[(75, "cut")])
    page.bars({"512x512": 3, "<x>": 1}, title="Buckets", unit="pictures")
    page.bullets(["one", "two"], limit=1)
    page.notice("look", "warning")
    page.code("a < b")
    with page.details("more"):
        page.text("folded")
    page.subsection("Pictures")
    page.picture(Image.new("RGB", (4, 3), "red"), 'a "red" one')
    page.picture_grid([(Image.new("RGB", (4, 3), "blue"), "blue")])
    return page


def test_page_is_one_file_with_its_parts_in_order() -> None:
    html = full_page().html()
    reader = Reader(html)
    assert not reader.all("script")
    addresses = [a.get("src") or a.get("href") for t in ("img", "link", "a") for a in reader.all(t)]
    assert all(address.startswith(("data:", "#")) for address in addresses)
    assert not re.search(r"url\(|@import|https?:", html)
    assert [a["id"] for a in reader.all("h2")] == ["loss", "loss-2"]
    assert {a["href"] for a in reader.all("a")} == {"#loss", "#loss-2"}
    assert all(a["alt"] for a in reader.all("img"))
    assert all(a["aria-label"] for a in reader.all("svg"))
    assert reader.all("html")[0]["lang"] == "en" and reader.all("title")


def test_texts_are_shown_as_they_are() -> None:
    reader = Reader(full_page().html())
    for text in ("A <title>", "a<b.png", "<b>", "<x>", "epoch <1>", "a < b", "1,234", "0.25", "code"):
        assert text in reader.text
    assert not reader.all("b") and not reader.all("x")
    assert "c.png" not in reader.text and "and 1 more" in reader.text and "outside" not in reader.text


def test_bytes_of_pictures_stand_as_they_are() -> None:
    buffer = io.BytesIO()
    Image.new("RGB", (2, 2)).save(buffer, "PNG")
    page = Page("x")
    page.picture(buffer.getvalue(), "png")
    assert "data:image/png;base64,iVBOR" in page.html()
    with pytest.raises(ValueError, match="not the bytes"):
        page.picture(b"<svg onload=1>", "bad")


def test_a_long_line_is_thinned_and_keeps_its_peak() -> None:
    page = Page("x")
    points = [(i, 1.0) for i in range(100_000)]
    points[54_321] = (54_321, 9.0)
    page.line_chart({"loss": points}, title="t", x_label="x", y_label="y")
    html = page.html()
    path = re.search(r'class="line c0" d="([^"]*)"', html).group(1)
    assert path.count("L") < 2000
    assert "L543.2 100.0" in path  # share 0.9 of the axis 0..10


@pytest.mark.parametrize("points", [[], [(0, float("nan"))]])
def test_a_chart_without_values_says_so(points: list) -> None:
    page = Page("x")
    page.line_chart({"a": points}, title="t", x_label="x", y_label="y")
    page.histogram([], title="t", x_label="x")
    page.bars([], title="t")
    assert page.html().count("No values.") == 3


@pytest.mark.parametrize(
    ("value", "step", "text"),
    [(12345, 0, "12,345"), (0.25, 0.25, "0.25"), (0.5, 0.25, "0.50"), (0.2, 0.1, "0.2"), (1e-5, 0, "1e-05"),
     (3.0, 0, "3"), (3.14159, 0, "3.142"), (float("inf"), 0, "inf")],
)  # fmt: skip
def test_numbers_are_written_for_people(value: float, step: float, text: str) -> None:
    assert number(value, step) == text


@pytest.mark.parametrize(("low", "high"), [(0, 1), (3, 3), (0, 0), (-5, 12), (0.001, 0.0012), (1e6, 1e7)])
def test_axes_have_round_ticks_around_the_values(low: float, high: float) -> None:
    axis = linear_axis(low, high)
    assert axis.low <= low <= high <= axis.high
    assert 3 <= len(axis.ticks) <= 8


def test_log_axis() -> None:
    axis = log_axis(2e-5, 3e-3)
    assert (axis.low, axis.high) == (1e-5, 1e-2)
    assert axis.share(1e-5) == 0 and axis.share(1e-2) == 1
