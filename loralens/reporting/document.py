"""The content of a report as plain data, from which templates make the page and the Markdown."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal, final

from loralens.charts.spec import Chart, Key
from loralens.tables.table import Table


@final
@dataclass(frozen=True, slots=True)
class Paragraph:
    """A paragraph; ``warning`` makes it stand out."""

    kind: ClassVar = "paragraph"
    text: str
    warning: bool = False


@final
@dataclass(frozen=True, slots=True)
class Notice:
    """One kind of finding: its level, its code, the place, the evidence, and how to fix it.

    Parts of ``fix`` between two backticks are commands. Where several adapters have findings of one kind, ``each`` has
    the notice of each, and evidence and fix are empty.
    """

    level: Literal["error", "warning", "note"]
    code: str
    place: str
    evidence: Sequence[str]
    fix: str = ""
    each: Sequence["Notice"] = ()


@final
@dataclass(frozen=True, slots=True)
class Notices:
    """Findings, most serious first; the text ``good`` stands in their place where there are none."""

    kind: ClassVar = "notices"
    notices: Sequence[Notice]
    good: str


@final
@dataclass(frozen=True, slots=True)
class PageTable:
    """A table of a result, whose columns with a title are shown; ``folded`` says that a click is needed to show it."""

    kind: ClassVar = "table"
    table: Table[Any]
    folded: bool = False


@final
@dataclass(frozen=True, slots=True)
class Panel:
    """The charts of one adapter in a picture.

    Attributes
    ----------
    key : str
        A short name, unique in a report: the id on the page, and the name of the file next to the Markdown.
    remark : str
        A text about this adapter alone.
    keys : sequence of Key
        The colour keys that the charts share.
    label : str
        The name of the adapter; empty where there is only one.
    """

    key: str
    charts: Sequence[Chart]
    remark: str = ""
    keys: Sequence[Key] = ()
    label: str = ""


@final
@dataclass(frozen=True, slots=True)
class Picture:
    """Charts of one adapter or several under one title and one caption.

    ``chance`` says what chance alone would give, or why there is no such level; ``source`` is the paper and section
    where the figure, or its measure, comes from. Neither has a full stop, which the template adds.
    """

    kind: ClassVar = "picture"
    title: str
    caption: str
    # Required, so that no picture is made without a comparison: a number alone does not say whether it is large.
    chance: str
    source: str
    panels: Sequence[Panel]
    folded: bool = False


@final
@dataclass(frozen=True, slots=True)
class Slider:
    """The slider that chooses a rank for one adapter.

    Attributes
    ----------
    share : str
        What 1 − error² is called: "energy kept" or "output kept".
    data : mapping
        The stops in words, with their places on the curve, for the script of the page.
    """

    kind: ClassVar = "slider"
    label: str
    share: str
    data: Mapping[str, Any]


Part = Paragraph | Notices | PageTable | Picture | Slider


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
    headline : str
        The strongest fact in one sentence. It is the first of a page without ``answers``, or about several adapters.
    answers : sequence of (str, str)
        The questions of every reader, and their answers. Parts of an answer between two backticks are commands.
    verdicts : Table or None
        The table below it, with one row per adapter.
    remarks : sequence of str
        Further sentences below the table.
    record : mapping
        The numbers of the report, for JSON.
    """

    title: str
    command: str
    headline: str
    sections: Sequence[Section]
    answers: Sequence[tuple[str, str]] = ()
    remarks: Sequence[str] = ()
    verdicts: Table[Any] | None = None
    record: Mapping[str, Any] = field(default_factory=dict)

    @property
    def summary(self) -> Sequence[str]:
        """What was measured, in sentences."""
        return self.record.get("summary") or [self.headline, *self.remarks]
