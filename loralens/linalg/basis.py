"""`Basis`: orthonormal columns, stored as the product of a tall factor and a small matrix."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Self, final

import numpy as np

from loralens.linalg.factor import Array, Floats, cross_gram, cross_grams


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


def cross_products(first: Sequence[Basis], second: Sequence[Basis]) -> Floats:
    """``first[p].cross(second[p])`` for every p, shape (P, k1, k2).

    All bases of a sequence have the same shape of ``T``. The small products are done together, with the same bits.
    """
    G = cross_grams([(one.X, other.X) for one, other in zip(first, second, strict=True)])
    left, right = (np.stack([basis.T for basis in bases]) for bases in (first, second))
    return np.asarray(left.swapaxes(1, 2) @ G @ right, dtype=np.float64)
