"""The origins of merged codes: the codes of the base from which the adapter and the seed lead to them.

A merge moves a code by z = ⌊y + u⌋ steps, and both the update and u can be computed again. On a grid of equal steps y
does not depend on the code, so its origin is the code minus z. Only at the ends of the grid, where moves are clipped,
several codes have the same end. Between the unequal steps of a table, and with DoRA, y depends on the code of the base.
There every code that could lead to the merged one is tried.

Where an entry has several origins, they are sorted by their distance from the merged code. The number of the right one
in this order, its *choice*, is all that is missing to restore the base. All arithmetic is elementwise in float64 on
exact products, so origins and choices are the same on every machine.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import NamedTuple, final

import numpy as np
from numpy.typing import NDArray

from loralens.core.few_bits.coded_weight import Codes, GridRows
from loralens.errors import FormatError
from loralens.linalg.factor import Floats
from loralens.merging.low_bit.apply import AddedRows, CodesMerge
from loralens.merging.low_bit.stochastic import (
    HALF,
    asked_moves,
    has_equal_levels,
    move_codes,
    nearest_codes,
    whole_steps,
)
from loralens.merging.matrix import cuts

# Entries whose origins are searched at a time: with 256 codes and as many distances, this takes a few MiB.
SEARCHED = 1 << 13
# The limits of y are computed with rounding errors of float64, which are far below this.
SLACK = 1e-6
# Errors of y with DoRA, as a share of (|W| + |D|)·(1 + |g|)/|d|: W and g·(W + D) are rounded to float32 several times.
ROUNDED = 2.0**-20


@final
@dataclass(frozen=True, slots=True)
class Origins:
    """The codes from which a merge leads to the codes of some rows.

    Attributes
    ----------
    nearest : int16 array, shape (rows, columns)
        The nearest origin of every entry; the merged code itself where there is none.
    places : int64 array, shape (n,)
        The entries with several origins, in order, as indices into the flat rows.
    options : int16 array, shape (n, most)
        The origins of these entries, the nearest first. Those beyond ``counts`` mean nothing.
    counts : int64 array, shape (n,)
        The number of origins of each of them.
    none : int
        The number of entries to which no code leads.
    """

    nearest: Codes
    places: NDArray[np.int64]
    options: Codes
    counts: NDArray[np.int64]
    none: int

    def choices(self, codes: Codes) -> NDArray[np.uint8]:
        """The choice of every entry with several origins, uint8, shape (n,), for the codes of the base.

        Raises
        ------
        FormatError
            A code of the base is not among the origins, so that they cannot restore it.
        """
        wanted = codes.reshape(-1)[self.places]
        hits = (self.options == wanted[:, None]) & self._is_option()
        choices = hits.argmax(axis=1).astype(np.uint8) if self.options.size else np.empty(0, np.uint8)
        # A merge that cannot be repeated would otherwise be found out when the base is needed.
        if not np.array_equal(self.chosen(choices), codes):
            fix = "write a complete undo file: --undo-kind complete"
            raise FormatError("its codes do not follow from the adapter", fix=fix)
        return choices

    def chosen(self, choices: NDArray[np.uint8]) -> Codes:
        """The codes of the base, int16, for the choice of every entry with several origins.

        Raises
        ------
        FormatError
            An entry has fewer origins.
        """
        if (choices >= self.counts).any():
            raise FormatError("chooses a code that does not exist", fix="use another copy of the undo file")
        codes = self.nearest.copy()
        codes.reshape(-1)[self.places] = self.options[np.arange(len(choices)), choices]
        return codes

    def _is_option(self) -> NDArray[np.bool_]:
        return np.asarray(np.arange(self.options.shape[1]) < self.counts[:, None])


def blocks_of_origins(merge: CodesMerge) -> Iterator[tuple[int, Codes, Origins | None]]:
    """The first row, the merged codes and the origins of every block of a weight; None where nothing was added.

    ``merge`` is the merge that moved the codes, with the merged weight in place of that of the base.
    """
    assert merge.weight.grid is not None
    for start, stop, slab in cuts(merge.plan):
        grid = merge.weight.grid(start, stop)
        if slab is None:
            yield start, grid.codes, None
        else:
            added, uniform = merge.added(slab, start, stop), merge.uniform(start, grid.codes.shape)
            yield start, grid.codes, find_origins(grid, added, uniform)


def find_origins(merged: GridRows, added: AddedRows, uniform: Floats | None) -> Origins:
    """The origins of some rows.

    Parameters
    ----------
    merged : GridRows
        The rows of the merged weight.
    added : AddedRows
        What the merge added to them.
    uniform : float64 array or None
        The numbers u of the draws, in the shape of the rows. None: the merge rounded to the nearest code.

    Raises
    ------
    FormatError
        The update holds NaN or Inf.
    """
    if merged.levels is None and added.factors is None:
        return _without_search(merged, added, uniform)
    return _search(merged, added, uniform)


def _without_search(merged: GridRows, added: AddedRows, uniform: Floats | None) -> Origins:
    """The origins on a grid of equal steps, where the steps of an entry do not depend on its code."""
    moves, size = asked_moves(merged, added.product), merged.highest - merged.lowest
    steps = whole_steps(moves, HALF if uniform is None else uniform, limit=size + 1)
    codes = merged.codes
    nearest = codes - steps
    # An end of the grid is reached from itself, and from all codes that are at most these steps away.
    at_end = ((codes == merged.highest) & (steps > 0)) | ((codes == merged.lowest) & (steps < 0))
    nearest[at_end] = codes[at_end]
    outside = (nearest < merged.lowest) | (nearest > merged.highest)
    nearest[outside] = codes[outside]
    places = np.flatnonzero(at_end)
    own, signed = codes.reshape(-1)[places], steps.reshape(-1)[places]
    counts = np.minimum(np.abs(signed), size).astype(np.int64) + 1
    back = np.sign(signed)[:, None] * np.arange(counts.max(initial=1), dtype=np.int16)
    return Origins(nearest, places, own[:, None] - back, counts, int(np.count_nonzero(outside)))


def _search(merged: GridRows, added: AddedRows, uniform: Floats | None) -> Origins:
    """The origins on any grid: codes that are near enough are moved as the merge moved them."""
    codes, u = merged.codes.reshape(-1), None if uniform is None else uniform.reshape(-1)
    least, most = _range_of_steps(merged, added, u)
    equal = merged.levels is not None and has_equal_levels(merged.levels)
    # All other entries stayed where they were. Rounding to the nearest code crosses a gap of 0 with any update.
    places = np.arange(codes.size) if equal and u is None else np.flatnonzero((least < 0) | (most > 0))
    # A move that ends beyond a gap of 0 takes one step more.
    further = 1 if equal else 0
    nearest, none, several = codes.copy(), 0, list[_Several]()
    for part in (places[first : first + SEARCHED] for first in range(0, len(places), SEARCHED)):
        lowest, highest = -most[part] - further, further - least[part]
        distances = np.array(sorted(range(int(lowest.min()), int(highest.max()) + 1), key=abs), np.int16)
        leads = np.zeros((len(distances), len(part)), np.bool_)
        for row, distance in zip(leads, distances, strict=True):
            near = np.flatnonzero((lowest <= distance) & (distance <= highest))
            numbers = None if u is None else u[part[near]][None]
            row[near] = _leads_back(*_entries(merged, added, part[near]), distance, numbers)
        counts = np.count_nonzero(leads, axis=0)
        nearest[part] += np.where(counts > 0, distances[leads.argmax(axis=0)], 0).astype(np.int16)
        none += int(np.count_nonzero(counts == 0))
        more = np.flatnonzero(counts > 1)
        # A stable sort puts the distances that lead to the code first, and keeps their order.
        order = np.argsort(~leads[:, more], axis=0, kind="stable")[: counts.max(initial=1)]
        several.append(_Several(part[more], codes[part[more]][:, None] + distances[order].T, counts[more]))
    return Origins(nearest.reshape(merged.codes.shape), *_joined(several), none)


class _Several(NamedTuple):
    """Places, options and counts of entries, as in `Origins`."""

    places: NDArray[np.int64]
    options: Codes
    counts: NDArray[np.int64]


def _joined(parts: list[_Several]) -> _Several:
    """The entries of all parts; their options are filled up to the same number."""
    most = max((part.options.shape[1] for part in parts), default=1)
    padded = [np.pad(part.options, ((0, 0), (0, most - part.options.shape[1]))) for part in parts]
    return _Several(
        np.concatenate([np.empty(0, np.int64), *(part.places for part in parts)]),
        np.concatenate([np.empty((0, most), np.int16), *padded]),
        np.concatenate([np.empty(0, np.int64), *(part.counts for part in parts)]),
    )


def _range_of_steps(
    merged: GridRows, added: AddedRows, u: Floats | None
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """The least and the most steps that every entry can have moved, flat; moves across a gap of 0 are not counted."""
    even = replace(merged, levels=None)
    if added.factors is None:
        lower = upper = asked_moves(even, added.product)
    else:
        # What DoRA adds is linear in W, so the ends of the grid have the largest moves.
        ends = [replace(merged, codes=np.full_like(merged.codes, end)) for end in (merged.lowest, merged.highest)]
        moves = [asked_moves(even, added.to(end)) for end in ends]
        W = np.maximum(*(np.abs(end.values(end.codes)) for end in ends)).astype(np.float64)
        sums = (W + np.abs(added.product)) * (1 + np.abs(added.factors))
        error = np.abs(asked_moves(even, (sums * ROUNDED).astype(np.float32)))
        lower, upper = np.minimum(*moves) - error, np.maximum(*moves) + error
    least, most = np.minimum(lower, 0).reshape(-1), np.maximum(upper, 0).reshape(-1)
    if merged.levels is not None:
        gaps = np.diff(merged.levels.astype(np.float64))
        smallest = gaps[gaps > 0].min()
        least, most = least / smallest, most / smallest
    size, numbers = merged.highest - merged.lowest, HALF if u is None else u
    least, most = np.floor(least - SLACK + numbers), np.floor(most + SLACK + numbers)
    return np.clip(least, -size, 0).astype(np.int64), np.clip(most, 0, size).astype(np.int64)


def _entries(merged: GridRows, added: AddedRows, places: NDArray[np.int64]) -> tuple[GridRows, AddedRows]:
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
    factors = added.factors
    if factors is not None:
        factors = np.broadcast_to(factors, merged.codes.shape)[row, column][None]
    return grid, AddedRows(added.product[row, column][None], factors)


def _leads_back(merged: GridRows, added: AddedRows, distance: np.int16, u: Floats | None) -> NDArray[np.bool_]:
    """Whether the code at this distance from the merged one exists and is moved to it; shape (1, n)."""
    codes = merged.codes + distance
    inside = (codes >= merged.lowest) & (codes <= merged.highest)
    grid = replace(merged, codes=np.clip(codes, merged.lowest, merged.highest))
    moves = asked_moves(grid, added.to(grid))
    moved = nearest_codes(grid, moves) if u is None else move_codes(grid, moves, u)
    return np.asarray(inside & (moved.codes == merged.codes))
