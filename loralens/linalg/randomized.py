"""Leading singular triplets of a big matrix by a randomised block Krylov method, with an error bound.

The method is that of Halko, Martinsson & Tropp 2011 with a Krylov space instead of powers (Musco & Musco 2015). It is a
block Golub–Kahan bidiagonalisation from a Gaussian start, in which every block is orthogonalised against all before it.
"""

from collections.abc import Callable
from typing import Any, NamedTuple, TypeVar

import numpy as np

from loralens.linalg.compiled.loops import BFLOAT16, PART
from loralens.linalg.device import CopyFloat, Device, Float
from loralens.linalg.factor import Floats, gram_triangle

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

COLUMNS = 2048  # of a block of long rows that are worked on at a time, so that they stay in a cache
MOST_COLUMNS = 0.625  # of the space, as a share of the shorter side
SMALL = 512  # length of the shorter side up to which the dense SVD is as fast
FEWEST = 3  # steps that must fit into the matrix; otherwise the dense SVD is used

T = TypeVar("T")
Step = Callable[[int], None]


class Leading(NamedTuple):
    """Leading singular triplets of W (m, n), largest first; NumPy, float64."""

    U: Floats  # (m, k)
    s: Floats  # (k,)
    V: Floats  # (n, k)
    error: Floats  # (k,) bound of the distance from each s to a singular value of W; 0 where the SVD was dense
    steps: int  # 0 where the SVD was dense


def is_dense(shape: tuple[int, int], k: int, *, exact: bool = False) -> bool:
    """Whether `leading_svd` computes the dense SVD, because ``exact`` demands it or because it is as cheap."""
    return exact or min(shape) <= SMALL or FEWEST * _width(k) > min(shape) // 2


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


def leading_svd(
    W: Any, k: int, *, rng: "np.random.Generator | None", device: Device, exact: bool = False, step: Step | None = None
) -> Leading:
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
    step : callable, optional
        Called after every step with the number of entries of W.

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
        return _dense(W, k, device)
    assert rng is not None
    with device.keep_threads() as threaded:
        return _iterate(W, k, rng, threaded, step)


def _iterate(W: Any, k: int, rng: "np.random.Generator", device: Device, step: Step | None) -> Leading:
    """The k leading triplets by block Krylov steps."""
    (m, n), width = W.shape, _width(k)
    # Every step adds `width` columns on both sides; with many more, a dense SVD would do as well.
    most = min(STEPS, int(MOST_COLUMNS * min(m, n)) // width)
    space = _Krylov(W, rng.standard_normal((n, width)), most, device)
    for count in range(1, most + 1):
        space.extend()
        if step:
            step(m * n)
        # The matrix of inner products is small, so the error is looked at after each step rather than predicted.
        s, coordinates, error = space.values(k)
        enough = float(np.linalg.norm(error)) <= ENOUGH * float(np.linalg.norm(s))
        if (enough and bool(np.all(error <= np.maximum(CLEAR * s, 2 * ROUNDING * s[0])))) or count == most:
            break
    U, s, V = space.triplets(coordinates)
    # The error is measured, and not taken from the recurrence: rounding would make that one wrong for small values.
    residual = device.numpy(device.multiply_left(U.T, W)).T - device.numpy(V) * s
    return Leading(device.numpy(U), s, device.numpy(V), np.linalg.norm(residual, axis=0) + ROUNDING * s[0], count)


def _width(k: int) -> int:
    """Number of columns of a block."""
    return -(-k // MULTIPLE) * MULTIPLE


def _dense(W: Any, k: int, device: Device) -> Leading:
    """The k leading triplets of the whole SVD."""
    U, s, Vh = device.xp.linalg.svd(W, full_matrices=False)
    return Leading(device.numpy(U[:, :k]), device.numpy(s[:k]), device.numpy(Vh[:k, :].T), np.zeros(k), 0)


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
        self._Q[old:size], (Y, Z) = self._next, self.device.multiply_twice(self._next, self.W)
        self.size = size

        def cross_part(columns: slice) -> Floats:
            self._Y[old:size, columns] = self._double(Y[:, columns])
            return self.device.numpy(self._Y[old:size, columns] @ self._Y[:size, columns].T)

        cross = _total(self._map_columns(cross_part, Y.shape[1]))
        inner = np.zeros((size, size))
        inner[:old, :old], inner[old:], inner[:, old:] = self._inner, cross, cross.T
        self._inner = inner
        # WᵀW has twice as many decades as W, so float32 loses small directions in YW. They are kept if Wᵀ is applied to
        # orthonormal vectors instead, in a pass of its own.
        scales = np.eye(len(Y))
        if gram_triangle(cross[:, old:], STEEP) is None:
            P, triangle = self.device.xp.linalg.qr(Y.T)
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

        def combine(X: Any) -> Floats:
            """The rows of X with these coordinates, as columns."""
            parts = self._map_columns(lambda part: on_device @ self._double(X[: self.size, part]), X.shape[1])
            return np.vstack([self.device.numpy(part).T for part in parts])

        V, WV = combine(self._Q), combine(self._Y)
        # The columns of WV are nearly orthogonal already; those of length 0 get a direction here.
        P, R = np.linalg.qr(WV)
        a, s, bh = np.linalg.svd(R)
        return self.device.put(P @ a, "float32"), s, self.device.put(V @ bh.T, "float32")

    def _outside(self, Z: Any) -> tuple[Any, Floats]:
        """Orthonormal rows X and R with Z = RᵀX outside the span of Q, after one pass of projection."""
        Q, n = self._Q[: self.size], Z.shape[1]
        outside = self.device.empty(Z.shape, "float64")
        inside = _total(self._map_columns(lambda columns: Z[:, columns] @ Q[:, columns].T, n))

        def project_part(columns: slice) -> Floats:
            outside[:, columns] = self._double(Z[:, columns] - inside @ Q[:, columns])
            part = outside[:, columns]
            return self.device.numpy(part @ part.T)

        gram = _total(self._map_columns(project_part, n))
        # Quicker than a QR decomposition, which remains for rows that are nearly dependent.
        R = gram_triangle(gram, CONDITION)
        if R is None:
            vectors, triangle = self.device.xp.linalg.qr(outside.T)
            return self._single(vectors.T), self.device.numpy(triangle)
        X, inverse = self.device.empty(Z.shape, "float32"), self.device.put(np.linalg.inv(R.T), "float64")

        def scale_part(columns: slice) -> None:
            X[:, columns] = self._single(inverse @ outside[:, columns])

        for _ in self._map_columns(scale_part, n):
            pass
        return X, R

    def _map_columns(self, work: Callable[[slice], T], count: int) -> list[T]:
        """The results of ``work`` for parts of ``count`` columns, in order, which threads share on the CPU."""
        length = COLUMNS if self.device.torch is None else count
        return list(self.device.map(work, (slice(first, first + length) for first in range(0, count, length))))

    def _single(self, X: Any) -> Any:
        return self.device.astype(X, "float32")

    def _double(self, X: Any) -> Any:
        return self.device.astype(X, "float64")


def _total(parts: list[Any]) -> Any:
    """The sum of parts of a matrix, in order."""
    total = parts[0]
    for part in parts[1:]:
        total = total + part
    return total
