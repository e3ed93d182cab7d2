"""Maps as SVG: cells of kinds and blocks, of adapters, and φ(i, j)."""

from collections.abc import Iterable, Sequence
from html import escape

from loralens.charts.figure import fit
from loralens.reporting.chart import Heat, Overlaps, Scale
from loralens.reporting.palette import is_strong, level
from loralens.reporting.svg import LETTER, SMALL, modules, n, svg, upwards, words

CELL = 18  # of a map
WIDE = 40  # of a map whose cells say their value
MAP = 132  # of φ(i, j)


def heat_svg(chart: Heat, alt: str) -> str:
    """A map of cells under its colour bar."""
    side = WIDE if chart.written else CELL
    high = 26 if chart.written else CELL
    left = 14 + LETTER * max(map(len, chart.rows), default=0)
    names = _room(chart)
    top = 20 if chart.title else 2
    width = max(
        left + side * len(chart.columns) + 8,
        left + max(170, LETTER * max(len(chart.across), len(chart.scale.label))),
        LETTER * len(chart.title) + 16,
    )
    bottom = top + high * len(chart.rows)
    parts = [words(chart.title, 0, 13, "head")] if chart.title else []
    parts += [words(name, left - 6, top + high * i + high / 2 + 4, "label end") for i, name in enumerate(chart.rows)]
    parts += _holes(chart, left, top, side, high)
    parts += [_cell(chart, i, j, left, top, side, high) for i, j in sorted(chart.cells)]
    parts += _columns(chart, left, bottom, side)
    below = bottom + names + (24 if chart.across else 6)
    parts += _bar(chart.scale, left, below)
    return svg(width, below + 48, parts, alt or chart.title, ' class="heat"')


def _holes(chart: Heat, left: float, top: float, side: float, high: float) -> list[str]:
    return [
        f'<rect class="hole" {_box(left + side * j, top + high * i, side - 1, high - 1)}/>'
        for i in range(len(chart.rows))
        for j in range(len(chart.columns))
        if (i, j) not in chart.cells
    ]


def _box(x: float, y: float, width: float, height: float) -> str:
    return f'x="{n(x)}" y="{n(y)}" width="{n(width)}" height="{n(height)}"'


def _cell(chart: Heat, i: int, j: int, left: float, top: float, side: float, high: float) -> str:
    cell, scale = chart.cells[i, j], chart.scale
    colour = level(cell.value, scale.low, scale.high, diverging=scale.diverging)
    x, y = left + side * j, top + high * i
    text = ""
    if chart.written:
        strong = " strong" if is_strong(colour) else ""
        text = words(scale.written(cell.value), x + side / 2, y + high / 2 + 4, f"cell mid{strong}")
    mark = f'<rect class="{colour}" {_box(x, y, side - 1, high - 1)}'
    return f'{mark} data-t="{escape(cell.tip)}"{modules(cell.modules)}/>{text}'


def _room(chart: Heat) -> float:
    """Height of the names of the columns: those of more than three letters run upwards."""
    longest = max(map(len, chart.columns), default=0)
    return SMALL * longest + 10 if longest > 3 else 18


def _columns(chart: Heat, left: float, bottom: float, side: float) -> list[str]:
    step = 1 if len(chart.columns) <= 24 or sum(len(name) > 3 for name in chart.columns) > 1 else 2
    shown = list(enumerate(chart.columns))[::step]
    parts = []
    for j, name in shown:
        x = left + side * j + side / 2
        if len(name) > 3:
            parts.append(upwards(name, x + 3.5, bottom + 6, "num end"))
        else:
            parts.append(words(name, x, bottom + 13, "num mid"))
    if chart.across:
        parts.append(words(chart.across, left, bottom + _room(chart) + 12, "label"))
    return parts


def _bar(scale: Scale, left: float, top: float) -> list[str]:
    """The colours and what they mean, with the level of chance."""
    wide, steps = 160.0, 32
    parts = ['<g shape-rendering="crispEdges">']
    for k in range(steps):
        value = scale.low + (scale.high - scale.low) * k / (steps - 1)
        colour = level(value, scale.low, scale.high, diverging=scale.diverging)
        x = left + wide * k / steps
        parts.append(f'<rect class="{colour}" x="{n(x)}" y="{n(top + 14)}" width="{n(wide / steps)}" height="9"/>')
    parts.append("</g>")
    parts.append(words(scale.written(scale.low), left, top + 34, "num"))
    parts.append(words(scale.written(scale.high), left + wide, top + 34, "num end"))
    parts.append(words(scale.label, left, top + 9, "label"))
    if scale.chance is not None and scale.high > scale.low:
        share = min(max((scale.chance - scale.low) / (scale.high - scale.low), 0.0), 1.0)
        x, anchor = left + wide * share, "" if share < 0.2 else " end" if share > 0.8 else " mid"
        parts.append(f'<path class="chance" d="M{n(x)} {n(top + 11)}v15"/>')
        parts.append(words(f"chance {scale.written_chance}", x, top + 44, f"num{anchor}"))
    return parts


def overlaps_svg(chart: Overlaps, alt: str) -> str:
    """φ(i, j): a path for each colour, so that many maps are still small; hovering reads the numbers beside them."""
    rows, columns = len(chart.phi), max(map(len, chart.phi), default=0)
    side = MAP / max(rows, columns, 1)
    paths: dict[str, list[str]] = {}
    for i, row in enumerate(chart.phi):
        for colour, j, length in _runs(row, chart.scale):
            paths.setdefault(colour, []).append(f"M{j} {i}h{length}v1h-{length}z")
    marks = "".join(f'<path class="{colour}" d="{"".join(d)}"/>' for colour, d in sorted(paths.items()))
    values = " ".join("".join(f"{min(round(100 * value), 99):02d}" for value in row) for row in chart.phi)
    parts = [
        words(fit(chart.title, 26), 16, 12, "head"),
        f'<g transform="translate(16 18) scale({n(side, 4)})" shape-rendering="crispEdges" data-phi="{values}">',
        f"{marks}</g>",
        words("1", 12, 18 + side / 2 + 4, "num end"),
        words(str(rows), 12, 18 + side * rows - 1, "num end"),
        words("1", 16, 18 + side * rows + 12, "num"),
        words(str(columns), 16 + side * columns, 18 + side * rows + 12, "num end"),
        *(words(note, 16, 18 + side * rows + 25 + 12 * k, "num") for k, note in enumerate(chart.notes)),
    ]
    return svg(166, 18 + side * rows + 42, parts, alt or chart.title, f' class="phi"{modules(chart.modules)}')


def _runs(row: Sequence[float], scale: Scale) -> Iterable[tuple[str, int, int]]:
    """Neighbours of one colour together: colour, first, count."""
    colours = [level(value, scale.low, scale.high, diverging=False) for value in row]
    start = 0
    for j in range(1, len(colours) + 1):
        if j == len(colours) or colours[j] != colours[start]:
            yield colours[start], start, j - start
            start = j


def bar_svg(scale: Scale) -> str:
    """A colour bar of its own, for maps that share one."""
    return svg(176, 48, _bar(scale, 12, 0), "", ' class="phi" aria-hidden="true"')
