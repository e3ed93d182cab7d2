"""The layout of a chart in CSS pixels, which is the same on a page and in a picture."""

from collections.abc import Sequence
from typing import Literal, NamedTuple

from loralens.charts.spec import Chart, HeatMap, Key, LineChart, Overlaps, Ramp

# All sizes are in CSS pixels. Widths of letters are estimated, as SVG cannot measure text: of names at font sizes of 11
# and of 10 pixels, and of plain words in lower case, which are narrower than names with digits and capitals.
LETTER, SMALL, NARROW = 6.7, 5.9, 5.8
WORD, SLANT = 8, 34  # names under an axis longer than WORD letters are slanted, and take SLANT more height
# Width and height of a line chart among others, and of one that stands alone. Four panels fit next to each other.
PANEL, ALONE = (240, 180), (420, 230)
# Width and height of a cell, and of one that shows its value, such as "+0.99".
CELL, WRITTEN = (18.0, 18.0), (40.0, 26.0)
LEAST = 3.0  # the smallest side of a cell: below it neighbours can no longer be told apart
MAP = 132.0  # the longer side of a map of φ(i, j)
# The least length of the shorter side, for which cells may be rectangles: a map of 8 × 64 would be 16 pixels high.
FLAT = 44.0
BAR, BAR_HIGH = 160.0, 9.0  # width and height of a colour bar
# Places on a colour bar from its top: the baseline of the label, the bar, and the baselines of the numbers and of the
# level of chance; and the height of all of it. Lines of 10 pixels are 13 pixels apart, as closer ones look like one.
BAR_LABEL, BAR_TOP, BAR_NUMBERS, BAR_CHANCE = 10, 16, 37, 50
BAR_ROOM = 56
LINE = 16  # height of a line of a legend
NOTE = 12  # height of a line of small text
LABEL = 14  # height of a line below a map
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
    """Return the size of a chart; ``alone`` says that it is the only one of its figure, and so may be larger."""
    if isinstance(chart, HeatMap):
        return _heat_box(chart)
    if isinstance(chart, Overlaps):
        rows, columns = len(chart.phi), max(map(len, chart.phi), default=0)
        side = MAP / max(rows, columns, 1)
        across, down = max(side * columns, FLAT), max(side * rows, FLAT)
        # 18 pixels above hold the title and 16 below the numbers; 22 at the left hold the numbers of the rows. All maps
        # have one width, so that they stand in columns.
        return Box(172, 18 + down + 16 + NOTE * len(chart.notes) + 6, 22, 18, across, down)
    width, below = ALONE if alone else PANEL
    legend = len(chart.named)
    top = 24 if chart.title else 10
    height = below + LINE * legend + (4 if legend else 0) + slant(chart)
    # 50 pixels at the left hold the numbers and the label of y, 36 below those of x, and 12 at the right the last
    # number.
    return Box(width, height, 50, top, width - 62, below - top - 36)


def slant(chart: LineChart) -> int:
    """Return the additional height of slanted names under the x axis; 0 if the labels are short, as numbers are."""
    return SLANT if _longest(chart.x.ticks) > WORD else 0


def name_letters(room: Box) -> int:
    """Return how many letters of a name fit into the legend of a line chart."""
    # 80 pixels at the left hold the mark of the line, and 4 at the right are a margin.
    return int((room.width - 84) / NARROW)


def level_places(chart: LineChart) -> dict[str, float]:
    """Return the distance of each level's name from the left.

    Names stand side by side, because two levels may be so close that names above each other would overlap.
    """
    places, offset = {}, 5.0
    for name in chart.levels:
        places[name] = offset
        offset += NARROW * len(name) + 8
    return places


def cell_size(chart: HeatMap) -> tuple[float, float]:
    """Return the width and the height of a cell, which shrinks if there are many rows or columns."""
    wide, high = WRITTEN if chart.written else CELL
    rows, columns = max(len(chart.rows), 1), max(len(chart.columns), 1)
    # A cell has at least `LEAST` pixels even if the chart then exceeds its room, because it would be unreadable.
    return max(LEAST, min(wide, chart.room / columns)), max(LEAST, min(high, chart.room / rows))


def upright(chart: HeatMap) -> bool:
    """Whether the names of the columns are written upwards, because one has more than three letters."""
    return _longest(chart.column_texts) > LONG


def names_below(chart: HeatMap) -> float:
    """Return the height that the names of the columns take."""
    return SMALL * _longest(chart.column_texts) + 10 if upright(chart) else 18


def above_cells(chart: HeatMap) -> tuple[float, float, float]:
    """Return the heights of title, tree and names of stacks above a map."""
    return (20 if chart.title else 2), (TREE if chart.tree else 0), (HEADS if chart.heads else 0)


def _longest(labels: Sequence[tuple[float, str]]) -> int:
    """The number of letters of the longest label."""
    return max((len(name) for _, name in labels), default=0)


def _heat_box(chart: HeatMap) -> Box:
    wide, high = cell_size(chart)
    left = 14 + LETTER * _longest(chart.row_texts)
    top = sum(above_cells(chart))
    across, down = wide * len(chart.columns), high * len(chart.rows)
    # Titles and lines of text may be wider than the cells of a small map, and SVG cuts off what lies outside.
    words = max(map(len, (chart.across, chart.note, chart.scale.label)))
    width = max(left + across + 8, left + max(BAR + 10, LETTER * words), LETTER * len(chart.title) + 16)
    height = top + down + names_below(chart) + LABEL * len(chart.lines_below) + 6 + BAR_ROOM
    return Box(width, height, left, top, across, down)


def is_list(ramp: Ramp) -> bool:
    """Whether the key of block colours is a list, because the names are too long to stand side by side."""
    return _longest(ramp.ticks) > LONG


def key_size(key: Key) -> tuple[float, float]:
    """Return the width and the height of a colour key."""
    if isinstance(key, Ramp) and is_list(key):
        return 48 + LETTER * max(_longest(key.ticks), len(key.label)), 18 + LINE * len(key.ticks)
    label = LETTER * len(key.label) + 14
    return max(BAR + 16, label), 40 if isinstance(key, Ramp) else BAR_ROOM


def bar_anchor(share: float) -> Literal["", "mid", "end"]:
    """Return which part of a number's text is at its place in [0, 1] on a colour bar; empty for its beginning."""
    # Numbers near an end would reach beyond the bar if their middle stood there.
    return "" if share < 0.2 else "end" if share > 0.8 else "mid"
