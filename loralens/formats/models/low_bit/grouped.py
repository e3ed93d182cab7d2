"""Weights whose columns are in groups that share a step: the numbers and the grid of every layout of this kind.

A layout says how its codes, steps, zeros and biases are read. With them

    W[i, j] = (code[i, j] − zero[i, g(j)]) · step[i, g(j)] + bias[i, g(j)]

or level(code[i, j]) · step[i, g(j)], each operation rounded to float32. A weight of more than two axes is a stack: its
matrices lie below each other in the file, and a row of the `CodedWeight` is one matrix, flattened.
"""

from collections.abc import Callable
from dataclasses import dataclass
from math import prod
from typing import Any, NamedTuple, final

import numpy as np
from numpy.typing import NDArray

from loralens.core.lazy import Array
from loralens.core.weights import CodedWeight, Codes, GridRows
from loralens.formats.models.low_bit.packing import Bytes
from loralens.linalg.exact import Singles


@final
@dataclass(frozen=True, slots=True)
class Levels:
    """A table of levels, in the order of the stored codes.

    Attributes
    ----------
    stored : float32 array
        The level of every stored code.
    """

    stored: Singles

    @property
    def order(self) -> NDArray[np.intp]:
        """The stored code of every code of the grid, whose levels do not decrease; 0 and −0 are two neighbours."""
        return np.argsort(self.stored, kind="stable")

    @property
    def ranks(self) -> NDArray[np.int16]:
        """The code on the grid of every stored code."""
        return np.argsort(self.order).astype(np.int16)


@final
@dataclass(frozen=True, slots=True)
class Groups:
    """The group of every column.

    Attributes
    ----------
    of_column : intp array
    size : int
        The number of columns of each group, if all have the same and their columns are neighbours; else 0.
    """

    of_column: NDArray[np.intp]
    size: int = 0

    @classmethod
    def of_size(cls, columns: int, size: int) -> "Groups":
        """Groups of neighbours; the last one may be smaller."""
        return cls(np.arange(columns, dtype=np.intp) // size, 0 if columns % size else size)

    def apply(self, operation: Callable[..., Any], W: Singles, of_groups: Singles) -> None:
        """Apply a ufunc in place to each entry of W, (rows, columns), and the number of its group in ``of_groups``."""
        if self.size:
            view = W.reshape(len(W), W.shape[1] // self.size, self.size)
            operation(view, of_groups[:, :, None], out=view)
        else:
            operation(W, np.take(of_groups, self.of_column, axis=1), out=W)


class CodeBlock(NamedTuple):
    """What the file stores for some rows of the matrices: codes (rows, columns), and the rest as (rows, groups)."""

    codes: Array
    step: Singles
    zero: Singles | None = None
    bias: Singles | None = None


@final
@dataclass(frozen=True, slots=True)
class GroupedWeight:
    """A weight in groups; `weight` makes a `CodedWeight` of it.

    Attributes
    ----------
    layout, shape, bits, stored
        As in `CodedWeight`.
    block : callable
        Takes start and stop among the rows of all matrices, and returns their `CodeBlock`.
    groups : callable
        Returns the groups. Some layouts store them in a tensor, which is read in this call.
    pack : callable
        Takes the first row and the stored codes of rows (of all rows, if ``by_rows`` is false). Returns their bytes,
        uint8, shape (rows, bytes per row) or (bytes,).
    lowest, highest : int
        The range of the stored codes; without meaning if there are levels.
    turned : bool
        Whether the last two axes of ``shape`` are those of the stored matrices in the opposite order.
    """

    layout: str
    shape: tuple[int, ...]
    bits: float
    stored: str
    block: Callable[[int, int], CodeBlock]
    groups: Callable[[], Groups]
    pack: Callable[[int, Array], Bytes]
    lowest: int = 0
    highest: int = 15
    levels: Levels | None = None
    turned: bool = False
    by_rows: bool = True

    def weight(self) -> CodedWeight:
        """The weight in the form that all layouts share."""
        return CodedWeight(
            self.layout,
            self.shape,
            self.bits,
            self._decode,
            self.stored,
            grid=self._grid,
            encode=self._encode,
            by_rows=self.by_rows,
        )

    @property
    def _matrix(self) -> tuple[int, int]:
        """Rows and columns of the stored matrices below one entry of the first axis."""
        inner = self.shape[1:]
        if self.turned:
            inner = (*inner[:-2], inner[-1], inner[-2])
        return prod(inner[:-1]), inner[-1]

    def _decode(self, start: int, stop: int) -> Singles:
        rows, columns = self._matrix
        block, groups = self.block(start * rows, stop * rows), self.groups()
        if self.levels:
            W = np.take(self.levels.stored, block.codes)
        else:
            W = block.codes.astype(np.float32)
        # A step of a damaged file may be infinite; what comes out is what the layout's own software gets.
        with np.errstate(invalid="ignore", over="ignore"):
            if block.zero is not None:
                groups.apply(np.subtract, W, block.zero)
            groups.apply(np.multiply, W, block.step)
            if block.bias is not None:
                groups.apply(np.add, W, block.bias)
        return self._in_weight_order(W.reshape(stop - start, rows, columns)).reshape(stop - start, *self.shape[1:])

    def _in_weight_order(self, entries: Array) -> Array:
        """Stored matrices, of shape (count, rows, columns), in the order of the weight."""
        return np.ascontiguousarray(entries.swapaxes(1, 2)) if self.turned else entries

    def _grid(self, start: int, stop: int) -> GridRows:
        rows, columns = self._matrix
        count = stop - start
        block, groups = self.block(start * rows, stop * rows), self.groups()
        offset = block.bias
        if block.zero is not None:
            with np.errstate(invalid="ignore", over="ignore"):
                offset = -block.zero * block.step
        codes = block.codes.astype(np.int16) if self.levels is None else np.take(self.levels.ranks, block.codes)
        step = block.step.reshape(count, rows * block.step.shape[1])
        of_column = groups.of_column
        # The matrices of a stack have groups of their own.
        if rows > 1:
            own = step.shape[1] // rows
            of_column = (np.arange(rows, dtype=np.intp)[:, None] * own + of_column).reshape(1, rows, columns)
            of_column = self._in_weight_order(of_column).reshape(rows * columns)
        return GridRows(
            codes=self._in_weight_order(codes.reshape(count, rows, columns)).reshape(count, rows * columns),
            step=step,
            offset=None if offset is None else offset.reshape(step.shape),
            group_of_column=of_column,
            lowest=self.lowest if self.levels is None else 0,
            highest=self.highest if self.levels is None else len(self.levels.stored) - 1,
            levels=None if self.levels is None else self.levels.stored[self.levels.order],
        )

    def _encode(self, first: int, codes: Codes) -> Bytes:
        rows, columns = self._matrix
        stored: Array = codes if self.levels is None else np.take(self.levels.order, codes)
        if self.turned:
            stored = stored.reshape(len(codes), columns, rows).swapaxes(1, 2)
        packed = self.pack(first * rows, stored.reshape(len(codes) * rows, columns))
        return packed.reshape(len(codes), rows * packed.shape[1]) if self.by_rows else packed
