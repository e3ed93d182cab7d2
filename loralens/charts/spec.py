"""Charts as plain data: lines over axes, maps of cells, and figures of several. Renderers decide nothing but looks.

A chart carries its limits, its ticks and their labels, so that it is the same on a page (`loralens.charts.svg_lines`,
`loralens.charts.svg_maps`) and in a picture (`loralens.charts.mpl`).
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from math import isfinite
from typing import Literal, final

LEGEND = 24  # lines beyond which no names stand beside a chart

Ink = tuple[Literal["series", "block", "quiet"], int]  # a colour by what it stands for: the n-th series, n of 16 blocks
Marker = Literal["", "dot", "square", "triangle", "star"]
Limits = tuple[float, float]


@final
@dataclass(frozen=True, slots=True)
class Axis:
    """An axis: what it shows, where it begins and ends, and the numbers beside it.

    Attributes
    ----------
    label : str
    limits : tuple of float
    ticks : sequence of (float, str)
        Places and their labels.
    log : bool
    """

    label: str
    limits: Limits
    ticks: Sequence[tuple[float, str]]
    log: bool = False


@final
@dataclass(frozen=True, slots=True)
class Line:
    """One line: its name, its points, its colour, and the modules it stands for, by their number on the page.

    A point without a finite y is left out. ``marker`` draws the points too; ``dotted`` is an even looser ``dashed``.
    ``labels`` are written beside the points, one each, empty ones left out; ``unjoined`` draws the points alone.
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
    """What lies between two curves, behind the lines of a chart."""

    x: Sequence[float]
    low: Sequence[float]
    high: Sequence[float]


@final
@dataclass(frozen=True, slots=True)
class Lines:
    """Lines over one pair of axes.

    Attributes
    ----------
    title : str
    lines : sequence of Line
    x, y : Axis
    levels : mapping of str to float
        Horizontal lines, such as a chance level, and what they are called.
    legend : bool
        Whether the names of the lines stand beside them.
    areas : sequence of Area
    note : str
        What the lines do not show, in a few words in the lower left corner; lines of text.
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
        """The lines whose names stand beside the chart: all of them, or none where they would be too many."""
        return list(self.lines) if self.legend and len(self.lines) <= LEGEND else []

    @property
    def empty(self) -> bool:
        """Whether there is no point to draw."""
        return not any(isfinite(y) and (y > 0 or not self.y.log) for line in self.lines for y in line.y)


@final
@dataclass(frozen=True, slots=True)
class Scale:
    """The colours of a map: what they span, and what lies at chance.

    Attributes
    ----------
    low, high : float
        Where the colours begin and end.
    label : str
        The quantity and its unit.
    diverging : bool
        The middle of the colours is at 0.
    chance, chance_high : float or None
        The level of chance; the highest where it is not the same in all cells.
    form : str
        How a value is written, as `format` takes it.
    doublings : bool
        Values are logarithms to base 2, and are written as the factors they stand for.
    ticks : sequence of (float, str)
        What stands under the colours; by default the two ends.
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
        """A value as text; what is 0 to rounding has no sign."""
        text = f"{2.0**value if self.doublings else value:{self.form}}"
        if not text.strip("+-0.%"):
            text = text.lstrip("+-")
        return text.replace("-", "−").replace("%", " %")

    @property
    def marks(self) -> list[tuple[float, str]]:
        """Where a number stands under the colours, and which."""
        return list(self.ticks) or [(self.low, self.text(self.low)), (self.high, self.text(self.high))]

    @property
    def levels(self) -> list[float]:
        """The one or two levels of chance that are marked."""
        if self.chance is None or self.high <= self.low:
            return []
        return [self.chance] if self.chance_high in (None, self.chance) else [self.chance, self.chance_high or 0.0]

    @property
    def chance_text(self) -> str:
        """The level of chance as text; a small one is not written as 0."""
        return " to ".join(self._level(level) for level in self.levels or [self.chance or 0.0])

    def _level(self, value: float) -> str:
        if not value or self.text(value).strip("0. %"):
            return self.text(value)
        return f"{100 * value:.1g} %" if "%" in self.form else f"{value:.1g}"


@final
@dataclass(frozen=True, slots=True)
class Ramp:
    """The colours of blocks, from the first to the last: what a block is called, and names at places in [0, 1]."""

    label: str
    ticks: Sequence[tuple[float, str]]


Key = Scale | Ramp


@final
@dataclass(frozen=True, slots=True)
class Cell:
    """One cell of a map: its value, what hovering says, and the modules it stands for."""

    value: float
    tip: str = ""
    modules: Sequence[int] = ()


@final
@dataclass(frozen=True, slots=True)
class Heat:
    """A map: rows down, columns across.

    Attributes
    ----------
    title : str
    rows, columns : sequence of str
        What they are called.
    cells : mapping of (int, int) to Cell
        A cell that is not there is hatched.
    scale : Scale
    across : str
        What the columns are.
    written : bool
        Whether cells say their value.
    zeros : sequence of (int, int)
        Cells of modules that are there and have no value, as ΔW is 0: a cross.
    row_labels, column_labels : sequence of str
        What stands beside the map, where that is not all names: one for each row or column, empty ones left out.
    row_edges, column_edges : sequence of int
        Where a stack of blocks, or a group, begins: the line before that row or column.
    heads : sequence of (int, int, str)
        First column, end and name of stacks that stand above the map.
    tree : sequence of sequence of (float, float)
        Branches above the columns: x in columns from 0, y in [0, 1].
    note : str
        What the cells are, in a few words.
    room : float
        Pixels that the cells share at most, across and down.
    """

    title: str
    rows: Sequence[str]
    columns: Sequence[str]
    cells: Mapping[tuple[int, int], Cell]
    scale: Scale
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
    def beside(self) -> list[tuple[int, str]]:
        """The rows that are named, and how."""
        return [(i, name) for i, name in enumerate(self.row_labels or self.rows) if name]

    @property
    def below(self) -> list[tuple[int, str]]:
        """The columns that are named, and how."""
        return [(j, name) for j, name in enumerate(self.column_labels or self.columns) if name]

    @property
    def holes(self) -> list[tuple[int, int]]:
        """Cells that are not there."""
        known = {*self.cells, *self.zeros}
        places = ((i, j) for i in range(len(self.rows)) for j in range(len(self.columns)))
        return [place for place in places if place not in known]


@final
@dataclass(frozen=True, slots=True)
class Overlaps:
    """φ(i, j) of two sets of directions, i down and j across, in [0, 1]; small, and many side by side."""

    title: str
    phi: Sequence[Sequence[float]]
    scale: Scale
    notes: Sequence[str] = ()
    modules: Sequence[int] = ()


Chart = Lines | Heat | Overlaps


@final
@dataclass(frozen=True, slots=True)
class Band:
    """Charts side by side under one title, as many in a row as there is room for, and the keys that they share.

    ``columns`` asks for so many in a row. A chart that is None leaves its place free.
    """

    charts: Sequence[Chart | None]
    title: str = ""
    keys: Sequence[Key] = ()
    columns: int | None = None


@final
@dataclass(frozen=True, slots=True)
class Figure:
    """A whole figure: bands one below the other under a title, which may have several lines."""

    title: str
    bands: Sequence[Band]

    @property
    def charts(self) -> list[Chart]:
        """All charts, band by band."""
        return [chart for band in self.bands for chart in band.charts if chart is not None]
