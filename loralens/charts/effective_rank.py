"""The map of effective ranks: a row for each kind, a column for each block."""

from collections.abc import Sequence
from itertools import pairwise

import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import ListedColormap
from matplotlib.figure import SubFigure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch

from loralens.charts.figure import EMPTY, fit
from loralens.charts.sheet import NAME, TICKS, Sheet, starts, thin
from loralens.core.names import Block

ZERO = "#0072B2"  # a blue that the map has not, to colour-blind eyes either


def rank_colours(sheets: Sequence[Sheet]) -> tuple[float, float]:
    """The effective ranks that the colours span: those that occur, and no less than a quarter of the nominal rank."""
    top = max((one.rank for sheet in sheets for one in sheet.spectra), default=1)
    values = [value for sheet in sheets for value in _effective(sheet)[0].compressed()] or [1.0, top]
    low, high = min(values), max(values)
    margin = max(0.0, max(top / 4, 1) - (high - low)) / 2
    return float(max(low - margin, 1)), float(high + margin)


def _nominal(sheet: Sheet) -> str:
    ranks = sorted({one.rank for one in sheet.spectra})
    return f"{ranks[0]}" if len(ranks) == 1 else f"{ranks[0]} to {ranks[-1]}"


def rank_map(part: SubFigure, sheet: Sheet, colours: tuple[float, float]) -> None:
    """Effective rank, mean over the non-zero modules of a cell, kinds down and blocks across."""
    axes = part.add_subplot()
    values, zero = _effective(sheet)
    axes.patch.set(**EMPTY)
    mesh = axes.pcolormesh(values, cmap="magma", vmin=colours[0], vmax=colours[1], edgecolors="white", linewidth=0.4)
    axes.pcolormesh(zero, cmap=ListedColormap(["white"]), edgecolors="white", linewidth=0.4)
    y, x = np.nonzero(~zero.mask)
    axes.plot(x + 0.5, y + 0.5, linestyle="none", marker="x", markersize=4, color=ZERO)
    _map_axes(axes, sheet)
    label = f"effective rank\n(of nominal r = {_nominal(sheet)})"
    part.colorbar(mesh, ax=axes, label=label, pad=0.01, fraction=0.05, aspect=max(7, 1.5 * len(sheet.rows)))
    handles = [
        *([Patch(**{**EMPTY, "linewidth": None}, label="no module")] if _holes(sheet) else []),
        *([Line2D([], [], linestyle="none", marker="x", color=ZERO, label="ΔW = 0")] if x.size else []),
    ]
    if handles:
        part.legend(handles=handles, loc="outside lower right", ncols=2, frameon=False, fontsize=7)


def _map_axes(axes: Axes, sheet: Sheet) -> None:
    """Name the rows, the columns and the stacks of the map."""
    ticks, most = thin(sheet.columns, TICKS), max(map(len, sheet.cells.values()))
    names = [
        str(c.number) if sheet.headed and isinstance(c := sheet.columns[j], Block) else sheet.names[j] for j in ticks
    ]
    axes.set_xticks(np.array(ticks) + 0.5, names, rotation=90 if sheet.upright else 0, parse_math=False)
    axes.set_yticks(np.arange(len(sheet.rows)) + 0.5, [fit(row, NAME) for row in sheet.rows], parse_math=False)
    axes.set(xlim=(0, len(sheet.columns)), ylim=(len(sheet.rows), 0))
    mean = f" (a cell is the mean of its non-zero modules, of up to {most})" if most > 1 else ""
    axes.set_xlabel(sheet.noun + mean, parse_math=False)
    axes.tick_params(length=2)
    edges = [*starts(sheet.columns), len(sheet.columns)]
    for start, stop in pairwise(edges):
        axes.axvline(start, color="black", linewidth=0.8)
        first = sheet.columns[start]
        if sheet.headed and isinstance(first, Block):
            name = sheet.stacks[first.stack]
            axes.text((start + stop) / 2, -0.1, name, ha="center", va="bottom", fontsize=7, parse_math=False)


def _effective(sheet: Sheet) -> tuple[np.ma.MaskedArray, np.ma.MaskedArray]:
    """The value of every cell, masked where it holds none, and the cells that are zero."""
    shape = len(sheet.rows), len(sheet.columns)
    values, zero = (np.ma.masked_invalid(np.full(shape, np.nan)) for _ in range(2))
    for cell, members in sheet.cells.items():
        alive = [one.effective_rank for one in members if one.spectral > 0]
        (values if alive else zero)[cell] = sum(alive) / max(len(alive), 1)
    return values, zero


def _holes(sheet: Sheet) -> bool:
    return len(sheet.cells) < len(sheet.rows) * len(sheet.columns)
