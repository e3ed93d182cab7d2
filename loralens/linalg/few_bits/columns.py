"""Columns in few bits, each with a bit width and a scale of its own, and matrices of integers with a width per entry.

The bytes of k columns of m numbers, as `encode_columns` makes them:

=====================  =========================================================
k bytes                bit width b of each column, 2 to 8
4k bytes               scale of each column, float32, little-endian
Σ⌈m·b/8⌉ bytes         integers, column by column, packed by `packing.pack`
=====================  =========================================================

`encode_entries` packs rows of integers in which the entries at one position have one width in all rows. The entries
are sorted by their widths, and those of one width are packed together. Entries of width 0 are 0 and take no place.
"""

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from loralens.linalg.factor import Array, Floats, Integers
from loralens.linalg.few_bits.packing import FEWEST, Bytes, Numbers, pack, packed_length, unpack
from loralens.linalg.few_bits.quantise import round_column

COLUMN_HEAD = 5  # bytes of a column besides its integers: the width and a float32 scale
WIDEST = 8  # bits of a number in a column
WIDTHS = (0, *range(FEWEST, 17))  # widths of an entry


class CodedColumns(NamedTuple):
    """Columns in integers.

    Attributes
    ----------
    Q : int16 array, shape (m, k)
    scales : float32 array, shape (k,)
    bits : uint8 array, shape (k,)
    """

    Q: Numbers
    scales: NDArray[np.float32]
    bits: NDArray[np.uint8]

    @property
    def values(self) -> NDArray[np.float32]:
        """The columns that the integers and scales stand for, float32, shape (m, k)."""
        return self.Q.astype(np.float32) * self.scales

    @property
    def nbytes(self) -> int:
        """The size of the bytes that store the columns."""
        return columns_bytes(len(self.Q), self.bits)


def columns_bytes(rows: int, bits: Array) -> int:
    """The size of columns of these bit widths."""
    return COLUMN_HEAD * len(bits) + sum(packed_length(rows, int(b)) for b in bits)


def round_columns(X: Floats, bits: Array) -> CodedColumns:
    """Round every column of X (m, k) to integers of its own bit width, under the best of twelve scales."""
    Q, scales = np.zeros(X.shape, np.int16), np.zeros(X.shape[1], np.float32)
    for i, b in enumerate(bits):
        Q[:, i], scales[i] = round_column(X[:, i], int(b))
    return CodedColumns(Q, scales, np.asarray(bits, np.uint8))


def encode_columns(columns: CodedColumns) -> Bytes:
    """The bytes of columns, uint8, in one dimension."""
    lines = columns.Q.T
    parts = [columns.bits, columns.scales.astype("<f4").view(np.uint8)]
    parts += [pack(lines[i : i + 1], int(b))[0] for i, b in enumerate(columns.bits)]
    return np.concatenate(parts)


def decode_columns(data: Bytes, rows: int, k: int) -> NDArray[np.float32] | None:
    """The columns that `encode_columns` stored, float32, shape (rows, k); None if these bytes do not store them."""
    if data.size < COLUMN_HEAD * k:
        return None
    bits, scales = data[:k], data[k : COLUMN_HEAD * k].tobytes()
    if k and (bits.min() < FEWEST or bits.max() > WIDEST):
        return None
    if data.size != columns_bytes(rows, bits):
        return None
    starts = COLUMN_HEAD * k + np.cumsum([0, *(packed_length(rows, int(b)) for b in bits)])
    lines = np.empty((k, rows), np.float32)
    for width in np.unique(bits):
        which = np.flatnonzero(bits == width)
        packed = np.stack([data[starts[i] : starts[i + 1]] for i in which])
        lines[which] = unpack(packed, int(width), rows)
    lines *= np.frombuffer(scales, "<f4")[:, None]
    return lines.T if np.isfinite(lines).all() else None


def entry_widths(integers: Array) -> NDArray[np.uint8]:
    """The least width that holds the integers at each position in all rows, (n, count) → (count,); 0 if all are 0."""
    largest = np.abs(integers).max(axis=0, initial=0).astype(np.int64)
    # n = 2^(b−1) − 1 is the largest integer of b bits in a symmetric range.
    return np.where(largest > 0, np.maximum(FEWEST, np.ceil(np.log2(largest + 1)) + 1), 0).astype(np.uint8)


def entries_bytes(widths: NDArray[np.uint8]) -> int:
    """The size of one row of entries of these widths."""
    counts = np.bincount(widths, minlength=1)
    return sum(packed_length(int(n), b) for b, n in enumerate(counts) if b and n)


def encode_entries(integers: Array, widths: NDArray[np.uint8]) -> Bytes:
    """Rows of integers (n, count) as bytes (n, size)."""
    parts = [pack(integers[:, which], b) for b, which in _by_width(widths)]
    return np.concatenate([np.empty((len(integers), 0), np.uint8), *parts], axis=1)


def decode_entries(row: Bytes, widths: NDArray[np.uint8]) -> Numbers:
    """One row of integers, int16, shape (count,); ``row`` has the size `entries_bytes`."""
    integers, start = np.zeros(widths.size, np.int16), 0
    for b, which in _by_width(widths):
        stop = start + packed_length(which.size, b)
        integers[which] = unpack(row[None, start:stop], b, which.size)[0]
        start = stop
    return integers


def _by_width(widths: NDArray[np.uint8]) -> list[tuple[int, Integers]]:
    """Every width that occurs, in rising order, with the positions of its entries; without width 0."""
    return [(int(b), np.flatnonzero(widths == b)) for b in np.unique(widths) if b]
