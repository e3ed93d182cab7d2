"""Reading a report as a person does: its sentences, its tables by their headings, its charts by their titles."""

import re
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import numpy as np

from loralens.charts.spec import Chart, LineChart
from loralens.charts.spec import HeatMap as HeatMap
from loralens.reporting.document import Notice as Notice
from loralens.reporting.document import Notices as Notices
from loralens.reporting.document import PageTable, Panel, Part, Picture
from loralens.reporting.document import Paragraph as Paragraph
from loralens.reporting.document import Report as Report
from loralens.reporting.document import Slider as Slider
from loralens.tables import Table

NUMBER = re.compile(r"[-−+]?\d+(?:\.\d+)?(?:e[-+]?\d+)?")


def parts_of(report: Report, section: str) -> list[Part]:
    """All parts of a section."""
    return list(next(part.parts for part in report.sections if part.key == section))


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
    names = dict.fromkeys(first.value(row) for row in part.table.rows)
    rows = {name: [row for row in part.table.rows if first.value(row) == name] for name in names}
    return [replace(part, table=replace(part.table, columns=columns, rows=own)) for own in rows.values()]


def cells(table: PageTable) -> list[list[str]]:
    """Every row as printed."""
    return [[column.cell(row) for column in table.table.shown] for row in table.table.rows]


def numbers_behind(table: PageTable) -> list[list[Any]]:
    """Every row as the numbers behind what is printed."""
    return [[column.value(row) for column in table.table.shown] for row in table.table.rows]


def rows(table: PageTable | Table[Any]) -> dict[str, dict[str, str]]:
    """First cell → heading → cell, as printed."""
    table = PageTable(table) if isinstance(table, Table) else table
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


def pictures(report: Report) -> dict[str, tuple[Picture, Panel]]:
    """Key → the panel and its picture."""
    parts = [part for section in report.sections for part in section.parts if isinstance(part, Picture)]
    return {panel.key: (part, panel) for part in parts for panel in part.panels}


def picture(report: Report, key: str) -> SimpleNamespace:
    """The panel of this key, with title, caption, chance and source of its picture."""
    both = pictures(report)[key]
    return SimpleNamespace(**{k: getattr(one, k) for one in both for k in one.__dataclass_fields__})


def lines_of(chart: Chart) -> dict[str, dict[float, float]]:
    """Name of a line → x → y."""
    assert isinstance(chart, LineChart)
    return {line.name: dict(zip(map(float, line.x), line.y, strict=True)) for line in chart.lines}


def cells_of(chart: Chart) -> dict[tuple[str, str], float]:
    """(row, column) of a map, by their labels → its value, where it has one."""
    assert isinstance(chart, HeatMap)
    values = np.ndenumerate(chart.values)
    return {(chart.rows[i], chart.columns[j]): float(value) for (i, j), value in values if np.isfinite(value)}


def tips_of(chart: Chart) -> list[str]:
    """What the cells of a map say when pointed at."""
    assert isinstance(chart, HeatMap)
    return [": ".join(tip) for tip in chart.tips.values()]


def number(text: str) -> float:
    """The first number of a text; percentages as shares."""
    (found,) = [NUMBER.search(text)]
    assert found, text
    value = float(found.group().replace("−", "-"))
    return value / 100 if text[found.end() :].lstrip("\u00a0 ").startswith("%") else value


def numbers(text: str) -> list[float]:
    """Every number of a text; percentages as shares."""
    return [number(text[found.start() :]) for found in NUMBER.finditer(text)]
