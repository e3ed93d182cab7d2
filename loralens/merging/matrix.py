"""Reading a stored tensor as a matrix, a block of rows at a time."""

from collections.abc import Callable, Iterator
from itertools import pairwise
from typing import Any, final

import numpy as np

from loralens.core.lazy import Array, LazyArray
from loralens.linalg.exact import Singles
from loralens.linalg.factor import aligned
from loralens.merging.plan import Slab, TensorPlan, as_matrix
from loralens.merging.update import row_ranges

# Takes a shape and a dtype, as `np.empty` does, and returns an array to write into.
NewArray = Callable[[tuple[int, ...], np.dtype[Any]], Array]


@final
class MatrixRows:
    """The rows of a stored tensor as a matrix.

    If single rows cannot be read, the whole tensor is read once and kept. If it is a stack whose experts can be read
    separately, only the last expert is kept.
    """

    __slots__ = ("_held", "_matrix", "_stack", "_tensor")

    def __init__(self, tensor: LazyArray, matrix: tuple[int, int]) -> None:
        self._matrix = matrix
        flat = tensor.reshape(*matrix)
        # A flattened stack that cannot be read by rows can still be read by experts.
        self._stack = len(tensor.shape) == 3 and matrix[0] != tensor.shape[0] and not flat.streams
        self._tensor = tensor if self._stack else flat
        self._held: tuple[int, Array] | None = None

    def rows(self, start: int, stop: int) -> Array:
        """Rows ``start`` to ``stop`` in the dtype of the file. They lie within one expert, and must not be modified."""
        # The callers' row ranges never cross the end of an expert, so each call needs one expert.
        if self._stack:
            height = self._tensor.shape[1]
            expert = start // height
            if self._held is None or self._held[0] != expert:
                self._held = None  # two experts at a time would need twice the memory
                self._held = expert, self._tensor.rows(expert, expert + 1).read()[0]
            return self._held[1][start - expert * height : stop - expert * height]
        if self._tensor.streams:
            return self._tensor.rows(start, stop).read()
        if self._held is None:
            self._held = 0, self._tensor.read()
        return self._held[1][start:stop]

    def blocks(self) -> Iterator[Array]:
        """Yield all rows in order, a block at a time."""
        # Blocks end with their expert, since `rows` reads from one expert at a time.
        height = self._tensor.shape[1] if self._stack else self._matrix[0]
        for first in range(0, self._matrix[0], max(height, 1)):
            for start, stop in row_ranges(height, self._matrix[1]):
                yield self.rows(first + start, first + stop)


def matrix_blocks(tensor: LazyArray) -> Iterator[Array]:
    """All numbers of a tensor in order, a block of its rows at a time."""
    return MatrixRows(tensor, as_matrix(tensor.shape)).blocks()


def cuts(
    plan: TensorPlan, numbers: int | None = None, *, within: tuple[int, int] | None = None
) -> Iterator[tuple[int, int, Slab | None]]:
    """Yield blocks of rows in order, each with its slab or None. A block does not cross limits of slabs or experts.

    A block has at most ``numbers`` numbers, but at least one row; by default as many as `row_ranges` gives it.
    ``within`` limits the rows to those from a first one to before another.
    """
    rows, columns = plan.matrix
    shape = plan.shape
    height = shape[1] if len(shape) == 3 and rows != shape[0] else rows
    # Blocks end at the limits of slabs and at those of experts, whichever come first.
    least, most = within or (0, rows)
    edges = sorted({0, rows, *range(0, rows, max(height, 1)), *(e for s in plan.slabs for e in (s.start, s.stop))})
    at = {slab.start: slab for slab in plan.slabs}
    slab: Slab | None = None
    limit = () if numbers is None else (numbers,)
    for start, stop in pairwise(edges):
        # A slab goes on until its stop, even past the end of an expert within it.
        slab = at.get(start, slab if slab and slab.stop > start else None)
        begin, end = max(start, least), min(stop, most)
        for first, last in row_ranges(max(end - begin, 0), columns, *limit):
            yield begin + first, begin + last, slab


@final
class Buffer:
    """A float32 array that is reused from block to block, since new memory pages cost more than the arithmetic."""

    __slots__ = ("_array",)

    def __init__(self) -> None:
        self._array: Singles = np.empty(0, np.float32)

    def of(self, shape: tuple[int, ...]) -> Singles:
        """An array of this shape to write into. It overwrites the array of the previous call."""
        size = int(np.prod(shape))
        # It only grows: the last block of a tensor is the smallest.
        if self._array.size < size:
            self._array = aligned(size, np.float32)
        return self._array[:size].reshape(shape)
