"""Where the parts of a chart stand, in CSS pixels: the same on a page and in a picture."""

from math import ceil
from typing import NamedTuple

from loralens.charts.spec import Chart, Heat, Key, Lines, Overlaps, Ramp

LETTER, SMALL, NARROW = 6.7, 5.9, 5.8  # widths of letters of 11 and 10 pixels, and of those of plain words
WORD, SLANT = 8, 34  # letters from which names under an axis stand aslant, and the height they take
PANEL, ALONE = (240, 180), (420, 230)  # a chart of lines among others, and one by itself
CELL, WRITTEN = (18.0, 18.0), (40.0, 26.0)  # a cell of a map, and one that says its value
LEAST = 3.0  # pixels of a cell, where there are many
MAP = 132.0  # of φ(i, j)
BAR, BAR_HIGH = 160.0, 9.0  # of a colour bar
LINE = 16  # of a name beside a chart
NOTE = 12  # of a line of small text
TREE, HEADS = 36, 14  # above a map
LONG = 3  # letters from which the names of columns run upwards


class Box(NamedTuple):
    """The size of a chart, and the place of its plot area in it."""

    width: float
    height: float
    left: float
    top: float
    across: float
    down: float


def box(chart: Chart, *, alone: bool = False) -> Box:
    """The room that a chart takes; ``alone``: it has a figure to itself."""
    if isinstance(chart, Lines):
        return _lines_box(chart, alone=alone)
    return _heat_box(chart) if isinstance(chart, Heat) else _overlaps_box(chart)


def _lines_box(chart: Lines, *, alone: bool) -> Box:
    width, below = ALONE if alone else PANEL
    legend = len(chart.named)
    top = 24 if chart.title else 10
    height = below + LINE * legend + (4 if legend else 0) + slant(chart)
    return Box(width, height, 50, top, width - 62, below - top - 36)


def slant(chart: Lines) -> int:
    """Pixels more that names under the x axis take, which stand aslant; numbers take none."""
    return SLANT if max((len(label) for _, label in chart.x.ticks), default=0) > WORD else 0


def name_letters(room: Box) -> int:
    """Letters of a name beside a chart of lines."""
    return int((room.width - 84) / NARROW)


def level_places(chart: Lines) -> dict[str, float]:
    """How far the name of each level is from the left, so that those of levels near each other stand side by side."""
    places, left = {}, 5.0
    for name in chart.levels:
        places[name] = left
        left += NARROW * len(name) + 8
    return places


def cell_size(chart: Heat) -> tuple[float, float]:
    """Width and height of a cell: those of maps of many rows or columns are smaller."""
    wide, high = WRITTEN if chart.written else CELL
    rows, columns = max(len(chart.rows), 1), max(len(chart.columns), 1)
    return max(LEAST, min(wide, chart.room / columns)), max(LEAST, min(high, chart.room / rows))


def upright(chart: Heat) -> bool:
    """Whether the names of the columns run upwards: there are some of more than three letters."""
    return max((len(name) for _, name in chart.below), default=0) > LONG


def names_below(chart: Heat) -> float:
    """Height of the names of the columns."""
    longest = max((len(name) for _, name in chart.below), default=0)
    return SMALL * longest + 10 if upright(chart) else 18


def above_cells(chart: Heat) -> tuple[float, float, float]:
    """Heights of title, tree and names of stacks over a map."""
    return (20 if chart.title else 2), (TREE if chart.tree else 0), (HEADS if chart.heads else 0)


def lines_below(chart: Heat) -> float:
    """Height of what the columns and the cells are."""
    return 14 * (bool(chart.across) + bool(chart.note))


def _heat_box(chart: Heat) -> Box:
    wide, high = cell_size(chart)
    left = 14 + LETTER * max((len(name) for _, name in chart.beside), default=0)
    top = sum(above_cells(chart))
    across, down = wide * len(chart.columns), high * len(chart.rows)
    words = max(map(len, (chart.across, chart.note, chart.scale.label)))
    width = max(left + across + 8, left + max(BAR + 10, LETTER * words), LETTER * len(chart.title) + 16)
    bar = top + down + names_below(chart) + lines_below(chart) + 6
    return Box(width, bar + 48, left, top, across, down)


def _overlaps_box(chart: Overlaps) -> Box:
    rows, columns = len(chart.phi), max(map(len, chart.phi), default=0)
    side = MAP / max(rows, columns, 1)
    height = 18 + side * rows + 16 + NOTE * len(chart.notes) + 6
    return Box(172, height, 22, 18, side * columns, side * rows)


def is_list(ramp: Ramp) -> bool:
    """Whether the colours of blocks are a list, as their names are too long to stand side by side."""
    return max((len(name) for _, name in ramp.ticks), default=0) > LONG


def key_size(key: Key) -> tuple[float, float]:
    """Width and height of colours and what they mean."""
    if isinstance(key, Ramp) and is_list(key):
        longest = max(len(name) for _, name in key.ticks)
        return 48 + LETTER * max(longest, len(key.label)), 18 + LINE * len(key.ticks)
    label = LETTER * len(key.label) + 14
    return max(BAR + 16, label), 40 if isinstance(key, Ramp) else 48


def rows_of(width: float, count: int, room: float, columns: int | None = None) -> tuple[int, int]:
    """How many charts of one width stand in a row, and how many rows that gives."""
    across = columns or max(1, min(count, int(room / width)))
    return across, ceil(count / across)
