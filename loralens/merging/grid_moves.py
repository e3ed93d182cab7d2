"""Seeded stochastic rounding of an update on the grid of a coded weight.

The update D asks code c of an entry to move by y steps; y is D/d on a grid with the step d. The code moves by

    z = ⌊y + u⌋,  u uniform in (0, 1),

so E[z] = y: on average all of the update arrives, however small it is beside a step. On a grid with unequal steps (NF4,
FP4), y counts codes: the next level is one step away, whatever the gap. For an entry whose target t lies
between the levels L_i and L_(i+1), the upper code is then taken with the probability (t − L_i)/(L_(i+1) − L_i). A code
that would leave the grid stays at its end.

u comes from Philox by seed, name of the weight and index of the entry, so the codes depend neither on the division
into blocks nor on the number of threads. All arithmetic is elementwise in float64, so the bits are the same on every
machine.

A merge can be traced back, since both the update and u can be computed again. On a grid of equal steps y does not
depend on the code, so the code before is the merged one minus z. Only at the ends of the grid, where moves are clipped,
several codes have the same end. Between the unequal steps of a table y depends on the code of the base. There every
code that could lead to the merged one is tried.

u has 32 bits. The probabilities of small moves need them: trained adapters ask for 0.001 steps on average. With 16
bits, P(move) would be rounded down to a multiple of 1.5e-5. A move of 0.001 would lose 0.8 %, and a move below 1.5e-5
would be lost entirely.
"""

from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from loralens.core.weights import Codes, GridRows
from loralens.errors import FormatError
from loralens.linalg.exact import Singles
from loralens.linalg.factor import Floats
from loralens.linalg.rounding import WIDE_STEPS, Draws

Moved = tuple[Codes, NDArray[np.bool_]]  # codes after a move, and where it ends beyond the grid: they stay at its end
Origins = tuple[Codes, int, int]

# The inverse of a gap between two equal levels (+0 and −0 of FP4): any move across it is longer than the gap.
NO_GAP = 1e300
# The number that takes the place of u where moves are rounded to the nearest step, halves upwards.
HALF = 0.5


def asked_moves(grid: GridRows, D: Singles) -> Floats:
    """The move y that the update D (rows, columns) asks of every code, in steps, float64; 0 where the step is 0.

    Raises
    ------
    FormatError
        D holds NaN or Inf.
    """
    if not np.isfinite(D).all():
        raise FormatError("the update leaves float32", fix="check the adapter's α and scale")
    moves = np.multiply(per_column(_inverse(grid.step), grid), _in_groups(D, grid), dtype=np.float64).reshape(D.shape)
    return moves if grid.levels is None else _along_levels(grid, grid.levels, moves)


def move_codes(grid: GridRows, moves: Floats, uniform: Floats) -> Moved:
    """Move the codes of some rows by z = ⌊y + u⌋; both arrays have the shape of the rows, and y is overwritten."""
    codes, clipped = _clip(grid, whole_steps(grid, moves, uniform))
    levels = grid.levels
    # Where the number stays, so does the code: +0 and −0 of FP4 are two codes of one number.
    if levels is not None and has_equal_levels(levels):
        stays = levels[codes - grid.lowest] == levels[grid.codes - grid.lowest]
        codes = np.where(stays, grid.codes, codes)
    return codes, clipped


def nearest_codes(grid: GridRows, moves: Floats) -> Moved:
    """Move every code to the nearest one, halves upwards. Almost no update is large enough to move one."""
    return _clip(grid, whole_steps(grid, moves.copy(), HALF))


def _clip(grid: GridRows, steps: Codes) -> Moved:
    codes = grid.codes + steps
    clipped = (codes < grid.lowest) | (codes > grid.highest)
    return np.clip(codes, grid.lowest, grid.highest, out=codes), clipped


def has_equal_levels(levels: Singles) -> bool:
    """Whether two codes stand for one number, as +0 and −0 of FP4 do."""
    return bool((levels[1:] == levels[:-1]).any())


def uniform_numbers(draws: Draws, offset: int, count: int) -> Floats:
    """The numbers u of ``count`` entries, beginning with entry ``offset``; float64, in (0, 1)."""
    # Half a step is added to the integers, so that their mean is that of a uniform number.
    uniform = draws.wide_words(offset, count).astype(np.float64)
    uniform += 0.5
    uniform *= 1 / WIDE_STEPS
    return uniform


def whole_steps(grid: GridRows, moves: Floats, uniform: Floats | float) -> Codes:
    """The steps z = ⌊y + u⌋ of every entry, int16, at most one more than the grid has. ``moves`` is overwritten."""
    moves += uniform
    np.floor(moves, out=moves)
    # Moves beyond the grid end at its ends in any case; without a limit they would not fit into 16 bits.
    limit = grid.highest - grid.lowest + 1
    return np.clip(moves, -limit, limit, out=moves).astype(np.int16)


def added_numbers(grid: GridRows, codes: Codes) -> Singles:
    """What the numbers of some rows gain if they have these codes instead, float32; the offsets cancel."""
    if grid.levels is None:
        change = (codes - grid.codes).astype(np.float32)
    else:
        change = grid.levels[codes - grid.lowest] - grid.levels[grid.codes - grid.lowest]
    return np.asarray(_in_groups(change, grid) * per_column(grid.step, grid)).reshape(change.shape)


def group_size(grid: GridRows) -> int | None:
    """The number of columns of every group if all groups are adjacent and of one size, as in most layouts."""
    columns, groups = len(grid.group_of_column), grid.step.shape[1]
    if not groups or columns % groups:
        return None
    size = columns // groups
    return size if np.array_equal(grid.group_of_column, np.arange(columns) // size) else None


def per_column(values: NDArray[np.floating], grid: GridRows) -> NDArray[np.floating]:
    """Values (rows, groups) in a shape that broadcasts with what `_in_groups` returns."""
    # Broadcasting is several times as fast as indexing every column.
    return values[:, :, None] if group_size(grid) else values[:, grid.group_of_column]


def _in_groups(D: NDArray[np.floating], grid: GridRows) -> NDArray[np.floating]:
    """D (rows, columns), with its columns in groups if these are of one size."""
    size = group_size(grid)
    return D.reshape(len(D), -1, size) if size else D


def _inverse(step: Singles) -> Floats:
    """1/d in float64, and 0 where a step is 0, as such weights cannot move."""
    moving = np.isfinite(step) & (step != 0)
    return np.divide(1.0, step, out=np.zeros(step.shape), where=moving, dtype=np.float64)


def _along_levels(grid: GridRows, levels: Singles, level_moves: Floats) -> Floats:
    """Moves on the axis of the codes, for moves on the axis of the levels, which are overwritten."""
    index, table = grid.codes - grid.lowest, levels.astype(np.float64)
    gaps = np.diff(table)
    inverse = np.divide(1.0, gaps, out=np.full(gaps.shape, NO_GAP), where=gaps > 0)
    # Beyond its ends the axis goes on with the last gap, so that what is clipped can be counted.
    up, down = np.append(inverse, inverse[-1]), np.insert(inverse, 0, inverse[0])
    # One look-up in both tables is twice as fast as a choice between two look-ups.
    with np.errstate(over="ignore"):
        moves: Floats = level_moves * np.take(
            np.concatenate([up, down]), index + len(up) * (level_moves < 0).view(np.uint8), mode="clip"
        )
    # A move of more than one gap crosses gaps of other sizes, so its end is looked up. These are few.
    if max(moves.max(initial=0.0), -moves.min(initial=0.0)) > 1:
        far = np.nonzero(np.abs(moves) > 1)
        target = table[index[far]] + level_moves[far]
        below = np.clip(np.searchsorted(table, target, side="right") - 1, 0, len(gaps) - 1)
        moves[far] = below + (target - table[below]) * inverse[below] - index[far]
    return moves


# Entries whose origins are searched at a time: with 256 codes and as many distances, this takes a few MiB.
SEARCHED = 1 << 13
# The limits of y are computed with rounding errors of float64, which are far below this.
SLACK = 1e-6


def find_origins(merged: GridRows, D: Singles, uniform: Floats) -> Origins:
    """The codes from which a merge leads to the codes of some rows of a merged weight.

    Returns the nearest origin of every entry (the merged code itself where there is none), and the numbers of entries
    to which several codes lead, and to which none. D is what the merge added, whatever the codes were, and ``uniform``
    has the numbers u of the draws. Raises FormatError if D holds NaN or Inf.
    """
    if merged.levels is not None:
        return _search(merged, merged.levels, D, uniform)
    # On a grid of equal steps, the steps of an entry do not depend on its code.
    codes = merged.codes
    steps = whole_steps(merged, asked_moves(merged, D), uniform)
    nearest = codes - steps
    # An end of the grid is reached from itself, and from all codes that are at most these steps away.
    at_end = ((codes == merged.highest) & (steps > 0)) | ((codes == merged.lowest) & (steps < 0))
    nearest[at_end] = codes[at_end]
    outside = (nearest < merged.lowest) | (nearest > merged.highest)
    nearest[outside] = codes[outside]
    return nearest, int(np.count_nonzero(at_end)), int(np.count_nonzero(outside))


def _search(merged: GridRows, table: Singles, D: Singles, uniform: Floats) -> Origins:
    """The origins on a grid of a table: codes that are near enough are moved as the merge moved them."""
    codes, u = merged.codes.reshape(-1), uniform.reshape(-1)
    least, most = _range_of_steps(merged, table, D, u)
    # All other entries stayed where they were.
    places = np.flatnonzero((least < 0) | (most > 0))
    # A move that ends beyond a gap of 0 takes one step more.
    further = 1 if has_equal_levels(table) else 0
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
    return nearest.reshape(merged.codes.shape), several, none


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
    return np.asarray(inside & (move_codes(grid, asked_moves(grid, D), u)[0] == merged.codes))
