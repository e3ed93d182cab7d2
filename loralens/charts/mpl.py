"""Charts drawn by matplotlib, with the limits, ticks, colours and places that they have on a page.

Nothing else in the package imports matplotlib, and this module does where it draws: it takes half a second. Figures
are made without pyplot, so no window and no state of the user's is touched.
"""

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from math import isfinite
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from loralens.charts.axes import map_ticks
from loralens.charts.layout import (
    BAR,
    BAR_HIGH,
    LINE,
    NOTE,
    TREE,
    Box,
    above_cells,
    box,
    cell_size,
    key_size,
    level_places,
    listed,
    name_letters,
    names_below,
    rows_of,
    slant,
    upright,
)
from loralens.charts.names import fit
from loralens.charts.palette import BLOCKS, SIDES, STEPS, colours, ink_class, is_strong, level
from loralens.charts.spec import Band, Chart, Figure, Heat, Key, Line, Lines, Overlaps, Scale
from loralens.errors import OptionError

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.colors import BoundaryNorm, ListedColormap
    from matplotlib.figure import Figure as Drawing

PIXELS = 96  # CSS pixels of an inch
POINT = 72 / PIXELS  # of a pixel
ROOM = 1040  # pixels up to which charts stand side by side
GAP, MARGIN = 14, 12  # pixels between charts, and around them
TITLE, BAND = 17, 22  # pixels of a line of the title, and of the title of a band
RASTER = 4096  # cells from which a map in .svg or .pdf is pixels
LETTER = 7.4  # pixels of a letter of a title
COLOURS = colours("light")
SIZES = {"label": 11 * POINT, "num": 10 * POINT, "small": 9 * POINT, "head": 11.5 * POINT}
MARKERS = {"": "", "dot": "o", "square": "s", "triangle": "^", "star": "*"}
EMPTY: dict[str, Any] = {"facecolor": "white", "hatch": "....", "edgecolor": "0.8", "linewidth": 0}

STYLE: dict[Any, Any] = {
    "axes.grid": False,
    "axes.linewidth": 0.6,
    "axes.titlesize": 8,
    "figure.dpi": 150,
    "figure.facecolor": "white",
    "figure.titlesize": 10,
    "font.family": ["DejaVu Sans"],  # ships with matplotlib and has σ, Δ, ᵢ and –
    "font.size": 8,
    "hatch.linewidth": 0.6,
    "svg.fonttype": "path",
    "svg.hashsalt": "loralens",
    "text.parse_math": False,  # names are other people's text, and may hold a dollar
    "text.usetex": False,
    "xtick.labelsize": 7,
    "ytick.labelsize": 7,
}


def styled() -> "AbstractContextManager[None]":
    """A block in which matplotlib draws in the style of the house, whatever the user's own settings."""
    from matplotlib import rc_context

    return rc_context(STYLE)


@contextmanager
def boxes_for_missing_letters() -> Iterator[None]:
    """No warning for a letter that the font lacks: it comes out as a box."""
    import warnings

    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Glyph .* missing from")
        yield


def settle(drawing: "Drawing") -> "Drawing":
    """A drawing with a layout engine, its layout made once and kept: each drawing would make it slightly other."""
    engine = drawing.get_layout_engine()
    if engine is not None:
        with styled(), boxes_for_missing_letters():
            engine.execute(drawing)
    drawing.set_layout_engine("none")
    return drawing


def draw(figure: Figure, ax: "Axes | None" = None) -> "Drawing":
    """A figure drawn by matplotlib.

    Parameters
    ----------
    figure : Figure
    ax : matplotlib Axes, optional
        Draw into these axes, in the style of their own figure. The figure must have one chart.

    Returns
    -------
    matplotlib Figure
        That of ``ax`` where it is given.

    Raises
    ------
    OptionError
        A figure of several charts, which one ``ax`` cannot hold.
    """
    if ax is not None:
        return _draw_into(figure, ax)
    from matplotlib.figure import Figure as Drawing

    rows = [_rows(band) for band in figure.bands]
    width = max([max(row.width for row in band) for band in rows if band], default=300) + 2 * MARGIN
    title = [fit(line, int((width - MARGIN) / LETTER)) for line in figure.title.split("\n")] if figure.title else []
    heights = [sum(row.height + GAP for row in band) + BAND * bool(one.title) for one, band in _both(figure, rows)]
    height = 2 * MARGIN + TITLE * len(title) + sum(heights)
    with styled(), boxes_for_missing_letters():
        sheet = _Sheet(Drawing(figsize=(width / PIXELS, height / PIXELS)), width, height)
        for k, line in enumerate(title):
            sheet.text(line, width / 2, MARGIN + TITLE * k, va="top", ha="center", fontsize=12 * POINT)
        top = MARGIN + TITLE * len(title) + 4.0
        for band, placed in _both(figure, rows):
            if band.title:
                sheet.text(band.title, MARGIN, top + 4, va="top", ha="left", fontsize=SIZES["head"], weight="bold")
                top += BAND
            for row in placed:
                for left, chart in row.charts:
                    _chart(sheet, chart, MARGIN + left, top, alone=_alone(band))
                for left, key in row.keys:
                    _key(sheet, key, MARGIN + left, top)
                top += row.height + GAP
        return sheet.figure


class _Row(NamedTuple):
    """Charts, or keys, that stand side by side: the left end of each, and the room they take."""

    width: float
    height: float
    charts: Sequence[tuple[float, Chart]] = ()
    keys: Sequence[tuple[float, Key]] = ()


class _Sheet(NamedTuple):
    """A figure in whose pixels charts are placed, from the upper left corner."""

    figure: "Drawing"
    width: float
    height: float

    def axes(self, left: float, top: float, width: float, height: float) -> "Axes":
        """Axes at a place."""
        bottom = self.height - top - height
        place = left / self.width, bottom / self.height, width / self.width, height / self.height
        return self.figure.add_axes(tuple(round(share, 6) for share in place))

    def text(self, text: str, x: float, y: float, **look: Any) -> None:
        """Text at a place."""
        self.figure.text(x / self.width, 1 - y / self.height, text, parse_math=False, **look)


def _both(figure: Figure, rows: Sequence[Sequence[_Row]]) -> list[tuple[Band, Sequence[_Row]]]:
    return list(zip(figure.bands, rows, strict=True))


def _alone(band: Band) -> bool:
    return len(band.charts) == 1


def _rows(band: Band) -> list[_Row]:
    """The charts of a band in rows, as many in one as there is room for, and its keys below."""
    boxes = [None if chart is None else box(chart, alone=_alone(band)) for chart in band.charts]
    widest = max([one.width for one in boxes if one], default=0.0)
    found = []
    if boxes:
        across, down = rows_of(widest + GAP, len(boxes), ROOM, band.columns)
        for k in range(down):
            part = list(zip(band.charts, boxes, strict=True))[k * across : (k + 1) * across]
            charts = [((widest + GAP) * i, chart) for i, (chart, _) in enumerate(part) if chart is not None]
            height = max([one.height for _, one in part if one], default=0.0)
            found.append(_Row((widest + GAP) * min(across, len(boxes)) - GAP, height, charts))
    if band.keys:
        sizes, left, keys = [key_size(key) for key in band.keys], 0.0, []
        for key, (width, _) in zip(band.keys, sizes, strict=True):
            keys.append((left, key))
            left += width + GAP
        found.append(_Row(left, max(height for _, height in sizes), keys=keys))
    return found


def _chart(sheet: _Sheet, chart: Chart, left: float, top: float, *, alone: bool) -> None:
    room = box(chart, alone=alone)
    if isinstance(chart, Heat) and not (chart.rows and chart.columns):
        return
    axes = sheet.axes(left + room.left, top + room.top, room.across, room.down)
    if isinstance(chart, Lines):
        _lines(axes, chart)
        if chart.named:
            corner = (left + 46) / sheet.width, 1 - (top + room.height + 2) / sheet.height
            _legend(
                axes,
                chart,
                name_letters(room),
                loc="lower left",
                bbox_to_anchor=corner,
                bbox_transform=sheet.figure.transFigure,
            )
    elif isinstance(chart, Heat):
        _heat(axes, chart)
        _around(sheet, chart, room, left, top)
        _bar(sheet, chart.scale, left + room.left, top + room.height - 48)
    else:
        _overlaps(axes, chart)
        for k, note in enumerate(chart.notes):
            y = top + room.top + room.down + 12 + NOTE * (k + 1)
            sheet.text(note, left + room.left, y, va="baseline", fontsize=SIZES["small"], color=COLOURS["quiet"])


def _draw_into(figure: Figure, axes: "Axes") -> "Drawing":
    """The one chart of a figure in axes of the caller's."""
    charts = figure.charts
    if len(charts) != 1:
        raise OptionError(
            f"this figure has {len(charts)} panels, and ax can hold one",
            fix="leave out ax, and use the figure returned",
        )
    (chart,) = charts
    drawing = axes.get_figure(root=True)
    assert drawing is not None
    with boxes_for_missing_letters():
        if isinstance(chart, Lines):
            _lines(axes, chart)
            if chart.named:
                _legend(axes, chart)
        else:
            if isinstance(chart, Heat):
                _heat(axes, chart)
                axes.set_xlabel(chart.across, parse_math=False)
            else:
                _overlaps(axes, chart)
                axes.set_xlabel("\n".join(chart.notes), parse_math=False)
            bar = drawing.colorbar(_mappable(chart.scale), ax=axes, label=chart.scale.label)
            bar.ax.yaxis.label.set_parse_math(False)
            bar.set_ticks([value for value, _ in chart.scale.marks], labels=[text for _, text in chart.scale.marks])
            for value in chart.scale.levels:
                bar.ax.axhline(value, color=COLOURS["chance"], linewidth=1.5)
    if figure.title and not chart.title:
        axes.set_title(figure.title, parse_math=False)
    return drawing


def _lines(axes: "Axes", chart: Lines) -> None:
    axes.set_yscale("log" if chart.y.log else "linear")
    axes.set(xlim=chart.x.limits, ylim=chart.y.limits)
    for area in chart.areas:
        axes.fill_between(area.x, area.low, area.high, color=COLOURS["area"], linewidth=0, zorder=0.5)
    for line in chart.lines:
        _line(axes, line, log=chart.y.log)
    places = level_places(chart)
    for name, value in chart.levels.items():
        _level(axes, name, value, POINT * places[name])
    look: dict[str, Any] = {"fontsize": SIZES["small"], "color": COLOURS["quiet"], "parse_math": False}
    if chart.empty:
        axes.text(0.5, 0.5, chart.note or "all of it is 0", transform=axes.transAxes, ha="center", **look)
    elif chart.note:
        axes.text(0.03, 0.04, chart.note, transform=axes.transAxes, va="bottom", zorder=4, **look)
    for axis, ticks in ((axes.xaxis, chart.x.ticks), (axes.yaxis, chart.y.ticks)):
        axis.set_ticks([], minor=True)
        axis.set_ticks([value for value, _ in ticks], [label for _, label in ticks], parse_math=False)
        axis.label.set_size(SIZES["label"])
    axes.tick_params(labelsize=SIZES["num"], labelcolor=COLOURS["quiet"], length=2.5, pad=2)
    if slant(chart):
        axes.tick_params(axis="x", labelsize=SIZES["small"])
        for label in axes.get_xticklabels():
            label.set(rotation=40, ha="right", rotation_mode="anchor")
    axes.grid(axis="y", color="#e1e5e8", linewidth=0.6)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    axes.set_title(fit(chart.title, 30), loc="left", parse_math=False, fontsize=SIZES["head"], weight="bold", pad=4)
    axes.set_xlabel(chart.x.label, parse_math=False, labelpad=2)
    axes.set_ylabel(chart.y.label, parse_math=False)


def _line(axes: "Axes", line: Line, *, log: bool) -> None:
    """A point that is not finite breaks the line no more than on the page."""
    labels = line.labels or [""] * len(line.x)
    points = [
        (x, y, text) for x, y, text in zip(line.x, line.y, labels, strict=True) if isfinite(y) and (y > 0 or not log)
    ]
    x, y = [point[0] for point in points], [point[1] for point in points]
    axes.plot(x, y, label=line.name, **_look(line), clip_on=False, zorder=2.5 if line.marker == "star" else 2)
    for left, up, text in points:
        if text:
            look: dict[str, Any] = {"fontsize": SIZES["small"], "color": COLOURS["quiet"], "parse_math": False}
            axes.annotate(text, (left, up), xytext=(3, 3), textcoords="offset points", **look)


def _look(line: Line) -> dict[str, Any]:
    size = 8 if line.marker == "star" else 3.4
    style = "none" if line.unjoined else ":" if line.dotted else "--" if line.dashed else "-"
    look = {"color": COLOURS[ink_class(line.ink)], "linewidth": 1.3 * POINT, "linestyle": style}
    return {**look, "marker": MARKERS[line.marker], "markersize": size}


def _level(axes: "Axes", name: str, value: float, left: float) -> None:
    """A level and its name: high ones below their line at the right, where curves that rise have passed them."""
    axes.axhline(value, color=COLOURS["quiet"], linewidth=0.6, linestyle=":", zorder=1)
    low, high = axes.transData.transform([(0, limit) for limit in axes.get_ylim()])[:, 1]
    middle = axes.transData.transform((0, value))[1]
    if middle > (low + high) / 2:
        place: dict[str, Any] = {"xy": (1, value), "xytext": (-2, -1), "ha": "right", "va": "top"}
    else:
        place = {"xy": (0, value), "xytext": (left, 1), "ha": "left", "va": "bottom"}
    look: dict[str, Any] = {"fontsize": SIZES["small"], "color": COLOURS["quiet"], "parse_math": False}
    axes.annotate(name, xycoords=axes.get_yaxis_transform(), textcoords="offset points", **place, **look)


def _legend(axes: "Axes", chart: Lines, letters: int = 60, **place: Any) -> None:
    from matplotlib.lines import Line2D

    handles = [Line2D([], [], **_look(line)) for line in chart.named]
    names = [fit(line.name, letters) for line in chart.named]
    spacing = {"labelspacing": (LINE - 11.6) / 11, "handlelength": 2.2, "borderpad": 0.0, "borderaxespad": 0.0}
    legend = axes.legend(handles, names, frameon=False, fontsize=SIZES["label"], **(spacing if place else {}), **place)
    for text in legend.get_texts():
        text.set_parse_math(False)


def _heat(axes: "Axes", chart: Heat) -> None:
    """The cells, and the names of rows and columns."""
    rows, columns = len(chart.rows), len(chart.columns)
    values = np.full((rows, columns), np.nan)
    for place, cell in chart.cells.items():
        values[place] = cell.value
    wide, high = cell_size(chart)
    gaps = {"edgecolors": "white", "linewidth": POINT} if min(wide, high) > 6 else {}
    axes.patch.set(**EMPTY)
    cmap, norm = _colours(chart.scale)
    axes.pcolormesh(np.ma.masked_invalid(values), cmap=cmap, norm=norm, rasterized=rows * columns > RASTER, **gaps)
    if chart.zeros:
        x, y = [j + 0.5 for _, j in chart.zeros], [i + 0.5 for i, _ in chart.zeros]
        axes.plot(x, y, linestyle="none", marker="x", markersize=4, color=COLOURS["zero"], label="ΔW = 0")
    for (i, j), cell in chart.cells.items() if chart.written else ():
        strong = is_strong(level(cell.value, chart.scale.low, chart.scale.high, diverging=chart.scale.diverging))
        look: dict[str, Any] = {"ha": "center", "va": "center", "fontsize": SIZES["num"]}
        axes.text(j + 0.5, i + 0.5, chart.scale.text(cell.value), color="white" if strong else "black", **look)
    for edges, line in ((chart.column_edges, axes.axvline), (chart.row_edges, axes.axhline)):
        for edge in edges:
            line(edge, color="black", linewidth=0.7)
    axes.set(xlim=(0, columns), ylim=(rows, 0))
    axes.set_yticks([i + 0.5 for i, _ in chart.beside], [name for _, name in chart.beside], parse_math=False)
    rotation = {"rotation": 90} if upright(chart) else {}
    below = [name for _, name in chart.below]
    axes.set_xticks([j + 0.5 for j, _ in chart.below], below, parse_math=False, **rotation)
    axes.tick_params(length=0, pad=3, labelcolor=COLOURS["quiet"])
    axes.tick_params(axis="y", labelsize=SIZES["label" if high > 9 else "num"])
    axes.tick_params(axis="x", labelsize=SIZES["num"])
    axes.spines[:].set_visible(False)
    axes.set_title(chart.title, loc="left", parse_math=False, fontsize=SIZES["head"], weight="bold")


def _around(sheet: _Sheet, chart: Heat, room: Box, left: float, top: float) -> None:
    """What stands over and under a map beside the names of its columns."""
    axes = sheet.figure.axes[-1]
    wide, _ = cell_size(chart)
    title, tree, _ = above_cells(chart)
    place = {"x": -room.left / room.across, "y": 1 + (room.top - 13) / room.down, "pad": 0.0}
    axes.set_title(chart.title, loc="left", parse_math=False, fontsize=SIZES["head"], weight="bold", **place)
    small: dict[str, Any] = {"va": "baseline", "fontsize": SIZES["num"], "color": COLOURS["quiet"]}
    for start, stop, name in chart.heads:
        sheet.text(name, left + room.left + wide * (start + stop) / 2, top + room.top - 4, ha="center", **small)
    lines = [line for line in (chart.across, chart.note) if line]
    below = top + room.top + room.down + names_below(chart) + 10
    for k, line in enumerate(lines):
        sheet.text(line, left + room.left, below + 14 * k, **{**small, "fontsize": SIZES["label"]})
    if tree:
        branches = sheet.axes(left + room.left, top + title + 4, room.across, TREE - 8)
        for branch in chart.tree:
            branches.plot(*zip(*branch, strict=True), color=COLOURS["quiet"], linewidth=POINT)
        branches.set(xlim=(0, len(chart.columns)), ylim=(0, 1))
        branches.set_axis_off()
        branches.set_label("<tree>")


def _overlaps(axes: "Axes", chart: Overlaps) -> None:
    phi = np.array(chart.phi)
    rows, columns = phi.shape
    cmap, norm = _colours(chart.scale)
    axes.imshow(phi, cmap=cmap, norm=norm, aspect="auto", extent=(0.5, columns + 0.5, rows + 0.5, 0.5))
    axes.set_xticks(map_ticks(columns))
    axes.set_yticks(map_ticks(rows))
    axes.tick_params(length=0, pad=2, labelsize=SIZES["num"], labelcolor=COLOURS["quiet"])
    axes.spines[:].set_visible(False)
    axes.set_title(fit(chart.title, 26), loc="left", parse_math=False, fontsize=SIZES["label"], pad=4)


def _key(sheet: _Sheet, key: Key, left: float, top: float) -> None:
    if isinstance(key, Scale):
        _bar(sheet, key, left + 8, top)
        return
    sheet.text(key.label, left + 8, top + 11, va="baseline", fontsize=SIZES["label"], color=COLOURS["quiet"])
    if listed(key):
        axes = sheet.axes(left + 8, top + 18, 22, LINE * len(key.ticks))
        for k, (place, _) in enumerate(key.ticks):
            axes.barh(k, 1, 10 / LINE, color=COLOURS[f"b{round((BLOCKS - 1) * place)}"])
        axes.set(xlim=(0, 1), ylim=(len(key.ticks) - 0.5, -0.5), xticks=[])
        axes.yaxis.tick_right()
        axes.set_yticks(range(len(key.ticks)), [name for _, name in key.ticks], parse_math=False)
    else:
        from matplotlib.colors import ListedColormap

        axes = sheet.axes(left + 8, top + 16, BAR, BAR_HIGH)
        axes.imshow([range(BLOCKS)], cmap=ListedColormap([COLOURS[f"b{k}"] for k in range(BLOCKS)]), aspect="auto")
        names = [name for _, name in key.ticks]
        axes.set_xticks([(BLOCKS - 1) * place for place, _ in key.ticks], names, parse_math=False)
        axes.set_yticks([])
    axes.tick_params(length=0, pad=3, labelsize=SIZES["num"], labelcolor=COLOURS["quiet"])
    axes.spines[:].set_visible(False)
    axes.set_label("<key>")


def _bar(sheet: _Sheet, scale: Scale, left: float, top: float) -> None:
    """The colours and what they mean, with the level of chance."""
    axes = sheet.axes(left, top + 14, BAR, BAR_HIGH)
    sheet.figure.colorbar(_mappable(scale), cax=axes, orientation="horizontal", spacing="proportional")
    axes.set_label("<colorbar>")
    high = scale.high if scale.high > scale.low else scale.low + 1
    axes.set_xlim(scale.low, high)
    axes.set_xticks([], minor=True)
    axes.set_xticks([value for value, _ in scale.marks], [text for _, text in scale.marks], parse_math=False)
    axes.tick_params(length=0, pad=2, labelsize=SIZES["num"], labelcolor=COLOURS["quiet"])
    labels = axes.get_xticklabels()
    for label, (value, _) in zip(labels, scale.marks, strict=True):
        share = (value - scale.low) / (high - scale.low)
        label.set_ha("left" if share < 0.2 else "right" if share > 0.8 else "center")
    for spine in axes.spines.values():
        spine.set_visible(False)
    axes.set_title(scale.label, loc="left", parse_math=False, fontsize=SIZES["label"], color=COLOURS["quiet"], pad=3)
    for value in scale.levels:
        axes.axvline(value, color=COLOURS["chance"], linewidth=2 * POINT, clip_on=False)
    if scale.levels:
        share = min(max((scale.levels[0] - scale.low) / (high - scale.low), 0.0), 1.0)
        anchor = "left" if share < 0.2 else "right" if share > 0.8 else "center"
        look: dict[str, Any] = {"va": "baseline", "fontsize": SIZES["num"], "color": COLOURS["quiet"]}
        sheet.text(f"chance {scale.chance_text}", left + BAR * share, top + 44, ha=anchor, **look)


def _colours(scale: Scale) -> "tuple[ListedColormap, BoundaryNorm]":
    """The steps of colour of a scale, with the value in the middle of each as on the page."""
    from matplotlib.colors import BoundaryNorm, ListedColormap

    sign, count = ("v", 2 * SIDES + 1) if scale.diverging else ("s", STEPS)
    most = max(abs(scale.low), abs(scale.high)) or 1.0
    low, high = (-most, most) if scale.diverging else (scale.low, scale.high)
    high = high if high > low else low + 1
    edges = low + (high - low) * (np.arange(count + 1) - 0.5) / (count - 1)
    return ListedColormap([COLOURS[f"{sign}{k}"] for k in range(count)]), BoundaryNorm(edges, count, clip=True)


def _mappable(scale: Scale) -> Any:
    from matplotlib.cm import ScalarMappable

    cmap, norm = _colours(scale)
    return ScalarMappable(norm, cmap)
