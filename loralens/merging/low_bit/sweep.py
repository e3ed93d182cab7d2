"""One sweep of coordinate descent over the columns of a coded weight, against the second moments of its inputs.

Stochastic rounding (`stochastic.py`) has the right mean, but its noise does not take the inputs into account. The sweep
starts from the codes Q that it gives, and visits the columns in order. In every row it moves each code to the level
that lowers

    ‖(Q − W − ΔW) H^(1/2)‖² + k·(⟨Q − W, ΔW⟩/‖ΔW‖ − ‖ΔW‖)²

most. H = E[x xᵀ] are the second moments of the inputs, damped by 1 % of their mean diagonal. The second term keeps the
gain near 1. Without it, minimising the first term would shrink the update, since a smaller update has a smaller error.
k is 100 times the mean diagonal of H. For adapters that ask for less than 0.005 steps on average, stochastic rounding
alone keeps more of the update.

The codes have the same bits on every machine. The updates of the columns are elementwise float64 operations. Every
product with H multiplies integers whose sums stay below 2⁵³, so it is exact. To obtain the integers, each row of H and
of the other factor is rounded to t = ⌊(53 − ⌈log₂ n⌉)/2⌋ bits relative to its largest entry (at most 24), where n is
the number of inputs: 20 bits for 4,096 inputs. The rows of a weight are independent of each other, so the codes do not
depend on how the weight is divided into blocks.
"""

from dataclasses import dataclass
from math import ceil, fsum, log2
from typing import final

import numpy as np

from loralens.core.coded_weight import Codes, GridRows
from loralens.core.lazy import Array
from loralens.errors import FormatError
from loralens.linalg.exact import Singles
from loralens.linalg.factor import Floats

# As a share of the mean diagonal of H. Without damping, errors in directions that no input has would cost nothing.
DAMPING = 0.01
# k in units of the mean diagonal of H.
HOLD = 100.0
COLUMNS = 128  # number of columns in a block; after each block, one product updates all later columns
PANEL = 512  # rows of H that are turned into float64 at a time
MOST_BITS = 24  # of the integers of H, which are kept in float32


@final
@dataclass(frozen=True, slots=True)
class SweepMoments:
    """The damped H. Each row is stored as integers (in float32) and a power of two; `sweep_moments` makes it.

    Attributes
    ----------
    integers : float32 array, shape (n, n)
    exponent : int array, shape (n, 1)
        H = integers · 2^exponent.
    diagonal : float64 array, shape (n,)
    hold : float
        k.
    bits : int
        The number of bits of the integers, and also of the integers of the other factor in a product.
    """

    integers: Singles
    exponent: "np.ndarray[tuple[int, ...], np.dtype[np.int64]]"
    diagonal: Floats
    hold: float
    bits: int

    def times(self, X: Floats, start: int, stop: int, columns: slice) -> Floats:
        """Rows ``start`` to ``stop`` of H, at some columns, times X (columns, m); the bits are the same everywhere."""
        integers, exponents = _as_integers(X, self.bits)
        product = self.integers[start:stop, columns].astype(np.float64) @ integers
        return np.asarray(np.ldexp(product, self.exponent[start:stop] + exponents))

    def energy(self, X: Singles) -> float:
        """Σ x H xᵀ over the rows x of X (m, columns)."""
        columns = np.ascontiguousarray(X.T, dtype=np.float64)
        total = 0.0
        for start in range(0, len(columns), PANEL):
            stop = min(start + PANEL, len(columns))
            total += float(np.vdot(columns[start:stop], self.times(columns, start, stop, slice(None))))
        return total

    def block(self, start: int, stop: int) -> Floats:
        """A square block of H on its diagonal."""
        return np.asarray(np.ldexp(self.integers[start:stop, start:stop].astype(np.float64), self.exponent[start:stop]))


def sweep_moments(H: Array) -> SweepMoments:
    """Prepare the second moments H (n, n) of the inputs of a weight.

    Raises
    ------
    FormatError
        They hold NaN, Inf or a negative square, or are 0.
    """
    diagonal = np.diagonal(H).astype(np.float64)
    mean = fsum(diagonal.tolist()) / max(len(diagonal), 1)
    if not np.isfinite(mean) or mean <= 0 or (diagonal < 0).any():
        raise FormatError("the moments are not those of inputs", fix="measure them again: calibrate --inputs")
    bits = min((53 - ceil(log2(max(len(H), 2)))) // 2, MOST_BITS)
    integers, exponent = np.empty(H.shape, np.float32), np.empty((len(H), 1), np.int64)
    # In panels, since H is the largest array of a merge.
    for start in range(0, len(H), PANEL):
        stop = min(start + PANEL, len(H))
        rows = H[start:stop].astype(np.float64)
        rows[np.arange(stop - start), np.arange(start, stop)] += DAMPING * mean
        if not np.isfinite(rows).all():
            raise FormatError("the moments hold NaN or Inf", fix="measure them again: calibrate --inputs")
        by_column, exponents = _as_integers(rows.T, bits)
        integers[start:stop], exponent[start:stop] = by_column.T, exponents.T
    return SweepMoments(integers, exponent, diagonal + DAMPING * mean, HOLD * mean, bits)


def sweep_rows(grid: GridRows, codes: Codes, D: Singles, moments: SweepMoments) -> Codes:
    """The codes after one sweep over all columns, which starts from the codes of stochastic rounding.

    Parameters
    ----------
    grid : GridRows
        Some rows of the base.
    codes : int16 array, shape (rows, columns)
        The drawn codes.
    D : float32 array
        The update.
    moments : SweepMoments
    """
    # All arrays have the columns first here, since the sweep visits one column after the other.
    columns = _Columns(grid, codes)
    update = np.ascontiguousarray(D.T, dtype=np.float64)
    error = columns.added() - update
    along_update = _exact_sum(error, update, moments.bits)
    squares = _exact_sum(update, update, moments.bits)
    # An update of 0 in a row has no gain to be held.
    weight = np.divide(moments.hold, squares, out=np.zeros_like(squares), where=squares > 0)
    G: Floats = np.empty(error.shape)
    for start in range(0, len(G), PANEL):
        stop = min(start + PANEL, len(G))
        G[start:stop] = moments.times(error, start, stop, slice(None))
    for start in range(0, len(G), COLUMNS):
        stop = min(start + COLUMNS, len(G))
        changes: Floats = np.zeros((stop - start, G.shape[1]))
        H = moments.block(start, stop)
        for j in range(start, stop):
            shift = -(G[j] + weight * along_update * update[j]) / (moments.diagonal[j] + weight * update[j] ** 2)
            change = columns.move(j, shift)
            rows = np.flatnonzero(change)
            if rows.size:
                changes[j - start, rows] = change[rows]
                # Columns before j are not visited again.
                G[j + 1 : stop, rows] += np.outer(H[j + 1 - start :, j - start], change[rows])
                along_update[rows] += change[rows] * update[j, rows]
        for first in range(stop, len(G), PANEL):
            last = min(first + PANEL, len(G))
            G[first:last] += moments.times(changes, first, last, slice(start, stop))
    return np.ascontiguousarray(columns.codes.T)


def mean_move(moves: Floats) -> float:
    """The mean of |y|, each limited to 1 and rounded to a multiple of 2⁻²⁰, so that the sum is exact."""
    limited = np.minimum(np.abs(moves), 1.0)
    return float(np.rint(np.ldexp(limited, 20)).sum()) / 2**20 / max(moves.size, 1)


@final
class _Columns:
    """The codes of some rows, with the columns first, and the numbers that they stand for."""

    def __init__(self, grid: GridRows, codes: Codes) -> None:
        self.codes = np.ascontiguousarray(codes.T)
        self._before, self._lowest, self._highest = np.ascontiguousarray(grid.codes.T), grid.lowest, grid.highest
        self._levels = None if grid.levels is None else grid.levels.astype(np.float64)
        self._between = None if self._levels is None else (self._levels[1:] + self._levels[:-1]) / 2
        self._step = np.where(np.isfinite(grid.step), grid.step, 0.0).T.astype(np.float64)
        moving = self._step != 0
        self._inverse = np.divide(1.0, self._step, out=np.zeros_like(self._step), where=moving)
        self._group = grid.group_of_column

    def _level(self, codes: Codes) -> Floats:
        return np.asarray(codes.astype(np.float64) if self._levels is None else self._levels[codes - self._lowest])

    def added(self) -> Floats:
        """What the codes add to the numbers of the base, float64, shape (columns, rows)."""
        return (self._level(self.codes) - self._level(self._before)) * self._step[self._group]

    def move(self, j: int, shift: Floats) -> Floats:
        """Add ``shift`` to the numbers of a column, and move each code to the nearest level; return the real change."""
        codes, group = self.codes[j], self._group[j]
        before = self._level(codes)
        target = before + shift * self._inverse[group]
        if self._between is None:
            new = np.clip(np.rint(target), self._lowest, self._highest).astype(np.int16)
        else:
            new = (np.searchsorted(self._between, target) + self._lowest).astype(np.int16)
        change: Floats = np.asarray((self._level(new) - before) * self._step[group])
        # Where the number stays, so does the code: +0 and −0 of FP4 are two codes of one number.
        self.codes[j] = np.where(change == 0, codes, new)
        return change


def _as_integers(X: Floats, bits: int) -> "tuple[Floats, np.ndarray[tuple[int, ...], np.dtype[np.int64]]]":
    """Every column of X as integers of at most ``bits`` bits times a power of two: the integers and the exponents."""
    exponents = np.frexp(np.abs(X).max(axis=0, initial=0.0))[1].astype(np.int64)[None] - bits
    return np.rint(np.ldexp(X, -exponents)), exponents


def _exact_sum(X: Floats, Y: Floats, bits: int) -> Floats:
    """Σ X·Y over the columns, of both as integers, so that the order of the sum does not matter."""
    (x, of_x), (y, of_y) = _as_integers(X, bits), _as_integers(Y, bits)
    return np.asarray(np.ldexp((x * y).sum(axis=0), (of_x + of_y)[0]))
