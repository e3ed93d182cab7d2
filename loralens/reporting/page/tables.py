"""Tables as HTML, row by row."""

import re
from collections.abc import Callable, Iterator
from math import isfinite, nan, prod
from typing import Any

from markupsafe import Markup, escape

from loralens.reporting.document import PageTable
from loralens.reporting.page.patterns import fill, join_units
from loralens.tables.table import Column

# Tables of more columns than this get smaller letters, and those of more than `WIDE` scroll on a narrow page.
PACKED, WIDE = 8, 12

# A line may break after the dots of a module name, but not after a decimal point.
_BREAK = re.compile(r"\.(?=\D)")
_SPECIAL = re.compile("[&<>\"']")  # the letters that `escape` replaces


def table_html(part: PageTable) -> Iterator[str]:
    """A table of a section in pieces, whose headings sort it."""
    columns = part.table.shown
    if part.folded:
        title = fill("{title} ({count})", title=part.table.title, count=len(part.table.rows))
        yield fill("<details><summary>{title}</summary>", title=title)
    elif part.table.title:
        yield fill("<h3>{title}</h3>", title=part.table.title)
    width = (" packed" if len(columns) > PACKED else "") + (" wide" if len(columns) > WIDE else "")
    yield f'\n<div class="scroll{width}"><table>\n<thead><tr>'
    for column in columns:
        kind = "words" if column.align == "left" else ""
        yield fill('<th class="{kind}"{about} scope="col">', kind=kind, about=_about(column))
        yield fill('<button type="button">{title}</button></th>', title=column.title)
    yield "</tr></thead>\n<tbody>"
    yield from _rows(part, columns)
    yield "\n</tbody></table></div>"
    if part.folded:
        yield "</details>"


def verdicts_html(part: PageTable) -> Iterator[str]:
    """The table of the first screen in pieces; on a narrow page every cell names its column."""
    columns = part.table.shown
    kinds = [Markup(' class="words"') if column.align == "left" else "" for column in columns]
    yield '\n<div class="verdicts"><table><thead><tr>'
    for column, kind in zip(columns, kinds, strict=True):
        heading = '<th{kind}{about} scope="col">{title}</th>'
        yield fill(heading, kind=kind, about=_about(column), title=column.title)
    yield "</tr></thead><tbody>"
    for row in part.table.rows:
        yield "<tr>"
        for column, kind in zip(columns, kinds, strict=True):
            cell = '<td{kind} data-l="{title}">{text}</td>'
            yield fill(cell, kind=kind, title=column.title, text=join_units(column.cell(row)))
        yield "</tr>"
    yield "</tbody></table></div>"


def _about(column: Column[Any]) -> Markup:
    return fill(' title="{about}"', about=column.about) if column.about else Markup("")


def _rows(part: PageTable, columns: list[Column[Any]]) -> Iterator[str]:
    # A page may have a hundred thousand rows, so a column is looked at once, and a row is one piece.
    cells = [(column.value, _cell_writer(column)) for column in columns]
    for row, modules in part.lines:
        numbers = f' data-m="{" ".join(map(str, modules))}"' if modules else ""
        yield f"\n<tr{numbers}>{''.join([write(value(row)) for value, write in cells])}</tr>"


def _cell_writer(column: Column[Any]) -> Callable[[Any], str]:
    """A function from the values of a column to its cells."""
    text = column.text
    if column.align == "left":
        return lambda value: f'<td class="words">{_BREAK.sub(".<wbr>", _escape(text(value)))}</td>'
    if column.bar:
        return lambda value: f'<td{_bar(value)} data-s="{_sort_key(value)}">{_escape(text(value))}</td>'
    return lambda value: f'<td data-s="{_sort_key(value)}">{_escape(text(value))}</td>'


def _escape(text: str) -> str:
    # Most cells are numbers, and to look for special letters is faster than to replace them.
    return str(escape(text)) if _SPECIAL.search(text) else text


def _bar(value: object) -> str:
    return f' class="bar" style="--f:{100 * value:.1f}%"' if isinstance(value, int | float) else ""


def _sort_key(value: object) -> str:
    """The number by which a column is sorted: for shapes and ranges their product; empty for a missing value."""
    # The usual case, which the lines below would give too.
    if type(value) is float:
        return repr(value) if isfinite(value) else ""
    values = value if isinstance(value, list | tuple) else (value,)
    number = prod(float(part) for part in values) if all(isinstance(part, int | float) for part in values) else nan
    return repr(float(number)) if isfinite(number) else ""
