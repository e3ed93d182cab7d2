"""Charts drawn by matplotlib, with the limits, ticks, colours and places that they have on a page.

Nothing else in the package imports matplotlib than this module and `loralens.charts.mpl_axes`, inside the functions
that draw: it takes half a second. Figures are made without pyplot, so no window and no state of the user's is touched.
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
    box,
    cell_size,
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
from loralens.charts.names import fit
from loralens.charts.palette import BLOCKS
from loralens.charts.spec import Band, Chart, Figure, Heat, Key, Lines, Scale
from loralens.errors import OptionError

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure as Drawing

ROOM = 1040  # pixels up to which charts stand side by side
GAP, MARGIN = 14, 12  # pixels between charts, and around them
TITLE, BAND = 17, 22  # pixels of a line of the title, and of the title of a band
LETTER = 7.4  # pixels of a letter of a title

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
        across, up = (round(share, 6) for share in (left / self.width, bottom / self.height))
        return self.figure.add_axes((across, up, round(width / self.width, 6), round(height / self.height, 6)))

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
    rows: list[_Row] = []
    if boxes:
        across, down = rows_of(widest + GAP, len(boxes), ROOM, band.columns)
        for k in range(down):
            part = list(zip(band.charts, boxes, strict=True))[k * across : (k + 1) * across]
            charts = [((widest + GAP) * i, chart) for i, (chart, _) in enumerate(part) if chart is not None]
            height = max([one.height for _, one in part if one], default=0.0)
            rows.append(_Row((widest + GAP) * min(across, len(boxes)) - GAP, height, charts))
    if band.keys:
        sizes, left, keys = [key_size(key) for key in band.keys], 0.0, []
        for key, (width, _) in zip(band.keys, sizes, strict=True):
            keys.append((left, key))
            left += width + GAP
        rows.append(_Row(left, max(height for _, height in sizes), keys=keys))
    return rows


def _chart(sheet: _Sheet, chart: Chart, left: float, top: float, *, alone: bool) -> None:
    room = box(chart, alone=alone)
    if isinstance(chart, Heat) and not (chart.rows and chart.columns):
        return
    axes = sheet.axes(left + room.left, top + room.top, room.across, room.down)
    if isinstance(chart, Lines):
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
    elif isinstance(chart, Heat):
        draw_heat(axes, chart)
        _around(sheet, chart, room, left, top)
        _bar(sheet, chart.scale, left + room.left, top + room.height - 48)
    else:
        draw_overlaps(axes, chart)
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
            draw_lines(axes, chart)
            if chart.named:
                draw_legend(axes, chart)
        else:
            if isinstance(chart, Heat):
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


def _around(sheet: _Sheet, chart: Heat, room: Box, left: float, top: float) -> None:
    """What stands over and under a map beside the names of its columns."""
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


def _key(sheet: _Sheet, key: Key, left: float, top: float) -> None:
    if isinstance(key, Scale):
        _bar(sheet, key, left + 8, top)
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


def _bar(sheet: _Sheet, scale: Scale, left: float, top: float) -> None:
    """The colours and what they mean, with the level of chance."""
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
        share = (value - scale.low) / (high - scale.low)
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
