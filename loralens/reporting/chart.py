"""Charts as plain data: lines over an axis, and maps of cells. What they look like is for the page to say."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal, final

LEGEND = 24  # lines beyond which no names stand beside a chart

Ink = tuple[Literal["series", "block", "quiet"], int]  # a colour by what it stands for: the n-th series, n of 16 blocks


@final
@dataclass(frozen=True, slots=True)
class Line:
    """One line: its name, its points, its colour, and the modules it stands for, by their number on the page.

    A point without a finite y is left out. ``dots`` draws the points too; ``dotted`` is an even looser ``dashed``.
    """

    name: str
    x: Sequence[float]
    y: Sequence[float]
    ink: Ink
    modules: Sequence[int] = ()
    dots: bool = False
    dashed: bool = False
    dotted: bool = False


@final
@dataclass(frozen=True, slots=True)
class Lines:
    """Lines over one pair of axes.

    Attributes
    ----------
    title : str
    lines : sequence of Line
    x_label, y_label : str
    log : bool
        Whether y is logarithmic.
    y_range : tuple of float, optional
        Where charts beside each other share it.
    levels : mapping of str to float
        Horizontal lines, such as a chance level, and what they are called.
    legend : bool
        Whether the names of the lines stand beside them.
    """

    title: str
    lines: Sequence[Line]
    x_label: str
    y_label: str
    log: bool = False
    y_range: tuple[float, float] | None = None
    levels: Mapping[str, float] = field(default_factory=dict)
    legend: bool = False

    @property
    def named(self) -> list[Line]:
        """The lines whose names stand beside the chart: all of them, or none where they would be too many."""
        return list(self.lines) if self.legend and len(self.lines) <= LEGEND else []


@final
@dataclass(frozen=True, slots=True)
class Scale:
    """The colours of a map: what they span, and what lies at chance.

    ``diverging`` ones have their middle at 0. ``label`` names the quantity and its unit; ``form`` writes a value, as
    `format` takes it.
    """

    low: float
    high: float
    label: str
    diverging: bool = False
    chance: float | None = None
    form: str = ".3g"

    def written(self, value: float) -> str:
        """A value as text; what is 0 to rounding has no sign."""
        text = f"{value:{self.form}}"
        if not text.strip("+-0.%"):
            text = text.lstrip("+-")
        return text.replace("-", "−").replace("%", " %")

    @property
    def written_chance(self) -> str:
        """The level of chance as text; a small one is not written as 0."""
        value = self.chance or 0.0
        if not value or self.written(value).strip("0. %"):
            return self.written(value)
        return f"{100 * value:.1g} %" if "%" in self.form else f"{value:.1g}"


@final
@dataclass(frozen=True, slots=True)
class Cell:
    """One cell of a map: its value, what hovering says, and the modules it stands for."""

    value: float
    tip: str
    modules: Sequence[int] = ()


@final
@dataclass(frozen=True, slots=True)
class Heat:
    """A map: rows down, columns across; a cell that is not there is dotted. ``written``: cells say their value."""

    title: str
    rows: Sequence[str]
    columns: Sequence[str]
    cells: Mapping[tuple[int, int], Cell]
    scale: Scale
    across: str = ""
    written: bool = False


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
