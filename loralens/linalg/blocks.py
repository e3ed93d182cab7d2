"""Thin factors in float64, some rows at a time, in memory that is used again.

New pages of memory are cleared by the system first, and a float64 copy of a factor would push everything else out of
the cache.
"""

import threading
from collections.abc import Iterator, Sequence
from math import prod
from typing import Any, Literal, final

import numpy as np
from numpy.typing import DTypeLike, NDArray

from loralens.linalg.compiled import loops

Array = NDArray[Any]
Floats = NDArray[np.float64]

LINE = 64  # bytes of a line of the cache
BLOCK = 1 << 16  # elements of a factor that are held in float64 at a time: 512 KiB stay in the cache


class Scratch(threading.local):
    """A float64 buffer of each thread that is reused, since new memory pages cost more than casting into old ones."""

    def __init__(self) -> None:
        self.buffer = np.empty(0)

    def of(self, size: int) -> Floats:
        """``size`` numbers to write into."""
        if self.buffer.size < size:
            self.buffer = aligned(size, np.float64)
        return self.buffer[:size]


def aligned(size: int, dtype: DTypeLike) -> Array:
    """Uninitialised memory for ``size`` numbers that begins with a line of the cache.

    Elsewhere every instruction on 64 bytes touches two lines, which takes a fifth more time.
    """
    memory = np.empty(size * np.dtype(dtype).itemsize + LINE, np.uint8)
    first = -memory.ctypes.data % LINE
    return memory[first : first + size * np.dtype(dtype).itemsize].view(dtype)


@final
class ReusedMemory(threading.local):
    """Gives arrays in the same memory: each overwrites the one before that the same thread got.

    New memory comes in pages that the system clears first, which takes as long as writing the numbers of a matrix.
    """

    def __init__(self) -> None:
        self._memory: NDArray[np.uint8] = np.empty(0, np.uint8)

    def __call__(self, shape: tuple[int, ...], dtype: np.dtype[Any]) -> Array:
        """An array without defined numbers."""
        size = prod(shape) * dtype.itemsize
        if self._memory.size < size:
            # Given back first, so that both are never there at the same time.
            self._memory = np.empty(0, np.uint8)
            self._memory = aligned(size, np.uint8)
        return self._memory[:size].view(dtype).reshape(shape)


_scratch = Scratch()


@final
class FactorsSideBySide:
    """Factors of n rows as one of shape (n, Σr), which `blocks_of` puts together block by block; `whole` makes it.

    Parameters
    ----------
    parts : sequence of arrays, shape (n, r)
        At least one, of any float dtypes.
    """

    __slots__ = ("parts", "shape")

    def __init__(self, parts: Sequence[Array]) -> None:
        self.parts = tuple(parts)
        self.shape = len(parts[0]), sum(part.shape[1] for part in parts)

    def whole(self) -> Array:
        """The array itself, in float64 if the dtypes of the parts differ."""
        parts: Sequence[Array] = self.parts
        if len(parts) == 1:
            return parts[0]
        # In float64 every factor keeps its numbers exactly.
        if len({part.dtype for part in parts}) > 1:
            parts = [part.astype(np.float64) for part in parts]
        # Column-major parts give a column-major array, so that they are copied in the order of the memory.
        if memory_order(self) == "F":
            return np.vstack([part.T for part in parts]).T
        return np.hstack(parts)


def block_rows(X: Array | FactorsSideBySide) -> int:
    """Number of rows of X in a block."""
    return int(max(1, BLOCK // max(1, X.shape[1])))


def memory_order(X: Array | FactorsSideBySide) -> Literal["C", "F"]:
    """The order in which arrays made of X are filled along the memory: "F" where its columns are contiguous."""
    return "F" if all(part.strides[0] < part.strides[1] for part in _parts(X)) else "C"


def _parts(X: Array | FactorsSideBySide) -> tuple[Array, ...]:
    return X.parts if isinstance(X, FactorsSideBySide) else (X,)


def blocks_of(X: Array | FactorsSideBySide) -> Iterator[tuple[slice, Floats]]:
    """X in float64, some rows at a time, with their slice. The next block overwrites the last one."""
    (n, width), step = X.shape, block_rows(X)
    # The buffer has the memory order of X, so that casting runs along the memory.
    parts, order = _parts(X), memory_order(X)
    buffer = _scratch.of(min(n * width, max(BLOCK, width)))
    for start in range(0, n, step):
        rows = slice(start, min(start + step, n))
        block = buffer[: (rows.stop - start) * width].reshape((rows.stop - start, width), order=order)
        column = 0
        for part in parts:
            np.copyto(block[:, column : column + part.shape[1]], part[rows])
            column += part.shape[1]
        yield rows, block


def gram_of_bfloat16(X: Array | FactorsSideBySide) -> Floats | None:
    """XᵀX of factors in bfloat16, with the sums of their blocks; None if the kernel does not compute it."""
    # The memory is that of a block, as nothing else of this thread uses it meanwhile.
    return loops.gram_of_factors(_parts(X), block_rows(X), _scratch.of) if X.shape[1] else None
