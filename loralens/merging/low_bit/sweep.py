"""One sweep over the columns of a coded weight, against the second moments of its inputs, with two gains held.

Stochastic rounding (`stochastic.py`) has the right mean, but its noise does not take the inputs into account. The sweep
chooses codes for which, in every row,

    e H eᵀ + k₁·(e·u₁)² + k₂·(e·u₂)²,  e = Q − W − ΔW,  u₁ = ΔW/‖ΔW‖,  u₂ = ΔW H/√(ΔW H ΔWᵀ),

is small. H = E[x xᵀ] are the second moments of the inputs, damped by 1 % of their mean diagonal. The other two terms
hold the gain: that of the numbers, ⟨Q − W, ΔW⟩/‖ΔW‖², and that of the outputs on such inputs, which is the same with H
between the factors. Without them, the first term would shrink the update, since a smaller update has a smaller error:
that is the error feedback of GPTQ (Frantar et al. 2023, arXiv 2210.17323), which loses most of an adapter on a kept
grid. With the gain of the numbers alone, the codes keep the length of the update, and lose 20 to 50 % of the outputs.

The columns are decided one after the other, those with the largest moments first. For a column, the columns that are
not decided yet are taken as free real numbers, which minimise the sum whatever the column becomes. With H = C D Cᵀ,
C upper triangular with ones on its diagonal and D = diag(d), the best error of column j is then

    e_j = −f_j − g·(K⁻¹ + T_j)⁻¹·v_j / d_j,

    f_j = Σ_{i<j} e_i C_ij,  V = C⁻¹(u₁, u₂),  T_j = Σ_{i≥j} v_i v_iᵀ/d_i,  g = Σ_{i<j} (e_i + f_i)·v_i,

with v_j the two numbers of row j of V and K = diag(k₁, k₂). The code moves to the level that is nearest to it. f is
what the errors of decided columns ask for, and g the part of the error along u₁ and u₂ that the free columns would
leave. k₁ is 1,000 times the mean diagonal of H, and k₂ is 100.

The codes have the same bits on every machine, and need no random numbers. All operations within a block of columns are
elementwise in float64. Every product multiplies integers of 23 bits, 128 at a time, whose sums stay below 2⁵³, so it is
exact. To obtain the integers, each row of one factor and each column of the other is rounded relative to its largest
entry. The rows of a weight are independent of each other, so the codes do not depend on how the weight is divided into
blocks.
"""

from dataclasses import dataclass
from math import ceil, fsum, log2
from typing import final

import numpy as np
from numpy.typing import NDArray

from loralens.core.few_bits.coded_weight import Codes, GridRows
from loralens.core.lazy import Array
from loralens.errors import FormatError
from loralens.linalg.exact import Singles
from loralens.linalg.factor import Floats
from loralens.merging.low_bit.stochastic import DrawnCodes

# As a share of the mean diagonal of H. Without damping, errors in directions that no input has would cost nothing.
DAMPING = 0.01
# With 100 the weakest updates lost a fifth of their gain; with 10,000 the error is larger and the gain the same.
HOLD = 1000.0  # k₁, in units of the mean diagonal of H
# With 10 the outputs lose a tenth of their gain; with 1,000 some errors are larger by a third.
HOLD_OUTPUTS = 100.0  # k₂
COLUMNS = 128  # number of columns in a block; after each block, one product updates all later columns
PANEL = 512  # rows of a matrix that are computed at a time
# 23 bits of both factors and the 7 of 128 summands make 53, the bits of float64.
BITS = 23

Exponents = NDArray[np.int64]


@final
@dataclass(frozen=True, slots=True)
class SweepMoments:
    """The factors of the damped H, with its columns in the order of the sweep; `sweep_moments` makes it.

    Attributes
    ----------
    order : intp array, shape (n,)
        The columns, those with the largest moments first.
    integers : float32 array, shape (n, n)
        What C has above its diagonal, as integers.
    exponent : int array, shape (n, 1)
        C = integers · 2^exponent.
    pivots : float64 array, shape (n,)
        d.
    hold : float
        k₁.
    inverses : tuple of float64 arrays
        The inverse of every block of C on its diagonal, without the ones.
    """

    order: NDArray[np.intp]
    integers: Singles
    exponent: Exponents
    pivots: Floats
    hold: float
    inverses: tuple[Floats, ...]

    def energy(self, X: Singles) -> float:
        """Σ x H xᵀ over the rows x of X (m, columns)."""
        outputs = self.multiply_transposed(np.ascontiguousarray(X.T[self.order], dtype=np.float64))
        return float(np.vdot(outputs * self.pivots[:, None], outputs))

    def multiply_transposed(self, X: Floats) -> Floats:
        """Cᵀ X, for X (n, m) with its columns in the order of the sweep."""
        product = X.copy()
        for start in range(0, len(X), COLUMNS):
            stop = min(start + COLUMNS, len(X))
            product[start:stop] += _exact_product(self.block(start, stop).T, X[start:stop])
            product[stop:] += self.after(X[start:stop], start, stop)
        return product

    def block(self, start: int, stop: int) -> Floats:
        """A square block of C on its diagonal, without the ones."""
        return np.asarray(np.ldexp(self.integers[start:stop, start:stop].astype(np.float64), self.exponent[start:stop]))

    def above(self, X: Floats, start: int, stop: int) -> Floats:
        """The part of C above a block times X (columns of the block, m)."""
        integers, exponents = _as_integers(X)
        product = self.integers[:start, start:stop].astype(np.float64) @ integers
        return np.asarray(np.ldexp(product, self.exponent[:start] + exponents))

    def after(self, X: Floats, start: int, stop: int) -> Floats:
        """The transpose of the part of C beside a block times X (columns of the block, m)."""
        integers, exponents = _as_integers(np.ldexp(X, self.exponent[start:stop]))
        product = self.integers[start:stop, stop:].T.astype(np.float64) @ integers
        return np.asarray(np.ldexp(product, exponents))


def sweep_moments(H: Array, *, damping: float = DAMPING) -> SweepMoments:
    """Prepare the second moments H (n, n) of the inputs of a weight; ``damping`` is a share of their mean diagonal.

    Raises
    ------
    FormatError
        They hold NaN, Inf or a negative square, or are 0.
    """
    diagonal = np.diagonal(H).astype(np.float64)
    mean = fsum(diagonal.tolist()) / max(len(diagonal), 1)
    if not np.isfinite(mean) or mean <= 0 or (diagonal < 0).any():
        raise FormatError("the moments are not those of inputs", fix="measure them again: calibrate --inputs")
    order = np.argsort(-diagonal, kind="stable")
    damped: Floats = np.empty(H.shape)
    # In panels, since H is the largest array of a merge.
    for start in range(0, len(H), PANEL):
        damped[start : start + PANEL] = H[order[start : start + PANEL]][:, order]
    damped[np.diag_indices(len(H))] += damping * mean
    if not np.isfinite(damped).all():
        raise FormatError("the moments hold NaN or Inf", fix="measure them again: calibrate --inputs")
    # No pivot of the damped H is smaller, but for the rounding of products.
    pivots = _factorise(damped, damping * mean)
    integers, exponent = np.empty(H.shape, np.float32), np.empty((len(H), 1), np.int64)
    for start in range(0, len(H), PANEL):
        rows = slice(start, start + PANEL)
        by_column, exponents = _as_integers(np.triu(damped[rows], start + 1).T)
        integers[rows], exponent[rows] = by_column.T, exponents.T
    inverses = tuple(
        _inverse(np.triu(damped[start : start + COLUMNS, start : start + COLUMNS], 1))
        for start in range(0, len(H), COLUMNS)
    )
    return SweepMoments(order, integers, exponent, pivots, HOLD * mean, inverses)


def _inverse(C: Floats) -> Floats:
    """The inverse of a small C without the ones of both."""
    inverse = np.eye(len(C))
    for j in reversed(range(len(C))):
        inverse[:j] -= np.outer(C[:j, j], inverse[j])
    return np.asarray(inverse - np.eye(len(C)))


def _factorise(H: Floats, least: float) -> Floats:
    """Write C over the part of H above its diagonal, where H = C D Cᵀ, and return the diagonal of D."""
    pivots = np.empty(len(H))
    for start in reversed(range(0, len(H), COLUMNS)):
        stop = min(start + COLUMNS, len(H))
        for j in reversed(range(start, stop)):
            pivots[j] = max(float(H[j, j]), least)
            column = H[:j, j] / pivots[j]
            H[:j, start:j] -= np.outer(H[:j, j], column[start:])
            H[:j, j] = column
        above = H[:start, start:stop]
        for first in range(0, start, PANEL):
            rows = slice(first, min(first + PANEL, start))
            # Only what lies above the diagonal is read later.
            H[rows, first:start] -= _exact_product(above[rows] * pivots[start:stop], above[first:].T)
    return pivots


def sweep_rows(grid: GridRows, D: Singles, moments: SweepMoments) -> DrawnCodes:
    """The codes after a sweep over all columns.

    Parameters
    ----------
    grid : GridRows
        Some rows of the base.
    D : float32 array
        The update.
    moments : SweepMoments
    """
    # All arrays have the columns first here, since the sweep visits one column after the other.
    columns = _Columns(grid, moments.order)
    update = np.ascontiguousarray(D.T[moments.order], dtype=np.float64)
    gains = _held_gains(update, moments)
    asked: Floats = np.zeros(update.shape)  # f
    left: Floats = np.zeros((2, update.shape[1]))  # g
    for start in range(0, len(update), COLUMNS):
        stop = min(start + COLUMNS, len(update))
        C, errors = moments.block(start, stop), np.empty((stop - start, update.shape[1]))
        for j in range(start, stop):
            pulled = left[0] * gains.pull[0][j] + left[1] * gains.pull[1][j]
            error = columns.add(j, update[j] - asked[j] - pulled) - update[j]
            for gain, along in zip(left, gains.along, strict=True):
                gain += along[j] * (error + asked[j])
            asked[j + 1 : stop] += np.outer(C[j - start, j + 1 - start :], error)
            errors[j - start] = error
        asked[stop:] += moments.after(errors, start, stop)
    return columns.in_weight_order()


@final
@dataclass(frozen=True, slots=True)
class _HeldGains:
    """What the two held gains ask of some rows; all arrays have the columns first.

    Attributes
    ----------
    along : two float64 arrays
        V.
    pull : two float64 arrays
        (K⁻¹ + T_j)⁻¹·v_j/d_j, for every column j.
    """

    along: tuple[Floats, Floats]
    pull: tuple[Floats, Floats]


def _held_gains(update: Floats, moments: SweepMoments) -> _HeldGains:
    """V, and how each gain that is left pulls at the columns."""
    numbers, outputs = _along_numbers(update, moments), _along_outputs(update, moments)
    pull = np.empty_like(numbers), np.empty_like(numbers)
    # The entries of K⁻¹ + T_j, which is symmetric.
    first, both, second = (np.full(update.shape[1], start) for start in (1 / moments.hold, 0.0, 1 / HOLD_OUTPUTS))
    for j in reversed(range(len(update))):
        a, b = numbers[j] / moments.pivots[j], outputs[j] / moments.pivots[j]
        first += a * numbers[j]
        both += a * outputs[j]
        second += b * outputs[j]
        determinant = first * second - both * both
        pull[0][j] = (second * a - both * b) / determinant
        pull[1][j] = (first * b - both * a) / determinant
    return _HeldGains((numbers, outputs), pull)


def _along_numbers(update: Floats, moments: SweepMoments) -> Floats:
    """C⁻¹u₁, by substitution from the last block of columns to the first."""
    norm = np.sqrt(_exact_squares(update))
    # An update of 0 in a row has no gain to be held.
    v = np.divide(update, norm, out=np.zeros_like(update), where=norm > 0)
    for block in reversed(range(len(moments.inverses))):
        start, stop = block * COLUMNS, min((block + 1) * COLUMNS, len(v))
        v[start:stop] += _exact_product(moments.inverses[block], v[start:stop])
        v[:start] -= moments.above(v[start:stop], start, stop)
    return v


def _along_outputs(update: Floats, moments: SweepMoments) -> Floats:
    """C⁻¹u₂, which is D Cᵀ ΔWᵀ/√(ΔW H ΔWᵀ)."""
    outputs = moments.multiply_transposed(update)
    # ΔW H ΔWᵀ is the sum of squares of √D Cᵀ ΔWᵀ.
    outputs *= np.sqrt(moments.pivots)[:, None]
    norm = np.sqrt(_exact_squares(outputs))
    outputs *= np.sqrt(moments.pivots)[:, None]
    return np.divide(outputs, norm, out=np.zeros_like(outputs), where=norm > 0)


@final
class _Columns:
    """The codes of some rows, with the columns first and in the order of the sweep."""

    def __init__(self, grid: GridRows, order: NDArray[np.intp]) -> None:
        self._codes = np.ascontiguousarray(grid.codes.T[order])
        self._clipped = np.zeros(self._codes.shape, np.bool_)
        self._order, self._lowest, self._highest = order, grid.lowest, grid.highest
        self._levels = None if grid.levels is None else grid.levels.astype(np.float64)
        self._between = None if self._levels is None else (self._levels[1:] + self._levels[:-1]) / 2
        levels = np.arange(grid.lowest, grid.highest + 1.0) if self._levels is None else self._levels
        # Half a gap beyond the last levels, the next level would be nearer if there were one.
        self._ends = levels[0] - (levels[1] - levels[0]) / 2, levels[-1] + (levels[-1] - levels[-2]) / 2
        self._step = np.where(np.isfinite(grid.step), grid.step, 0.0).T.astype(np.float64)
        moving = self._step != 0
        self._inverse = np.divide(1.0, self._step, out=np.zeros_like(self._step), where=moving)
        self._group = grid.group_of_column[order]

    def _level(self, codes: Codes) -> Floats:
        return np.asarray(codes.astype(np.float64) if self._levels is None else self._levels[codes - self._lowest])

    def add(self, j: int, numbers: Floats) -> Floats:
        """Move the codes of column j to the levels nearest to what they are and ``numbers``; return what was added."""
        codes, group = self._codes[j], self._group[j]
        before = self._level(codes)
        target = before + numbers * self._inverse[group]
        self._clipped[j] = (target < self._ends[0]) | (target > self._ends[1])
        if self._between is None:
            new = np.clip(np.rint(target), self._lowest, self._highest).astype(np.int16)
        else:
            new = (np.searchsorted(self._between, target) + self._lowest).astype(np.int16)
        change: Floats = np.asarray((self._level(new) - before) * self._step[group])
        # Where the number stays, so does the code: +0 and −0 of FP4 are two codes of one number.
        self._codes[j] = np.where(change == 0, codes, new)
        return change

    def in_weight_order(self) -> DrawnCodes:
        """The codes in the order of the weight, with rows first."""
        back = np.argsort(self._order)
        return DrawnCodes(np.ascontiguousarray(self._codes[back].T), np.ascontiguousarray(self._clipped[back].T))


def _as_integers(X: Floats) -> tuple[Floats, Exponents]:
    """Every column of X as integers of at most 23 bits times a power of two: the integers and the exponents."""
    exponents = np.frexp(np.abs(X).max(axis=0, initial=0.0))[1].astype(np.int64)[None] - BITS
    return np.rint(np.ldexp(X, -exponents)), exponents


def _exact_product(A: Floats, X: Floats) -> Floats:
    """A X, for A with at most 128 columns, with the same bits everywhere."""
    (left, of_left), (right, of_right) = _as_integers(A.T), _as_integers(X)
    return np.asarray(np.ldexp(left.T @ right, of_left.T + of_right))


def _exact_squares(X: Floats) -> Floats:
    """Σ X² over the columns, as integers so small that the order of the sum does not matter."""
    bits = (53 - ceil(log2(max(len(X), 2)))) // 2
    exponents = np.frexp(np.abs(X).max(axis=0, initial=0.0))[1].astype(np.int64) - bits
    integers = np.rint(np.ldexp(X, -exponents))
    return np.asarray(np.ldexp((integers * integers).sum(axis=0), 2 * exponents))
