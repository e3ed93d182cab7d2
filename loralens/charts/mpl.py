"""Figures drawn by matplotlib, which lays them out itself; colours are those of light pages.

matplotlib takes half a second to import, so functions import this module. Figures are made without pyplot, so that no
window opens and no setting of the user changes.
"""

import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from io import BytesIO
from typing import Any

import numpy as np
from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.colors import ListedColormap, Normalize
from matplotlib.figure import Figure as MatplotlibFigure
from matplotlib.figure import SubFigure
from matplotlib.text import Text
from matplotlib.ticker import MaxNLocator, NullFormatter
from matplotlib.transforms import ScaledTranslation

from loralens.charts.module_grid import fit_name
from loralens.charts.palette import BLOCKS, STEPS, colours, is_strong, level
from loralens.charts.spec import Band, Chart, ColourScale, Figure, HeatMap, Key, LineChart
from loralens.errors import OptionError

STYLE: dict[Any, Any] = {
    "axes.grid": False,
    "axes.linewidth": 0.6,
    "axes.labelsize": 8,
    "axes.titlelocation": "left",
    "axes.titlesize": 8,
    "axes.titleweight": "bold",
    "figure.dpi": 150,
    "figure.facecolor": "white",
    "figure.titlesize": 9,
    "font.family": ["DejaVu Sans"],  # comes with matplotlib and has the letters σ, Δ, ᵢ and –
    "font.size": 8,
    "hatch.linewidth": 0.6,
    "legend.fontsize": 7.5,
    "svg.fonttype": "path",  # so that the picture is the same where the font is not installed
    "svg.hashsalt": "loralens",  # without it the ids of an SVG are random, and the same figure has other bytes
    "text.parse_math": False,  # names come from files and may hold a dollar sign
    "text.usetex": False,
    "xtick.labelsize": 7,
    "ytick.labelsize": 7,
}
COLOURS = colours("light")  # a picture has no theme to follow, and is put on white paper and slides
QUIET = COLOURS["quiet"]
REMARK: dict[str, Any] = {"fontsize": 6.5, "color": QUIET}  # remarks, and names of points and levels
RASTER = 4096  # the number of cells from which a map in .svg or .pdf is a bitmap: rectangles would make a large file
# All sizes are in inches: up to WIDTH charts stand side by side, which are four panels of lines.
WIDTH, PANEL, ALONE, SMALL = 11.2, (2.75, 2.0), (5.0, 2.9), (2.0, 1.7)
CELL, WRITTEN = (0.19, 0.19), (0.42, 0.28)  # a cell, and one that shows its value
NAME = 0.08  # of the height of a chart: the name of a level
LINE, BAR = 0.16, 0.6  # a line of text, and a colour bar with its label and numbers
BAR_SIZE = (1.7, 0.09)


@contextmanager
def style_context() -> Iterator[None]:
    """Draw in the style of loralens, whatever the settings of the user; letters that the font lacks become boxes."""
    with rc_context(STYLE), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Glyph .* missing from")
        yield


class Drawing(MatplotlibFigure):
    """A figure whose value at the end of a cell of a notebook is its picture, also without ``%matplotlib inline``."""

    def _repr_png_(self) -> tuple[bytes, dict[str, int]]:
        stream = BytesIO()
        with style_context():
            self.savefig(stream, format="png", dpi=self.dpi)
        # The size on the screen in CSS pixels. The picture itself has more dots, for screens of high resolution.
        width, height = (round(96 * inches) for inches in self.get_size_inches())
        return stream.getvalue(), {"width": width, "height": height}


def draw_figure(figure: Figure, ax: Axes | None = None) -> MatplotlibFigure:
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
    # Each band has a part of the figure for its charts, and one for its title and for the keys that its charts share.
    bands = [band for band in figure.bands if band.title or any(band.charts)]
    shapes = [_shape(band) for band in bands]
    heights = [sum(down) + LINE * bool(band.title) for band, (_, down) in zip(bands, shapes, strict=True)]
    width = max([4.0, *(sum(across) for across, _ in shapes)])
    with style_context():
        height = max(sum(heights), 1.0) + LINE * len(figure.title.splitlines())
        drawing = Drawing(figsize=(width, height), layout="constrained")
        if figure.title:
            # A line of 9 points has some 13 letters for every inch.
            drawing.suptitle("\n".join(fit_name(line, int(13 * width)) for line in figure.title.splitlines()))
        parts = drawing.subfigures(max(len(bands), 1), 1, height_ratios=heights or None, squeeze=False)
        for band, part, (across, down) in zip(bands, parts[:, 0], shapes, strict=False):
            _draw_band(band, part, across, down, spare=width - sum(across))
    return drawing


def fix_layout(drawing: MatplotlibFigure) -> MatplotlibFigure:
    """Run the layout engine of a drawing once and switch it off, as every further run would move things slightly.

    The last digits of its places depend on the order in which the solver meets them, so places are rounded.
    """
    engine = drawing.get_layout_engine()
    if engine is not None:
        with style_context():
            engine.execute(drawing)
        drawing.set_layout_engine("none")
        for part in drawing.subfigs:
            part.bbox_relative.set_points(np.round(part.bbox_relative.get_points(), 4))
        for axes in drawing.axes:
            left, bottom, width, height = (round(float(place), 4) for place in axes.get_position(original=True).bounds)
            axes.set_position((left, bottom, width, height))
    return drawing


def resize_drawing(drawing: MatplotlibFigure, size: tuple[float, float]) -> None:
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
    """The width and the height of a chart with its texts."""
    if chart is None:
        return 0.0, 0.0
    if isinstance(chart, LineChart):
        wide, high = ALONE if alone else PANEL
        return wide, high + LINE * len(chart.named)
    notes = LINE * (chart.note.count("\n") + 1)
    if chart.small:
        return SMALL[0], SMALL[1] + notes
    wide, high = _cell(chart)
    rows, columns = (max(map(len, labels), default=0) for labels in (chart.rows, chart.columns))
    texts = 0.075 * max(map(len, (chart.title, chart.note, _key_label(chart.scale))))
    across = max(wide * len(chart.columns) + 0.08 * rows + 0.3, texts, 2.6)
    return across, high * len(chart.rows) + 0.075 * columns + notes + LINE * bool(chart.title) + 0.15 + BAR


def _cell(chart: HeatMap) -> tuple[float, float]:
    wide, high = WRITTEN if chart.written else CELL
    rows, columns = (chart.room / 96 / max(count, 1) for count in chart.values.shape)  # an inch has 96 CSS pixels
    # Below 0.03 inches neighbours can no longer be told apart.
    return max(0.03, min(wide, columns)), max(0.03, min(high, rows))


def _shape(band: Band) -> tuple[list[float], list[float]]:
    """The widths of the columns and the heights of the rows of a band."""
    sizes = [_size(chart, alone=len(band.charts) == 1) for chart in band.charts] or [(4.0, 0.1)]
    wide = max(width for width, _ in sizes)
    across = band.columns or max(1, min(len(sizes), int(WIDTH / wide)))
    heights = [max(height for _, height in sizes[start : start + across]) for start in range(0, len(sizes), across)]
    heights[-1] += BAR if band.keys else 0.0
    return [wide] * across, heights


def _draw_band(band: Band, part: SubFigure, across: Sequence[float], down: Sequence[float], *, spare: float) -> None:
    """Draw a band whose columns and rows are so wide and high; ``spare`` inches of width are left."""
    if band.title:
        part.suptitle(band.title, x=0.01, ha="left", weight="bold", fontsize=8)
    if not band.charts:
        return
    # An empty column at the end keeps charts from growing to the width of the figure.
    grid = part.add_gridspec(len(down), len(across) + 1, width_ratios=[*across, max(spare, 1e-3)], height_ratios=down)
    panels = []
    for k, chart in enumerate(band.charts):
        if chart is None or (isinstance(chart, HeatMap) and not chart.values.size):
            continue
        axes = part.add_subplot(grid[divmod(k, len(across))])
        panels.append(axes)
        draw_chart(axes, chart)
        if isinstance(chart, HeatMap) and not chart.small:
            _draw_key(part, chart.scale, [axes], _cell(chart)[0] * len(chart.columns))
    for key in band.keys if panels else ():
        _draw_key(part, key, panels, sum(across))


def _draw_key(part: SubFigure | MatplotlibFigure, key: Key, panels: Sequence[Axes], inches: float) -> None:
    """Draw a colour bar below the charts that share it, which are together so many inches wide."""
    if isinstance(key, ColourScale):
        colours, ticks, levels = _colours(key), {value: key.words(value) for value in (key.low, key.high)}, key.levels
    else:
        blocks = ListedColormap([COLOURS[f"b{k}"] for k in range(BLOCKS)])
        colours, ticks, levels = {"cmap": blocks}, {0.0: key.first, 1.0: key.last}, []
    share = min(1.0, BAR_SIZE[0] / inches)
    place: dict[str, Any] = {"location": "bottom", "anchor": (0.0, 1.0), "pad": 0.03, "shrink": share}
    bar = part.colorbar(ScalarMappable(**colours), ax=panels, aspect=inches * share / BAR_SIZE[1], **place)
    bar.minorticks_off()
    bar.set_ticks(list(ticks), labels=list(ticks.values()))
    for label, side in zip((bar.ax.get_xticklabels()[0], bar.ax.get_xticklabels()[-1]), ("left", "right"), strict=True):
        label.set(ha=side)
    bar.ax.tick_params(length=2, pad=2, labelcolor=QUIET)
    bar.outline.set_visible(False)
    for value in levels:
        # The mark is not clipped, so that it reaches beyond the bar and is visible on any colour.
        bar.ax.axvline(value, color=COLOURS["chance"], linewidth=1.5, clip_on=False)
    bar.set_label(_key_label(key), color=QUIET, loc="left")


def _key_label(key: Key) -> str:
    marked = isinstance(key, ColourScale) and key.chance_text
    return f"{key.label} (mark: chance, {marked})" if marked else key.label


def _draw_into(figure: Figure, axes: Axes) -> MatplotlibFigure:
    """Draw the one chart of a figure into the axes of the caller."""
    if len(figure.charts) != 1:
        raise OptionError(
            f"this figure has {len(figure.charts)} panels, and ax can hold one",
            fix="leave out ax, and use the figure returned",
        )
    (chart,) = figure.charts
    drawing = axes.get_figure(root=True)
    assert drawing is not None
    with warnings.catch_warnings(), rc_context({"text.parse_math": False}):
        warnings.filterwarnings("ignore", message="Glyph .* missing from")
        draw_chart(axes, chart)
        if isinstance(chart, HeatMap):
            _draw_key(drawing, chart.scale, [axes], BAR_SIZE[0])
        if figure.title and not chart.title:
            axes.set_title(figure.title)
        # The titles and labels of these axes were made before, with the settings of the user.
        axes.get_xticklabels(), axes.get_yticklabels()
        for text in axes.findobj(Text):
            text.set_parse_math(False)
    return drawing


def draw_chart(axes: Axes, chart: Chart) -> None:
    """Draw a chart of any kind into axes, without its colour bar."""
    axes.tick_params(labelcolor=QUIET, length=2.5 if isinstance(chart, LineChart) else 0, pad=2)
    if isinstance(chart, LineChart):
        _draw_lines(axes, chart)
    else:
        _draw_map(axes, chart)


def _draw_lines(axes: Axes, chart: LineChart) -> None:
    axes.set_yscale("log" if chart.log else "linear")
    axes.set(xlim=chart.x_limits, ylim=chart.y_limits, xlabel=chart.x_label, ylabel=chart.y_label)
    axes.set_title(fit_name(chart.title, 30))
    if chart.area:
        edges: Any = zip(*chart.area, strict=True)
        axes.fill_between(*edges, color=COLOURS["area"], linewidth=0, zorder=0.5)
    for line in chart.lines:
        points = chart.points(line)
        # Lines are not clipped, so that points on the edge of the axes are drawn whole. A star marks the point of
        # interest, which no later line may cover.
        star = line.marker == "*"
        axes.plot(
            [x for x, _, _ in points], [y for _, y, _ in points], label=fit_name(line.name, 60), clip_on=False,
            color=COLOURS[line.ink], linewidth=1.0, linestyle=line.style, marker=line.marker,
            markersize=8 if star else 3.4, zorder=2.5 if star else 2,
        )  # fmt: skip
        for x, y, text in points if any(line.labels) else ():
            axes.annotate(text, (x, y), xytext=(3, 3), textcoords="offset points", **REMARK)
    for value in chart.levels.values():
        axes.axhline(value, color=QUIET, linewidth=0.6, linestyle=":", zorder=1)
    to_height = axes.transScale + axes.transLimits
    heights = {value: to_height.transform((0.0, value))[1] for value in sorted(chart.levels.values())}
    for k, (name, own) in enumerate(chart.levels.items()):
        # Names of levels that are close to each other stand side by side above the highest, so that no line cuts them.
        base = own
        for value, height in heights.items():
            base = value if heights[base] < height < heights[base] + NAME else base
        place: dict[str, Any] = {"xycoords": axes.get_yaxis_transform(), "textcoords": "offset points"}
        axes.annotate(name, (0.02 + 0.3 * (k % 3), base), xytext=(0, 1), **place, **REMARK)
    if chart.remark:
        axes.text(0.03, 0.04, chart.remark, transform=axes.transAxes, va="bottom", zorder=4, **REMARK)
    if chart.x_ticks:
        axes.set_xticks([value for value, _ in chart.x_ticks], [label for _, label in chart.x_ticks])
    elif chart.counted:
        axes.xaxis.set_major_locator(MaxNLocator(6, integer=True))
    if chart.log:
        axes.yaxis.set_major_formatter("{x:g}")
        axes.yaxis.set_minor_formatter(NullFormatter())
    axes.grid(axis="y", color="#e1e5e8", linewidth=0.6)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    if chart.named:
        # Below the numbers and the label of x.
        below = ScaledTranslation(0, -0.36, axes.get_figure(root=True).dpi_scale_trans)  # type: ignore[union-attr]
        axes.legend(
            loc="upper left", bbox_to_anchor=(0.0, 0.0), bbox_transform=axes.transAxes + below, frameon=False,
            borderaxespad=0.0, borderpad=0.0, labelspacing=0.25, handlelength=2.2,
        )  # fmt: skip


def _draw_map(axes: Axes, chart: HeatMap) -> None:
    rows, columns = chart.values.shape
    # Cells of few dots have no gaps: these would hide them.
    wide = not chart.small and min(_cell(chart)) > 0.06
    gaps: dict[str, Any] = {"edgecolors": "white", "linewidth": 0.75} if wide else {}
    # A cell without a value is dotted, so that it is not taken for a small value.
    axes.patch.set(facecolor="white", hatch="....", edgecolor="0.8", linewidth=0)
    values = np.ma.masked_invalid(chart.values)
    axes.pcolormesh(values, rasterized=chart.small or rows * columns > RASTER, **_colours(chart.scale), **gaps)
    middle: dict[str, Any] = {"ha": "center", "va": "center", "fontsize": 7}
    for i, j in chart.zeros:
        axes.text(j + 0.5, i + 0.5, "×", color=COLOURS["chance"], **middle)
    for (i, j), value in np.ndenumerate(chart.values) if chart.written else ():
        if np.isfinite(value):
            strong = is_strong(level(chart.scale.share(value), diverging=chart.scale.diverging))
            axes.text(j + 0.5, i + 0.5, chart.scale.words(value), color="white" if strong else "black", **middle)
    for edges, draw in ((chart.column_edges, axes.axvline), (chart.row_edges, axes.axhline)):
        for edge in edges:
            draw(edge, color="black", linewidth=0.7)
    axes.set(xlim=(0, columns), ylim=(rows, 0))  # row 0 is at the top
    axes.set_yticks(*_ticks(chart.rows))
    axes.set_xticks(*_ticks(chart.columns), rotation=90 if max(map(len, chart.columns), default=0) > 3 else 0)
    axes.spines[:].set_visible(False)
    axes.set_title(fit_name(chart.title, 26) if chart.small else chart.title)
    axes.set_xlabel(chart.note, loc="left", **(REMARK if chart.small else {}))


def _ticks(labels: Sequence[str]) -> tuple[list[float], list[str]]:
    """The middles of the labelled cells, and their labels."""
    return [i + 0.5 for i, label in enumerate(labels) if label], [label for label in labels if label]


def _colours(scale: ColourScale) -> dict[str, Any]:
    """The colours of a scale and its ends, as matplotlib calls them."""
    sign = "v" if scale.diverging else "s"
    high = scale.high if scale.high > scale.low else scale.low + 1
    cmap = ListedColormap([COLOURS[f"{sign}{k}"] for k in range(STEPS)])
    return {"cmap": cmap, "norm": Normalize(scale.low, high, clip=True)}
