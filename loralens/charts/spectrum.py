"""Spectra drawn kind by kind, over a map of the effective rank of every block and kind."""

from collections.abc import Iterable, Mapping, Sequence
from math import ceil
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.colors import BoundaryNorm, ListedColormap
from matplotlib.figure import Figure, SubFigure

from loralens.analysis.spectrum import Spectrum
from loralens.charts.effective_rank import rank_colours, rank_map
from loralens.charts.figure import fit, settle, styled
from loralens.charts.panels import counts, kind_panels
from loralens.charts.sheet import OUTSIDE, Sheet, across, block_order, height, heights, lay_out, thin, width
from loralens.core.lazy import Array
from loralens.core.names import block
from loralens.errors import OptionError

PANELS = 24  # of one figure
ADAPTERS = 12  # of one figure
LINES = 256  # of one panel; beyond, one mean line a block

GOLDEN = 0.618  # multiples of it mix evenly, so late blocks do not hide early ones
NOTE: dict[str, Any] = {"facecolor": "white", "edgecolor": "none", "alpha": 0.8, "pad": 1}

Limits = tuple[float, float] | None


def spectrum_figure(spectra: Mapping[str, Mapping[str, Spectrum]]) -> Figure:
    """The spectra of one or more adapters by kind, and the effective rank of every block and kind.

    One band an adapter. Above: a panel for each kind, σᵢ against i, a line for each module in the colour of its
    block; a line ends where σᵢ is zero to rounding. Below: the effective rank, a row for each kind and a column for
    each block, as the mean over the non-zero modules of the cell. All bands share the limits of σ and the colours.

    Parameters
    ----------
    spectra : mapping of str to mapping of str to Spectrum
        Label of the adapter → module name → Spectrum. Labels and names are shown as they are, long ones without
        their middle.

    Returns
    -------
    Figure
        At most 24 panels and 12 adapters. The kinds of least energy share a panel where there are more; the titles
        say so. A panel of more than 256 modules shows the mean σᵢ of every block instead.

    Raises
    ------
    OptionError
        No adapter.
    """
    if not spectra:
        raise OptionError("no adapter to draw", fix="give at least one")
    shown = dict(list(spectra.items())[:ADAPTERS])
    blocks = sorted({b for names in shown.values() for name in names if (b := block(name))}, key=block_order)
    sheets = [lay_out(label, one, blocks, max(1, PANELS // len(shown))) for label, one in shown.items()]
    with styled():
        figure = Figure(figsize=(width(sheets), sum(map(height, sheets))), layout="constrained")
        bands = figure.subfigures(len(sheets), 1, squeeze=False, height_ratios=[height(s) for s in sheets])[:, 0]
        limits, colours = _limits(sheets), rank_colours(sheets)
        for band, sheet in zip(bands, sheets, strict=True):
            _draw(band, sheet, limits, colours)
        if len(shown) < len(spectra):
            figure.suptitle(f"{len(shown)} of {len(spectra)} adapters; {len(spectra) - len(shown)} left out")
    return settle(figure)


def _limits(sheets: Iterable[Sheet]) -> Limits:
    """Limits of σ: a little more than all that is not zero to rounding; None where all is."""
    drawn = [s for sheet in sheets for one in sheet.spectra if (s := _solid(one)).size]
    if not drawn:
        return None
    low, high = min(float(s[-1]) for s in drawn), max(float(s[0]) for s in drawn)
    margin = max((high / low) ** 0.05, 1.2)
    return low / margin, high * margin


def _solid(one: Spectrum) -> Array:
    """The singular values that are not zero to rounding."""
    return one.s[: one.numerical_rank]


def _draw(band: SubFigure, sheet: Sheet, limits: Limits, colours: tuple[float, float]) -> None:
    """One adapter: its panels over its map."""
    top, bottom = band.subfigures(2, 1, squeeze=False, height_ratios=heights(sheet))[:, 0]
    top.suptitle(_title(sheet), parse_math=False)
    if not sheet.spectra:
        return
    _panels(top, sheet, limits)
    rank_map(bottom, sheet, colours)


def _title(sheet: Sheet) -> str:
    if not sheet.cells:
        return f"{fit(sheet.label, 80)}\nno modules"
    kinds = len(sheet.rows) - 1 + sheet.gathered
    note = f"\n{sheet.gathered} of {kinds} kinds, those of least energy, share a panel" if sheet.gathered else ""
    return fit(sheet.label, 80) + note


def _panels(part: SubFigure, sheet: Sheet, limits: Limits) -> None:
    """A panel for each kind, with one bar for the colours of all."""
    panels = kind_panels(part, sheet.rows, across(sheet), lambda axes, row: _lines(axes, sheet, row))
    panels[0].set(yscale="log", ylim=limits or (0.1, 1))
    if not limits:
        panels[0].set_yticks([])
        panels[0].minorticks_off()
    _directions(part, panels[0], sheet)
    part.supylabel("singular value σᵢ of ΔW", fontsize="medium")
    if sheet.places > 1:
        _block_bar(part, panels, sheet)


def _directions(part: SubFigure, axes: Axes, sheet: Sheet) -> None:
    """The x axis that all panels share: i, or the place of the block where there is one direction only."""
    if sheet.flat:
        axes.set(xticks=[], xlim=(-0.5, len(sheet.columns) - 0.5))
        part.supxlabel("block, in the order of the map (one direction a module)", fontsize="medium")
        return
    most = max(one.s.size for one in sheet.spectra)
    axes.set(xlim=(1 - 0.04 * most, 1.04 * most), xticks=counts(most))
    ends = any(one.numerical_rank < one.s.size for one in sheet.spectra if one.spectral > 0)
    note = " (a line ends where σᵢ is zero to rounding)" if ends else ""
    part.supxlabel(f"direction i{note}", fontsize="medium")


def _lines(axes: Axes, sheet: Sheet, row: int) -> None:
    """The spectra of one kind, and in words what they do not show."""
    cells, colours = sheet.row(row), sheet.colours
    modules = [one for _, members in cells for one in members]
    many, zero = len(modules) > LINES, sum(one.spectral == 0 for one in modules)
    for column, members in cells:
        outside = sheet.columns[column] is None
        for s in [_mean(members)] if many else map(_solid, members):
            axes.plot(
                [column] if sheet.flat else np.arange(1, s.size + 1),
                s,
                color=OUTSIDE if outside else colours[column],
                linestyle="--" if outside else "-",
                linewidth=0.8 if len(modules) <= 40 else 0.5,
                marker="." if s.size <= 8 else "",
                markersize=3,
                zorder=2 + column * GOLDEN % 1,
            )
    notes = [
        *(["grey: outside any block"] if zero < len(modules) and sheet.columns[cells[-1][0]] is None else []),
        *(["mean of each block's modules"] if many else []),
        *([f"{zero} of {len(modules)} modules are zero" if zero < len(modules) else "all zero"] if zero else []),
    ]
    axes.text(0.04, 0.05, "\n".join(notes), transform=axes.transAxes, fontsize=6.5, va="bottom", bbox=NOTE)


def _mean(members: Sequence[Spectrum]) -> Array:
    """Mean σᵢ of the non-zero modules, one that is too short counted as zero."""
    solid = [s for one in members if (s := _solid(one)).size]
    total = np.zeros(max((s.size for s in solid), default=0))
    for s in solid:
        total[: s.size] += s
    return total / max(len(solid), 1)


def _block_bar(part: SubFigure, panels: Sequence[Axes], sheet: Sheet) -> None:
    count = sheet.places
    scale = ScalarMappable(BoundaryNorm(np.arange(count + 1) - 0.5, count), ListedColormap(sheet.colours))
    aspect = 20 * ceil(len(sheet.rows) / across(sheet))
    bar = part.colorbar(scale, ax=panels, label=sheet.noun, aspect=aspect, pad=0.01)
    bar.ax.yaxis.label.set_parse_math(False)
    ticks = thin(sheet.columns[:count], 8)
    bar.set_ticks(ticks, labels=[sheet.names[j] for j in ticks], parse_math=False)
    bar.ax.minorticks_off()
