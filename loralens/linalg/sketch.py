"""A low-rank approximation of a big matrix from two passes over blocks of its rows."""

from collections.abc import Callable, Iterable, Iterator
from math import prod, sqrt
from typing import Any, NamedTuple

import numpy as np

from loralens.errors import FormatError
from loralens.linalg.basis import Basis
from loralens.linalg.blocks import Scratch
from loralens.linalg.factor import Array, Floats
from loralens.linalg.product import column_basis, truncating_maps

OVERSAMPLE = 8  # random directions in addition to those that the caller gives
ROUNDING = 2.0**-20  # relative to σ₁: σ of a direction that exists only because of rounding in float32 blocks
# Large enough for the matrix products to run at full speed.
PANEL = 1 << 24  # numbers of F in one panel, 64 MiB in float32; a smaller F is made once and kept
CANCELLING = 1e-4  # relative to ‖F‖²: below this ‖F‖² − ‖FV‖² is too inaccurate

Blocks = Callable[[], Iterable[tuple[slice, Array]]]

# The panels of a thread, since fresh memory pages cost as much as a product with a panel.
_memory = Scratch()


class Approximation(NamedTuple):
    """F (m, n) ≈ B A, both float64. A column of B and its row of A have the same length √σ."""

    B: Floats  # (m, k)
    A: Floats  # (k, n)
    error: float  # ‖F − BA‖_F / ‖F‖_F; 0 where F = 0


def low_rank_approximation(blocks: Blocks, shape: tuple[int, int], *, rank: int, start: Basis) -> Approximation:
    """The best approximation of F within a subspace that contains nearly all of its leading right directions.

    Parameters
    ----------
    blocks : callable
        ``blocks()`` yields the rows of F with their position, float32 or float64, and the same ones at each call.
    shape : tuple of int
        (m, n).
    rank : int
        Largest k. Directions whose σ is below 2⁻²⁰ of the first one are left out.
    start : Basis of columns of length n
        The expected right directions of F, for example those of the updates from which F was computed.

    Raises
    ------
    FormatError
        F holds NaN or Inf.

    Notes
    -----
    Pass 1 computes Z = FᵀFΩ with Ω = [start, random columns]. This is the method of Halko, Martinsson & Tropp 2011 with
    one power step, which needs no pass of its own when FᵀF is summed over panels of rows. There are 8 random columns,
    and two more for each direction of ``rank`` beyond those of ``start``. V is an orthonormal basis of [start, Z].
    Pass 2 computes Y = FV, of which F·start is known already. YVᵀ is the projection of F, and its SVD follows from that
    of Y. The cost is 6 m n l flops for the l columns of Ω. The memory is (m + n)·2l numbers and a panel of 2²⁴ numbers
    of F; a smaller F is kept for both passes. If n ≤ 2l, V = 1 and the result is that of the SVD. Measured: the error
    is up to 5 % above that of the SVD of F if σ falls slowly, and equal to it if σ falls fast.

    ``error`` is not an estimate: ‖F‖² − ‖Y‖² is exactly the part that V misses. If that is lost in rounding, a third
    pass measures F − YVᵀ. Products are computed in the dtype of the blocks.
    """
    # One power step captures a direction only in part, so two random columns are drawn for each that `start` lacks.
    random = OVERSAMPLE + 2 * max(0, rank - start.k)
    # A basis of half the columns saves nothing over V = 1.
    wide = 2 * (start.k + random) >= shape[1]
    panels = _panels(blocks, shape)
    on_start, V = _subspace(panels, shape, start, random) if not wide else (np.empty((shape[0], 0)), np.eye(shape[1]))
    Y, squares = np.empty((shape[0], V.shape[1])), 0.0
    Y[:, : on_start.shape[1]], fresh = on_start, V[:, on_start.shape[1] :]
    thin = fresh.astype(np.float32)
    for rows, block, lengths in panels():
        Y[rows, on_start.shape[1] :] = np.dot(block, thin if block.dtype == np.float32 else fresh)
        squares += float(lengths.sum(dtype=np.float64))
    # Checked after the pass, once: Inf or NaN anywhere makes the sum of squares Inf or NaN.
    if not np.isfinite(squares):
        raise FormatError("the combination leaves the range of float32", fix="give smaller weights")
    L, s, R = truncating_maps(Y, V.T)
    # Directions below the rounding of float32 are noise and would only fill the rank.
    k = min(rank, int(np.count_nonzero(s > ROUNDING * s[0]))) if s.size else 0
    outside = 0.0 if wide else max(squares - float(s @ s), 0.0)
    # The difference of two near-equal norms has lost its digits: measure the difference itself.
    if 0 < outside < CANCELLING * squares:
        outside = sum(_squared_distance(block, Y[rows], V) for rows, block, _ in panels())
    error = sqrt((outside + float(s[k:] @ s[k:])) / squares) if squares else 0.0
    return Approximation(Y @ L[:, :k], R[:k] @ V.T, error)


def forget_panels() -> None:
    """Free the memory that this thread keeps for the panels of the next matrix."""
    _memory.buffer = np.empty(0)


class _Panel(NamedTuple):
    """Some rows of F. The next panel overwrites them."""

    rows: slice
    numbers: Array
    squares: Array  # the squared norm of each row, in the dtype of F


_Panels = Callable[[], Iterable[_Panel]]


def _subspace(panels: _Panels, shape: tuple[int, int], start: Basis, random: int) -> tuple[Floats, Floats]:
    """F·start (m, k), and the orthonormal V (n, l) that consists of ``start`` and the part of Z outside it."""
    n, width = shape[1], start.k + random
    first = start.columns()
    # Divided by √n, so that random columns are about as long as the orthonormal ones of `start`.
    wide = np.hstack([first, np.random.default_rng(0).standard_normal((n, random)) / sqrt(n)])
    thin, on_start, Z = wide.astype(np.float32), np.empty((shape[0], start.k)), np.zeros((n, width))
    for rows, block, _ in panels():
        Y = np.dot(block, thin if block.dtype == np.float32 else wide)
        on_start[rows] = Y[:, : start.k]
        Z += np.dot(block.T, Y)
    if not np.isfinite(Z).all():
        raise FormatError("the combination leaves the range of float32", fix="give smaller weights")
    for _ in range(2):  # the second projection removes the rounding errors of the first
        Z = column_basis(Z - first @ (first.T @ Z))[0].columns()
    return on_start, np.hstack([first, Z])


def _panels(blocks: Blocks, shape: tuple[int, int]) -> _Panels:
    """The same rows in panels of up to 2²⁴ numbers, because products of thin blocks would take twice as long."""
    m, n = shape
    height = min(m, max(1, PANEL // max(1, n)))
    panels_in_memory: list[_Panel] = []

    def panels() -> Iterator[_Panel]:
        if panels_in_memory:
            yield from panels_in_memory
            return
        for panel in _gather(blocks(), m, height):
            # All of F fits into one panel: kept, so that the blocks are made only once.
            if height == m:
                panels_in_memory.append(panel)
            yield panel

    return panels


def _gather(blocks: Iterable[tuple[slice, Array]], m: int, height: int) -> Iterator[_Panel]:
    """Copy blocks into panels of ``height`` rows; a panel ends earlier if the next block would not fit."""
    panel, squares, first, last = np.empty((0, 0)), np.empty(0), 0, 0
    for rows, block in blocks:
        if not panel.size:
            shape = (max(height, len(block)), block.shape[1])
            panel, squares = _thread_memory(shape, block.dtype), np.empty(shape[0], block.dtype)
        # The next block does not fit: hand out what there is and start over in the same memory.
        if rows.stop - first > len(panel):
            yield _Panel(slice(first, last), panel[: last - first], squares[: last - first])
            first = rows.start
        panel[rows.start - first : rows.stop - first] = block
        # While the block is in the cache.
        np.einsum("ij,ij->i", block, block, out=squares[rows.start - first : rows.stop - first])
        last = rows.stop
        if last == m:
            yield _Panel(slice(first, last), panel[: last - first], squares[: last - first])


def _thread_memory(shape: tuple[int, int], dtype: np.dtype[Any]) -> Array:
    """A matrix in the memory that this thread uses again for every F."""
    count = -(-prod(shape) * dtype.itemsize // 8)
    return _memory.of(count).view(dtype)[: prod(shape)].reshape(shape)


def _squared_distance(block: Array, Y: Floats, V: Floats) -> float:
    """‖block − Y Vᵀ‖², computed some rows at a time."""
    step = max(1, PANEL // 64 // V.shape[0])
    return sum(_squared_norm(block[i : i + step] - Y[i : i + step] @ V.T) for i in range(0, len(block), step))


def _squared_norm(block: Array) -> float:
    """‖block‖_F²; rows are summed in the dtype of the block, and the sum over rows is float64."""
    return float(np.einsum("ij,ij->i", block, block).sum(dtype=np.float64))
