"""Tables as lines of text that fit the width of a terminal; no digit of a number is ever cut.

Where the columns of a table are too wide together, text on the left is shortened in its middle; then whole columns are
left out, those of the lowest priority first, and named below the table.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from os.path import commonprefix
from typing import Any
from unicodedata import combining, east_asian_width

from loralens.errors import visible
from loralens.tables.table import ALWAYS, Column, Table

# Cells may hold single spaces, so only a wider gap shows where a column ends.
GAP = 2  # spaces between columns
SHORTEST = 16  # characters in which the name of a module can still be told from others


@dataclass(frozen=True, slots=True)
class TextLayout:
    """A table as text.

    Attributes
    ----------
    heading : str
        The titles of the columns.
    lines : list of str
        One a row.
    note : str
        Which columns were left out; empty where none was.
    """

    title: str
    heading: str
    lines: list[str]
    note: str

    def __str__(self) -> str:
        note = [self.note] if self.note else []
        return "\n".join([self.title, self.heading, *self.lines, *note])


def lay_out(table: Table[Any], width: int | None = None) -> TextLayout:
    """The table in at most ``width`` columns of a terminal; in as many as it takes where that is None."""
    columns = table.shown
    cells = [[visible(column.cell(row)) for row in table.rows] for column in columns]
    visible_columns = list(range(len(columns)))
    widths = _natural_widths(columns, cells)
    fitted = {i: widths[i] for i in visible_columns}
    while width is not None:
        fitted = _fit_widths(visible_columns, columns, widths, width)
        # The first column names the rows: without it the others could not be read.
        expendable = [i for i in visible_columns[1:] if columns[i].priority < ALWAYS]
        if _total_width(fitted) <= width or not expendable:
            break
        # Among equal priorities the column furthest to the right goes first.
        visible_columns.remove(min(expendable, key=lambda i: (columns[i].priority, -i)))
    heading = _join_cells(
        [_pad(shorten(columns[i].title, fitted[i]), fitted[i], columns[i].align) for i in visible_columns]
    )
    fitting = {i: shorten_names(cells[i], fitted[i]) for i in visible_columns}
    lines = [
        _join_cells([_pad(fitting[i][row], fitted[i], columns[i].align) for i in visible_columns])
        for row in range(len(table.rows))
    ]
    hidden = [columns[i].title for i in range(len(columns)) if i not in visible_columns]
    note = f"not shown here: {', '.join(hidden)} (a wider terminal, --csv and --json show them)" if hidden else ""
    return TextLayout(visible(table.title), heading, lines, note)


def _natural_widths(columns: Sequence[Column[Any]], cells: Sequence[Sequence[str]]) -> list[int]:
    return [
        max(map(display_width, (column.title, *texts)), default=0) for column, texts in zip(columns, cells, strict=True)
    ]


def _total_width(widths: dict[int, int]) -> int:
    return sum(widths.values()) + GAP * (len(widths) - 1)


def _fit_widths(
    visible_columns: Sequence[int], columns: Sequence[Column[Any]], natural: Sequence[int], width: int
) -> dict[int, int]:
    """Widths of the columns, the widest text made narrower until all of them fit or none can be narrower."""
    widths = {i: natural[i] for i in visible_columns}
    text = [i for i in visible_columns if columns[i].align == "left"]
    while (excess := _total_width(widths) - width) > 0:
        shrinkable = [i for i in text if widths[i] > SHORTEST]
        if not shrinkable:
            break
        # The widest text is shortened first, down to the next widest, so that short names stay whole as long as
        # possible.
        widest = max(shrinkable, key=lambda i: widths[i])
        other_widths = [widths[i] for i in shrinkable if i != widest]
        floor = max(SHORTEST, max(other_widths, default=SHORTEST))
        widths[widest] -= max(1, min(excess, widths[widest] - floor))
    return widths


def shorten_names(texts: Sequence[str], width: int) -> list[str]:
    """The texts of one column, each in at most ``width`` columns of a terminal.

    What all of them begin with says nothing in which they differ, so it is left out first, at a dot or a slash; what
    all of them end with only where some would be shown alike.
    """
    if all(display_width(text) <= width for text in texts):
        return list(texts)
    shared = commonprefix(list(texts)) if len({*texts}) > 1 else ""  # noqa: RUF071 - of names, not only of paths
    end = max(shared.rfind("."), shared.rfind("/")) + 1
    begun = ["…" + text[end:] if end > 1 else text for text in texts]
    shortened = [shorten(text, width) for text in begun]
    if len({*shortened}) == len({*texts}):
        return shortened
    ending = commonprefix([text[::-1] for text in begun])  # noqa: RUF071 - as above
    start = max(ending.rfind("."), ending.rfind("/")) + 1
    return [shorten(text[: len(text) - start] + "…", width) for text in begun] if start > 1 else shortened


def shorten(text: str, width: int) -> str:
    """``text`` in at most ``width`` columns of a terminal, its middle replaced by an ellipsis.

    The end of a module's name says what it is, so more of the end is kept than of the beginning.
    """
    if display_width(text) <= width:
        return text
    # Two thirds for the end: there a module's name says which projection it is, at the beginning which block.
    tail = (2 * (width - 1) + 2) // 3
    return _prefix(text, width - 1 - tail) + "…" + _prefix(text[::-1], tail)[::-1]


def wrap(text: str, width: int) -> list[str]:
    """``text`` in lines of at most ``width`` columns of a terminal, broken at spaces; longer words are shortened."""
    lines = [""]
    # A word without a space to break at (a path) is shortened, as it would overflow the line otherwise.
    for word in (shorten(word, width) for word in text.split(" ")):
        longer = f"{lines[-1]} {word}" if lines[-1] else word
        if display_width(longer) <= width:
            lines[-1] = longer
        else:
            lines.append(word)
    return lines


def _prefix(text: str, width: int) -> str:
    """As many characters from the start as fit."""
    end = used = 0
    for end, character in enumerate(text, start=1):
        used += display_width(character)
        if used > width:
            return text[: end - 1]
    return text[:end]


def display_width(text: str) -> int:
    """Columns of a terminal that a text takes: wide characters of East Asia take two, combining ones none."""
    # A short cut for nearly all texts: unicodedata is asked character by character.
    if text.isascii():
        return len(text)
    return sum(0 if combining(c) else 2 if east_asian_width(c) in "WF" else 1 for c in text)


def _pad(text: str, width: int, align: str) -> str:
    spaces = " " * (width - display_width(text))
    return text + spaces if align == "left" else spaces + text


def _join_cells(cells: Sequence[str]) -> str:
    return (" " * GAP).join(cells).rstrip()
