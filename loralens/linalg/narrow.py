"""A coarse product of two factors that float32 arithmetic computes exactly, kept in 16 bits per number.

Undoing a merge needs no exact update: a patch may be relative to any matrix, if the same bits are computed again. Each
row of B and each column of A is rounded to integers of t = ⌊(24 − ⌈log₂ r⌉)/2⌋ bits, times a power of two. The sum of r
products of such integers is at most 2²⁴, so a float32 product involves no rounding in any order of summation. It takes
half the time and half the memory of the exact product (`loralens.linalg.exact`), and its error is about 2⁻ᵗ.
"""

from dataclasses import dataclass
from math import ceil, log2
from typing import final

import numpy as np
from numpy.typing import NDArray

from loralens.linalg.exact import Singles
from loralens.linalg.factor import Floats

BITS = 24  # of the mantissa of float32
# The smallest product is then 2^-120, a normal float32 number, and the largest sum 2^104.
EXPONENTS = (-60, 40)  # rows and columns outside of this range are taken as 0


@final
@dataclass(frozen=True, slots=True)
class NarrowFactor:
    """Rows of integers, each times a power of two.

    Attributes
    ----------
    integers : int16 array, shape (m, r)
    exponents : int16 array, shape (m, 1)
    """

    integers: NDArray[np.int16]
    exponents: NDArray[np.int16]

    @classmethod
    def of(cls, X: Floats, bits: int) -> "NarrowFactor":
        """The rows of X, each rounded to integers of so many bits relative to its largest entry."""
        largest = np.maximum(X.max(axis=1, initial=0.0), -X.min(axis=1, initial=0.0))
        exponents = np.frexp(largest)[1][:, None] - bits
        inside = (exponents >= EXPONENTS[0]) & (exponents <= EXPONENTS[1])
        exponents = np.where(inside, exponents, 0)
        scaled = X * np.ldexp(inside.astype(np.float64), -exponents)
        return cls(np.rint(scaled, out=scaled).astype(np.int16), exponents.astype(np.int16))

    @property
    def nbytes(self) -> int:
        """Bytes of both arrays."""
        return self.integers.nbytes + self.exponents.nbytes

    def dense(self) -> Singles:
        """The rounded rows, float32."""
        powers: Singles = np.ldexp(np.ones(1, np.float32), self.exponents)
        return self.integers.astype(np.float32) * powers


@final
@dataclass(frozen=True, slots=True)
class NarrowProduct:
    """The rounded factors of a product: the rows of B, and the columns of A as rows."""

    left: NarrowFactor
    right: NarrowFactor

    @classmethod
    def of(cls, B: Floats, A: Floats) -> "NarrowProduct":
        """The factors B (m, r) and A (r, n), rounded; r is at most 512."""
        bits = (BITS - ceil(log2(max(B.shape[1], 1)))) // 2
        return cls(NarrowFactor.of(B, bits), NarrowFactor.of(A.T, bits))

    @property
    def nbytes(self) -> int:
        """Bytes of both factors."""
        return self.left.nbytes + self.right.nbytes

    def factors(self) -> tuple[Singles, Singles]:
        """B (m, r) and A (r, n), float32; their product has the same bits however it is summed."""
        return self.left.dense(), np.ascontiguousarray(self.right.dense().T)
