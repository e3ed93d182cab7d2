"""The product s·B·A with bits that depend on s, B and A alone: not on BLAS, summation order or number of threads.

Merging writes W + ΔW, and unmerging subtracts ΔW again, perhaps on another machine. Both must use exactly the same
matrix. Therefore ΔW is *defined* here, as a float32 matrix D:

1. A rank index that is zero on one side is left out. Every other rank index is balanced by an exact power of two, so
   that the largest entries of column j of s·B and of row j of A have the same exponent.
2. With t = ⌊(53 − ⌈log₂ r⌉)/2⌋, every row of B and every column of A is split, relative to its largest entry, into one
   slice of t bits, or into two slices.
3. The slices are integers up to 2ᵗ. The sum of r products of them is at most 2⁵³, so a float64 product of two slices
   involves no rounding, in any order of summation. D is this product, scaled back by powers of two and rounded once to
   float32. With two slices D = B₁A₁ + (B₁A₂ + B₂A₁), with one addition in float64.

With one slice the error of an entry is at most 2⁻ᵗ (max|b|·Σ|a| + max|a|·Σ|b|), where max and Σ are taken over its row
of B and its column of A. On trained factors this is a relative 2e-8 of ‖ΔW‖; with two slices it is 2⁻ᵗ times that.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from math import ceil, log2
from typing import Any, final

import numpy as np
from numpy.typing import NDArray

from loralens.errors import ShapeError
from loralens.linalg.device import Device
from loralens.linalg.factor import Array, Floats, Integers, ReusedMemory, require_finite

Singles = NDArray[np.float32]
Term = tuple[float, Array, Array]  # s, B (m, r), A (r, n)

ROWS = 64  # rows of D computed at a time
# OpenBLAS multiplies small matrices without copying them first, and their float64 sums stay in the cache of a core.
SMALL = 1_000_000  # multiplications in a tile of D
# Of a thin tile, most of the time goes into calls.
NARROWEST = 192  # columns of a tile; products of which a tile would have fewer are computed in rows of full length
WIDEST_TILE = 2000  # columns of a tile; wider ones are slower again at ranks below 8
# t falls as the rank grows (⌈log₂ r⌉ = 9 here, t = 22), and with it the precision of a slice.
WIDEST = 512  # most rank indices in one product without rounding; the products of further blocks are added to it

NORMAL = 1000  # 2^±1000 are normal float64 numbers
_memory = ReusedMemory()


@final
@dataclass(frozen=True, slots=True)
class ExactProduct:
    """D = Σ s·B·A, float32, in the form of its slices; `exact_product` makes it, and rows are computed on demand.

    Attributes
    ----------
    pieces : tuple of Piece
        Blocks of at most 512 rank indices, which are added in this order.
    shape : tuple of int
        (m, n).
    """

    pieces: "tuple[SlicedBlock, ...]"
    shape: tuple[int, int]

    @property
    def T(self) -> "ExactProduct":
        """Dᵀ, with the same bits: for weights that are stored (in, out)."""
        return ExactProduct(tuple(piece.T for piece in self.pieces), self.shape[::-1])

    def rows(self, start: int, stop: int, out: Singles | None = None) -> Singles:
        """Rows ``start`` to ``stop`` of D, float32, shape (stop − start, n); their bits do not depend on the range.

        They are written into ``out`` if it is given. A tile at a time is computed in a float64 buffer of the thread.
        """
        if out is None:
            out = np.empty((stop - start, self.shape[1]), np.float32)
        width = _tile_width(self.shape[1], max(piece.inner for piece in self.pieces), stop - start)
        for first in range(start, stop, ROWS):
            last = min(first + ROWS, stop)
            for column in range(0, self.shape[1], width):
                columns = slice(column, column + width)
                part = out[first - start : last - start, columns]
                # Sums beyond float32 become ±inf, which the caller reports with the name of the weight.
                with np.errstate(over="ignore"):
                    np.copyto(part, self._sum(first, last, columns), casting="same_kind")
        return out

    def at(self, i: Integers, j: Integers) -> Singles:
        """The entries (i, j), with the bits of `rows`; for products of one slice."""
        # The sum of an entry is exact in any order, and the pieces are added in theirs.
        parts = (np.einsum("sr,sr->s", piece.B1[i], piece.A1.T[j]) for piece in self.pieces)
        with np.errstate(over="ignore"):
            return np.asarray(sum(parts), np.float64).astype(np.float32)

    def _sum(self, start: int, stop: int, columns: slice) -> Floats:
        """The sum of the pieces for these rows and columns, float64, in the buffer of this thread."""
        shape = (stop - start, len(range(self.shape[1])[columns]))
        total = _memory(shape)
        for i, piece in enumerate(self.pieces):
            # The first piece is written into the buffer, which saves clearing it.
            if i == 0:
                piece.tile(start, stop, columns, out=total)
            else:
                total += piece.tile(start, stop, columns)
        return total

    def dense(self) -> Singles:
        """The whole of D."""
        return self.rows(0, self.shape[0])


def _tile_width(n: int, inner: int, rows: int = ROWS) -> int:
    """The number of columns that are computed at a time, for sums of ``inner`` products."""
    width = SMALL // (min(rows, ROWS) * max(1, inner)) // 8 * 8
    return max(1, n) if width < NARROWEST else min(width, WIDEST_TILE)


@final
@dataclass(frozen=True, slots=True)
class SlicedBlock:
    """The slices of one block of rank indices. Each is float64: an integer times a power of two of its row or column.

    Attributes
    ----------
    B1 : float64 array, shape (m, r)
    A1 : float64 array, shape (r, n)
    B2, A2 : float64 array or None
        Both slices stacked, shapes (m, 2r) and (2r, n), so that B2 @ A2 = B₁A₂ + B₂A₁.
    """

    B1: Floats
    A1: Floats
    B2: Floats | None
    A2: Floats | None

    @property
    def T(self) -> "SlicedBlock":
        """The piece of the transpose."""
        swapped = (None, None) if self.B2 is None or self.A2 is None else (self.A2.T, self.B2.T)
        return SlicedBlock(self.A1.T, self.B1.T, *swapped)

    @property
    def inner(self) -> int:
        """The largest number of products in the sum of an entry."""
        left: Floats = self.B1 if self.B2 is None else self.B2
        return int(left.shape[1])

    def tile(self, start: int, stop: int, columns: slice, out: Floats | None = None) -> Floats:
        """Some entries of the product, float64; the terms of one share one power of two, so their sum is exact."""
        total = np.asarray(np.dot(self.B1[start:stop], self.A1[:, columns], out=out), dtype=np.float64)
        if self.B2 is not None and self.A2 is not None:
            total += np.dot(self.B2[start:stop], self.A2[:, columns])
        return total


def exact_product(terms: Sequence[Term], *, slices: int = 1) -> ExactProduct:
    """D = Σ s·B·A of one or several adapters, with the same bits on every machine.

    Parameters
    ----------
    terms : sequence of (s, B, A)
        s is a finite float; B (m, r) and A (r, n) have any float dtype and any r, and all have the same m and n. The
        order matters only if the ranks add up to more than 512.
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
    With one slice the cost is one float64 GEMM of inner size r, with two slices another one of inner size 2r. Entries
    beyond the range of float32 become ±inf or 0, as rounding to float32 defines it.
    """
    shapes = {(B.shape[0], A.shape[1]) for _, B, A in terms}
    if len(shapes) != 1 or any(B.shape[1] != A.shape[0] for _, B, A in terms):
        shapes_text = ", ".join(f"{B.shape} × {A.shape}" for _, B, A in terms)
        raise ShapeError(
            f"the products {shapes_text} cannot be added", fix="pass factors (m, r) and (r, n) with the same m and n"
        )
    # B is split as Bᵀ, so that NumPy goes through both factors along their long sides.
    B = _stacked([_wide(B.T, s) for s, B, _ in terms])
    A = _stacked([_wide(A) for _, _, A in terms])
    # max(…, 1): a rank of 0 also gives one (empty) piece, so that D = 0 has its shape.
    cuts = range(0, max(len(B), 1), WIDEST)
    pieces = tuple(_split_product(B[i : i + WIDEST], A[i : i + WIDEST], slices) for i in cuts)
    return ExactProduct(pieces, (B.shape[1], A.shape[1]))


def _wide(X: Array, scale: float = 1.0) -> Floats:
    """A copy of X in float64 and in C order, times the scale."""
    wide: Floats = X.astype(np.float64, order="C")
    return wide if scale == 1 else np.multiply(wide, scale, out=wide)


def _stacked(parts: Sequence[Floats]) -> Floats:
    """The matrices below each other."""
    return parts[0] if len(parts) == 1 else np.concatenate(parts)


def _split_product(B: Floats, A: Floats, slices: int) -> SlicedBlock:
    """Split the factors of one block of rank indices, Bᵀ (r, m) and A (r, n), into one slice each, or into two.

    Both are overwritten.
    """
    B, A = _balance(B, A)
    # Products of two slices have 2t bits and r of them are added: 2t + ⌈log₂ r⌉ ≤ 53, the bits of a float64.
    t = (53 - ceil(log2(max(len(B), 1)))) // 2
    (B1, *B2), (A1, *A2) = _slice_columns(B, t, slices), _slice_columns(A, t, slices)
    # A second slice would be lost in the rounding to 16 bits.
    if slices == 1:
        return SlicedBlock(_rows_first(B1), A1, None, None)
    return SlicedBlock(_rows_first(B1), A1, _rows_first(B1, *B2), np.concatenate([*A2, A1]))


def _rows_first(*slices: Floats) -> Floats:
    """Slices of Bᵀ below each other as B, in the order in which small products are quick."""
    return np.ascontiguousarray(_stacked(slices).T)


def _balance(B: Floats, A: Floats) -> tuple[Floats, Floats]:
    """Move powers of two between Bᵀ and A until the rows of each rank index have largest entries of one exponent.

    Both are overwritten. Rank indices that are zero on one side are left out. Their other side would otherwise decide
    the precision of all.
    """
    # A maximum passes NaN and Inf on, so the check reads r numbers instead of all.
    largest_b, largest_a = (require_finite(np.abs(X).max(axis=1, initial=0.0)) for X in (B, A))
    # A row of zeros has no exponent
    alive = (largest_b > 0) & (largest_a > 0)
    if not alive.all():
        B, A, largest_b, largest_a = B[alive], A[alive], largest_b[alive], largest_a[alive]
    b, a = (np.frexp(largest)[1] for largest in (largest_b, largest_a))
    # Half of the difference to each side; powers of two change no mantissa.
    p = ((b - a) // 2)[:, None]
    normal = _are_normal(p, 0)
    return _times_power(B, -p, out=B, normal=normal), _times_power(A, p, out=A, normal=normal)


def _slice_columns(X: Floats, t: int, count: int) -> list[Floats]:
    """The leading slice of t bits of every column; if ``count`` is 2, also the second one: X ≈ X₁ + X₂.

    They are integers, at most 2ᵗ and 2^(t − 1), times 2^(e − t) and 2^(e − 2t). e is the exponent of the largest entry
    of the whole column, also for the second slice. The last slice overwrites X.
    """
    e = np.frexp(np.abs(X).max(axis=0, initial=0.0))[1]
    normal = _are_normal(e, 2 * t)
    slices: list[Floats] = []
    for places in (t, 2 * t)[:count]:
        remainder = np.subtract(X, slices[0], out=X) if slices else X
        own = X if len(slices) == count - 1 else np.empty_like(X)
        scaled = _times_power(remainder, places - e, out=own, normal=normal)
        np.rint(scaled, out=scaled)
        slices.append(_times_power(scaled, e - places, out=scaled, normal=normal))
    return slices


def _are_normal(exponents: NDArray[np.int32], further: int) -> bool:
    """Whether 2^x is a normal number for all x whose distance to an exponent, or to its negative, is at most that."""
    return not exponents.size or max(exponents.max(), -exponents.min()) + further <= NORMAL


def _times_power(X: Floats, exponents: NDArray[np.int32], *, out: Floats, normal: bool) -> Floats:
    """X · 2^exponents in ``out``, with the bits of `np.ldexp`, which takes several times as long."""
    # A product rounds as ldexp does as long as the power itself is a normal number.
    return np.multiply(X, np.ldexp(1.0, exponents), out=out) if normal else np.ldexp(X, exponents, out=out)


Slices = tuple[tuple[Any, Any], ...]  # tensors on the device: both sides of each product that is added up


@final
@dataclass(frozen=True, slots=True)
class DeviceProduct:
    """The D = Σ s·B·A of an `ExactProduct`, float32, multiplied by torch; `product_on` makes it.

    Attributes
    ----------
    pieces : tuple of (tensor, tensor) pairs
        For each block of rank indices the pair B₁, A₁ and, if there are two slices, the pair B2, A2 of `SlicedBlock`.
        All are float64 and on the device.
    shape : tuple of int
        (m, n).
    """

    pieces: tuple[Slices, ...]
    shape: tuple[int, int]

    @property
    def T(self) -> "DeviceProduct":
        """Dᵀ, with the same bits."""
        swapped = tuple(tuple((right.T, left.T) for left, right in piece) for piece in self.pieces)
        return DeviceProduct(swapped, self.shape[::-1])

    def rows(self, start: int, stop: int, out: Singles | None = None) -> Singles:
        """Rows ``start`` to ``stop`` of D as a NumPy array, float32, shape (stop − start, n), in ``out`` if given.

        The terms are added in the same order as in `ExactProduct`. They are rounded to float32 on the device, which
        halves the bytes that are copied back.
        """
        import torch

        # The order of the additions is part of the definition of D (see `loralens.linalg.exact`).
        total = sum(
            (_piece(piece, start, stop) for piece in self.pieces[1:]), start=_piece(self.pieces[0], start, stop)
        )
        rows: Singles = total.to(torch.float32).cpu().numpy()
        if out is None:
            return rows
        np.copyto(out, rows)
        return out


def product_on(device: Device | None, product: ExactProduct) -> ExactProduct | DeviceProduct:
    """The product on ``device``: the argument itself for NumPy, else a `DeviceProduct` with its slices on the device.

    A float64 product of the slices involves no rounding in any order of summation, so every device gives the same bits.
    """
    if device is None or device.torch is None:
        return product
    pieces = []
    for piece in product.pieces:
        pairs = [(piece.B1, piece.A1)]
        if piece.B2 is not None and piece.A2 is not None:
            pairs.append((piece.B2, piece.A2))
        pieces.append(tuple((device.put(left, "float64"), device.put(right, "float64")) for left, right in pairs))
    return DeviceProduct(tuple(pieces), product.shape)


def _piece(pairs: Slices, start: int, stop: int) -> Any:
    """Some rows of the product of one block of rank indices, float64, on the device."""
    products = [left[start:stop] @ right for left, right in pairs]
    return products[0] if len(products) == 1 else products[0] + products[1]
