"""Singular values of the difference of two low-rank products: the exact error of a truncation, rounding included."""

from typing import Any, NamedTuple

import numpy as np

from loralens.linalg.basis import Basis
from loralens.linalg.blocks import blocks_of, memory_order
from loralens.linalg.factor import Array, Floats, check_in_range, gram_of_block, multiply_block


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

    The cost is that of three thin products, O(n·q·k). Where X has the memory order of the tall factor of the basis, its
    blocks take the compiled products.
    """
    G, length = np.zeros((basis.X.shape[1], X.shape[1])), np.zeros((X.shape[1], X.shape[1]))
    # Overflow shows in the result.
    with np.errstate(over="ignore", invalid="ignore"):
        for rows, block in blocks_of(basis.X):
            G += gram_of_block(block, scale * X[rows].astype(np.float64))
        inside = basis.T.T @ G
        step = basis.T @ inside
        # Some rows at a time, cast once more, so that no float64 copy of a factor is made.
        for rows, block in blocks_of(basis.X):
            outside = scale * X[rows].astype(np.float64)
            outside -= multiply_block(block, step)
            length += gram_of_block(outside)
    return SplitFactor(inside, _root(length))


def multiply_and_split(basis: Basis, T: Floats, dtype: np.dtype[Any], *, scale: float) -> tuple[Array, SplitFactor]:
    """X T for the tall factor X (n, r) of a basis U, rounded to ``dtype``, and the split of scale times it by U.

    It takes one pass over X, where `split_factor` takes two more. Both give the same numbers up to their last digits.

    Parameters
    ----------
    basis : Basis of q columns
    T : float64 array, shape (r, k), k ≤ q
        Column j is a multiple c_j of that of the matrix of the basis, so that X T = U diag(c).
    dtype : dtype
        Of the product.
    scale : float

    Raises
    ------
    FormatError
        As `check_in_range`.

    Notes
    -----
    The product is Y = X T + δ with the error δ of its rounding. So UᵀY = diag(c) + Uᵀδ, and what Y has outside of U is
    δ − U Uᵀδ. Its Gram matrix is δᵀδ − (Uᵀδ)ᵀ(Uᵀδ), where nothing cancels: a small part of δ is inside.
    """
    X, k = basis.X, T.shape[1]
    product = np.empty((len(X), k), dtype, order=memory_order(X))
    cross, squares = np.zeros((X.shape[1], k)), np.zeros((k, k))
    with np.errstate(over="ignore", invalid="ignore"):
        for rows, block in blocks_of(X):
            exact = multiply_block(block, T)
            product[rows] = exact  # this rounds to `dtype`, once
            rounding = product[rows].astype(np.float64)
            rounding -= exact
            if scale != 1:
                rounding *= scale
            cross += gram_of_block(block, rounding)
            squares += gram_of_block(rounding)
        check_in_range(product, dtype)
        matrix = basis.T[:, :k]
        c = (matrix * T).sum(axis=0) / (matrix * matrix).sum(axis=0)
        moved = basis.T.T @ cross
        inside = moved.copy()
        inside[np.arange(k), np.arange(k)] += scale * c
        return product, SplitFactor(inside, _root(squares - moved.T @ moved))


def _root(G: Floats) -> Floats:
    """L with LᵀL = G for a Gram matrix, whose eigenvalues may be negative by rounding."""
    values, vectors = np.linalg.eigh(G)
    return np.asarray(np.sqrt(np.maximum(values, 0.0))[:, None] * vectors.T, np.float64)
