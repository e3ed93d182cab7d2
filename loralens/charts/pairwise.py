"""A collection of adapters: how alike each two are, and in which blocks they meet."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.colorbar import Colorbar
from matplotlib.figure import Figure
from matplotlib.gridspec import GridSpec

from loralens.analysis.compare.interference import Interference
from loralens.analysis.compare.pairwise import Module, Pairwise, Side, mean
from loralens.charts.figure import EMPTY, fit, settle, styled
from loralens.charts.heat_map import CHANCE
from loralens.charts.sheet import NAME, TICKS, block_names, block_order, commonest_kinds, stride
from loralens.core.names import Block, block, kind
from loralens.errors import OptionError
from loralens.linalg.factor import Floats

WRITTEN = 8  # adapters up to which every cell of a matrix says its number
LABELLED = 40  # adapters up to which each has its name beside the map,
BESIDE = 26  # and beside the matrix
LEAST = 0.2  # cosine that the colours of the map of conflicts reach at least: 0.01 must not look like a war
KINDS = 12  # rows of the map of conflicts


@dataclass(frozen=True, slots=True)
class _Columns:
    """The blocks across a map, and the modules of each."""

    blocks: Sequence[Block | None]
    rows: Mapping[Block | None, Sequence[int]]

    @classmethod
    def of(cls, modules: Sequence[Module]) -> "_Columns":
        rows: dict[Block | None, list[int]] = {}
        for m, module in enumerate(modules):
            rows.setdefault(block(module.name), []).append(m)
        numbered = sorted((home for home in rows if home), key=block_order)
        return cls([*numbered, *([None] if None in rows else [])], rows)

    @property
    def names(self) -> list[str]:
        """What the columns are called."""
        return block_names(self.blocks)


def pairwise_figure(
    labels: Sequence[str],
    pairs: Pairwise,
    energy: Interference,
    tree: Floats,
    sides: Sequence[Side],
) -> Figure:
    """Matrices of cosine, φ and shared initialisation under the tree of the cosines, over two maps of interference.

    Parameters
    ----------
    labels : sequence of str
        Names of the adapters; long ones lose their middle.
    pairs : Pairwise
    energy : Interference
        Of the same modules.
    tree : float64 array, shape (T − 1, 4)
        As `loralens.analysis.compare.pairwise.leaves` returns it.
    sides : sequence of str
        Sides whose φ is drawn.

    Returns
    -------
    Figure
        The first map: shared energy, an adapter a row and a block a column, mean over the modules of the block. The
        second: the most negative cosine of any two adapters, a kind a row. Hatched where there is no module.

    Raises
    ------
    OptionError
        Fewer than two adapters.
    """
    if len(labels) < 2:
        raise OptionError("one adapter has no pairs to draw", fix="give two or more")
    from scipy.cluster.hierarchy import dendrogram

    drawn = dendrogram(tree, no_plot=True)
    order = [int(i) for i in drawn["leaves"]]
    columns = _Columns.of(pairs.modules)
    kinds = commonest_kinds((module.name for module in pairs.modules), KINDS)
    panels = 2 + len(sides)
    heights = [0.5, 3.2, 1.1 + 0.16 * min(len(labels), LABELLED), 1.1 + 0.2 * max(2, len(kinds))]
    width = min(max(3.0 * panels + 1.8, 0.17 * len(columns.blocks) + 4), 16)
    names = [labels[i] for i in order]
    with styled():
        figure = Figure(figsize=(width, sum(heights) + 0.5), layout="constrained")
        figure.suptitle(f"{len(labels)} adapters in pairs, clustered by 1 − |cosine| (average linkage)")
        grid = figure.add_gridspec(4, panels, height_ratios=heights)
        _matrices(grid, names, order, pairs, drawn, sides)
        _shared_map(figure.add_subplot(grid[2, :]), names, order, energy, columns)
        _conflict_map(figure.add_subplot(grid[3, :]), pairs, columns, kinds)
    return _steady(settle(figure))


def _steady(figure: Figure) -> Figure:
    """The figure with its axes moved to round places: the last bit of what the layout found is not always the same."""
    for axes in figure.axes:
        x, y, width, height = axes.get_position(original=True).bounds
        axes.set_position((round(x, 6), round(y, 6), round(width, 6), round(height, 6)))
    return figure


def _matrices(
    grid: GridSpec,
    labels: Sequence[str],
    order: Sequence[int],
    pairs: Pairwise,
    drawn: Mapping[str, Any],
    sides: Sequence[Side],
) -> None:
    """The tree over each matrix, its leaves over the columns."""
    shown: list[tuple[str, Floats, float | None]] = [("cosine of the updates", pairs.cosine, None)]
    for side in sides:
        level = _mean(pairs.chance(side)[~np.eye(pairs.count, dtype=bool)])
        shown.append((f"φ, {side} side (chance {level:.3g})", pairs.phi(side), level))
    shown.append(("cosine of A: one initialisation?", pairs.shared_initialisation, None))
    figure = grid.figure
    assert figure
    for column, (title, values, chance) in enumerate(shown):
        branch = figure.add_subplot(grid[0, column])
        for x, y in zip(drawn["icoord"], drawn["dcoord"], strict=True):
            branch.plot(np.array(x) / 10 - 0.5, y, color="0.3", linewidth=0.7)  # scipy puts leaf i at 10 i + 5
        branch.set(xlim=(-0.5, len(labels) - 0.5), xticks=[], yticks=[])
        branch.axis("off")
        branch.set_title(title, parse_math=False)
        axes = figure.add_subplot(grid[1, column])
        axes.patch.set(**EMPTY)
        low, colours = (-1.0, "RdBu_r") if chance is None else (0.0, "viridis")
        matrix = np.ma.masked_invalid(values[np.ix_(order, order)])
        image = axes.imshow(matrix, cmap=colours, vmin=low, vmax=1, aspect="auto")
        _cells(axes, matrix, low)
        _adapters(axes, labels, beside=column == 0)
        ticks = [-1, -0.5, 0, 0.5, 1] if chance is None else [0, 0.25, 0.5, 0.75, 1]
        bar = figure.colorbar(image, ax=axes, location="bottom", fraction=0.05, pad=0.02, aspect=25, ticks=ticks)
        bar.ax.tick_params(labelsize=6)
        if chance is not None:
            bar.ax.axvline(chance, color=CHANCE, linewidth=1.5)


def _cells(axes: Axes, matrix: np.ma.MaskedArray, low: float) -> None:
    """The number in each cell, where there are few."""
    if len(matrix) > WRITTEN:
        return
    for (i, j), value in np.ndenumerate(matrix):
        if np.isfinite(value):  # NaN where it is masked
            dark = abs(value) > 0.6 if low < 0 else value < 0.6
            axes.text(
                j,
                i,
                f"{round(value, 2) + 0.0:.2f}",
                ha="center",
                va="center",
                fontsize=6,
                color="white" if dark else "black",
            )


def _adapters(axes: Axes, labels: Sequence[str], *, beside: bool) -> None:
    """Numbers under the matrix, names beside the first one."""
    shown, names = _named(labels, BESIDE)
    axes.set_yticks(shown, names if beside else ["" for _ in shown], parse_math=False, fontsize=6)
    every = 5 * (shown[1] - shown[0])
    sparse = shown if len(shown) <= 12 else list(range(every - 1, len(labels), every))
    axes.set_xticks(sparse, [str(i + 1) for i in sparse], fontsize=6)
    axes.tick_params(length=2)


def _named(labels: Sequence[str], most: int) -> tuple[list[int], list[str]]:
    """Adapters to name, about ``most`` of them, and their names."""
    shown = list(range(0, len(labels), stride(len(labels), most)))
    return shown, [f"{fit(labels[i], NAME)} {i + 1}" for i in shown]


def _mean(values: Floats) -> float:
    """Mean of what is not NaN; 0 where nothing is."""
    there = values[~np.isnan(values)]
    return float(there.mean()) if there.size else 0.0


def _shared_map(
    axes: Axes, labels: Sequence[str], order: Sequence[int], energy: Interference, columns: _Columns
) -> None:
    values = np.array([mean(energy.shared[list(columns.rows[home])]) for home in columns.blocks]).T[list(order)]
    level = _mean(energy.shared_chance)
    axes.patch.set(**EMPTY)
    masked = np.ma.masked_invalid(values)
    top = max(float(masked.max()) if masked.count() else 0.0, 0.01)
    mesh = axes.pcolormesh(masked, cmap="magma", vmin=0, vmax=top, edgecolors="white", linewidth=0.3)
    shown, names = _named(labels, LABELLED)
    axes.set_yticks(np.array(shown) + 0.5, names, parse_math=False, fontsize=6)
    _blocks(axes, columns)
    axes.set_ylim(len(labels), 0)
    axes.set_title(f"shared energy: part of ‖ΔW‖² inside the directions of all others, both sides (chance {level:.2g})")
    bar = _bar(axes, mesh, "shared energy")
    bar.ax.axhline(level, color=CHANCE, linewidth=1.5)


def _bar(axes: Axes, mesh: ScalarMappable, label: str) -> Colorbar:
    """The colour bar of a map."""
    figure = axes.get_figure(root=True)
    assert figure
    return figure.colorbar(mesh, ax=axes, label=label, pad=0.01, fraction=0.05)


def _conflict_map(axes: Axes, pairs: Pairwise, columns: _Columns, kinds: Sequence[str]) -> None:
    pairs_of = pairs.cosines[:, *np.triu_indices(pairs.count, 1)]
    there = ~np.isnan(pairs_of)
    least = np.where(there.any(axis=1), np.where(there, pairs_of, np.inf).min(axis=1), np.nan)
    values = np.full((len(kinds), len(columns.blocks)), np.nan)
    for column, home in enumerate(columns.blocks):
        for m in columns.rows[home]:
            name = kind(pairs.modules[m].name)
            if name in kinds and not np.isnan(least[m]):
                values[kinds.index(name), column] = np.fmin(values[kinds.index(name), column], least[m])
    axes.patch.set(**EMPTY)
    masked = np.ma.masked_invalid(values)
    limit = max(float(np.abs(masked).max()) if masked.count() else 0.0, LEAST)
    mesh = axes.pcolormesh(masked, cmap="RdBu_r", vmin=-limit, vmax=limit, edgecolors="white", linewidth=0.3)
    axes.set_yticks(np.arange(len(kinds)) + 0.5, [fit(name, NAME) for name in kinds], parse_math=False)
    _blocks(axes, columns)
    axes.set_ylim(len(kinds), 0)
    total = len({kind(module.name) for module in pairs.modules})
    note = f"; {len(kinds)} of {total} kinds" if len(kinds) < total else ""
    spread = float(pairs.spreads.max()) if len(pairs.modules) else 0.0
    axes.set_title(f"conflict: the most negative cosine of any two adapters (chance 0 ± {spread:.1g}){note}")
    _bar(axes, mesh, "cosine")


def _blocks(axes: Axes, columns: _Columns) -> None:
    """Name the columns, as many as fit."""
    count, names = len(columns.blocks), columns.names
    shown = list(range(0, count, stride(count, TICKS)))
    long = max(map(len, names), default=0) > 4
    axes.set_xticks(np.array(shown) + 0.5, [names[i] for i in shown], rotation=90 if long else 0, parse_math=False)
    axes.set_xlim(0, count)
    axes.set_xlabel("block")
    axes.tick_params(length=2)
