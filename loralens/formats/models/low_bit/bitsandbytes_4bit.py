"""bitsandbytes NF4 and FP4: two codes in a byte, the first in the high nibble, flat over the weight.

    KEY                                     codes, (bytes, 1) of uint8 or of another dtype with the same bytes
    KEY.absmax                              the largest magnitude of every block of 64 numbers, or of another size
    KEY.quant_state.bitsandbytes__nf4       a JSON object as bytes: shape, blocksize and more
    KEY.quant_map                           the table of levels

Nested scales are codes themselves: absmax = nested_quant_map[code]·nested_absmax + offset, with a nested_absmax for
every 256 of them. bitsandbytes ignores the stored ``quant_map`` and takes its own tables; so do we.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from math import gcd, prod
from typing import Any, final

import numpy as np

from loralens.core.lazy import Array, LazyArray
from loralens.errors import FormatError, place
from loralens.formats.files.json_text import finite_number, parse_object
from loralens.formats.models.low_bit.grouped import CodeBlock, GroupedWeight, Groups, Levels
from loralens.formats.models.low_bit.packing import Bytes, stored_bytes
from loralens.formats.models.low_bit.parts import (
    AGAIN,
    FLOATS,
    CheckpointWeight,
    Config,
    Tensors,
    bits_of,
    part,
    whole_number,
)
from loralens.linalg.codes import LEVELS
from loralens.linalg.exact import Singles

STATE = ".quant_state.bitsandbytes__"
NF4 = Levels(LEVELS)
_FP4 = [0.0, 0.005208333333, 0.66666667, 1.0, 0.33333333, 0.5, 0.16666667, 0.25]
# Code 8 is a second zero, and like the first one it is +0.
FP4 = Levels(np.array([*_FP4, 0.0, *(-level for level in _FP4[1:])], np.float32))
TABLES = {"nf4": NF4, "fp4": FP4}
# dtypes of the codes (bnb_4bit_quant_storage)
STORAGE = FLOATS | {np.dtype(np.uint8), np.dtype(np.int8)}
BYTES = frozenset({np.dtype(np.uint8)})
SINGLE = 2.0**128  # the smallest power of two beyond the range of float32
STATE_LIMIT = 1 << 16  # bytes of a state; bitsandbytes writes about 200
MOST_AXES = 8  # more than any weight has
PARTS = ("absmax", "quant_map", "nested_absmax", "nested_quant_map")


@final
@dataclass(frozen=True, slots=True)
class Scales:
    """The scale of every block of a weight, as a checkpoint stores it.

    Attributes
    ----------
    absmax : LazyArray
        The scales, or their codes if they are nested.
    nested : LazyArray or None
        The scale that a block of scales shares.
    table : LazyArray or None
        The numbers that the codes of the scales stand for.
    block : int
        The number of scales that share a nested one.
    offset : float
        What is added to every nested scale.
    """

    absmax: LazyArray
    nested: LazyArray | None = None
    table: LazyArray | None = None
    block: int = 1
    offset: float = 0.0

    def read(self, start: int, stop: int) -> Singles:
        """The scales of blocks ``start`` to ``stop``."""
        stored = self.absmax.rows(start, stop).read()
        if self.nested is None or self.table is None:
            return stored.astype(np.float32)
        first = start // self.block
        outer = self.nested.rows(first, -(-stop // self.block)).read().astype(np.float32)
        product = self.table.read().astype(np.float32)[stored]
        with np.errstate(invalid="ignore", over="ignore"):
            product *= outer[np.arange(start, stop) // self.block - first]
            product += np.float32(self.offset)
        return product


def find_4bit(stored: Tensors, config: Config | None) -> Iterator[CheckpointWeight]:  # noqa: ARG001 - every layout has this form
    """All weights of NF4 and FP4.

    Raises
    ------
    FormatError
        The parts of a weight do not fit together.
    """
    for state_key in stored:
        key, mark, kind = state_key.rpartition(STATE)
        if mark and kind in TABLES:
            with place(key):
                yield _weight(stored, key, state_key, kind)


def _weight(stored: Tensors, key: str, state_key: str, kind: str) -> CheckpointWeight:
    state = _read_state(stored[state_key])
    shape, block = _shape(state.get("shape")), whole_number(state.get("blocksize"))
    if shape is None or block is None:
        raise FormatError("its quant_state has no shape, or no blocksize", fix=AGAIN)
    size, codes = prod(shape), part(stored, key, STORAGE)
    # A wider dtype pads the codes to whole items: no byte may be missing, and less than one item may be left over.
    if not 0 <= codes.nbytes - -(-size // 2) < codes.dtype.itemsize:
        raise FormatError(f"{codes.nbytes:,} bytes of codes do not fit the shape {shape} of its quant_state", fix=AGAIN)
    scales = _scales(stored, key, state, -(-size // block))
    keys = (key, state_key, *(name for end in PARTS if (name := f"{key}.{end}") in stored))
    # If a row is not a multiple of a block, a group is a part of a block, so that the groups of all rows are alike.
    width, group = shape[-1], gcd(shape[-1], block)
    # One byte may hold codes of two rows, and the last number of a wider dtype may have bytes after the last row.
    by_rows = width % 2 == 0 and codes.nbytes == size // 2
    weight = GroupedWeight(
        f"bitsandbytes {kind.upper()}",
        shape,
        bits_of(stored, keys, shape),
        key,
        block=partial(_block, codes, scales, width=width, group=group, block=block),
        groups=partial(Groups.of_size, width, group),
        pack=_pack if by_rows else partial(_pack_whole, codes),
        levels=TABLES[kind],
        by_rows=by_rows,
    )
    return CheckpointWeight(key, weight.weight(), keys)


def _read_state(tensor: LazyArray) -> dict[str, Any]:
    """The JSON object of a quant_state."""
    if tensor.dtype != np.uint8 or tensor.size > STATE_LIMIT:
        raise FormatError("its quant_state is not a short text", fix=AGAIN)
    return parse_object(tensor.read().tobytes(), "utf-8", what="its quant_state ", fix=AGAIN)


def _shape(value: object) -> tuple[int, ...] | None:
    axes = tuple(whole_number(n) for n in value) if isinstance(value, list) and 1 < len(value) <= MOST_AXES else (None,)
    return None if None in axes else axes  # type: ignore[return-value]


def _scales(stored: Tensors, key: str, state: dict[str, Any], blocks: int) -> Scales:
    nested_key = f"{key}.nested_absmax"
    if nested_key not in stored:
        return Scales(part(stored, f"{key}.absmax", FLOATS, (blocks,)))
    size, offset = whole_number(state.get("nested_blocksize")), finite_number(state.get("nested_offset"))
    if size is None or offset is None or not abs(offset) < SINGLE:
        raise FormatError("its quant_state has no nested_blocksize, or no nested_offset", fix=AGAIN)
    return Scales(
        part(stored, f"{key}.absmax", BYTES, (blocks,)),
        part(stored, nested_key, FLOATS, (-(-blocks // size),)),
        part(stored, f"{key}.nested_quant_map", FLOATS, (256,)),
        size,
        offset,
    )


def _block(codes: LazyArray, scales: Scales, start: int, stop: int, *, width: int, group: int, block: int) -> CodeBlock:
    """The codes and steps of rows of ``width`` numbers each."""
    first, last = start * width, stop * width
    data = stored_bytes(codes, first // 2, -(-last // 2))
    nibbles = np.stack((data >> 4, data & np.uint8(15)), axis=-1).reshape(2 * len(data))
    # Rows of odd width may begin or end within a byte.
    rows = nibbles[first % 2 :][: last - first].reshape(stop - start, width)
    places = np.arange(first, last, group) // block
    base = first // block
    read = scales.read(base, -(-last // block))
    return CodeBlock(rows, read[places - base].reshape(stop - start, width // group))


def _pack(first: int, stored: Array) -> Bytes:  # noqa: ARG001 - rows are alike
    """The bytes of some rows of even width."""
    pairs = stored.astype(np.uint8)
    return (pairs[:, ::2] << np.uint8(4)) | pairs[:, 1::2]


def _pack_whole(codes: LazyArray, first: int, stored: Array) -> Bytes:  # noqa: ARG001 - always all rows
    """The bytes of the whole stored tensor. Padding after the last code stays as it is."""
    flat: Bytes = stored.astype(np.uint8).reshape(-1)
    data = stored_bytes(codes, 0, codes.nbytes).copy()
    high, low = flat[::2] << np.uint8(4), flat[1::2]
    data[: high.size] = high | (data[: high.size] & np.uint8(15))
    data[: low.size] = high[: low.size] | low
    return data
