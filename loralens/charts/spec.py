"""Charts as plain data: line charts, maps of cells, and figures of several charts.

A chart says what is drawn. A page (`loralens.charts.svg`) and a picture (`loralens.charts.mpl`) each decide how.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from math import isfinite
from typing import Literal, final

from loralens.tables.numbers import MINUS

# A chart with more lines has no legend: 24 names of 16 pixels take 384 pixels of height, and the chart itself 230.
LEGEND = 24

# A colour by its meaning: that of the n-th series, or the n-th of 16 colours from the first to the last block. Charts
# name no colours, as those of a page depend on its theme.
Ink = tuple[Literal["series", "block", "quiet"], int]
Marker = Literal["", "dot", "square", "triangle", "star"]
Limits = tuple[float, float]


@final
@dataclass(frozen=True, slots=True)
class Axis:
    """An axis with its label and its limits.

    Attributes
    ----------
    ticks : sequence of (float, str)
        Values and their texts; empty where a renderer chooses round numbers.
    """

    label: str
    limits: Limits
    ticks: Sequence[tuple[float, str]] = ()
    log: bool = False

    def shows(self, value: float) -> bool:
        """Return whether a value has a place on the axis: it is finite, and positive if the axis is logarithmic."""
        return isfinite(value) and (value > 0 or not self.log)


@final
@dataclass(frozen=True, slots=True)
class Line:
    """One line of a chart.

    Attributes
    ----------
    y : sequence of float
        Points whose y is not finite are left out.
    modules : sequence of int
        The modules that the line stands for, by their numbers on the page.
    marker : str
        The mark of each point; empty for none.
    unjoined : bool
        Whether only the marks are drawn, and no line between them.
    labels : sequence of str
        A text for each point, which is written next to it unless it is empty.
    """

    name: str
    x: Sequence[float]
    y: Sequence[float]
    ink: Ink
    modules: Sequence[int] = ()
    marker: Marker = ""
    dashed: bool = False
    dotted: bool = False
    unjoined: bool = False
    labels: Sequence[str] = ()


@final
@dataclass(frozen=True, slots=True)
class Area:
    """A coloured area between two curves, behind the lines of a chart."""

    x: Sequence[float]
    low: Sequence[float]
    high: Sequence[float]


@final
@dataclass(frozen=True, slots=True)
class LineChart:
    """A chart of lines over one pair of axes.

    Attributes
    ----------
    levels : mapping of str to float
        Names and heights of horizontal lines, such as a level of chance.
    legend : bool
        Whether the lines are named below the chart.
    note : str
        A remark in the lower left corner, which may have several lines.
    """

    title: str
    lines: Sequence[Line]
    x: Axis
    y: Axis
    levels: Mapping[str, float] = field(default_factory=dict)
    legend: bool = False
    areas: Sequence[Area] = ()
    note: str = ""

    @property
    def named(self) -> list[Line]:
        """The lines of the legend, which are all lines or none."""
        return list(self.lines) if self.legend and len(self.lines) <= LEGEND else []

    @property
    def empty(self) -> bool:
        """Whether there is no point to draw."""
        return not any(self.y.shows(y) for line in self.lines for y in line.y)


@final
@dataclass(frozen=True, slots=True)
class ColourScale:
    """The colour scale of a map.

    Attributes
    ----------
    low, high : float
        The values of the first and of the last colour.
    label : str
        The quantity and its unit.
    diverging : bool
        Whether the middle of the colours is at 0.
    chance : sequence of float
        The level of chance, or those of all cells if they differ. The lowest and the highest are marked.
    form : str
        The format specification of values, as for `format`.
    doublings : bool
        Whether values are logarithms to base 2, which are written as the factors that they stand for.
    ticks : sequence of (float, str)
        Values and texts under the colours; by default those of the two ends.
    """

    low: float
    high: float
    label: str
    diverging: bool = False
    chance: Sequence[float] = ()
    form: str = ".3g"
    doublings: bool = False
    ticks: Sequence[tuple[float, str]] = ()

    def text(self, value: float) -> str:
        """Write a value as text, with a true minus sign, and without a sign where it rounds to 0."""
        # "0.00 %" would claim more precision than needed.
        if value == 0 and not self.doublings:
            return "0 %" if "%" in self.form else "0"
        text = f"{2.0**value if self.doublings else value:{self.form}}"
        if not text.strip("+-0.%"):
            text = text.lstrip("+-")
        return text.replace("-", MINUS).replace("%", " %")

    @property
    def marks(self) -> list[tuple[float, str]]:
        """The values and texts under the colours."""
        return list(self.ticks) or [(self.low, self.text(self.low)), (self.high, self.text(self.high))]

    @property
    def levels(self) -> list[float]:
        """The one or two levels of chance that are marked, in rising order."""
        # A scale without width has no place for a mark.
        return sorted({min(self.chance), max(self.chance)}) if self.chance and self.high > self.low else []

    @property
    def chance_text(self) -> str:
        """The marked levels of chance as text, with enough digits not to be written as 0."""
        texts = []
        for value in self.levels:
            text = self.text(value)
            if value and not text.strip("0. %"):
                text = f"{100 * value:.1g} %" if "%" in self.form else f"{value:.1g}"
            texts.append(text)
        return " to ".join(texts)

    def share(self, value: float) -> float:
        """Return where a value stands between the two ends, in [0, 1]; values beyond an end stand at that end."""
        return min(max((value - self.low) / (self.high - self.low), 0.0), 1.0) if self.high > self.low else 0.0


@final
@dataclass(frozen=True, slots=True)
class Ramp:
    """The colours of blocks from the first to the last, with ticks of places in [0, 1] and names of blocks."""

    label: str
    ticks: Sequence[tuple[float, str]]


Key = ColourScale | Ramp


@final
@dataclass(frozen=True, slots=True)
class Cell:
    """One cell of a map.

    Attributes
    ----------
    text : str
        What is shown on hovering; after the name, if there is one.
    modules : sequence of int
        The numbers of the modules that the cell stands for.
    name : str
        The name of its only module; empty where the cell stands for several.
    """

    value: float
    text: str = ""
    modules: Sequence[int] = ()
    # Apart from the text, so that the maps of a page share the names of modules: each may be longer than its numbers.
    name: str = ""

    @property
    def tip(self) -> str:
        """The whole text that is shown on hovering."""
        return f"{self.name}: {self.text}" if self.name else self.text


@final
@dataclass(frozen=True, slots=True)
class HeatMap:
    """A map of coloured cells in rows and columns.

    Attributes
    ----------
    cells : mapping of (int, int) to Cell
        (row, column) → cell. Places without a cell are hatched.
    across : str
        What the columns are, such as "block".
    written : bool
        Whether cells show their value.
    zeros : sequence of (int, int)
        Places whose modules have no value because ΔW is 0. They are crossed.
    row_labels, column_labels : sequence of str
        The texts next to the map if not all names are shown: one per row or column, empty where there is none.
    row_edges, column_edges : sequence of int
        The rows or columns before which a line is drawn, because a stack of blocks or a group begins there.
    heads : sequence of (int, int, str)
        First column, end and name of each stack that is named above the map.
    tree : sequence of sequence of (float, float)
        Branches above the columns, with x in columns from 0 and y in [0, 1].
    note : str
        A few words about what the cells are.
    room : float
        The largest width and the largest height in pixels that the cells may take together.
    """

    title: str
    rows: Sequence[str]
    columns: Sequence[str]
    cells: Mapping[tuple[int, int], Cell]
    scale: ColourScale
    across: str = ""
    written: bool = False
    zeros: Sequence[tuple[int, int]] = ()
    row_labels: Sequence[str] = ()
    column_labels: Sequence[str] = ()
    row_edges: Sequence[int] = ()
    column_edges: Sequence[int] = ()
    heads: Sequence[tuple[int, int, str]] = ()
    tree: Sequence[Sequence[tuple[float, float]]] = ()
    note: str = ""
    room: float = 900.0

    @property
    def row_texts(self) -> list[tuple[int, str]]:
        """The index and the label of each row that has a label."""
        return [(i, name) for i, name in enumerate(self.row_labels or self.rows) if name]

    @property
    def column_texts(self) -> list[tuple[int, str]]:
        """The index and the label of each column that has a label."""
        return [(j, name) for j, name in enumerate(self.column_labels or self.columns) if name]

    @property
    def holes(self) -> list[tuple[int, int]]:
        """The places without a module."""
        filled = {*self.cells, *self.zeros}
        places = ((i, j) for i in range(len(self.rows)) for j in range(len(self.columns)))
        return [place for place in places if place not in filled]

    @property
    def lines_below(self) -> list[str]:
        """The lines below the names of the columns, which say what columns and cells are."""
        return [line for line in (self.across, self.note) if line]


@final
@dataclass(frozen=True, slots=True)
class Overlaps:
    """A small map of φ(i, j) of two sets of directions, with i down, j across and values in [0, 1]."""

    title: str
    phi: Sequence[Sequence[float]]
    scale: ColourScale
    notes: Sequence[str] = ()
    modules: Sequence[int] = ()


Chart = LineChart | HeatMap | Overlaps


@final
@dataclass(frozen=True, slots=True)
class Band:
    """Charts side by side under one title, and the colour keys that they share.

    Attributes
    ----------
    charts : sequence of Chart or None
        A chart that is None leaves its place free.
    columns : int or None
        The number of charts in a row; None for as many as the width allows.
    """

    charts: Sequence[Chart | None]
    title: str = ""
    keys: Sequence[Key] = ()
    columns: int | None = None


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


def line_chart(
    title: str,
    lines: Sequence[Line],
    x_label: str,
    y_label: str,
    *,
    log: bool = False,
    x_range: Limits | None = None,
    y_range: Limits | None = None,
    x_ticks: Sequence[tuple[float, str]] = (),
    levels: Mapping[str, float] | None = None,
    legend: bool = False,
    areas: Sequence[Area] = (),
    note: str = "",
) -> LineChart:
    """Make a line chart whose axes are chosen so that all lines fit.

    Parameters
    ----------
    title : str
    lines : sequence of Line
    x_label, y_label : str
    log : bool
        Whether y is logarithmic.
    x_range, y_range : tuple of float, optional
        Limits that several charts share. By default x spans the finite points with a margin, and a y axis that is not
        logarithmic begins at 0.
    x_ticks : sequence of (float, str)
        Values and texts; empty where the renderer chooses round numbers.
    levels, legend, areas, note
        As in `LineChart`.
    """
    points = [(x, y) for line in lines for x, y in zip(line.x, line.y, strict=True) if isfinite(y)]
    across = x_range or _x_limits([x for x, _ in points])
    up = y_range or _y_limits([y for _, y in points if y > 0 or not log], log=log)
    x, y = Axis(x_label, across, x_ticks), Axis(y_label, up, log=log)
    return LineChart(title, lines, x, y, levels or {}, legend, areas, note)


def direction_limits(most: int) -> Limits:
    """Return the limits of an axis of directions from 1 to ``most``."""
    margin = max(0.02 * most, 0.1)
    return 1 - margin, most + margin


def _x_limits(values: Sequence[float]) -> Limits:
    low, high = min(values, default=0.0), max(values, default=1.0)
    margin = (high - low) * 0.02 or 0.5  # a single point stands in the middle of its axis
    return low - margin, high + margin


def _y_limits(values: Sequence[float], *, log: bool) -> Limits:
    if log:
        low, high = min(values, default=0.1), max(values, default=1.0)
        return (low, high) if low < high else (low / 2, high * 2)  # one value: an axis needs two limits
    # From 0, so that heights can be compared as lengths.
    low, high = min([0.0, *values]), max([0.0, *values])
    return low, high * 1.05 or 1.0  # room above the highest point; 1 where all values are 0
