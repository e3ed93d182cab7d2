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
PANEL = 1 << 24  # numbers of F that are worked on at a time, 64 MiB in float32; a smaller F is made once and kept
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
    Pass 1: Z = FᵀFΩ with Ω = [start, random columns], Halko, Martinsson & Tropp 2011 with one power step, which costs
    no pass of its own when FᵀF is summed over panels of rows; there are 8 random columns, and two more for each
    direction wanted beyond those of start. V: orthonormal, spans [start, Z]. Pass 2: Y = FV, of which F·start is there
    already; YVᵀ is the projection of F, its SVD is that of Y. 6 m n l flops for the l columns of Ω.
    (m + n)·2l numbers are held, and 2²⁴ of F: all of it, for both passes, if there are no more. Where n ≤ 2l, V = 1
    and the result is that of the SVD. Measured: the error is up to 5 % above that of the SVD of F where σ falls
    slowly, and equal where it falls fast.

    ``error`` is not estimated: ‖F‖² − ‖Y‖² is what V misses, exactly; where that is lost in rounding a third pass
    measures F − YVᵀ. Products are made in the dtype of the blocks.
    """
    random = OVERSAMPLE + 2 * max(0, rank - start.k)
    wide = 2 * (start.k + random) >= shape[1]
    panels = _panels(blocks, shape)
    known, V = _subspace(panels, shape, start, random) if not wide else (np.empty((shape[0], 0)), np.eye(shape[1]))
    Y, squares = np.empty((shape[0], V.shape[1])), 0.0
    Y[:, : known.shape[1]], fresh = known, V[:, known.shape[1] :]
    thin = fresh.astype(np.float32)
    for rows, block in panels():
        Y[rows, known.shape[1] :] = np.dot(block, thin if block.dtype == np.float32 else fresh)
        squares += _squares(block)
    if not np.isfinite(squares):
        raise FormatError("the combination leaves the range of float32", fix="give smaller weights")
    L, s, R = truncating_maps(Y, V.T)
    k = min(rank, int(np.count_nonzero(s > ROUNDING * s[0]))) if s.size else 0
    outside = 0.0 if wide else max(squares - float(s @ s), 0.0)
    if 0 < outside < CANCELLING * squares:
        outside = sum(_rest(block, Y[rows], V) for rows, block in panels())
    error = sqrt((outside + float(s[k:] @ s[k:])) / squares) if squares else 0.0
    return Approximation(Y @ L[:, :k], R[:k] @ V.T, error)


def _subspace(panels: Blocks, shape: tuple[int, int], start: Basis, random: int) -> tuple[Floats, Floats]:
    """F·start (m, k), and V = [start, what Z has beside it] (n, l), orthonormal."""
    n, width = shape[1], start.k + random
    first = start.columns()
    wide = np.hstack([first, np.random.default_rng(0).standard_normal((n, random)) / sqrt(n)])
    thin, known, Z = wide.astype(np.float32), np.empty((shape[0], start.k)), np.zeros((n, width))
    for rows, block in panels():
        Y = np.dot(block, thin if block.dtype == np.float32 else wide)
        known[rows] = Y[:, : start.k]
        Z += np.dot(block.T, Y)
    if not np.isfinite(Z).all():
        raise FormatError("the combination leaves the range of float32", fix="give smaller weights")
    for _ in range(2):  # the second time takes away what rounding left of the first
        Z = column_basis(Z - first @ (first.T @ Z))[0].columns()
    return known, np.hstack([first, Z])


def _panels(blocks: Blocks, shape: tuple[int, int]) -> Blocks:
    """The same rows in pieces of up to 2²⁴ numbers: products of thin slices would take twice as long."""
    m, n = shape
    height = min(m, max(1, PANEL // max(1, n)))
    held: list[tuple[slice, Array]] = []

    def panels() -> Iterator[tuple[slice, Array]]:
        if held:
            yield from held
            return
        for rows, panel in _gathered(blocks(), m, height):
            if height == m:
                held.append((rows, panel))
            yield rows, panel

    return panels


def _gathered(blocks: Iterable[tuple[slice, Array]], m: int, height: int) -> Iterator[tuple[slice, Array]]:
    """Blocks one below the other, until ``height`` rows are there or the next block would not fit."""
    panel, first, last = np.empty((0, 0)), 0, 0
    for rows, block in blocks:
        if not panel.size:
            panel = np.empty((max(height, len(block)), block.shape[1]), block.dtype)
        if rows.stop - first > len(panel):
            yield slice(first, last), panel[: last - first]
            first = rows.start
        panel[rows.start - first : rows.stop - first] = block
        last = rows.stop
        if last == m:
            yield slice(first, last), panel[: last - first]


def _rest(block: Array, Y: Floats, V: Floats) -> float:
    """‖block − Y Vᵀ‖², some rows at a time."""
    step = max(1, PANEL // 64 // V.shape[0])
    return sum(_squares(block[i : i + step] - Y[i : i + step] @ V.T) for i in range(0, len(block), step))


def _squares(block: Array) -> float:
    """‖block‖_F², float64 but for the sum within a row."""
    return float(np.einsum("ij,ij->i", block, block).sum(dtype=np.float64))
