"""The QR decomposition of a thin factor X (m, r), from its Gram matrix where that is accurate enough.

X̂ is X with its columns scaled to length 1, and R is the triangle in X̂ = Q R. There are three ways to compute R. The
first of them that is safe is taken:

    cholesky      From the Gram matrix G = X̂ᵀX̂, one pass over X. Errs by ε κ(X̂), so only if κ is small.
    rotated       The directions that G represents badly are its last eigenvectors V₂. A second pass computes X̂V₂ and
                  its Gram matrix, stably because V is orthogonal. That gives R_V of X̂V, and R = qr(R_V Vᵀ).
    householder   All other cases: r > m, vanishing columns, a factor whose own spectrum spans a dozen decades.
"""

import math
import threading
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from math import prod
from typing import Any, Literal, NamedTuple, Self, final

import numpy as np
from numpy.typing import DTypeLike, NDArray

from loralens.errors import NOT_FINITE, FormatError

Array = NDArray[Any]
Floats = NDArray[np.float64]
Integers = NDArray[np.int64]
Route = Literal["cholesky", "rotated", "householder"]

LINE = 64  # bytes of a line of the cache
BLOCK = 1 << 16  # elements of a factor that are held in float64 at a time: 512 KiB stay in the cache


def aligned(size: int, dtype: DTypeLike) -> Array:
    """Uninitialised memory for ``size`` numbers that begins with a line of the cache.

    Elsewhere every instruction on 64 bytes touches two lines, which takes a fifth more time.
    """
    memory = np.empty(size * np.dtype(dtype).itemsize + LINE, np.uint8)
    first = -memory.ctypes.data % LINE
    return memory[first : first + size * np.dtype(dtype).itemsize].view(dtype)


@final
class ReusedMemory(threading.local):
    """Gives arrays in the same memory: each overwrites the one before that the same thread got.

    New memory comes in pages that the system clears first, which takes as long as writing the numbers of a matrix.
    """

    def __init__(self) -> None:
        self._memory: NDArray[np.uint8] = np.empty(0, np.uint8)

    def __call__(self, shape: tuple[int, ...], dtype: DTypeLike = np.float64) -> Array:
        """An array without defined numbers."""
        size = prod(shape) * np.dtype(dtype).itemsize
        if self._memory.size < size:
            self.forget()  # first, so that both are never there at the same time
            self._memory = aligned(size, np.uint8)
        return self._memory[:size].view(dtype).reshape(shape)

    def forget(self) -> None:
        """Free the memory that this thread holds."""
        self._memory = np.empty(0, np.uint8)


_blocks = ReusedMemory()


def common_dtype(dtypes: Iterable[np.dtype[Any]]) -> np.dtype[Any]:
    """The dtype that all of these share; else float64 if it is among them, and float32, which holds all narrower ones.

    NumPy knows a common dtype of float16 and bfloat16 with some versions of ml_dtypes only.
    """
    different = set(dtypes)
    if len(different) == 1:
        return different.pop()
    return np.dtype(np.float64 if np.dtype(np.float64) in different else np.float32)


def side_by_side(parts: Sequence[Array]) -> Array:
    """Factors of n rows as one of shape (n, Σr), in their memory order and their `common_dtype`."""
    if len(parts) == 1:
        return parts[0]
    dtype = common_dtype(part.dtype for part in parts)
    parts = [part.astype(dtype, copy=False) for part in parts]
    if all(memory_order(part) == "F" for part in parts):
        return np.vstack([part.T for part in parts]).T
    return np.hstack(parts)


def memory_order(X: Array) -> Literal["C", "F"]:
    """The order in which arrays made of X are filled along the memory: "F" where its columns are contiguous."""
    return "F" if X.strides[0] < X.strides[1] else "C"


def blocks_of(X: Array) -> Iterator[tuple[slice, Floats]]:
    """X in float64, some rows at a time, with their slice. The next block overwrites the last one."""
    (n, width), order = X.shape, memory_order(X)
    step = max(1, BLOCK // max(1, width))
    for start in range(0, n, step):
        rows = slice(start, min(start + step, n))
        # The block has the memory order of X, so that casting runs along the memory.
        block = _blocks((rows.stop - start, width)) if order == "C" else _blocks((width, rows.stop - start)).T
        np.copyto(block, X[rows])
        yield rows, block


# At this limit the first route errs by about 1e-14 ‖X̂‖; beyond it a second pass over X is worth its time.
CONDITION_LIMIT = 40.0  # measured: the Gram matrix errs by up to 2.3e-16 κ ‖X̂‖ in every singular value of X̂
# Squaring makes the relative error of σ larger by the factor σ_1/σ: at a tenth of σ_1, one of sixteen digits is lost.
STRONG = 10.0  # a second pass is needed for the directions of X̂ with σ below σ_1 / STRONG
NEARLY_ORTHOGONAL = 3.0  # condition up to which one Cholesky makes columns orthonormal to a few ε
SQUARES = (1e-200, 1e200)  # squared norms outside are measured again after an exact scaling


def gram(X: Array, basis: Floats | None = None) -> Floats:
    """Xᵀ X in float64, shape (r, r), for X (m, r) of any float dtype; no float64 copy of X is made.

    With a ``basis`` V (r, k) it is the Gram matrix of X V, shape (k, k).
    """
    k = X.shape[1] if basis is None else basis.shape[1]
    G = np.zeros((k, k))
    # Overflow is not an error here: `measure` sees it in the norms and scales X first.
    with np.errstate(over="ignore", invalid="ignore"):
        for _, x in blocks_of(X):
            y = x if basis is None else x @ basis
            G += np.dot(y.T, y)  # not @: matmul keeps the GIL while the result is small
    return G


def multiply_block(X: Floats, T: Floats) -> Floats:
    """X @ T of one block of a factor, in the memory order of the block."""
    # NumPy takes several times as long to assign an array in the other order.
    return np.asarray(np.dot(X, T) if memory_order(X) == "C" else np.dot(T.T, X.T).T, dtype=np.float64)


def cross_gram(X: Array, Y: Array) -> Floats:
    """Xᵀ Y in float64, shape (r1, r2), for X (m, r1) and Y (m, r2) of any float dtypes; computed as in `gram`."""
    if all(_is_block(Z, max(X.shape[1], Y.shape[1])) for Z in (X, Y)):
        with np.errstate(over="ignore", invalid="ignore"):
            return np.asarray(np.dot(X.T, Y) + 0.0, dtype=np.float64)  # as the sum below, which turns −0 into 0
    G = np.zeros((X.shape[1], Y.shape[1]))
    # The wider factor decides the height of a block.
    first, second = (X, Y) if X.shape[1] >= Y.shape[1] else (Y, X)
    with np.errstate(over="ignore", invalid="ignore"):
        for rows, x in blocks_of(first):
            y = second[rows].astype(np.float64, copy=False)
            G += np.dot(x.T, y) if first is X else np.dot(y.T, x)
    return G


def _is_block(X: Array, width: int) -> bool:
    """Whether a factor is one block beside one of this width, and need not be cast: a copy would take longer."""
    return X.dtype == np.float64 and len(X) * width <= BLOCK and (X.flags.c_contiguous or X.flags.f_contiguous)


class Measured(NamedTuple):
    """A factor with its Gram matrix and column norms. Column k stands for 2**exponents[k] times itself."""

    X: Array  # (m, r)
    G: Floats  # (r, r) Gram matrix of X
    norms: Floats  # (r,) of the columns of X
    exponents: Integers  # (r,)


def times(X: Array, T: Floats, dtype: np.dtype[Any]) -> Array:
    """X @ T for T (r, k), computed blockwise in float64 and rounded once to ``dtype``; shape (m, k).

    The product has the memory order of X.

    Raises
    ------
    FormatError
        As `check_in_range`.
    """
    product = np.empty((len(X), T.shape[1]), dtype, order=memory_order(X))
    with np.errstate(over="ignore"):
        for rows, block in blocks_of(X):
            # The assignment rounds to `dtype`, once.
            product[rows] = multiply_block(block, T)
    return check_in_range(product, dtype)


def check_in_range(array: Array, dtype: np.dtype[Any], *, what: str = "factors") -> Array:
    """Return ``array``, after a check that rounding to ``dtype`` has not made some of its numbers infinite.

    Raises
    ------
    FormatError
        Some number is not finite. ``what`` names the numbers in the message.
    """
    if not np.isfinite(array).all():
        raise FormatError(f"its {what} are too large for {dtype}", fix="give --dtype bf16 or f32")
    return array


def require_finite(X: Array) -> Array:
    """Return X, a factor or numbers computed from one, after a check that all of it is finite.

    Raises
    ------
    FormatError
        X holds NaN or Inf.
    """
    if not np.isfinite(X).all():
        raise FormatError(NOT_FINITE, fix="the adapter is damaged or diverged: use an earlier one")
    return X


def measure(X: Array) -> Measured:
    """Gram matrix and column norms of X, scaled first if their squares would over- or underflow.

    Raises
    ------
    FormatError
        X holds NaN or Inf.
    """
    G = gram(X)
    exponents = np.zeros(len(G), dtype=np.int64)
    squares = G.diagonal()
    if not (SQUARES[0] < squares.min(initial=1.0) and squares.max(initial=1.0) < SQUARES[1]):  # not: NaN is never <
        X, exponents = scale_columns(X)
        G = gram(X)
    return Measured(X, G, np.sqrt(G.diagonal()), exponents)


def scale_columns(X: Array) -> tuple[Floats, Integers]:
    """X with each column scaled exactly, by a power of two, to a largest entry in [0.5, 1), and the exponents.

    Raises
    ------
    FormatError
        X holds NaN or Inf.
    """
    X = X.astype(np.float64)
    # A maximum passes NaN and Inf on, so the check reads r numbers instead of m · r.
    peaks = require_finite(np.abs(X).max(axis=0, initial=0.0))
    exponents = np.frexp(peaks)[1].astype(np.int64)
    return np.ldexp(X, -exponents), exponents


def triangle(factor: Measured, order: Integers) -> tuple[Route, Floats]:
    """R (min(m, k), k) of X̂[:, order] = Q R by the cheapest safe route, and the name of that route."""
    norms = factor.norms[order]
    G = _equilibrate(_in_order(factor.G, order), norms)
    R = _cholesky(G, CONDITION_LIMIT)
    if R is not None:
        return "cholesky", R
    # With r > m the small eigenvalues of G are 0, and their directions have no length to measure.
    R = _rotated_triangle(factor, order, G) if factor.X.shape[0] >= order.size else None
    if R is not None:
        return "rotated", R
    return "householder", _householder_triangle(factor.X[:, order].astype(np.float64) / norms)


def _rotated_triangle(factor: Measured, order: Integers, G: Floats) -> Floats | None:
    """R of X̂[:, order] by way of X̂V, or None where that is not safe; G = V Λ Vᵀ is the Gram matrix of X̂[:, order].

    X̂V has the Gram matrix Λ, but the small λ are mostly rounding error. So their columns X̂V₂ are computed, and the
    Gram matrix of these. Outside the two diagonal blocks there is only the rounding error of the large λ.
    """
    values, V = _eigenvectors(G)
    # Eigenvalues of G are squares of singular values.
    strong = np.count_nonzero(values * STRONG**2 > values[0])
    H = gram(factor.X, basis=_factor_map(V[:, strong:], factor, order))
    y = np.sqrt(H.diagonal())
    R = _cholesky(_equilibrate(H, y), CONDITION_LIMIT) if y.all() else None
    if R is None:
        return None
    # Rounding may make the small eigenvalues negative; they are replaced below.
    T = np.diag(np.sqrt(np.maximum(values, 0.0)))
    T[strong:, strong:] = R * y
    return _householder_triangle(T @ V.T)


def orthonormal(factor: Measured, order: Integers) -> tuple[Floats, Floats, Floats]:
    """Y (m, k), Z (k, k) and R (k, r) with X̂[:, order] = Q R, where Q = Y Z is orthonormal, k = min(m, r)."""
    # Zero columns are divided by 1 and stay zero.
    norms = np.where(factor.norms > 0, factor.norms, 1.0)[order]
    # The Gram matrix of more columns than rows, or of zero columns, is singular: only Householder deals with it.
    if factor.norms.all() and factor.X.shape[0] >= order.size:
        V = _eigenvectors(_equilibrate(_in_order(factor.G, order), norms))[1]
        Y = factor.X.astype(np.float64) @ _factor_map(V, factor, order)
        H = gram(Y)
        y = np.sqrt(H.diagonal())
        L = _cholesky(_equilibrate(H, y), NEARLY_ORTHOGONAL) if y.all() else None
        if L is not None:
            Q, R = np.linalg.qr((L * y) @ V.T)  # X̂ = Y Vᵀ = Y (L y)⁻¹ Q R
            return Y, np.linalg.solve(L, Q) / y[:, None], R
    Q, R = np.linalg.qr(factor.X[:, order].astype(np.float64) / norms)
    return Q, np.eye(Q.shape[1]), R


def implicit(factor: Measured, order: Integers, R: Floats | None = None) -> tuple[Array, Floats, Floats]:
    """X, T and R with X̂[:, order] = Q R, where Q = X T is orthonormal and not formed; X is the factor if possible.

    T = R⁻¹ loses κ(X̂)² ε of orthonormality, so the factor itself is used only where the Cholesky route is safe. In all
    other cases the result is that of `orthonormal`. The R of `triangle` may be given if it came by the Cholesky route.
    """
    if factor.norms.all() and R is None:
        R = _cholesky(_equilibrate(_in_order(factor.G, order), factor.norms[order]), CONDITION_LIMIT)
    if factor.norms.all() and R is not None:
        return factor.X, _factor_map(np.asarray(np.linalg.inv(R), np.float64), factor, order), R
    return orthonormal(factor, order)


def gram_triangle(G: Floats, limit: float) -> Floats | None:
    """R with RᵀR = G for a Gram matrix G; None if a column is 0, or if κ > ``limit`` for columns scaled to length 1."""
    norms = np.sqrt(G.diagonal())
    if not norms.all():
        return None
    R = _cholesky(_equilibrate(G, norms), limit)
    return None if R is None else R * norms


def _eigenvectors(G: Floats) -> tuple[Floats, Floats]:
    """Eigenvalues and eigenvectors of a symmetric G, largest first."""
    values, V = np.linalg.eigh(G)
    return values[::-1], V[:, ::-1]


def _factor_map(V: Floats, factor: Measured, order: Integers) -> Floats:
    """T with X T = X̂[:, order] V, so that no permuted or scaled copy of X is needed."""
    basis = np.zeros((factor.norms.size, V.shape[1]))
    basis[order] = V / factor.norms[order, None]
    return basis


def _householder_triangle(X: Floats) -> Floats:
    """R (min(m, r), r) of the Householder QR of X."""
    return np.asarray(np.linalg.qr(X, mode="r"), dtype=np.float64)


def _in_order(G: Floats, order: Integers) -> Floats:
    """The rows and columns of G in another order."""
    # In half the time of one index for both.
    return G.take(order, axis=0).take(order, axis=1)


def _equilibrate(G: Floats, norms: Floats) -> Floats:
    """The Gram matrix after the columns, whose lengths are ``norms``, are scaled to length 1."""
    return G / norms / norms[:, None]


def _cholesky(G: Floats, limit: float) -> Floats | None:
    """R with RᵀR = G, or None unless κ(R) ≤ limit. G has a unit diagonal."""
    try:
        R = np.asarray(np.linalg.cholesky(G).T, dtype=np.float64)
    except np.linalg.LinAlgError:
        return None
    # trace G = r, so λ_max ≤ r and λ_min ≥ det G ((r - 1)/r)**(r - 1) ≥ det G / e: a free bound, enough for most.
    if math.e * len(G) <= (limit * np.prod(R.diagonal())) ** 2:
        return R
    # Only where the free bound does not decide: eigenvalues cost more than the Cholesky factor.
    low, high = np.linalg.eigvalsh(G)[[0, -1]]
    return R if high <= limit**2 * low else None


@final
@dataclass(frozen=True, slots=True)
class Basis:
    """Orthonormal columns X @ T, ordered by singular value; the product is formed only by `columns`.

    Attributes
    ----------
    X : array, shape (n, r), any float dtype
    T : float64 array, shape (r, k)
    """

    X: Array
    T: Floats

    @classmethod
    def of(cls, columns: Floats) -> Self:
        """The basis that consists of these orthonormal columns, shape (n, k)."""
        return cls(columns, np.eye(columns.shape[1]))

    @property
    def n(self) -> int:
        """Length of a column: the dimension of the space."""
        return int(self.X.shape[0])

    @property
    def k(self) -> int:
        """Number of columns."""
        return int(self.T.shape[1])

    def columns(self) -> Floats:
        """The columns themselves, float64, shape (n, k)."""
        return np.asarray(self.X.astype(np.float64) @ self.T, dtype=np.float64)

    def head(self, k: int) -> "Basis":
        """The first k columns."""
        return Basis(self.X, self.T[:, :k])

    def cast(self) -> "Basis":
        """The same basis with its tall factor in float64, which `cross` then need not cast each time."""
        return Basis(self.X.astype(np.float64), self.T)  # the memory order stays, and so do the bits of products

    def cross(self, other: "Basis") -> Floats:
        """Inner products of the columns, float64, shape (k, other.k), by one thin product without forming columns."""
        return np.asarray(self.T.T @ cross_gram(self.X, other.X) @ other.T, dtype=np.float64)
