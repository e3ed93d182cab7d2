"""A coarse product of two factors that involves no rounding, kept in 16 or 32 bits per number.

Undoing a merge needs no exact update: a patch may be relative to any matrix, if the same bits are computed again. There
are two kinds.

For weights of 16 bits each row of B and each column of A is rounded to integers times a power of two, of which the sum
of squares is at most 2²⁴. By the inequality of Cauchy and Schwarz no partial sum of their products exceeds 2²⁴, so a
float32 product involves no rounding in any order of summation. It takes half the time and half the memory of the exact
product (`loralens.linalg.exact`), and its error is about √r·2⁻¹².

For weights of 32 bits the factors are the leading slices of the exact product, which are integers too.
"""

from dataclasses import dataclass
from math import sqrt
from typing import Any, final

import numpy as np
from numpy.typing import NDArray

from loralens.linalg.factor import Array, Floats

NORM = 2.0**12  # of a rounded column: products of two are at most 2²⁴, the integers that float32 has
ROUNDING = NORM * 2.0**-24  # how much a float32 operation with a number up to that rounds
# Columns with other norms are taken as 0. The exponents of the others are in [−60, 40], so the smallest product is
# 2^-120, a normal float32 number, and the largest sum 2^104.
SMALLEST, LARGEST = 2.0**-48, 2.0**51
# A slice of the exact product has at most 27 bits.
WIDE_BITS = 30  # of an integer in 32 bits


@final
@dataclass(frozen=True, slots=True)
class NarrowFactor:
    """Columns of integers, each times a power of two.

    Attributes
    ----------
    integers : int16 or int32 array, shape (r, n)
    exponents : int16 array, shape (n,)
    """

    integers: NDArray[Any]
    exponents: NDArray[np.int16]

    @classmethod
    def rounded(cls, X: Floats) -> "NarrowFactor":
        """The columns of X (r, n), rounded so that the norm of each is at most 2¹² in units of its integers."""
        with np.errstate(over="ignore", under="ignore"):
            singles = X.astype(np.float32, order="C")
            norms = np.sqrt(np.einsum("ij,ij->j", singles, singles))
        # Rounding adds at most ½ to each of r integers, and the norm itself is rounded.
        exponents = np.frexp(norms * np.float32(1 / (NORM - sqrt(len(X)) / 2 - ROUNDING * (len(X) + 8))))[1]
        inside = (norms > SMALLEST) & (norms < LARGEST)
        exponents *= inside
        singles *= np.ldexp(inside.astype(np.float32), -exponents)
        return cls(np.rint(singles, out=singles).astype(np.int16), exponents.astype(np.int16))

    @classmethod
    def of_slice(cls, X: Floats) -> "NarrowFactor":
        """The columns of X (r, n), a slice of an exact product, without any rounding."""
        exponents = np.frexp(np.abs(X).max(axis=0, initial=0.0))[1] - WIDE_BITS
        return cls(np.ldexp(X, -exponents).astype(np.int32), exponents.astype(np.int16))

    @property
    def nbytes(self) -> int:
        """Bytes of both arrays."""
        return self.integers.nbytes + self.exponents.nbytes

    def dense(self) -> Array:
        """The columns, in float32 for integers of 16 bits and in float64 for others."""
        if self.integers.dtype == np.int16:
            # Quicker than `ldexp` of all numbers where NumPy has no AVX-512.
            return self.integers.astype(np.float32) * np.ldexp(np.ones(1, np.float32), self.exponents)
        return np.ldexp(self.integers.astype(np.float64), self.exponents)


@final
@dataclass(frozen=True, slots=True)
class NarrowProduct:
    """The factors of a coarse product, both with the rank index first: Bᵀ (r, m) and A (r, n)."""

    left: NarrowFactor
    right: NarrowFactor

    @classmethod
    def rounded(cls, B: Floats, A: Floats) -> "NarrowProduct":
        """The factors B (m, r) and A (r, n), rounded to 16 bits; r is at most 512."""
        return cls(NarrowFactor.rounded(B.T), NarrowFactor.rounded(A))

    @classmethod
    def of_slices(cls, B: Floats, A: Floats) -> "NarrowProduct":
        """The leading slices B (m, r) and A (r, n) of an exact product."""
        return cls(NarrowFactor.of_slice(B.T), NarrowFactor.of_slice(A))

    @property
    def nbytes(self) -> int:
        """Bytes of both factors."""
        return self.left.nbytes + self.right.nbytes

    def factors(self) -> tuple[Array, Array]:
        """B (m, r) and A (r, n), whose product in their dtype has the same bits however it is summed."""
        return self.left.dense().T, self.right.dense()
