"""Tables on a terminal: plain aligned text where nobody looks, rich where somebody does."""

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import click

from loralens.cli.terminal import raw
from loralens.errors import visible

FOLDED = 16  # characters of a first column that is folded: in fewer, a name can no longer be read
BLOCKS = " ▁▂▃▄▅▆▇█"


@dataclass(frozen=True, slots=True)
class Column:
    """A heading, and on which side its cells are aligned."""

    title: str
    align: Literal["left", "right"] = "right"


@dataclass(frozen=True, slots=True)
class Table:
    """Rows of text under columns, with a line above them."""

    title: str
    columns: Sequence[Column]
    rows: Sequence[Sequence[str]]


def show(*tables: Table) -> None:
    """Print tables, those without rows left out."""
    for table in tables:
        if not table.rows:
            continue
        if sys.stdout.isatty():
            _show_rich(table)
        else:
            click.echo(_plain(table))


def _plain(table: Table) -> str:
    return "\n".join([visible(table.title), *_lines(table), ""])


def _lines(table: Table, first: int = 0) -> list[str]:
    """The headings and the rows from one column on, aligned."""
    columns = table.columns[first:]
    cells = [[column.title for column in columns], *([visible(cell) for cell in row[first:]] for row in table.rows)]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    return [
        "  ".join(
            cell.ljust(width) if column.align == "left" else cell.rjust(width)
            for cell, width, column in zip(row, widths, columns, strict=True)
        ).rstrip()
        for row in cells
    ]


def _show_rich(table: Table) -> None:
    from rich.console import Console
    from rich.table import Table as RichTable
    from rich.text import Text

    drawn = RichTable(box=None, header_style="bold", pad_edge=False, padding=(0, 2, 0, 0))
    for i, column in enumerate(table.columns):
        drawn.add_column(Text(column.title), justify=column.align, overflow="fold", no_wrap=i > 0)
    for row in table.rows:
        drawn.add_row(*(Text(visible(cell)) for cell in row))  # Text, not markup: a module called [red] stays text
    console = Console(file=raw(sys.stdout))
    console.print(Text(visible(table.title), style="bold cyan"))
    names = max(len(visible(text)) for text in (table.columns[0].title, *(row[0] for row in table.rows)))
    rest = max(map(len, _lines(table, 1))) if len(table.columns) > 1 else 0
    if rest + 2 + min(names, FOLDED) <= console.width:
        console.print(drawn)
    else:  # rich would cut digits off the numbers: the name has a line of its own above them
        heading, *lines = _lines(table, 1)
        console.print(Text(f"{table.columns[0].title}\n  {heading}", style="bold"), soft_wrap=True)
        for row, line in zip(table.rows, lines, strict=True):
            console.print(Text(f"{visible(row[0])}\n  {line}"), soft_wrap=True)
    console.print()


def count(of: int, noun: str) -> str:
    """``1 module``, ``12 modules``."""
    return f"{of:,} {noun}{'' if of == 1 else 's'}"


def number(value: float) -> str:
    """Four significant digits."""
    return f"{value:.4g}"


def size(count: int) -> str:
    """Bytes in the largest unit that leaves a number above 1."""
    value, unit = float(count), "B"
    for bigger in ("KiB", "MiB", "GiB"):
        if value < 1024:
            break
        value, unit = value / 1024, bigger
    return f"{value:.0f} {unit}" if unit == "B" else f"{value:.1f} {unit}"


def spark(values: Sequence[float], width: int = 16) -> str:
    """Bars of non-negative values relative to the largest; each bar the largest of its share of a long row."""
    top = max(values, default=0.0)
    if top == 0:
        return ""
    count = min(width, len(values))
    shares = [values[len(values) * i // count : len(values) * (i + 1) // count] for i in range(count)]
    return "".join(BLOCKS[max(1, round(8 * max(share) / top))] if max(share) > 0 else " " for share in shares)
