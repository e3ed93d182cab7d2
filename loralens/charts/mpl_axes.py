"""Draws one chart into matplotlib axes: its lines, cells and texts, in the colours of the page."""

from typing import TYPE_CHECKING, Any

import numpy as np

from loralens.charts import layout
from loralens.charts.axes import map_ticks
from loralens.charts.names import fit_name
from loralens.charts.palette import SIDES, STEPS, colours, ink_class, is_strong, level
from loralens.charts.spec import Axis, Chart, ColourScale, HeatMap, Line, LineChart, Overlaps

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.cm import ScalarMappable
    from matplotlib.colors import BoundaryNorm, ListedColormap

PIXELS = 96  # CSS pixels per inch, by the definition of CSS
POINT = 72 / PIXELS  # points per CSS pixel: layout is in pixels, fonts of matplotlib are in points
RASTER = 4096  # the number of cells from which a map in .svg or .pdf is a bitmap: rectangles would make a large file
COLOURS = colours("light")  # a picture has no theme to follow, and is put on white paper and slides
# Sizes of fonts in points; the factors are the sizes in CSS pixels, as in report.css.
SIZES = {"label": 11 * POINT, "num": 10 * POINT, "small": 9 * POINT, "head": 11.5 * POINT}
MARKERS = {"": "", "dot": "o", "square": "s", "triangle": "^", "star": "*"}
# How a cell without a module looks: hatched, so that it is not taken for a small value.
EMPTY: dict[str, Any] = {"facecolor": "white", "hatch": "....", "edgecolor": "0.8", "linewidth": 0}
# How remarks, labels of points and names of levels look.
REMARK: dict[str, Any] = {"fontsize": SIZES["small"], "color": COLOURS["quiet"], "parse_math": False}


def draw_chart(axes: "Axes", chart: Chart) -> None:
    """Draw a chart of any kind into axes, without its legend and its colour bar."""
    if isinstance(chart, LineChart):
        draw_lines(axes, chart)
    elif isinstance(chart, HeatMap):
        draw_heat(axes, chart)
    else:
        draw_overlaps(axes, chart)


def draw_lines(axes: "Axes", chart: LineChart) -> None:
    """Draw lines with their axes, levels and note."""
    axes.set_yscale("log" if chart.y.log else "linear")
    axes.set(xlim=chart.x.limits, ylim=chart.y.limits)
    for area in chart.areas:
        # Areas lie behind levels and lines, which have the orders 1 and 2.
        axes.fill_between(area.x, area.low, area.high, color=COLOURS["area"], linewidth=0, zorder=0.5)
    for line in chart.lines:
        _draw_line(axes, line, chart.y)
    places = layout.level_places(chart)
    for name, value in chart.levels.items():
        _draw_level(axes, name, value, POINT * places[name])
    if chart.empty:
        axes.text(0.5, 0.5, chart.note or "all of it is 0", transform=axes.transAxes, ha="center", **REMARK)
    elif chart.note:
        axes.text(0.03, 0.04, chart.note, transform=axes.transAxes, va="bottom", zorder=4, **REMARK)
    for axis, ticks in ((axes.xaxis, chart.x.ticks), (axes.yaxis, chart.y.ticks)):
        axis.set_ticks([], minor=True)  # a logarithmic axis has some by default
        axis.set_ticks([value for value, _ in ticks], [label for _, label in ticks], parse_math=False)
        axis.label.set_fontsize(SIZES["label"])
    axes.tick_params(labelsize=SIZES["num"], labelcolor=COLOURS["quiet"], length=2.5, pad=2)
    if layout.slant(chart):
        axes.tick_params(axis="x", labelsize=SIZES["small"])
        for label in axes.get_xticklabels():
            label.set(rotation=40, ha="right", rotation_mode="anchor")
    axes.grid(axis="y", color="#e1e5e8", linewidth=0.6)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    axes.set_title(
        fit_name(chart.title, 30), loc="left", parse_math=False, fontsize=SIZES["head"], weight="bold", pad=4
    )
    axes.set_xlabel(chart.x.label, parse_math=False, labelpad=2)
    axes.set_ylabel(chart.y.label, parse_math=False)


def _draw_line(axes: "Axes", line: Line, y_axis: Axis) -> None:
    """Draw one line. Points that are not finite are left out and do not break it, as on the page."""
    labels = line.labels or [""] * len(line.x)
    points = [(x, y, text) for x, y, text in zip(line.x, line.y, labels, strict=True) if y_axis.shows(y)]
    xs, ys = [x for x, _, _ in points], [y for _, y, _ in points]
    # The line is not clipped, so that points on the edge of the axes are drawn whole. A star marks the point of
    # interest, which no later line may cover.
    axes.plot(xs, ys, label=line.name, **_look(line), clip_on=False, zorder=2.5 if line.marker == "star" else 2)
    for x, y, text in points:
        if text:
            axes.annotate(text, (x, y), xytext=(3, 3), textcoords="offset points", **REMARK)


def _look(line: Line) -> dict[str, Any]:
    size = 8 if line.marker == "star" else 3.4
    style = "none" if line.unjoined else ":" if line.dotted else "--" if line.dashed else "-"
    look = {"color": COLOURS[ink_class(line.ink)], "linewidth": 1.3 * POINT, "linestyle": style}
    return {**look, "marker": MARKERS[line.marker], "markersize": size}


def _draw_level(axes: "Axes", name: str, value: float, indent: float) -> None:
    """Draw a level with its name, which stands ``indent`` points from the left if the level is low.

    The name of a high level stands below its line at the right, where rising curves have already crossed the level.
    """
    axes.axhline(value, color=COLOURS["quiet"], linewidth=0.6, linestyle=":", zorder=1)
    # Heights are compared on the screen, because the middle of a logarithmic axis is not the middle of its limits.
    low, high = axes.transData.transform([(0, limit) for limit in axes.get_ylim()])[:, 1]
    middle = axes.transData.transform((0, value))[1]
    if middle > (low + high) / 2:
        place: dict[str, Any] = {"xy": (1, value), "xytext": (-2, -1), "ha": "right", "va": "top"}
    else:
        place = {"xy": (0, value), "xytext": (indent, 1), "ha": "left", "va": "bottom"}
    axes.annotate(name, xycoords=axes.get_yaxis_transform(), textcoords="offset points", **place, **REMARK)


def draw_legend(axes: "Axes", chart: LineChart, letters: int = 60, **place: Any) -> None:
    """Draw the legend of a chart that has one.

    Parameters
    ----------
    axes : matplotlib Axes
    chart : LineChart
    letters : int
        The number of letters to which names are shortened.
    **place
        The place of the legend, which is passed on to matplotlib. By default matplotlib looks for a free one.
    """
    if not chart.named:
        return
    from matplotlib.lines import Line2D

    handles = [Line2D([], [], **_look(line)) for line in chart.named]
    names = [fit_name(line.name, letters) for line in chart.named]
    if place:
        # In units of the font size, which is 11 pixels. A line of DejaVu Sans is 11.6 pixels high at this size, and
        # with the spacing as high as on the page.
        spacing = (layout.LINE - 11.6) / 11
        place |= {"labelspacing": spacing, "handlelength": 2.2, "borderpad": 0.0, "borderaxespad": 0.0}
    legend = axes.legend(handles, names, frameon=False, fontsize=SIZES["label"], **place)
    for text in legend.get_texts():
        text.set_parse_math(False)


def draw_heat(axes: "Axes", chart: HeatMap) -> None:
    """Draw the cells of a map and the names of its rows and columns."""
    rows, columns = len(chart.rows), len(chart.columns)
    values = np.full((rows, columns), np.nan)
    for place, cell in chart.cells.items():
        values[place] = cell.value
    wide, high = layout.cell_size(chart)
    # Cells of few pixels have no gaps: these would hide them.
    gaps: dict[str, Any] = {"edgecolors": "white", "linewidth": POINT} if min(wide, high) > 6 else {}
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
    axes.set(xlim=(0, columns), ylim=(rows, 0))  # row 0 is at the top
    axes.set_yticks([i + 0.5 for i, _ in chart.row_texts], [name for _, name in chart.row_texts], parse_math=False)
    rotation: dict[str, Any] = {"rotation": 90} if layout.upright(chart) else {}
    below = [name for _, name in chart.column_texts]
    axes.set_xticks([j + 0.5 for j, _ in chart.column_texts], below, parse_math=False, **rotation)
    axes.tick_params(length=0, pad=3, labelcolor=COLOURS["quiet"])
    axes.tick_params(axis="y", labelsize=SIZES["label" if high > 9 else "num"])
    axes.tick_params(axis="x", labelsize=SIZES["num"])
    axes.spines[:].set_visible(False)
    axes.set_title(chart.title, loc="left", parse_math=False, fontsize=SIZES["head"], weight="bold")


def draw_overlaps(axes: "Axes", chart: Overlaps) -> None:
    """Draw a map of φ(i, j), with i down and j across, both from 1."""
    phi = np.array(chart.phi)
    rows, columns = phi.shape
    cmap, norm = _colours(chart.scale)
    # Cell (i, j) lies around the numbers i and j, so that ticks at whole numbers stand in its middle.
    axes.imshow(phi, cmap=cmap, norm=norm, aspect="auto", extent=(0.5, columns + 0.5, rows + 0.5, 0.5))
    box = layout.chart_box(chart)
    axes.set_xticks(map_ticks(columns, box.across))
    axes.set_yticks(map_ticks(rows, box.down))
    axes.tick_params(length=0, pad=2, labelsize=SIZES["num"], labelcolor=COLOURS["quiet"])
    axes.spines[:].set_visible(False)
    axes.set_title(fit_name(chart.title, 26), loc="left", parse_math=False, fontsize=SIZES["label"], pad=4)


def _colours(scale: ColourScale) -> "tuple[ListedColormap, BoundaryNorm]":
    """The colour steps of a scale and their edges. The first and the last step are centred on the ends of the scale."""
    from matplotlib.colors import BoundaryNorm, ListedColormap

    sign, count = ("v", 2 * SIDES + 1) if scale.diverging else ("s", STEPS)
    most = max(abs(scale.low), abs(scale.high)) or 1.0
    low, high = (-most, most) if scale.diverging else (scale.low, scale.high)
    high = high if high > low else low + 1
    edges = low + (high - low) * (np.arange(count + 1) - 0.5) / (count - 1)
    return ListedColormap([COLOURS[f"{sign}{k}"] for k in range(count)]), BoundaryNorm(edges, count, clip=True)


def colour_scale(scale: ColourScale) -> "ScalarMappable":
    """Return the colours of a scale in the form that matplotlib needs for a colour bar."""
    from matplotlib.cm import ScalarMappable

    cmap, norm = _colours(scale)
    return ScalarMappable(norm, cmap)
