"""Charts of a collection of adapters: the similarity of all pairs, and where they conflict."""

from collections.abc import Mapping, Sequence
from math import isfinite

import numpy as np

from loralens.analysis.every_pair import Pairwise, known_mean
from loralens.analysis.interference import Interference
from loralens.charts.grid import KINDS, Grid, fit_name, stride
from loralens.charts.spec import Band, Cell, ColourScale, Figure, HeatMap
from loralens.choices import Side
from loralens.core.names import block
from loralens.errors import OptionError
from loralens.linalg.factor import Floats
from loralens.tables.numbers import percent, signed

# Adapters up to which every cell of a matrix shows its number: 8 cells of 40 pixels are 320 pixels wide.
WRITTEN = 8
MATRIX = 330.0  # width and height of the cells of a matrix together, in pixels
# Adapters up to which each has its name next to a map: 26 rows of 330 pixels are 12.7 pixels high, as a line is.
LABELLED = 26
# The colours of the map of conflicts reach at least this cosine, and at least so many standard deviations from chance:
# a cosine of 0.01 must not look like a conflict.
LEAST = 0.2
SPREADS = 4

Tree = Sequence[Sequence[tuple[float, float]]]


def pairwise_figure(
    labels: Sequence[str],
    pairs: Pairwise,
    energy: Interference,
    tree: Floats,
    sides: Sequence[Side],
) -> Figure:
    """Draw matrices of cosine, φ and shared initialisation under a tree, and below them two maps of interference.

    Parameters
    ----------
    labels : sequence of str
        Names of the adapters; long ones are shortened.
    pairs : Pairwise
    energy : Interference
        The interference in the same modules.
    tree : float64 array, shape (T − 1, 4)
        As `loralens.analysis.every_pair.cluster_order` returns it.
    sides : sequence of str
        The sides whose φ is drawn.

    Returns
    -------
    Figure
        The first map shows shared energy, with one adapter per row and one block per column, as the mean over the
        modules of the block. The second shows the most negative cosine of any two adapters, with one kind per row.
        Cells without a module are dotted.

    Raises
    ------
    OptionError
        Fewer than two adapters.
    """
    if len(labels) < 2:
        raise OptionError("one adapter has no pairs to draw", fix="give two or more adapters")
    branches, order = branches_of(tree)
    spread = float(pairs.spreads.max()) if len(pairs.modules) else 0.0
    shared, worst = shared_energy_map(labels, pairs, energy, order), conflict_map(labels, pairs)
    title = f"{len(labels)} adapters in pairs, clustered by 1 − |cosine| (average linkage)"
    return Figure(
        title,
        [
            Band(pair_matrices(labels, pairs, order, sides, branches)),
            Band([shared], "shared energy: part of ‖ΔW‖² inside the directions of all others, both sides"),
            Band([worst], f"lowest cosine of any two adapters in each module (chance 0 ± {spread:.1g})"),
        ],
    )


def branches_of(tree: Floats) -> tuple[Tree, list[int]]:
    """Return the branches of a clustering above the columns of a matrix, and the order of its leaves.

    x of the branches counts columns, and y is a height in [0, 1].
    """
    if len(tree) == 1:  # of a pair, for which SciPy need not be imported
        y = float(tree[0, 2])
        height = y / (max(y, 0.0) or 1.0)
        return [[(0.5, 0.0), (0.5, height), (1.5, height), (1.5, 0.0)]], [0, 1]
    from scipy.cluster.hierarchy import dendrogram

    drawn = dendrogram(tree, no_plot=True)
    top = max((y for branch in drawn["dcoord"] for y in branch), default=0.0) or 1.0
    branches = [
        [(x / 10, y / top) for x, y in zip(xs, ys, strict=True)]  # scipy places leaf i at 10 i + 5
        for xs, ys in zip(drawn["icoord"], drawn["dcoord"], strict=True)
    ]
    return branches, [int(i) for i in drawn["leaves"]]


def pair_matrices(
    labels: Sequence[str], pairs: Pairwise, order: Sequence[int], sides: Sequence[Side], tree: Tree = ()
) -> list[HeatMap]:
    """Draw matrices of the cosine of ΔW, of φ and of the cosine of A, with similar adapters side by side."""
    shown: list[tuple[str, Floats, ColourScale]] = [("cosine of ΔW", pairs.cosine, _cosine_scale("cosine"))]
    for side in sides:
        # The diagonal compares each adapter with itself, where there is no chance.
        off = pairs.chance(side)[~np.eye(pairs.count, dtype=bool)]
        level = [float(off[np.isfinite(off)].mean())] if np.isfinite(off).any() else []
        shown.append((f"φ, {side} side", pairs.phi(side), ColourScale(0.0, 1.0, "φ", chance=level, form=".2f")))
    shown.append(("cosine of A", pairs.shared_initialisation, _cosine_scale("cosine of A: one initialisation?")))
    names = [labels[i] for i in order]
    return [_matrix(title, values[np.ix_(order, order)], names, scale, tree) for title, values, scale in shown]


def _cosine_scale(label: str) -> ColourScale:
    ticks = [(-1.0, "−1"), (0.0, "0"), (1.0, "+1")]
    return ColourScale(-1.0, 1.0, label, diverging=True, chance=[0.0], form="+.2f", ticks=ticks)


def _matrix(title: str, values: Floats, names: Sequence[str], scale: ColourScale, tree: Tree) -> HeatMap:
    cells = {
        (i, j): Cell(float(values[i, j]), f"{names[i]} and {names[j]}: {title} {values[i, j]:.3f}")
        for i, j in np.argwhere(np.isfinite(values)).tolist()
    }
    # Only every fifth of many columns has its number: numbers of two digits are wider than their columns.
    every = 5 if len(names) > 12 else 1
    numbers = range(1, len(names) + 1)
    return HeatMap(
        title, [fit_name(name) for name in names], [str(i) for i in numbers], cells, scale, tree=tree, room=MATRIX,
        written=len(names) <= WRITTEN, row_labels=_row_labels(names),
        column_labels=["" if i % every else str(i) for i in numbers],
    )  # fmt: skip


def _row_labels(names: Sequence[str]) -> list[str]:
    """The labels of the rows: names with the numbers of the columns, as many as fit."""
    step = stride(len(names), LABELLED)
    return ["" if i % step else f"{fit_name(name)} {i + 1}" for i, name in enumerate(names)]


def shared_energy_map(labels: Sequence[str], pairs: Pairwise, energy: Interference, order: Sequence[int]) -> HeatMap:
    """Draw each adapter's share of ‖ΔW‖² in the directions of all others, as the mean over each block."""
    grid = Grid.of(module.name for module in pairs.modules)
    flat = not grid.stacks
    places = [module.name if flat else block(module.name) for module in pairs.modules]
    members = [[m for m, place in enumerate(places) if place == column] for column in grid.blocks]
    values = np.array([known_mean(energy.shared[rows]) for rows in members])
    finite_chance = energy.shared_chance[np.isfinite(energy.shared_chance)]
    level = float(finite_chance.mean()) if finite_chance.size else 0.0
    names, noun = [labels[t] for t in order], "module" if flat else "block"
    cells = {
        (i, j): Cell(float(values[j, t]), f"{labels[t]}, {noun} {column}: {percent(values[j, t])} shared")
        for i, t in enumerate(order)
        for j, column in enumerate(grid.columns)
        if isfinite(values[j, t])
    }
    # The level of chance must be on the scale, and not at its end.
    top = min(max([cell.value for cell in cells.values()] + [2 * level, 0.01]), 1.0)
    scale = ColourScale(0.0, top, "shared energy", chance=[level], form=".2%")
    numbered = _row_labels(names) if len(names) > 2 else [fit_name(name) for name in names]
    return HeatMap(
        "", [fit_name(name) for name in names], grid.columns, cells, scale, grid.across, row_labels=numbered,
        column_labels=grid.labels, column_edges=[a for a, *_ in grid.heads[1:]], heads=grid.heads,
    )  # fmt: skip


def conflict_map(labels: Sequence[str], pairs: Pairwise, numbers: Mapping[str, int] | None = None) -> HeatMap:
    """Draw the most negative cosine of any two adapters, by kind and block."""
    values, tips = {}, {}
    first, second = np.triu_indices(pairs.count, 1)
    for module, cosines in zip(pairs.modules, pairs.cosines[:, first, second], strict=True):
        # A cosine is NaN where one of the two adapters lacks the module, or its ΔW is 0.
        if np.isfinite(cosines).any():
            k = int(np.nanargmin(cosines))
            values[module.name] = float(cosines[k])
            pair = f"{labels[first[k]]} and {labels[second[k]]}"
            tips[module.name] = f"cosine {signed(cosines[k])} of {pair}"
    spread = float(pairs.spreads.max()) if len(pairs.modules) else 0.0
    most = min(max([abs(value) for value in values.values()] + [SPREADS * spread, LEAST]), 1.0)
    scale = ColourScale(-most, most, "cosine", diverging=True, chance=[0.0], form="+.3f")
    grid = Grid.of((module.name for module in pairs.modules), most=KINDS)
    note = "a cell: the least of its modules" if grid.fullest > 1 else ""
    return grid.heat("", values, scale, numbers=numbers, gather=min, tip=lambda name: tips[name], note=note)


MAP = 620.0  # width and height of the cells together, in pixels
MOST_LABELLED = 48  # rows up to which each has its name: 620 pixels are then 12.9 pixels for a row, as a line is


def family_map(names: Sequence[str], cosines: Floats, starts: Sequence[int], *, chance: float) -> HeatMap:
    """Draw the cosines of adapters in order of their families.

    Parameters
    ----------
    names : sequence of str
        The adapters, family by family.
    cosines : float64 array, shape (n, n)
    starts : sequence of int
        The index of the first adapter of every family but the first: lines are drawn there.
    chance : float
        The level of chance.
    """
    scale = ColourScale(
        -1.0, 1.0, "cosine of ΔW", diverging=True, chance=[chance], form="+.2f",
        ticks=[(-1.0, "−1"), (0.0, "0"), (1.0, "+1")],
    )  # fmt: skip
    count = len(names)
    cells = {
        (i, j): Cell(float(cosines[i, j]), f"{names[i]} and {names[j]}: {cosines[i, j]:+.3f}")
        for i in range(count)
        for j in range(count)
    }
    every = -(-count // MOST_LABELLED)
    numbers = [str(i) for i in range(1, count + 1)]
    labels = [f"{fit_name(name)} {i + 1}" if i % every == 0 else "" for i, name in enumerate(names)]
    # Numbers of two digits are wider than the columns of many adapters.
    across = 5 if count > 20 else 1
    return HeatMap(
        "cosine of every pair", [fit_name(name) for name in names], numbers, cells, scale, room=MAP,
        row_labels=labels, column_labels=["" if i % across else str(i) for i in range(1, count + 1)],
        row_edges=list(starts), column_edges=list(starts),
    )  # fmt: skip
