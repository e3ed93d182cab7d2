"""Charts as plain data: line charts, maps of cells, and figures of several charts.

A chart says what is drawn. A page (`loralens.charts.svg`) and a picture (`loralens.charts.mpl`) each decide how.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from math import isfinite
from typing import final

from loralens.linalg.factor import Floats
from loralens.tables.numbers import number

# A chart with more lines has no legend: 24 names of 16 pixels take 384 pixels of height, and the chart itself 230.
LEGEND = 24
Limits = tuple[float, float]
Text = Callable[[float], str]


@final
@dataclass(frozen=True, slots=True)
class Line:
    """One line of a chart.

    Attributes
    ----------
    y : sequence of float
        Points whose y is not finite are left out.
    ink : str
        The colour by its meaning, since the colours of a page depend on its theme: ``c0`` to ``c7`` are series, ``b0``
        to ``b15`` go from the first to the last block, and ``quiet`` is none of them.
    marker : str
        The mark of each point: ``o``, ``s``, ``^`` or ``*`` as in matplotlib; empty for none.
    style : str
        ``-``, ``--`` or ``:`` as in matplotlib; empty if only the marks are drawn.
    labels : sequence of str
        A text for each point, which is written next to it unless it is empty.
    """

    name: str
    x: Sequence[float]
    y: Sequence[float]
    ink: str = "quiet"
    marker: str = ""
    style: str = "-"
    labels: Sequence[str] = ()


@final
@dataclass(frozen=True, slots=True)
class LineChart:
    """A chart of lines over one pair of axes.

    Attributes
    ----------
    log : bool
        Whether y is logarithmic.
    x_range, y_range : (float, float), optional
        Limits that several charts share; by default they are chosen so that all lines fit.
    x_ticks : sequence of (float, str)
        Places and texts on the x axis, such as powers of ten; round numbers by default.
    levels : mapping of str to float
        Names and heights of horizontal lines, such as a level of chance.
    legend : bool
        Whether the lines are named below the chart.
    area : sequence of (float, float, float)
        x, the lower and the upper edge of a grey area behind the lines.
    note : str
        A remark in the lower left corner, which may have several lines.
    """

    title: str
    lines: Sequence[Line]
    x_label: str
    y_label: str
    log: bool = False
    x_range: Limits | None = None
    y_range: Limits | None = None
    x_ticks: Sequence[tuple[float, str]] = ()
    levels: Mapping[str, float] = field(default_factory=dict)
    legend: bool = False
    area: Sequence[tuple[float, float, float]] = ()
    note: str = ""

    @property
    def named(self) -> Sequence[Line]:
        """The lines of the legend, which are all lines or none."""
        return self.lines if self.legend and len(self.lines) <= LEGEND else []

    def shows(self, y: float) -> bool:
        """Return whether y has a place on the axis: it is finite, and positive if the axis is logarithmic."""
        return isfinite(y) and (y > 0 or not self.log)

    def points(self, line: Line) -> list[tuple[float, float, str]]:
        """The points of a line that can be drawn: x, y and label."""
        labels = line.labels or [""] * len(line.x)
        return [point for point in zip(line.x, line.y, labels, strict=True) if self.shows(point[1])]

    @property
    def x_limits(self) -> Limits:
        """The limits of x, which span the points with a margin."""
        if self.x_range:
            return self.x_range
        values = [x for line in self.lines for x, _, _ in self.points(line)]
        low, high = min(values, default=0.0), max(values, default=1.0)
        margin = (high - low) * 0.02 or 0.5  # a single point stands in the middle of its axis
        return low - margin, high + margin

    @property
    def y_limits(self) -> Limits:
        """The limits of y, which begin at 0 unless the axis is logarithmic, so that heights compare as lengths."""
        if self.y_range:
            return self.y_range
        values = [y for line in self.lines for _, y, _ in self.points(line)]
        if self.log:
            low, high = min(values, default=0.1), max(values, default=1.0)
            return (low, high) if low < high else (low / 2, high * 2)  # one value: an axis needs two limits
        return min([0.0, *values]), max([0.0, *values]) * 1.05 or 1.0  # room above; 1 where all values are 0

    @property
    def remark(self) -> str:
        """The note, or why there is nothing to see."""
        return self.note or ("" if any(map(self.points, self.lines)) else "all of it is 0")

    @property
    def counted(self) -> bool:
        """Whether x counts directions, ranks or steps, so that a tick at 2.5 would have no meaning."""
        return all(float(x).is_integer() for line in self.lines for x in line.x)


@final
@dataclass(frozen=True, slots=True)
class ColourScale:
    """The colour scale of a map, from ``low`` to ``high``.

    Attributes
    ----------
    label : str
        The quantity and its unit.
    text : callable
        Writes a value; see `words`.
    diverging : bool
        Whether the middle of the colours is at 0; ``low`` is then −``high``.
    chance : sequence of float
        The level of chance, or those of all cells if they differ. The lowest and the highest are marked.
    """

    low: float
    high: float
    label: str
    text: Text = number
    diverging: bool = False
    chance: Sequence[float] = ()

    def words(self, value: float) -> str:
        """Write a value, and 0 without a sign and decimals: "+0.00" would claim more than is known."""
        text = self.text(value)
        return text if text.strip("+0.") else "0"

    @property
    def levels(self) -> list[float]:
        """The one or two levels of chance that are marked, in rising order."""
        # A scale without width has no place for a mark.
        return sorted({min(self.chance), max(self.chance)}) if self.chance and self.high > self.low else []

    @property
    def chance_text(self) -> str:
        """The marked levels as text; empty without one."""
        return " to ".join(map(self.words, self.levels))

    def share(self, value: float) -> float:
        """Return where a value stands between the two ends, in [0, 1]; values beyond an end stand at that end."""
        return min(max((value - self.low) / (self.high - self.low), 0.0), 1.0) if self.high > self.low else 0.0


@final
@dataclass(frozen=True, slots=True)
class Ramp:
    """The colours of blocks, with the names of the first and the last."""

    label: str
    first: str
    last: str


Key = ColourScale | Ramp


@final
@dataclass(frozen=True, slots=True)
class HeatMap:
    """A map of coloured cells in rows and columns.

    Attributes
    ----------
    rows, columns : sequence of str
        The labels next to the cells; empty where there is no room for one.
    values : float64 array, shape (rows, columns)
        NaN leaves a cell empty.
    tips : mapping of (int, int) to (str, str)
        (row, column) → the name of the cell, and what is shown on hovering besides.
    note : str
        A few words below the columns, which say what they and the cells are.
    written : bool
        Whether cells show their value.
    zeros : sequence of (int, int)
        Places without a value because ΔW is 0. They are crossed.
    row_edges, column_edges : sequence of int
        The rows or columns before which a line is drawn, because a stack of blocks or a group begins there.
    room : float
        The largest width and the largest height in pixels that the cells may take together.
    small : bool
        Whether it is one of many maps of directions: it has one size, and shares a colour key with the others.
    name : str
        The module of a small map.
    """

    title: str
    rows: Sequence[str]
    columns: Sequence[str]
    values: Floats
    scale: ColourScale
    tips: Mapping[tuple[int, int], tuple[str, str]] = field(default_factory=dict)
    note: str = ""
    written: bool = False
    zeros: Sequence[tuple[int, int]] = ()
    row_edges: Sequence[int] = ()
    column_edges: Sequence[int] = ()
    room: float = 900.0
    small: bool = False
    name: str = ""


Chart = LineChart | HeatMap


@final
@dataclass(frozen=True, slots=True)
class Band:
    """Charts side by side under one title, and the colour keys that they share.

    Attributes
    ----------
    charts : sequence of Chart or None
        A chart that is None leaves its place free.
    columns : int
        The number of charts in a row; 0 for as many as the width allows.
    """

    charts: Sequence[Chart | None]
    title: str = ""
    keys: Sequence[Key] = ()
    columns: int = 0


@final
@dataclass(frozen=True, slots=True)
class Figure:
    """A figure: bands one below the other, under a title that may have several lines."""

    title: str
    bands: Sequence[Band]

    @property
    def charts(self) -> list[Chart]:
        """All charts, band by band."""
        return [chart for band in self.bands for chart in band.charts if chart is not None]
