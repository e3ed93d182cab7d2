"""Tables as lines of text that fit the width of a terminal; no digit of a number is ever cut.

If the columns of a table are too wide together, texts that are aligned on the left are shortened: names in their
middle, sentences at their end. If that is not enough, whole columns are left out, those of the lowest priority first,
and named below the table.
"""

import re
from bisect import bisect_left
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from os.path import commonprefix
from typing import Any

from loralens.errors import visible
from loralens.tables.table import ALWAYS, Column, Table

GAP = 2  # spaces between columns; cells may hold single spaces, so only a wider gap shows where a column ends
# No text is made narrower than this. In 16 characters the name of a module still shows its block and its projection:
# "…10.s…ttn.q_proj" stands for model.layers.10.self_attn.q_proj.
SHORTEST = 16
# Blocks of Unicode without wide and combining characters: Latin, Greek, punctuation, arrows, mathematics, and bars.
_NARROW = re.compile(r"[\x00-\u02ff\u0370-\u0482\u2000-\u20cf\u2100-\u22ff\u2500-\u25fc]*")


@dataclass(frozen=True, slots=True)
class TextLayout:
    """A table as text.

    Attributes
    ----------
    heading : str
        The line with the titles of the columns; empty if none has one.
    lines : list of str
        One line for each row.
    note : str
        A sentence that names the columns that were left out; empty if none was.
    """

    title: str
    heading: str
    lines: list[str]
    note: str

    def __str__(self) -> str:
        note = [self.note] if self.note else []
        heading = [self.heading] if self.heading else []
        return "\n".join([self.title, *heading, *self.lines, *note])


def lay_out(table: Table[Any], width: int | None = None) -> TextLayout:
    """Lay a table out in at most ``width`` columns of a terminal, or without a limit if that is None.

    The table is wider than ``width`` only if the columns that are never left out do not fit.
    """
    columns = table.shown
    cells = [[visible(column.cell(row)) for row in table.rows] for column in columns]
    natural = [max(map(display_width, (column.title, *texts))) for column, texts in zip(columns, cells, strict=True)]
    shown, widths = list(range(len(columns))), dict(enumerate(natural))
    shortest: dict[int, int] = {}
    if width is not None and _total_width(widths) > width:
        shortest = {i: _shortest(columns[i], cells[i], natural[i]) for i in shown}
    while width is not None:
        widths = _fit_widths({i: natural[i] for i in shown}, shortest, width)
        # The first column names the rows, and without it the other columns would have no meaning.
        expendable = [i for i in shown[1:] if columns[i].priority < ALWAYS]
        if _total_width(widths) <= width or not expendable:
            break
        # Among equal priorities the column furthest to the right is left out first.
        shown.remove(min(expendable, key=lambda i: (columns[i].priority, -i)))

    def line(texts: Iterable[str]) -> str:
        padded = [_pad(text, widths[i], columns[i].align) for i, text in zip(shown, texts, strict=True)]
        return (" " * GAP).join(padded).rstrip()

    heading = line(shorten(columns[i].title, widths[i]) for i in shown)
    lines = [line(row) for row in zip(*(_fitted(columns[i], cells[i], widths[i]) for i in shown), strict=True)]
    hidden = [column.title for i, column in enumerate(columns) if i not in shown]
    note = f"not shown here: {', '.join(hidden)} (a wider terminal, --csv and --json show them)" if hidden else ""
    return TextLayout(visible(table.title), heading, lines, note)


def _total_width(widths: Mapping[int, int]) -> int:
    return sum(widths.values()) + GAP * (len(widths) - 1)


def _shortest(column: Column[Any], texts: Sequence[str], natural: int) -> int:
    """The width below which the texts of a column are not shortened."""
    if column.align != "left" or natural <= SHORTEST:
        return natural
    if not column.distinct:
        return SHORTEST
    # The first width at which they differ, by halving; wider ones tell them apart too, with rare exceptions.
    return bisect_left(
        range(natural), True, lo=SHORTEST, key=lambda width: len({*shorten_names(texts, width)}) == len({*texts})
    )


def _fitted(column: Column[Any], texts: Sequence[str], width: int) -> list[str]:
    """The texts of a column in this width."""
    if not column.sentence:
        return shorten_names(texts, width)
    return [text if display_width(text) <= width else _prefix(text, width - 1).rstrip() + "…" for text in texts]


def _fit_widths(widths: dict[int, int], shortest: Mapping[int, int], width: int) -> dict[int, int]:
    """Make the widest text narrower until all columns fit, or until no text can be made narrower."""
    while (excess := _total_width(widths) - width) > 0:
        shrinkable = [i for i in widths if widths[i] > shortest[i]]
        if not shrinkable:
            break
        # The widest text is shortened first, down to the next widest, so that short names stay whole as long as
        # possible.
        widest = max(shrinkable, key=lambda i: widths[i])
        other_widths = [widths[i] for i in shrinkable if i != widest]
        # Texts of equal width are shortened by one character in turn, as the step down to the next widest is then 0.
        widths[widest] -= max(1, min(excess, widths[widest] - max([shortest[widest], *other_widths])))
    return widths


def shorten_names(texts: Sequence[str], width: int) -> list[str]:
    """Shorten the texts of one column, each to at most ``width`` columns of a terminal.

    The beginning that all of them share does not tell them apart, so it is left out first, up to a dot or a slash. The
    ending that they share is left out only if two different texts would otherwise look the same.
    """
    if all(display_width(text) <= width for text in texts):
        return list(texts)
    shared = commonprefix(list(texts)) if len({*texts}) > 1 else ""  # noqa: RUF071 - of names, not only of paths
    # Cut at a dot or a slash, so that no word is divided: module names have dots, and paths have slashes.
    end = max(shared.rfind("."), shared.rfind("/")) + 1
    # A beginning of one character would be replaced by an ellipsis of the same width.
    begun = ["…" + text[end:] if end > 1 else text for text in texts]
    shortened = [shorten(text, width) for text in begun]
    if len({*shortened}) == len({*texts}):
        return shortened
    ending = commonprefix([text[::-1] for text in begun])  # noqa: RUF071 - as above
    start = max(ending.rfind("."), ending.rfind("/")) + 1
    return [shorten(text[: len(text) - start] + "…", width) for text in begun] if start > 1 else shortened


def shorten(text: str, width: int) -> str:
    """Shorten a text to at most ``width`` columns of a terminal; an ellipsis replaces its middle."""
    if display_width(text) <= width:
        return text
    # The end gets two thirds of the width, as the end of a module's name says which projection it is. The beginning
    # says which block.
    tail = (2 * (width - 1) + 2) // 3
    return _prefix(text, width - 1 - tail) + "…" + _prefix(text[::-1], tail)[::-1]


def wrap(text: str, width: int) -> list[str]:
    """Break a text at spaces into lines of at most ``width`` columns of a terminal. Longer words are shortened."""
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
    """The longest beginning of a text that fits."""
    end = used = 0
    for end, character in enumerate(text, start=1):
        used += display_width(character)
        if used > width:
            return text[: end - 1]
    return text[:end]


def display_width(text: str) -> int:
    """Return how many columns of a terminal a text takes: wide characters of East Asia two, combining ones none."""
    # This short cut serves nearly all texts, as loading unicodedata and asking it for every character is slow.
    if _NARROW.fullmatch(text):
        return len(text)
    from unicodedata import combining, east_asian_width

    return sum(0 if combining(c) else 2 if east_asian_width(c) in "WF" else 1 for c in text)


def _pad(text: str, width: int, align: str) -> str:
    spaces = " " * (width - display_width(text))
    return text + spaces if align == "left" else spaces + text
