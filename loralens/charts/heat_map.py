"""Heat maps of φ in [0, 1] under one colour bar, on which the chance level is marked."""

from collections.abc import Iterable, Sequence
from math import ceil

import numpy as np
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.colors import Normalize
from matplotlib.figure import Figure, SubFigure

from loralens.core.lazy import Array

COLOURS = "viridis"
CHANCE = "#D55E00"  # vermilion: not among the colours of the map, and told from them by colour-blind eyes


def colour_top(maps: Iterable[Array]) -> float:
    """Where the colours end: the largest φ drawn, rounded up to a tenth, of which there is one at least."""
    largest = max((float(np.nanmax(one)) for one in maps if np.isfinite(one).any()), default=0.0)
    return min(1.0, max(0.1, ceil(10 * largest - 1e-9) / 10))


def draw_phi(axes: Axes, phi: Array, top: float) -> None:
    """φ(i, j): i, the directions of the first, downwards, and j, those of the second, to the right, from 1."""
    k1, k2 = phi.shape
    edges = np.arange(k2 + 1) + 0.5, np.arange(k1 + 1) + 0.5
    axes.pcolormesh(*edges, phi, cmap=COLOURS, vmin=0, vmax=top, rasterized=phi.size > 1024)
    axes.set(xlim=(0.5, k2 + 0.5), ylim=(k1 + 0.5, 0.5), xticks=ticks(k2), yticks=ticks(k1))
    axes.tick_params(length=2)


def ticks(count: int) -> list[int]:
    """1, the last, and at most three round numbers between."""
    step = max(1, 2 ** ceil(np.log2(count / 4))) if count > 1 else 1
    inner = [i for i in range(step, count, step) if count - i >= step / 2 and (i - 1 >= step / 2 or i == 1)]
    return sorted({1, *inner, count})


def phi_bar(
    part: Figure | SubFigure, axes: Sequence[Axes], top: float, chance: tuple[float, float], label: str
) -> None:
    """The colour bar of all ``axes``; vermilion lines mark the chance level, or both ends of its range."""
    scale = ScalarMappable(Normalize(0, top), COLOURS)
    between = f"{chance[0]:.2g}" if chance[0] == chance[1] else f"{chance[0]:.2g} to {chance[1]:.2g}"
    bar = part.colorbar(scale, ax=list(axes), pad=0.01, fraction=0.04, aspect=30)
    bar.set_label(f"{label}\nred: chance {between}", fontsize=7)
    for level in set(chance):
        bar.ax.axhline(level, color=CHANCE, linewidth=1.5)
