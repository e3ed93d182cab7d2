"""Maps of φ(i, j) of two adapters, as in Figures 3, 4, 6 and 7 of the LoRA paper, and an overview of all modules."""

from collections.abc import Iterable, Mapping, Sequence
from itertools import accumulate, groupby
from math import ceil
from typing import NamedTuple

import numpy as np

from loralens.analysis.nested import Nesting
from loralens.analysis.two_adapters import Comparison, side_of
from loralens.charts.grid import Column, Grid, arithmetic_mean, block_names, block_order, fit_name
from loralens.charts.spec import Band, Cell, ColourScale, Figure, HeatMap, Overlaps
from loralens.choices import Of, Side
from loralens.core.names import Block, block, kind, natural_key
from loralens.errors import OptionError
from loralens.linalg.chance import overlap_chance
from loralens.linalg.subspace import Overlap

# If there are at most BLOCKS blocks, each has a row of heat maps. If there are more, only FEW of them have one.
BLOCKS, FEW = 8, 4
KINDS = 8  # columns of heat maps
GLANCE = 12  # with more heat maps than this, an overview of all modules is added
TITLE = 25  # letters that fit above a heat map
WHOSE = {"update": "ΔW", "A": "A", "B": "B"}  # the matrix whose directions are compared, as the title names it


class PhiMaps(NamedTuple):
    """Heat maps of some modules, with one row per block and one column per kind.

    Attributes
    ----------
    charts : sequence of Overlaps or None
        The maps, row by row; None where a block has no module of a kind.
    names : sequence of str
        The modules that are drawn.
    left_out : sequence of str
        Phrases that say what is not drawn.
    chance : sequence of Overlaps
        The maps that random subspaces would give: one for each width and number of directions that is drawn.
    """

    charts: Sequence[Overlaps | None]
    columns: int
    names: Sequence[str]
    scale: ColourScale
    left_out: Sequence[str]
    chance: Sequence[Overlaps]


def similarity_figure(comparison: Comparison, *, labels: tuple[str, str], of: Of = "update") -> Figure:
    """Draw heat maps of φ(i, j) of two adapters for some blocks, and an overview of all modules.

    There is one heat map per kind and block. Its cell in row i and column j shows φ of the i leading directions of the
    first adapter and the j leading directions of the second. Below them are the maps that two random subspaces would
    give, one for each width n and shape of a map. If there are more than 8 blocks, four evenly spaced ones are shown,
    from the first to the last. If some modules have no heat map, or more than 12 have one, an overview below shows
    φ(1, 1) and φ of all directions of every module, by kind and block.

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
    maps = phi_maps(overlaps)
    title = "\n".join([title, *maps.left_out])
    if maps.columns == 1:
        # Maps of a single kind fill the rows, because one column of them would leave most of a page empty.
        bands = [Band([*maps.charts, *maps.chance], keys=[maps.scale])]
    else:
        bands = [Band(maps.charts, columns=maps.columns), Band(maps.chance, "by chance alone", [maps.scale])]
    if len(overlaps) > 1 and (len(maps.names) < len(overlaps) or len(maps.names) > GLANCE):
        bands.append(Band(_overview(overlaps), "every module"))
    return Figure(title, bands)


def colour_top(values: Iterable[float]) -> float:
    """Return the end of the colour scale: the largest φ drawn, rounded up to a tenth, and at least 0.1."""
    largest = max((value for value in values if np.isfinite(value)), default=0.0)
    # The tolerance keeps 0.3 with its rounding error from becoming 0.4.
    return min(1.0, max(0.1, ceil(10 * largest - 1e-9) / 10))


def phi_maps(
    overlaps: Mapping[str, Overlap],
    *,
    numbers: Mapping[str, int] | None = None,
    blocks: int = BLOCKS,
    widest: int | None = None,
) -> PhiMaps:
    """Draw heat maps of φ(i, j) for some blocks and all kinds, on one scale.

    Parameters
    ----------
    overlaps : mapping of str to Overlap
    numbers : mapping of str to int, optional
        The numbers of the modules on a page.
    blocks : int
        The largest number of blocks that are all drawn. If there are more, four evenly spaced ones are drawn.
    widest : int, optional
        The largest number of directions that a heat map shows.
    """
    cells: dict[tuple[Column, str], str] = {}
    in_blocks = any(map(block, overlaps))
    for name in overlaps:
        # Of several modules of one kind in a block, the first is drawn. Without blocks every module has its own row.
        cells.setdefault((block(name) if in_blocks else name, kind(name)), name)
    places = list(dict.fromkeys(place for place, _ in cells))
    # Modules outside any block follow after the blocks; without blocks all keep the order of the file.
    places.sort(key=lambda place: (0, *block_order(place)) if isinstance(place, Block) else (1, "", 0))
    kinds = sorted({name for _, name in cells}, key=natural_key)
    names, left_out = dict(zip(places, block_names(places), strict=True)), []
    drawn = list(places)
    if len(places) > blocks:
        drawn = [places[int(i)] for i in np.linspace(0, len(places) - 1, FEW)]
        left_out.append(f"{FEW} of {len(places)} blocks, evenly spaced (--modules picks others)")
    chosen = [name for name in kinds if any((place, name) in cells for place in drawn)][:KINDS]
    if len(chosen) < len(kinds):
        left_out.append(f"{len(chosen)} of {len(kinds)} kinds (--modules picks others)")
    if len(cells) < len(overlaps):
        left_out.append(f"{len(cells)} of {len(overlaps)} modules: the first of each kind in a block")
    rows = [[cells.get((place, word)) for word in chosen] for place in drawn]
    shown = [name for row in rows for name in row if name]
    phis = {name: overlaps[name].phi[:widest, :widest] for name in shown}
    levels = [level for name in shown for level in (1 / overlaps[name].n, overlaps[name].full_chance)]
    top = colour_top(float(phi.max()) for phi in phis.values())
    scale = ColourScale(0.0, top, "φ(i, j)", chance=levels, form=".2f")
    charts: list[Overlaps | None] = []
    for place, row in zip(drawn, rows, strict=True):
        # A single row of modules outside any block needs no name.
        suffix = f", {names[place]}" if len(places) > 1 else ""
        suffix = f", block {names[place]}" if isinstance(place, Block) else suffix
        for module in row:
            if module is None:
                charts.append(None)
                continue
            overlap, own = overlaps[module], [numbers[module]] if numbers else ()
            title = fit_name(kind(module), max(TITLE - len(suffix), 7)) + suffix
            notes = [f"φ(1,1) {overlap.first:.2f}", f"all {overlap.full:.2f} (chance {overlap.full_chance:.2g})"]
            charts.append(Overlaps(title, phis[module].tolist(), scale, notes, own))
    # A map of chance depends only on n and the shape, so there is one for each of these and not one for each module.
    by_shape = {(overlaps[name].n, phis[name].shape): overlaps[name] for name in shown}
    chance = [_chance_map(overlap, scale, widest) for overlap in by_shape.values()]
    return PhiMaps(charts, len(chosen), shown, scale, left_out, chance)


def _chance_map(overlap: Overlap, scale: ColourScale, widest: int | None) -> Overlaps:
    """The map that random subspaces would give, max(i, j)/n, in the same colours."""
    (k1, k2), n = overlap.phi.shape, overlap.n
    notes = [f"φ(1,1) {1 / n:.2g}", f"all {max(k1, k2) / n:.2g}"]
    return Overlaps(f"chance, n = {n}", overlap_chance(k1, k2, n)[:widest, :widest].tolist(), scale, notes)


def _overview(overlaps: Mapping[str, Overlap]) -> list[HeatMap]:
    """Maps of φ(1, 1) and of φ of all directions of every module, by kind and block."""
    grid = Grid.of(overlaps)
    note = "a cell: the mean of its modules" if grid.fullest > 1 else ""
    first = {name: overlap.first for name, overlap in overlaps.items()}
    full = {name: overlap.full for name, overlap in overlaps.items()}
    first_chance = [1 / overlap.n for overlap in overlaps.values()]
    full_chance = [overlap.full_chance for overlap in overlaps.values()]
    maps = []
    for title, values, chance in (("φ(1, 1)", first, first_chance), ("φ of all directions", full, full_chance)):
        scale = ColourScale(0.0, colour_top(values.values()), title, chance=chance, form=".2f")
        maps.append(grid.heat(title, values, scale, gather=arithmetic_mean, note=note))
    return maps


WIDTHS = 3  # widths in a figure, those with the most modules


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
    names, count = nesting.names, len(nesting.names)
    # Two symmetric maps in one: both depend on the pair and not on its order, so one triangle of each is enough.
    values = np.where(np.triu(np.ones_like(nesting.full), 1) > 0, nesting.full, nesting.first)
    np.fill_diagonal(values, np.nan)
    words = ("φ(1, 1)", "φ of all directions")
    cells = {
        (i, j): Cell(float(values[i, j]), f"{names[i]} and {names[j]}: {words[i < j]} {values[i, j]:.2f}")
        for i, j in np.argwhere(np.isfinite(values)).tolist()
    }
    # Modules in which ΔW is 0 have no level of chance.
    chance = nesting.chance[~np.isnan(nesting.chance)].tolist()
    top = colour_top(cell.value for cell in cells.values())
    scale = ColourScale(0.0, top, "φ of all above, φ(1, 1) below the diagonal", chance=chance, form=".2f")
    labels, edges = _groups(names)
    title = f"{count} modules of width {nesting.width}"
    return HeatMap(
        title, names, names, cells, scale, row_labels=labels, column_labels=labels, row_edges=edges, column_edges=edges
    )


def _groups(names: Sequence[str]) -> tuple[list[str], list[int]]:
    """A label for each module, and the places where the second and further kinds begin.

    The label of the middle module of a kind is the name of the kind. All other labels are empty.
    """
    labels, sizes = [""] * len(names), list[int]()
    for label, group in groupby(names, kind):
        members = list(group)
        numbers = [home.number for name in members if (home := block(name))]
        blocks = f" {numbers[0]}–{numbers[-1]}" if len(numbers) > 1 else ""
        labels[sum(sizes) + (len(members) - 1) // 2] = fit_name(label, 20) + blocks
        sizes.append(len(members))
    return labels, [*accumulate(sizes)][:-1]
