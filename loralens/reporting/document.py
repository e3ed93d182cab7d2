"""The content of a report as plain data, from which the page and the Markdown are written."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import zip_longest
from typing import Any, Literal, final

from loralens.charts.spec import Chart, HeatMap, Key
from loralens.charts.svg import chart_box
from loralens.tables.table import Table

# The width in pixels that a page of 1280 pixels has for charts within a frame, and the gap between columns of them.
ROOM, GAP = 1160, 28
COLUMNS = 3  # the largest number of columns side by side, as in the stylesheet


def is_too_wide(charts: Iterable[Chart], columns: int) -> bool:
    """Whether one of the charts is a map too wide for its column, if the page has this number of columns."""
    columns = min(max(columns, 1), COLUMNS)
    room = (ROOM - GAP * (columns - 1)) / columns
    # Line charts shrink with their column, and maps do not: their numbers would become too small to read.
    return any(isinstance(chart, HeatMap) and chart_box(chart).width > room for chart in charts)


@final
@dataclass(frozen=True, slots=True)
class Paragraph:
    """A paragraph; ``warning`` makes it stand out."""

    text: str
    warning: bool = False


@final
@dataclass(frozen=True, slots=True)
class Notice:
    """One kind of finding: its level, its code, the place, the evidence, and how to fix it.

    Where several adapters have findings of one kind, ``each`` has the notice of each, and evidence and fix are empty.
    """

    level: Literal["error", "warning", "note"]
    code: str
    place: str
    evidence: Sequence[str]
    fix: str = ""
    each: Sequence["Notice"] = ()


def code_pieces(text: str) -> list[str]:
    """Split the text of a fix at its backticks.

    Parts with an even index are words, and parts with an odd index are commands. If a backtick has no partner, the
    whole text is one part.
    """
    pieces = text.split("`")
    return pieces if len(pieces) % 2 else [text]


@final
@dataclass(frozen=True, slots=True)
class Notices:
    """Findings, most serious first; the text ``good`` stands in their place where there are none."""

    notices: Sequence[Notice]
    good: str


@final
@dataclass(frozen=True, slots=True)
class PageTable:
    """A table of a result, as it stands on a page.

    Attributes
    ----------
    table : Table
        Only its columns with a title are shown.
    modules : sequence of sequence of int
        The modules of every row, by number: the filter of the page hides a row when it hides all modules of the row.
        Without them no row is hidden.
    folded : bool
        Whether a click is needed to show it.
    """

    table: Table[Any]
    modules: Sequence[Sequence[int]] = ()
    folded: bool = False

    @property
    def lines(self) -> Iterator[tuple[Any, Sequence[int]]]:
        """Every row with its modules."""
        # A table that the filter leaves alone has no modules for its rows.
        return zip_longest(self.table.rows, self.modules, fillvalue=())


@final
@dataclass(frozen=True, slots=True)
class Picture:
    """Charts under one caption.

    Attributes
    ----------
    key : str
        A short name, unique in a report: the id on the page, and the name of the file next to the Markdown.
    chance : str
        What chance alone would give, or why there is no such level. It has no full stop, which the caption adds.
    source : str
        The paper and section where the figure, or its measure, comes from. It has no full stop either.
    alt : str
        A description for readers who do not see the charts.
    folded : bool
        Whether a click is needed to show it.
    keys : sequence of Key
        The colour keys that the charts share.
    remark : str
        A text about this adapter alone. In a `PictureRow` it is below the charts of the adapter; the caption is shared.
    """

    key: str
    title: str
    charts: Sequence[Chart]
    caption: str
    # Required, so that no picture is made without a comparison: a number alone does not say whether it is large.
    chance: str
    source: str
    alt: str
    folded: bool = False
    # Below all charts and not in each, as charts that share a scale are compared with each other.
    keys: Sequence[Key] = ()
    remark: str = ""


@final
@dataclass(frozen=True, slots=True)
class PictureRow:
    """The same picture of several adapters under one title and one caption.

    Attributes
    ----------
    pictures : sequence of (str, Picture)
        The label of each adapter and its picture. Title, caption and source are those of the first, as all are equal.
    """

    pictures: Sequence[tuple[str, Picture]]

    @property
    def first(self) -> Picture:
        """The picture whose title, caption and source stand for all."""
        return self.pictures[0][1]

    @property
    def chance(self) -> str:
        """The level of chance where all adapters have the same; else each picture has its own."""
        return self.first.chance if len({picture.chance for _, picture in self.pictures}) == 1 else ""

    @property
    def stacked(self) -> bool:
        """Whether a map is too wide to stand beside others, so that the pictures stand one below the other."""
        return is_too_wide((chart for _, own in self.pictures for chart in own.charts), len(self.pictures))


@final
@dataclass(frozen=True, slots=True)
class Slider:
    """The two sliders that choose ranks for one adapter.

    ``adapter`` is the index of its data in `Report.sliders`. ``share`` is what 1 − error² is called on the page:
    "energy kept" or "output kept".
    """

    adapter: int
    label: str
    share: str


@final
@dataclass(frozen=True, slots=True)
class SideBySide:
    """Columns of parts that stand side by side where the page is wide enough, each under its label."""

    columns: Sequence[tuple[str, Sequence["Part"]]]

    @property
    def stacked(self) -> bool:
        """Whether a map is too wide to stand beside others, so that the columns stand one below the other."""
        pictures = [part for _, inner in self.columns for part in inner if isinstance(part, Picture)]
        return is_too_wide((chart for picture in pictures for chart in picture.charts), len(self.columns))


Part = Paragraph | Notices | PageTable | Picture | PictureRow | Slider | SideBySide


@final
@dataclass(frozen=True, slots=True)
class Section:
    """A heading, an introduction (``lead``) and the parts below; ``key`` is its id on the page."""

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
    command : str
        The command that made the report; empty where there is none.
    summary : sequence of str
        What was measured in sentences, for JSON.
    headline : str
        The strongest fact in one sentence, which is the first of the page.
    verdicts : PageTable or None
        The table below it, with one row per adapter.
    remarks : sequence of str
        The sentences of the summary that stand below the table, as neither the table nor the headline says them.
    modules : sequence of str
        Names of all modules of all adapters: charts and rows refer to them by number.
    sliders : sequence of mapping
        The data of the sliders: every stop in words, and its place on the curve (`ranks.slider_data`).
    record : mapping
        The numbers of the report, for JSON.
    """

    title: str
    command: str
    summary: Sequence[str]
    sections: Sequence[Section]
    # Numbers instead of names keep the page small: a name of 60 letters would stand in every cell and line that it has.
    modules: Sequence[str]
    sliders: Sequence[Mapping[str, Any]] = ()
    # Of the same measurements as the sections, so that --json and the page cannot differ.
    record: Mapping[str, Any] = field(default_factory=dict)
    headline: str = ""
    verdicts: PageTable | None = None
    remarks: Sequence[str] = ()
