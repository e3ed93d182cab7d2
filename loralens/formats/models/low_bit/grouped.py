"""Weights whose columns are in groups that share a step: their stored tensors, their numbers and their grid.

A layout says how its codes, steps, zeros and biases are read. With them

    W[i, j] = (code[i, j] − zero[i, g(j)]) · step[i, g(j)] + bias[i, g(j)]

or level(code[i, j]) · step[i, g(j)], each operation rounded to float32. A weight of more than two axes is a stack: its
matrices lie below each other in the file, and a row of the `CodedWeight` is one matrix, flattened.

Codes fill bytes without gaps, least significant bit first; a word is its bytes in little-endian order.
bitsandbytes alone has the high nibble first.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from math import prod
from typing import Any, NamedTuple, final

import ml_dtypes
import numpy as np
from numpy.typing import NDArray

from loralens.core.lazy import Array, LazyArray, Recent
from loralens.core.weights import CodedWeight, Codes, GridRows
from loralens.errors import FormatError
from loralens.linalg.exact import Singles

Tensors = Mapping[str, LazyArray]
Config = Mapping[str, Any]
Shape = tuple[int, ...]
Bytes = NDArray[np.uint8]

AGAIN = "download the model again, or give the 16-bit model it was made from"
SIBLING = "give the 16-bit model it was made from"
FLOATS: frozenset[np.dtype[Any]] = frozenset(map(np.dtype, (np.float16, ml_dtypes.bfloat16, np.float32)))
WORDS: frozenset[np.dtype[Any]] = frozenset(map(np.dtype, (np.int32, np.uint32)))
INDICES: frozenset[np.dtype[Any]] = frozenset(map(np.dtype, (np.int32, np.int64)))
BYTES = frozenset({np.dtype(np.uint8)})
# Sizes from here on overflow in NumPy, and no tensor has them.
MOST = 1 << 48


# ---- Stored tensors


class Source(NamedTuple):
    """The stored tensors and the configuration of a checkpoint, and the packed matrices that were read last."""

    stored: Tensors
    config: Config
    recent: Recent

    def part(self, key: str, dtypes: Collection[np.dtype[Any]], shape: Shape | None = None) -> LazyArray:
        """A stored tensor of one of these dtypes, and of this shape if one is given; a FormatError if there is none."""
        tensor = self.stored.get(key)
        if tensor is None:
            raise FormatError(f"{key} is missing", fix=AGAIN)
        if tensor.dtype not in dtypes:
            names = " or ".join(sorted(map(str, dtypes)))
            raise FormatError(f"{key} is {tensor.dtype}, where this layout has {names}", fix=AGAIN)
        if shape is not None and tensor.shape != shape:
            raise FormatError(f"{key} has the shape {tensor.shape}, where its weight needs {shape}", fix=AGAIN)
        return tensor

    def optional(self, key: str, dtypes: Collection[np.dtype[Any]], shape: Shape) -> LazyArray | None:
        """`part`, or None if there is no such tensor."""
        return self.part(key, dtypes, shape) if key in self.stored else None

    def there(self, *keys: str) -> tuple[str, ...]:
        """Those of the keys that the checkpoint has."""
        return tuple(key for key in keys if key in self.stored)

    def section(self, name: str = "quantization_config") -> Config:
        """A section of ``config.json``; empty if it has none."""
        value = self.config.get(name)
        return value if isinstance(value, dict) else {}


def whole_number(value: object) -> int | None:
    """``value`` if it is a whole number above 0 and of sensible size, else None; files may state anything."""
    return value if type(value) is int and 0 < value < MOST else None


# ---- Codes in bytes


def unpack_codes(data: Bytes, bits: int, count: int) -> Bytes:
    """The first ``count`` codes of 1 to 8 bits of every row of bytes (…, bytes), which holds at least as many."""
    if 8 % bits == 0:
        shifts = np.arange(0, 8, bits, dtype=np.uint8)
        codes: Bytes = (data[..., None] >> shifts) & np.uint8((1 << bits) - 1)
        return np.asarray(codes.reshape(*data.shape[:-1], data.shape[-1] * (8 // bits))[..., :count])
    flags = np.unpackbits(data, axis=-1, count=count * bits, bitorder="little")
    return np.packbits(flags.reshape(*data.shape[:-1], count, bits), axis=-1, bitorder="little")[..., 0]


def pack_codes(codes: Array, bits: int, size: int) -> Bytes:
    """The inverse of `unpack_codes`: ``size`` bytes for every row of codes; bits without a code are 0."""
    flags = np.unpackbits(codes.astype(np.uint8)[..., None], axis=-1, count=bits, bitorder="little")
    filled = np.packbits(flags.reshape(*codes.shape[:-1], -1), axis=-1, bitorder="little")
    packed = np.zeros((*codes.shape[:-1], size), np.uint8)
    packed[..., : filled.shape[-1]] = filled
    return packed


def bytes_of(array: Array) -> Bytes:
    """The bytes of an array; those of its last axis stay together."""
    return np.ascontiguousarray(array).view(np.uint8)


def stored_bytes(tensor: LazyArray, start: int, stop: int) -> Bytes:
    """Bytes ``start`` to ``stop`` of a stored tensor, read without the others."""
    size = tensor.dtype.itemsize
    first = start // size
    data = bytes_of(tensor.reshape(tensor.size).rows(first, -(-stop // size)).read())
    return data[start - first * size : stop - first * size]


# ---- Weights


@final
@dataclass(frozen=True, slots=True)
class Levels:
    """A table of levels (float32), in the order of the stored codes."""

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
    """The group of every column; ``size`` is that of each if all have the same and their columns are neighbours."""

    of_column: NDArray[np.intp]
    size: int = 0

    @classmethod
    def of_size(cls, columns: int, size: int) -> "Groups":
        """Groups of neighbours; the last one may be smaller."""
        return cls(np.arange(columns, dtype=np.intp) // size, 0 if columns % size else size)

    @classmethod
    def stated(cls, indices: LazyArray, plain: "Groups", count: int, name: str) -> "Groups":
        """The groups that a stored tensor states for every column; a FormatError if it names others than ``count``."""
        of_column = indices.read().astype(np.intp)
        if of_column.size and not 0 <= of_column.min() <= of_column.max() < count:
            raise FormatError(f"its {name} has group numbers outside 0 to {count - 1}", fix=AGAIN)
        return plain if np.array_equal(of_column, plain.of_column) else cls(of_column)

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


@dataclass(frozen=True, kw_only=True)
class GroupedWeight(ABC):
    """A weight in groups, in the order in which its layout stores it.

    Attributes
    ----------
    layout, shape
        As in `CodedWeight`.
    keys
        The keys of the stored tensors; that of the codes is the first.
    lowest, highest
        The range of the stored codes. Without meaning if there are levels.
    turned
        Whether the last two axes of ``shape`` are those of the stored matrices in the opposite order.
    by_rows
        Whether `pack` gives the bytes of rows, shape (rows, bytes per row); else it gets all rows, and gives the bytes
        of the whole tensor.
    share
        What the product of a level and a step is multiplied by.
    """

    layout: str
    shape: tuple[int, ...]
    keys: tuple[str, ...]
    lowest: int = 0
    highest: int = 15
    levels: Levels | None = None
    turned: bool = False
    by_rows: bool = True
    share: np.float32 | None = None

    @abstractmethod
    def block(self, start: int, stop: int) -> CodeBlock:
        """The content of some of the rows of all matrices."""

    @abstractmethod
    def groups(self) -> Groups:
        """The groups. Some layouts store them in a tensor, which is read in this call."""

    @abstractmethod
    def pack(self, first: int, codes: Array, /) -> Bytes:
        """The bytes of rows from ``first`` on, from their stored codes."""

    def coded(self, stored: Tensors) -> CodedWeight:
        """The weight of a checkpoint."""
        return CodedWeight(
            self.layout,
            self.shape,
            8 * sum(stored[key].nbytes for key in self.keys) / max(1, prod(self.shape)),
            self._decode,
            self.keys[0],
            grid=self._grid,
            encode=self._encode,
            by_rows=self.by_rows,
        )

    @property
    def matrix(self) -> tuple[int, int]:
        """Rows and columns of the stored matrices below one entry of the first axis."""
        inner = self.shape[1:]
        if self.turned:
            inner = (*inner[:-2], inner[-1], inner[-2])
        return prod(inner[:-1]), inner[-1]

    def _decode(self, start: int, stop: int) -> Singles:
        rows, columns = self.matrix
        block, groups = self.block(start * rows, stop * rows), self.groups()
        W = np.take(self.levels.stored, block.codes) if self.levels else block.codes.astype(np.float32)
        # A step of a damaged file may be infinite; what comes out is what the layout's own software gets.
        with np.errstate(invalid="ignore", over="ignore"):
            if block.zero is not None:
                groups.apply(np.subtract, W, block.zero)
            groups.apply(np.multiply, W, block.step)
            if self.share:
                W *= self.share
            if block.bias is not None:
                groups.apply(np.add, W, block.bias)
        return self._in_weight_order(W.reshape(stop - start, rows, columns)).reshape(stop - start, *self.shape[1:])

    def _in_weight_order(self, entries: Array) -> Array:
        """Stored matrices, of shape (count, rows, columns), in the order of the weight."""
        return np.ascontiguousarray(entries.swapaxes(1, 2)) if self.turned else entries

    def _grid(self, start: int, stop: int) -> GridRows:
        (rows, columns), count, levels = self.matrix, stop - start, self.levels
        block, groups = self.block(start * rows, stop * rows), self.groups()
        with np.errstate(invalid="ignore", over="ignore"):
            offset = block.bias if block.zero is None else -block.zero * block.step
            step = block.step * self.share if self.share else block.step
        codes = (np.take(levels.ranks, block.codes) if levels else block.codes).astype(np.int16, copy=False)
        step = step.reshape(count, rows * step.shape[1])
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
            lowest=self.lowest,
            highest=len(levels.stored) - 1 if levels else self.highest,
            levels=levels.stored[levels.order] if levels else None,
        )

    def _encode(self, first: int, codes: Codes) -> Bytes:
        rows, columns = self.matrix
        stored: Array = np.take(self.levels.order, codes) if self.levels else codes
        if self.turned:
            stored = stored.reshape(len(codes), columns, rows).swapaxes(1, 2)
        packed = self.pack(first * rows, stored.reshape(len(codes) * rows, columns))
        return packed.reshape(len(codes), rows * packed.shape[1]) if self.by_rows else packed
