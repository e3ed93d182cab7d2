"""Modules of several adapters that share bases: the factors of one adapter, and the bytes of the bases.

The update of adapter i is ΔW_i = U C_i Vᵀ, U (out, p) and V (in, q), with a core C_i (p, q). U and V are stored in few
bits (`loralens.linalg.few_bits.columns`). The core is a step times integers, whose widths are the same for all adapters.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from loralens.core.lazy import Array
from loralens.errors import FormatError
from loralens.linalg.few_bits.columns import (
    COLUMN_HEAD,
    columns_bytes,
    decode_columns,
    decode_entries,
    entries_bytes,
)
from loralens.linalg.few_bits.packing import Bytes, pack, packed_length, unpack

STEP = 4  # bytes of the step of a core, a little-endian float32
WIDTH_BITS = 4  # bits of a width; 0 to 15 are stored as −8 to 7
MOST_WIDTH = 15

_DAMAGED = "the file is damaged: copy or make it again"


class SharedShape(NamedTuple):
    """The size of the bases of one module."""

    out: int
    in_: int
    p: int
    q: int


class SharedBases(NamedTuple):
    """The bases of all modules of a group, float32.

    Attributes
    ----------
    out, in_ : sequence of float32 array
        By module: U (out, p) and V (in, q).
    widths : uint8 array, shape (Σ p·q,)
        Bits of every entry of a core; the entries of all modules, row by row.
    """

    out: Sequence[NDArray[np.float32]]
    in_: Sequence[NDArray[np.float32]]
    widths: NDArray[np.uint8]

    @property
    def core_bytes(self) -> int:
        """The size of the core of one adapter."""
        return STEP + entries_bytes(self.widths)

    def cores(self, data: Bytes) -> list[NDArray[np.float64]]:
        """The core of every module from the bytes of one adapter, float64, shapes (p, q).

        Raises
        ------
        FormatError
            These are not the bytes of a core of this group.
        """
        if data.size != self.core_bytes:
            raise FormatError(f"a core has {data.size:,} bytes, not {self.core_bytes:,}", fix=_DAMAGED)
        step = float(np.frombuffer(data[:STEP].tobytes(), "<f4")[0])
        if not np.isfinite(step):
            raise FormatError("the step of a core is NaN or Inf", fix=_DAMAGED)
        numbers = step * decode_entries(data[STEP:], self.widths).astype(np.float64)
        shapes = [(U.shape[1], V.shape[1]) for U, V in zip(self.out, self.in_, strict=True)]
        parts = np.split(numbers, np.cumsum([p * q for p, q in shapes])[:-1])
        return [part.reshape(shape) for part, shape in zip(parts, shapes, strict=True)]


def encode_widths(widths: NDArray[np.uint8]) -> Bytes:
    """The bytes of the widths of a core, two in each byte."""
    return pack(widths[None].astype(np.int16) - 8, WIDTH_BITS)[0]


def encode_core(step: float, packed: Bytes) -> Bytes:
    """The bytes of the core of one adapter."""
    return np.concatenate([np.array([step], "<f4").view(np.uint8), packed])


def decode_bases(out: Bytes, in_: Bytes, widths: Bytes, shapes: Sequence[SharedShape]) -> SharedBases:
    """The bases of a group from their bytes.

    Raises
    ------
    FormatError
        The bytes do not fit the shapes.
    """
    count = sum(shape.p * shape.q for shape in shapes)
    if widths.size != packed_length(count, WIDTH_BITS):
        raise FormatError(f"its widths take {widths.size:,} bytes, and {count:,} widths do not", fix=_DAMAGED)
    numbers = (unpack(widths[None], WIDTH_BITS, count)[0] + 8).astype(np.uint8)
    if (numbers == 1).any():
        raise FormatError("an entry of a core has a width of 1 bit", fix=_DAMAGED)
    sides = (
        _decode_side(out, [(shape.out, shape.p) for shape in shapes]),
        _decode_side(in_, [(shape.in_, shape.q) for shape in shapes]),
    )
    return SharedBases(*sides, numbers)


def _decode_side(data: Bytes, shapes: Sequence[tuple[int, int]]) -> list[NDArray[np.float32]]:
    """The columns of all modules, one after the other."""
    sides, start = [], 0
    for rows, k in shapes:
        # The widths at the front of a module say how long it is. A damaged width gives a length that does not fit.
        bits = data[start : start + k]
        stop = start + columns_bytes(rows, bits) if start + COLUMN_HEAD * k <= data.size else data.size + 1
        columns = decode_columns(data[start:stop], rows, k) if stop <= data.size else None
        if columns is None:
            raise FormatError(f"its bytes do not hold {k} columns of {rows} numbers", fix=_DAMAGED)
        sides.append(columns)
        start = stop
    if start != data.size:
        raise FormatError(f"{data.size - start:,} bytes follow the last basis", fix=_DAMAGED)
    return sides


def shared_factors(
    U: NDArray[np.float32], C: NDArray[np.float64], V: NDArray[np.float32], rank: int
) -> tuple[Array, Array]:
    """Factors B (out, rank) and A (rank, in) of U C Vᵀ, float32, padded with zeros.

    If ``rank`` is at least p or q, the product is exact: B = U C and A = Vᵀ, or B = U and A = C Vᵀ. Otherwise it is the
    best approximation of that rank.
    """
    p, q = C.shape
    if min(p, q) <= rank:
        B, A = (U, C @ V.T) if p <= q else (U @ C, V.T)
    else:
        # Rounded columns are not orthonormal, so the core is decomposed in orthonormal bases of both sides.
        G_U, G_V = (np.linalg.cholesky(_gram(X)) for X in (U, V))
        P, s, Qh = np.linalg.svd(G_U.T @ C @ G_V, full_matrices=False)
        root = np.sqrt(s[:rank])
        B = U @ (np.linalg.solve(G_U.T, P[:, :rank]) * root)
        A = (np.linalg.solve(G_V.T, Qh[:rank].T) * root).T @ V.T
    return pad_factors(np.asarray(B, np.float32), np.asarray(A, np.float32), rank)


def pad_factors(B: Array, A: Array, rank: int) -> tuple[Array, Array]:
    """The same product with ``rank`` columns of B and rows of A, of which the last ones are zeros."""
    more = rank - B.shape[1]
    return np.pad(B, ((0, 0), (0, more))), np.pad(A, ((0, more), (0, 0)))


def _gram(X: NDArray[Any]) -> NDArray[np.float64]:
    wide = X.astype(np.float64)
    return np.asarray(wide.T @ wide)
