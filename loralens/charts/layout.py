"""The layout of a chart in CSS pixels, which is the same on a page and in a picture."""

from math import ceil
from typing import NamedTuple

from loralens.charts.spec import Chart, HeatMap, Key, LineChart, Overlaps, Ramp

# All sizes are in CSS pixels.
# Widths of a letter, estimated, as SVG cannot measure text: of names at 11 and at 10 pixels, and of plain lower case
# words.
LETTER, SMALL, NARROW = 6.7, 5.9, 5.8
WORD, SLANT = 8, 34  # names under an axis longer than WORD letters are slanted, and take SLANT more height
PANEL, ALONE = (240, 180), (420, 230)  # width and height of a line chart among others, and of one that stands alone
CELL, WRITTEN = (18.0, 18.0), (40.0, 26.0)  # width and height of a cell, and of one that shows its value
LEAST = 3.0  # the smallest side of a cell: below it neighbours can no longer be told apart
MAP = 132.0  # the longer side of a map of φ(i, j)
BAR, BAR_HIGH = 160.0, 9.0  # width and height of a colour bar
LINE = 16  # height of a line of a legend
NOTE = 12  # height of a line of small text
TREE, HEADS = 36, 14  # heights of the tree and of the names of stacks above a map
LONG = 3  # names of columns longer than this are written upwards, as a cell is only three digits wide


class Box(NamedTuple):
    """The size of a chart, and the position and size of its plot area (``left``, ``top``, ``across``, ``down``)."""

    width: float
    height: float
    left: float
    top: float
    across: float
    down: float


def chart_box(chart: Chart, *, alone: bool = False) -> Box:
    """The size of a chart; ``alone`` says that it is the only one of its figure."""
    if isinstance(chart, LineChart):
        return _lines_box(chart, alone=alone)
    return _heat_box(chart) if isinstance(chart, HeatMap) else _overlaps_box(chart)


def _lines_box(chart: LineChart, *, alone: bool) -> Box:
    width, below = ALONE if alone else PANEL
    legend = len(chart.named)
    top = 24 if chart.title else 10
    height = below + LINE * legend + (4 if legend else 0) + slant(chart)
    # 50 pixels at the left hold the numbers and the label of y, 36 below those of x, and 12 at the right the last
    # number.
    return Box(width, height, 50, top, width - 62, below - top - 36)


def slant(chart: LineChart) -> int:
    """The additional height of slanted names under the x axis; 0 for numbers."""
    return SLANT if max((len(label) for _, label in chart.x.ticks), default=0) > WORD else 0


def name_letters(room: Box) -> int:
    """How many letters of a name fit into the legend of a line chart."""
    return int((room.width - 84) / NARROW)


def level_places(chart: LineChart) -> dict[str, float]:
    """The distance of each level's name from the left: names stand side by side, as their levels may be close."""
    places, offset = {}, 5.0
    for name in chart.levels:
        places[name] = offset
        offset += NARROW * len(name) + 8
    return places


def cell_size(chart: HeatMap) -> tuple[float, float]:
    """Width and height of a cell, which shrink where there are many rows or columns."""
    wide, high = WRITTEN if chart.written else CELL
    rows, columns = max(len(chart.rows), 1), max(len(chart.columns), 1)
    # Rather too large than unreadable: `LEAST` wins over the room of the chart.
    return max(LEAST, min(wide, chart.room / columns)), max(LEAST, min(high, chart.room / rows))


def upright(chart: HeatMap) -> bool:
    """Whether the names of the columns are written upwards, as one has more than three letters."""
    return max((len(name) for _, name in chart.column_texts), default=0) > LONG


def names_below(chart: HeatMap) -> float:
    """The height that the names of the columns take."""
    longest = max((len(name) for _, name in chart.column_texts), default=0)
    return SMALL * longest + 10 if upright(chart) else 18


def above_cells(chart: HeatMap) -> tuple[float, float, float]:
    """The heights of title, tree and names of stacks above a map."""
    return (20 if chart.title else 2), (TREE if chart.tree else 0), (HEADS if chart.heads else 0)


def lines_below(chart: HeatMap) -> float:
    """The height of the lines that say what columns and cells are."""
    return 14 * (bool(chart.across) + bool(chart.note))


def _heat_box(chart: HeatMap) -> Box:
    wide, high = cell_size(chart)
    left = 14 + LETTER * max((len(name) for _, name in chart.row_texts), default=0)
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
    """Whether the key of block colours is a list, as the names are too long to stand side by side."""
    return max((len(name) for _, name in ramp.ticks), default=0) > LONG


def key_size(key: Key) -> tuple[float, float]:
    """Width and height of a colour key."""
    if isinstance(key, Ramp) and is_list(key):
        longest = max(len(name) for _, name in key.ticks)
        return 48 + LETTER * max(longest, len(key.label)), 18 + LINE * len(key.ticks)
    label = LETTER * len(key.label) + 14
    return max(BAR + 16, label), 40 if isinstance(key, Ramp) else 48


def rows_of(width: float, count: int, room: float, columns: int | None = None) -> tuple[int, int]:
    """How many charts of one width fit in a row, and how many rows that gives."""
    across = columns or max(1, min(count, int(room / width)))
    return across, ceil(count / across)
