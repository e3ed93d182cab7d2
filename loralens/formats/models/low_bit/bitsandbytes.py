"""bitsandbytes: int8 (LLM.int8()), ``x.weight`` with ``x.SCB``, the largest magnitude of every row; and 4-bit codes.

NF4 and FP4: two codes in a byte, the first in the high nibble, flat over the weight.

    KEY                                     codes, (bytes, 1) of uint8 or of another dtype with the same bytes
    KEY.absmax                              the largest magnitude of every block of 64 numbers, or of another size
    KEY.quant_state.bitsandbytes__nf4       a JSON object as bytes: shape, blocksize and more
    KEY.quant_map                           the table of levels

Nested scales are codes themselves: absmax = nested_quant_map[code]·nested_absmax + offset, with a nested_absmax for
every 256 of them. bitsandbytes ignores the stored ``quant_map`` and takes its own tables; so do we.
"""

from dataclasses import dataclass
from math import gcd, prod
from typing import final

import numpy as np

from loralens.core.lazy import Array, LazyArray
from loralens.errors import FormatError
from loralens.formats.files.json_text import finite_number, parse_object
from loralens.formats.models.low_bit.grouped import (
    AGAIN,
    BYTES,
    FLOATS,
    Bytes,
    CodeBlock,
    GroupedWeight,
    Groups,
    Levels,
    Source,
    bytes_of,
    stored_bytes,
    whole_number,
)
from loralens.linalg.codes import LEVELS
from loralens.linalg.exact import Singles

STATE = ".quant_state.bitsandbytes__"

_FP4 = [0.0, 0.005208333333, 0.66666667, 1.0, 0.33333333, 0.5, 0.16666667, 0.25]
TABLES = {
    "nf4": Levels(LEVELS),
    # Code 8 is a second zero, and like the first one it is +0.
    "fp4": Levels(np.array([*_FP4, 0.0, *(-level for level in _FP4[1:])], np.float32)),
}
# dtypes of the codes (bnb_4bit_quant_storage)
STORAGE = FLOATS | {np.dtype(np.uint8), np.dtype(np.int8)}
INT8 = frozenset({np.dtype(np.int8)})
SHARE = np.float32(1 / 127)
SINGLE = 2.0**128  # the smallest power of two beyond the range of float32
STATE_LIMIT = 1 << 16  # bytes of a state; bitsandbytes writes about 200
MOST_AXES = 8  # more than any weight has
PARTS = ("absmax", "quant_map", "nested_absmax", "nested_quant_map")


@final
@dataclass(frozen=True, kw_only=True)
class _FourBit(GroupedWeight):
    """The scales may be codes of a table, with a nested scale for each ``nested_block`` of them, and an offset."""

    codes: LazyArray
    block_size: int
    absmax: LazyArray
    nested: LazyArray | None
    table: LazyArray | None
    nested_block: int
    offset: float

    @property
    def group_size(self) -> int:
        """If a row is not a multiple of a block, a group is a part of a block, so that the groups of rows are alike."""
        return gcd(self.shape[-1], self.block_size)

    def groups(self) -> Groups:
        return Groups.of_size(self.shape[-1], self.group_size)

    def _scales(self, start: int, stop: int) -> Singles:
        """The scales of blocks ``start`` to ``stop``."""
        stored = self.absmax.rows(start, stop).read()
        if self.nested is None or self.table is None:
            return stored.astype(np.float32)
        first = start // self.nested_block
        outer = self.nested.rows(first, -(-stop // self.nested_block)).read().astype(np.float32)
        product = self.table.read().astype(np.float32)[stored]
        with np.errstate(invalid="ignore", over="ignore"):
            product *= outer[np.arange(start, stop) // self.nested_block - first]
            product += np.float32(self.offset)
        return product

    def block(self, start: int, stop: int) -> CodeBlock:
        width = self.shape[-1]
        first, last = start * width, stop * width
        data = stored_bytes(self.codes, first // 2, -(-last // 2))
        nibbles = np.stack((data >> 4, data & np.uint8(15)), axis=-1).reshape(2 * len(data))
        # Rows of odd width may begin or end within a byte.
        rows = nibbles[first % 2 :][: last - first].reshape(stop - start, width)
        base = first // self.block_size
        scales = self._scales(base, -(-last // self.block_size))
        places = np.arange(first, last, self.group_size) // self.block_size - base
        return CodeBlock(rows, scales[places].reshape(stop - start, width // self.group_size))

    def pack(self, _: int, codes: Array, /) -> Bytes:
        flat: Bytes = codes.astype(np.uint8).reshape(-1)
        high, low = flat[::2] << np.uint8(4), flat[1::2]
        if self.by_rows:
            return (high | low).reshape(len(codes), -1)
        # Padding after the last code stays as it is.
        data = stored_bytes(self.codes, 0, self.codes.nbytes).copy()
        data[: high.size] = high | (data[: high.size] & np.uint8(15))
        data[: low.size] = high[: low.size] | low
        return data


def four_bit(source: Source, key: str, *, kind: str) -> GroupedWeight:
    """A weight of NF4 or FP4."""
    state_key = f"{key}{STATE}{kind}"
    tensor = source.stored[state_key]
    if tensor.dtype != np.uint8 or tensor.size > STATE_LIMIT:
        raise FormatError("its quant_state is not a short text", fix=AGAIN)
    state = parse_object(tensor.read().tobytes(), "utf-8", what="its quant_state ", fix=AGAIN)
    stated, block = state.get("shape"), whole_number(state.get("blocksize"))
    axes = stated if isinstance(stated, list) and 1 < len(stated) <= MOST_AXES else [None]
    shape = tuple(filter(whole_number, axes))
    if len(shape) != len(axes) or block is None:
        raise FormatError("its quant_state has no shape, or no blocksize", fix=AGAIN)
    size, codes = prod(shape), source.part(key, STORAGE)
    # A wider dtype pads the codes to whole items: no byte may be missing, and less than one item may be left over.
    if not 0 <= codes.nbytes - -(-size // 2) < codes.dtype.itemsize:
        raise FormatError(f"{codes.nbytes:,} bytes of codes do not fit the shape {shape} of its quant_state", fix=AGAIN)
    blocks, nested_block, offset = -(-size // block), whole_number(state.get("nested_blocksize")), 0.0
    nested = table = None
    if f"{key}.nested_absmax" in source.stored:
        stated = finite_number(state.get("nested_offset"))
        if nested_block is None or stated is None or not abs(stated) < SINGLE:
            raise FormatError("its quant_state has no nested_blocksize, or no nested_offset", fix=AGAIN)
        nested = source.part(f"{key}.nested_absmax", FLOATS, (-(-blocks // nested_block),))
        table, offset = source.part(f"{key}.nested_quant_map", FLOATS, (256,)), stated
    return _FourBit(
        layout=f"bitsandbytes {kind.upper()}",
        shape=shape,
        keys=(key, state_key, *source.there(*(f"{key}.{end}" for end in PARTS))),
        levels=TABLES[kind],
        # One byte may hold codes of two rows, and the last number of a wider dtype may have bytes after the last row.
        by_rows=shape[-1] % 2 == 0 and codes.nbytes == size // 2,
        codes=codes,
        block_size=block,
        absmax=source.part(f"{key}.absmax", FLOATS if nested is None else BYTES, (blocks,)),
        nested=nested,
        table=table,
        nested_block=nested_block or 1,
        offset=offset,
    )


@final
@dataclass(frozen=True, kw_only=True)
class _Int8(GroupedWeight):
    codes: LazyArray
    scales: LazyArray

    def block(self, start: int, stop: int) -> CodeBlock:
        step = self.scales.rows(start, stop).read().astype(np.float32)
        return CodeBlock(self.codes.rows(start, stop).read(), step[:, None])

    def groups(self) -> Groups:
        return Groups.of_size(self.shape[1], self.shape[1])

    def pack(self, _: int, codes: Array, /) -> Bytes:
        return bytes_of(codes.astype(np.int8))


def int8(source: Source, module: str) -> GroupedWeight:
    """An int8 weight with the scales of bitsandbytes: W = code · SCB · (1/127), multiplied in this order."""
    key, scale_key = f"{module}.weight", f"{module}.SCB"
    codes, stated = source.part(key, INT8), source.stored[scale_key].shape
    if codes.ndim != 2:
        raise FormatError(f"its codes have the shape {codes.shape}, not that of a matrix", fix=AGAIN)
    # A vector of scales; older files have an axis of length 1 in front.
    scales = source.part(scale_key, FLOATS, (*stated[:-1], codes.shape[0]))
    return _Int8(
        layout="bitsandbytes int8",
        shape=codes.shape,
        keys=(key, scale_key, *source.there(f"{module}.weight_format")),
        lowest=-128,
        highest=127,
        share=SHARE,
        codes=codes,
        scales=scales.reshape(scales.size),
    )
