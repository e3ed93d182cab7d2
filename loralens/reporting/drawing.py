"""The charts of a picture drawn by matplotlib, for the Markdown: the same data in the same colours as on the page."""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import numpy as np
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.colors import ListedColormap, Normalize
from matplotlib.figure import Figure, SubFigure
from matplotlib.lines import Line2D

from loralens.charts.figure import fit, settle, styled
from loralens.charts.heat_map import ticks
from loralens.reporting.axes import empty, spans, tick_label, x_ticks, y_ticks
from loralens.reporting.chart import Chart, Heat, Line, Lines, Overlaps, Scale
from loralens.reporting.document import Picture
from loralens.reporting.palette import colours, ink_class, is_strong, level

WIDTH = 9.6  # inches: up to that, charts stand side by side
TITLE, BAR = 0.3, 0.7  # inches of the title, and of a colour bar that all charts share
CELL, WRITTEN = (0.2, 0.2), (0.46, 0.26)  # of a cell of a map, and of one that says its value
LETTER = 0.075  # of a letter beside a map
CHANCE = "#c8530c"
COLOURS = colours("light") | {"quiet": "#7d8790"}


class Drawn(NamedTuple):
    """A chart and the room it wants, in inches; ``into`` draws it."""

    width: float
    height: float
    into: Callable[[SubFigure], None]


def drawn(picture: Picture) -> Figure:
    """The charts of a picture under its title, side by side as far as there is room.

    What only hovering says on the page is missing here; the tables have it. Same picture, same bytes.
    """
    charts = [_drawn(chart, alone=len(picture.charts) == 1) for chart in picture.charts]
    width = max(chart.width for chart in charts)
    across = max(1, min(len(charts), int(WIDTH / width)))
    rows = [charts[i : i + across] for i in range(0, len(charts), across)]
    heights = [max(chart.height for chart in row) for row in rows]
    shared = next((chart.scale for chart in picture.charts if isinstance(chart, Overlaps)), None)
    foot = BAR if shared else 0.01
    with styled():
        figure = Figure(figsize=(across * width, TITLE + sum(heights) + foot), layout="constrained")
        figure.suptitle(fit(picture.title, int(11 * across * width)), parse_math=False)
        above, below = figure.subfigures(2, 1, height_ratios=[sum(heights), foot], squeeze=False)[:, 0]
        places = above.subfigures(len(rows), across, height_ratios=heights, squeeze=False)
        for place, chart in zip(places.flat, charts, strict=False):
            chart.into(place)
        if shared:
            _bar_alone(below, shared)
    return settle(figure)


def _drawn(chart: Chart, *, alone: bool) -> Drawn:
    if isinstance(chart, Lines):
        width, height = (5.6, 3.0) if alone else (3.2, 2.3)
        return Drawn(width, height + 0.17 * len(chart.named), partial(_lines, chart))
    if isinstance(chart, Overlaps):
        rows, columns = len(chart.phi), max(map(len, chart.phi), default=1)
        return Drawn(2.4, 1.0 + 2.1 * min(1.0, rows / columns), partial(_overlaps, chart))
    wide, high = WRITTEN if chart.written else CELL
    beside = LETTER * max(map(len, chart.rows), default=0)
    below = LETTER * _longest(chart) if _upright(chart) else 0.15
    words = LETTER * max(len(chart.across), len(chart.scale.label), 28)
    width = max(beside + max(wide * len(chart.columns), words) + 0.4, LETTER * len(chart.title) + 0.3)
    title = 0.25 * bool(chart.title)
    return Drawn(width, high * len(chart.rows) + below + title + 0.95, partial(_heat, chart))


def _lines(chart: Lines, part: SubFigure) -> None:
    axes = part.subplots()
    (left, right), (low, high) = spans(chart)
    axes.set_yscale("log" if chart.log else "linear")
    axes.set(xlim=(left, right), ylim=(low, high))
    for line in chart.lines:
        _line(line, axes)
    for k, (name, value) in enumerate(chart.levels.items()):
        _level(axes, name, value, shift=0.12 * k)
    if empty(chart):
        axes.text(0.5, 0.5, "all of it is 0", transform=axes.transAxes, ha="center", fontsize=7)
    for axis, places in ((axes.xaxis, x_ticks(chart, (left, right))), (axes.yaxis, y_ticks(chart, (low, high)))):
        axis.set_ticks(places, [tick_label(value) for value in places])
        axis.set_ticks([], minor=True)
    axes.grid(axis="y", color="0.9", linewidth=0.5)
    axes.spines[["top", "right"]].set_visible(False)
    axes.set_title(fit(chart.title, 30), parse_math=False)
    axes.set_xlabel(chart.x_label, parse_math=False)
    axes.set_ylabel(chart.y_label, parse_math=False)
    if names := _named(chart):
        legend = part.legend(*zip(*names, strict=True), loc="outside lower center", frameon=False, fontsize=7)
        for text in legend.get_texts():
            text.set_parse_math(False)


def _level(axes: Axes, name: str, value: float, *, shift: float) -> None:
    """A level and its name: high ones below their line at the right, where curves that rise have passed them."""
    axes.axhline(value, color=COLOURS["quiet"], linewidth=0.6, linestyle=":")
    low, high = axes.get_ylim()
    at = axes.get_yaxis_transform()
    if value > (low + high) / 2:
        place: dict[str, Any] = {"x": 0.99 - shift, "ha": "right", "va": "top"}
    else:
        place = {"x": 0.02 + shift, "ha": "left", "va": "bottom"}
    axes.text(y=value, s=name, transform=at, fontsize=6, color=COLOURS["quiet"], parse_math=False, **place)


def _line(line: Line, axes: Axes) -> None:
    """A point that is not finite breaks the line no more than on the page."""
    points = [(x, y) for x, y in zip(line.x, line.y, strict=True) if np.isfinite(y)]
    axes.plot(*zip(*points, strict=True) if points else ([], []), **_look(line), clip_on=False)


def _look(line: Line) -> dict[str, Any]:
    marks = {"marker": "o", "markersize": 2.6} if line.dots else {}
    style = ":" if line.dotted else "--" if line.dashed else "-"
    return {"color": COLOURS[ink_class(line.ink)], "linewidth": 1.0, "linestyle": style, **marks}


def _heat(chart: Heat, part: SubFigure) -> None:
    axes, scale = part.subplots(), chart.scale
    if not chart.cells:
        axes.set_axis_off()
        return
    values = np.full((len(chart.rows), len(chart.columns)), np.nan)
    for place, cell in chart.cells.items():
        values[place] = cell.value
    axes.patch.set(hatch="......", edgecolor="0.85", linewidth=0)
    axes.imshow(values, cmap=_colormap(scale), norm=_norm(scale), aspect="auto" if chart.written else "equal")
    for (i, j), cell in chart.cells.items() if chart.written else ():
        strong = is_strong(level(cell.value, scale.low, scale.high, diverging=scale.diverging))
        colour = "white" if strong else "black"
        axes.text(j, i, scale.written(cell.value), ha="center", va="center", fontsize=6, color=colour)
    axes.set_yticks(range(len(chart.rows)), chart.rows, parse_math=False)
    upright: dict[str, Any] = {"rotation": 90} if _upright(chart) else {}
    step = 1 if len(chart.columns) <= 24 or upright else 2
    axes.set_xticks(range(0, len(chart.columns), step), chart.columns[::step], parse_math=False, **upright)
    axes.tick_params(length=0)
    axes.set_title(chart.title, loc="left", parse_math=False)
    axes.set_xlabel(chart.across, parse_math=False)
    bar = part.colorbar(_colours(scale), ax=axes, location="bottom", shrink=0.9, aspect=24, pad=0.02)
    _mark(bar.ax, scale)


def _overlaps(chart: Overlaps, part: SubFigure) -> None:
    axes, phi = part.subplots(), np.array(chart.phi)
    rows, columns = phi.shape
    axes.imshow(phi, cmap=_colormap(chart.scale), norm=_norm(chart.scale), extent=(0.5, columns + 0.5, rows + 0.5, 0.5))
    axes.set_xticks(ticks(columns))
    axes.set_yticks(ticks(rows))
    axes.tick_params(length=2)
    axes.set_title(fit(chart.title, 26), parse_math=False)
    axes.set_xlabel("\n".join(chart.notes), fontsize=6, parse_math=False)


def _bar_alone(part: SubFigure, scale: Scale) -> None:
    axes = part.add_axes((0.3, 0.72, 0.4, 0.15))
    part.colorbar(_colours(scale), cax=axes, orientation="horizontal")
    _mark(axes, scale)


def _mark(axes: Axes, scale: Scale) -> None:
    """Numbers under a colour bar: its ends, what it means, and where chance lies."""
    axes.set_xticks([scale.low, scale.high], [scale.written(scale.low), scale.written(scale.high)])
    axes.set_xticks([], minor=True)
    label = scale.label
    if scale.chance is not None and scale.low < scale.high:
        axes.axvline(scale.chance, color=CHANCE, linewidth=1.5)
        label += f"\nmark: chance {scale.written_chance}"
    axes.set_xlabel(label, fontsize=7, parse_math=False)


def _colormap(scale: Scale) -> ListedColormap:
    sign = "v" if scale.diverging else "s"
    return ListedColormap([colour for name, colour in COLOURS.items() if name[0] == sign])


def _norm(scale: Scale) -> Normalize:
    return Normalize(scale.low, scale.high if scale.high > scale.low else scale.low + 1)


def _colours(scale: Scale) -> ScalarMappable:
    return ScalarMappable(_norm(scale), _colormap(scale))


def _named(chart: Lines) -> list[tuple[object, str]]:
    """What the legend shows and says."""
    return [(Line2D([], [], **_look(line)), fit(line.name, 40)) for line in chart.named]


def _longest(chart: Heat) -> int:
    return max(map(len, chart.columns), default=0)


def _upright(chart: Heat) -> bool:
    """Whether the names of the columns run upwards: those of more than three letters."""
    return _longest(chart) > 3
