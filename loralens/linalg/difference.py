"""Singular values of the difference of two low-rank products: the exact error of a truncation, rounding included."""

from typing import Any, Literal, NamedTuple

import numpy as np

from loralens.linalg.basis import Basis
from loralens.linalg.factor import Array, Floats, block_rows, blocks_of, check_in_range, cross_gram, gram

Order = Literal["C", "F"]


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
    return singular_values_from_splits(s, _split(left, B), _split(right, A.T))


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


def times_and_split(
    X: Array, T: Floats, directions: Floats, dtype: np.dtype[Any], *, scale: float = 1.0, order: Order = "C"
) -> tuple[Array, SplitFactor]:
    """The product of `loralens.linalg.factor.times`, and its split by the basis X @ directions, from one cast of X.

    Parameters
    ----------
    X : array, shape (n, r), any float dtype
    T : float64 array, shape (r, k)
    directions : float64 array, shape (r, q)
        X @ directions has orthonormal columns.
    dtype : dtype
        To which the product is rounded before it is split.
    scale : float
        The factor of the product that is split. The product that is returned is without it.
    order : "C" or "F"
        The memory order of the product.

    Raises
    ------
    FormatError
        As `loralens.linalg.factor.check_in_range`.
    """
    order_X: Order = "F" if X.strides[0] < X.strides[1] else "C"
    step = block_rows(X)
    # Every block of rows by itself, as `times` and `cross_gram` have them, so that the bits are theirs.
    blocks = [(slice(i, i + step), X[i : i + step].astype(np.float64, order=order_X)) for i in range(0, len(X), step)]
    product = np.empty((len(X), T.shape[1]), dtype, order=order)
    Y, G = np.empty(product.shape, order=order), np.zeros((X.shape[1], T.shape[1]))
    with np.errstate(over="ignore", invalid="ignore"):
        for rows, block in blocks:
            # Rounded to `dtype` first, because the rounded product is what is split.
            product[rows] = _times(block, T, order)
            Y[rows] = product[rows]
            Y[rows] *= scale
            G += np.dot(block.T, Y[rows])
        inside = directions.T @ G
        projection = directions @ inside
        for rows, block in blocks:
            Y[rows] -= _times(block, projection, order)
    return check_in_range(product, dtype), SplitFactor(inside, _length(Y))


def _times(X: Floats, T: Floats, order: Order) -> Floats:
    """X @ T in a memory order, because NumPy takes several times as long to assign an array in the other order."""
    product: Floats = np.dot(X, T) if order == "C" else np.dot(T.T, X.T).T
    return product


def _split(basis: Basis, X: Array) -> SplitFactor:
    """X = U P + Q L, where U is the basis and Q has orthonormal columns outside it."""
    P = basis.T.T @ cross_gram(basis.X, X)
    E, step = np.array(X, dtype=np.float64), basis.T @ P
    # Some rows at a time, so that no float64 copy of the basis is made.
    for rows, block in blocks_of(basis.X):
        E[rows] -= np.dot(block, step)
    return SplitFactor(P, _length(E))


def _length(E: Floats) -> Floats:
    """L (k, k) with E = Q L."""
    values, vectors = np.linalg.eigh(gram(E))
    return np.asarray(np.sqrt(np.maximum(values, 0.0))[:, None] * vectors.T, np.float64)
