"""Figures drawn by matplotlib, with the same limits, ticks, colours and layout as on a page.

Only this module and `loralens.charts.mpl_axes` import matplotlib, and only inside functions, as the import takes half a
second. Figures are made without pyplot, so that no window opens and no setting of the user changes.
"""

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import TYPE_CHECKING, Any, NamedTuple

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
    name_letters,
    names_below,
    rows_of,
)
from loralens.charts.mpl_axes import (
    COLOURS,
    PIXELS,
    POINT,
    SIZES,
    colour_scale,
    draw_heat,
    draw_legend,
    draw_lines,
    draw_overlaps,
)
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
LETTER = 7.4  # width in pixels of a letter of the title, by which long titles are shortened

STYLE: dict[Any, Any] = {
    "axes.grid": False,
    "axes.linewidth": 0.6,
    "axes.titlesize": 8,
    "figure.dpi": 150,
    "figure.facecolor": "white",
    "figure.titlesize": 10,
    "font.family": ["DejaVu Sans"],  # comes with matplotlib and has the letters σ, Δ, ᵢ and –
    "font.size": 8,
    "hatch.linewidth": 0.6,
    "svg.fonttype": "path",  # so that the picture is the same where the font is not installed
    "svg.hashsalt": "loralens",  # without it the ids of an SVG are random, and the same figure has other bytes
    "text.parse_math": False,  # names come from files and may hold a dollar sign
    "text.usetex": False,
    "xtick.labelsize": 7,
    "ytick.labelsize": 7,
}


def style_context() -> "AbstractContextManager[None]":
    """A context in which matplotlib draws in the style of loralens, whatever the settings of the user."""
    from matplotlib import rc_context

    return rc_context(STYLE)


@contextmanager
def ignore_missing_letters() -> Iterator[None]:
    """A context without warnings for letters that the font lacks, which are drawn as boxes."""
    import warnings

    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Glyph .* missing from")
        yield


def fix_layout(drawing: "Drawing") -> "Drawing":
    """Run the layout engine of a drawing once and switch it off, as every run would move things slightly."""
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
    from matplotlib.figure import Figure as Drawing

    rows = [_rows(band) for band in figure.bands]
    width = max([max(row.width for row in band) for band in rows if band], default=300) + 2 * MARGIN
    title = (
        [fit_name(line, int((width - MARGIN) / LETTER)) for line in figure.title.split("\n")] if figure.title else []
    )
    heights = [
        sum(row.height + GAP for row in placed) + BAND * bool(band.title)
        for band, placed in _bands_with_rows(figure, rows)
    ]
    height = 2 * MARGIN + TITLE * len(title) + sum(heights)
    with style_context(), ignore_missing_letters():
        sheet = _Sheet(Drawing(figsize=(width / PIXELS, height / PIXELS)), width, height)
        for k, line in enumerate(title):
            sheet.text(line, width / 2, MARGIN + TITLE * k, va="top", ha="center", fontsize=12 * POINT)
        top = MARGIN + TITLE * len(title) + 4.0
        for band, placed in _bands_with_rows(figure, rows):
            if band.title:
                sheet.text(band.title, MARGIN, top + 4, va="top", ha="left", fontsize=SIZES["head"], weight="bold")
                top += BAND
            for row in placed:
                for left, chart in row.charts:
                    _draw_chart(sheet, chart, MARGIN + left, top, alone=_is_alone(band))
                for left, key in row.keys:
                    _draw_key(sheet, key, MARGIN + left, top)
                top += row.height + GAP
        return sheet.figure


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
        """New axes at a place."""
        # Rounded, so that the last bits of a division do not change the bytes of a file.
        bottom = self.height - top - height
        across, up = (round(share, 6) for share in (left / self.width, bottom / self.height))
        return self.figure.add_axes((across, up, round(width / self.width, 6), round(height / self.height, 6)))

    def text(self, text: str, x: float, y: float, **look: Any) -> None:
        """Write text at a place."""
        self.figure.text(x / self.width, 1 - y / self.height, text, parse_math=False, **look)


def _bands_with_rows(figure: Figure, rows: Sequence[Sequence[_Row]]) -> list[tuple[Band, Sequence[_Row]]]:
    return list(zip(figure.bands, rows, strict=True))


def _is_alone(band: Band) -> bool:
    return len(band.charts) == 1


def _rows(band: Band) -> list[_Row]:
    """The charts of a band in rows, each as full as the width allows, and its colour keys below."""
    boxes = [None if chart is None else chart_box(chart, alone=_is_alone(band)) for chart in band.charts]
    widest = max([area.width for area in boxes if area], default=0.0)
    rows: list[_Row] = []
    if boxes:
        across, down = rows_of(widest + GAP, len(boxes), ROOM, band.columns)
        for k in range(down):
            part = list(zip(band.charts, boxes, strict=True))[k * across : (k + 1) * across]
            charts = [((widest + GAP) * i, chart) for i, (chart, _) in enumerate(part) if chart is not None]
            height = max([area.height for _, area in part if area], default=0.0)
            rows.append(_Row((widest + GAP) * min(across, len(boxes)) - GAP, height, charts))
    if band.keys:
        sizes, left, keys = [key_size(key) for key in band.keys], 0.0, []
        for key, (width, _) in zip(band.keys, sizes, strict=True):
            keys.append((left, key))
            left += width + GAP
        rows.append(_Row(left, max(height for _, height in sizes), keys=keys))
    return rows


def _draw_chart(sheet: _Sheet, chart: Chart, left: float, top: float, *, alone: bool) -> None:
    room = chart_box(chart, alone=alone)
    if isinstance(chart, HeatMap) and not (chart.rows and chart.columns):
        return
    axes = sheet.axes(left + room.left, top + room.top, room.across, room.down)
    if isinstance(chart, LineChart):
        draw_lines(axes, chart)
        if chart.named:
            corner = (left + 46) / sheet.width, 1 - (top + room.height + 2) / sheet.height
            draw_legend(
                axes,
                chart,
                name_letters(room),
                loc="lower left",
                bbox_to_anchor=corner,
                bbox_transform=sheet.figure.transFigure,
            )
    elif isinstance(chart, HeatMap):
        draw_heat(axes, chart)
        _draw_surroundings(sheet, chart, room, left, top)
        _draw_colour_bar(sheet, chart.scale, left + room.left, top + room.height - 48)
    else:
        draw_overlaps(axes, chart)
        for k, note in enumerate(chart.notes):
            y = top + room.top + room.down + 12 + NOTE * (k + 1)
            sheet.text(note, left + room.left, y, va="baseline", fontsize=SIZES["small"], color=COLOURS["quiet"])


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
        if isinstance(chart, LineChart):
            draw_lines(axes, chart)
            if chart.named:
                draw_legend(axes, chart)
        else:
            if isinstance(chart, HeatMap):
                draw_heat(axes, chart)
                axes.set_xlabel(chart.across, parse_math=False)
            else:
                draw_overlaps(axes, chart)
                axes.set_xlabel("\n".join(chart.notes), parse_math=False)
            bar = drawing.colorbar(colour_scale(chart.scale), ax=axes, label=chart.scale.label)
            bar.ax.yaxis.label.set_parse_math(False)
            bar.set_ticks([value for value, _ in chart.scale.marks], labels=[text for _, text in chart.scale.marks])
            for value in chart.scale.levels:
                bar.ax.axhline(value, color=COLOURS["chance"], linewidth=1.5)
    if figure.title and not chart.title:
        axes.set_title(figure.title, parse_math=False)
    return drawing


def _draw_surroundings(sheet: _Sheet, chart: HeatMap, room: Box, left: float, top: float) -> None:
    """Draw what stands above and below a map: title, names of stacks, tree, and notes."""
    axes = sheet.figure.axes[-1]
    wide, _ = cell_size(chart)
    title, tree, _ = above_cells(chart)
    place: dict[str, Any] = {"x": -room.left / room.across, "y": 1 + (room.top - 13) / room.down, "pad": 0.0}
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


def _draw_key(sheet: _Sheet, key: Key, left: float, top: float) -> None:
    if isinstance(key, ColourScale):
        _draw_colour_bar(sheet, key, left + 8, top)
        return
    sheet.text(key.label, left + 8, top + 11, va="baseline", fontsize=SIZES["label"], color=COLOURS["quiet"])
    if is_list(key):
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


def _draw_colour_bar(sheet: _Sheet, scale: ColourScale, left: float, top: float) -> None:
    """Draw a colour bar with its label, its numbers and the level of chance."""
    axes = sheet.axes(left, top + 14, BAR, BAR_HIGH)
    sheet.figure.colorbar(colour_scale(scale), cax=axes, orientation="horizontal", spacing="proportional")
    axes.set_label("<colorbar>")
    high = scale.high if scale.high > scale.low else scale.low + 1
    axes.set_xlim(scale.low, high)
    axes.set_xticks([], minor=True)
    axes.set_xticks([value for value, _ in scale.marks], [text for _, text in scale.marks], parse_math=False)
    axes.tick_params(length=0, pad=2, labelsize=SIZES["num"], labelcolor=COLOURS["quiet"])
    labels = axes.get_xticklabels()
    for label, (value, _) in zip(labels, scale.marks, strict=True):
        share = (value - scale.low) / (high - scale.low)  # numbers near an end are aligned so that they stay on the bar
        label.set_horizontalalignment("left" if share < 0.2 else "right" if share > 0.8 else "center")
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
