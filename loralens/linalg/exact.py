"""The product s·B·A whose bits depend on nothing but s, B and A: no summation order, no BLAS, no thread count.

Merging writes W + ΔW and unmerging takes ΔW away again, perhaps on another machine. Both must mean the same matrix, so
ΔW is *defined* here, as one float32 matrix D:

1. A rank index that is zero on one side is left out. Every other is balanced by an exact power of two, so that column j
   of s·B and row j of A have largest entries of one exponent.
2. With t = ⌊(53 − ⌈log₂ r⌉)/2⌋, every row of B and every column of A is cut, relative to its largest entry, into one
   slice of t bits, or into two.
3. Slices are integers up to 2ᵗ. r products of two of them sum to at most 2⁵³, so a float64 product of the slices
   commits no rounding at all, in whatever order it is summed. Unscaled by powers of two and rounded once to float32, it
   is D. Of two slices D = B₁A₁ + (B₁A₂ + B₂A₁), with one addition in float64.

|error| of an entry ≤ 2⁻ᵗ (max|b|·Σ|a| + max|a|·Σ|b|) with one slice, max and Σ over its row of B and its column of A:
a relative 2e-8 of ‖ΔW‖ on trained factors, and 2⁻ᵗ of that with two.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from math import ceil, log2
from typing import final

import numpy as np
from numpy.typing import NDArray

from loralens.errors import ShapeError
from loralens.linalg.factor import Array, Floats, Scratch, finite

Singles = NDArray[np.float32]
Term = tuple[float, Array, Array]  # s, B (m, r), A (r, n)

ROWS = 64  # of D made at a time: their float64 buffer stays in the cache
WIDEST = 512  # rank indices whose products are summed without rounding; further ones are added block by block

_scratch = Scratch()


@final
@dataclass(frozen=True, slots=True)
class ExactProduct:
    """D = Σ s·B·A, float32, made from its slices some rows at a time; made by `exact_product`.

    Attributes
    ----------
    pieces : tuple of Piece
        Blocks of at most 512 rank indices, added in this order.
    shape : tuple of int
        (m, n).
    """

    pieces: "tuple[Piece, ...]"
    shape: tuple[int, int]

    @property
    def T(self) -> "ExactProduct":
        """Dᵀ, with the same bits: for weights that are stored (in, out)."""
        return ExactProduct(tuple(piece.T for piece in self.pieces), self.shape[::-1])

    def rows(self, start: int, stop: int, out: Singles | None = None) -> Singles:
        """Rows ``start`` to ``stop`` of D, float32, shape (stop − start, n); they do not depend on the cut.

        Into ``out`` where one is given. 64 rows at a time are worked on, in a float64 buffer that each thread keeps.
        """
        if out is None:
            out = np.empty((stop - start, self.shape[1]), np.float32)
        for first in range(start, stop, ROWS):
            last = min(first + ROWS, stop)
            with np.errstate(over="ignore"):
                np.copyto(out[first - start : last - start], self._sum(first, last), casting="same_kind")
        return out

    def _sum(self, start: int, stop: int) -> Floats:
        """The pieces of these rows added up, in the buffer of this thread."""
        shape = (stop - start, self.shape[1])
        total = _scratch.of(shape[0] * shape[1]).reshape(shape)
        for i, piece in enumerate(self.pieces):
            if i == 0:
                piece.rows(start, stop, out=total)
            else:
                total += piece.rows(start, stop)
        return total

    def dense(self) -> Singles:
        """The whole of D."""
        return self.rows(0, self.shape[0])


@final
@dataclass(frozen=True, slots=True)
class Piece:
    """The slices of one block of rank indices, float64, each an integer times the power of two of its row or column.

    Attributes
    ----------
    B1 : float64 array, shape (m, r)
    A1 : float64 array, shape (r, n)
    B2, A2 : float64 array or None
        The second slices: shapes (m, 2r) and (2r, n), stacked so that B2 @ A2 = B₁A₂ + B₂A₁.
    """

    B1: Floats
    A1: Floats
    B2: Floats | None
    A2: Floats | None

    @property
    def T(self) -> "Piece":
        """The piece of the transpose."""
        swapped = (None, None) if self.B2 is None or self.A2 is None else (self.A2.T, self.B2.T)
        return Piece(self.A1.T, self.B1.T, *swapped)

    def rows(self, start: int, stop: int, out: Floats | None = None) -> Floats:
        """Some rows of the piece, float64: the terms of an entry share one power of two, so their sum is exact."""
        total = np.asarray(np.dot(self.B1[start:stop], self.A1, out=out), dtype=np.float64)
        if self.B2 is not None and self.A2 is not None:
            total += np.dot(self.B2[start:stop], self.A2)
        return total


def exact_product(terms: Sequence[Term], *, slices: int = 1) -> ExactProduct:
    """D = Σ s·B·A of one or several adapters, bit for bit the same everywhere.

    Parameters
    ----------
    terms : sequence of (s, B, A)
        s a finite float; B (m, r) and A (r, n) of any float dtype and any r; all of one m and n. The order counts only
        where the ranks exceed 512 together.
    slices : 1 or 2
        1 for weights stored in bf16, f16 or fp8, 2 for float32.

    Raises
    ------
    ShapeError
        The factors do not multiply, or differ in shape.
    FormatError
        A factor holds NaN or Inf.

    Notes
    -----
    Two GEMMs in float64 of inner size 2r for two slices, one of r for one. Entries beyond the range of float32 become
    ±inf or 0 as rounding to it says.
    """
    shapes = {(B.shape[0], A.shape[1]) for _, B, A in terms}
    if len(shapes) != 1 or any(B.shape[1] != A.shape[0] for _, B, A in terms):
        given = ", ".join(f"{B.shape} × {A.shape}" for _, B, A in terms)
        raise ShapeError(f"no sum of products: {given}", fix="pass factors (m, r) and (r, n) of one m and n")
    B = finite(np.hstack([s * B.astype(np.float64) for s, B, _ in terms]))
    A = finite(np.vstack([A.astype(np.float64) for _, _, A in terms]))
    cuts = range(0, max(B.shape[1], 1), WIDEST)
    pieces = tuple(_piece(B[:, i : i + WIDEST], A[i : i + WIDEST], slices) for i in cuts)
    return ExactProduct(pieces, (B.shape[0], A.shape[1]))


def _piece(B: Floats, A: Floats, slices: int) -> Piece:
    """The slices of a block of rank indices: of one slice each, or of two."""
    B, A = _balanced(B, A)
    t = (53 - ceil(log2(max(B.shape[1], 1)))) // 2
    B1, B2 = _sliced(B, t)
    A1, A2 = (X.T for X in _sliced(A.T, t))
    if slices == 1:
        return Piece(B1, np.ascontiguousarray(A1), None, None)
    return Piece(B1, np.ascontiguousarray(A1), np.hstack([B1, B2]), np.vstack([A2, A1]))


def _balanced(B: Floats, A: Floats) -> tuple[Floats, Floats]:
    """The factors with powers of two moved between them until the largest entries of each rank index are alike.

    Rank indices that are zero on one side are left out: their other side would decide how finely all of them are cut.
    """
    largest_b, largest_a = np.abs(B).max(axis=0, initial=0.0), np.abs(A).max(axis=1, initial=0.0)
    alive = (largest_b > 0) & (largest_a > 0)
    b, a = (np.frexp(largest[alive])[1].astype(np.int64) for largest in (largest_b, largest_a))
    p = (b - a) // 2
    return np.ldexp(B[:, alive], -p), np.ldexp(A[alive], p[:, None])


def _sliced(X: Floats, t: int) -> tuple[Floats, Floats]:
    """The two leading slices of t bits of every row, X ≈ X₁ + X₂: integers times 2^(e − t) and 2^(e − 2t).

    e is the exponent of the row's largest entry; the integers are at most 2ᵗ and 2^(t − 1).
    """
    e = np.frexp(np.abs(X).max(axis=1, initial=0.0))[1].astype(np.int64)[:, None]
    first = np.ldexp(np.rint(np.ldexp(X, t - e)), e - t)
    second = np.ldexp(np.rint(np.ldexp(X - first, 2 * t - e)), e - 2 * t)
    return first, second
