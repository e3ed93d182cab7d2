"""Maps of φ between the modules of one adapter, ordered by kind."""

from collections.abc import Sequence
from itertools import accumulate, groupby

import numpy as np

from loralens.analysis.compare.nested import Nesting
from loralens.analysis.compare.similarity import side_of
from loralens.charts.names import fit_name
from loralens.charts.similarity import WHOSE, colour_top
from loralens.charts.spec import Band, Cell, ColourScale, Figure, HeatMap
from loralens.choices import Of, Side
from loralens.core.names import block, kind
from loralens.errors import OptionError

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
    """Labels with the name of each kind at the middle one of its modules, and the places where the next kinds begin."""
    labels, sizes = [""] * len(names), list[int]()
    for label, group in groupby(names, kind):
        members = list(group)
        numbers = [home.number for name in members if (home := block(name))]
        blocks = f" {numbers[0]}–{numbers[-1]}" if len(numbers) > 1 else ""
        labels[sum(sizes) + (len(members) - 1) // 2] = fit_name(label, 20) + blocks
        sizes.append(len(members))
    return labels, [*accumulate(sizes)][:-1]
