"""Renders maps of cells, maps of φ(i, j) and colour keys as SVG."""

from collections.abc import Iterable, Sequence
from html import escape

from loralens.charts.axes import map_ticks
from loralens.charts.layout import (
    BAR,
    BAR_HIGH,
    LINE,
    NOTE,
    TREE,
    Box,
    above_cells,
    cell_size,
    chart_box,
    is_list,
    key_size,
    names_below,
    upright,
)
from loralens.charts.names import fit_name
from loralens.charts.palette import BLOCKS, is_strong, level
from loralens.charts.spec import ColourScale, HeatMap, Key, Overlaps, Ramp
from loralens.charts.svg import modules_attribute, n, svg, upwards, words

TITLE = 26  # letters of a title that fit above a map of φ(i, j)


def heat_svg(chart: HeatMap, alt: str) -> str:
    """A map of cells with its colour bar below, as SVG."""
    room, (wide, high) = chart_box(chart), cell_size(chart)
    gap = 1 if min(wide, high) > 6 else 0
    parts = [words(chart.title, 0, 13, "head")] if chart.title else []
    parts += _tree(chart, room, wide)
    middles = ((room.left + wide * (a + b) / 2, name) for a, b, name in chart.heads)
    parts += [words(name, x, room.top - 4, "num mid") for x, name in middles]
    parts += [
        words(name, room.left - 6, room.top + high * (i + 0.5) + 4, "label end" if high > 9 else "num end")
        for i, name in chart.row_texts
    ]
    for kind, cells in (("hole", chart.holes), ("cross", chart.zeros)):
        for i, j in cells:
            x, y = room.left + wide * j, room.top + high * i
            parts.append(f'<rect class="hole" {_rectangle(x, y, wide - gap, high - gap)}/>')
            parts += [_cross(x, y, wide - gap, high - gap)] if kind == "cross" else []
    parts += [_cell(chart, i, j, room, (wide, high), gap) for i, j in sorted(chart.cells)]
    parts += _edges(chart, room, wide, high)
    parts += _columns(chart, room, wide)
    parts += _bar(chart.scale, room.left, room.height - 48)
    return svg(room.width, room.height, parts, alt or chart.title, ' class="heat"')


def _tree(chart: HeatMap, room: Box, wide: float) -> list[str]:
    if not chart.tree:
        return []
    bottom = above_cells(chart)[0] + TREE - 4
    paths = (
        "L".join(f"{n(room.left + wide * x)} {n(bottom - (TREE - 8) * y)}" for x, y in branch) for branch in chart.tree
    )
    return [f'<path class="tree" d="{"".join(f"M{path}" for path in paths)}"/>']


def _rectangle(x: float, y: float, width: float, height: float) -> str:
    return f'x="{n(x)}" y="{n(y)}" width="{n(width)}" height="{n(height)}"'


def _cross(x: float, y: float, width: float, height: float) -> str:
    a, b, r = x + width / 2, y + height / 2, min(width, height) / 4
    return f'<path class="zero" d="M{n(a - r)} {n(b - r)}l{n(2 * r)} {n(2 * r)}m0 {n(-2 * r)}l{n(-2 * r)} {n(2 * r)}"/>'


def _cell(chart: HeatMap, i: int, j: int, room: Box, size: tuple[float, float], gap: int) -> str:
    cell, scale, (wide, high) = chart.cells[i, j], chart.scale, size
    colour = level(cell.value, scale.low, scale.high, diverging=scale.diverging)
    x, y = room.left + wide * j, room.top + high * i
    text = ""
    if chart.written:
        strong = " strong" if is_strong(colour) else ""
        text = words(scale.text(cell.value), x + wide / 2, y + high / 2 + 4, f"cell mid{strong}")
    mark = f'<rect class="{colour}" {_rectangle(x, y, wide - gap, high - gap)}'
    return f'{mark} data-t="{escape(cell.tip)}"{modules_attribute(cell.modules)}/>{text}'


def _edges(chart: HeatMap, room: Box, wide: float, high: float) -> Iterable[str]:
    for j in chart.column_edges:
        yield f'<path class="edge" d="M{n(room.left + wide * j - 0.5)} {n(room.top)}v{n(room.down)}"/>'
    for i in chart.row_edges:
        yield f'<path class="edge" d="M{n(room.left)} {n(room.top + high * i - 0.5)}h{n(room.across)}"/>'


def _columns(chart: HeatMap, room: Box, wide: float) -> list[str]:
    bottom, parts = room.top + room.down, []
    for j, name in chart.column_texts:
        x = room.left + wide * (j + 0.5)
        parts.append(
            upwards(name, x + 3.5, bottom + 6, "num end") if upright(chart) else words(name, x, bottom + 13, "num mid")
        )
    lines = [line for line in (chart.across, chart.note) if line]
    below = bottom + names_below(chart) + 10
    return parts + [words(line, room.left, below + 14 * k, "label") for k, line in enumerate(lines)]


def _bar(scale: ColourScale, left: float, top: float) -> list[str]:
    """A colour bar with its label, its numbers and the level of chance."""
    steps = 32  # one for each colour of a sequential scale
    parts = ['<g class="bar" shape-rendering="crispEdges">']
    for k in range(steps):
        value = scale.low + (scale.high - scale.low) * k / (steps - 1)
        colour = level(value, scale.low, scale.high, diverging=scale.diverging)
        parts.append(f'<rect class="{colour}" {_rectangle(left + BAR * k / steps, top + 14, BAR / steps, BAR_HIGH)}/>')
    parts.append("</g>")
    for value, text in scale.marks:
        share = _share(scale, value)
        parts.append(words(text, left + BAR * share, top + 34, f"num{_anchor(share)}"))
    parts.append(words(scale.label, left, top + 9, "label"))
    places = [left + BAR * _share(scale, value) for value in scale.levels]
    parts += [f'<path class="chance" d="M{n(x)} {n(top + 11)}v15"/>' for x in places]
    if scale.levels:
        share = _share(scale, scale.levels[0])
        parts.append(words(f"chance {scale.chance_text}", left + BAR * share, top + 44, f"num{_anchor(share)}"))
    return parts


def _share(scale: ColourScale, value: float) -> float:
    """The place of a value on the colour bar, in [0, 1]."""
    return min(max((value - scale.low) / (scale.high - scale.low), 0.0), 1.0) if scale.high > scale.low else 0.0


def _anchor(share: float) -> str:
    return "" if share < 0.2 else " end" if share > 0.8 else " mid"


def overlaps_svg(chart: Overlaps, alt: str) -> str:
    """A map of φ(i, j) as SVG.

    There is one path per colour and not one element per cell, so that a page of many maps stays small. The values for
    hovering are two digits each in an attribute.
    """
    rows, columns = len(chart.phi), max(map(len, chart.phi), default=0)
    room = chart_box(chart)
    side = room.across / max(columns, 1)
    paths: dict[str, list[str]] = {}
    for i, row in enumerate(chart.phi):
        for colour, j, length in _runs(row, chart.scale):
            paths.setdefault(colour, []).append(f"M{j} {i}h{length}v1h-{length}z")
    marks = "".join(f'<path class="{colour}" d="{"".join(d)}"/>' for colour, d in sorted(paths.items()))
    values = " ".join("".join(f"{min(round(100 * value), 99):02d}" for value in row) for row in chart.phi)
    left, bottom = room.left, room.top + room.down
    parts = [
        words(fit_name(chart.title, TITLE), left, 12, "head"),
        f'<g transform="translate({n(left)} 18) scale({n(side, 4)})" shape-rendering="crispEdges" data-phi="{values}">',
        f"{marks}</g>",
        *(words(str(i), left - 4, 18 + side * (i - 0.5) + 3.5, "num end") for i in map_ticks(rows)),
        *(words(str(j), left + side * (j - 0.5), bottom + 11, "num mid") for j in map_ticks(columns)),
        *(words(note, left, bottom + 12 + NOTE * (k + 1), "num") for k, note in enumerate(chart.notes)),
    ]
    return svg(room.width, room.height, parts, alt or chart.title, f' class="phi"{modules_attribute(chart.modules)}')


def _runs(row: Sequence[float], scale: ColourScale) -> Iterable[tuple[str, int, int]]:
    """Runs of neighbours of the same colour: colour, first column, length."""
    colours = [level(value, scale.low, scale.high, diverging=False) for value in row]
    start = 0
    for j in range(1, len(colours) + 1):
        if j == len(colours) or colours[j] != colours[start]:
            yield colours[start], start, j - start
            start = j


def key_svg(key: Key) -> str:
    """A colour key as SVG, for charts that share it."""
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
    return parts + [words(name, 8 + (BAR - side) * place + side / 2, 36, "num mid") for place, name in ramp.ticks]
