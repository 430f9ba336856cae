"""A report as one HTML file: text, tables, charts and pictures, with nothing to load and no scripts.

The page is light or dark as the reader's system is, and reads at the width of a telephone and of a wide screen.
Content is added from top to bottom:

    page = Page("Training report", "my_lora, 2 epochs")
    page.section("Loss")
    page.line_chart({"loss": [(1, 0.9), (2, 0.5)]}, title="Loss", x_label="step", y_label="loss")
    page.facts([("steps", 2), ("pictures/s", 3.1)])
    text = page.html()

The caller writes the text where it wants, through `library.runtime.files` so that the file appears whole. All
strings are plain text and are escaped here; in `text`, `bullets` and `notice` words in `backticks` become code.
"""

from __future__ import annotations

import base64
import io
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from html import escape
from pathlib import Path
from typing import Any

from library import charts
from library.charts import Point, Series, number

__all__ = ["Page", "Series", "number"]

STYLE = Path(__file__).with_name("page.css").read_text(encoding="utf-8")
# No request leaves the page, whatever its texts hold.
POLICY = "default-src 'none'; img-src data:; style-src 'unsafe-inline'"
LONG_CAPTION = 160
LONG_CELL = 40
LEVELS = ("info", "good", "warning", "error")

Picture = Any  # bytes of a PNG, JPEG, WebP or GIF file, or a Pillow image


class Page:
    """One report. Methods add to the section that was opened last; before the first, to the page's head."""

    def __init__(self, title: str, lead: str = "") -> None:
        """
        Args:
            title: heading of the page and title of its window.
            lead: a line below the heading that says what the report is about.
        """
        self.title = title
        self._head = [f'<p class="lead">{_marked(lead)}</p>'] if lead else []
        self._sections: list[tuple[str, str, list[str]]] = []
        self._target = self._head

    def section(self, heading: str) -> str:
        """Open a section; it stands in the table of contents. Returns its id, for links and tests."""
        stem = re.sub(r"[^a-z0-9]+", "-", heading.lower()).strip("-") or "section"
        taken = {anchor for anchor, _, _ in self._sections}
        anchor = next(name for n in range(len(taken) + 1) if (name := f"{stem}-{n + 1}" if n else stem) not in taken)
        content: list[str] = []
        self._sections.append((anchor, heading, content))
        self._target = content
        return anchor

    def subsection(self, heading: str) -> None:
        """A smaller heading inside the section."""
        self._add(f"<h3>{escape(heading)}</h3>")

    def text(self, text: str) -> None:
        """A paragraph."""
        self._add(f"<p>{_marked(text)}</p>")

    def bullets(self, texts: Iterable[str], *, limit: int | None = None) -> None:
        """A list; what is over `limit` is counted, not shown."""
        texts = list(texts)
        shown = "".join(f"<li>{_marked(text)}</li>" for text in texts[:limit])
        if texts:
            self._add(f"<ul>{shown}</ul>{_more(len(texts), limit)}")

    def notice(self, text: str, level: str = "info") -> None:
        """A line that stands out; `level` is info, good, warning or error."""
        if level not in LEVELS:
            raise ValueError(f"level {level!r} is none of {LEVELS}")
        self._add(f'<p class="notice {level}"><strong>{level}</strong> {_marked(text)}</p>')

    def code(self, text: str) -> None:
        """Lines as they are, in a fixed-width font: a command, an equation, a tree."""
        self._add(f'<pre tabindex="0">{escape(text)}</pre>')

    def facts(self, pairs: Mapping[str, Any] | Iterable[tuple[str, Any]]) -> None:
        """Names with values, such as settings."""
        rows = _pairs(pairs)
        cells = "".join(f"<div><dt>{escape(str(name))}</dt><dd>{_cell(value)}</dd></div>" for name, value in rows)
        self._add(f'<dl class="facts">{cells}</dl>')

    def table(
        self, headers: Sequence[str], rows: Iterable[Sequence[Any]], *, caption: str = "", limit: int | None = None
    ) -> None:
        """A table; numbers stand at the right of their column.

        Args:
            headers: names of the columns.
            rows: cells: texts, numbers, or None for an empty one.
            caption: what the table shows.
            limit: rows over this number are counted, not shown.
        """
        rows = list(rows)
        head = "".join(f'<th scope="col">{escape(text)}</th>' for text in headers)
        body = "".join("<tr>" + "".join(map(_table_cell, row)) + "</tr>" for row in rows[:limit])
        name = f"<caption>{escape(caption)}</caption>" if caption else ""
        label = escape(caption or ", ".join(headers))
        self._add(
            f'<div class="scroll" role="region" aria-label="{label}" tabindex="0"><table>{name}'
            f"<thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>{_more(len(rows), limit)}"
        )

    def line_chart(
        self,
        series: Sequence[Series] | Mapping[str, Sequence[Point]],
        *,
        title: str,
        x_label: str,
        y_label: str,
        log_y: bool = False,
        marks: Iterable[tuple[float, str]] = (),
    ) -> None:
        """Lines over a common x; see `library.charts.line_chart`. Long lines are thinned, keeping their peaks."""
        chart = charts.line_chart(series, title=title, x_label=x_label, y_label=y_label, log_y=log_y, marks=marks)
        self._add(chart)

    def histogram(
        self,
        values: Sequence[float],
        *,
        title: str,
        x_label: str,
        y_label: str = "count",
        bins: int = 30,
        marks: Iterable[tuple[float, str]] = (),
    ) -> None:
        """How often values lie where; see `library.charts.histogram`."""
        self._add(charts.histogram(values, title=title, x_label=x_label, y_label=y_label, bins=bins, marks=marks))

    def bars(
        self,
        pairs: Mapping[str, float] | Iterable[tuple[str, float]],
        *,
        title: str,
        unit: str = "",
        limit: int | None = None,
    ) -> None:
        """Named amounts as horizontal bars, in the order given; what is over `limit` is counted, not shown."""
        rows = _pairs(pairs)
        self._add(charts.bars(rows[:limit], title=title, unit=unit) + _more(len(rows), limit))

    def picture(self, picture: Picture, caption: str, *, alt: str | None = None) -> None:
        """One picture, at most as wide as the page.

        Args:
            picture: bytes of a picture file, or a Pillow image.
            caption: text below it.
            alt: what is to be seen, for those who do not see it; the caption if not given.
        """
        self._add(_picture_html(picture, caption, alt))

    def picture_grid(self, pictures: Iterable[tuple[Picture, str]], *, width: int = 160) -> None:
        """Pictures with captions side by side, as many in a row as the page has room for.

        Args:
            pictures: (bytes or Pillow image, caption); the first of several lines is a name, and what is long is
                folded.
            width: least width of one in CSS pixels.
        """
        cells = "".join(_picture_html(picture, caption, None) for picture, caption in pictures)
        self._add(f'<div class="grid" style="--cell:{width}px">{cells}</div>')

    @contextmanager
    def details(self, summary: str, *, opened: bool = False) -> Iterator[None]:
        """Content of the `with` block can be folded away."""
        self._add(f"<details{' open' if opened else ''}><summary>{escape(summary)}</summary>")
        yield
        self._add("</details>")

    def html(self) -> str:
        """The whole page."""
        contents = "".join(f'<li><a href="#{anchor}">{escape(name)}</a></li>' for anchor, name, _ in self._sections)
        nav = f'<nav aria-label="Contents"><ul>{contents}</ul></nav>' if len(self._sections) > 1 else ""
        sections = "".join(
            f'<section aria-labelledby="{anchor}"><h2 id="{anchor}">{escape(name)}</h2>{"".join(content)}</section>\n'
            for anchor, name, content in self._sections
        )
        title = escape(self.title)
        return (
            '<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8">'
            f'<meta http-equiv="Content-Security-Policy" content="{POLICY}">'
            '<meta name="viewport" content="width=device-width, initial-scale=1">'
            f'<link rel="icon" href="data:,"><title>{title}</title><style>{STYLE}</style></head>\n'
            f"<body><header><h1>{title}</h1>{''.join(self._head)}</header>{nav}\n<main>{sections}</main></body></html>\n"
        )

    def _add(self, html: str) -> None:
        self._target.append(html)


def data_uri(picture: Picture) -> str:
    """A picture as the text that stands in the page instead of an address.

    Raises:
        ValueError: bytes of no picture format that browsers show.
    """
    if not isinstance(picture, (bytes, bytearray)):
        buffer = io.BytesIO()
        picture.save(buffer, "WEBP", quality=82)
        picture = buffer.getvalue()
    data = bytes(picture)
    return f"data:image/{_kind(data)};base64,{base64.b64encode(data).decode()}"


def _kind(data: bytes) -> str:
    if data[:4] == b"RIFF" and data[8:12] == b"WEBP":
        return "webp"
    signs = {b"\x89PNG": "png", b"\xff\xd8\xff": "jpeg", b"GIF8": "gif"}
    for sign, kind in signs.items():
        if data.startswith(sign):
            return kind
    raise ValueError("not the bytes of a PNG, JPEG, WebP or GIF file")


def _picture_html(picture: Picture, caption: str, alt: str | None) -> str:
    text = escape(alt if alt is not None else caption)
    return (
        f'<figure class="picture"><img src="{data_uri(picture)}" alt="{text}">'
        f"<figcaption>{_caption_html(caption)}</figcaption></figure>"
    )


def _caption_html(caption: str) -> str:
    name, _, rest = caption.rpartition("\n")
    head = f"<strong>{escape(name)}</strong> " if name else ""
    if len(rest) <= LONG_CAPTION:
        return head + escape(rest)
    start = rest[:LONG_CAPTION].rsplit(" ", 1)[0]
    return f"{head}<details><summary>{escape(start)} ...</summary>{escape(rest[len(start) :])}</details>"


def _pairs(pairs: Any) -> list[tuple[str, Any]]:
    return list(pairs.items() if isinstance(pairs, Mapping) else pairs)


def _marked(text: str) -> str:
    return re.sub(r"`([^`]+)`", r"<code>\1</code>", escape(text))


def _cell(value: Any) -> str:
    if value is None:
        return ""
    if isinstance(value, bool):
        return "yes" if value else "no"
    return number(value) if isinstance(value, (int, float)) else escape(str(value))


def _table_cell(value: Any) -> str:
    is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
    look = " class=amount" if is_number else " class=long" if len(str(value)) > LONG_CELL else ""
    return f"<td{look}>{_cell(value)}</td>"


def _more(count: int, limit: int | None) -> str:
    return f'<p class="quiet">and {count - limit:,} more</p>' if limit is not None and count > limit else ""
