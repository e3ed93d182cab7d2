"""Charts as SVG for pages: their layout in CSS pixels, their ticks, and their elements.

Every text is escaped here, because names come from files of other people. Colours, fonts and themes are left to the
stylesheet of the page, so that one picture serves light and dark pages. `data-` attributes hold what the scripts for
hovering and filtering need. Pictures are yielded in pieces, because a page may hold very many of them.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from html import escape
from itertools import chain, groupby
from math import ceil, cos, floor, log10, pi, sin
from typing import Literal, NamedTuple

from loralens.charts.grid import fit_name
from loralens.charts.palette import BLOCKS, STEPS, ink_class, is_strong, level
from loralens.charts.spec import (
    Area,
    Axis,
    Chart,
    ColourScale,
    HeatMap,
    Key,
    Limits,
    Line,
    LineChart,
    Marker,
    Overlaps,
    Ramp,
)
from loralens.tables.numbers import MINUS, number

X_TICKS, Y_TICKS = 6, 5  # most ticks of an axis, for which a panel of 240 × 180 pixels has room
TICK = 26.0  # pixels between the numbers of a map
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
    """Return which part of a number's text stands at the place ``share`` of a colour bar; empty for the beginning."""
    # Numbers near an end would reach beyond the bar if their middle stood there.
    return "" if share < 0.2 else "end" if share > 0.8 else "mid"


# ---- Ticks


def _ticks(chart: LineChart) -> tuple[list[tuple[float, str]], list[tuple[float, str]]]:
    """The ticks of both axes with their texts: those of the chart, or round numbers."""
    # Directions, ranks and blocks are counted, so a tick at 2.5 would have no meaning.
    integers = all(float(x).is_integer() for line in chart.lines for x in line.x)
    numbers = round_numbers(chart.x.limits, X_TICKS, integers=integers)
    across = list(chart.x.ticks) or [(x, tick_label(x)) for x in numbers]
    heights = powers_of_ten(chart.y.limits) if chart.y.log else round_numbers(chart.y.limits, Y_TICKS)
    return across, [(y, tick_label(y)) for y in heights]


def map_ticks(count: int, pixels: float) -> list[int]:
    """Return the ticks of a map of ``count`` directions: the first, and round numbers at least `TICK` pixels apart."""
    inner = round_numbers((1, count), max(1, min(4, int(pixels / TICK))), integers=True) if count > 1 else []
    least = TICK * count / pixels
    return [1, *(round(i) for i in inner if i - 1 >= least)]


def tick_label(value: float) -> str:
    """Return the label of a tick, as short as possible."""
    # From 1e5 on, 1e5 is shorter than 100000.
    text = f"{value:.0f}" if float(value).is_integer() and abs(value) < 1e5 else f"{value:.3g}"
    return text.replace("e-0", f"e{MINUS}").replace("e+0", "e").replace("-", MINUS)


def round_numbers(span: Limits, most: int, *, integers: bool = False) -> list[float]:
    """Return the multiples of 1, 2 or 5 times a power of ten within a span, about ``most`` of them."""
    low, high = span
    if not high > low:
        return [low]
    power = 10.0 ** floor(log10((high - low) / most))
    step = next(power * k for k in (1, 2, 5, 10, 20) if (high - low) / (power * k) <= most)
    step = max(step, 1.0) if integers else step
    # The small tolerance keeps a limit that is itself a multiple, in spite of rounding.
    return [round(k * step, 12) for k in range(ceil(low / step - 1e-9), floor(high / step + 1e-9) + 1)]


def powers_of_ten(span: Limits) -> list[float]:
    """Return the powers of ten within a span; if there is at most one, also 2 and 5 times a power of ten."""
    low, high = span
    first, last = floor(log10(low)), ceil(log10(high))
    tens = [10.0**k for k in range(first, last + 1) if low <= 10.0**k <= high]
    if len(tens) > 1:
        return tens[:: ceil(len(tens) / 6)]  # every second or third of more than six
    finer = [k * 10.0**p for p in range(first, last + 1) for k in (1, 2, 5) if low <= k * 10.0**p <= high]
    return finer or [low, high]


# ---- Elements


def words(text: str, x: float, y: float, kind: str) -> str:
    """Return a text at a place; ``kind`` holds its classes."""
    return f'<text class="{kind}" x="{n(x)}" y="{n(y)}">{escape(text)}</text>'


def upwards(text: str, x: float, y: float, kind: str) -> str:
    """Return a text that is written upwards."""
    return f'<text class="{kind}" transform="translate({n(x)} {n(y)}) rotate(-90)">{escape(text)}</text>'


def svg(width: float, height: float, parts: Iterable[str], alt: str, attributes: str) -> Iterator[str]:
    """Yield a picture of these parts, with an accessible name unless ``alt`` is empty, and further attributes."""
    # The width is a property of the style and no attribute, so that a page can shrink a picture to its column.
    size = f'viewBox="0 0 {n(width)} {n(height)}" style="--w:{n(width)}px"'
    label = f' role="img" aria-label="{escape(alt)}"' if alt else ""
    yield f"<svg{attributes} {size}{label}>"
    yield from parts
    yield "</svg>"


def n(value: float, places: int = 1) -> str:
    """Return a coordinate as text, as short as possible, because a page holds many thousands of them."""
    # One digit behind the point: a tenth of a pixel cannot be seen.
    if places == 1 and type(value) is float:  # `round` of NumPy's numbers has another rule for halves
        text = f"{value:.1f}"
        return text.removesuffix(".0")
    # "0" where stripping zeros has left nothing.
    return f"{round(value, places):.{places}f}".rstrip("0").rstrip(".") or "0"


def modules_attribute(numbers: Sequence[int]) -> str:
    """Return the attribute by which the filter of the page finds what is drawn for these modules."""
    return f' data-m="{" ".join(map(str, numbers))}"' if numbers else ""


# ---- Line charts


TITLE = 30  # letters of a title that fit above a panel


class PlotArea(NamedTuple):
    """The plot area of a line chart in pixels, with its axes."""

    left: float
    top: float
    width: float
    height: float
    x: Axis
    y: Axis

    def at(self, x: float, y: float) -> tuple[float, float] | None:
        """Return the place of a point in pixels, or None if y is not finite, or not positive on a logarithmic axis."""
        if not self.y.shows(y):
            return None
        start, stop = self.x.limits
        low, high, value = map(log10, (*self.y.limits, y)) if self.y.log else (*self.y.limits, y)
        # "or 1" for an axis whose two limits are equal: its points stand at the left or at the bottom.
        return (
            self.left + self.width * (x - start) / (stop - start or 1),
            self.top + self.height * (1 - (value - low) / (high - low or 1)),
        )


def lines_svg(chart: LineChart, alt: str, *, alone: bool = False) -> Iterator[str]:
    """Return the pieces of a line chart as SVG with axes, levels and legend.

    ``alone`` is as in `loralens.charts.layout.chart_box`.
    """
    room = chart_box(chart, alone=alone)
    frame = PlotArea(room.left, room.top, room.across, room.down, chart.x, chart.y)
    middle = frame.left + frame.width / 2, frame.top + frame.height / 2
    nothing = [words(chart.note or "all of it is 0", *middle, "small mid")]
    # The script of the page computes places from these numbers, for the markers of the sliders.
    numbers = (frame.left, frame.top, frame.width, frame.height, *frame.x.limits, *frame.y.limits)
    data = f' data-frame="{" ".join(f"{value:.9g}" for value in numbers)}"' + ' data-log=""' * frame.y.log
    # In SVG what comes later covers what comes earlier: lines cover areas, and notes cover lines.
    parts = chain(
        (_area(area, frame) for area in chart.areas),
        _axes(chart, frame),
        nothing if chart.empty else [],
        _levels(chart, frame),
        (_line(line, frame) for line in chart.lines),
        _note(chart, frame),
        _names(chart.named, room),
    )
    hover = f' data-hover="{escape(chart.x.label)}"'
    return svg(room.width, room.height, parts, alt or chart.title, f' class="lines"{hover}{data}')


def _axes(chart: LineChart, frame: PlotArea) -> Iterable[str]:
    if chart.title:
        yield words(fit_name(chart.title, TITLE), frame.left, 14, "head")
    bottom = frame.top + frame.height
    yield f'<path class="axis" d="M{n(frame.left)} {n(frame.top)}V{n(bottom)}H{n(frame.left + frame.width)}"/>'
    across, up = _ticks(chart)
    for x, label in across:
        place = frame.at(x, frame.y.limits[1])
        if place:
            yield f'<path class="tick" d="M{n(place[0])} {n(bottom)}v4"/>'
            if slant(chart):
                yield f'<text class="small end" transform="translate({n(place[0] + 3)} {n(bottom + 11)}) rotate(-40)">'
                yield f"{escape(label)}</text>"
            else:
                yield words(label, place[0], bottom + 15, "num mid")
    for y, label in up:
        place = frame.at(frame.x.limits[0], y)
        if place:
            yield f'<path class="grid" d="M{n(frame.left)} {n(place[1])}h{n(frame.width)}"/>'
            yield words(label, frame.left - 5, place[1] + 3.5, "num end")
    yield words(chart.x.label, frame.left + frame.width / 2, bottom + 30 + slant(chart), "label mid")
    yield upwards(chart.y.label, 11, frame.top + frame.height / 2, "label mid")


def _area(area: Area, frame: PlotArea) -> str:
    # There along the upper curve and back along the lower one.
    ends = [*zip(area.x, area.high, strict=True), *zip(reversed(area.x), reversed(area.low), strict=True)]
    places = [place for x, y in ends if (place := frame.at(x, y))]
    return f'<path class="area" d="M{"L".join(f"{n(x)} {n(y)}" for x, y in places)}z"/>' if places else ""


def _levels(chart: LineChart, frame: PlotArea) -> Iterable[str]:
    right, bottom = frame.left + frame.width, frame.top + frame.height
    places = level_places(chart)
    for name, value in chart.levels.items():
        place = frame.at(frame.x.limits[0], value)
        # A pixel more on both sides, so that rounding does not hide a level on the edge.
        if place and frame.top - 1 <= place[1] <= bottom + 1:
            yield f'<path class="level" d="M{n(frame.left)} {n(place[1])}h{n(frame.width)}"/>'
            # The name of a high level stands at the right and below it, where rising curves have already crossed it.
            if place[1] < (frame.top + bottom) / 2:
                yield words(name, right - 3, place[1] + 10, "num end")
            else:
                yield words(name, frame.left + places[name], place[1] - 3, "num")


def _line(line: Line, frame: PlotArea) -> str:
    labels = line.labels or [""] * len(line.x)
    points = [(p, x, y, t) for x, y, t in zip(line.x, line.y, labels, strict=True) if (p := frame.at(x, y))]
    if not points:
        return ""
    xs = [x for _, x, _, _ in points]
    d = "M" + "L".join(f"{n(p[0])} {n(p[1])}" for p, *_ in points)
    path = "" if line.unjoined else f'<path d="{d}"/>'
    marks = "".join(MARKS[line.marker](*p) for p, *_ in points)
    label_texts = "".join(words(text, p[0] + 4, p[1] - 4, "small") for p, _, _, text in points if text)
    group = f'<g class="{_kind(line)} {ink_class(line.ink)}" data-n="{escape(line.name)}"'
    # The script takes x = 1, 2, 3 … where a line has no data-x, which keeps pages of many spectra small.
    data = "" if xs == list(range(1, len(xs) + 1)) else _data("x", xs)
    data += _data("y", [y for _, _, y, _ in points])
    return f"{group}{modules_attribute(line.modules)}{data}>{path}{marks}{label_texts}</g>"


def _kind(line: Line) -> str:
    return "line dotted" if line.dotted else "line dashed" if line.dashed else "line"


def _star(x: float, y: float) -> str:
    corners = [(6 if k % 2 == 0 else 2.6, k * pi / 5) for k in range(10)]
    points = " ".join(f"{n(x + r * sin(a))},{n(y - r * cos(a))}" for r, a in corners)
    return f'<polygon points="{points}"/>'


# The marks of points at a place. "" stands for a line without marks.
MARKS: dict[Marker, Callable[[float, float], str]] = {
    "": lambda _x, _y: "",
    "dot": lambda x, y: f'<circle cx="{n(x)}" cy="{n(y)}" r="2.4"/>',
    "square": lambda x, y: f'<rect x="{n(x - 2.2)}" y="{n(y - 2.2)}" width="4.4" height="4.4"/>',
    "triangle": lambda x, y: f'<polygon points="{n(x)},{n(y - 3)} {n(x + 2.9)},{n(y + 2)} {n(x - 2.9)},{n(y + 2)}"/>',
    "star": _star,
}


def _data(key: str, values: Sequence[float]) -> str:
    return f' data-{key}="{" ".join(number(value) for value in values)}"'


def _note(chart: LineChart, frame: PlotArea) -> Iterable[str]:
    lines = chart.note.split("\n") if chart.note and not chart.empty else []
    bottom = frame.top + frame.height - 5
    # Written from the last line up, as the note stands in the lower corner.
    for k, line in enumerate(reversed(lines)):
        yield words(line, frame.left + 6, bottom - NOTE * k, "small")


def _names(lines: Sequence[Line], room: Box) -> Iterable[str]:
    for i, line in enumerate(lines):
        y = room.height - LINE * (len(lines) - i) + 4
        path = "" if line.unjoined else f'<path d="M50 {n(y)}h22"/>'
        yield f'<g class="{_kind(line)} {ink_class(line.ink)}">{path}{MARKS[line.marker](61, y)}</g>'
        yield words(fit_name(line.name, name_letters(room)), 80, y + 4, "label")


# ---- Maps


MAP_TITLE = 26  # letters of a title that fit above a map of φ(i, j)


def heat_svg(chart: HeatMap, alt: str) -> Iterator[str]:
    """Return the pieces of a map of cells with its colour bar below, as SVG."""
    room = chart_box(chart)
    return svg(room.width, room.height, _map(chart, room), alt or chart.title, ' class="heat"')


def _map(chart: HeatMap, room: Box) -> Iterator[str]:
    """What is drawn on a map of cells, from the lowest layer to the highest."""
    wide, high = cell_size(chart)
    gap = 1 if min(wide, high) > 6 else 0  # a gap would take much of a cell of few pixels
    if chart.title:
        yield words(chart.title, 0, 13, "head")
    if chart.tree:
        bottom = above_cells(chart)[0] + TREE - 4
        places = [[(room.left + wide * x, bottom - (TREE - 8) * y) for x, y in branch] for branch in chart.tree]
        paths = ("M" + "L".join(f"{n(x)} {n(y)}" for x, y in branch) for branch in places)
        yield f'<path class="tree" d="{"".join(paths)}"/>'
    middles = ((room.left + wide * (a + b) / 2, name) for a, b, name in chart.heads)
    yield from (words(name, x, room.top - 4, "num mid") for x, name in middles)
    kind = "label end" if high > 9 else "num end"  # low rows have no room for the larger letters
    yield from (words(name, room.left - 6, room.top + high * (i + 0.5) + 4, kind) for i, name in chart.row_texts)

    def rectangle(i: int, j: int) -> str:
        return _rectangle(room.left + wide * j, room.top + high * i, wide - gap, high - gap)

    yield from (f'<rect class="hole" {rectangle(i, j)}/>' for i, j in (*chart.holes, *chart.zeros))
    r = (min(wide, high) - gap) / 4  # half the side of the cross of a cell in which ΔW is 0
    for i, j in chart.zeros:
        start = f"M{n(room.left + wide * j + (wide - gap) / 2 - r)} {n(room.top + high * i + (high - gap) / 2 - r)}"
        yield f'<path class="zero" d="{start}l{n(2 * r)} {n(2 * r)}m0 {n(-2 * r)}l{n(-2 * r)} {n(2 * r)}"/>'
    for i, j in sorted(chart.cells):
        cell, scale = chart.cells[i, j], chart.scale
        colour = level(cell.value, scale.low, scale.high, diverging=scale.diverging)
        tip = f'data-t="{escape(cell.tip)}"{modules_attribute(cell.modules)}'
        yield f'<rect class="{colour}" {rectangle(i, j)} {tip}/>'
        if chart.written:
            x, y = room.left + wide * (j + 0.5), room.top + high * (i + 0.5) + 4
            yield words(scale.text(cell.value), x, y, "cell mid strong" if is_strong(colour) else "cell mid")
    # Half a pixel before the cell, in the gap between two cells.
    edges = [f"M{n(room.left + wide * j - 0.5)} {n(room.top)}v{n(room.down)}" for j in chart.column_edges]
    edges += [f"M{n(room.left)} {n(room.top + high * i - 0.5)}h{n(room.across)}" for i in chart.row_edges]
    yield from (f'<path class="edge" d="{edge}"/>' for edge in edges)
    yield from _columns(chart, room, wide)
    yield from _bar(chart.scale, room.left, room.height - BAR_ROOM)


def _rectangle(x: float, y: float, width: float, height: float) -> str:
    return f'x="{n(x)}" y="{n(y)}" width="{n(width)}" height="{n(height)}"'


def _columns(chart: HeatMap, room: Box, wide: float) -> list[str]:
    bottom, parts = room.top + room.down, []
    for j, name in chart.column_texts:
        x = room.left + wide * (j + 0.5)
        if upright(chart):
            parts.append(upwards(name, x + 3.5, bottom + 6, "num end"))
        else:
            parts.append(words(name, x, bottom + 13, "num mid"))
    for k, line in enumerate(chart.lines_below):
        y = bottom + names_below(chart) + 10 + LABEL * k
        parts.append(words(line, room.left, y, "label"))
    return parts


def _bar(scale: ColourScale, left: float, top: float) -> list[str]:
    """A colour bar with its label, its numbers and the level of chance."""

    def text(word: str, value: float, y: float) -> str:
        """A text below the place of a value on the bar."""
        share = scale.share(value)
        return words(word, left + BAR * share, top + y, f"num {bar_anchor(share)}".rstrip())

    # Edges without smoothing: else the page would shine through between two steps.
    parts, side = ['<g class="bar" shape-rendering="crispEdges">'], BAR / STEPS
    for k in range(STEPS):
        value = scale.low + (scale.high - scale.low) * k / (STEPS - 1)
        colour = level(value, scale.low, scale.high, diverging=scale.diverging)
        parts.append(f'<rect class="{colour}" {_rectangle(left + side * k, top + BAR_TOP, side, BAR_HIGH)}/>')
    parts.append("</g>")
    parts += [text(label, value, BAR_NUMBERS) for value, label in scale.marks]
    parts.append(words(scale.label, left, top + BAR_LABEL, "label"))
    places = [left + BAR * scale.share(value) for value in scale.levels]
    parts += [f'<path class="chance" d="M{n(x)} {n(top + BAR_TOP - 3)}v15"/>' for x in places]
    # If there are two levels, the text is at the lower one, because there is room for one text only.
    parts += [text(f"chance {scale.chance_text}", value, BAR_CHANCE) for value in scale.levels[:1]]
    return parts


def overlaps_svg(chart: Overlaps, alt: str) -> Iterator[str]:
    """Return the pieces of a map of φ(i, j) as SVG.

    There is one path for each colour and not one element for each cell, so that a page of many maps stays small. An
    attribute holds the values for hovering, two digits for each cell.
    """
    rows, columns = len(chart.phi), max(map(len, chart.phi), default=0)
    room = chart_box(chart)
    wide, high = room.across / max(columns, 1), room.down / max(rows, 1)
    paths: dict[str, list[str]] = {}
    for i, row in enumerate(chart.phi):
        for colour, j, length in _runs(row, chart.scale):
            paths.setdefault(colour, []).append(f"M{j} {i}h{length}v1h-{length}z")
    marks = "".join(f'<path class="{colour}" d="{"".join(d)}"/>' for colour, d in sorted(paths.items()))
    # φ = 1 is written as 99, so that every value has two digits.
    values = " ".join("".join(f"{min(round(100 * value), 99):02d}" for value in row) for row in chart.phi)
    left, bottom = room.left, room.top + room.down
    parts = [
        words(fit_name(chart.title, MAP_TITLE), left, 12, "head"),
        f'<g transform="translate({n(left)} 18) scale({n(wide, 4)} {n(high, 4)})" shape-rendering="crispEdges" '
        f'data-phi="{values}">{marks}</g>',
        *(words(str(i), left - 4, 18 + high * (i - 0.5) + 3.5, "num end") for i in map_ticks(rows, room.down)),
        *(words(str(j), left + wide * (j - 0.5), bottom + 11, "num mid") for j in map_ticks(columns, room.across)),
        *(words(note, left, bottom + 12 + NOTE * (k + 1), "num") for k, note in enumerate(chart.notes)),
    ]
    return svg(room.width, room.height, parts, alt or chart.title, f' class="phi"{modules_attribute(chart.modules)}')


def _runs(row: Sequence[float], scale: ColourScale) -> Iterable[tuple[str, int, int]]:
    """Runs of neighbours of the same colour: colour, first column, length."""
    start = 0
    for colour, group in groupby(level(value, scale.low, scale.high, diverging=False) for value in row):
        length = len(list(group))
        yield colour, start, length
        start += length


def key_svg(key: Key) -> Iterator[str]:
    """Return the pieces of a colour key as SVG, for charts that share it."""
    width, height = key_size(key)
    parts = _ramp(key) if isinstance(key, Ramp) else _bar(key, 8, 0)
    return svg(width, height, parts, "", ' class="key" aria-hidden="true"')


def _ramp(ramp: Ramp) -> list[str]:
    parts = [words(ramp.label, 8, 11, "label")]
    if is_list(ramp):
        for k, (place, name) in enumerate(ramp.ticks):
            y = 18 + LINE * k
            parts.append(f'<rect class="ramp b{round((BLOCKS - 1) * place)}" {_rectangle(8, y, 22, 10)}/>')
            parts.append(words(name, 38, y + 9, "num"))
        return parts
    side = BAR / BLOCKS
    parts += [f'<rect class="ramp b{k}" {_rectangle(8 + side * k, 16, side, BAR_HIGH)}/>' for k in range(BLOCKS)]
    middles = [(8 + (BAR - side) * place + side / 2, name) for place, name in ramp.ticks]
    return parts + [words(name, x, 36, "num mid") for x, name in middles]
