"""Tables for other programs and documents: CSV, HTML, LaTeX, and data frames of pandas."""

import csv
from collections.abc import Sequence
from html import escape
from io import StringIO
from typing import TYPE_CHECKING, Any

from loralens.errors import OptionError, visible
from loralens.tables.table import Column, Table

if TYPE_CHECKING:
    from pandas import DataFrame

# Characters that LaTeX would take as commands; the backslash first becomes a command itself, so one pass suffices.
_LATEX = {"\\": r"\textbackslash{}", "~": r"\textasciitilde{}", "^": r"\textasciicircum{}"}
_LATEX |= {c: f"\\{c}" for c in "&%$#_{}"}


def csv_text(*tables: Table[Any]) -> str:
    """Tables of the same columns as CSV, under one heading."""
    columns = _first_columns(tables)
    # csv quotes cells that hold commas, quotes or line ends.
    stream = StringIO()
    writer = csv.writer(stream, lineterminator="\n")
    writer.writerow([column.name for column in columns])
    for table in tables:
        for row in table.rows:
            writer.writerow([_csv_cell(column.value(row)) for column in _csv_columns(table)])
    return stream.getvalue()


def frame(*tables: Table[Any]) -> "DataFrame":
    """Tables of the same columns as one data frame of pandas, which has to be installed."""
    from pandas import DataFrame

    columns = _first_columns(tables)
    rows = [[column.value(row) for column in _csv_columns(table)] for table in tables for row in table.rows]
    return DataFrame(rows, columns=[column.name for column in columns])


def html_table(table: Table[Any]) -> str:
    """A table for a notebook; nothing in it is markup but ours."""
    heads = "".join(
        f"<th{_align_style(column)}{_tooltip(column)}>{escape(column.title)}</th>" for column in table.shown
    )
    rows = "".join(
        "<tr>"
        + "".join(f"<td{_align_style(column)}>{escape(visible(column.cell(row)))}</td>" for column in table.shown)
        + "</tr>"
        for row in table.rows
    )
    title = escape(visible(table.title))
    return f"<table><caption>{title}</caption><thead><tr>{heads}</tr></thead><tbody>{rows}</tbody></table>"


def latex(table: Table[Any]) -> str:
    """A ``tabular`` of LaTeX, without packages."""
    sides = "".join("l" if column.align == "left" else "r" for column in table.shown)
    rows = [[column.title for column in table.shown]]
    rows += [[visible(column.cell(row)) for column in table.shown] for row in table.rows]
    heading, *lines = (" & ".join(map(_escape_latex, row)) + r" \\" for row in rows)
    body = "\n".join([rf"\begin{{tabular}}{{{sides}}}", r"\hline", heading, r"\hline", *lines, r"\hline"])
    return body + "\n" + r"\end{tabular}" + "\n"


def _first_columns(tables: Sequence[Table[Any]]) -> Sequence[Column[Any]]:
    """The columns of all tables, which are those of the first."""
    if not tables:
        raise OptionError("this result has no table", fix="take .record() for everything that it says")
    return _csv_columns(tables[0])


def _csv_columns(table: Table[Any]) -> Sequence[Column[Any]]:
    return [column for column in table.columns if column.csv]


def _csv_cell(value: object) -> object:
    """Lists as their items with spaces between them, to the last digit."""
    return " ".join(map(repr, value)) if isinstance(value, list | tuple) else value


def _align_style(column: Column[Any]) -> str:
    return ' style="text-align: left"' if column.align == "left" else ' style="text-align: right"'


def _tooltip(column: Column[Any]) -> str:
    return f' title="{escape(column.about)}"' if column.about else ""


def _escape_latex(text: str) -> str:
    return "".join(_LATEX.get(character, character) for character in text)
