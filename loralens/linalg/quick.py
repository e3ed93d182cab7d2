"""The SVD of ``B @ A`` from the Gram matrices of both factors: quick, and accurate enough to follow a training run.

`loralens.linalg.product` computes singular values to the last digits; this module leaves out what that costs. The
spectrum of a factor is that of its Gram matrix, whose rounding hides everything below √ε of the largest. So singular
values of B A are accurate to 1e-7 of the first one, and directions below 1e-6 of it are left out.
"""

from typing import NamedTuple

import numpy as np

from loralens.linalg.factor import Array, Floats, require_finite

FACTOR_FLOOR = 1e-14  # of the largest eigenvalue of a Gram matrix: the rounding of its entries, with some room
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
    The cost is O((out + in) r²), about a third of that of `loralens.linalg.product.product_bases` for factors of
    ill-conditioned columns.
    """
    X, Y = B.astype(np.float64), A.astype(np.float64).T
    lengths_X, Q_X = _spectrum(X)
    lengths_Y, Q_Y = _spectrum(Y)
    core = (lengths_X[:, None] * Q_X.T) @ (Q_Y * lengths_Y)
    # LAPACK refuses empty matrices.
    if not core.size:
        return QuickSVD(np.zeros((len(X), 0), np.float32), np.zeros(0), np.zeros((len(Y), 0), np.float32))
    P, s, Z = np.linalg.svd(core, full_matrices=False)
    k = int(np.count_nonzero(s > DIRECTION_FLOOR * s[0]))
    sign = -1.0 if scale < 0 else 1.0
    U = np.dot(X, (Q_X / lengths_X) @ (sign * P[:, :k]))
    V = np.dot(Y, (Q_Y / lengths_Y) @ Z[:k].T)
    return QuickSVD(U.astype(np.float32), abs(scale) * s[:k], V.astype(np.float32))


def _spectrum(X: Floats) -> tuple[Floats, Floats]:
    """The singular values of X (n, r) above the rounding of its Gram matrix, and their right vectors as columns."""
    # np.dot and not @: matmul keeps the GIL while the result is small.
    squares, Q = np.linalg.eigh(require_finite(np.dot(X.T, X)))
    kept = squares > FACTOR_FLOOR * max(squares[-1], 0.0)
    return np.sqrt(squares[kept]), Q[:, kept]
