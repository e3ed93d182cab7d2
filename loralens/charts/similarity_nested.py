"""The modules of one adapter against each other: φ of all their directions, kind by kind."""

from collections.abc import Sequence
from itertools import accumulate, groupby

import numpy as np

from loralens.analysis.compare.nested import Nesting
from loralens.analysis.compare.pairwise import Of, Side
from loralens.analysis.compare.similarity import side_of
from loralens.charts.names import fit
from loralens.charts.similarity import WHOSE, colour_top
from loralens.charts.spec import Band, Cell, Figure, Heat, Scale
from loralens.core.names import block, kind
from loralens.errors import OptionError

WIDTHS = 3  # groups of one width in a figure


def nesting_figure(nestings: Sequence[Nesting], *, label: str, of: Of = "update", side: Side | None = None) -> Figure:
    """φ of all directions of every module against every other of the same width; blocks in order within each kind.

    Above the diagonal φ of all directions, below it φ(1, 1), in the same colours. The three widths of most modules are
    drawn. ``of`` and ``side`` are those that the nesting was measured for.

    Raises
    ------
    OptionError
        No two modules of one width, or a side that A or B has not.
    """
    several = [one for one in nestings if len(one.names) > 1]
    if not several:
        raise OptionError("no two modules are of one width", fix="choose more of them with --modules")
    drawn = several[:WIDTHS]
    note = f"\n{len(drawn)} of {len(several)} widths" if len(drawn) < len(several) else ""
    title = f"{fit(label, 70)}: {side_of(of, side)} side of {WHOSE[of]}{note}"
    return Figure(title, [Band([nesting_map(one)]) for one in drawn])


def nesting_map(nesting: Nesting) -> Heat:
    """φ of all directions above the diagonal, φ(1, 1) below it; the diagonal, which is 1, left blank."""
    names, count = nesting.names, len(nesting.names)
    values = np.where(np.triu(np.ones_like(nesting.full), 1) > 0, nesting.full, nesting.first)
    words = ("φ(1, 1)", "φ of all directions")
    cells = {
        (i, j): Cell(float(values[i, j]), f"{names[i]} and {names[j]}: {words[i < j]} {values[i, j]:.2f}")
        for i in range(count)
        for j in range(count)
        if i != j and np.isfinite(values[i, j])
    }
    known = nesting.chance[~np.isnan(nesting.chance)]
    low, high = (float(known.min()), float(known.max())) if known.size else (0.0, 0.0)
    top = colour_top(cell.value for cell in cells.values())
    scale = Scale(0.0, top, "φ of all above, φ(1, 1) below the diagonal", chance=low, chance_high=high, form=".2f")
    labels, edges = _groups(names)
    title = f"{count} modules of width {nesting.width}"
    return Heat(
        title, names, names, cells, scale, row_labels=labels, column_labels=labels, row_edges=edges, column_edges=edges
    )


def _groups(names: Sequence[str]) -> tuple[list[str], list[int]]:
    """The name of each kind in the middle of its modules, and where the next kind begins."""
    labels, sizes = [""] * len(names), list[int]()
    for label, group in groupby(names, kind):
        members = list(group)
        numbers = [home.number for name in members if (home := block(name))]
        blocks = f" {numbers[0]}–{numbers[-1]}" if len(numbers) > 1 else ""
        labels[sum(sizes) + (len(members) - 1) // 2] = fit(label, 20) + blocks
        sizes.append(len(members))
    return labels, [*accumulate(sizes)][:-1]
