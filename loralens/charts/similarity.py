"""φ(i, j) of two adapters, as the LoRA paper draws it (Figures 3, 4, 6 and 7), and every module at a glance."""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure, SubFigure

from loralens.analysis.compare.pairwise import Of
from loralens.analysis.compare.similarity import Comparison, Similarity
from loralens.charts.figure import EMPTY, fit, settle, styled
from loralens.charts.heat_map import COLOURS, colour_top, draw_phi, phi_bar
from loralens.charts.sheet import LETTER, NAME, TICKS, WIDE, Column, block_names, block_order, thin
from loralens.core.lazy import Array
from loralens.core.names import Block, block, kind, natural_key
from loralens.linalg.chance import overlap_chance

BLOCKS = 8  # rows of heat maps; of more blocks four are shown
FEW = 4
FEWEST = 7  # letters of a kind over a heat map at least
KINDS = 8  # columns of heat maps
GLANCE = 12  # heat maps that are taken in without a map of all of them
WHOSE = {"update": "ΔW", "A": "A", "B": "B"}  # as the title has it


class Grid(NamedTuple):
    """Modules laid out: blocks (or modules) down, kinds across; of several in one cell the first."""

    places: Sequence[Column]
    kinds: Sequence[str]
    cells: Mapping[tuple[Column, str], Similarity]

    @property
    def stacks(self) -> list[str]:
        """The stacks of blocks."""
        return list(dict.fromkeys(place.stack for place in self.places if isinstance(place, Block)))

    @property
    def upright(self) -> bool:
        """Whether the places have names, which need more room than numbers."""
        return len(self.stacks) > 1 or any(not isinstance(place, Block) for place in self.places)

    @property
    def names(self) -> dict[Column, str]:
        """What the places are called."""
        return dict(zip(self.places, block_names(self.places), strict=True))

    @property
    def drawn(self) -> list[Similarity]:
        """Of the cells, row by row; those without a module left out."""
        cells = ((place, name) for place in self.places for name in self.kinds)
        return [self.cells[cell] for cell in cells if cell in self.cells]


def similarity_figure(found: Comparison, *, labels: tuple[str, str], of: Of = "update") -> Figure:
    """φ(i, j) of the two adapters on the side asked for: heat maps of some blocks, then one number of every module.

    Above: a heat map for each kind and block, i the leading directions of the first adapter and j those of the
    second; beside them what two random subspaces would give. Of more than 8 blocks four are shown: the first, those at
    one and two thirds, and the last. Below, where some modules have no heat map or more than 12 have one: φ(1, 1) and φ
    of all directions of every module, kinds down and blocks across.

    Parameters
    ----------
    found : Comparison
    labels : tuple of str
        What the two adapters are called.
    of : str
        Whose directions were compared.

    Returns
    -------
    Figure
        At most 8 × 8 heat maps; the title says what was left out.
    """
    modules = {name: one for name, one in found.items() if one.overlap.phi.size}
    whole = _grid(modules)
    shown, notes = _chosen(whole)
    if len(whole.cells) < len(modules):
        notes.append(f"{len(whole.cells)} of {len(modules)} modules: of several of one kind in a block, the first")
    if not modules:
        notes.append("nothing to compare: ΔW is 0 everywhere")
    maps = [one.overlap.phi for one in shown.drawn]
    overview = len(whole.places) > 1 and (len(maps) < len(whole.cells) or len(maps) > GLANCE)
    heights = [1.45 * max(1, len(shown.places)) + 1.0]
    if overview:
        names = LETTER * WIDE if whole.upright else 0.2
        heights.append(2 * (0.25 * max(5, len(whole.kinds)) + 0.3) + 0.4 + names)
    with styled():
        width = _width(max(1, len(shown.kinds)) + 1)
        figure = Figure(figsize=(width, sum(heights)), layout="constrained")
        parts = figure.subfigures(len(heights), 1, squeeze=False, height_ratios=heights)[:, 0]
        parts[0].suptitle("\n".join([_title(found, labels, of), *notes]), parse_math=False)
        if maps:
            _maps(parts[0], shown, whole, colour_top(maps))
        if overview:
            _overview(parts[1], whole)
    return settle(figure)


def _width(columns: int) -> float:
    """Inches of a figure with so many heat maps side by side."""
    return min(13.0, max(1.5 * columns + 1.2, 6.5))


def _title(found: Comparison, labels: tuple[str, str], of: Of) -> str:
    side = next((one.side for one in found.modules.values()), "in")
    first, second = (fit(label, 60) for label in labels)
    return f"{side} side of {WHOSE[of]}: directions i of {first}\nand j of {second}"


def _grid(modules: Mapping[str, Similarity]) -> Grid:
    places: dict[str, Column] = {name: block(name) for name in modules}
    if not any(places.values()):
        places = {name: name for name in modules}
    cells: dict[tuple[Column, str], Similarity] = {}
    for name, one in modules.items():
        cells.setdefault((places[name], kind(name)), one)
    blocks = sorted({place for place in places.values() if isinstance(place, Block)}, key=block_order)
    others = [place for place in dict.fromkeys(places.values()) if not isinstance(place, Block)]
    return Grid([*blocks, *others], sorted({name for _, name in cells}, key=natural_key), cells)


def _chosen(whole: Grid) -> tuple[Grid, list[str]]:
    """The part of a grid that fits into a figure, and in words what that leaves out."""
    places, notes = list(whole.places), []
    if len(places) > BLOCKS:
        places = [places[int(i)] for i in np.linspace(0, len(places) - 1, FEW)]
        notes.append(f"{FEW} of {len(whole.places)} blocks, evenly spaced (--modules picks others)")
    kinds = [name for name in whole.kinds if any((place, name) in whole.cells for place in places)][:KINDS]
    if len(kinds) < len(whole.kinds):
        notes.append(f"{len(kinds)} of {len(whole.kinds)} kinds (--modules picks others)")
    return Grid(places, kinds, whole.cells), notes


def _maps(part: Figure | SubFigure, shown: Grid, whole: Grid, top: float) -> None:
    """A heat map for each block and kind, and what chance gives in a column of its own."""
    rows, columns = len(shown.places), len(shown.kinds) + 1
    room = int((_width(columns) - 1.2) / columns / LETTER)  # letters of a title; the colour bar takes an inch
    grid, names = part.subplots(rows, columns, squeeze=False), whole.names
    for i, place in enumerate(shown.places):
        row = [whole.cells.get((place, name)) for name in shown.kinds]
        where = ("" if whole.upright else "block ") + names[place]
        for j, one in enumerate(row):
            _map(grid[i, j], one, f"{fit(shown.kinds[j], max(room - len(where) - 2, FEWEST))}, {where}", top)
        _chance_map(grid[i, -1], next((one for one in row if one), None), top)
    for axes in grid[-1]:
        axes.set_xlabel("j")
    for axes in grid[:, 0]:
        axes.set_ylabel("i", rotation=0, labelpad=8)
    levels = [level for one in shown.drawn for level in (1 / one.overlap.n, one.overlap.full_chance)]
    phi_bar(part, list(grid.ravel()), top, (min(levels), max(levels)), "φ(i, j)")


def _map(axes: Axes, one: Similarity | None, title: str, top: float) -> None:
    if one is None:
        axes.set_axis_off()
        return
    draw_phi(axes, one.overlap.phi, top)
    k1, k2 = one.overlap.phi.shape
    axes.set_title(
        f"{title}\nφ(1,1) {one.overlap.first:.2f}, φ({k1},{k2}) {one.overlap.full:.2f}", fontsize=6.5, parse_math=False
    )


def _chance_map(axes: Axes, one: Similarity | None, top: float) -> None:
    """max(i, j)/n in the same colours."""
    if one is None:
        axes.set_axis_off()
        return
    (k1, k2), n = one.overlap.phi.shape, one.overlap.n
    draw_phi(axes, overlap_chance(k1, k2, n), top)
    axes.set_title(f"chance in {n} dimensions\nφ(1,1) {1 / n:.2g}, φ({k1},{k2}) {max(k1, k2) / n:.2g}", fontsize=6.5)


def _overview(part: Figure | SubFigure, whole: Grid) -> None:
    """φ(1, 1) and φ of all directions of every module: kinds down, blocks across."""
    grid = part.subplots(2, 1)
    overlaps = [one.overlap for one in whole.cells.values()]
    for axes, word, pick, levels in (
        (grid[0], "φ(1, 1)", "first", [1 / one.n for one in overlaps]),
        (grid[1], "φ of all", "full", [one.full_chance for one in overlaps]),
    ):
        values = np.array(
            [
                [getattr(whole.cells[p, k].overlap, pick) if (p, k) in whole.cells else np.nan for p in whole.places]
                for k in whole.kinds
            ]
        )
        top = colour_top([values])
        _overview_map(axes, values, whole, top)
        phi_bar(part, [axes], top, (min(levels), max(levels)), word)
    grid[0].tick_params(labelbottom=False)
    noun = f"block of {fit(whole.stacks[0], NAME)}" if len(whole.stacks) == 1 else "block" if whole.stacks else "module"
    grid[1].set_xlabel(noun, parse_math=False)


def _overview_map(axes: Axes, values: Array, whole: Grid, top: float) -> None:
    axes.patch.set(**EMPTY)
    masked = np.ma.masked_invalid(values)
    axes.pcolormesh(masked, cmap=COLOURS, vmin=0, vmax=top, edgecolors="white", linewidth=0.4)
    labelled, names = thin(whole.places, TICKS), block_names(whole.places)
    shown = [names[j] for j in labelled]
    axes.set_xticks(np.array(labelled) + 0.5, shown, rotation=90 if whole.upright else 0, parse_math=False)
    axes.set_yticks(np.arange(len(whole.kinds)) + 0.5, [fit(name, NAME) for name in whole.kinds], parse_math=False)
    axes.set(xlim=(0, len(whole.places)), ylim=(len(whole.kinds), 0))
    axes.tick_params(length=2)
