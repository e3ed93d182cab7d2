"""`CodedWeight`: a weight that is stored as codes of a few bits with scales, whatever its file format.

Every layout gives the same two views of a weight W (out, in). The first is its numbers in float32, bit for bit as the
layout's own software decodes them. The second is its grid, on which a merge that keeps the scales moves codes:

    W[i, j] = step[i, g(j)] · level(code[i, j]) + offset[i, g(j)]

g(j) is the group of column j, whose entries share a step and an offset. level(c) is c itself for integer grids, and
an entry of a table for grids with unequal steps (NF4, FP4, MXFP4).
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import final

import numpy as np
from numpy.typing import NDArray

from loralens.core.lazy import LazyArray
from loralens.linalg.exact import Singles

Codes = NDArray[np.int16]


@final
@dataclass(frozen=True, slots=True)
class GridRows:
    """The codes, steps and offsets of some rows of a coded weight.

    Attributes
    ----------
    codes : int16 array, shape (rows, columns)
    step : float32 array, shape (rows, groups)
        The distance of neighbouring codes, or what a table of levels is multiplied by. It may be negative or 0.
    offset : float32 array, shape (rows, groups), or None
        None stands for 0.
    group_of_column : intp array, shape (columns,)
        The group of every column.
    lowest, highest : int
        The range of the codes; both can be stored.
    levels : float32 array or None
        The level of every code from ``lowest`` on, not decreasing. None: the level is the code.
    """

    codes: Codes
    step: Singles
    offset: Singles | None
    group_of_column: NDArray[np.intp]
    lowest: int
    highest: int
    levels: Singles | None = None

    def values(self, codes: Codes) -> Singles:
        """The numbers that other codes of the same rows stand for, float32, up to the rounding of the last place."""
        levels = codes.astype(np.float32) if self.levels is None else self.levels[codes - self.lowest]
        numbers = levels * self.step[:, self.group_of_column]
        return numbers if self.offset is None else numbers + self.offset[:, self.group_of_column]


@final
@dataclass(frozen=True, slots=True)
class CodedWeight:
    """One weight of a low-bit base.

    Attributes
    ----------
    layout : str
        The name of the layout in messages: ``Q4_1``, ``bitsandbytes NF4``, ``MLX 4-bit``.
    shape : tuple of int
        The shape of the decoded weight, as a checkpoint of floats stores it.
    bits : float
        Bits per weight in the file, with scales.
    decode : callable
        Takes start and stop, and returns these rows in float32, bit for bit as the layout's own software does.
    stored : str
        The key of the stored tensor that holds the codes.
    grid : callable or None
        Takes start and stop, and returns the `GridRows` of these rows. None: a merge cannot move its codes yet.
    encode : callable or None
        Takes the first row and the codes of some rows (all rows, if ``by_rows`` is false). Returns the bytes of these
        rows as a uint8 array, shape (rows, bytes per row), with the stored scales; or, if ``by_rows`` is false, the
        bytes of the whole stored tensor, shape (bytes,).
    row_order : intp array or None
        The position in the file of every row. None: rows are stored in order.
    by_rows : bool
        Whether the bytes of a row lie together in the file.
    """

    layout: str
    shape: tuple[int, ...]
    bits: float
    decode: Callable[[int, int], Singles]
    stored: str
    grid: Callable[[int, int], GridRows] | None = None
    encode: Callable[[int, Codes], NDArray[np.uint8]] | None = None
    row_order: NDArray[np.intp] | None = None
    by_rows: bool = True

    def floats(self) -> LazyArray:
        """The weight as an array of float32 that is decoded when it is read, by rows."""
        return LazyArray(lambda: self.decode(0, self.shape[0]), shape=self.shape, dtype=np.float32, rows=self.decode)
