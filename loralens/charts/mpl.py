"""Figures drawn by matplotlib, which lays them out itself; colours are those of light pages.

matplotlib is imported inside functions, as its import takes half a second; `loralens.charts.drawing` imports it at its
top, and is itself imported inside a function. Figures are made without pyplot, so that no window opens and no setting
of the user changes.
"""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from loralens.charts.grid import fit_name
from loralens.charts.mpl_style import ignore_missing_letters, style_context
from loralens.charts.palette import BLOCKS, SIDES, STEPS, colours, ink_class, is_strong, level
from loralens.charts.spec import Axis, Band, Chart, ColourScale, Figure, HeatMap, Key, Line, LineChart, Overlaps, Ramp
from loralens.errors import OptionError

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure as Drawing
    from matplotlib.figure import SubFigure

COLOURS = colours("light")  # a picture has no theme to follow, and is put on white paper and slides
MARKERS = {"": "", "dot": "o", "square": "s", "triangle": "^", "star": "*"}
# How a cell without a module looks: hatched, so that it is not taken for a small value.
EMPTY: dict[str, Any] = {"facecolor": "white", "hatch": "....", "edgecolor": "0.8", "linewidth": 0}
REMARK: dict[str, Any] = {"fontsize": 6.5, "color": COLOURS["quiet"]}  # remarks, and names of points and levels
RASTER = 4096  # the number of cells from which a map in .svg or .pdf is a bitmap: rectangles would make a large file
WIDTH = 11.2  # inches up to which charts stand side by side: four panels of lines
PANEL, ALONE, OVERLAPS = (2.75, 2.0), (5.0, 2.9), (2.0, 1.85)  # inches, without legends and notes
CELL, WRITTEN = (0.19, 0.19), (0.42, 0.28)  # inches of a cell, and of one that shows its value
LINE = 0.16  # inches of a line of text
SLANT = 0.55  # inches that slanted names below an axis take
BAR_SIZE = (1.7, 0.09)  # inches
BAR = 0.6  # inches of a colour bar with its label and numbers


def draw_figure(figure: Figure, ax: "Axes | None" = None) -> "Drawing":
    """Draw a figure with matplotlib.

    Parameters
    ----------
    figure : Figure
    ax : matplotlib Axes, optional
        The axes to draw into, in the style of their own figure. The figure must have one chart.

    Returns
    -------
    matplotlib Figure
        The figure of ``ax`` where it is given.

    Raises
    ------
    OptionError
        ``ax`` is given, and the figure has several charts.
    """
    if ax is not None:
        return _draw_into(figure, ax)
    from loralens.charts.drawing import Drawing

    # Each band has a part of the figure for its charts, and one for its title and for the keys that its charts share.
    bands = [band for band in figure.bands if band.title or any(chart is not None for chart in band.charts)]
    shapes = [_shape(band) for band in bands]
    heights = [sum(down) + LINE * bool(band.title) for band, (_, down) in zip(bands, shapes, strict=True)]
    lines = figure.title.count("\n") + 1 if figure.title else 0
    width = max([sum(across) for across, _ in shapes], default=4.0)
    with style_context(), ignore_missing_letters():
        drawing = Drawing(figsize=(max(width, 4.0), max(sum(heights), 1.0) + LINE * lines), layout="constrained")
        if figure.title:
            # A line of 9 points has some 13 letters for every inch.
            most = int(13 * max(width, 4.0))
            drawing.suptitle("\n".join(fit_name(line, most) for line in figure.title.split("\n")))
        parts = drawing.subfigures(max(len(bands), 1), 1, height_ratios=heights or None, squeeze=False)
        for band, part, (across, down) in zip(bands, parts[:, 0], shapes, strict=False):
            _draw_band(band, part, across, down, spare=max(width, 4.0) - sum(across))
    return drawing


def fix_layout(drawing: "Drawing") -> "Drawing":
    """Run the layout engine of a drawing once and switch it off, as every further run would move things slightly.

    The last digits of its places depend on the order in which the solver meets them, so places are rounded.
    """
    engine = drawing.get_layout_engine()
    if engine is not None:
        with style_context(), ignore_missing_letters():
            engine.execute(drawing)
        drawing.set_layout_engine("none")
        for part in drawing.subfigs:
            part.bbox_relative.set_points(np.round(part.bbox_relative.get_points(), 4))
        for axes in drawing.axes:
            left, bottom, width, height = (round(float(place), 4) for place in axes.get_position(original=True).bounds)
            axes.set_position((left, bottom, width, height))
    return drawing


def resize_drawing(drawing: "Drawing", size: tuple[float, float]) -> None:
    """Give a drawing another width and height in inches; in a smaller one texts and lines shrink too."""
    factor = min([new / old for new, old in zip(size, drawing.get_size_inches(), strict=True)] + [1.0])
    drawing.set_size_inches(*size)
    for artist in drawing.findobj() if factor < 1.0 else ():
        for name in ("fontsize", "linewidth", "markersize"):
            read, write = getattr(artist, f"get_{name}", None), getattr(artist, f"set_{name}", None)
            # Collections have a width for each of their lines.
            if read and write:
                width = read()
                write(width * factor if np.isscalar(width) else np.asarray(width) * factor)


def _size(chart: Chart | None, *, alone: bool) -> tuple[float, float]:
    """The width and the height of a chart in inches, with its texts."""
    if chart is None:
        return 0.0, 0.0
    if isinstance(chart, LineChart):
        wide, high = ALONE if alone else PANEL
        return wide, high + LINE * len(chart.named) + (SLANT if _slanted(chart) else 0.0)
    if isinstance(chart, Overlaps):
        return OVERLAPS[0], OVERLAPS[1] + LINE * len(chart.notes)
    wide, high = _cell(chart)
    names = [max((len(name) for _, name in texts), default=0) for texts in (chart.row_texts, chart.column_texts)]
    words = max(map(len, (chart.title, chart.note, chart.across, _key_label(chart.scale))))
    below = 0.075 * names[1] + LINE * (len(chart.lines_below) + bool(chart.title)) + (0.6 if chart.tree else 0.15)
    across = max(wide * len(chart.columns) + 0.08 * names[0] + 0.3, 0.075 * words, 2.6)
    return across, high * len(chart.rows) + below + BAR


def _slanted(chart: LineChart) -> bool:
    """Whether the names below the x axis are too long to stand side by side."""
    return max((len(name) for _, name in chart.x.ticks), default=0) > 8


def _cell(chart: HeatMap) -> tuple[float, float]:
    wide, high = WRITTEN if chart.written else CELL
    room = chart.room / 96  # in CSS pixels, of which an inch has 96
    across, down = room / max(len(chart.columns), 1), room / max(len(chart.rows), 1)
    # Below 0.03 inches neighbours can no longer be told apart.
    return max(0.03, min(wide, across)), max(0.03, min(high, down))


def _shape(band: Band) -> tuple[list[float], list[float]]:
    """The widths of the columns and the heights of the rows of a band, in inches."""
    sizes = [_size(chart, alone=len(band.charts) == 1) for chart in band.charts] or [(4.0, 0.1)]
    wide = max(width for width, _ in sizes)
    across = band.columns or max(1, min(len(sizes), int(WIDTH / wide)))
    rows = [sizes[start : start + across] for start in range(0, len(sizes), across)]
    heights = [max(height for _, height in row) for row in rows]
    heights[-1] += BAR if band.keys else 0.0
    return [wide] * across, heights


def _draw_band(band: Band, part: "SubFigure", across: Sequence[float], down: Sequence[float], *, spare: float) -> None:
    """Draw a band whose columns and rows are so wide and high; ``spare`` inches of width are left."""
    if band.title:
        part.suptitle(band.title, x=0.01, ha="left", weight="bold", fontsize=8)
    if not band.charts:
        return
    # An empty column at the end keeps charts from growing to the width of the figure.
    grid = part.add_gridspec(len(down), len(across) + 1, width_ratios=[*across, max(spare, 1e-3)], height_ratios=down)
    panels = []
    for k, chart in enumerate(band.charts):
        if chart is None or (isinstance(chart, HeatMap) and not (chart.rows and chart.columns)):
            continue
        axes = part.add_subplot(grid[divmod(k, len(across))])
        panels.append(axes)
        draw_chart(axes, chart)
        if isinstance(chart, HeatMap):
            _draw_key(part, chart.scale, [axes], _cell(chart)[0] * len(chart.columns))
    for key in band.keys if panels else ():
        _draw_key(part, key, panels, sum(across))


def _draw_key(part: "SubFigure | Drawing", key: Key, panels: "Sequence[Axes]", inches: float) -> None:
    """Draw a colour bar below the charts that share it, which are together so many inches wide."""
    from matplotlib.cm import ScalarMappable
    from matplotlib.colors import ListedColormap

    ramp = {"cmap": ListedColormap([COLOURS[f"b{k}"] for k in range(BLOCKS)])}
    mappable = ScalarMappable(**(_steps(key) if isinstance(key, ColourScale) else ramp))
    share = min(1.0, BAR_SIZE[0] / inches)
    place: dict[str, Any] = {"location": "bottom", "anchor": (0.0, 1.0), "pad": 0.03, "shrink": share}
    bar = part.colorbar(mappable, ax=panels, aspect=inches * share / BAR_SIZE[1], **place)
    bar.minorticks_off()
    marks = key.marks if isinstance(key, ColourScale) else key.ticks
    long = isinstance(key, Ramp) and max((len(name) for _, name in marks), default=0) > 6
    turned: dict[str, Any] = {"rotation": 30, "ha": "right"} if long else {}
    bar.set_ticks([value for value, _ in marks], labels=[name for _, name in marks], **turned)
    bar.ax.tick_params(length=2, pad=2, labelcolor=COLOURS["quiet"])
    bar.outline.set_visible(False)
    for value in key.levels if isinstance(key, ColourScale) else ():
        # The mark is not clipped, so that it reaches beyond the bar and is visible on any colour.
        bar.ax.axvline(value, color=COLOURS["chance"], linewidth=1.5, clip_on=False)
    bar.set_label(_key_label(key), color=COLOURS["quiet"], loc="left")


def _key_label(key: Key) -> str:
    if isinstance(key, ColourScale) and key.levels:
        return f"{key.label} (mark: chance, {key.chance_text})"
    return key.label


def _draw_into(figure: Figure, axes: "Axes") -> "Drawing":
    """Draw the one chart of a figure into the axes of the caller."""
    from matplotlib import rc_context
    from matplotlib.text import Text

    charts = figure.charts
    if len(charts) != 1:
        raise OptionError(
            f"this figure has {len(charts)} panels, and ax can hold one",
            fix="leave out ax, and use the figure returned",
        )
    (chart,) = charts
    drawing = axes.get_figure(root=True)
    assert drawing is not None
    with ignore_missing_letters(), rc_context({"text.parse_math": False}):
        draw_chart(axes, chart)
        if not isinstance(chart, LineChart):
            _draw_key(drawing, chart.scale, [axes], BAR_SIZE[0])
        if figure.title and not chart.title:
            axes.set_title(figure.title)
        # The titles and labels of these axes were made before, with the settings of the user.
        axes.get_xticklabels(), axes.get_yticklabels()
        for text in axes.findobj(Text):
            text.set_parse_math(False)
    return drawing


def draw_chart(axes: "Axes", chart: Chart) -> None:
    """Draw a chart of any kind into axes, without its colour bar."""
    if isinstance(chart, LineChart):
        _draw_lines(axes, chart)
    elif isinstance(chart, HeatMap):
        _draw_heat(axes, chart)
    else:
        _draw_overlaps(axes, chart)


def _draw_lines(axes: "Axes", chart: LineChart) -> None:
    from matplotlib.ticker import MaxNLocator, NullFormatter

    axes.set_yscale("log" if chart.y.log else "linear")
    axes.set(xlim=chart.x.limits, ylim=chart.y.limits, xlabel=chart.x.label, ylabel=chart.y.label)
    axes.set_title(fit_name(chart.title, 30))
    for area in chart.areas:
        # Areas lie behind levels and lines, which have the orders 1 and 2.
        axes.fill_between(area.x, area.low, area.high, color=COLOURS["area"], linewidth=0, zorder=0.5)
    for line in chart.lines:
        _draw_line(axes, line, chart.y)
    for k, (name, value) in enumerate(chart.levels.items()):
        axes.axhline(value, color=COLOURS["quiet"], linewidth=0.6, linestyle=":", zorder=1)
        # Names of levels that are close to each other stand side by side.
        place: dict[str, Any] = {"xycoords": axes.get_yaxis_transform(), "textcoords": "offset points"}
        axes.annotate(name, (0.02 + 0.3 * (k % 3), value), xytext=(0, 1), **place, **REMARK)
    if chart.empty:
        axes.text(0.5, 0.5, chart.note or "all of it is 0", transform=axes.transAxes, ha="center", **REMARK)
    elif chart.note:
        axes.text(0.03, 0.04, chart.note, transform=axes.transAxes, va="bottom", zorder=4, **REMARK)
    if chart.x.ticks:
        axes.set_xticks([value for value, _ in chart.x.ticks], [label for _, label in chart.x.ticks])
        if _slanted(chart):
            for label in axes.get_xticklabels():
                label.set(rotation=40, ha="right", rotation_mode="anchor")
    elif all(float(x).is_integer() for line in chart.lines for x in line.x):
        # Directions, ranks and blocks are counted, so a tick at 2.5 would have no meaning.
        axes.xaxis.set_major_locator(MaxNLocator(6, integer=True))
    if chart.y.log:
        axes.yaxis.set_major_formatter("{x:g}")
        axes.yaxis.set_minor_formatter(NullFormatter())
    axes.tick_params(labelcolor=COLOURS["quiet"], length=2.5, pad=2)
    axes.grid(axis="y", color="#e1e5e8", linewidth=0.6)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    if chart.named:
        _draw_legend(axes, chart)


def _draw_line(axes: "Axes", line: Line, y_axis: Axis) -> None:
    """Draw one line. Points that are not finite are left out and do not break it, as on the page."""
    labels = line.labels or [""] * len(line.x)
    points = [(x, y, text) for x, y, text in zip(line.x, line.y, labels, strict=True) if y_axis.shows(y)]
    # The line is not clipped, so that points on the edge of the axes are drawn whole. A star marks the point of
    # interest, which no later line may cover.
    order = 2.5 if line.marker == "star" else 2
    xs, ys = [x for x, _, _ in points], [y for _, y, _ in points]
    axes.plot(xs, ys, label=line.name, clip_on=False, zorder=order, **_look(line))
    for x, y, text in points:
        if text:
            axes.annotate(text, (x, y), xytext=(3, 3), textcoords="offset points", **REMARK)


def _look(line: Line) -> dict[str, Any]:
    style = "none" if line.unjoined else ":" if line.dotted else "--" if line.dashed else "-"
    look = {"color": COLOURS[ink_class(line.ink)], "linewidth": 1.0, "linestyle": style}
    return {**look, "marker": MARKERS[line.marker], "markersize": 8 if line.marker == "star" else 3.4}


def _draw_legend(axes: "Axes", chart: LineChart) -> None:
    """Draw the names of the lines below the chart."""
    from matplotlib.lines import Line2D
    from matplotlib.transforms import ScaledTranslation

    drawing = axes.get_figure(root=True)
    assert drawing is not None
    # Below the numbers and the label of x.
    below = ScaledTranslation(0, -0.36 - (SLANT if _slanted(chart) else 0.0), drawing.dpi_scale_trans)
    axes.legend(
        [Line2D([], [], **_look(line)) for line in chart.named],
        [fit_name(line.name, 60) for line in chart.named],
        loc="upper left", bbox_to_anchor=(0.0, 0.0), bbox_transform=axes.transAxes + below,
        frameon=False, borderaxespad=0.0, borderpad=0.0, labelspacing=0.25, handlelength=2.2,
    )  # fmt: skip


def _draw_heat(axes: "Axes", chart: HeatMap) -> None:
    rows, columns = len(chart.rows), len(chart.columns)
    values = np.full((rows, columns), np.nan)
    for place, cell in chart.cells.items():
        values[place] = cell.value
    # Cells of few dots have no gaps: these would hide them.
    gaps: dict[str, Any] = {"edgecolors": "white", "linewidth": 0.75} if min(_cell(chart)) > 0.06 else {}
    axes.patch.set(**EMPTY)
    raster = rows * columns > RASTER
    axes.pcolormesh(np.ma.masked_invalid(values), rasterized=raster, **_steps(chart.scale), **gaps)
    if chart.zeros:
        x, y = [j + 0.5 for _, j in chart.zeros], [i + 0.5 for i, _ in chart.zeros]
        axes.plot(x, y, linestyle="none", marker="x", markersize=4, color=COLOURS["zero"], label="ΔW = 0")
    for (i, j), cell in chart.cells.items() if chart.written else ():
        strong = is_strong(level(cell.value, chart.scale.low, chart.scale.high, diverging=chart.scale.diverging))
        colour = "white" if strong else "black"
        axes.text(j + 0.5, i + 0.5, chart.scale.text(cell.value), color=colour, ha="center", va="center", fontsize=7)
    for edges, line in ((chart.column_edges, axes.axvline), (chart.row_edges, axes.axhline)):
        for edge in edges:
            line(edge, color="black", linewidth=0.7)
    axes.set(xlim=(0, columns), ylim=(rows, 0))  # row 0 is at the top
    axes.set_yticks([i + 0.5 for i, _ in chart.row_texts], [name for _, name in chart.row_texts])
    below = [name for _, name in chart.column_texts]
    upright: dict[str, Any] = {"rotation": 90} if max(map(len, below), default=0) > 3 else {}
    axes.set_xticks([j + 0.5 for j, _ in chart.column_texts], below, **upright)
    axes.tick_params(length=0, pad=3, labelcolor=COLOURS["quiet"])
    axes.spines[:].set_visible(False)
    axes.set_xlabel("\n".join(chart.lines_below), loc="left")
    for start, stop, name in chart.heads:
        middle: dict[str, Any] = {"transform": axes.get_xaxis_transform(), "ha": "center", "va": "bottom"}
        axes.text((start + stop) / 2, 1.01, name, color=COLOURS["quiet"], fontsize=7, **middle)
    if chart.tree:
        branches = axes.inset_axes((0.0, 1.01, 1.0, 0.36 / max(_cell(chart)[1] * rows, 0.36)))
        for branch in chart.tree:
            branches.plot(*zip(*branch, strict=True), color=COLOURS["quiet"], linewidth=0.75)
        branches.set(xlim=(0, columns), ylim=(0, 1))
        branches.set_axis_off()
        branches.set_label("<tree>")  # tells these axes from those of charts
    # The height is given, as matplotlib would place the title above whatever stands above the cells.
    axes.set_title(chart.title, y=1.0, pad=38 if chart.tree else 14 if chart.heads else 6)


def _draw_overlaps(axes: "Axes", chart: Overlaps) -> None:
    """Draw a map of φ(i, j), with i down and j across, both from 1."""
    from matplotlib.ticker import MaxNLocator

    phi = np.array(chart.phi)
    rows, columns = phi.shape
    # Cell (i, j) lies around the numbers i and j, so that ticks at whole numbers stand in its middle.
    extent = (0.5, columns + 0.5, rows + 0.5, 0.5)
    axes.imshow(phi, aspect="auto", extent=extent, **_steps(chart.scale))
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_locator(MaxNLocator(5, integer=True))
    axes.tick_params(length=0, pad=2, labelcolor=COLOURS["quiet"])
    axes.spines[:].set_visible(False)
    axes.set_title(fit_name(chart.title, 26), fontsize=7)
    axes.set_xlabel("\n".join(chart.notes), loc="left", **REMARK)


def _steps(scale: ColourScale) -> dict[str, Any]:
    """The colour steps of a scale and their edges, as matplotlib calls them.

    The first and the last step are centred on the ends of the scale.
    """
    from matplotlib.colors import BoundaryNorm, ListedColormap

    sign, count = ("v", 2 * SIDES + 1) if scale.diverging else ("s", STEPS)
    most = max(abs(scale.low), abs(scale.high)) or 1.0
    low, high = (-most, most) if scale.diverging else (scale.low, scale.high)
    high = high if high > low else low + 1
    edges = low + (high - low) * (np.arange(count + 1) - 0.5) / (count - 1)
    cmap = ListedColormap([COLOURS[f"{sign}{k}"] for k in range(count)])
    return {"cmap": cmap, "norm": BoundaryNorm(edges, count, clip=True)}
