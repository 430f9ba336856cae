"""Charts as pieces of HTML: drawn as SVG that stretches with the page, labelled with ordinary text beside it.

The lines stretch, the text does not, so a chart reads the same at any width. Colours and layout are classes of
`library/page.py`. Every chart has a text form of its numbers for those who cannot see it.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from html import escape

Point = tuple[float, float]

# More points than this on one line are more than a screen can show.
LARGEST_LINE = 800
COLOURS = 6
UNITS = 1000  # width and height of the drawing's own coordinates


@dataclass(frozen=True)
class Series:
    """One line of a chart.

    Attributes:
        name: for the legend; none is shown for "".
        points: (x, y) in order of x; the line has a gap where y is not finite.
        faint: draw it pale and thin, for raw values under a smoothed line of the same colour.
        colour: number of the colour; None: the next one.
    """

    name: str
    points: Sequence[Point]
    faint: bool = False
    colour: int | None = None


@dataclass(frozen=True)
class Axis:
    """Where values of one axis lie, as shares of its length."""

    low: float
    high: float
    ticks: tuple[float, ...]
    log: bool = False

    def share(self, value: float) -> float:
        """0 at the lower end, 1 at the upper end."""
        scale = math.log10 if self.log else float
        low = scale(self.low)
        return (scale(value) - low) / (scale(self.high) - low)


def number(value: float, step: float = 0) -> str:
    """A number as people read it: `12,345`, `0.25`, `1e-05`.

    Args:
        value: the number.
        step: distance to its neighbours, which says how many decimals are needed.
    """
    if not math.isfinite(value):
        return str(value)
    size = abs(value)
    if value == int(value) and size < 1e15:
        return f"{int(value):,}"
    if size < 1e-3 or size >= 1e6:
        return f"{value:.3g}"
    if step:
        decimals = max(0, -math.floor(math.log10(step)))
        whole = abs(step * 10**decimals - round(step * 10**decimals)) < 1e-6
        return f"{value:,.{decimals if whole else decimals + 1}f}"
    return f"{value:.4g}"


def linear_axis(low: float, high: float, *, count: int = 5) -> Axis:
    """An axis with round ticks that holds both values."""
    if low == high:
        low, high = (low - 1, high + 1) if low else (0, 1)
    rough = (high - low) / count
    unit = 10 ** math.floor(math.log10(rough))
    step = next(unit * factor for factor in (1, 2, 2.5, 5, 10) if unit * factor >= rough * 0.999)
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    ticks = tuple(round(index * step, 12) for index in range(first, last + 1))
    return Axis(ticks[0], ticks[-1], ticks)


def log_axis(low: float, high: float) -> Axis:
    """A logarithmic axis between powers of ten; both values are above 0."""
    first, last = math.floor(math.log10(low)), math.ceil(math.log10(high))
    last = max(last, first + 1)
    every = max(1, (last - first) // 6)
    return Axis(10.0**first, 10.0**last, tuple(10.0**index for index in range(first, last + 1, every)), log=True)


def line_chart(
    series: Sequence[Series] | Mapping[str, Sequence[Point]],
    *,
    title: str,
    x_label: str,
    y_label: str,
    log_y: bool = False,
    marks: Iterable[tuple[float, str]] = (),
) -> str:
    """Lines over a common x.

    Args:
        series: the lines, or name -> points.
        title: what the chart shows.
        x_label, y_label: names of the axes, with units.
        log_y: a logarithmic y axis; values that are not above 0 leave gaps.
        marks: (x, what it stands for): vertical lines, such as epochs or saves.
    """
    lines = [Series(name, points) for name, points in series.items()] if isinstance(series, Mapping) else list(series)
    shown = [(x, y) for line in lines for x, y in line.points if _drawable(x, y, log_y)]
    if not shown:
        return _empty(title)
    xs, ys = [x for x, _ in shown], [y for _, y in shown]
    across = _tight(linear_axis(min(xs), max(xs)), min(xs), max(xs))
    up = log_axis(min(ys), max(ys)) if log_y else linear_axis(min(ys), max(ys))
    drawn, legend, rows, colour = [], [], [], 0
    for line in lines:
        chosen = (colour if line.colour is None else line.colour) % COLOURS
        colour = colour if line.colour is not None else colour + 1
        dashes = " dashed" if line.colour is None and colour > COLOURS else ""
        look = f"c{chosen}{dashes}{' faint' if line.faint else ''}"
        drawn += _paths(line.points, across, up, look)
        if line.name:
            legend.append(f'<li><span class="swatch {look}"></span>{escape(line.name)}</li>')
        values = [y for x, y in line.points if _drawable(x, y, log_y)]
        if values:
            rows.append([line.name or y_label, *map(number, (values[0], values[-1], min(values), max(values)))])
    text = _number_table(["", "first", "last", "lowest", "highest"], rows)
    body = _frame("".join(drawn), across, up, x_label, y_label, marks, _spoken(title, rows))
    return _figure(title, body, text, f'<ul class="legend">{"".join(legend)}</ul>' if len(legend) > 1 else "")


def histogram(
    values: Sequence[float],
    *,
    title: str,
    x_label: str,
    y_label: str = "count",
    bins: int = 30,
    marks: Iterable[tuple[float, str]] = (),
) -> str:
    """How often values lie where, as columns of equal width.

    Args:
        values: the values; those that are not finite are left out.
        title, x_label, y_label: as in `line_chart`.
        bins: about how many columns.
        marks: vertical lines, as in `line_chart`.
    """
    finite = [value for value in values if math.isfinite(value)]
    if not finite:
        return _empty(title)
    marks = list(marks)
    low = min([*finite, *(x for x, _ in marks)])
    high = max([*finite, *(x for x, _ in marks)])
    whole = all(value == int(value) for value in finite)
    width = _round_width((high - low) / bins, whole)
    start = math.floor(low / width) * width
    counts: dict[int, int] = {}
    for value in finite:
        place = int((value - start) / width + 1e-9)
        counts[place] = counts.get(place, 0) + 1
    across = linear_axis(start, start + width * (max(int((high - start) / width + 1e-9), *counts) + 1))
    up = linear_axis(0, max(counts.values()))
    if max(counts.values()) <= 4:  # half a picture is no tick
        up = Axis(0, up.high, tuple(tick for tick in up.ticks if tick == int(tick)))
    columns, rows = [], []
    for place in sorted(counts):
        left, count = start + place * width, counts[place]
        x, w = across.share(left) * UNITS, width / (across.high - across.low) * UNITS
        top = (1 - up.share(count)) * UNITS
        name = number(left) if whole and width == 1 else f"{number(left)} to {number(left + width - whole)}"
        tip = f"<title>{escape(name)}: {count:,}</title>"
        columns.append(
            f'<rect class="column" x="{x:.2f}" y="{top:.1f}" width="{w:.2f}" height="{UNITS - top:.1f}">{tip}</rect>'
        )
        rows.append([name, f"{count:,}"])
    spoken = f"{title}: {len(finite):,} values from {number(min(finite))} to {number(max(finite))}"
    body = _frame("".join(columns), across, up, x_label, y_label, marks, spoken)
    return _figure(title, body, _number_table([x_label, y_label], rows), "")


def bars(pairs: Iterable[tuple[str, float]], *, title: str, unit: str = "") -> str:
    """Named amounts as horizontal bars, each with its number.

    Args:
        pairs: (name, amount of 0 or more), in the order of the rows.
        title: what the chart shows.
        unit: of the amounts, e.g. `pictures`.
    """
    rows = list(pairs)
    largest = max((amount for _, amount in rows), default=0)
    if largest <= 0:
        return _empty(title)
    cells = "".join(
        f'<tr><th scope="row">{escape(name)}</th><td class="amount">{number(amount)}</td>'
        f'<td class="track"><div class="bar" style="width:{amount / largest * 100:.2f}%"></div></td></tr>'
        for name, amount in rows
    )
    head = f'<thead class="unseen"><tr><th>name</th><th>{escape(unit) or "amount"}</th><th>bar</th></tr></thead>'
    note = f' <span class="unit">({escape(unit)})</span>' if unit else ""
    return (
        f'<figure class="chart"><figcaption>{escape(title)}{note}</figcaption>'
        f'<table class="bars">{head}<tbody>{cells}</tbody></table></figure>'
    )


def _drawable(x: float, y: float, log_y: bool) -> bool:
    return math.isfinite(x) and math.isfinite(y) and (y > 0 or not log_y)


def _tight(axis: Axis, low: float, high: float) -> Axis:
    """The axis cut to the values, so that a line fills the width."""
    if low == high:
        return axis
    return Axis(low, high, tuple(tick for tick in axis.ticks if low <= tick <= high))


def _round_width(rough: float, whole: bool) -> float:
    if rough <= 0:
        return 1.0
    unit = 10 ** math.floor(math.log10(rough))
    width = next(unit * factor for factor in (1, 2, 2.5, 5, 10) if unit * factor >= rough * 0.999)
    return float(max(1, math.ceil(width))) if whole else width


def _paths(points: Sequence[Point], across: Axis, up: Axis, look: str) -> Iterator[str]:
    """The line between gaps, and a dot (a line of no length with round ends) for each lone point."""
    line, dots = [], []
    for run in _runs(points, up.log):
        places = [(across.share(x) * UNITS, (1 - up.share(y)) * UNITS) for x, y in _thinned(run)]
        path = f"M{places[0][0]:.1f} {places[0][1]:.1f}" + "".join(f"L{x:.1f} {y:.1f}" for x, y in places[1:])
        if len(places) > 1:
            line.append(path)
        else:
            dots.append(path + "h0.01")
    if line:
        yield f'<path class="line {look}" d="{"".join(line)}"/>'
    if dots:
        yield f'<path class="line dot {look}" d="{"".join(dots)}"/>'


def _runs(points: Sequence[Point], log_y: bool) -> Iterator[list[Point]]:
    run: list[Point] = []
    for point in points:
        if _drawable(*point, log_y):
            run.append(point)
        elif run:
            yield run
            run = []
    if run:
        yield run


def _thinned(points: list[Point]) -> Iterator[Point]:
    """Lowest and highest point of each stretch of a long line, so that no peak is lost."""
    if len(points) <= LARGEST_LINE:
        yield from points
        return
    length = -(-len(points) * 2 // LARGEST_LINE)
    yield points[0]
    for at in range(0, len(points), length):
        stretch = points[at : at + length]
        ends = {min(stretch, key=lambda p: p[1]), max(stretch, key=lambda p: p[1])}
        yield from sorted(ends)
    yield points[-1]


def _frame(
    drawn: str, across: Axis, up: Axis, x_label: str, y_label: str, marks: Iterable[tuple[float, str]], spoken: str
) -> str:
    """Axes, grid and labels around a drawing."""
    grid = "".join(f'<path class="grid" d="M0 {(1 - up.share(t)) * UNITS:.1f}H{UNITS}"/>' for t in up.ticks)
    lines, names = [], []
    for x, name in marks:
        if not across.low <= x <= across.high:
            continue
        share = across.share(x)
        lines.append(f'<path class="mark" d="M{share * UNITS:.1f} 0V{UNITS}"><title>{escape(name)}</title></path>')
        names.append(f'<span class="mark-name{_edge(share)}" style="left:{share * 100:.2f}%">{escape(name)}</span>')
    y_step = abs(up.ticks[1] - up.ticks[0]) if len(up.ticks) > 1 and not up.log else 0
    x_step = abs(across.ticks[1] - across.ticks[0]) if len(across.ticks) > 1 else 0
    y_names = [(number(t, y_step), up.share(t)) for t in up.ticks]
    widest = max((name for name, _ in y_names), key=len, default="")
    y_ticks = "".join(f'<span style="top:{(1 - share) * 100:.2f}%">{name}</span>' for name, share in y_names)
    x_ticks = "".join(
        f'<span class="{_edge(across.share(t)).strip()}" style="left:{across.share(t) * 100:.2f}%">'
        f"{number(t, x_step)}</span>"
        for t in across.ticks
    )
    svg = (
        f'<svg viewBox="0 0 {UNITS} {UNITS}" preserveAspectRatio="none" role="img" aria-label="{escape(spoken)}">'
        f"{grid}{drawn}{''.join(lines)}</svg>"
    )
    return (
        f'<div class="y-label">{escape(y_label)}</div><div class="plot">'
        f'<div class="y-ticks" aria-hidden="true"><span class="widest">{widest}</span>{y_ticks}</div>'
        f'<div class="area">{svg}<div aria-hidden="true">{"".join(names)}</div></div>'
        f'<div class="x-ticks" aria-hidden="true">{x_ticks}</div></div><div class="x-label">{escape(x_label)}</div>'
    )


def _edge(share: float) -> str:
    """Class that keeps a label at an end inside the chart."""
    return " at-end" if share > 0.94 else " at-start" if share < 0.06 else ""


def _figure(title: str, body: str, numbers: str, legend: str) -> str:
    return f'<figure class="chart"><figcaption>{escape(title)}</figcaption>{legend}{body}{numbers}</figure>'


def _empty(title: str) -> str:
    return f'<figure class="chart"><figcaption>{escape(title)}</figcaption><p class="quiet">No values.</p></figure>'


def _spoken(title: str, rows: Sequence[Sequence[str]]) -> str:
    return f"{title}. " + " ".join(f"{name}: from {first} to {last}." for name, first, last, _, _ in rows)


def _number_table(headers: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    head = "".join(f'<th scope="col">{escape(text)}</th>' for text in headers)
    body = "".join(
        f'<tr><th scope="row">{escape(row[0])}</th>' + "".join(f"<td>{escape(cell)}</td>" for cell in row[1:]) + "</tr>"
        for row in rows
    )
    return (
        '<details class="numbers"><summary>Numbers</summary><div class="scroll" tabindex="0">'
        f"<table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div></details>"
    )
