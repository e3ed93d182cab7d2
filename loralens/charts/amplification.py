"""The amplification factor drawn: its curve over the kept rank, excess and z of every block and kind, and φ(ΔW, W)."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from math import ceil, isfinite
from statistics import median
from typing import Any, final

import numpy as np
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.colorbar import Colorbar
from matplotlib.colors import Normalize
from matplotlib.figure import Figure, SubFigure
from matplotlib.layout_engine import ConstrainedLayoutEngine

from loralens.analysis.base.amplification import Amplification
from loralens.charts.figure import EMPTY, fit, settle, styled
from loralens.charts.panels import counts, kind_panels
from loralens.charts.sheet import (
    NAME,
    OUTSIDE,
    PALEST,
    TICKS,
    Column,
    block_colours,
    block_names,
    block_order,
    commonest_kinds,
    starts,
    thin,
)
from loralens.core.lazy import Array
from loralens.core.names import Block, block, kind
from loralens.errors import OptionError

KINDS = 12  # of one figure: those of most modules
ACROSS = 4  # panels side by side

Results = Mapping[str, Amplification]


@final
@dataclass(frozen=True, slots=True)
class Grid:
    """Modules by kind, down, and block, across; None is the column of those outside any block."""

    kinds: Sequence[str]
    columns: Sequence[Column]
    cells: Mapping[tuple[int, int], Sequence[Amplification]]

    def row(self, row: int) -> list[tuple[int, Amplification]]:
        """The modules of a kind, each with its column."""
        return [(j, one) for j in range(len(self.columns)) for one in self.cells.get((row, j), ())]

    @property
    def names(self) -> list[str]:
        """What the columns are called."""
        return block_names(self.columns)

    @property
    def colours(self) -> list[Any]:
        """One a column; grey outside any block."""
        count = sum(c is not None for c in self.columns)
        return [*block_colours(count), *[OUTSIDE] * (len(self.columns) - count)]


def amplification_figure(found: Results, *, title: str = "", phi_rank: int = 16) -> Figure:
    """What `loralens.analysis.base.amplification.amplification` found, in three bands.

    Curves: ‖ΔWᵢ‖/‖UᵢᵀWVᵢ‖ against the kept rank i, a panel a kind, a line a module in the colour of its block; dashed
    with a grey band, median and range of what random directions would give. Maps: the excess of ‖UᵀWV‖ over random and
    its z-score, kinds down, blocks across, the median where a cell has several modules. φ(i, j) between the directions
    of ΔW and those of W (Figure 8 of the LoRA paper), on either side, the mean over modules; left out where the top of
    W was not computed.

    Parameters
    ----------
    found : mapping of str to Amplification
        Modules whose ΔW or W is 0 have no value and are left out of curves and means.
    title : str
    phi_rank : int
        Largest i and j of φ.

    Returns
    -------
    Figure
        Of at most 12 kinds, those of most modules.

    Raises
    ------
    OptionError
        No module has a value.
    """
    alive = {name: one for name, one in found.items() if one.s.size and one.weight_norm}
    if not alive:
        raise OptionError("no module has both a ΔW and a W that are not 0", fix="there is nothing to draw")
    grid = _grid(found)
    topped = [one for one in alive.values() if one.top]
    heights = [0.5 + 1.7 * ceil(len(grid.kinds) / ACROSS), 1.4 + 0.22 * max(4, len(grid.kinds)), *[3.0] * bool(topped)]
    width = min(max(9.0, 2 * (0.1 * len(grid.columns) + 2.2)), 14)
    with styled():
        figure = Figure(figsize=(width, sum(heights) + 0.3), layout=ConstrainedLayoutEngine(w_pad=0.1))  # inches
        figure.suptitle(fit(title, int(width * 11)), parse_math=False)
        bands = figure.subfigures(len(heights), 1, squeeze=False, height_ratios=heights)[:, 0]
        _curves(bands[0], grid)
        _maps(bands[1], grid)
        if topped:
            _phi(bands[2], topped, phi_rank)
    return settle(figure)


def _grid(found: Results) -> Grid:
    kinds = commonest_kinds(found, KINDS)
    shown = {name: one for name, one in found.items() if kind(name) in kinds}
    homes = {name: block(name) for name in shown}
    columns: list[Column] = [*sorted({home for home in homes.values() if home}, key=block_order)]
    if None in homes.values():
        columns.append(None)
    cells: dict[tuple[int, int], list[Amplification]] = {}
    for name, one in shown.items():
        cells.setdefault((kinds.index(kind(name)), columns.index(homes[name])), []).append(one)
    return Grid(kinds, columns, cells)


def _curves(part: SubFigure, grid: Grid) -> None:
    columns = min(ACROSS, len(grid.kinds))
    panels = kind_panels(part, grid.kinds, columns, lambda axes, row: _lines(axes, grid, row))
    most = max(one.s.size for members in grid.cells.values() for one in members)
    panels[0].set(yscale="log", xlim=(1 - 0.04 * most, 1.04 * most), xticks=counts(most))
    part.supylabel("amplification ‖ΔWᵢ‖/‖UᵢᵀWVᵢ‖", fontsize="medium")
    part.supxlabel(
        "kept directions i of ΔW   (dashed: random directions, median; grey: their range)", fontsize="medium"
    )
    count = sum(isinstance(c, Block) for c in grid.columns)
    if count > 1:
        scale = ScalarMappable(Normalize(0, (count - 1) / PALEST), "viridis")
        bar = part.colorbar(scale, ax=panels, label="block", pad=0.01, aspect=20)
        bar.ax.set_ylim(0, count - 1)  # without the palest end
        ticks = thin(grid.columns[:count], 8)
        bar.set_ticks(ticks, labels=[grid.names[j] for j in ticks], parse_math=False)
        bar.ax.minorticks_off()


def _lines(axes: Axes, grid: Grid, row: int) -> None:
    """The curves of one kind, over those that random directions would give."""
    members = [(j, one.curve) for j, one in grid.row(row) if one.s.size and one.weight_norm]
    chance = [np.array([kept.delta_norm / kept.random_norm for kept in curve]) for _, curve in members]
    most = max((c.size for c in chance), default=0)
    columns = [np.array([c[i] for c in chance if c.size > i]) for i in range(most)]
    i = np.arange(1, most + 1)
    if most:
        axes.fill_between(i, [c.min() for c in columns], [c.max() for c in columns], color="0.85", linewidth=0)
        axes.plot(i, [np.median(c) for c in columns], "k--", linewidth=1, zorder=3)
    for j, curve in members:
        axes.plot(
            [kept.rank for kept in curve],
            [kept.amplification if isfinite(kept.amplification) else np.nan for kept in curve],
            color=grid.colours[j],
            linewidth=0.8 if len(members) <= 40 else 0.5,
            marker="." if most <= 8 else "",
            markersize=3,
        )
    if not members:
        axes.text(0.5, 0.5, "all zero", transform=axes.transAxes, ha="center", fontsize=7)


def _maps(part: SubFigure, grid: Grid) -> None:
    """Excess over random, and its z-score, at the whole rank."""
    left, right = part.subplots(1, 2, sharey=True)
    excess, z = (_cells(grid, what) for what in ("excess", "z"))
    doublings = np.ma.log2(excess)  # masks what is 0
    most = max([1.0, *np.abs(doublings.compressed())])
    far = max([3.0, *np.abs(z.compressed())])
    bar = _map(part, left, grid, doublings, most, "excess ‖UᵀWV‖ / random")
    ticks = [k for k in range(-int(most), int(most) + 1) if k % ceil(most / 3) == 0]
    bar.set_ticks(ticks, labels=[f"{2.0**k:g}" for k in ticks])
    _map(part, right, grid, z, far, "z-score of ‖UᵀWV‖²")
    left.set_title("excess over random directions (1: chance)")
    right.set_title("standard deviations from chance (0: chance)")
    right.tick_params(labelleft=False)


def _cells(grid: Grid, what: str) -> np.ma.MaskedArray:
    """The median of a quantity over the modules of a cell, masked where none has a value."""
    values = np.full((len(grid.kinds), len(grid.columns)), np.nan)
    for cell, members in grid.cells.items():
        known = [x for one in members if isfinite(x := float(getattr(one.kept(one.s.size), what)))]
        values[cell] = median(known) if known else np.nan
    return np.ma.masked_invalid(values)


def _map(part: SubFigure, axes: Axes, grid: Grid, values: Array, most: float, label: str) -> Colorbar:
    axes.patch.set(**EMPTY)
    mesh = axes.pcolormesh(values, cmap="RdBu_r", vmin=-most, vmax=most, edgecolors="white", linewidth=0.4)
    shown, names = thin(grid.columns, TICKS // 2), grid.names
    upright = any(len(names[j]) > 3 for j in shown if isinstance(grid.columns[j], Block))
    labels = [names[j] for j in shown]
    axes.set_xticks(np.array(shown) + 0.5, labels, rotation=90 if upright else 0, parse_math=False)
    axes.set_yticks(np.arange(len(grid.kinds)) + 0.5, [fit(name, NAME) for name in grid.kinds], parse_math=False)
    several = max(map(len, grid.cells.values())) > 1
    note = " (hatched: no value)" if np.ma.getmaskarray(values).any() else ""
    axes.set(xlim=(0, len(grid.columns)), ylim=(len(grid.kinds), 0))
    axes.set_xlabel(f"block{', a cell: the median of its modules' if several else ''}{note}")
    axes.tick_params(length=2)
    for start, _ in pairwise([*starts(grid.columns), len(grid.columns)]):
        axes.axvline(start, color="black", linewidth=0.8)
    return part.colorbar(mesh, ax=axes, label=label, pad=0.02, aspect=15)


def _phi(part: SubFigure, topped: Sequence[Amplification], limit: int) -> None:
    """Figure 8: mean φ over the modules that have so many directions, on both sides, with one bar."""
    pairs = [(one.top.out, one.top.in_, *one.top.chance(one.shape)) for one in topped if one.top]
    i = min(max(out.shape[0] for out, *_ in pairs), limit)
    full = [[side[:i, :limit] for side in sides] for sides in pairs if sides[0].shape[0] >= i]
    j = min(side.shape[1] for sides in full for side in sides)
    out, in_, chance_out, chance_in = (_mean([sides[k][:, :j] for sides in full]) for k in range(4))
    chance = max(chance_out[-1, -1], chance_in[-1, -1])
    norm = Normalize(0, max(float(out.max()), float(in_.max()), 2 * chance))
    panels = part.subplots(1, 2, sharey=True)
    for axes, values, side, level in ((panels[0], out, "out", chance_out), (panels[1], in_, "in", chance_in)):
        mesh = axes.imshow(
            values, norm=norm, cmap="magma", origin="lower", aspect="auto", extent=(0.5, j + 0.5, 0.5, i + 0.5)
        )
        axes.set_title(
            f"φ(i, j) on the {side} side: mean {values[-1, -1]:.3g} at the corner, chance {level[-1, -1]:.3g}"
        )
        axes.set(xlabel="j leading directions of W", xticks=counts(j), yticks=counts(i))
    panels[0].set_ylabel("i leading directions of ΔW")
    bar = part.colorbar(mesh, ax=panels, label=f"φ, mean of {len(full)} modules\n(white line: chance)", pad=0.01)
    bar.ax.axhline(chance, color="white", linewidth=1.2)


def _mean(arrays: Sequence[Array]) -> Array:
    return np.asarray(np.mean(arrays, axis=0), dtype=np.float64)
