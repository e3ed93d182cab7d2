"""Singular values, SVD, norm and inner product of ``B @ A`` from its thin factors; the product is never formed.

A factor X is reduced to a small triangle first. The rank index is sorted so that D = diag(‖b_k‖‖a_k‖) falls; X̂ is X
with its columns scaled to length 1. Three routes lead to R in X̂ = Q R; the first that is safe is taken:

    cholesky      From the Gram matrix G = X̂ᵀX̂, one pass over X. Errs by ε κ(X̂), so only if κ is small.
    rotated       The directions that G holds badly are its last eigenvectors V₂. A second pass computes X̂V₂, stably
                  because V is orthogonal, and the Gram matrix of that. Then R_V of X̂V is known, and R = qr(R_V Vᵀ).
    householder   What is left: r > m, vanishing columns, a factor whose own spectrum spans a dozen decades.

The core R_B D R_Aᵀ has the singular values of B A and is graded from its top left corner, which is how LAPACK
keeps the small ones.
"""

import threading
from collections.abc import Iterator
from typing import Any, Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray

from loralens.errors import FormatError, ShapeError

Array = NDArray[Any]
Floats = NDArray[np.float64]
Integers = NDArray[np.int64]
Route = Literal["cholesky", "rotated", "householder"]

CONDITION_LIMIT = 40.0  # measured: the Gram matrix errs by up to 2.3e-16 κ ‖X̂‖ in every singular value of X̂
STRONG = 10.0  # a second pass is needed for the directions of X̂ with σ below σ_1 / STRONG
NEARLY_ORTHOGONAL = 3.0  # condition up to which one Cholesky makes columns orthonormal to a few ε
SQUARES = (1e-200, 1e200)  # squared norms outside are measured again after an exact scaling
BLOCK = 1 << 16  # elements of a factor that are held in float64 at a time: 512 KiB stay in the cache


def product_singular_values(B: Array, A: Array) -> Floats:
    """Singular values of ``B @ A``, largest first.

    Parameters
    ----------
    B : array, shape (m, r), any float dtype
    A : array, shape (r, n), any float dtype

    Returns
    -------
    float64 array, shape (min(m, r, n),)

    Raises
    ------
    ShapeError
        B and A do not multiply.
    FormatError
        A factor holds NaN or Inf.

    Notes
    -----
    O((m + n) r²) work in a few megabytes of memory. |σ̂ − σ| ≤ c ε ‖B‖₂‖A‖₂ with c below 100. Where only the
    *lengths* of B's columns and A's rows are spread, over any range and in any order, every σ is accurate relative
    to itself; those of the formed product are not. A spread hidden by a rotation (B Q, Qᵀ A) is lost to every
    method that reads rounded factors.
    """
    _check_shapes(B, A)
    s = np.zeros(min(*B.shape, A.shape[1]))
    M, exponent = _core(B, A)
    if M.size:
        found = np.linalg.svd(M, compute_uv=False)
        s[: found.size] = np.ldexp(found, exponent)
    return s


def product_svd(B: Array, A: Array) -> tuple[Floats, Floats, Floats]:
    """Thin SVD of ``B @ A`` from two thin orthogonalisations and one small SVD.

    Parameters
    ----------
    B : array, shape (m, r), any float dtype
    A : array, shape (r, n), any float dtype

    Returns
    -------
    U : float64 array, shape (m, k)
        Orthonormal columns, k = min(m, r, n), also where σ = 0. In every column the entry of largest absolute
        value (the first, if several) is positive.
    s : float64 array, shape (k,)
        Singular values, largest first, as accurate as those of `product_singular_values`.
    Vh : float64 array, shape (k, n)
        Orthonormal rows.

    Raises
    ------
    ShapeError, FormatError
        As `product_singular_values`.

    Notes
    -----
    O((m + n) r²) work. ``U * s @ Vh`` is B A up to c ε ‖B‖₂‖A‖₂. The vectors of σ_i are those of a backward stable
    SVD, with an error of about ε ‖B‖₂‖A‖₂ / gap_i: the values of a graded spectrum are better than that, its vectors
    not always.
    """
    if _check_shapes(B, A) == 0:
        return np.zeros((B.shape[0], 0)), np.zeros(0), np.zeros((0, A.shape[1]))
    left, right = _measure(B), _measure(A.T)
    order, D, exponent = _graded(left, right)
    Y_B, Z_B, R_B = _orthonormal(left, order)
    Y_A, Z_A, R_A = _orthonormal(right, order)
    M = (R_B * D) @ R_A.T
    U, _, Vh = np.linalg.svd(M, full_matrices=False)
    s = np.linalg.svd(M, compute_uv=False)  # with vectors and r > 25 LAPACK may lose the small values of a graded M
    U, Vh = Y_B @ (Z_B @ U), (Vh @ Z_A.T) @ Y_A.T
    signs = _signs(U)
    U *= signs
    Vh *= signs[:, None]
    return U, np.ldexp(s, exponent), Vh


def product_norm(B: Array, A: Array) -> float:
    """Frobenius norm of ``B @ A``, float64: that of the core R_B D R_Aᵀ.

    Error c ε ‖B‖_F‖A‖_F. The shorter √Σ(BᵀB ∘ AAᵀ) errs by √ε of that where the columns of B cancel in the product.
    Raises as `product_singular_values`.
    """
    _check_shapes(B, A)
    M, exponent = _core(B, A)
    return float(np.ldexp(np.linalg.norm(M), exponent))


def product_inner(B1: Array, A1: Array, B2: Array, A2: Array) -> float:
    """Frobenius inner product ⟨B1 A1, B2 A2⟩ = Σ (B1ᵀB2 ∘ A1A2ᵀ), float64.

    B1 (m, r1), A1 (r1, n), B2 (m, r2), A2 (r2, n): the ranks may differ. Error c ε ‖B1‖_F‖A1‖_F‖B2‖_F‖A2‖_F, which
    is large beside the result if the products are nearly orthogonal. Raises as `product_singular_values`, and
    ShapeError if the two products differ in shape.
    """
    _check_shapes(B1, A1)
    _check_shapes(B2, A2)
    first, second = (B1.shape[0], A1.shape[1]), (B2.shape[0], A2.shape[1])
    if first != second:
        raise ShapeError(f"products of shapes {first} and {second} have no inner product", fix="pass equal shapes")
    M_B, e_B = _cross(B1, B2)
    M_A, e_A = _cross(A1.T, A2.T)
    return float(np.ldexp(np.vdot(M_B, M_A), e_B + e_A))


def gram(X: Array, basis: Floats | None = None) -> Floats:
    """Xᵀ X in float64, shape (r, r), for X (m, r) of any float dtype; no float64 copy of X is made.

    With a ``basis`` V (r, k) it is the Gram matrix of X V, shape (k, k).
    """
    k = X.shape[1] if basis is None else basis.shape[1]
    G = np.zeros((k, k))
    with np.errstate(over="ignore", invalid="ignore"):
        for x in _blocks(X, _block_rows(X), _scratch.of(min(X.size, max(BLOCK, X.shape[1])))):
            y = x if basis is None else x @ basis
            G += np.dot(y.T, y)  # not @: matmul keeps the GIL while the result is small
    return G


def cross_gram(X: Array, Y: Array) -> Floats:
    """Xᵀ Y in float64, shape (r1, r2), for X (m, r1) and Y (m, r2) of any float dtypes; made blockwise as `gram`."""
    G = np.zeros((X.shape[1], Y.shape[1]))
    rows = min(_block_rows(X), _block_rows(Y))
    with np.errstate(over="ignore", invalid="ignore"):
        for x, y in zip(_blocks(X, rows), _blocks(Y, rows), strict=True):
            G += x.T @ y
    return G


class _Measured(NamedTuple):
    """A factor, and what one pass over it tells. Column k stands for 2**exponents[k] times itself."""

    X: Array  # (m, r)
    G: Floats  # (r, r) Gram matrix of X
    norms: Floats  # (r,) of the columns of X
    exponents: Integers  # (r,)


def _check_shapes(B: Array, A: Array) -> int:
    """min(m, r, n), or a ShapeError."""
    if B.ndim != 2 or A.ndim != 2 or B.shape[1] != A.shape[0]:
        raise ShapeError(f"B {B.shape} and A {A.shape} do not multiply", fix="pass B as (m, r) and A as (r, n)")
    return int(min(*B.shape, A.shape[1]))


class _Scratch(threading.local):
    """A float64 buffer for each thread, kept: fresh pages cost more than casting into old ones."""

    def __init__(self) -> None:
        self.buffer = np.empty(0)

    def of(self, size: int) -> Floats:
        """``size`` numbers to write into."""
        if self.buffer.size < size:
            self.buffer = np.empty(size)
        return self.buffer[:size]


_scratch = _Scratch()


def _block_rows(X: Array) -> int:
    """How many rows of X make a block."""
    return int(max(1, BLOCK // max(1, X.shape[1])))


def _blocks(X: Array, rows: int, buffer: Floats | None = None) -> Iterator[Floats]:
    """X in float64, ``rows`` at a time. A block in ``buffer``, where one is given, is gone when the next one comes."""
    order: Literal["C", "F"] = "F" if X.strides[0] < X.strides[1] else "C"
    for i in range(0, X.shape[0], rows):
        x = X[i : i + rows]
        if buffer is None:
            yield x.astype(np.float64)
            continue
        block = buffer[: x.size].reshape(x.shape, order=order)
        np.copyto(block, x)
        yield block


def _measure(X: Array) -> _Measured:
    """Gram matrix and column norms of X, scaled first if their squares would over- or underflow."""
    G = gram(X)
    exponents = np.zeros(len(G), dtype=np.int64)
    squares = G.diagonal()
    if not (SQUARES[0] < squares.min(initial=1.0) and squares.max(initial=1.0) < SQUARES[1]):  # not: NaN is never <
        X, exponents = _scaled(X)
        G = gram(X)
    return _Measured(X, G, np.sqrt(G.diagonal()), exponents)


def _scaled(X: Array) -> tuple[Floats, Integers]:
    """X with each column scaled exactly, by a power of two, to a largest entry in [0.5, 1), and the exponents."""
    X = X.astype(np.float64)
    peaks = np.abs(X).max(axis=0, initial=0.0)
    if not np.isfinite(peaks).all():
        raise FormatError("a factor holds NaN or Inf", fix="the adapter is damaged or diverged: use an earlier one")
    exponents = np.frexp(peaks)[1].astype(np.int64)
    return np.ldexp(X, -exponents), exponents


def _graded(left: _Measured, right: _Measured) -> tuple[Integers, Floats, int]:
    """The order in which D = diag(‖b_k‖‖a_k‖) falls, D / 2**e in that order with D[0] in [0.5, 1) or 0, and e."""
    D, unit = _one_exponent(left.norms * right.norms, left.exponents + right.exponents)
    order = np.argsort(-D, kind="stable")
    return order, D[order], unit


def _core(B: Array, A: Array) -> tuple[Floats, int]:
    """M and e such that 2**e M has the singular values of B A, except some that are 0."""
    left, right = _measure(B), _measure(A.T)
    order, D, exponent = _graded(left, right)
    alive = np.count_nonzero(D)
    if not alive:
        return np.zeros((0, 0)), 0
    order, D = order[:alive], D[:alive]
    return (_triangle(left, order)[1] * D) @ _triangle(right, order)[1].T, exponent


def _triangle(factor: _Measured, order: Integers) -> tuple[Route, Floats]:
    """R (min(m, k), k) of X̂[:, order] = Q R by the cheapest route that is safe, and which one that was."""
    norms = factor.norms[order]
    G = _equilibrated(factor.G[np.ix_(order, order)], norms)
    R = _cholesky(G, CONDITION_LIMIT)
    if R is not None:
        return "cholesky", R
    R = _rotated(factor, order, G) if factor.X.shape[0] >= order.size else None
    if R is not None:
        return "rotated", R
    return "householder", _qr_triangle(factor.X[:, order].astype(np.float64) / norms)


def _rotated(factor: _Measured, order: Integers, G: Floats) -> Floats | None:
    """R of X̂[:, order] by way of X̂V, or None; G = Ĝ = V Λ Vᵀ.

    X̂V has the Gram matrix Λ, but the small λ are mostly rounding error: their columns X̂V₂ are made, and their own
    Gram matrix. What is left outside the two diagonal blocks is the rounding error of large λ.
    """
    values, V = _eigenvectors(G)
    strong = np.count_nonzero(values * STRONG**2 > values[0])
    H = gram(factor.X, basis=_unscaled(V[:, strong:], factor, order))
    y = np.sqrt(H.diagonal())
    R = _cholesky(_equilibrated(H, y), CONDITION_LIMIT) if y.all() else None
    if R is None:
        return None
    T = np.diag(np.sqrt(np.maximum(values, 0.0)))
    T[strong:, strong:] = R * y
    return _qr_triangle(T @ V.T)


def _orthonormal(factor: _Measured, order: Integers) -> tuple[Floats, Floats, Floats]:
    """Y (m, k), Z (k, k) and R (k, r) with X̂[:, order] = Q R, where Q = Y Z is orthonormal, k = min(m, r)."""
    norms = np.where(factor.norms > 0, factor.norms, 1.0)[order]
    if factor.norms.all() and factor.X.shape[0] >= order.size:
        V = _eigenvectors(_equilibrated(factor.G[np.ix_(order, order)], norms))[1]
        Y = factor.X.astype(np.float64) @ _unscaled(V, factor, order)
        H = gram(Y)
        y = np.sqrt(H.diagonal())
        L = _cholesky(_equilibrated(H, y), NEARLY_ORTHOGONAL) if y.all() else None
        if L is not None:
            Q, R = np.linalg.qr((L * y) @ V.T)  # X̂ = Y Vᵀ = Y (L y)⁻¹ Q R
            return Y, np.linalg.solve(L, Q) / y[:, None], R
    Q, R = np.linalg.qr(factor.X[:, order].astype(np.float64) / norms)
    return Q, np.eye(Q.shape[1]), R


def _eigenvectors(G: Floats) -> tuple[Floats, Floats]:
    """Eigenvalues and eigenvectors of a symmetric G, largest first."""
    values, V = np.linalg.eigh(G)
    return values[::-1], V[:, ::-1]


def _unscaled(V: Floats, factor: _Measured, order: Integers) -> Floats:
    """The matrix that takes X where V takes X̂[:, order]: no permuted or scaled copy of X is made."""
    basis = np.zeros((factor.norms.size, V.shape[1]))
    basis[order] = V / factor.norms[order, None]
    return basis


def _qr_triangle(X: Floats) -> Floats:
    """R (min(m, r), r) of the Householder QR of X."""
    return np.asarray(np.linalg.qr(X, mode="r"), dtype=np.float64)


def _equilibrated(G: Floats, norms: Floats) -> Floats:
    """The Gram matrix that G becomes when its columns are scaled to length 1."""
    return G / norms / norms[:, None]


def _cholesky(G: Floats, limit: float) -> Floats | None:
    """R with RᵀR = G, or None unless κ(R) ≤ limit. G has a unit diagonal."""
    try:
        R = np.asarray(np.linalg.cholesky(G).T, dtype=np.float64)
    except np.linalg.LinAlgError:
        return None
    # trace G = r, so λ_max ≤ r and λ_min ≥ det G ((r - 1)/r)**(r - 1) ≥ det G / e: a free bound, enough for most.
    if np.e * len(G) <= (limit * np.prod(R.diagonal())) ** 2:
        return R
    low, high = np.linalg.eigvalsh(G)[[0, -1]]
    return R if high <= limit**2 * low else None


def _cross(X: Array, Y: Array) -> tuple[Floats, int]:
    """M and e with 2**e M = Xᵀ Y and the largest |M| in [0.5, 1), or M = 0."""
    M = gram(X) if X is Y else cross_gram(X, Y)
    exponents = np.zeros(M.shape, dtype=np.int64)
    if not SQUARES[0] < np.abs(M).max(initial=0.0) < SQUARES[1]:
        (X, e_X), (Y, e_Y) = _scaled(X), _scaled(Y)
        M, exponents = cross_gram(X, Y), e_X[:, None] + e_Y
    return _one_exponent(M, exponents)


def _one_exponent(X: Floats, exponents: Integers) -> tuple[Floats, int]:
    """M and e with 2**e M = 2**exponents X and the largest |M| in [0.5, 1), or M = 0."""
    M, shifts = np.frexp(X)
    exponents = exponents + shifts
    e = int(exponents[M != 0].max()) if M.any() else 0
    return np.ldexp(M, exponents - e), e


def _signs(U: Floats) -> Floats:
    """±1 for every column: the sign of its entry of largest absolute value, the first of them."""
    largest = np.abs(U.T).argmax(axis=1)
    return np.where(U[largest, np.arange(U.shape[1])] < 0, -1.0, 1.0)
