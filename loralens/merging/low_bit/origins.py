"""The origins of merged codes: the codes of the base from which the adapter and the seed lead to them.

A merge moves a code by z = ⌊y + u⌋ steps, and both the update and u can be computed again. On a grid of equal steps y
does not depend on the code, so its origin is the code minus z. Only at the ends of the grid, where moves are clipped,
several codes have the same end. Between the unequal steps of a table y depends on the code of the base. There every
code that could lead to the merged one is tried.

All arithmetic is elementwise in float64 on exact products, so origins are the same on every machine.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import final

import numpy as np
from numpy.typing import NDArray

from loralens.core.weights import Codes, GridRows
from loralens.linalg.exact import Singles
from loralens.linalg.factor import Floats
from loralens.merging.low_bit.apply import CodesMerge
from loralens.merging.low_bit.stochastic import asked_moves, has_equal_levels, move_codes, whole_steps
from loralens.merging.matrix import cuts

# Entries whose origins are searched at a time: with 256 codes and as many distances, this takes a few MiB.
SEARCHED = 1 << 13
# The limits of y are computed with rounding errors of float64, which are far below this.
SLACK = 1e-6


@final
@dataclass(frozen=True, slots=True)
class Origins:
    """The codes from which a merge leads to the codes of some rows.

    Attributes
    ----------
    nearest : int16 array, shape (rows, columns)
        The nearest origin of every entry; the merged code itself where there is none.
    several, none : int
        The numbers of entries to which several codes lead, and to which no code leads.
    """

    nearest: Codes
    several: int
    none: int


def blocks_of_origins(merge: CodesMerge) -> Iterator[tuple[int, Codes, Origins | None]]:
    """The first row, the merged codes and the origins of every block of a weight; None where nothing was added.

    ``merge`` is the merge that drew the codes, with the merged weight in place of that of the base.
    """
    assert merge.weight.grid is not None
    for start, stop, slab in cuts(merge.plan):
        grid = merge.weight.grid(start, stop)
        if slab is None:
            yield start, grid.codes, None
        else:
            D = merge.added(slab, start, stop, grid)
            yield start, grid.codes, find_origins(grid, D, merge.uniform(start, grid.codes.shape))


def find_origins(merged: GridRows, D: Singles, uniform: Floats) -> Origins:
    """The origins of some rows.

    Parameters
    ----------
    merged : GridRows
        The rows of the merged weight.
    D : float32 array
        What the merge added to them, whatever their codes were.
    uniform : float64 array
        The numbers u of the draws, in the shape of the rows.

    Raises
    ------
    FormatError
        The update holds NaN or Inf.
    """
    return _without_search(merged, D, uniform) if merged.levels is None else _search(merged, D, uniform)


def _without_search(merged: GridRows, D: Singles, uniform: Floats) -> Origins:
    """The origins on a grid of equal steps, where the steps of an entry do not depend on its code."""
    codes = merged.codes
    steps = whole_steps(asked_moves(merged, D), uniform, limit=merged.highest - merged.lowest + 1)
    nearest = codes - steps
    # An end of the grid is reached from itself, and from all codes that are at most these steps away.
    at_end = ((codes == merged.highest) & (steps > 0)) | ((codes == merged.lowest) & (steps < 0))
    nearest[at_end] = codes[at_end]
    outside = (nearest < merged.lowest) | (nearest > merged.highest)
    nearest[outside] = codes[outside]
    return Origins(nearest, int(np.count_nonzero(at_end)), int(np.count_nonzero(outside)))


def _search(merged: GridRows, D: Singles, uniform: Floats) -> Origins:
    """The origins on a grid of a table: codes that are near enough are moved as the merge moved them."""
    assert merged.levels is not None
    codes, u = merged.codes.reshape(-1), uniform.reshape(-1)
    least, most = _range_of_steps(merged, merged.levels, D, u)
    # All other entries stayed where they were.
    places = np.flatnonzero((least < 0) | (most > 0))
    # A move that ends beyond a gap of 0 takes one step more.
    further = 1 if has_equal_levels(merged.levels) else 0
    nearest, several, none = codes.copy(), 0, 0
    for part in (places[first : first + SEARCHED] for first in range(0, len(places), SEARCHED)):
        lowest, highest = -most[part] - further, further - least[part]
        # The nearest first, so that the first one that leads to the code is the one to take.
        distances = np.array(sorted(range(int(lowest.min()), int(highest.max()) + 1), key=abs), np.int16)
        leads = np.zeros((len(distances), len(part)), np.bool_)
        for row, distance in zip(leads, distances, strict=True):
            near = np.flatnonzero((lowest <= distance) & (distance <= highest))
            row[near] = _leads_back(*_entries(merged, D, part[near]), distance, u[part[near]][None])
        counts = np.count_nonzero(leads, axis=0)
        nearest[part] += np.where(counts > 0, distances[leads.argmax(axis=0)], 0).astype(np.int16)
        several += int(np.count_nonzero(counts > 1))
        none += int(np.count_nonzero(counts == 0))
    return Origins(nearest.reshape(merged.codes.shape), several, none)


def _range_of_steps(
    merged: GridRows, levels: Singles, D: Singles, u: Floats
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """The least and the most steps that every entry can have moved, flat; moves across a gap of 0 are not counted."""
    moves = asked_moves(replace(merged, levels=None), D).reshape(-1)
    gaps = np.diff(levels.astype(np.float64))
    smallest, size = gaps[gaps > 0].min(), merged.highest - merged.lowest
    least = np.floor(np.minimum(moves, 0) / smallest - SLACK + u)
    most = np.floor(np.maximum(moves, 0) / smallest + SLACK + u)
    return np.clip(least, -size, 0).astype(np.int64), np.clip(most, 0, size).astype(np.int64)


def _entries(merged: GridRows, D: Singles, places: NDArray[np.int64]) -> tuple[GridRows, Singles]:
    """Some entries as one row, in which each of them is a group of its own."""
    row, column = np.divmod(places, merged.codes.shape[1])
    group = merged.group_of_column[column]
    offset = None if merged.offset is None else merged.offset[row, group][None]
    grid = GridRows(
        merged.codes[row, column][None],
        merged.step[row, group][None],
        offset,
        np.arange(len(places)),
        merged.lowest,
        merged.highest,
        merged.levels,
    )
    return grid, D[row, column][None]


def _leads_back(merged: GridRows, D: Singles, distance: np.int16, u: Floats) -> NDArray[np.bool_]:
    """Whether the code at this distance from the merged one exists and is moved to it; shape (1, n)."""
    codes = merged.codes + distance
    inside = (codes >= merged.lowest) & (codes <= merged.highest)
    grid = replace(merged, codes=np.clip(codes, merged.lowest, merged.highest))
    return np.asarray(inside & (move_codes(grid, asked_moves(grid, D), u).codes == merged.codes))
