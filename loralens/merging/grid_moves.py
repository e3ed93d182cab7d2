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

u has 32 bits. The probabilities of small moves need them: trained adapters ask for 0.001 steps on average. With 16
bits, P(move) would be rounded down to a multiple of 1.5e-5. A move of 0.001 would lose 0.8 %, and a move below 1.5e-5
would be lost entirely.
"""

import numpy as np
from numpy.typing import NDArray

from loralens.core.weights import Codes, GridRows
from loralens.errors import FormatError
from loralens.linalg.exact import Singles
from loralens.linalg.factor import Floats
from loralens.linalg.rounding import WIDE_STEPS, Draws

Moved = tuple[Codes, NDArray[np.bool_]]  # codes after a move, and where it ends beyond the grid: they stay at its end

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
