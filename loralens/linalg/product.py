"""Singular values, SVD and norm of ``B @ A`` from its thin factors; the product is never formed.

The rank index is sorted so that D = diag(‖b_k‖‖a_k‖) falls, and each factor reduced to a small triangle R, its columns
scaled to length 1 (`loralens.linalg.factor`). The core R_B D R_Aᵀ has the singular values of B A and is graded from
its top left corner, which is how LAPACK keeps the small ones.
"""

import numpy as np

from loralens.errors import ShapeError
from loralens.linalg.basis import Basis
from loralens.linalg.factor import (
    Array,
    Floats,
    Integers,
    Measured,
    implicit,
    measure,
    orthonormal,
    triangle,
)
from loralens.linalg.measures import numerical_rank


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
    s = np.zeros(_check_shapes(B, A))
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
    left, right = measure(B), measure(A.T)
    order, D, exponent = _graded(left, right)
    Y_B, Z_B, R_B = orthonormal(left, order)
    Y_A, Z_A, R_A = orthonormal(right, order)
    U, s, Vh = _core_svd((R_B * D) @ R_A.T)
    U, Vh = Y_B @ (Z_B @ U), (Vh @ Z_A.T) @ Y_A.T
    signs = _signs(U)
    U *= signs
    Vh *= signs[:, None]
    return U, np.ldexp(s, exponent), Vh


def product_bases(B: Array, A: Array) -> tuple[Basis, Floats, Basis]:
    """The SVD of ``B @ A`` with its vectors left as products: what many overlaps need, at half the price.

    Parameters
    ----------
    B : array, shape (m, r), any float dtype
    A : array, shape (r, n), any float dtype

    Returns
    -------
    left : Basis of k columns of length m
        Left singular vectors.
    s : float64 array, shape (k,)
        Singular values, largest first. k counts the nonzero ones: directions without a length are no directions, so
        k ≤ `numerical_rank` and may be 0.
    right : Basis of k columns of length n
        Right singular vectors.

    Raises
    ------
    ShapeError, FormatError
        As `product_singular_values`.

    Notes
    -----
    The columns are orthonormal to 1e-12 and B and A are kept, not copied, where κ of both is below 40.
    """
    left, right, order, D, exponent = _alive(B, A)
    X_B, T_B, R_B = implicit(left, order)
    X_A, T_A, R_A = implicit(right, order)
    U, s, Vh = _core_svd((R_B * D) @ R_A.T)
    k = numerical_rank(s, (B.shape[0], A.shape[1]))
    return Basis(X_B, T_B @ U[:, :k]), np.ldexp(s[:k], exponent), Basis(X_A, T_A @ Vh[:k].T)


def truncating_maps(B: Array, A: Array) -> tuple[Floats, Floats, Floats]:
    """Every best approximation of ``B @ A`` at once, as two small matrices.

    Parameters
    ----------
    B : array, shape (m, r), any float dtype
    A : array, shape (r, n), any float dtype

    Returns
    -------
    L : float64 array, shape (r, k)
    s : float64 array, shape (k,)
        Singular values, largest first. k counts the nonzero ones, as in `product_bases`.
    R : float64 array, shape (k, r)
        For every j ≤ k, ``(B @ L[:, :j]) @ (R[:j] @ A)`` is the best approximation of rank j (Eckart & Young 1936),
        its two factors balanced: √σ_i is the length of column i of the one and of row i of the other.

    Raises
    ------
    ShapeError, FormatError
        As `product_singular_values`.

    Notes
    -----
    B L = B A V S^(-1/2) and R A = S^(-1/2) Uᵀ B A, made from the triangles of B and A alone: nothing is inverted but
    S, and no tall matrix is formed. Each direction errs by c ε ‖B‖₂‖A‖₂, as those of `product_svd` do.
    """
    left, right, order, D, exponent = _alive(B, A)
    R_B, R_A = triangle(left, order)[1], triangle(right, order)[1]
    U, s, Vh = _core_svd((R_B * D) @ R_A.T)
    k = numerical_rank(s, (B.shape[0], A.shape[1]))
    U, s, Vh = U[:, :k], s[:k], Vh[:k]
    root = np.ldexp(np.sqrt(np.ldexp(s, exponent % 2)), exponent // 2) / s  # 2**(e/2) s**(-1/2)
    L, R = np.zeros((B.shape[1], k)), np.zeros((k, B.shape[1]))
    L[order] = _unit(D[:, None] * (R_A.T @ Vh.T) * root, left, order)
    R[:, order] = _unit(D[:, None] * (R_B.T @ U) * root, right, order).T
    return L, np.ldexp(s, exponent), R


def column_basis(X: Array) -> tuple[Basis, Floats]:
    """Left singular vectors of one thin factor X (m, r), any float dtype, and its singular values, largest first.

    k counts the nonzero ones, as in `product_bases`; FormatError where X holds NaN or Inf. The directions of the LoRA
    paper are those of Aᵀ: ``column_basis(A.T)``.
    """
    factor = measure(X)
    norms, exponent = _one_exponent(factor.norms, factor.exponents)
    order = np.argsort(-norms, kind="stable")[: np.count_nonzero(norms)]
    Y, T, R = implicit(factor, order)
    U, s, _ = np.linalg.svd(R * norms[order], full_matrices=False)
    s = np.asarray(np.ldexp(s, exponent), dtype=np.float64)
    k = numerical_rank(s, (X.shape[0], X.shape[1]))
    return Basis(Y, T @ U[:, :k]), s[:k]


def product_norm(B: Array, A: Array) -> float:
    """Frobenius norm of ``B @ A``, float64: that of the core R_B D R_Aᵀ.

    Error c ε ‖B‖_F‖A‖_F. The shorter √Σ(BᵀB ∘ AAᵀ) errs by √ε of that where the columns of B cancel in the product.
    Raises as `product_singular_values`.
    """
    M, exponent = _core(B, A)
    return float(np.ldexp(np.linalg.norm(M), exponent))


def _check_shapes(B: Array, A: Array) -> int:
    """min(m, r, n), or a ShapeError."""
    if B.ndim != 2 or A.ndim != 2 or B.shape[1] != A.shape[0]:
        raise ShapeError(f"B {B.shape} and A {A.shape} do not multiply", fix="pass B as (m, r) and A as (r, n)")
    return int(min(*B.shape, A.shape[1]))


def _graded(left: Measured, right: Measured) -> tuple[Integers, Floats, int]:
    """The order in which D = diag(‖b_k‖‖a_k‖) falls, D / 2**e in that order with D[0] in [0.5, 1) or 0, and e."""
    D, unit = _one_exponent(left.norms * right.norms, left.exponents + right.exponents)
    order = np.argsort(-D, kind="stable")
    return order, D[order], unit


def _alive(B: Array, A: Array) -> tuple[Measured, Measured, Integers, Floats, int]:
    """Both factors, and `_graded` without the rank indices that add nothing."""
    _check_shapes(B, A)
    left, right = measure(B), measure(A.T)
    order, D, exponent = _graded(left, right)
    alive = np.count_nonzero(D)
    return left, right, order[:alive], D[:alive], exponent


def _core_svd(M: Floats) -> tuple[Floats, Floats, Floats]:
    """U, s, Vh of a graded core: with vectors and r > 25 LAPACK may lose its small values, so they are taken alone."""
    U, _, Vh = np.linalg.svd(M, full_matrices=False)
    return U, np.asarray(np.linalg.svd(M, compute_uv=False), dtype=np.float64), Vh


def _core(B: Array, A: Array) -> tuple[Floats, int]:
    """M and e such that 2**e M has the singular values of B A, except some that are 0."""
    left, right, order, D, exponent = _alive(B, A)
    if not order.size:
        return np.zeros((0, 0)), 0
    return (triangle(left, order)[1] * D) @ triangle(right, order)[1].T, exponent


def _one_exponent(X: Floats, exponents: Integers) -> tuple[Floats, int]:
    """M and e with 2**e M = 2**exponents X and the largest |M| in [0.5, 1), or M = 0."""
    M, shifts = np.frexp(X)
    exponents = exponents + shifts
    e = int(exponents[M != 0].max()) if M.any() else 0
    return np.ldexp(M, exponents - e), e


def _unit(rows: Floats, factor: Measured, order: Integers) -> Floats:
    """Rows for the columns of X̂[:, order] as rows for those of the factor itself."""
    return np.ldexp(rows / factor.norms[order, None], -factor.exponents[order, None])


def _signs(U: Floats) -> Floats:
    """±1 for every column: the sign of its entry of largest absolute value, the first of them."""
    largest = np.abs(U.T).argmax(axis=1)
    return np.where(U[largest, np.arange(U.shape[1])] < 0, -1.0, 1.0)
