"""Charts as plain data: line charts, maps of cells, and figures of several charts.

A chart holds its limits, its ticks and their labels, so that it is the same on a page (`loralens.charts.svg_lines`,
`loralens.charts.svg_maps`) and in a picture (`loralens.charts.mpl`). The renderers decide only how it looks.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from math import isfinite
from typing import Literal, final

LEGEND = 24  # lines up to which a chart has a legend: more names would take more room than the chart

Ink = tuple[
    Literal["series", "block", "quiet"], int
]  # a colour by its meaning: the n-th series, or the n-th of 16 blocks
Marker = Literal["", "dot", "square", "triangle", "star"]
Limits = tuple[float, float]


@final
@dataclass(frozen=True, slots=True)
class Axis:
    """An axis: its label, its limits, its ticks as pairs of value and text, and whether it is logarithmic."""

    label: str
    limits: Limits
    ticks: Sequence[tuple[float, str]]
    log: bool = False


@final
@dataclass(frozen=True, slots=True)
class Line:
    """One line: its name, points and colour, and the modules that it stands for, by their number on the page.

    Points without a finite y are left out. ``marker`` also marks the points, and ``unjoined`` draws only them.
    ``labels`` holds one text per point, which is written next to it unless it is empty.
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
        Whether the chart has a legend.
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
        """The lines of the legend: all of them, or none where they are too many."""
        return list(self.lines) if self.legend and len(self.lines) <= LEGEND else []

    @property
    def empty(self) -> bool:
        """Whether there is no point to draw."""
        return not any(isfinite(y) and (y > 0 or not self.y.log) for line in self.lines for y in line.y)


@final
@dataclass(frozen=True, slots=True)
class ColourScale:
    """The colour scale of a map: its limits, and the level of chance.

    Attributes
    ----------
    low, high : float
        The values of the first and of the last colour.
    label : str
        The quantity and its unit.
    diverging : bool
        Whether the middle of the colours is at 0.
    chance, chance_high : float or None
        The level of chance, and the highest such level where cells differ in it.
    form : str
        The format specification of values, as for `format`.
    doublings : bool
        Whether values are logarithms to base 2, which are written as the factors that they stand for.
    ticks : sequence of (float, str)
        Values and texts under the colours; by default the two ends.
    """

    low: float
    high: float
    label: str
    diverging: bool = False
    chance: float | None = None
    chance_high: float | None = None
    form: str = ".3g"
    doublings: bool = False
    ticks: Sequence[tuple[float, str]] = ()

    def text(self, value: float) -> str:
        """A value as text, without a sign where it rounds to 0."""
        text = f"{2.0**value if self.doublings else value:{self.form}}"
        if not text.strip("+-0.%"):
            text = text.lstrip("+-")
        return text.replace("-", "−").replace("%", " %")

    @property
    def marks(self) -> list[tuple[float, str]]:
        """Values and texts under the colours."""
        return list(self.ticks) or [(self.low, self.text(self.low)), (self.high, self.text(self.high))]

    @property
    def levels(self) -> list[float]:
        """The one or two levels of chance that are marked."""
        # A scale without width has no place for a mark.
        if self.chance is None or self.high <= self.low:
            return []
        return [self.chance] if self.chance_high in (None, self.chance) else [self.chance, self.chance_high or 0.0]

    @property
    def chance_text(self) -> str:
        """The level of chance as text, with enough digits not to be written as 0."""
        return " to ".join(self._level(level) for level in self.levels or [self.chance or 0.0])

    def _level(self, value: float) -> str:
        if not value or self.text(value).strip("0. %"):
            return self.text(value)
        return f"{100 * value:.1g} %" if "%" in self.form else f"{value:.1g}"


@final
@dataclass(frozen=True, slots=True)
class Ramp:
    """The colours of blocks from the first to the last: a label, and names of blocks at places in [0, 1]."""

    label: str
    ticks: Sequence[tuple[float, str]]


Key = ColourScale | Ramp


@final
@dataclass(frozen=True, slots=True)
class Cell:
    """One cell of a map: its value, the text shown on hovering, and the modules that it stands for."""

    value: float
    tip: str = ""
    modules: Sequence[int] = ()


@final
@dataclass(frozen=True, slots=True)
class HeatMap:
    """A map of coloured cells in rows and columns.

    Attributes
    ----------
    rows, columns : sequence of str
        The names of all rows and columns.
    cells : mapping of (int, int) to Cell
        (row, column) → cell; places without a cell are hatched.
    across : str
        What the columns are, such as "block".
    written : bool
        Whether cells show their value.
    zeros : sequence of (int, int)
        Cells whose modules exist but have no value because ΔW is 0; they are crossed.
    row_labels, column_labels : sequence of str
        The texts next to the map, where these are not all names: one per row or column, empty where there is none.
    row_edges, column_edges : sequence of int
        The rows or columns before which a line is drawn, as a stack of blocks or a group begins there.
    heads : sequence of (int, int, str)
        First column, end and name of each stack that is named above the map.
    tree : sequence of sequence of (float, float)
        Branches above the columns, with x in columns from 0 and y in [0, 1].
    note : str
        A few words about what the cells are.
    room : float
        Largest width and height in pixels of all cells together.
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
        """The rows that have a label, with it."""
        return [(i, name) for i, name in enumerate(self.row_labels or self.rows) if name]

    @property
    def column_texts(self) -> list[tuple[int, str]]:
        """The columns that have a label, with it."""
        return [(j, name) for j, name in enumerate(self.column_labels or self.columns) if name]

    @property
    def holes(self) -> list[tuple[int, int]]:
        """The places without a module."""
        filled = {*self.cells, *self.zeros}
        places = ((i, j) for i in range(len(self.rows)) for j in range(len(self.columns)))
        return [place for place in places if place not in filled]


@final
@dataclass(frozen=True, slots=True)
class Overlaps:
    """A small map of φ(i, j) of two sets of directions, i down and j across, with values in [0, 1]."""

    title: str
    phi: Sequence[Sequence[float]]
    scale: ColourScale
    notes: Sequence[str] = ()
    modules: Sequence[int] = ()


Chart = LineChart | HeatMap | Overlaps


@final
@dataclass(frozen=True, slots=True)
class Band:
    """Charts side by side under one title, in rows as long as the width allows, and the colour keys that they share.

    ``columns`` fixes the number of charts in a row. A chart that is None leaves its place free.
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
