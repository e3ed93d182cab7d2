"""The leading part of a matrix that comes a block of rows at a time, twice, and is not held if it is big."""

from collections.abc import Callable, Iterable, Iterator
from math import sqrt
from typing import NamedTuple

import numpy as np

from loralens.errors import FormatError
from loralens.linalg.basis import Basis
from loralens.linalg.factor import Array, Floats
from loralens.linalg.product import column_basis, truncating_maps

OVERSAMPLE = 8  # random directions beside those given
ROUNDING = 2.0**-20  # of σ₁: what float32 blocks leave of a direction that is not there
HELD = 1 << 24  # numbers of F that are kept for the second pass, 64 MiB in float32, instead of being made again
CANCELLING = 1e-4  # of ‖F‖²: what ‖F‖² − ‖FV‖² is too rough below

Blocks = Callable[[], Iterable[tuple[slice, Array]]]


class Approximation(NamedTuple):
    """F (m, n) ≈ B A, both float64; √σ is the length of a column of B and of the row of A that belongs to it."""

    B: Floats  # (m, k)
    A: Floats  # (k, n)
    error: float  # ‖F − BA‖_F / ‖F‖_F; 0 where F = 0


def low_rank(blocks: Blocks, shape: tuple[int, int], *, rank: int, start: Basis) -> Approximation:
    """The best approximation of F within a subspace that holds nearly all of its leading directions.

    Parameters
    ----------
    blocks : callable
        ``blocks()`` gives the rows of F with their place, float32 or float64, the same ones each time.
    shape : tuple of int
        (m, n).
    rank : int
        k, at most; directions below 2⁻²⁰ of the first are left out.
    start : Basis of columns of length n
        Where the leading right directions of F are expected: those of the updates that F was made of.

    Raises
    ------
    FormatError
        F holds NaN or Inf.

    Notes
    -----
    Pass 1: Z = FᵀFΩ with Ω = [start, 8 random columns], Halko, Martinsson & Tropp 2011 with one power step, which costs
    no pass of its own when FᵀF is summed over blocks. V: orthonormal, spans [start, Z]. Pass 2: Y = FV; YVᵀ is the
    projection of F, its SVD is that of Y. 6 m n l flops, l = start.k + 8; (m + n)·2l numbers are held, and F
    itself if that is no more than 2²⁴. Where n ≤ 2l, V = 1 and the result is that of the SVD. Measured: the
    error is up to 5 % above that of the SVD of F where σ falls slowly, and equal where it falls fast.

    ``error`` is not estimated: ‖F‖² − ‖Y‖² is what V misses, exactly; where that is lost in rounding a third pass
    measures F − YVᵀ. Products are made in the dtype of the blocks.
    """
    wide = 2 * (start.k + OVERSAMPLE) >= shape[1]
    if not wide and shape[0] * shape[1] <= HELD:
        blocks = _kept(blocks)
    V = np.eye(shape[1]) if wide else _subspace(blocks, shape, start)
    Y, squares, tops = np.empty((shape[0], V.shape[1])), 0.0, V.astype(np.float32)
    for rows, block in blocks():
        Y[rows] = np.dot(block, tops if block.dtype == np.float32 else V)
        squares += _squares(block)
    if not np.isfinite(squares):
        raise FormatError("the combination leaves the range of float32", fix="give smaller weights")
    L, s, R = truncating_maps(Y, V.T)
    k = min(rank, int(np.count_nonzero(s > ROUNDING * s[0]))) if s.size else 0
    outside = 0.0 if wide else max(squares - float(s @ s), 0.0)
    if 0 < outside < CANCELLING * squares:
        outside = sum(_squares(block - Y[rows] @ V.T) for rows, block in blocks())
    error = sqrt((outside + float(s[k:] @ s[k:])) / squares) if squares else 0.0
    return Approximation(Y @ L[:, :k], R[:k] @ V.T, error)


def _subspace(blocks: Blocks, shape: tuple[int, int], start: Basis) -> Floats:
    """V (n, l), orthonormal."""
    n, width = shape[1], start.k + OVERSAMPLE
    random = np.random.default_rng(0).standard_normal((n, OVERSAMPLE)) / sqrt(n)
    wide = np.hstack([start.columns(), random])
    thin, Z = wide.astype(np.float32), np.zeros((n, width))
    for _, block in blocks():
        Z += np.dot(block.T, np.dot(block, thin if block.dtype == np.float32 else wide))
    if not np.isfinite(Z).all():
        raise FormatError("the combination leaves the range of float32", fix="give smaller weights")
    return column_basis(np.hstack([start.columns(), Z]))[0].columns()


def _kept(blocks: Blocks) -> Blocks:
    """The same blocks, made once."""
    held: list[tuple[slice, Array]] = []

    def again() -> Iterator[tuple[slice, Array]]:
        if held:
            yield from held
            return
        for rows, block in blocks():
            held.append((rows, block.copy()))
            yield held[-1]

    return again


def _squares(block: Array) -> float:
    """‖block‖_F², float64 but for the sum within a row."""
    return float(np.einsum("ij,ij->i", block, block).sum(dtype=np.float64))
