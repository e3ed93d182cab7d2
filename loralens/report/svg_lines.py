"""Charts of lines as SVG."""

from collections.abc import Iterable, Sequence
from html import escape
from math import ceil, floor, isfinite, log10
from typing import NamedTuple

from loralens.plot.figure import fit
from loralens.report.chart import Line, Lines
from loralens.report.svg import modules, n, svg, upwards, words
from loralens.report.words import number

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
    legend = _legend(chart)
    width, below = ALONE if alone else PANEL
    height = below + 16 * len(legend) + (4 if legend else 0)
    frame = _frame(chart, width, below)
    empty = not any(isfinite(y) for line in chart.lines for y in line.y)
    parts = [
        *_axes(chart, frame),
        *(
            [words("all of it is 0", frame.left + frame.width / 2, frame.top + frame.height / 2, "label mid")]
            if empty
            else []
        ),
        *_levels(chart, frame),
        *(_line(line, frame) for line in chart.lines),
        *_names(legend, below),
    ]
    hover = f' data-hover="{escape(chart.x_label)}"'
    return svg(width, height, parts, alt or chart.title, f' class="lines"{hover}{_frame_data(frame)}')


def _frame(chart: Lines, width: int, height: int) -> Frame:
    xs = [x for line in chart.lines for x, y in zip(line.x, line.y, strict=True) if isfinite(y)] or [0, 1]
    ys = [y for line in chart.lines for y in line.y if isfinite(y) and (y > 0 or not chart.log)]
    low, high = chart.y_range or ((min(ys), max(ys)) if ys else (0.1, 1.0))
    if not chart.y_range and not chart.log:
        low, high = min(low, 0.0), high * 1.05 or 1.0
    top = 24 if chart.title else 10
    margin = (max(xs) - min(xs)) * 0.02 or 0.5
    return Frame(50, top, width - 62, height - top - 36, (min(xs) - margin, max(xs) + margin), (low, high), chart.log)


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
    whole = all(float(x).is_integer() for line in chart.lines for x in line.x)
    for x in _ticks(*frame.x, 6, whole=whole):
        place = frame.at(x, frame.y[1])
        if place:
            yield f'<path class="tick" d="M{n(place[0])} {n(bottom)}v4"/>'
            yield words(_tick(x), place[0], bottom + 15, "num mid")
    for y in _decades(*frame.y) if chart.log else _ticks(*frame.y, 5):
        place = frame.at(frame.x[0], y)
        if place:
            yield f'<path class="grid" d="M{n(frame.left)} {n(place[1])}h{n(frame.width)}"/>'
            yield words(_tick(y), frame.left - 5, place[1] + 3.5, "num end")
    yield words(chart.x_label, frame.left + frame.width / 2, bottom + 30, "label mid")
    middle = frame.top + frame.height / 2
    yield upwards(chart.y_label, 11, middle, "label mid")


def _levels(chart: Lines, frame: Frame) -> Iterable[str]:
    for k, (name, value) in enumerate(chart.levels.items()):
        place = frame.at(frame.x[0], value)
        if place and frame.top - 1 <= place[1] <= frame.top + frame.height + 1:
            yield f'<path class="level" d="M{n(frame.left)} {n(place[1])}h{n(frame.width)}"/>'
            below = 11 if place[1] < frame.top + 12 else -3
            yield words(name, frame.left + 5 + 36 * k, place[1] + below, "num")


def _line(line: Line, frame: Frame) -> str:
    points = [(p, x, y) for x, y in zip(line.x, line.y, strict=True) if (p := frame.at(x, y))]
    if not points:
        return ""
    d = "M" + "L".join(f"{n(p[0])} {n(p[1])}" for p, _, _ in points)
    xs = "" if [x for _, x, _ in points] == list(range(1, len(points) + 1)) else _data("x", [x for _, x, _ in points])
    marks = "".join(f'<circle cx="{n(p[0])}" cy="{n(p[1])}" r="2.4"/>' for p, _, _ in points) if line.dots else ""
    kind = "line dashed" if line.dashed else "line"
    head = f'<g class="{kind} {_ink(line)}" data-n="{escape(line.name)}"{modules(line.modules)}{xs}'
    return f'{head}{_data("y", [y for _, _, y in points])}><path d="{d}"/>{marks}</g>'


def _data(key: str, values: Sequence[float]) -> str:
    return f' data-{key}="{" ".join(number(value) for value in values)}"'


def _ink(line: Line) -> str:
    what, n = line.ink
    return f"b{n}" if what == "block" else f"c{n}" if what == "series" else "quiet"


def _legend(chart: Lines) -> list[Line]:
    return list(chart.lines) if chart.legend and len(chart.lines) <= 24 else []


def _names(lines: Sequence[Line], top: float) -> Iterable[str]:
    for i, line in enumerate(lines):
        y = top + 16 * i + 8
        dashed = " dashed" if line.dashed else ""
        yield f'<g class="line{dashed} {_ink(line)}"><path d="M50 {n(y)}h22"/></g>'
        yield words(fit(line.name, 40), 80, y + 4, "label")


def _tick(value: float) -> str:
    return f"{value:.3g}".replace("e-0", "e−").replace("e+0", "e").replace("-", "−")


def _ticks(low: float, high: float, most: int, *, whole: bool = False) -> list[float]:
    """Round numbers on an axis, at most so many."""
    span = high - low
    if not span > 0:
        return [low]
    power = 10.0 ** floor(log10(span / most))
    step = next(power * k for k in (1, 2, 5, 10, 20) if span / (power * k) <= most)
    step = max(step, 1.0) if whole else step
    return [round(k * step, 12) for k in range(ceil(low / step - 1e-9), floor(high / step + 1e-9) + 1)]


def _decades(low: float, high: float) -> list[float]:
    """Powers of ten on a logarithmic axis; of less than two of them also 2 and 5."""
    first, last = floor(log10(low)), ceil(log10(high))
    tens = [10.0**k for k in range(first, last + 1) if low <= 10.0**k <= high]
    if len(tens) > 1:
        return tens[:: ceil(len(tens) / 6)]
    finer = [k * 10.0**p for p in range(first, last + 1) for k in (1, 2, 5) if low <= k * 10.0**p <= high]
    return finer or [low, high]
