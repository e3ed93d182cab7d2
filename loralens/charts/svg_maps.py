"""Renders maps of cells, maps of φ(i, j) and colour keys as SVG."""

from collections.abc import Iterable, Iterator, Sequence
from html import escape
from itertools import groupby

from loralens.charts import layout
from loralens.charts.axes import map_ticks
from loralens.charts.names import fit_name
from loralens.charts.palette import BLOCKS, STEPS, is_strong, level
from loralens.charts.spec import ColourScale, HeatMap, Key, Overlaps, Ramp
from loralens.charts.svg import modules_attribute, n, svg, upwards, words

TITLE = 26  # letters of a title that fit above a map of φ(i, j)


def heat_svg(chart: HeatMap, alt: str) -> Iterator[str]:
    """Return the pieces of a map of cells with its colour bar below, as SVG."""
    room = layout.chart_box(chart)
    return svg(room.width, room.height, _map(chart, room), alt or chart.title, ' class="heat"')


def _map(chart: HeatMap, room: layout.Box) -> Iterator[str]:
    """What is drawn on a map of cells, from the lowest layer to the highest."""
    wide, high = layout.cell_size(chart)
    gap = 1 if min(wide, high) > 6 else 0  # a gap would take much of a cell of few pixels
    if chart.title:
        yield words(chart.title, 0, 13, "head")
    if chart.tree:
        bottom = layout.above_cells(chart)[0] + layout.TREE - 4
        places = [[(room.left + wide * x, bottom - (layout.TREE - 8) * y) for x, y in branch] for branch in chart.tree]
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
    yield from _bar(chart.scale, room.left, room.height - layout.BAR_ROOM)


def _rectangle(x: float, y: float, width: float, height: float) -> str:
    return f'x="{n(x)}" y="{n(y)}" width="{n(width)}" height="{n(height)}"'


def _columns(chart: HeatMap, room: layout.Box, wide: float) -> list[str]:
    bottom, parts = room.top + room.down, []
    for j, name in chart.column_texts:
        x = room.left + wide * (j + 0.5)
        if layout.upright(chart):
            parts.append(upwards(name, x + 3.5, bottom + 6, "num end"))
        else:
            parts.append(words(name, x, bottom + 13, "num mid"))
    for k, line in enumerate(chart.lines_below):
        y = bottom + layout.names_below(chart) + 10 + layout.LABEL * k
        parts.append(words(line, room.left, y, "label"))
    return parts


def _bar(scale: ColourScale, left: float, top: float) -> list[str]:
    """A colour bar with its label, its numbers and the level of chance."""

    def text(word: str, value: float, y: float) -> str:
        """A text below the place of a value on the bar."""
        share = scale.share(value)
        return words(word, left + layout.BAR * share, top + y, f"num {layout.bar_anchor(share)}".rstrip())

    # Edges without smoothing: else the page would shine through between two steps.
    parts, side = ['<g class="bar" shape-rendering="crispEdges">'], layout.BAR / STEPS
    for k in range(STEPS):
        value = scale.low + (scale.high - scale.low) * k / (STEPS - 1)
        colour = level(value, scale.low, scale.high, diverging=scale.diverging)
        parts.append(
            f'<rect class="{colour}" {_rectangle(left + side * k, top + layout.BAR_TOP, side, layout.BAR_HIGH)}/>'
        )
    parts.append("</g>")
    parts += [text(label, value, layout.BAR_NUMBERS) for value, label in scale.marks]
    parts.append(words(scale.label, left, top + layout.BAR_LABEL, "label"))
    places = [left + layout.BAR * scale.share(value) for value in scale.levels]
    parts += [f'<path class="chance" d="M{n(x)} {n(top + layout.BAR_TOP - 3)}v15"/>' for x in places]
    # If there are two levels, the text is at the lower one, because there is room for one text only.
    parts += [text(f"chance {scale.chance_text}", value, layout.BAR_CHANCE) for value in scale.levels[:1]]
    return parts


def overlaps_svg(chart: Overlaps, alt: str) -> Iterator[str]:
    """Return the pieces of a map of φ(i, j) as SVG.

    There is one path for each colour and not one element for each cell, so that a page of many maps stays small. An
    attribute holds the values for hovering, two digits for each cell.
    """
    rows, columns = len(chart.phi), max(map(len, chart.phi), default=0)
    room = layout.chart_box(chart)
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
        words(fit_name(chart.title, TITLE), left, 12, "head"),
        f'<g transform="translate({n(left)} 18) scale({n(wide, 4)} {n(high, 4)})" shape-rendering="crispEdges" '
        f'data-phi="{values}">{marks}</g>',
        *(words(str(i), left - 4, 18 + high * (i - 0.5) + 3.5, "num end") for i in map_ticks(rows, room.down)),
        *(words(str(j), left + wide * (j - 0.5), bottom + 11, "num mid") for j in map_ticks(columns, room.across)),
        *(words(note, left, bottom + 12 + layout.NOTE * (k + 1), "num") for k, note in enumerate(chart.notes)),
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
    width, height = layout.key_size(key)
    parts = _ramp(key) if isinstance(key, Ramp) else _bar(key, 8, 0)
    return svg(width, height, parts, "", ' class="key" aria-hidden="true"')


def _ramp(ramp: Ramp) -> list[str]:
    parts = [words(ramp.label, 8, 11, "label")]
    if layout.is_list(ramp):
        for k, (place, name) in enumerate(ramp.ticks):
            y = 18 + layout.LINE * k
            parts.append(f'<rect class="ramp b{round((BLOCKS - 1) * place)}" {_rectangle(8, y, 22, 10)}/>')
            parts.append(words(name, 38, y + 9, "num"))
        return parts
    side = layout.BAR / BLOCKS
    parts += [f'<rect class="ramp b{k}" {_rectangle(8 + side * k, 16, side, layout.BAR_HIGH)}/>' for k in range(BLOCKS)]
    middles = [(8 + (layout.BAR - side) * place + side / 2, name) for place, name in ramp.ticks]
    return parts + [words(name, x, 36, "num mid") for x, name in middles]
