"""Renders line charts as SVG."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from html import escape
from itertools import chain
from math import cos, log10, pi, sin
from typing import NamedTuple

from loralens.charts.layout import LINE, NOTE, Box, chart_box, level_places, name_letters, slant
from loralens.charts.names import fit_name
from loralens.charts.palette import ink_class
from loralens.charts.spec import Area, Axis, Line, LineChart, Marker
from loralens.charts.svg import modules_attribute, n, svg, upwards, words
from loralens.tables.numbers import number

TITLE = 30  # letters of a title that fit above a panel


class PlotArea(NamedTuple):
    """The plot area of a line chart in pixels, with its axes."""

    left: float
    top: float
    width: float
    height: float
    x: Axis
    y: Axis

    def at(self, x: float, y: float) -> tuple[float, float] | None:
        """Return the place of a point in pixels, or None if y is not finite, or not positive on a logarithmic axis."""
        if not self.y.shows(y):
            return None
        start, stop = self.x.limits
        low, high, value = map(log10, (*self.y.limits, y)) if self.y.log else (*self.y.limits, y)
        # "or 1" for an axis whose two limits are equal: its points stand at the left or at the bottom.
        return (
            self.left + self.width * (x - start) / (stop - start or 1),
            self.top + self.height * (1 - (value - low) / (high - low or 1)),
        )


def lines_svg(chart: LineChart, alt: str, *, alone: bool = False) -> Iterator[str]:
    """Return the pieces of a line chart as SVG with axes, levels and legend.

    ``alone`` is as in `loralens.charts.layout.chart_box`.
    """
    room = chart_box(chart, alone=alone)
    frame = PlotArea(room.left, room.top, room.across, room.down, chart.x, chart.y)
    middle = frame.left + frame.width / 2, frame.top + frame.height / 2
    nothing = [words(chart.note or "all of it is 0", *middle, "small mid")]
    # The script of the page computes places from these numbers, for the markers of the sliders.
    numbers = (frame.left, frame.top, frame.width, frame.height, *frame.x.limits, *frame.y.limits)
    data = f' data-frame="{" ".join(f"{value:.9g}" for value in numbers)}"' + ' data-log=""' * frame.y.log
    # In SVG what comes later covers what comes earlier: lines cover areas, and notes cover lines.
    parts = chain(
        (_area(area, frame) for area in chart.areas),
        _axes(chart, frame),
        nothing if chart.empty else [],
        _levels(chart, frame),
        (_line(line, frame) for line in chart.lines),
        _note(chart, frame),
        _names(chart.named, room),
    )
    hover = f' data-hover="{escape(chart.x.label)}"'
    return svg(room.width, room.height, parts, alt or chart.title, f' class="lines"{hover}{data}')


def _axes(chart: LineChart, frame: PlotArea) -> Iterable[str]:
    if chart.title:
        yield words(fit_name(chart.title, TITLE), frame.left, 14, "head")
    bottom = frame.top + frame.height
    yield f'<path class="axis" d="M{n(frame.left)} {n(frame.top)}V{n(bottom)}H{n(frame.left + frame.width)}"/>'
    for x, label in chart.x.ticks:
        place = frame.at(x, frame.y.limits[1])
        if place:
            yield f'<path class="tick" d="M{n(place[0])} {n(bottom)}v4"/>'
            if slant(chart):
                yield f'<text class="small end" transform="translate({n(place[0] + 3)} {n(bottom + 11)}) rotate(-40)">'
                yield f"{escape(label)}</text>"
            else:
                yield words(label, place[0], bottom + 15, "num mid")
    for y, label in chart.y.ticks:
        place = frame.at(frame.x.limits[0], y)
        if place:
            yield f'<path class="grid" d="M{n(frame.left)} {n(place[1])}h{n(frame.width)}"/>'
            yield words(label, frame.left - 5, place[1] + 3.5, "num end")
    yield words(chart.x.label, frame.left + frame.width / 2, bottom + 30 + slant(chart), "label mid")
    yield upwards(chart.y.label, 11, frame.top + frame.height / 2, "label mid")


def _area(area: Area, frame: PlotArea) -> str:
    # There along the upper curve and back along the lower one.
    ends = [*zip(area.x, area.high, strict=True), *zip(reversed(area.x), reversed(area.low), strict=True)]
    places = [place for x, y in ends if (place := frame.at(x, y))]
    return f'<path class="area" d="M{"L".join(f"{n(x)} {n(y)}" for x, y in places)}z"/>' if places else ""


def _levels(chart: LineChart, frame: PlotArea) -> Iterable[str]:
    right, bottom = frame.left + frame.width, frame.top + frame.height
    places = level_places(chart)
    for name, value in chart.levels.items():
        place = frame.at(frame.x.limits[0], value)
        # A pixel more on both sides, so that rounding does not hide a level on the edge.
        if place and frame.top - 1 <= place[1] <= bottom + 1:
            yield f'<path class="level" d="M{n(frame.left)} {n(place[1])}h{n(frame.width)}"/>'
            # The name of a high level stands at the right and below it, where rising curves have already crossed it.
            if place[1] < (frame.top + bottom) / 2:
                yield words(name, right - 3, place[1] + 10, "num end")
            else:
                yield words(name, frame.left + places[name], place[1] - 3, "num")


def _line(line: Line, frame: PlotArea) -> str:
    labels = line.labels or [""] * len(line.x)
    points = [(p, x, y, t) for x, y, t in zip(line.x, line.y, labels, strict=True) if (p := frame.at(x, y))]
    if not points:
        return ""
    xs = [x for _, x, _, _ in points]
    d = "M" + "L".join(f"{n(p[0])} {n(p[1])}" for p, *_ in points)
    path = "" if line.unjoined else f'<path d="{d}"/>'
    marks = "".join(MARKS[line.marker](*p) for p, *_ in points)
    label_texts = "".join(words(text, p[0] + 4, p[1] - 4, "small") for p, _, _, text in points if text)
    group = f'<g class="{_kind(line)} {ink_class(line.ink)}" data-n="{escape(line.name)}"'
    # The script takes x = 1, 2, 3 … where a line has no data-x, which keeps pages of many spectra small.
    data = "" if xs == list(range(1, len(xs) + 1)) else _data("x", xs)
    data += _data("y", [y for _, _, y, _ in points])
    return f"{group}{modules_attribute(line.modules)}{data}>{path}{marks}{label_texts}</g>"


def _kind(line: Line) -> str:
    return "line dotted" if line.dotted else "line dashed" if line.dashed else "line"


def _star(x: float, y: float) -> str:
    corners = [(6 if k % 2 == 0 else 2.6, k * pi / 5) for k in range(10)]
    points = " ".join(f"{n(x + r * sin(a))},{n(y - r * cos(a))}" for r, a in corners)
    return f'<polygon points="{points}"/>'


# The marks of points at a place. "" stands for a line without marks.
MARKS: dict[Marker, Callable[[float, float], str]] = {
    "": lambda _x, _y: "",
    "dot": lambda x, y: f'<circle cx="{n(x)}" cy="{n(y)}" r="2.4"/>',
    "square": lambda x, y: f'<rect x="{n(x - 2.2)}" y="{n(y - 2.2)}" width="4.4" height="4.4"/>',
    "triangle": lambda x, y: f'<polygon points="{n(x)},{n(y - 3)} {n(x + 2.9)},{n(y + 2)} {n(x - 2.9)},{n(y + 2)}"/>',
    "star": _star,
}


def _data(key: str, values: Sequence[float]) -> str:
    return f' data-{key}="{" ".join(number(value) for value in values)}"'


def _note(chart: LineChart, frame: PlotArea) -> Iterable[str]:
    lines = chart.note.split("\n") if chart.note and not chart.empty else []
    bottom = frame.top + frame.height - 5
    # Written from the last line up, as the note stands in the lower corner.
    for k, line in enumerate(reversed(lines)):
        yield words(line, frame.left + 6, bottom - NOTE * k, "small")


def _names(lines: Sequence[Line], room: Box) -> Iterable[str]:
    for i, line in enumerate(lines):
        y = room.height - LINE * (len(lines) - i) + 4
        path = "" if line.unjoined else f'<path d="M50 {n(y)}h22"/>'
        yield f'<g class="{_kind(line)} {ink_class(line.ink)}">{path}{MARKS[line.marker](61, y)}</g>'
        yield words(fit_name(line.name, name_letters(room)), 80, y + 4, "label")
