"""The leading directions of a matrix from the smaller of its two Gram matrices."""

from typing import NamedTuple

import numpy as np

from loralens.linalg.factor import Floats

# Squaring halves the digits: below this share of the largest eigenvalue there is rounding alone.
NOISE = 1e-13


class LeadingDirections(NamedTuple):
    """Orthonormal columns (m, k), and the energy of the matrix along each of them, largest first."""

    columns: Floats
    energies: Floats

    def head(self, k: int) -> "LeadingDirections":
        """The first k directions."""
        return LeadingDirections(self.columns[:, :k], self.energies[:k])


def leading_directions(X: Floats) -> LeadingDirections:
    """Left singular vectors of X (m, n) and its squared singular values.

    Notes
    -----
    They are eigenvectors of X Xᵀ or XᵀX, whichever is smaller. Directions with less than 1e-13 of the largest energy
    are left out. An SVD of a wide stack of factors is slower by an order of magnitude, and may not converge. The error
    of an energy is ε·‖X‖², which is far below any error of rounding to few bits.
    """
    m, n = X.shape
    if not (m and n):
        return LeadingDirections(np.zeros((m, 0)), np.zeros(0))
    values, vectors = np.linalg.eigh(X @ X.T if m <= n else X.T @ X)
    # eigh gives the smallest eigenvalue first.
    values, vectors = values[::-1], vectors[:, ::-1]
    k = int(np.count_nonzero(values > NOISE * max(float(values[0]), 0.0)))
    values, vectors = values[:k], vectors[:, :k]
    return LeadingDirections(vectors if m <= n else (X @ vectors) / np.sqrt(values), values)
