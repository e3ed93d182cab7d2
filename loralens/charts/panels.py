"""Panels: one for each kind of module, side by side on axes that all share."""

from collections.abc import Callable, Sequence
from math import ceil

from matplotlib.axes import Axes
from matplotlib.figure import SubFigure

from loralens.charts.figure import fit

TITLE = 30  # letters


def kind_panels(part: SubFigure, kinds: Sequence[str], columns: int, draw: Callable[[Axes, int], None]) -> list[Axes]:
    """A panel for each kind, ``columns`` in a row, each drawn by ``draw`` from its place in ``kinds``."""
    grid = part.add_gridspec(ceil(len(kinds) / columns), columns)
    panels: list[Axes] = []
    for i, name in enumerate(kinds):
        first = panels[0] if panels else None
        axes = part.add_subplot(grid[i // columns, i % columns], sharex=first, sharey=first)
        draw(axes, i)
        axes.set_title(fit(name, TITLE), parse_math=False)
        axes.tick_params(which="both", labelleft=i % columns == 0, labelbottom=i + columns >= len(kinds))
        panels.append(axes)
    return panels


def counts(most: int) -> list[int]:
    """Round numbers from 1 to ``most`` for an axis, about five."""
    step = next((2**k for k in range(32) if most <= 4 * 2**k), most)
    return sorted({1, *range(step, most + 1, step)})
