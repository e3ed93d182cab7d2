"""The table of ggml's block types that are decoded here, and weights of GGUF files as coded weights."""

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from math import prod
from typing import Any

import numpy as np
from numpy.typing import NDArray

from loralens.core.lazy import LazyArray
from loralens.core.weights import CodedWeight, Codes, GridRows
from loralens.errors import FormatError
from loralens.formats.files.gguf_file import TENSOR_TYPES
from loralens.formats.models.low_bit.gguf_blocks import (
    MXFP4,
    Q2_K,
    Q3_K,
    Q4_0,
    Q4_1,
    Q4_K,
    Q5_0,
    Q5_1,
    Q5_K,
    Q6_K,
    Q8_0,
    BlockLayout,
    Bytes,
)
from loralens.linalg.exact import Singles

# by ggml's number of the type
LAYOUTS = {each.number: each for each in (Q4_0, Q4_1, Q5_0, Q5_1, Q8_0, Q2_K, Q3_K, Q4_K, Q5_K, Q6_K, MXFP4)}
# Numbers that are decoded at a time: with all temporary arrays they take about 4 MiB, which fits the cache of a core.
SLAB = 1 << 18

Order = NDArray[np.intp]


class StoredRows:
    """Rows of blocks in a file, in the order of a weight.

    Parameters
    ----------
    raw : LazyArray
        The bytes of all rows of the stored tensor, shape (rows, bytes of a row).
    order : intp array or None
        The position in ``raw`` of every row of the weight. None: they are the same.
    """

    __slots__ = ("order", "raw")

    def __init__(self, raw: LazyArray, order: Order | None = None) -> None:
        self.raw, self.order = raw, order

    def read(self, start: int, stop: int) -> Bytes:
        """The bytes of some rows of the weight. Rows between them in the file are read too: at most those of a head."""
        if self.order is None or start == stop:
            return self.raw.rows(start, stop).read()
        positions = self.order[start:stop]
        first = int(positions.min())
        span = self.raw.rows(first, int(positions.max()) + 1).read()
        return np.asarray(span[positions - first])


def row_decoder(rows: StoredRows, number: int, shape: tuple[int, ...], *, name: str) -> Callable[[int, int], Singles]:
    """A function that decodes entries of a tensor's first axis, each of which is one row of blocks or several.

    Types without a layout here are left to the package ``gguf``, if it decodes them.

    Parameters
    ----------
    rows : StoredRows
    number : int
        ggml's number of the type.
    shape : tuple of int
        The shape of the weight.
    name : str
        The stored tensor, for messages.
    """
    layout = LAYOUTS.get(number)
    decode = partial(_decode_blocks, layout) if layout else partial(_decode_by_gguf, number, name)
    width = shape[-1]
    inner = prod(shape[1:-1]) if len(shape) > 1 else 1

    def read(start: int, stop: int) -> Singles:
        numbers = np.empty(((stop - start) * inner, width), np.float32)
        step = max(1, SLAB // width)
        for first in range(0, len(numbers), step):
            last = min(first + step, len(numbers))
            numbers[first:last] = decode(rows.read(start * inner + first, start * inner + last))
        return numbers.reshape(stop - start, *shape[1:])

    return read


def _decode_blocks(layout: BlockLayout, raw: Bytes) -> Singles:
    return layout.decode(raw.reshape(-1, layout.type.nbytes)).reshape(len(raw), -1)


def can_decode(number: int) -> bool:
    """Whether the numbers of a type can be decoded, here or by the package ``gguf``."""
    if number in LAYOUTS:
        return True
    from gguf import GGMLQuantizationType, quants

    try:
        # The package has no list of the types that it decodes, so decoding one block of zeros is tried.
        quants.dequantize(np.zeros((1, TENSOR_TYPES[number].nbytes), np.uint8), GGMLQuantizationType(number))
    except (NotImplementedError, ValueError):
        return False
    return True


def _decode_by_gguf(number: int, name: str, raw: Bytes) -> Singles:
    # Imported here: the start of a command that needs no such type should not wait for it.
    from gguf import GGMLQuantizationType, quants

    if not can_decode(number):
        fix = "give the model in another quantisation, such as Q4_K_M or Q8_0"
        raise FormatError(f"{name} is stored as {TENSOR_TYPES[number].name}, which cannot be decoded here", fix=fix)
    with np.errstate(all="ignore"):
        numbers: Singles = np.asarray(quants.dequantize(raw, GGMLQuantizationType(number)), np.float32)
    return numbers


def coded_weight(rows: StoredRows, number: int, shape: tuple[int, int], *, stored: str) -> CodedWeight:
    """A matrix of a GGUF file with its grid; without a grid if its type has no layout here."""
    type_, width = TENSOR_TYPES[number], shape[1]
    weight = CodedWeight(
        layout=type_.name,
        shape=shape,
        bits=8 * type_.nbytes / type_.numbers,
        decode=row_decoder(rows, number, shape, name=stored),
        stored=stored,
        row_order=rows.order,
    )
    layout = LAYOUTS.get(number)
    if layout is None:
        return weight
    groups = width // type_.numbers * layout.groups
    group_of_column = np.repeat(np.arange(groups, dtype=np.intp), width // groups)

    def grid(start: int, stop: int) -> GridRows:
        # A damaged file may hold infinite scales, whose product with 0 is NaN.
        with np.errstate(invalid="ignore", over="ignore"):
            codes, step, offset = layout.unpack(rows.read(start, stop).reshape(-1, type_.nbytes))
        wide = codes.reshape(-1, width).astype(np.int16)
        wide += layout.lowest
        return GridRows(
            codes=wide,
            step=step.reshape(-1, groups),
            offset=None if offset is None else offset.reshape(-1, groups),
            group_of_column=group_of_column,
            lowest=layout.lowest,
            highest=layout.highest,
            levels=layout.levels,
        )

    def encode(first: int, codes: Codes) -> NDArray[np.uint8]:
        blocks = rows.read(first, first + len(codes)).reshape(-1, type_.nbytes)
        assert layout.lowest <= codes.min(initial=layout.lowest)
        assert codes.max(initial=layout.highest) <= layout.highest
        counted = (codes - layout.lowest).astype(np.uint8).reshape(-1, type_.numbers)
        return layout.pack(blocks, counted).reshape(len(codes), -1)

    return replace(weight, grid=grid, encode=encode)


def float_rows(tensor: LazyArray, order: Order) -> LazyArray:
    """A tensor of floats with its rows (of a vector: its numbers) in another order."""
    rows = StoredRows(tensor, order)

    def read(start: int, stop: int) -> NDArray[Any]:
        return rows.read(start, stop)

    return LazyArray(lambda: read(0, len(order)), shape=(len(order), *tensor.shape[1:]), dtype=tensor.dtype, rows=read)
