"""Report: what a page says, as plain data; the page, the Markdown and their tests read nothing else."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import zip_longest
from typing import Any, Literal, final

from loralens.charts.spec import Chart, Key
from loralens.tables.table import Column, Table


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
class PageTable:
    """A table of a result, as it stands on a page.

    Attributes
    ----------
    table : Table
        Its columns with titles are shown.
    modules : sequence of sequence of int
        For every row the modules that it speaks of: the filter of the page hides rows whose modules it leaves out.
        Without them no row is hidden.
    folded : bool
        Shown when asked for.
    """

    table: Table[Any]
    modules: Sequence[Sequence[int]] = ()
    folded: bool = False

    @property
    def title(self) -> str:
        """What it is called."""
        return self.table.title

    @property
    def columns(self) -> list[Column[Any]]:
        """The columns that are shown."""
        return self.table.shown

    @property
    def lines(self) -> Iterator[tuple[Any, Sequence[int]]]:
        """Every row with its modules."""
        return zip_longest(self.table.rows, self.modules, fillvalue=())


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


Part = Text | Notices | PageTable | Picture | Slider | Beside


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
