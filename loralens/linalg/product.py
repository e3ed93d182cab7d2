"""Singular values, SVD and norm of ``B @ A`` from its thin factors; the product is never formed.

The rank index is sorted so that D = diag(‖b_k‖‖a_k‖) falls. The columns of each factor are scaled to length 1, and the
factor is reduced to a small triangle R (`loralens.linalg.factor`). The core R_B D R_Aᵀ has the singular values of B A.
Its entries get smaller from the top left corner on, and LAPACK computes small singular values of such a matrix
accurately.
"""

from typing import NamedTuple

import numpy as np

from loralens.errors import ShapeError
from loralens.linalg.factor import (
    CONDITION_LIMIT,
    Array,
    Basis,
    Floats,
    Integers,
    Measured,
    blocks_of,
    gram_triangle,
    implicit,
    measure,
    multiply_block,
    orthonormal,
    require_finite,
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
    The cost is O((m + n) r²) in a few megabytes of memory. |σ̂ − σ| ≤ c ε ‖B‖₂‖A‖₂ with c below 100. If only the
    *lengths* of B's columns and A's rows differ, by any factor and in any order, every σ is accurate relative to
    itself, which the σ of the formed product are not. If a rotation (B Q, Qᵀ A) hides the different lengths, no method
    that reads rounded factors can recover this accuracy.
    """
    s = np.zeros(_check_shapes(B, A))
    M, exponent = _core(B, A)
    if M.size:
        nonzero = np.linalg.svd(M, compute_uv=False)
        s[: nonzero.size] = np.ldexp(nonzero, exponent)
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
    The cost is O((m + n) r²). ``U * s @ Vh`` is B A up to c ε ‖B‖₂‖A‖₂. The vectors of σ_i have the error of a backward
    stable SVD, about ε ‖B‖₂‖A‖₂ / gap_i. The small values of a graded spectrum are more accurate than that, but their
    vectors need not be.
    """
    # LAPACK refuses empty matrices.
    if _check_shapes(B, A) == 0:
        return np.zeros((B.shape[0], 0)), np.zeros(0), np.zeros((0, A.shape[1]))
    factor_B, factor_A = measure(B), measure(A.T)
    order, D, exponent = _sort_by_strength(factor_B, factor_A)
    Y_B, Z_B, R_B = orthonormal(factor_B, order)
    Y_A, Z_A, R_A = orthonormal(factor_A, order)
    U, s, Vh = _core_svd((R_B * D) @ R_A.T)
    U, Vh = Y_B @ (Z_B @ U), (Vh @ Z_A.T) @ Y_A.T
    signs = _signs(U)
    # The sign of a singular pair is arbitrary; a fixed rule makes results comparable.
    U *= signs
    Vh *= signs[:, None]
    return U, np.ldexp(s, exponent), Vh


def product_bases(B: Array, A: Array) -> tuple[Basis, Floats, Basis]:
    """The SVD of ``B @ A`` with vectors in product form, which is enough for overlaps and costs half as much.

    Parameters
    ----------
    B : array, shape (m, r), any float dtype
    A : array, shape (r, n), any float dtype

    Returns
    -------
    left : Basis of k columns of length m
        Left singular vectors.
    s : float64 array, shape (k,)
        The nonzero singular values, largest first. Directions without a length are left out, so k is the numerical rank
        and may be 0.
    right : Basis of k columns of length n
        Right singular vectors.

    Raises
    ------
    ShapeError, FormatError
        As `product_singular_values`.

    Notes
    -----
    The columns are orthonormal to 1e-12. Where κ of a factor is below 40, the basis refers to it without a copy.
    """
    factor_B, factor_A, order, D, exponent = _measure_nonzero(B, A)
    X_B, T_B, R_B = implicit(factor_B, order)
    X_A, T_A, R_A = implicit(factor_A, order)
    U, s, Vh = _core_svd((R_B * D) @ R_A.T)
    k = numerical_rank(s, (B.shape[0], A.shape[1]))
    return Basis(X_B, T_B @ U[:, :k]), np.ldexp(s[:k], exponent), Basis(X_A, T_A @ Vh[:k].T)


def truncating_maps(B: Array, A: Array) -> tuple[Floats, Floats, Floats]:
    """The maps L and R and the singular values s of `truncation`."""
    L, s, R, _ = truncation(B, A)
    return L, s, R


class Truncation(NamedTuple):
    """The best approximations of ``B @ A`` of every rank, expressed by small matrices.

    Attributes
    ----------
    L : float64 array, shape (r, k)
    s : float64 array, shape (k,)
        The nonzero singular values, largest first, as in `product_bases`.
    R : float64 array, shape (k, r)
        For every j ≤ k, ``(B @ L[:, :j]) @ (R[:j] @ A)`` is the best approximation of rank j (Eckart & Young 1936).
        Its factors are balanced: column i of the first and row i of the second have the same length √σ_i.
    bases : tuple of float64 arrays, shape (r, k), or None
        The matrices T of the two bases of `product_bases` if these refer to B and to Aᵀ themselves; else None.
    """

    L: Floats
    s: Floats
    R: Floats
    bases: tuple[Floats, Floats] | None


def truncation(B: Array, A: Array, *, bases: bool = False) -> Truncation:
    """The `Truncation` of ``B @ A``; with ``bases`` also the bases, which then cost little.

    Parameters
    ----------
    B : array, shape (m, r), any float dtype
    A : array, shape (r, n), any float dtype

    Raises
    ------
    ShapeError, FormatError
        As `product_singular_values`.

    Notes
    -----
    B L = B A V S^(-1/2) and R A = S^(-1/2) Uᵀ B A. Both are computed from the triangles of B and A alone: only S is
    inverted, and no tall matrix is formed. Each direction has an error of c ε ‖B‖₂‖A‖₂, as in `product_svd`.
    """
    factor_B, factor_A, order, D, exponent = _measure_nonzero(B, A)
    (route_B, R_B), (route_A, R_A) = triangle(factor_B, order), triangle(factor_A, order)
    U, s, Vh = _core_svd((R_B * D) @ R_A.T)
    k = numerical_rank(s, (B.shape[0], A.shape[1]))
    U, s, Vh = U[:, :k], s[:k], Vh[:k]
    # 2**e s itself might overflow; an odd exponent gives one factor of 2 to the square root.
    root = np.ldexp(np.sqrt(np.ldexp(s, exponent % 2)), exponent // 2) / s  # 2**(e/2) s**(-1/2)
    L, R = np.zeros((B.shape[1], k)), np.zeros((k, B.shape[1]))
    L[order] = _to_factor_columns(D[:, None] * (R_A.T @ Vh.T) * root, factor_B, order)
    R[:, order] = _to_factor_columns(D[:, None] * (R_B.T @ U) * root, factor_A, order).T
    small = None
    # On this route the triangles, and so U, s and V, are those of `product_bases`.
    if bases and (route_B, route_A) == ("cholesky", "cholesky"):
        (X_B, T_B, _), (X_A, T_A, _) = implicit(factor_B, order, R_B), implicit(factor_A, order, R_A)
        # The bases refer to the factors unless columns were scaled by powers of two.
        if X_B is factor_B.X and X_A is factor_A.X and not (factor_B.exponents.any() or factor_A.exponents.any()):
            small = T_B @ U, T_A @ Vh.T
    return Truncation(L, np.ldexp(s, exponent), R, small)


def column_basis(X: Array) -> tuple[Basis, Floats]:
    """Left singular vectors of one thin factor X (m, r), any float dtype, and its singular values, largest first.

    Zero singular values are left out, as in `product_bases`. Raises FormatError if X holds NaN or Inf. The directions
    that the LoRA paper compares are those of Aᵀ: ``column_basis(A.T)``.
    """
    factor = measure(X)
    # Zero columns are left out: they have no direction.
    norms, exponent = _one_exponent(factor.norms, factor.exponents)
    order = np.argsort(-norms, kind="stable")[: np.count_nonzero(norms)]
    Y, T, R = implicit(factor, order)
    U, s, _ = np.linalg.svd(R * norms[order], full_matrices=False)
    s = np.asarray(np.ldexp(s, exponent), dtype=np.float64)
    k = numerical_rank(s, (X.shape[0], X.shape[1]))
    return Basis(Y, T @ U[:, :k]), s[:k]


def product_norm(B: Array, A: Array) -> float:
    """Frobenius norm of ``B @ A``, computed in float64 as the norm of the core R_B D R_Aᵀ.

    The error is c ε ‖B‖_F‖A‖_F. The shorter formula √Σ(BᵀB ∘ AAᵀ) has an error of √ε ‖B‖_F‖A‖_F if the columns of B
    cancel in the product. Raises the errors of `product_singular_values`.
    """
    M, exponent = _core(B, A)
    return float(np.ldexp(np.linalg.norm(M), exponent))


def _check_shapes(B: Array, A: Array) -> int:
    """Return min(m, r, n) after a check that B and A can be multiplied; raise ShapeError if they cannot."""
    if B.ndim != 2 or A.ndim != 2 or B.shape[1] != A.shape[0]:
        raise ShapeError(f"B {B.shape} and A {A.shape} do not multiply", fix="pass B as (m, r) and A as (r, n)")
    return int(min(*B.shape, A.shape[1]))


def _sort_by_strength(factor_B: Measured, factor_A: Measured) -> tuple[Integers, Floats, int]:
    """The order of D = diag(‖b_k‖‖a_k‖), largest first; D / 2**e in this order, with D[0] in [0.5, 1) or 0; and e."""
    D, unit = _one_exponent(factor_B.norms * factor_A.norms, factor_B.exponents + factor_A.exponents)
    # Stable, so that equal directions keep their order on every machine.
    order = np.argsort(-D, kind="stable")
    return order, D[order], unit


def _measure_nonzero(B: Array, A: Array) -> tuple[Measured, Measured, Integers, Floats, int]:
    """Both factors measured, and the result of `_sort_by_strength` without rank indices that are 0."""
    _check_shapes(B, A)
    factor_B, factor_A = measure(B), measure(A.T)
    order, D, exponent = _sort_by_strength(factor_B, factor_A)
    alive = np.count_nonzero(D)
    return factor_B, factor_A, order[:alive], D[:alive], exponent


def _core_svd(M: Floats) -> tuple[Floats, Floats, Floats]:
    """U, s, Vh of a graded core. For r > 25 LAPACK's SVD with vectors may lose small values, so s is computed alone."""
    U, _, Vh = np.linalg.svd(M, full_matrices=False)
    return U, np.asarray(np.linalg.svd(M, compute_uv=False), dtype=np.float64), Vh


def _core(B: Array, A: Array) -> tuple[Floats, int]:
    """M and e such that 2**e M has the singular values of B A, apart from zeros."""
    factor_B, factor_A, order, D, exponent = _measure_nonzero(B, A)
    if not order.size:
        return np.zeros((0, 0)), 0
    return (triangle(factor_B, order)[1] * D) @ triangle(factor_A, order)[1].T, exponent


def _one_exponent(X: Floats, exponents: Integers) -> tuple[Floats, int]:
    """M and e with 2**e M = 2**exponents X, where the largest |M| is in [0.5, 1) or M = 0."""
    # Mantissas and exponents apart, so that nothing over- or underflows however the factors were scaled.
    M, shifts = np.frexp(X)
    exponents = exponents + shifts
    e = int(exponents[M != 0].max()) if M.any() else 0
    return np.ldexp(M, exponents - e), e


def _to_factor_columns(rows: Floats, factor: Measured, order: Integers) -> Floats:
    """Convert rows that belong to the columns of X̂[:, order] to rows that belong to the columns of the factor."""
    return np.ldexp(rows / factor.norms[order, None], -factor.exponents[order, None])


def _signs(U: Floats) -> Floats:
    """±1 for every column: the sign of its entry of largest absolute value (of the first such entry)."""
    largest = np.abs(U.T).argmax(axis=1)
    return np.where(U[largest, np.arange(U.shape[1])] < 0, -1.0, 1.0)


class SplitFactor(NamedTuple):
    """The parts of a factor X (n, k) inside and outside of a basis U: X = U P + Q L with orthonormal columns Q."""

    inside: Floats  # P (q, k)
    outside: Floats  # L (k, k)


def difference_singular_values(left: Basis, s: Floats, right: Basis, B: Array, A: Array) -> Floats:
    """Singular values of U diag(s) Vᵀ − B A, largest first; neither product is formed.

    Parameters
    ----------
    left, right : Basis of q columns of length m and n
        U and V.
    s : float64 array, shape (q,)
    B : float64 array, shape (m, k)
    A : float64 array, shape (k, n)

    Returns
    -------
    float64 array, shape (q + k,)

    Notes
    -----
    Let B = U P + E with Uᵀ E = 0 and E = Q L, and A likewise (P', L', Q'). The difference is [U Q] C [V Q']ᵀ, where the
    core C has the blocks S − P P'ᵀ, −P L'ᵀ, −L P'ᵀ and −L L'ᵀ. The blocks are orthogonal to each other, so nothing
    cancels. The difference of two nearly equal products therefore has an error of c ε ‖B‖‖A‖, not of √ε (measured:
    4e-14 of the norm where κ of the factors is 35). The cost is O((m + n)·q·k).
    """
    return singular_values_from_splits(s, split_factor(left, B), split_factor(right, A.T))


def singular_values_from_splits(s: Floats, B: SplitFactor, A: SplitFactor) -> Floats:
    """The result of `difference_singular_values` from the splits of B and of Aᵀ."""
    # The four blocks are assembled as they are: subtracting norms instead would lose half of the digits.
    core = np.block(
        [
            [np.diag(s) - B.inside @ A.inside.T, -B.inside @ A.outside.T],
            [-B.outside @ A.inside.T, -B.outside @ A.outside.T],
        ]
    )
    return np.linalg.svd(core, compute_uv=False)


def split_factor(basis: Basis, X: Array, *, scale: float = 1.0) -> SplitFactor:
    """The parts of scale · X inside and outside of a basis, for X (n, k) of any float dtype.

    The cost is that of three thin products, O(n·q·k).
    """
    G, length = np.zeros((basis.X.shape[1], X.shape[1])), np.zeros((X.shape[1], X.shape[1]))
    # Overflow shows in the result.
    with np.errstate(over="ignore", invalid="ignore"):
        for rows, block in blocks_of(basis.X):
            G += np.dot(block.T, scale * X[rows].astype(np.float64))
        inside = basis.T.T @ G
        step = basis.T @ inside
        # Some rows at a time, cast once more, so that no float64 copy of a factor is made.
        for rows, block in blocks_of(basis.X):
            outside = scale * X[rows].astype(np.float64)
            outside -= multiply_block(block, step)
            length += np.dot(outside.T, outside)
    return SplitFactor(inside, _root(length))


def _root(G: Floats) -> Floats:
    """L with LᵀL = G for a Gram matrix, whose eigenvalues may be negative by rounding."""
    values, vectors = np.linalg.eigh(G)
    return np.asarray(np.sqrt(np.maximum(values, 0.0))[:, None] * vectors.T, np.float64)


FACTOR_FLOOR = 1e-14  # of the largest eigenvalue of a Gram matrix: the rounding of its entries, with some room
SINGLE_FLOOR = 1e-3  # of σ₁
DIRECTION_FLOOR = 1e-6  # of σ₁: below it the vectors are mostly rounding, and the energy is 1e-12


class QuickSVD(NamedTuple):
    """U (out, k) and V (in, k) in float32, with orthonormal columns to 1e-6, and s (k,) in float64, largest first."""

    U: Array
    s: Floats
    V: Array

    @property
    def k(self) -> int:
        """The number of directions."""
        return int(self.s.size)


def quick_svd(B: Array, A: Array, scale: float = 1.0) -> QuickSVD:
    """The singular values and vectors of ``scale * B @ A``, without forming it.

    Parameters
    ----------
    B : array, shape (out, r), any float dtype
    A : array, shape (r, in), any float dtype
    scale : float
        A negative one goes into the signs of U.

    Raises
    ------
    FormatError
        A factor holds NaN or Inf.

    Notes
    -----
    Let A Aᵀ = RᵀR, where R is the Cholesky factor. The eigenvalues of R BᵀB Rᵀ = Z S² Zᵀ are the squares of the
    singular values, U = B RᵀZ S⁻¹ and V = Aᵀ R⁻¹Z. The tall factors are read for two Gram matrices and two products;
    the rest has r×r numbers. σ errs by at most about 1e-7 σ₁ if κ(A) ≤ 40, and the factors are rotated first if κ(A)
    is larger.
    """
    with np.errstate(over="ignore", invalid="ignore"):
        G_B, G_A = (require_finite(np.dot(X.T, X)) for X in (B.astype(np.float64), A.astype(np.float64).T))
    R = gram_triangle(G_A, CONDITION_LIMIT) if len(G_A) <= A.shape[1] else None
    if R is None:
        (lengths_B, Q_B), (lengths_A, Q_A) = _eigenpairs(G_B), _eigenpairs(G_A)
        core = (lengths_B[:, None] * Q_B.T) @ (Q_A * lengths_A)
        # LAPACK refuses empty matrices.
        P, s, Zh = np.linalg.svd(core, full_matrices=False) if core.size else (core[:, :0], np.zeros(0), core[:0])
        T_B, T_A = (Q_B / lengths_B) @ P, (Q_A / lengths_A) @ Zh.T
    else:
        squares, Z = np.linalg.eigh(R @ G_B @ R.T)
        s, Z = np.sqrt(np.maximum(squares[::-1], 0.0)), Z[:, ::-1]
        T_B, T_A = R.T @ Z / np.where(s > 0, s, 1.0), np.linalg.inv(R) @ Z
    k = int(np.count_nonzero(s > DIRECTION_FLOOR * s.max(initial=0.0)))
    s, T_B, T_A = s[:k], T_B[:, :k] * (-1.0 if scale < 0 else 1.0), T_A[:, :k]
    # In float32 a direction of B errs by 6e-8 σ₁/σ, which is 1e-4 at most; smaller σ need float64.
    dtype = np.float32 if R is not None and s.size and s[-1] > SINGLE_FLOOR * s[0] else np.float64
    U, V = (
        np.dot(X.astype(dtype, copy=False), T.astype(dtype)).astype(np.float32, copy=False)
        for X, T in ((B, T_B), (A.T, T_A))
    )
    return QuickSVD(U, abs(scale) * s, V)


def _eigenpairs(G: Floats) -> tuple[Floats, Floats]:
    """The singular values of X above the rounding of its Gram matrix G, and their right vectors as columns."""
    squares, Q = np.linalg.eigh(G)
    kept = squares > FACTOR_FLOOR * max(squares[-1], 0.0)
    return np.sqrt(squares[kept]), Q[:, kept]
