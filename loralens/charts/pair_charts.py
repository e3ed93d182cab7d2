"""Maps of φ(i, j) of two adapters, as in Figures 3, 4, 6 and 7 of the LoRA paper, and an overview of all modules."""

from collections.abc import Iterable, Mapping, Sequence
from itertools import accumulate, groupby
from math import ceil, isfinite
from statistics import fmean

import numpy as np

from loralens.analysis.every_pair import Pairwise, known_mean
from loralens.analysis.interacting_pairs import Interference
from loralens.analysis.nested import Nesting
from loralens.analysis.two_adapters import Comparison, side_of
from loralens.charts.module_grid import Column, Grid, all_blocks, column_names, fit_name, thin
from loralens.charts.spec import Band, ColourScale, Figure, HeatMap
from loralens.choices import Of, Side
from loralens.core.names import Block, block, kind, natural_key
from loralens.errors import OptionError
from loralens.linalg.factor import Floats
from loralens.linalg.subspace import Overlap
from loralens.tables.numbers import fixed, number, percent, signed

# If there are at most BLOCKS blocks, each has a row of heat maps. If there are more, only FEW of them have one.
BLOCKS, FEW = 8, 4
KINDS = 8  # columns of heat maps
GLANCE = 12  # with more heat maps than this, an overview of all modules is added
TITLE = 25  # letters that fit above a heat map
WHOSE = {"update": "ΔW", "A": "A", "B": "B"}  # the matrix whose directions are compared, as the title names it
WIDTHS = 3  # widths in a figure of one adapter, those with the most modules


def similarity_figure(comparison: Comparison, *, labels: tuple[str, str], of: Of = "update") -> Figure:
    """Draw heat maps of φ(i, j) of two adapters for some blocks, and an overview of all modules.

    There is one heat map per kind and block. Its cell in row i and column j shows φ of the i leading directions of the
    first adapter and the j leading directions of the second; random subspaces of n dimensions would give max(i, j)/n.
    If there are more than 8 blocks, four evenly spaced ones are shown, from the first to the last. If some modules have
    no heat map, or more than 12 have one, an overview below shows φ(1, 1) and φ of all directions of every module, by
    kind and block.

    Parameters
    ----------
    comparison : Comparison
    labels : tuple of str
        The names of the two adapters.
    of : str
        The matrix whose directions were compared.

    Returns
    -------
    Figure
        At most 8 × 8 heat maps; the title says what was left out.
    """
    overlaps = {name: overlap.overlap for name, overlap in comparison.items() if overlap.overlap.phi.size}
    side = next((overlap.side for overlap in comparison.modules.values()), "in")
    first, second = (fit_name(label, 60) for label in labels)
    title = f"{side} side of {WHOSE[of]}: directions i of {first}\nand j of {second}"
    if not overlaps:
        return Figure(f"{title}\nnothing to compare: ΔW is 0 everywhere", [])
    maps, scale, left_out = phi_maps(overlaps)
    bands = [maps]
    drawn = sum(chart is not None for chart in maps.charts)
    if len(overlaps) > 1 and (drawn < len(overlaps) or drawn > GLANCE):
        grid, note = Grid.of(overlaps), "a cell: the mean of its modules"
        overview = (
            ("φ(1, 1)", {name: (x.first, 1 / x.n) for name, x in overlaps.items()}),
            ("φ of all directions", {name: (x.full, x.full_chance) for name, x in overlaps.items()}),
        )
        every = []
        for word, pairs in overview:
            values = {name: value for name, (value, _) in pairs.items()}
            scale = phi_scale(values.values(), word, [chance for _, chance in pairs.values()])
            every.append(grid.heat(word, values, scale, gather=fmean, note=note))
        bands.append(Band(every, "every module"))
    return Figure("\n".join([title, *left_out]), bands)


def phi_scale(values: Iterable[float], label: str, chance: Sequence[float]) -> ColourScale:
    """Return the colour scale of φ, from 0 to the largest value, rounded up to a tenth, and at least 0.1."""
    largest = max(filter(isfinite, values), default=0.0)
    # The tolerance keeps 0.3 with its rounding error from becoming 0.4.
    top = min(1.0, max(0.1, ceil(10 * largest - 1e-9) / 10))
    return ColourScale(0.0, top, label, lambda x: number(x, 2), chance=chance)


def directions_map(title: str, phi: Floats, scale: ColourScale, note: str = "", name: str = "") -> HeatMap:
    """Draw a small map of φ(i, j) with i down and j across."""
    # The numbers of directions from 1 on: round ones, and few enough to stand side by side.
    rows, columns = (
        ["1", *thin([str(i) for i in range(1, count + 1)][::-1], 4)[::-1][1:]] if count > 1 else ["1"]
        for count in phi.shape
    )
    return HeatMap(title, rows, columns, phi, scale, note=note, small=True, name=name)


def phi_maps(
    overlaps: Mapping[str, Overlap], *, blocks: int = BLOCKS, widest: int | None = None
) -> tuple[Band, ColourScale, list[str]]:
    """Draw heat maps of φ(i, j) for some blocks and all kinds, with their scale, and phrases on what is not drawn.

    The band has one row per block and one column per kind; a chart is None where a block has no module of a kind.
    ``blocks`` is the largest number of blocks that are all drawn; if there are more, four evenly spaced ones are.
    ``widest`` is the largest number of directions that a heat map shows.
    """
    cells: dict[tuple[Column, str], str] = {}
    in_blocks = any(map(block, overlaps))
    for name in overlaps:
        # Of several modules of one kind in a block, the first is drawn. Without blocks every module has its own row.
        cells.setdefault((block(name) if in_blocks else name, kind(name)), name)
    # Modules outside any block follow after the blocks; without blocks all keep the order of the file.
    others = [place for place, _ in cells if not isinstance(place, Block)]
    places: list[Column] = [*all_blocks(overlaps), *dict.fromkeys(others)]
    kinds = sorted({name for _, name in cells}, key=natural_key)
    names, left_out, drawn = dict(zip(places, column_names(places), strict=True)), [], places
    if len(places) > blocks:
        drawn = [places[int(i)] for i in np.linspace(0, len(places) - 1, FEW)]
        left_out.append(f"{FEW} of {len(places)} blocks, evenly spaced (--modules picks others)")
    chosen = [name for name in kinds if any((place, name) in cells for place in drawn)][:KINDS]
    if len(chosen) < len(kinds):
        left_out.append(f"{len(chosen)} of {len(kinds)} kinds (--modules picks others)")
    if len(cells) < len(overlaps):
        left_out.append(f"{len(cells)} of {len(overlaps)} modules: the first of each kind in a block")
    shown = {(place, word): cells.get((place, word)) for place in drawn for word in chosen}
    own = {name: overlaps[name] for name in shown.values() if name}
    phis = {name: overlap.phi[:widest, :widest] for name, overlap in own.items()}
    levels = [level for overlap in own.values() for level in (1 / overlap.n, overlap.full_chance)]
    scale = phi_scale([float(phi.max()) for phi in phis.values()], "φ(i, j)", levels)
    charts: list[HeatMap | None] = []
    for (place, word), module in shown.items():
        if module is None:
            charts.append(None)
            continue
        # A single row of modules outside any block needs no name.
        suffix = f", block {names[place]}" if isinstance(place, Block) else f", {names[place]}" * (len(places) > 1)
        overlap = own[module]
        note = f"φ(1,1) {overlap.first:.2f}\nall {overlap.full:.2f} (chance {overlap.full_chance:.2g})"
        title = fit_name(word, max(TITLE - len(suffix), 7)) + suffix
        charts.append(directions_map(title, phis[module], scale, note, module))
    # Maps of a single kind fill the rows, because one column of them would leave most of a page empty.
    columns = len(chosen) if len(chosen) > 1 else 0
    return Band(charts, keys=[scale], columns=columns), scale, left_out


def nesting_figure(nestings: Sequence[Nesting], *, label: str, of: Of = "update", side: Side | None = None) -> Figure:
    """Draw φ between every two modules of the same width, for the three widths with the most modules.

    φ of all directions stands above the diagonal and φ(1, 1) below it, in the same colours. Modules are ordered by
    kind, and by block within a kind. ``of`` and ``side`` are those for which the nesting was measured.

    Raises
    ------
    OptionError
        No two modules have the same width, or the matrix ``of`` has no such side.
    """
    several = [nesting for nesting in nestings if len(nesting.names) > 1]
    if not several:
        raise OptionError("no two modules have the same width", fix="choose more modules with --modules")
    drawn = several[:WIDTHS]
    note = f"\n{len(drawn)} of {len(several)} widths" if len(drawn) < len(several) else ""
    title = f"{fit_name(label, 70)}: {side_of(of, side)} side of {WHOSE[of]}{note}"
    return Figure(title, [Band([nesting_map(nesting)]) for nesting in drawn])


def nesting_map(nesting: Nesting) -> HeatMap:
    """Draw the map of one width; its diagonal, where φ is 1, is left blank."""
    names = nesting.names
    # Two symmetric maps in one: both depend on the pair and not on its order, so one triangle of each is enough.
    values = np.where(np.triu(np.ones_like(nesting.full), 1) > 0, nesting.full, nesting.first)
    np.fill_diagonal(values, np.nan)
    words = ("φ(1, 1)", "φ of all directions")
    tips = {
        (i, j): (f"{names[i]} and {names[j]}", f"{words[i < j]} {values[i, j]:.2f}")
        for i, j in np.argwhere(np.isfinite(values)).tolist()
    }
    # Modules in which ΔW is 0 have no level of chance.
    chance = nesting.chance[~np.isnan(nesting.chance)].tolist()
    scale = phi_scale(values.ravel().tolist(), "φ of all above, φ(1, 1) below the diagonal", chance)
    # The name of a kind stands at its middle module, and a line before the second and further kinds.
    labels, sizes = [""] * len(names), list[int]()
    for label, group in groupby(names, kind):
        members = list(group)
        numbers = [home.number for name in members if (home := block(name))]
        blocks = f" {numbers[0]}–{numbers[-1]}" if len(numbers) > 1 else ""
        labels[sum(sizes) + (len(members) - 1) // 2] = fit_name(label, 20) + blocks
        sizes.append(len(members))
    edges = [*accumulate(sizes)][:-1]
    title = f"{len(names)} modules of width {nesting.width}"
    return HeatMap(title, labels, labels, values, scale, tips, row_edges=edges, column_edges=edges)


# Adapters up to which every cell of a matrix shows its number: 8 cells of 40 pixels are 320 pixels wide.
WRITTEN = 8
MATRIX, MAP = 330.0, 620.0  # width and height in pixels of the cells of a matrix, and of the map of families
ROW = 12.7  # pixels of a row that has a label
# The colours of the map of conflicts reach at least this cosine, and at least so many standard deviations from chance:
# a cosine of 0.01 must not look like a conflict.
LEAST = 0.2
SPREADS = 4


def pairwise_figure(
    labels: Sequence[str], pairs: Pairwise, energy: Interference, order: Sequence[int], sides: Sequence[Side]
) -> Figure:
    """Draw matrices of cosine, φ and shared initialisation, and below them two maps of interference.

    Parameters
    ----------
    labels : sequence of str
        Names of the adapters; long ones are shortened.
    pairs : Pairwise
    energy : Interference
        The interference in the same modules.
    order : sequence of int
        The adapters in an order in which similar ones stand side by side.
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
    spread = float(pairs.spreads.max()) if len(pairs.modules) else 0.0
    shared, worst = shared_energy_map(labels, pairs, energy, order), conflict_map(labels, pairs)
    return Figure(
        f"{len(labels)} adapters in pairs, clustered by 1 − |cosine| (average linkage)",
        [
            Band(pair_matrices(labels, pairs, order, sides)),
            Band([shared], "shared energy: part of ‖ΔW‖² inside the directions of all others, both sides"),
            Band([worst], f"lowest cosine of any two adapters in each module (chance 0 ± {spread:.1g})"),
        ],
    )


def pair_matrices(labels: Sequence[str], pairs: Pairwise, order: Sequence[int], sides: Sequence[Side]) -> list[HeatMap]:
    """Draw matrices of the cosine of ΔW, of φ and of the cosine of A, with similar adapters side by side."""
    shown = [("cosine of ΔW", pairs.cosine, cosine_scale("cosine"))]
    for side in sides:
        # The diagonal compares each adapter with itself, where there is no chance.
        off = pairs.chance(side)[~np.eye(pairs.count, dtype=bool)]
        level = [float(off[np.isfinite(off)].mean())] if np.isfinite(off).any() else []
        shown.append((f"φ, {side} side", pairs.phi(side), ColourScale(0.0, 1.0, "φ", fixed(".2f"), chance=level)))
    shown.append(("cosine of A", pairs.shared_initialisation, cosine_scale("cosine of A: one initialisation?")))
    names = [labels[i] for i in order]
    return [
        _matrix(title, values[np.ix_(order, order)], names, scale, MATRIX, written=len(names) <= WRITTEN)
        for title, values, scale in shown
    ]


def cosine_scale(label: str) -> ColourScale:
    """Return the colour scale of cosines from −1 to 1."""
    return ColourScale(-1.0, 1.0, label, fixed("+.2f"), diverging=True, chance=[0.0])


def _matrix(
    title: str, values: Floats, names: Sequence[str], scale: ColourScale, room: float, *, written: bool = False,
    edges: Sequence[int] = (),
) -> HeatMap:  # fmt: skip
    tips = {
        (i, j): (f"{names[i]} and {names[j]}", f"{title} {values[i, j]:.3f}")
        for i, j in np.argwhere(np.isfinite(values)).tolist()
    }
    # Numbers of two digits are wider than the columns of many adapters.
    numbers = [str(i + 1) if len(names) <= 12 or i % 5 == 4 else "" for i in range(len(names))]
    return HeatMap(
        title, _numbered(names, room), numbers, values, scale, tips, written=written, room=room, row_edges=edges,
        column_edges=edges,
    )  # fmt: skip


def _numbered(names: Sequence[str], room: float) -> list[str]:
    """The labels of the rows: names with the numbers of the columns, as many as fit."""
    return thin([f"{fit_name(name)} {i}" for i, name in enumerate(names, start=1)], int(room / ROW))


def shared_energy_map(labels: Sequence[str], pairs: Pairwise, energy: Interference, order: Sequence[int]) -> HeatMap:
    """Draw each adapter's share of ‖ΔW‖² in the directions of all others, as the mean over each block."""
    grid = Grid.of(module.name for module in pairs.modules)
    flat = grid.across == "module"
    places = [module.name if flat else block(module.name) for module in pairs.modules]
    members = [[m for m, place in enumerate(places) if place == column] for column in grid.blocks]
    values = np.array([known_mean(energy.shared[rows]) for rows in members]).reshape(len(members), -1).T[list(order)]
    chance = known_mean(energy.shared_chance[np.isfinite(energy.shared_chance)]) if energy.shared_chance.size else 0.0
    tips = {
        (i, j): (labels[order[i]], f"{'module' if flat else 'block'} {grid.columns[j]}: {percent(values[i, j])} shared")
        for i, j in np.argwhere(np.isfinite(values)).tolist()
    }
    # The level of chance must be on the scale, and not at its end.
    level = float(chance) if np.isfinite(chance) else 0.0
    top = min(max([*values[np.isfinite(values)].tolist(), 2 * level, 0.01]), 1.0)
    scale = ColourScale(0.0, top, "shared energy", percent, chance=[level])
    return HeatMap(
        "", _numbered([labels[t] for t in order], MATRIX), grid.labels, values, scale, tips, grid.across,
        column_edges=grid.starts[1:],
    )  # fmt: skip


def conflict_map(labels: Sequence[str], pairs: Pairwise) -> HeatMap:
    """Draw the most negative cosine of any two adapters, by kind and block."""
    values, tips = {}, {}
    first, second = np.triu_indices(pairs.count, 1)
    for module, cosines in zip(pairs.modules, pairs.cosines[:, first, second], strict=True):
        # A cosine is NaN where one of the two adapters lacks the module, or its ΔW is 0.
        if np.isfinite(cosines).any():
            k = int(np.nanargmin(cosines))
            values[module.name] = float(cosines[k])
            tips[module.name] = f"cosine {signed(cosines[k])} of {labels[first[k]]} and {labels[second[k]]}"
    spread = float(pairs.spreads.max()) if len(pairs.modules) else 0.0
    most = min(max([*map(abs, values.values()), SPREADS * spread, LEAST]), 1.0)
    scale = ColourScale(-most, most, "cosine", fixed("+.3f"), diverging=True, chance=[0.0])
    grid = Grid.of(module.name for module in pairs.modules)
    note = "a cell: the least of its modules"
    return grid.heat("", values, scale, gather=min, tip=tips.__getitem__, note=note)


def family_map(names: Sequence[str], cosines: Floats, starts: Sequence[int]) -> HeatMap:
    """Draw the cosines of adapters, shape (n, n), in order of their families, which begin at ``starts``."""
    return _matrix("cosine of every pair", cosines, names, cosine_scale("cosine of ΔW"), MAP, edges=starts)
