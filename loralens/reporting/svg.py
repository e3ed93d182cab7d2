"""Where the parts of a chart stand on a page, in CSS pixels; ``templates/charts.html`` draws them as SVG.

Widths of letters are estimated, as SVG cannot measure text. Colours and fonts are left to the stylesheet of the page.
"""

from collections.abc import Sequence
from functools import cached_property
from itertools import groupby
from math import ceil, floor, isfinite, log10
from typing import NamedTuple

from loralens.charts.module_grid import fit_name
from loralens.charts.palette import is_strong, level
from loralens.charts.spec import Chart, Key, Limits, Line, LineChart, Ramp
from loralens.charts.spec import HeatMap as Map
from loralens.tables.numbers import number

LETTER, SMALL = 6.7, 5.9  # widths of a letter at font sizes of 11 and of 10 pixels
# Width and height of a line chart among others, and of one that stands alone. Four panels fit next to each other.
PANEL, ALONE = (240, 180), (420, 230)
CELL, WRITTEN = (18.0, 18.0), (40.0, 26.0)  # a cell, and one that shows its value, such as "+0.99"
LEAST = 3.0  # the smallest side of a cell: below it neighbours can no longer be told apart
SIDE, FLAT = 132.0, 44.0  # the longer side of a small map, and the least shorter side, as 8 × 64 would be 16 pixels
LINE, NOTE = 16, 13  # heights of a line of a legend and of a line of small text
BAR = 160  # width of a colour bar
LONG = 3  # names of columns longer than this are written upwards, as a cell is only three digits wide
# The marks of points, relative to their places.
MARKS = {
    "": "",
    "o": "m-2.4 0a2.4 2.4 0 1 0 4.8 0a2.4 2.4 0 1 0-4.8 0z",
    "s": "m-2.2-2.2h4.4v4.4h-4.4z",
    "^": "m0-3l2.9 5h-5.8z",
    "*": "m0-6l1.5 4h4.2l-3.4 2.6l1.3 4.1l-3.6-2.5l-3.6 2.5l1.3-4.1l-3.4-2.6h4.2z",
}


class Tick(NamedTuple):
    """A text at a place along an axis."""

    at: float
    text: str


class LinePlot:
    """The places of a line chart; ``alone`` says that it is the only one of its panel, and so may be larger."""

    left = 50  # for the numbers and the label of y

    def __init__(self, chart: LineChart, *, alone: bool) -> None:
        self.chart, self.named = chart, chart.named
        self.width, height = ALONE if alone else PANEL
        self.title = fit_name(chart.title, 30)
        self.top = 24 if chart.title else 10
        self.across, self.down = self.width - self.left - 12, height - self.top - 36
        self.bottom = self.top + self.down
        self.height = height + (LINE * len(self.named) + 4 if self.named else 0)
        self.x_limits, self.y_limits = chart.x_limits, chart.y_limits
        self.letters = int((self.width - 84) / 5.8)  # of a name in the legend, in lower case

    def x(self, value: float) -> float:
        """The place of a value of x."""
        low, high = self.x_limits
        return self.left + self.across * (value - low) / (high - low or 1)

    def y(self, value: float) -> float:
        """The place of a value of y."""
        low, high, value = map(log10, (*self.y_limits, value)) if self.chart.log else (*self.y_limits, value)
        return self.top + self.down * (1 - (value - low) / (high - low or 1))

    @property
    def frame(self) -> str:
        """The plot area and the limits, from which the script of the page computes places."""
        values = (self.left, self.top, self.across, self.down, *self.x_limits, *self.y_limits)
        return " ".join(f"{value:.9g}" for value in values)

    @property
    def x_ticks(self) -> list[Tick]:
        """The ticks of the chart, or round numbers."""
        numbers = round_numbers(self.x_limits, 6, integers=self.chart.counted)
        ticks = self.chart.x_ticks or [(value, number(value, 6)) for value in numbers]
        return [Tick(self.x(value), text) for value, text in ticks]

    @property
    def y_ticks(self) -> list[Tick]:
        """Round numbers, or powers of ten."""
        values = powers_of_ten(self.y_limits) if self.chart.log else round_numbers(self.y_limits, 5)
        return [Tick(self.y(value), number(value, 6)) for value in values]

    @property
    def levels(self) -> list[tuple[float, float, str]]:
        """Place of the name, height and name of each level; names stand side by side, as levels may be close."""
        places, x = [], self.left + 5.0
        for name, value in self.chart.levels.items():
            places.append((x, self.y(value), name))
            x += SMALL * len(name) + 8
        return places

    @property
    def area(self) -> str:
        """The outline of the area: there along the upper curve, and back along the lower one."""
        ends = [(x, high) for x, _, high in self.chart.area] + [(x, low) for x, low, _ in reversed(self.chart.area)]
        return "M" + "L".join(f"{self.x(x):.1f} {self.y(y):.1f}" for x, y in ends) if ends else ""

    @property
    def lines(self) -> list[tuple[Line, str, str, list[tuple[float, float, str]]]]:
        """Each line with its path, the path of its marks, and its points that are drawn."""
        drawn = []
        for line in self.chart.lines:
            points = self.chart.points(line)
            places = [f"{self.x(x):.1f} {self.y(y):.1f}" for x, y, _ in points]
            mark = MARKS[line.marker]
            marks = "".join(f"M{place}{mark}" for place in places) if mark else ""
            drawn += [(line, "M" + "L".join(places), marks, points)] if points else []
        return drawn


class MapPlot:
    """The places of a map of cells."""

    def __init__(self, chart: Map) -> None:
        self.chart, self.title, self.small = chart, fit_name(chart.title, 26 if chart.small else 60), chart.small
        rows, columns = chart.values.shape
        self.rows = [(i, text) for i, text in enumerate(chart.rows) if text]
        self.columns = [(j, text) for j, text in enumerate(chart.columns) if text]
        self.notes = chart.note.split("\n") if chart.note else []
        if chart.small:
            side = SIDE / max(rows, columns, 1)
            wide, high = (max(side * count, FLAT) / max(count, 1) for count in (columns, rows))
        else:
            wide, high = WRITTEN if chart.written else CELL
            wide, high = (
                max(LEAST, min(most, chart.room / max(count, 1))) for most, count in ((wide, columns), (high, rows))
            )
        self.wide, self.high = wide, high
        self.gap = 1 if min(wide, high) > 6 and not chart.small else 0  # would take much of a cell of few pixels
        self.left = 14 + (SMALL if chart.small else LETTER) * _longest(chart.rows)
        self.top = 20 if chart.title else 2
        self.bottom = self.top + high * rows
        self.upright = _longest(chart.columns) > LONG
        self.below = self.bottom + (SMALL * _longest(chart.columns) + 10 if self.upright else 18)
        right = max(wide * columns, LETTER * _longest(self.notes), BAR if not chart.small else 150)
        self.width = max(self.left + right + 8, LETTER * len(self.title) + 16)
        self.height = self.below + NOTE * len(self.notes) + 4

    @cached_property
    def colours(self) -> list[list[str]]:
        """The class of each cell; empty for one without a value."""
        scale = self.chart.scale
        return [
            [level(scale.share(value), diverging=scale.diverging) if isfinite(value) else "" for value in row]
            for row in self.chart.values.tolist()
        ]

    @property
    def paths(self) -> dict[str, str]:
        """Colour → the cells of a small map as one path, in units of cells, so that pages of many maps stay small."""
        paths: dict[str, str] = {}
        for i, row in enumerate(self.colours):
            j = 0
            for colour, cells in groupby(row):
                length = len(list(cells))
                paths[colour] = paths.get(colour, "") + f"M{j} {i}h{length}v1h-{length}z"
                j += length
        return dict(sorted(paths.items()))

    @property
    def digits(self) -> str:
        """The values of a small map for the script of the page, two digits each; 1 is written as 99."""
        return " ".join("".join(f"{min(round(100 * value), 99):02d}" for value in row) for row in self.chart.values)

    def letters_on(self, colour: str) -> str:
        """The class of a number that is written on a colour."""
        return "cell mid strong" if is_strong(colour) else "cell mid"


class KeyPlot:
    """The places of a colour key."""

    def __init__(self, key: Key) -> None:
        self.label = key.label
        self.marks: list[float] = []
        bar = BAR
        if isinstance(key, Ramp):
            self.classes = [f"b{step}" for step in range(16)]
            # Blocks may have long names, which stand side by side below the bar.
            bar = max(bar, ceil(SMALL * len(key.first + key.last)) + 12)
            self.ticks = [Tick(8, key.first), Tick(8 + bar, key.last)]
        else:
            self.label += f" (mark: chance, {key.chance_text})" if key.levels else ""
            self.classes = [level(step / 31, diverging=key.diverging) for step in range(32)]
            self.ticks = [Tick(8, key.words(key.low)), Tick(8 + BAR, key.words(key.high))]
            self.marks = [8 + BAR * key.share(value) for value in key.levels]
        self.step = bar / len(self.classes)
        self.width = max(bar + 16, SMALL * len(self.label) + 14)


Plot = LinePlot | MapPlot


def plots_of(charts: Sequence[Chart]) -> list[Plot]:
    """The places of the charts of a panel."""
    return [
        LinePlot(chart, alone=len(charts) == 1) if isinstance(chart, LineChart) else MapPlot(chart) for chart in charts
    ]


def _longest(labels: Sequence[str]) -> int:
    """The number of letters of the longest label."""
    return max(map(len, labels), default=0)


def round_numbers(span: Limits, most: int, *, integers: bool = False) -> list[float]:
    """Return the multiples of 1, 2 or 5 times a power of ten within a span, about ``most`` of them."""
    low, high = span
    if not high > low:
        return [low]
    power = 10.0 ** floor(log10((high - low) / most))
    step = next(power * k for k in (1, 2, 5, 10, 20) if (high - low) / (power * k) <= most)
    step = max(step, 1.0) if integers else step
    # The small tolerance keeps a limit that is itself a multiple, in spite of rounding.
    return [round(k * step, 12) for k in range(ceil(low / step - 1e-9), floor(high / step + 1e-9) + 1)]


def powers_of_ten(span: Limits) -> list[float]:
    """Return at most six powers of ten within a span; if there is at most one, also 2 and 5 times a power of ten."""
    low, high = span
    powers = range(floor(log10(low)), ceil(log10(high)) + 1)
    tens = [10.0**power for power in powers if low <= 10.0**power <= high]
    if len(tens) > 1:
        return tens[:: ceil(len(tens) / 6)]
    return [k * 10.0**p for p in powers for k in (1, 2, 5) if low <= k * 10.0**p <= high] or [low, high]
