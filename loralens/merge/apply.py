"""One stored tensor merged, some rows at a time: what is read, what is added, what is to be written."""

from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any, final

import numpy as np
from numpy.typing import DTypeLike, NDArray

from loralens.core.lazy import Array, LazyArray
from loralens.linalg.exact import Singles
from loralens.merge.plan import Axis, Magnitude, Slab, TensorPlan
from loralens.merge.rounding import Rounding, added, removed, slices_for
from loralens.merge.update import Rows, row_blocks


@final
@dataclass(frozen=True, slots=True)
class Gain:
    """What DoRA multiplies W + D by: a float32 vector g along the rows or the columns of a slab as stored."""

    values: Singles
    axis: Axis

    def of(self, start: int, stop: int) -> Singles:
        """G for rows ``start`` to ``stop`` of the slab, ready to be multiplied by them."""
        return self.values[start:stop, None] if self.axis == "rows" else self.values


@final
@dataclass(frozen=True, slots=True)
class Block:
    """Some rows of a stored tensor before and after.

    Attributes
    ----------
    start, stop : int
        Rows of the matrix under which the tensor is looked at.
    slab : Slab or None
        What the rows belong to; None where nothing is added.
    W : array, shape (stop − start, columns)
        Of the base, or of what replaces it, in its dtype.
    D : float32 array or None
        The update, valid until the next block comes.
    gain : float32 array or None
    merged : array, shape as W
        In the dtype of the result.
    """

    start: int
    stop: int
    slab: Slab | None
    W: Array
    D: Singles | None
    gain: Singles | None
    merged: Array

    def subtracted(self, dtype: DTypeLike) -> Array:
        """R: what taking the update away from the merged rows gives, in the dtype of the base."""
        return self.merged.astype(dtype) if self.D is None else removed(self.merged, self.D, dtype, gain=self.gain)


@final
@dataclass(slots=True)
class TensorMerge:
    """A planned tensor, its products ready, its gains known; made by `prepare`."""

    plan: TensorPlan
    dtype: np.dtype[Any]
    rounding: Rounding
    products: dict[int, Rows]
    gains: dict[int, Gain] = field(default_factory=dict)

    def blocks(self) -> Iterator[Block]:
        """All rows in order, in blocks that end where slabs do."""
        source = MatrixRows(self.plan.source, self.plan.matrix)
        buffer = np.empty(0, np.float32)
        for start, stop, slab in cuts(self.plan):
            W = source.rows(start, stop)
            D = gain = None
            if slab:
                first = start - slab.start
                if buffer.size < W.size:
                    buffer = np.empty(W.size, np.float32)
                last = first + stop - start
                D = self.products[slab.start].rows(first, last, out=buffer[: W.size].reshape(W.shape))
                found = self.gains.get(slab.start)
                gain = found.of(first, last) if found else None
            merged = (
                W.astype(self.dtype)
                if D is None
                else added(W, D, self.dtype, gain=gain, rounding=self.rounding.at(start * W.shape[1]))
            )
            yield Block(start, stop, slab, W, D, gain, self._with_tokens(start, stop, merged))

    def _with_tokens(self, start: int, stop: int, merged: Array) -> Array:
        tokens = self.plan.tokens
        here = [(k, row) for k, row in enumerate(tokens.indices) if start <= row < stop] if tokens else []
        if not here or not tokens:
            return merged
        merged = merged.copy()
        rows = tokens.rows.read()
        for k, row in here:
            merged[row - start] = rows[k].astype(merged.dtype)
        return merged


def prepare(plan: TensorPlan, *, dtype: DTypeLike | None = None, rounding: Rounding | None = None) -> TensorMerge:
    """A planned tensor ready to be merged.

    Parameters
    ----------
    plan : TensorPlan
    dtype : dtype or None
        Of the result; that of the base where None.
    rounding : Rounding or None
        To the nearest where None.

    Notes
    -----
    DoRA reads the weight once here, for the norms.
    """
    source = plan.source
    products = {slab.start: slab.update(slices_for(source.dtype)) for slab in plan.slabs}
    gains = {
        slab.start: _gain(slab, slab.magnitude, products[slab.start], MatrixRows(source, plan.matrix))
        for slab in plan.slabs
        if slab.magnitude
    }
    return TensorMerge(plan, np.dtype(dtype or source.dtype), rounding or Rounding(), products, gains)


@final
class MatrixRows:
    """Rows of a stored tensor looked at as a matrix; of a stack of experts the last one read is held."""

    __slots__ = ("_held", "_matrix", "_stack", "_tensor")

    def __init__(self, tensor: LazyArray, matrix: tuple[int, int]) -> None:
        self._matrix = matrix
        self._stack = len(tensor.shape) == 3 and matrix[0] != tensor.shape[0]
        self._tensor = tensor if self._stack else tensor.reshape(*matrix)
        self._held: tuple[int, Array] | None = None

    def rows(self, start: int, stop: int) -> Array:
        """Rows ``start`` to ``stop``, of one expert in a stack; in the dtype of the file, not to be written into."""
        if self._stack:
            height = self._tensor.shape[1]
            expert = start // height
            if self._held is None or self._held[0] != expert:
                self._held = expert, self._tensor.rows(expert, expert + 1).read()[0]
            return self._held[1][start - expert * height : stop - expert * height]
        if self._tensor.streams:
            return self._tensor.rows(start, stop).read()
        if self._held is None:
            self._held = 0, self._tensor.read()
        return self._held[1][start:stop]


def cuts(plan: TensorPlan) -> Iterator[tuple[int, int, Slab | None]]:
    """Blocks of rows in order, each within one slab or between two, and within one expert."""
    rows, columns = plan.matrix
    shape = plan.shape
    height = shape[1] if len(shape) == 3 and rows != shape[0] else rows
    edges = sorted({0, rows, *range(0, rows, max(height, 1)), *(e for s in plan.slabs for e in (s.start, s.stop))})
    at = {slab.start: slab for slab in plan.slabs}
    slab: Slab | None = None
    for start, stop in pairwise(edges):
        slab = at.get(start, slab if slab and slab.stop > start else None)
        for first, last in row_blocks(stop - start, columns):
            yield start + first, start + last, slab


def _gain(slab: Slab, magnitude: Magnitude, product: Rows, source: MatrixRows) -> Gain:
    """G = m / ‖W + D‖, norms in float64 over the other axis; 0 where the vector is 0."""
    squares: NDArray[np.float64] = np.zeros(product.shape[0 if magnitude.axis == "rows" else 1])
    for first, last in row_blocks(*product.shape):
        W = source.rows(slab.start + first, slab.start + last)
        total = W.astype(np.float64) + product.rows(first, last)
        if magnitude.axis == "rows":
            squares[first:last] = np.einsum("ij,ij->i", total, total)
        else:
            squares += np.einsum("ij,ij->j", total, total)
    lengths = magnitude.lengths.read().astype(np.float64)
    norms = np.sqrt(squares)
    return Gain(np.divide(lengths, norms, out=np.zeros_like(norms), where=norms > 0).astype(np.float32), magnitude.axis)
