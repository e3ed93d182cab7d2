"""Singular values of very many small products at once, with the bits that each of them has alone.

A product of tiny factors takes some sixty calls of NumPy, which take far longer than their arithmetic. Here one call
serves all products of equal shape. Every step is that of `loralens.linalg.product`, on the route that nearly all
products take; what would need another route is left to it.
"""

import numpy as np
from numpy.typing import NDArray

from loralens.linalg.factor import CONDITION_LIMIT, SQUARES, Array, Floats, Integers

Flags = NDArray[np.bool_]


def many_singular_values(B: Array, A: Array) -> tuple[Floats, Flags]:
    """Singular values of every ``B[i] @ A[i]``, largest first, and which of them are the result.

    Parameters
    ----------
    B : array, shape (c, m, r), any float dtype, in C order
    A : array, shape (c, r, n), any float dtype, in C order

    Returns
    -------
    s : float64 array, shape (c, min(m, r, n))
        As `loralens.linalg.product.product_singular_values` returns them, to the bit.
    settled : bool array, shape (c,)
        False where that function has to be called: for columns that are 0, very large or far from orthogonal, and for
        NaN and Inf.
    """
    count, m, r = B.shape
    unsettled = np.zeros((count, min(m, r, A.shape[2]))), np.zeros(count, dtype=np.bool_)
    # With more directions than rows or columns the Gram matrices are singular.
    if not 0 < r <= min(m, A.shape[2]):
        return unsettled
    # A sum of squares that overflows is seen below. Adding 0 turns -0 into 0, as the sum of one product does.
    with np.errstate(over="ignore", invalid="ignore"):
        G_B, G_A = _grams(B.astype(np.float64)), _grams(A.astype(np.float64).transpose(0, 2, 1))
    squares_B, squares_A = (G.diagonal(axis1=1, axis2=2) for G in (G_B, G_A))
    usual = _within(squares_B) & _within(squares_A)
    if not usual.any():
        return unsettled
    norms_B, norms_A = (np.sqrt(np.where(usual[:, None], x, 1.0)) for x in (squares_B, squares_A))
    D, shifts = np.frexp(norms_B * norms_A)
    exponent = shifts.max(axis=1)
    D = np.ldexp(D, shifts - exponent[:, None])
    # Stable, so that equal directions keep their order on every machine.
    order = np.argsort(-D, axis=1, kind="stable")
    try:
        L_B, safe_B = _cholesky(G_B, norms_B, order, usual)
        L_A, safe_A = _cholesky(G_A, norms_A, order, usual)
    except np.linalg.LinAlgError:  # one of them has no Cholesky factor
        return unsettled
    D = np.take_along_axis(D, order, axis=1)
    s = np.linalg.svd((L_B.transpose(0, 2, 1) * D[:, None, :]) @ L_A, compute_uv=False)
    return np.ldexp(s, exponent[:, None]), usual & safe_B & safe_A


def _grams(X: Floats) -> Floats:
    """XᵀX for every X (m, r)."""
    return np.matmul(X.transpose(0, 2, 1), X) + 0.0


def _within(squares: Floats) -> Flags:
    """Whether all squared norms of a factor are so far from over- and underflow that it need not be scaled."""
    return ((SQUARES[0] < squares) & (squares < SQUARES[1])).all(axis=1)  # NaN is neither


def _cholesky(G: Floats, norms: Floats, order: Integers, usual: Flags) -> tuple[Floats, Flags]:
    """The Cholesky factor of every Gram matrix of columns of length 1 in this order, and whether it is accurate."""
    norms = np.take_along_axis(norms, order, axis=1)
    G = np.take_along_axis(np.take_along_axis(G, order[:, :, None], axis=1), order[:, None, :], axis=2)
    G = G / norms[:, None, :] / norms[:, :, None]
    # What is left to another route must not end the call for all.
    G[~usual] = np.eye(G.shape[1])
    L = np.linalg.cholesky(G)
    # The free bound of `loralens.linalg.factor` on the condition.
    bound = (CONDITION_LIMIT * np.prod(L.diagonal(axis1=1, axis2=2), axis=1)) ** 2
    return L, np.e * G.shape[1] <= bound
