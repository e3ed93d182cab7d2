"""Report: what a page says, as plain data; the page, the Markdown and their tests read nothing else."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, final

from loralens.charts.spec import Chart, Key


@final
@dataclass(frozen=True, slots=True)
class Text:
    """A paragraph; ``warning`` where a reader must not miss it."""

    text: str
    warning: bool = False


@final
@dataclass(frozen=True, slots=True)
class Notice:
    """One kind of finding: how serious, what it is called, what was seen where, and what mends it."""

    level: Literal["error", "warning", "note"]
    code: str
    where: str
    evidence: Sequence[str]
    fix: str = ""


@final
@dataclass(frozen=True, slots=True)
class Notices:
    """Findings, most serious first; ``good`` is said where there are none."""

    notices: Sequence[Notice]
    good: str


@final
@dataclass(frozen=True, slots=True)
class Entry:
    """One cell of a table: its text, what it is sorted by (its text by default), and the share that a bar shows."""

    text: str
    sort: float | None = None
    bar: float | None = None


@final
@dataclass(frozen=True, slots=True)
class Column:
    """A heading, what it means, and whether its cells are words."""

    title: str
    about: str = ""
    words: bool = False


@final
@dataclass(frozen=True, slots=True)
class Row:
    """Cells, and the modules they speak of: the filter of the page hides rows whose modules it leaves out."""

    entries: Sequence[Entry]
    modules: Sequence[int] = ()


@final
@dataclass(frozen=True, slots=True)
class Table:
    """Rows under headings. ``folded``: shown when asked for."""

    title: str
    columns: Sequence[Column]
    rows: Sequence[Row]
    folded: bool = False


@final
@dataclass(frozen=True, slots=True)
class Picture:
    """Charts under one caption.

    Attributes
    ----------
    key : str
        A short name, each once in a report: of its file beside the Markdown.
    title : str
    charts : sequence of Chart
    caption : str
        What it shows.
    chance : str
        What chance alone would give, or why there is no such level.
    source : str
        The section of the paper that it goes back to.
    alt : str
        What it shows, for those who do not see it.
    folded : bool
        Shown when asked for.
    keys : sequence of Key
        Colours that the charts share.
    """

    key: str
    title: str
    charts: Sequence[Chart]
    caption: str
    chance: str
    source: str
    alt: str
    folded: bool = False
    keys: Sequence[Key] = ()


@final
@dataclass(frozen=True, slots=True)
class Slider:
    """The choice of ranks of one adapter, to be moved: by its number among the adapters that the page carries.

    ``kept`` is what 1 − error² is called.
    """

    adapter: int
    label: str
    kept: str = "energy kept"


@final
@dataclass(frozen=True, slots=True)
class Beside:
    """Parts of several adapters, side by side where there is room: each with its label."""

    columns: Sequence[tuple[str, Sequence["Part"]]]


Part = Text | Notices | Table | Picture | Slider | Beside


@final
@dataclass(frozen=True, slots=True)
class Section:
    """A heading with what stands under it; ``key`` is its address on the page, ``lead`` what it is about."""

    key: str
    title: str
    lead: str
    parts: Sequence[Part]


@final
@dataclass(frozen=True, slots=True)
class Report:
    """A whole report.

    Attributes
    ----------
    title : str
    command : str
        That made it.
    summary : sequence of str
        What matters, a sentence each.
    sections : sequence of Section
    modules : sequence of str
        Names of all modules of all adapters: charts and rows refer to them by number.
    carried : sequence of mapping
        For each slider its stops, in words and by their place on the curve (`loralens.reporting.ranks.slider`).
    record : mapping
        The same numbers for machines.
    """

    title: str
    command: str
    summary: Sequence[str]
    sections: Sequence[Section]
    modules: Sequence[str]
    carried: Sequence[Mapping[str, Any]] = ()
    record: Mapping[str, Any] = field(default_factory=dict)
