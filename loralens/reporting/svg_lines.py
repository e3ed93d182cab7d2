"""Charts of lines as SVG."""

from collections.abc import Iterable, Sequence
from html import escape
from math import isfinite, log10
from typing import NamedTuple

from loralens.charts.figure import fit
from loralens.reporting.axes import empty, spans, tick_label, x_ticks, y_ticks
from loralens.reporting.chart import Line, Lines
from loralens.reporting.palette import ink_class
from loralens.reporting.svg import modules, n, svg, upwards, words
from loralens.reporting.words import number

PANEL = 240, 180
ALONE = 420, 230  # of a chart that has a picture to itself


class Frame(NamedTuple):
    """The plot area of a chart of lines, and what its axes span."""

    left: float
    top: float
    width: float
    height: float
    x: tuple[float, float]
    y: tuple[float, float]
    log: bool

    def at(self, x: float, y: float) -> tuple[float, float] | None:
        """The place of a point; None off a logarithmic axis."""
        if not isfinite(y) or (self.log and y <= 0):
            return None
        low, high = (log10(v) for v in self.y) if self.log else self.y
        value = log10(y) if self.log else y
        return (
            self.left + self.width * (x - self.x[0]) / (self.x[1] - self.x[0] or 1),
            self.top + self.height * (1 - (value - low) / (high - low or 1)),
        )


def lines_svg(chart: Lines, alt: str, *, alone: bool = False) -> str:
    """Lines over axes, with ticks, levels and names."""
    legend = chart.named
    width, below = ALONE if alone else PANEL
    height = below + 16 * len(legend) + (4 if legend else 0)
    frame = _frame(chart, width, below)
    parts = [
        *_axes(chart, frame),
        *(
            [words("all of it is 0", frame.left + frame.width / 2, frame.top + frame.height / 2, "label mid")]
            if empty(chart)
            else []
        ),
        *_levels(chart, frame),
        *(_line(line, frame) for line in chart.lines),
        *_names(legend, below),
    ]
    hover = f' data-hover="{escape(chart.x_label)}"'
    return svg(width, height, parts, alt or chart.title, f' class="lines"{hover}{_frame_data(frame)}')


def _frame(chart: Lines, width: int, height: int) -> Frame:
    x, y = spans(chart)
    top = 24 if chart.title else 10
    return Frame(50, top, width - 62, height - top - 36, x, y, chart.log)


def _frame_data(frame: Frame) -> str:
    """Where the script finds a place in a chart whose axes are linear."""
    if frame.log:
        return ""
    numbers = (frame.left, frame.top, frame.width, frame.height, *frame.x, *frame.y)
    return f' data-frame="{" ".join(f"{one:.6g}" for one in numbers)}"'


def _axes(chart: Lines, frame: Frame) -> Iterable[str]:
    if chart.title:
        yield words(fit(chart.title, 30), frame.left, 14, "head")
    bottom = frame.top + frame.height
    yield f'<path class="axis" d="M{n(frame.left)} {n(frame.top)}V{n(bottom)}H{n(frame.left + frame.width)}"/>'
    for x in x_ticks(chart, frame.x):
        place = frame.at(x, frame.y[1])
        if place:
            yield f'<path class="tick" d="M{n(place[0])} {n(bottom)}v4"/>'
            yield words(tick_label(x), place[0], bottom + 15, "num mid")
    for y in y_ticks(chart, frame.y):
        place = frame.at(frame.x[0], y)
        if place:
            yield f'<path class="grid" d="M{n(frame.left)} {n(place[1])}h{n(frame.width)}"/>'
            yield words(tick_label(y), frame.left - 5, place[1] + 3.5, "num end")
    yield words(chart.x_label, frame.left + frame.width / 2, bottom + 30, "label mid")
    middle = frame.top + frame.height / 2
    yield upwards(chart.y_label, 11, middle, "label mid")


def _levels(chart: Lines, frame: Frame) -> Iterable[str]:
    right, bottom = frame.left + frame.width, frame.top + frame.height
    for k, (name, value) in enumerate(chart.levels.items()):
        place = frame.at(frame.x[0], value)
        if place and frame.top - 1 <= place[1] <= bottom + 1:
            yield f'<path class="level" d="M{n(frame.left)} {n(place[1])}h{n(frame.width)}"/>'
            if place[1] < (frame.top + bottom) / 2:  # below it at the right, where curves that rise have passed it
                yield words(name, right - 3, place[1] + 10, "num end")
            else:
                yield words(name, frame.left + 5 + 36 * k, place[1] - 3, "num")


def _line(line: Line, frame: Frame) -> str:
    points = [(p, x, y) for x, y in zip(line.x, line.y, strict=True) if (p := frame.at(x, y))]
    if not points:
        return ""
    d = "M" + "L".join(f"{n(p[0])} {n(p[1])}" for p, _, _ in points)
    xs = "" if [x for _, x, _ in points] == list(range(1, len(points) + 1)) else _data("x", [x for _, x, _ in points])
    marks = "".join(f'<circle cx="{n(p[0])}" cy="{n(p[1])}" r="2.4"/>' for p, _, _ in points) if line.dots else ""
    head = f'<g class="{_kind(line)} {ink_class(line.ink)}" data-n="{escape(line.name)}"{modules(line.modules)}{xs}'
    return f'{head}{_data("y", [y for _, _, y in points])}><path d="{d}"/>{marks}</g>'


def _kind(line: Line) -> str:
    return "line dotted" if line.dotted else "line dashed" if line.dashed else "line"


def _data(key: str, values: Sequence[float]) -> str:
    return f' data-{key}="{" ".join(number(value) for value in values)}"'


def _names(lines: Sequence[Line], top: float) -> Iterable[str]:
    for i, line in enumerate(lines):
        y = top + 16 * i + 8
        yield f'<g class="{_kind(line)} {ink_class(line.ink)}"><path d="M50 {n(y)}h22"/></g>'
        yield words(fit(line.name, 40), 80, y + 4, "label")
