"""Figures drawn by matplotlib, with the same limits, ticks, colours and layout as on a page.

This module and `loralens.charts.mpl_axes` import matplotlib inside functions only, as the import takes half a second.
`loralens.charts.drawing` imports it at its top, and is itself imported inside a function. Figures are made without
pyplot, so that no window opens and no setting of the user changes.
"""

from collections.abc import Mapping, Sequence
from itertools import accumulate
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import numpy as np

from loralens.charts import layout
from loralens.charts.mpl_axes import COLOURS, PIXELS, POINT, SIZES, colour_scale, draw_chart, draw_legend
from loralens.charts.mpl_style import ignore_missing_letters, style_context
from loralens.charts.names import fit_name
from loralens.charts.palette import BLOCKS
from loralens.charts.spec import Band, Chart, ColourScale, Figure, HeatMap, Key, LineChart
from loralens.errors import OptionError

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure as Drawing

ROOM = 1040  # width in pixels up to which charts stand side by side: four panels of lines
GAP, MARGIN = 14, 12  # pixels between charts, and around them
TITLE, BAND = 17, 22  # height in pixels of a line of the title, and of the title of a band
WIDENED = 520  # largest width in pixels to which a figure is widened for its title
LETTER = 7.4  # width in pixels of a letter of the title, by which long titles are shortened
# matplotlib's words for the anchors of `loralens.charts.layout.bar_anchor`.
ALIGN: Mapping[str, Literal["left", "center", "right"]] = {"": "left", "mid": "center", "end": "right"}


def fix_layout(drawing: "Drawing") -> "Drawing":
    """Run the layout engine of a drawing once and switch it off, as every further run would move things slightly."""
    engine = drawing.get_layout_engine()
    if engine is not None:
        with style_context(), ignore_missing_letters():
            engine.execute(drawing)
    drawing.set_layout_engine("none")
    return drawing


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

    bands = [(band, _rows(band)) for band in figure.bands]
    rows = [row for _, placed in bands for row in placed]
    lines = figure.title.split("\n") if figure.title else []
    # A narrow figure is widened for its title, whose middle would else be left out.
    title = min(LETTER * max(map(len, lines), default=0), WIDENED)
    width = max([title, *(row.width for row in rows)] if rows else [title, 300.0]) + 2 * MARGIN
    titles = TITLE * len(lines) + BAND * sum(bool(band.title) for band in figure.bands)
    height = 2 * MARGIN + titles + sum(row.height + GAP for row in rows)
    with style_context(), ignore_missing_letters():
        sheet = _Sheet(Drawing(figsize=(width / PIXELS, height / PIXELS)), width, height)
        for k, line in enumerate(lines):
            text = fit_name(line, int((width - MARGIN) / LETTER))
            sheet.text(text, width / 2, MARGIN + TITLE * k, va="top", ha="center", fontsize=12 * POINT)
        top = MARGIN + TITLE * len(lines) + 4.0
        for band, placed in bands:
            if band.title:
                sheet.text(band.title, MARGIN, top + 4, va="top", ha="left", fontsize=SIZES["head"], weight="bold")
                top += BAND
            for row in placed:
                for left, chart in row.charts:
                    _draw_chart(sheet, chart, MARGIN + left, top, alone=len(band.charts) == 1)
                for left, key in row.keys:
                    _draw_key(sheet, key, MARGIN + left, top)
                top += row.height + GAP
        return sheet.figure


def resize_drawing(drawing: "Drawing", size: tuple[float, float]) -> None:
    """Give a drawing another width and height in inches.

    Charts fill the new size. In a smaller one all texts and lines shrink with the side that shrinks more, so that texts
    keep their distance; in a larger one they keep their size.
    """
    factor = min([new / old for new, old in zip(size, drawing.get_size_inches(), strict=True)] + [1.0])
    drawing.set_size_inches(*size)
    if factor == 1.0:
        return
    for artist in drawing.findobj():
        for name in ("fontsize", "linewidth", "markersize"):
            read, write = getattr(artist, f"get_{name}", None), getattr(artist, f"set_{name}", None)
            # Collections have a width for each of their lines.
            if read and write:
                width = read()
                write(width * factor if np.isscalar(width) else np.asarray(width) * factor)


class _Row(NamedTuple):
    """Charts, or colour keys, that stand side by side: the left end of each, and the size of the row."""

    width: float
    height: float
    charts: Sequence[tuple[float, Chart]] = ()
    keys: Sequence[tuple[float, Key]] = ()


class _Sheet(NamedTuple):
    """A figure in which charts are placed by pixels from the upper left corner."""

    figure: "Drawing"
    width: float
    height: float

    def axes(self, left: float, top: float, width: float, height: float) -> "Axes":
        """Add axes at a place."""
        # The values are rounded, so that the last bits of a division do not change the bytes of a file.
        bottom = self.height - top - height
        across, up = (round(share, 6) for share in (left / self.width, bottom / self.height))
        return self.figure.add_axes((across, up, round(width / self.width, 6), round(height / self.height, 6)))

    def text(self, text: str, x: float, y: float, **look: Any) -> None:
        """Write text at a place."""
        self.figure.text(x / self.width, 1 - y / self.height, text, parse_math=False, **look)

    def label(self, text: str, x: float, y: float, size: str = "num", align: str = "left") -> None:
        """Write a number or a label on a line at a place, in the quiet colour of such texts."""
        self.text(text, x, y, va="baseline", ha=align, fontsize=SIZES[size], color=COLOURS["quiet"])


def _rows(band: Band) -> list[_Row]:
    """The charts of a band in rows, each as full as the width allows, and its colour keys below."""
    boxes = [None if chart is None else layout.chart_box(chart, alone=len(band.charts) == 1) for chart in band.charts]
    # All places are as wide as the widest chart, so that charts of one kind stand below each other.
    step = max([room.width for room in boxes if room], default=0.0) + GAP
    across = band.columns or max(1, min(len(boxes), int(ROOM / step)))
    rows = []
    for start in range(0, len(boxes), across):
        part = slice(start, start + across)
        height = max([room.height for room in boxes[part] if room], default=0.0)
        charts = [(step * i, chart) for i, chart in enumerate(band.charts[part]) if chart is not None]
        rows.append(_Row(step * min(across, len(boxes)) - GAP, height, charts))
    if band.keys:
        widths, heights = zip(*map(layout.key_size, band.keys), strict=True)
        *lefts, width = accumulate((key_width + GAP for key_width in widths), initial=0.0)
        rows.append(_Row(width, max(heights), keys=list(zip(lefts, band.keys, strict=True))))
    return rows


def _draw_chart(sheet: _Sheet, chart: Chart, left: float, top: float, *, alone: bool) -> None:
    room = layout.chart_box(chart, alone=alone)
    if isinstance(chart, HeatMap) and not (chart.rows and chart.columns):
        return  # there is nothing to draw, and places are shares of the width of the cells
    axes = sheet.axes(left + room.left, top + room.top, room.across, room.down)
    draw_chart(axes, chart)
    if isinstance(chart, LineChart):
        corner = (left + 46) / sheet.width, 1 - (top + room.height + 2) / sheet.height
        place = {"loc": "lower left", "bbox_to_anchor": corner, "bbox_transform": sheet.figure.transFigure}
        draw_legend(axes, chart, layout.name_letters(room), **place)
    elif isinstance(chart, HeatMap):
        _draw_surroundings(sheet, chart, room, left, top)
        _draw_colour_bar(sheet, chart.scale, left + room.left, top + room.height - layout.BAR_ROOM)
    else:
        below = top + room.top + room.down + 12
        for k, note in enumerate(chart.notes, start=1):
            sheet.label(note, left + room.left, below + layout.NOTE * k, "small")


def _draw_into(figure: Figure, axes: "Axes") -> "Drawing":
    """Draw the one chart of a figure into the axes of the caller."""
    charts = figure.charts
    if len(charts) != 1:
        raise OptionError(
            f"this figure has {len(charts)} panels, and ax can hold one",
            fix="leave out ax, and use the figure returned",
        )
    (chart,) = charts
    drawing = axes.get_figure(root=True)
    assert drawing is not None
    with ignore_missing_letters():
        draw_chart(axes, chart)
        if isinstance(chart, LineChart):
            draw_legend(axes, chart)
        else:
            label = chart.across if isinstance(chart, HeatMap) else "\n".join(chart.notes)
            axes.set_xlabel(label, parse_math=False)
            bar = drawing.colorbar(colour_scale(chart.scale), ax=axes, label=chart.scale.label)
            bar.ax.yaxis.label.set_parse_math(False)
            bar.set_ticks([value for value, _ in chart.scale.marks], labels=[text for _, text in chart.scale.marks])
            for value in chart.scale.levels:
                bar.ax.axhline(value, color=COLOURS["chance"], linewidth=1.5)
    if figure.title and not chart.title:
        axes.set_title(figure.title, parse_math=False)
    return drawing


def _draw_surroundings(sheet: _Sheet, chart: HeatMap, room: layout.Box, left: float, top: float) -> None:
    """Draw what stands above and below a map: title, names of stacks, tree, and notes."""
    axes = sheet.figure.axes[-1]
    wide, _ = layout.cell_size(chart)
    title, tree, _ = layout.above_cells(chart)
    # The title stands at the left of the row names as on the page, and not at the left of the cells.
    place: dict[str, Any] = {"x": -room.left / room.across, "y": 1 + (room.top - 13) / room.down, "pad": 0.0}
    axes.set_title(chart.title, loc="left", parse_math=False, fontsize=SIZES["head"], weight="bold", **place)
    for start, stop, name in chart.heads:
        sheet.label(name, left + room.left + wide * (start + stop) / 2, top + room.top - 4, align="center")
    below = top + room.top + room.down + layout.names_below(chart) + 10
    for k, line in enumerate(chart.lines_below):
        sheet.label(line, left + room.left, below + layout.LABEL * k, "label")
    if tree:
        branches = sheet.axes(left + room.left, top + title + 4, room.across, layout.TREE - 8)
        for branch in chart.tree:
            branches.plot(*zip(*branch, strict=True), color=COLOURS["quiet"], linewidth=POINT)
        branches.set(xlim=(0, len(chart.columns)), ylim=(0, 1))
        branches.set_axis_off()
        branches.set_label("<tree>")  # tells these axes from those of charts


def _draw_key(sheet: _Sheet, key: Key, left: float, top: float) -> None:
    if isinstance(key, ColourScale):
        _draw_colour_bar(sheet, key, left + 8, top)
        return
    sheet.label(key.label, left + 8, top + 11, "label")
    names = [name for _, name in key.ticks]
    if layout.is_list(key):
        axes = sheet.axes(left + 8, top + 18, 22, layout.LINE * len(key.ticks))
        for k, (place, _) in enumerate(key.ticks):
            axes.barh(k, 1, 10 / layout.LINE, color=COLOURS[f"b{round((BLOCKS - 1) * place)}"])
        axes.set(xlim=(0, 1), ylim=(len(key.ticks) - 0.5, -0.5), xticks=[])
        axes.yaxis.tick_right()
        axes.set_yticks(range(len(key.ticks)), names, parse_math=False)
    else:
        from matplotlib.colors import ListedColormap

        axes = sheet.axes(left + 8, top + 16, layout.BAR, layout.BAR_HIGH)
        axes.imshow([range(BLOCKS)], cmap=ListedColormap([COLOURS[f"b{k}"] for k in range(BLOCKS)]), aspect="auto")
        axes.set_xticks([(BLOCKS - 1) * place for place, _ in key.ticks], names, parse_math=False)
        axes.set_yticks([])
    axes.tick_params(length=0, pad=3, labelsize=SIZES["num"], labelcolor=COLOURS["quiet"])
    axes.spines[:].set_visible(False)
    axes.set_label("<key>")


def _draw_colour_bar(sheet: _Sheet, scale: ColourScale, left: float, top: float) -> None:
    """Draw a colour bar with its label, its numbers and the level of chance."""
    axes = sheet.axes(left, top + layout.BAR_TOP, layout.BAR, layout.BAR_HIGH)
    sheet.figure.colorbar(colour_scale(scale), cax=axes, orientation="horizontal", spacing="proportional")
    axes.set_label("<colorbar>")
    axes.set_xlim(scale.low, scale.high if scale.high > scale.low else scale.low + 1)
    axes.set_xticks([], minor=True)
    axes.set_xticks([value for value, _ in scale.marks], [text for _, text in scale.marks], parse_math=False)
    axes.tick_params(length=0, pad=3, labelsize=SIZES["num"], labelcolor=COLOURS["quiet"])
    for label, (value, _) in zip(axes.get_xticklabels(), scale.marks, strict=True):
        label.set_horizontalalignment(ALIGN[layout.bar_anchor(scale.share(value))])
    axes.spines[:].set_visible(False)
    axes.set_title(scale.label, loc="left", parse_math=False, fontsize=SIZES["label"], color=COLOURS["quiet"], pad=3)
    for value in scale.levels:
        # The mark is not clipped, so that it reaches beyond the bar and is visible on any colour.
        axes.axvline(value, color=COLOURS["chance"], linewidth=2 * POINT, clip_on=False)
    for value in scale.levels[:1]:
        share = scale.share(value)
        align = ALIGN[layout.bar_anchor(share)]
        sheet.label(f"chance {scale.chance_text}", left + layout.BAR * share, top + layout.BAR_CHANCE, align=align)
