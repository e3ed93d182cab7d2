"""A map of the families of a fleet: the cosines of their adapters, with the families side by side."""

from collections.abc import Sequence

from loralens.charts.names import fit_name
from loralens.charts.spec import Cell, ColourScale, HeatMap
from loralens.linalg.factor import Floats

MAP = 620.0  # width and height of the cells together, in pixels
LABELLED = 48  # rows up to which each has its name: 620 pixels are then 12.9 pixels for a row, as a line is


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
    every = -(-count // LABELLED)
    numbers = [str(i) for i in range(1, count + 1)]
    labels = [f"{fit_name(name)} {i + 1}" if i % every == 0 else "" for i, name in enumerate(names)]
    # Numbers of two digits are wider than the columns of many adapters.
    across = 5 if count > 20 else 1
    return HeatMap(
        "cosine of every pair", [fit_name(name) for name in names], numbers, cells, scale, room=MAP,
        row_labels=labels, column_labels=["" if i % across else str(i) for i in range(1, count + 1)],
        row_edges=list(starts), column_edges=list(starts),
    )  # fmt: skip
