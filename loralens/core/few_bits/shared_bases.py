"""Modules of several adapters that share bases: the bytes of the bases, and the factors of one adapter.

The update of adapter i is ΔW_i = U C_i Vᵀ, U (out, p) and V (in, q), with a core C_i (p, q). U and V are stored in few
bits (`loralens.linalg.few_bits.columns`). The core is a step times integers. The widths of the integers are the same
for all adapters.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from threading import Lock
from typing import NamedTuple, final

import numpy as np
from numpy.typing import DTypeLike, NDArray

from loralens.core.lazy import Array, LazyArray
from loralens.errors import FormatError
from loralens.linalg.factor import Floats, check_in_range
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
Pair = tuple[Array, Array]  # B (out, r) and A (r, in)


class SharedShape(NamedTuple):
    """The sizes of the bases of one module."""

    out: int
    in_: int
    p: int
    q: int


@final
@dataclass(frozen=True, slots=True)
class SharedBases:
    """The bases of all modules of a group.

    Attributes
    ----------
    out, in_ : sequence of LazyArray
        By module: U (out, p) and V (in, q), float32.
    widths : uint8 array, shape (Σ p·q,)
        Bits of every entry of a core; the entries of all modules, row by row.
    """

    out: Sequence[LazyArray]
    in_: Sequence[LazyArray]
    widths: NDArray[np.uint8]

    @classmethod
    def of(cls, out: LazyArray, in_: LazyArray, widths: Bytes, shapes: Sequence[SharedShape]) -> "SharedBases":
        """The bases of a group from their bytes. Only the widths of columns and entries are read now.

        Raises
        ------
        FormatError
            The bytes do not fit the shapes.
        """
        count = sum(shape.p * shape.q for shape in shapes)
        if widths.size != packed_length(count, WIDTH_BITS):
            raise FormatError(f"{widths.size:,} bytes are not {count:,} widths of a core", fix=_DAMAGED)
        numbers = (unpack(widths[None], WIDTH_BITS, count)[0] + 8).astype(np.uint8)
        if (numbers == 1).any():
            raise FormatError("an entry of a core has a width of 1 bit", fix=_DAMAGED)
        return cls(
            _columns(out, [(shape.out, shape.p) for shape in shapes]),
            _columns(in_, [(shape.in_, shape.q) for shape in shapes]),
            numbers,
        )

    def cores(self, data: Bytes) -> list[Floats]:
        """The core of every module from the bytes of one adapter, float64, shapes (p, q).

        Raises
        ------
        FormatError
            These are not the bytes of a core of this group.
        """
        size = STEP + entries_bytes(self.widths)
        if data.size != size:
            raise FormatError(f"a core has {data.size:,} bytes, not {size:,}", fix=_DAMAGED)
        step = float(np.frombuffer(data[:STEP].tobytes(), "<f4")[0])
        if not np.isfinite(step):
            raise FormatError("the step of a core is NaN or Inf", fix=_DAMAGED)
        numbers = step * decode_entries(data[STEP:], self.widths).astype(np.float64)
        shapes = [(U.shape[1], V.shape[1]) for U, V in zip(self.out, self.in_, strict=True)]
        parts = np.split(numbers, np.cumsum([p * q for p, q in shapes])[:-1])
        return [part.reshape(shape) for part, shape in zip(parts, shapes, strict=True)]


def encode_widths(widths: NDArray[np.uint8]) -> Bytes:
    """The bytes of the widths of a core, two in each byte."""
    (line,) = pack(widths[None].astype(np.int16) - 8, WIDTH_BITS)
    return np.asarray(line, np.uint8)


def encode_cores(steps: NDArray[np.float32], packed: Bytes) -> Bytes:
    """The bytes of the cores of n adapters, (n, size), from their steps (n,) and packed integers (n, size − 4)."""
    return np.concatenate([np.ascontiguousarray(steps, "<f4").view(np.uint8).reshape(-1, STEP), packed], axis=1)


def _columns(data: LazyArray, shapes: Sequence[tuple[int, int]]) -> list[LazyArray]:
    """The columns (rows, k) of all modules, which lie one after the other in the bytes."""
    sides, start = [], 0
    for rows, k in shapes:
        # The widths at the front of a module say how long it is. The length is checked before anything is made of it.
        if start + COLUMN_HEAD * k > data.size:
            raise FormatError(f"its bytes end before {k} columns of {rows} numbers", fix=_DAMAGED)
        stop = start + columns_bytes(rows, data.rows(start, start + k).read())
        if stop > data.size:
            raise FormatError(f"its bytes end before {k} columns of {rows} numbers", fix=_DAMAGED)
        sides.append(LazyArray(_column_reader(data.rows(start, stop), rows, k), shape=(rows, k), dtype=np.float32))
        start = stop
    if start != data.size:
        raise FormatError(f"{data.size - start:,} bytes follow the last basis", fix=_DAMAGED)
    return sides


def _column_reader(data: LazyArray, rows: int, k: int) -> Callable[[], Array]:
    def read() -> Array:
        columns = decode_columns(data.read(), rows, k)
        if columns is None:
            raise FormatError(f"its bytes are not {k} columns of {rows} numbers", fix=_DAMAGED)
        return columns

    return read


def shared_factors(U: Array, C: Floats, V: Array, rank: int) -> Pair:
    """Factors B (out, r) and A (r, in) of U C Vᵀ, float64, r ≤ ``rank``.

    If ``rank`` is at least p or q, the product is exact: B = U C and A = Vᵀ, or B = U and A = C Vᵀ. Otherwise it is the
    best approximation of that rank, with balanced factors.

    Raises
    ------
    FormatError
        The columns of a basis depend on each other, which those of a written basis never do.
    """
    U, V = U.astype(np.float64), V.astype(np.float64)
    p, q = C.shape
    if min(p, q) <= rank:
        return (U, C @ V.T) if p <= q else (U @ C, V.T)
    # Rounded columns are not orthonormal, so the core is decomposed in orthonormal bases of both sides.
    try:
        G_U, G_V = (np.linalg.cholesky(X.T @ X) for X in (U, V))
    except np.linalg.LinAlgError as error:
        raise FormatError("the columns of a basis depend on each other", fix=_DAMAGED) from error
    P, s, Qh = np.linalg.svd(G_U.T @ C @ G_V, full_matrices=False)
    root = np.sqrt(s[:rank])
    return U @ (np.linalg.solve(G_U.T, P[:, :rank]) * root), (np.linalg.solve(G_V.T, Qh[:rank].T) * root).T @ V.T


def lazy_pair(
    compute: Callable[[], Pair], shape: tuple[int, int], rank: int, dtype: DTypeLike
) -> tuple[LazyArray, LazyArray]:
    """The factors that ``compute`` gives, rounded once to ``dtype`` and padded with zeros to ``rank``.

    The first factor that is read keeps the other one until that is read too, so that both are computed once.

    Raises
    ------
    FormatError
        When they are read: the numbers are too large for the dtype.
    """
    kind, waiting, lock = np.dtype(dtype), dict[int, Array](), Lock()

    def side(which: int) -> Array:
        # A writer reads both factors at once, in two threads, and each would compute both.
        with lock:
            array = waiting.pop(which, None)
            if array is None:
                both = [_pad(factor, axis, rank) for factor, axis in zip(compute(), (1, 0), strict=True)]
                with np.errstate(over="ignore"):
                    array, waiting[1 - which] = (check_in_range(both[i].astype(kind), kind) for i in (which, 1 - which))
        return array

    out, in_ = shape
    return (
        LazyArray(lambda: side(0), shape=(out, rank), dtype=kind),
        LazyArray(lambda: side(1), shape=(rank, in_), dtype=kind),
    )


def _pad(factor: Array, axis: int, rank: int) -> Array:
    """The factor with zeros behind its last column (axis 1) or row (axis 0)."""
    widths = [(0, 0), (0, 0)]
    widths[axis] = (0, rank - factor.shape[axis])
    return np.pad(factor, widths)
