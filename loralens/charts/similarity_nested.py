"""The modules of one adapter against each other: φ of all their directions, kind by kind."""

from collections.abc import Sequence
from itertools import groupby

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from loralens.analysis.compare.nested import Nesting
from loralens.analysis.compare.pairwise import Of, Side
from loralens.analysis.compare.similarity import side_of
from loralens.charts.figure import fit, settle, styled
from loralens.charts.heat_map import COLOURS, colour_top, phi_bar
from loralens.charts.similarity import WHOSE
from loralens.core.names import block, kind
from loralens.errors import OptionError

WIDTHS = 3  # groups of one width in a figure


def nesting_figure(found: Sequence[Nesting], *, label: str, of: Of = "update", side: Side | None = None) -> Figure:
    """φ of all directions of every module against every other of the same width; blocks in order within each kind.

    Above the diagonal φ of all directions, below it φ(1, 1), each with colours of its own. The three widths of most
    modules are drawn. ``of`` and ``side`` are those that `nesting` was asked for.

    Raises
    ------
    OptionError
        No two modules of one width, or a side that A or B has not.
    """
    several = [one for one in found if len(one.names) > 1]
    if not several:
        raise OptionError("no two modules are of one width", fix="choose more of them with --modules")
    drawn = several[:WIDTHS]
    with styled():
        figure = Figure(figsize=(7.5, 5.4 * len(drawn) + 0.5), layout="constrained")
        note = f"\n{len(drawn)} of {len(several)} widths" if len(drawn) < len(several) else ""
        figure.suptitle(f"{fit(label, 70)}: {side_of(of, side)} side of {WHOSE[of]}{note}", parse_math=False)
        for part, one in zip(figure.subfigures(len(drawn), 1, squeeze=False)[:, 0], drawn, strict=True):
            axes, top = part.subplots(), _top(one)
            _matrix(axes, one, top)
            chance = one.chance[~np.isnan(one.chance)]
            levels = (float(chance.min()), float(chance.max())) if chance.size else (0.0, 0.0)
            phi_bar(part, [axes], top, levels, "φ of all directions above, φ(1, 1) below the diagonal")
            axes.set_title(f"{len(one.names)} modules of width {one.width}")
    return settle(figure)


def _top(one: Nesting) -> float:
    """Where the colours end, the diagonal left out."""
    apart = ~np.eye(len(one.names), dtype=bool)
    return colour_top([one.full[apart], one.first[apart]])


def _matrix(axes: Axes, one: Nesting, top: float) -> None:
    """φ of all directions above the diagonal, φ(1, 1) below it; the diagonal, which is 1, left blank."""
    values = np.where(np.triu(np.ones_like(one.full), 1) > 0, one.full, one.first)
    np.fill_diagonal(values, np.nan)
    masked = np.ma.masked_invalid(values)
    axes.patch.set(facecolor="0.93")
    axes.pcolormesh(masked, cmap=COLOURS, vmin=0, vmax=top, rasterized=values.size > 4096)
    count, start, centres, names = len(one.names), 0, [], []
    for label, members in groupby(one.names, kind):
        blocks = [block(name) for name in members]
        centres.append(start + len(blocks) / 2)
        numbers = [each.number for each in blocks if each]
        names.append(fit(label, 20) + (f"\n{numbers[0]} to {numbers[-1]}" if len(numbers) > 1 else ""))
        start += len(blocks)
        for line in (axes.axvline, axes.axhline):
            line(start, color="white", linewidth=0.8)
    axes.set_xticks(centres, names, parse_math=False, rotation=90 if len(names) > 6 else 0)
    axes.set_yticks(centres, names, parse_math=False)
    axes.set(xlim=(0, count), ylim=(count, 0), aspect="equal")
    axes.tick_params(length=0)
