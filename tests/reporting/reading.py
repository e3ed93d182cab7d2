"""Reading a report as a person does: its sentences, its tables by their headings, its charts by their titles."""

import re
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

from loralens.charts.spec import Chart, HeatMap, LineChart
from loralens.reporting.document import PageTable, Paragraph, Part, Picture, PictureRow, Report, SideBySide

NUMBER = re.compile(r"[-−+]?\d+(?:\.\d+)?(?:e[-+]?\d+)?")


def parts_of(report: Report, section: str) -> list[Part]:
    """All parts of a section, those side by side one after the other."""
    return list(_flat(next(part.parts for part in report.sections if part.key == section)))


def _flat(parts: Sequence[Part]) -> Iterator[Part]:
    for part in parts:
        if isinstance(part, SideBySide):
            for _, inner in part.columns:
                yield from _flat(inner)
        elif isinstance(part, PictureRow):
            yield from (one for _, one in part.pictures)
        else:
            yield part


def tables(report: Report, section: str, title: str) -> list[PageTable]:
    """The tables of a section whose title begins so, one for each adapter."""
    parts = parts_of(report, section)
    whole = [part for part in parts if isinstance(part, PageTable) and part.table.title.startswith(title)]
    return [own for part in whole for own in split(part)]


def split(part: PageTable) -> list[PageTable]:
    """A table of several adapters as one for each adapter; any other table as it is."""
    first, *columns = part.table.columns
    # Tables of pairs and of interactions begin with an adapter too, and have another one beside it.
    if first.title != "adapter" or part.table.columns[1].title == "and":
        return [part]
    names = list(dict.fromkeys(first.value(row) for row in part.table.rows))
    lines = {name: [(row, m) for row, m in part.lines if first.value(row) == name] for name in names}
    return [
        PageTable(
            replace(part.table, columns=columns, rows=[row for row, _ in own]), [m for _, m in own], folded=part.folded
        )
        for own in lines.values()
    ]


def cells(table: PageTable) -> list[list[str]]:
    """Every row as printed."""
    return [[column.cell(row) for column in table.table.shown] for row in table.table.rows]


def numbers_behind(table: PageTable) -> list[list[Any]]:
    """Every row as the numbers behind what is printed."""
    return [[column.value(row) for column in table.table.shown] for row in table.table.rows]


def rows(table: PageTable) -> dict[str, dict[str, str]]:
    """First cell → heading → cell, as printed."""
    headings = [column.title for column in table.table.shown]
    return {line[0]: dict(zip(headings, line, strict=True)) for line in cells(table)}


def sorted_by(table: PageTable) -> dict[str, dict[str, Any]]:
    """First cell → heading → the value that a column is sorted by."""
    headings = [column.title for column in table.table.shown]
    return {
        line[0]: dict(zip(headings, behind, strict=True))
        for line, behind in zip(cells(table), numbers_behind(table), strict=True)
    }


def texts(report: Report, section: str) -> list[str]:
    """The paragraphs of a section."""
    return [part.text for part in parts_of(report, section) if isinstance(part, Paragraph)]


def picture(report: Report, key: str) -> Picture:
    """The picture of this key."""
    sections = [parts_of(report, section.key) for section in report.sections]
    return next(part for parts in sections for part in parts if isinstance(part, Picture) and part.key == key)


def lines_of(chart: Chart) -> dict[str, dict[float, float]]:
    """Name of a line → x → y."""
    assert isinstance(chart, LineChart)
    return {line.name: dict(zip(map(float, line.x), line.y, strict=True)) for line in chart.lines}


def cells_of(chart: Chart) -> dict[tuple[str, str], float]:
    """(row, column) of a map, by their labels → its value."""
    assert isinstance(chart, HeatMap)
    return {(chart.rows[i], chart.columns[j]): cell.value for (i, j), cell in chart.cells.items()}


def tips_of(chart: Chart) -> list[str]:
    """What the cells of a map say when pointed at."""
    assert isinstance(chart, HeatMap)
    return [cell.tip for cell in chart.cells.values()]


def number(text: str) -> float:
    """The first number of a text; percentages as shares."""
    (found,) = [NUMBER.search(text)]
    assert found, text
    value = float(found.group().replace("−", "-"))
    return value / 100 if text[found.end() :].lstrip("\u00a0 ").startswith("%") else value


def numbers(text: str) -> list[float]:
    """Every number of a text; percentages as shares."""
    return [number(text[found.start() :]) for found in NUMBER.finditer(text)]
