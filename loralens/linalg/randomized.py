"""Leading singular triplets of a big matrix by a randomised block Krylov method, with an error bound.

The method is that of Halko, Martinsson & Tropp 2011 with a Krylov space instead of powers (Musco & Musco 2015). It is a
block Golub–Kahan bidiagonalisation from a Gaussian start, in which every block is orthogonalised against all before it.
"""

from collections.abc import Callable, Iterable, Iterator
from math import sqrt
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import DTypeLike

from loralens.errors import FormatError
from loralens.linalg.device import CopyFloat, Device, Float
from loralens.linalg.factor import Array, Basis, Floats, gram_triangle
from loralens.linalg.kernel import BFLOAT16, PART
from loralens.linalg.product import column_basis, truncating_maps

# A block has a multiple of this many columns, which is what a compiled product takes, and no fewer than are wanted. So
# every value is found as often as it is repeated. Blocks that are wider by 5 to 10 columns, as Halko, Martinsson and
# Tropp 2011 recommend for powers, need fewer steps, but a larger space for the same error.
MULTIPLE = PART
STEPS = 12  # most steps; a step is a product with W and one with Wᵀ
ENOUGH = 6e-4  # relative to ‖σ‖: the error bound at which the steps end
CLEAR = 1e-2  # relative to each σ: its error bound at which the steps end, so that small values are found too
# Up to this condition the square root of a Gram matrix in float64 makes rows orthonormal to 1e-6, and again to 1e-15.
CONDITION = 1e5
STEEP = 30.0  # condition of a block of W·Q beyond which float32 would lose four of its seven digits in WᵀW·Q
ROUNDING = 2.0**-20  # relative to σ₁: what float32 adds to the error

MOST_COLUMNS = 0.625  # of the space, as a share of the shorter side
SMALL = 512  # length of the shorter side up to which the dense SVD is as fast
FEWEST = 3  # steps that must fit into the matrix; otherwise the dense SVD is used


class Leading(NamedTuple):
    """Leading singular triplets of W (m, n), largest first; NumPy, float64."""

    U: Floats  # (m, k)
    s: Floats  # (k,)
    V: Floats  # (n, k)
    error: Floats  # (k,) bound of the distance from each s to a singular value of W; 0 where the SVD was dense
    steps: int  # 0 where the SVD was dense


def _columns(k: int) -> int:
    """The number of columns of a block."""
    return -(-k // MULTIPLE) * MULTIPLE


def is_dense(shape: tuple[int, int], k: int, *, exact: bool = False) -> bool:
    """Whether `leading_svd` computes the dense SVD, because ``exact`` demands it or because it is as cheap."""
    return exact or min(shape) <= SMALL or FEWEST * _columns(k) > min(shape) // 2


def input_dtype(shape: tuple[int, int], k: int, *, exact: bool = False) -> Float:
    """The dtype in which `leading_svd` needs W: float64 for the dense SVD, else float32."""
    return "float64" if is_dense(shape, k, exact=exact) else "float32"


def copy_dtype(
    shape: tuple[int, int], k: int, *, stored: np.dtype[Any], device: Device, exact: bool = False
) -> CopyFloat:
    """The dtype of a copy of W for `leading_svd`: that of `input_dtype`, or bfloat16 if W is stored in it.

    bfloat16 takes half the memory, and where the device multiplies it as quickly, the results have the same bits.
    """
    needed = input_dtype(shape, k, exact=exact)
    return "bfloat16" if needed == "float32" and stored == BFLOAT16 and device.multiplies_bfloat16 else needed


def leading_svd(W: Any, k: int, *, rng: "np.random.Generator | None", device: Device, exact: bool = False) -> Leading:
    """Compute the k leading singular triplets of W.

    Parameters
    ----------
    W : array of the device, shape (m, n)
        float32, or float64 where `is_dense` (see `input_dtype`); on the CPU also bfloat16 in place of float32.
    k : int
        Number of triplets. If W has fewer, all min(m, n) are returned.
    rng : Generator or None
        The source of the Gaussian start; it may be None where `is_dense`.
    exact : bool
        Compute the dense SVD with LAPACK, O(m n min(m, n)). For 4096 × 4096 this takes minutes and four times the
        memory of W.

    Notes
    -----
    There are at most 12 steps, which are 24 products with k columns, rounded up to a multiple of 16. The steps end when
    the relative error of √Σσ² is below 6e-4, and that of each σ below 1e-2, by the recurrence.

    WV = US holds by construction, so ρᵢ = ‖Wᵀuᵢ − σᵢvᵢ‖ is known without another product. Some singular value of W lies
    within ρᵢ/√2 of σᵢ, and all together lie within √Σρᵢ² (Kahan 1967 on [0 W; Wᵀ 0]). Apart from rounding, σᵢ is never
    above the i-th singular value. The true error is about ρᵢ²/σᵢ, which is mostly far less than the bound. It is not
    proved that no larger value was missed, but to miss a value the start would have to be orthogonal to its vector.
    Vectors have an error of ρᵢ divided by the distance to the next value. Among crowded values the single vectors are
    therefore not determined, only the space that they span.
    """
    m, n = W.shape
    k = min(k, m, n)
    if is_dense((m, n), k, exact=exact):
        U, s, Vh = device.xp.linalg.svd(W, full_matrices=False)
        return Leading(device.numpy(U[:, :k]), device.numpy(s[:k]), device.numpy(Vh[:k, :].T), np.zeros(k), 0)
    assert rng is not None
    with device.keep_threads() as threaded:
        return _iterate(W, k, rng, threaded)


def _iterate(W: Any, k: int, rng: "np.random.Generator", device: Device) -> Leading:
    """The k leading triplets by block Krylov steps."""
    (m, n), width = W.shape, _columns(k)
    # Every step adds `width` columns on both sides; with many more, a dense SVD would do as well.
    most = min(STEPS, int(MOST_COLUMNS * min(m, n)) // width)
    space = _Krylov(W, rng.standard_normal((n, width)), most, device)
    for count in range(1, most + 1):
        space.extend()
        # The matrix of inner products is small, so the error is looked at after each step rather than predicted.
        s, coordinates, error = space.values(k)
        enough = float(np.linalg.norm(error)) <= ENOUGH * float(np.linalg.norm(s))
        if (enough and bool(np.all(error <= np.maximum(CLEAR * s, 2 * ROUNDING * s[0])))) or count == most:
            break
    U, s, V = space.triplets(coordinates)
    # The error is measured, and not taken from the recurrence: rounding would make that one wrong for small values.
    residual = device.numpy(device.multiply_left(U.T, W)).T - device.numpy(V) * s
    return Leading(device.numpy(U), s, device.numpy(V), np.linalg.norm(residual, axis=0) + ROUNDING * s[0], count)


class _Krylov:
    """Orthonormal rows Q (K, n) that span a block Krylov space of WᵀW, and Y = Q Wᵀ (K, m)."""

    def __init__(self, W: Any, start: Floats, most: int, device: Device) -> None:
        self.W, self.device = W, device
        (m, n), width = W.shape, start.shape[1]
        self.size = 0
        # Y has float32 numbers. In float64 their inner products are as accurate as a QR decomposition of Y in float32.
        self._Q, self._Y = device.empty((most * width, n), "float32"), device.empty((most * width, m), "float64")
        self._next = self._outside(device.put(start.T, "float32"))[0]
        self._inner = np.zeros((0, 0))  # YYᵀ, float64
        self._rest = np.zeros((0, 0))  # the part of the last block of Y W outside the span of Q is restᵀ·next

    def extend(self) -> None:
        """Add a block to Q and to Y, by one pass over W."""
        old, size = self.size, self.size + len(self._next)
        self._Q[old:size], (self._Y[old:size], Z) = self._next, self.device.multiply_twice(self._next, self.W)
        self.size = size
        Y = self._Y[old:size]
        cross = self.device.numpy(Y @ self._Y[:size].T)
        inner = np.zeros((size, size))
        inner[:old, :old], inner[old:], inner[:, old:] = self._inner, cross, cross.T
        self._inner = inner
        # WᵀW has twice as many decades as W, so float32 loses small directions in YW. They are kept if Wᵀ is applied to
        # orthonormal vectors instead, in a pass of its own.
        scales = np.eye(len(Y))
        if gram_triangle(cross[:, old:], STEEP) is None:
            P, triangle = self.device.xp.linalg.qr(self._single(Y).T)
            Z, scales = self.device.multiply_left(P.T, self.W), self.device.numpy(triangle)
        # Two passes, since one leaves rounding.
        first, R1 = self._outside(Z)
        self._next, R2 = self._outside(first)
        self._rest = R2 @ R1 @ scales

    def values(self, k: int) -> tuple[Floats, Floats, Floats]:
        """The k largest σ, the coordinates (K, k) of their right vectors in Q, and ‖Wᵀu − σv‖ by the recurrence."""
        squares, vectors = np.linalg.eigh(self._inner)
        s, coordinates = np.sqrt(np.maximum(squares[: -k - 1 : -1], 0.0)), vectors[:, : -k - 1 : -1]
        # Wᵀu is WᵀWv/σ, and only the last block of WᵀWQᵀ has a part outside the span of Q.
        outside = np.linalg.norm(self._rest @ coordinates[-len(self._rest) :], axis=0)
        return s, coordinates, outside / np.maximum(s, ROUNDING * s[0] or 1.0)

    def triplets(self, coordinates: Floats) -> tuple[Any, Floats, Any]:
        """U (m, k), σ (k,) and V (n, k) with W V = U σ, from the coordinates of the right vectors."""
        on_device = self.device.put(coordinates.T, "float64")
        V, WV = (
            self.device.numpy(on_device @ self.device.astype(X[: self.size], "float64")).T for X in (self._Q, self._Y)
        )
        # The columns of WV are nearly orthogonal already; those of length 0 get a direction here.
        P, R = np.linalg.qr(WV)
        a, s, bh = np.linalg.svd(R)
        return self.device.put(P @ a, "float32"), s, self.device.put(V @ bh.T, "float32")

    def _outside(self, Z: Any) -> tuple[Any, Floats]:
        """Orthonormal rows X and R with Z = RᵀX outside the span of Q, after one pass of projection."""
        Q = self._Q[: self.size]
        outside = self.device.astype(Z - (Z @ Q.T) @ Q, "float64")
        # Quicker than a QR decomposition, which remains for rows that are nearly dependent.
        R = gram_triangle(self.device.numpy(outside @ outside.T), CONDITION)
        if R is None:
            vectors, triangle = self.device.xp.linalg.qr(outside.T)
            return self._single(vectors.T), self.device.numpy(triangle)
        return self._single(self.device.put(np.linalg.inv(R.T), "float64") @ outside), R

    def _single(self, X: Any) -> Any:
        return self.device.astype(X, "float32")


OVERSAMPLE = 8  # random directions in addition to those that the caller gives

# Large enough for the matrix products to run at full speed.
PANEL = 1 << 24  # numbers of F in one panel, 64 MiB in float32; a smaller F is made once and kept
CANCELLING = 1e-4  # relative to ‖F‖²: below this ‖F‖² − ‖FV‖² is too inaccurate

Fill = Callable[[int, int, Array], None]


class Approximation(NamedTuple):
    """F (m, n) ≈ B A, both float64. A column of B and its row of A have the same length √σ."""

    B: Floats  # (m, k)
    A: Floats  # (k, n)
    error: float  # ‖F − BA‖_F / ‖F‖_F; 0 where F = 0


def low_rank_approximation(
    fill: Fill, shape: tuple[int, int], *, rank: int, start: Basis, dtype: DTypeLike = np.float32
) -> Approximation:
    """The best approximation of F within a subspace that contains nearly all of its leading right directions.

    Parameters
    ----------
    fill : callable
        ``fill(start, stop, out)`` writes these rows of F into an array, and the same numbers at each call.
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
    (m, n), wide = shape, 2 * (start.k + random) >= shape[1]
    height = min(m, max(1, PANEL // max(1, n)))
    memory = np.empty((height, n), dtype)
    filled = False

    def panels() -> Iterator[tuple[slice, Array]]:
        """F in panels, each of which overwrites the last: products of thin blocks would take twice as long."""
        nonlocal filled
        for first in range(0, m, height):
            rows = slice(first, min(first + height, m))
            panel = memory[: rows.stop - first]
            # All of F fits into one panel: it is made only once.
            if not filled or height < m:
                fill(first, rows.stop, panel)
                filled = True
            yield rows, panel

    on_start, V = _subspace(panels, shape, start, random) if not wide else (np.empty((m, 0)), np.eye(n))
    Y, squares = np.empty((m, V.shape[1])), 0.0
    Y[:, : on_start.shape[1]], fresh = on_start, V[:, on_start.shape[1] :].astype(dtype)
    for rows, panel in panels():
        Y[rows, on_start.shape[1] :] = np.dot(panel, fresh)
        squares += float(np.einsum("ij,ij->i", panel, panel).sum(dtype=np.float64))
    # Checked after the pass, once: Inf or NaN anywhere makes the sum of squares Inf or NaN.
    if not np.isfinite(squares):
        raise FormatError("the combination leaves the range of float32", fix="give smaller weights")
    L, s, R = truncating_maps(Y, V.T)
    # Directions below the rounding of float32 are noise and would only fill the rank.
    k = min(rank, int(np.count_nonzero(s > ROUNDING * s[0]))) if s.size else 0
    outside = 0.0 if wide else max(squares - float(s @ s), 0.0)
    # The difference of two near-equal norms has lost its digits: measure the difference itself, some rows at a time.
    if 0 < outside < CANCELLING * squares:
        step = max(1, PANEL // 64 // n)
        outside = sum(
            float(np.square(panel[i : i + step] - Y[rows][i : i + step] @ V.T).sum())
            for rows, panel in panels()
            for i in range(0, len(panel), step)
        )
    error = sqrt((outside + float(s[k:] @ s[k:])) / squares) if squares else 0.0
    return Approximation(Y @ L[:, :k], R[:k] @ V.T, error)


Panels = Callable[[], Iterable[tuple[slice, Array]]]


def _subspace(panels: Panels, shape: tuple[int, int], start: Basis, random: int) -> tuple[Floats, Floats]:
    """F·start (m, k), and the orthonormal V (n, l) that consists of ``start`` and the part of Z outside it."""
    n, width = shape[1], start.k + random
    first = start.columns()
    # Divided by √n, so that random columns are about as long as the orthonormal ones of `start`.
    columns = np.hstack([first, np.random.default_rng(0).standard_normal((n, random)) / sqrt(n)])
    on_start, Z = np.empty((shape[0], start.k)), np.zeros((n, width))
    for rows, panel in panels():
        Y = np.dot(panel, columns.astype(panel.dtype))
        on_start[rows] = Y[:, : start.k]
        Z += np.dot(panel.T, Y)
    if not np.isfinite(Z).all():
        raise FormatError("the combination leaves the range of float32", fix="give smaller weights")
    for _ in range(2):  # the second projection removes the rounding errors of the first
        Z = column_basis(Z - first @ (first.T @ Z))[0].columns()
    return on_start, np.hstack([first, Z])


# The relative error of Σσ⁴ is 2/√(l(l + 1)): 24 % at l = 8; every column costs a column of the product.
SKETCH = 8  # columns of Ω

Block = tuple[slice, Array]


class Projection(NamedTuple):
    """The results of one pass over S (m, n); NumPy, float64."""

    squares: float  # ‖S‖_F²
    product: Floats  # (k1, k2) LᵀSR
    gram: Floats  # (l, l) ΩᵀSᵀSΩ


class Estimate(NamedTuple):
    """An estimated number and its standard error."""

    value: float
    error: float


def gaussian(rng: "np.random.Generator | None", n: int) -> Floats:
    """Ω: independent standard normal numbers, float64, shape (n, 8); zeros without a generator."""
    return np.zeros((n, SKETCH)) if rng is None else rng.standard_normal((n, SKETCH))


def project(
    blocks: Iterable[Block],
    left: Floats,
    right: Floats,
    sketch: Floats,
    *,
    device: Device,
    out: Any = None,
) -> Projection:
    """Compute norm, projection and sketch of S (m, n) in one pass over blocks of its rows.

    Parameters
    ----------
    blocks : iterable of (slice, array)
        Rows of S with their position, in any order and of any float dtype of NumPy.
    left : float64 array, shape (m, k1)
    right : float64 array, shape (n, k2)
    sketch : float64 array, shape (n, l)
        Ω of `gaussian`.
    device : Device
        Blocks are cast to its dtype: float64 on the CPU, float32 in torch. Results in torch agree to 1e-5.
    out : array of the device, shape (m, n), optional
        Filled with S.

    Raises
    ------
    FormatError
        S holds NaN or Inf.

    Notes
    -----
    The cost is 2 m n (k2 + l) flops in one product, and S is read once. The threads of the device work on blocks, and
    their results are added in the order of the blocks, so the result does not depend on the number of threads.
    """
    k = right.shape[1]
    # One product with both, so that S is read once.
    both = np.hstack([right, sketch])
    R, L = device.put(both), device.put(left)

    def part(block_of_rows: Block) -> tuple[float, Floats, Floats]:
        rows, block = block_of_rows
        with np.errstate(over="ignore", invalid="ignore"):  # each thread has its own
            x = device.cast(block)
            if out is not None:
                # A copy in the dtype of the block is exact, and needs no conversion.
                out[rows, :] = block if block.dtype == out.dtype else x
            y = x @ R
            P, G = L[rows, :].T @ y[:, :k], y[:, k:].T @ y[:, k:]
            return device.squares(x), device.numpy(P), device.numpy(G)

    # Partial results are added up here, by one thread and in order, so the bits do not depend on the threads.
    squares, product = 0.0, np.zeros((left.shape[1], k))
    gram = np.zeros((sketch.shape[1], sketch.shape[1]))
    for square, P, G in device.map(part, blocks):
        with np.errstate(over="ignore", invalid="ignore"):
            squares, product, gram = squares + square, product + P, gram + G
    # One check for the whole pass: any NaN or Inf in S makes the sum of squares NaN or Inf.
    if not np.isfinite(squares):
        raise FormatError("the weight holds NaN or Inf", fix="the base is damaged: download it again")
    return Projection(squares, product, gram)


def fourth_powers(
    projection: Projection, shape: tuple[int, int], *, leading: tuple[Floats, Floats] | None = None
) -> Estimate:
    """Estimate Σσ⁴ of S, which is ‖SᵀS‖_F², and its standard error from the sketch.

    Parameters
    ----------
    projection : Projection
    shape : tuple of int
        Shape of S.
    leading : tuple, optional
        Leading singular values s (k,) of S, and VᵀΩ (k, l), where V are their right vectors. Only the other singular
        values are then estimated.

    Notes
    -----
    Let M = SᵀS, t = tr M = ‖S‖_F² and G = ΩᵀMΩ. Then E‖G − t·1‖_F² = l(l + 1) tr M² exactly, since E G_ij² = tr M² for
    i ≠ j and Var G_ii = 2 tr M². The estimate is limited to values that some spectrum can have. Its error is that of
    the jackknife over the columns of Ω. If many σ share the energy, the relative error is 2/√(l(l + 1)), 24 % at l = 8.
    If a few σ hold most of the energy, the sketch may miss them. The relative error then grows to 1, and it is
    understated in one case of four. Leading values that are known remove this error.
    """
    count, tail, G = min(shape), projection.squares, projection.gram
    head, highest = 0.0, projection.squares
    # Leading directions that are known exactly are taken out of the sketch, which estimates only what remains.
    if leading:
        s, overlap = leading
        count, tail = count - s.size, max(tail - float(s @ s), 0.0)
        head, highest = float(np.sum(s**4)), min(float(s[-1]) ** 2, tail)
        G = G - (overlap.T * s**2) @ overlap
    # The known values are all there are, so nothing is estimated.
    if count <= 0 or tail <= 0:
        return Estimate(head, 0.0)
    size, squares = len(G), (G - tail * np.eye(len(G))) ** 2
    unbiased = float(squares.sum()) / (size * (size + 1))
    # Jackknife: the estimate that results when each column of Ω is left out in turn.
    without = (squares.sum() - 2 * squares.sum(axis=0) + squares.diagonal()) / (size * (size - 1))
    error = float(np.sqrt((size - 1) * without.var()))
    # No spectrum of `count` values with this Σσ² has a Σσ⁴ outside these bounds. The lower bound is that of equal
    # values, the upper bound that of values equal to the largest possible one.
    return Estimate(head + min(max(unbiased, tail**2 / count), tail * highest), error)


def exact_fourth_powers(S: Any, *, device: Device) -> float:
    """Σσ⁴ of S (m, n) from the Gram matrix of its shorter side, in m n min(m, n) multiplications."""
    # SSᵀ and SᵀS have the same nonzero eigenvalues; the smaller of them is cheaper.
    short = S if S.shape[0] <= S.shape[1] else S.T
    return float(np.sum(device.numpy(short @ short.T) ** 2))
