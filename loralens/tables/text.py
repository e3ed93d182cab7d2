"""Tables as lines of text that fit the width of a terminal; no digit of a number is ever cut.

If the columns of a table are too wide together, texts that are aligned on the left are shortened: names in their
middle, sentences at their end. If that is not enough, whole columns are left out, those of the lowest priority first,
and named below the table.
"""

import re
from bisect import bisect_left
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from os.path import commonprefix
from typing import Any

from loralens.errors import visible
from loralens.tables.table import ALWAYS, Column, Table

GAP = 2  # spaces between columns; cells may hold single spaces, so only a wider gap shows where a column ends
# No text is made narrower than this. In 16 characters the name of a module still shows its block and its projection:
# "…10.s…ttn.q_proj" stands for model.layers.10.self_attn.q_proj.
SHORTEST = 16
_NAME = 8  # columns; a name in a sentence is not made narrower
_WORDS = 40  # words of names that are tried; those of a folder of files may be thousands
_PIECES = re.compile(r"[^._/\s…]+|[._/\s…]+")  # words and numbers of a name, and what stands between them
_BREAKS = re.compile(r" (?!(?:%|[kMGT]?B)(?!\w))")  # where lines may end: not between a number and its unit
_LABEL = re.compile(r" *(?:error|warning|note|fix): ")  # the lines after the first of a message are indented
_COMMANDS = re.compile(r"(`[^`]+`[;,.)]*|\b(?:loralens|pip|python3?) [^;,()`]*[^;,()`\s])")
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
        # The first column names the rows, which must be told apart.
        shortest = {i: _shortest(columns[i], cells[i], natural[i]) for i in shown}
        # The first column names the rows, which must be told apart.
        shortest[0] = max(shortest[0], _shortest(replace(columns[0], distinct=True), cells[0], natural[0], width // 3))
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


def _shortest(column: Column[Any], texts: Sequence[str], natural: int, least: int = SHORTEST) -> int:
    """The width below which the texts of a column are not shortened."""
    shortest, least = column.shortest or SHORTEST, column.shortest or least
    # A bar that is shortened would show a smaller number.
    if column.align != "left" or column.drawn or natural <= shortest:
        return natural
    if column.sentence or not column.distinct:
        return shortest
    # The first width at which they differ, by halving; wider ones tell them apart too, with rare exceptions.
    return bisect_left(
        range(natural),
        True,
        lo=min(max(shortest, min(least, SHORTEST + 8)), natural),
        key=lambda width: len({*shorten_names(texts, width)}) == len({*texts}),
    )


def _fitted(column: Column[Any], texts: Sequence[str], width: int) -> list[str]:
    """The texts of a column in this width."""
    if not column.sentence:
        return shorten_names(texts, width)
    return [text if display_width(text) <= width else _begin(text, width) for text in texts]


def _begin(text: str, width: int) -> str:
    """The words at the beginning of a text that fit, and an ellipsis; a long name after them is shortened."""
    whole, _, _ = _prefix(f"{text} ", width).rpartition(" ")
    name, _, _ = text[len(whole) :].lstrip(" ").partition(" ")
    room = width - display_width(whole) - bool(whole)
    # Only names are longer than this; a few letters of one say nothing.
    if display_width(name) > SHORTEST and room >= _NAME:
        return f"{whole} {shorten(name, room)}".lstrip()
    return f"{whole.rstrip(' ,;:')}…" if whole else _prefix(text, width - 1) + "…"


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
    begun = _without_common_words(["…" + text[end:] if end > 1 else text for text in texts], width)
    shortened = [shorten(text, width) for text in begun]
    if len({*shortened}) == len({*texts}):
        return shortened
    ending = commonprefix([text[::-1] for text in begun])  # noqa: RUF071 - as above
    start = max(ending.rfind("."), ending.rfind("/")) + 1
    return [shorten(text[: len(text) - start] + "…", width) for text in begun] if start > 1 else shortened


def _without_common_words(texts: Sequence[str], width: int) -> list[str]:
    """Names without the words that most of them have, as far as that is needed for the width and they stay different.

    Numbers and the last two words of a name, which say the block and the projection, stay.
    """
    pieces = [_PIECES.findall(text) for text in texts]
    inner = [[piece for piece in each[:-3] if piece.isalpha()] for each in pieces]
    # Of words in equally many names, those on the left go first. They say less.
    common = Counter(word for words in inner for word in dict.fromkeys(words))
    left_out: list[str] = []
    result = list(texts)
    for word, _ in common.most_common(_WORDS):
        if all(display_width(text) <= width for text in result):
            break
        fewer = [_elide(text, each, [*left_out, word], width) for text, each in zip(texts, pieces, strict=True)]
        if len({*fewer}) == len({*texts}):
            left_out.append(word)
            result = fewer
    return result


def _elide(text: str, pieces: Sequence[str], words: Sequence[str], width: int) -> str:
    """A name with an ellipsis in place of the first of the words, as many as are needed; not of its last two words."""
    last = len(pieces) - 3
    shorter = list(pieces)
    for word in words:
        if display_width(text) <= width:
            break
        shorter[:last] = ["\0" if piece == word else piece for piece in shorter[:last]]
        text = re.sub(r"[._/…]*(?:\0[._/…]*)+", "…", "".join(shorter))
    return text


def shorten(text: str, width: int) -> str:
    """Shorten a text to at most ``width`` columns of a terminal; an ellipsis replaces its middle."""
    if display_width(text) <= width:
        return text
    # The end gets two thirds of the width, as the end of a module's name says which projection it is. The beginning
    # says which block.
    tail = (2 * (width - 1) + 2) // 3
    return _prefix(text, width - 1 - tail) + "…" + _prefix(text[::-1], tail)[::-1]


def wrap(text: str, width: int, *, whole: bool = False) -> list[str]:
    """Break a line at spaces into lines of at most ``width`` columns of a terminal, which keep its indent.

    A command that fits on a line is not broken. A longer one between backticks goes on after a backslash, as in a
    shell, so that it can be copied. Words that are longer than a line are shortened, unless they are ``whole`` or part
    of a command.
    """
    if display_width(text) <= width:
        return [text]
    indent = len(text) - len(text.lstrip(" "))
    after = " " * (indent + 2 * bool(_LABEL.match(text)))
    lines = [" " * indent]
    begun = False  # whether the last line has a word
    for unit in _COMMANDS.split(text.lstrip(" ")):
        command = bool(_COMMANDS.fullmatch(unit))
        room = width - display_width(lines[-1])
        words = _BREAKS.split(unit)
        if command and len(after) + display_width(unit) <= width:
            words = [unit]
        elif command and begun and display_width(unit) > room and not _LABEL.fullmatch(lines[-1]):
            lines[-1] = lines[-1].rstrip()
            lines.append(after)
            begun = False
        for place, word in enumerate(words):
            # A command begins where the text before it has ended: with the space that is there, or without one.
            gap = " " if begun and place else ""
            shown = word if whole or command else shorten(word, width - len(after))
            continued = " \\" if unit.startswith("`") and place < len(words) - 1 else ""
            if not begun or display_width(f"{lines[-1]}{gap}{shown}{continued}") <= width:
                lines[-1] += gap + shown
            else:
                if unit.startswith("`") and place:
                    lines[-1] += " \\"
                lines[-1] = lines[-1].rstrip()
                lines.append(after + shown)
                begun = False
            begun = begun or bool(shown)
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
