"""ggml's types whose numbers are stored in blocks of codes with scales, and weights of GGUF files as coded weights.

ggml's types with blocks of 32 numbers and one scale for each block: Q4_0, Q4_1, Q5_0, Q5_1 and Q8_0.

======  =====  ==================================================================  ====================
type    bytes  content                                                             number
======  =====  ==================================================================  ====================
Q4_0    18     d float16, 16 bytes of nibbles                                      d · (q − 8)
Q4_1    20     d, m float16, 16 bytes of nibbles                                   d · q + m
Q5_0    22     d float16, 32 fifth bits, 16 bytes of nibbles                       d · (q − 16)
Q5_1    24     d, m float16, 32 fifth bits, 16 bytes of nibbles                    d · q + m
Q8_0    34     d float16, 32 int8                                                  d · q
======  =====  ==================================================================  ====================

The low nibbles are the first 16 numbers, the high ones the last 16 (ggml-quants.c of ggml).

ggml's k-quants, blocks of 256 numbers whose scales are quantised too: Q2_K, Q3_K, Q4_K, Q5_K and Q6_K.

======  =====  ===========================================================================  ========================
type    bytes  content                                                                      number
======  =====  ===========================================================================  ========================
Q2_K    84     16 × (scale, minimum) of 4 bits; 64 bytes of codes; d, dmin float16          d·s·q − dmin·m
Q3_K    110    32 bytes of third bits; 64 bytes of codes; 16 scales of 6 bits; d            d·(s − 32)·(q − 4)
Q4_K    144    d, dmin; 8 × (scale, minimum) of 6 bits; 128 bytes of nibbles                d·s·q − dmin·m
Q5_K    176    d, dmin; 8 × (scale, minimum); 32 bytes of fifth bits; 128 bytes of nibbles  d·s·q − dmin·m
Q6_K    210    128 bytes of low nibbles; 64 bytes of upper bits; 16 scales int8; d          d·s·(q − 32)
======  =====  ===========================================================================  ========================

A step d·s may be 0 or negative. The source is block_q2_K … block_q6_K in ggml-common.h of ggml.

ggml's MXFP4: 32 numbers of FP4 (E2M1) with one power of two.

A block has 17 bytes: the exponent e, then 16 bytes of nibbles, the low ones first. A number is 2^(e − 128) times twice
the value of its nibble: 0, 1, 2, 3, 4, 6, 8, 12, and the same with the sign bit set, where 0 stays +0.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from math import prod
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from loralens.core.lazy import LazyArray
from loralens.core.weights import CodedWeight, Codes, GridRows
from loralens.errors import FormatError
from loralens.formats.files.gguf_file import TENSOR_TYPES, TensorType
from loralens.linalg.exact import Singles

Bytes = NDArray[np.uint8]
Scales = tuple[Singles, Singles | None]  # the step and the offset of every group of n blocks, (n, groups); None: 0


class Bits(NamedTuple):
    """Bits of all codes of a block: bytes ``start`` to ``stop``, in ``rows`` rows.

    The lowest ``size`` bits of the bytes of a row belong to its first numbers, the next ones to the next numbers.
    """

    start: int
    stop: int
    size: int
    rows: int = 1

    @property
    def shifts(self) -> Bytes:
        """How far the bits of each part of a row are shifted in its bytes."""
        return np.arange(0, 8, self.size, dtype=np.uint8)[:, None]

    def unpack(self, blocks: Bytes) -> Bytes:
        """The bits of each number, shape (n, numbers of a block)."""
        packed = blocks[:, self.start : self.stop].reshape(len(blocks), self.rows, 1, -1)
        return ((packed >> self.shifts) & np.uint8((1 << self.size) - 1)).reshape(len(blocks), -1)

    def pack(self, numbers: Bytes) -> Bytes:
        """The bytes that `unpack` turns into these numbers; higher bits of the numbers do not count."""
        fields = (numbers & np.uint8((1 << self.size) - 1)).reshape(len(numbers), self.rows, 8 // self.size, -1)
        return np.asarray(np.bitwise_or.reduce(fields << self.shifts, axis=2).reshape(len(numbers), -1))


@dataclass(frozen=True)
class BlockLayout:
    """A type of ggml: w = step · level(code) + offset, in the order of operations of ggml, in float32.

    Attributes
    ----------
    number
        ggml's number of the type.
    lowest
        The lowest code. Codes are stored counted from 0.
    groups
        The groups of a block; each has a step and an offset of its own.
    scales
        The steps and offsets of blocks (n, bytes of a block).
    low, high
        Where the lower and the upper bits of the codes are.
    flip
        Bits of the stored codes that are inverted: the highest one of an int8, so that −128 becomes the code 0.
    codes
        The code of every stored code; None: the same.
    levels
        The level of every code, not decreasing; None: the level is the code.
    """

    number: int
    lowest: int
    groups: int
    scales: Callable[[Bytes], Scales]
    low: Bits
    high: Bits | None = None
    flip: int = 0
    codes: Bytes | None = None
    levels: Singles | None = None

    @property
    def type(self) -> TensorType:
        """The name, the numbers and the bytes of a block."""
        return TENSOR_TYPES[self.number]

    @property
    def highest(self) -> int:
        """The highest code."""
        return self.lowest + (1 << self.low.size + (self.high.size if self.high else 0)) - 1

    def unpack(self, blocks: Bytes) -> Bytes:
        """The codes of blocks, counted from 0, shape (n, numbers of a block)."""
        codes = self.low.unpack(blocks)
        if self.high:
            codes |= self.high.unpack(blocks) << np.uint8(self.low.size)
        if self.flip:
            codes ^= np.uint8(self.flip)
        return codes if self.codes is None else self.codes[codes]

    def pack(self, blocks: Bytes, codes: Bytes) -> Bytes:
        """The same blocks with other codes, counted from 0. Scales stay."""
        packed, stored = blocks.copy(), codes ^ np.uint8(self.flip)
        if self.codes is not None:
            stored = np.argsort(self.codes).astype(np.uint8)[codes]
        packed[:, self.low.start : self.low.stop] = self.low.pack(stored)
        if self.high:
            packed[:, self.high.start : self.high.stop] = self.high.pack(stored >> np.uint8(self.low.size))
        return packed

    def decode(self, blocks: Bytes) -> Singles:
        """The numbers of blocks, shape (n, numbers of a block), bit for bit as ggml's own Python package."""
        # A damaged or odd file may hold an infinite scale, and inf · 0 is NaN in ggml as well.
        with np.errstate(invalid="ignore", over="ignore"):
            codes, (step, offset) = self.unpack(blocks), self.scales(blocks)
            if self.levels is None:
                numbers = codes.astype(np.float32)
                numbers += np.float32(self.lowest)
            else:
                numbers = self.levels[codes]
            grouped = numbers.reshape(len(blocks), self.groups, -1)
            grouped *= step[..., None]
            # Subtracting a minimum, as ggml does, and adding its negative give the same bits.
            if offset is not None:
                grouped += offset[..., None]
        return grouped.reshape(len(blocks), -1)


def half(blocks: Bytes, start: int) -> Singles:
    """The float16 at a byte of each block as float32, shape (n, 1)."""
    return np.ascontiguousarray(blocks[:, start : start + 2]).view(np.float16).astype(np.float32)


def _step(blocks: Bytes) -> Scales:
    return half(blocks, 0), None


def _step_and_minimum(blocks: Bytes) -> Scales:
    return half(blocks, 0), half(blocks, 2)


def _scales_q2_k(blocks: Bytes) -> Scales:
    scales, minima = blocks[:, :16] & np.uint8(15), blocks[:, :16] >> np.uint8(4)
    return half(blocks, 80) * scales.astype(np.float32), -(half(blocks, 82) * minima.astype(np.float32))


def _scales_q3_k(blocks: Bytes) -> Scales:
    # The low 4 bits of 16 scales in 8 bytes, and their upper 2 bits in 4 bytes.
    scales = Bits(96, 104, 4).unpack(blocks) | (Bits(104, 108, 2).unpack(blocks) << np.uint8(4))
    return half(blocks, 108) * (scales.astype(np.float32) - np.float32(32)), None


def _scales_q4_k(blocks: Bytes) -> Scales:
    """The 8 steps and minima of Q4_K and Q5_K, from their first 16 bytes."""
    # 12 bytes follow d and dmin. The low 6 bits of bytes 0 to 3 are the first four scales, and those of bytes 4 to 7
    # the first four minima. The last four are divided. Their low 4 bits are in bytes 8 to 11, scales in low nibbles,
    # minima in high ones. Their upper 2 bits are the upper 2 bits of bytes 0 to 3 (scales) and 4 to 7 (minima).
    low_bits = blocks[:, 12:16]
    scales, minima = (
        np.concatenate([first & np.uint8(63), last | ((first >> np.uint8(6)) << np.uint8(4))], axis=1).astype(
            np.float32
        )
        for first, last in ((blocks[:, 4:8], low_bits & np.uint8(15)), (blocks[:, 8:12], low_bits >> np.uint8(4)))
    )
    return half(blocks, 0) * scales, -(half(blocks, 2) * minima)


def _scales_q6_k(blocks: Bytes) -> Scales:
    return half(blocks, 208) * blocks[:, 192:208].view(np.int8).astype(np.float32), None


def _powers(blocks: Bytes) -> Scales:
    return np.ldexp(np.float32(1), blocks[:, :1].astype(np.int32) - 128), None


_POSITIVE = np.array([0, 1, 2, 3, 4, 6, 8, 12], np.float32)
# Codes of MXFP4 are counted by their level: 0 to 7 are the nibbles 15 to 8 (−12 … 0), and 8 to 15 the nibbles 0 to 7.
_LEVELS = np.concatenate([-_POSITIVE[:0:-1], [np.float32(0)], _POSITIVE]).astype(np.float32)
_CODES = np.concatenate([np.arange(8, 16), np.arange(7, -1, -1)]).astype(np.uint8)

# by ggml's number of the type
LAYOUTS = {
    each.number: each
    for each in (
        BlockLayout(2, -8, 1, _step, Bits(2, 18, 4)),
        BlockLayout(3, 0, 1, _step_and_minimum, Bits(4, 20, 4)),
        BlockLayout(6, -16, 1, _step, Bits(6, 22, 4), Bits(2, 6, 1, rows=4)),
        BlockLayout(7, 0, 1, _step_and_minimum, Bits(8, 24, 4), Bits(4, 8, 1, rows=4)),
        BlockLayout(8, -128, 1, _step, Bits(2, 34, 8), flip=0x80),
        BlockLayout(10, 0, 16, _scales_q2_k, Bits(16, 80, 2, rows=2)),
        BlockLayout(11, -4, 16, _scales_q3_k, Bits(32, 96, 2, rows=2), Bits(0, 32, 1)),
        BlockLayout(12, 0, 8, _scales_q4_k, Bits(16, 144, 4, rows=4)),
        BlockLayout(13, 0, 8, _scales_q4_k, Bits(48, 176, 4, rows=4), Bits(16, 48, 1)),
        BlockLayout(14, -32, 16, _scales_q6_k, Bits(0, 128, 4, rows=2), Bits(128, 192, 2, rows=2)),
        BlockLayout(39, 0, 1, _powers, Bits(1, 17, 4), codes=_CODES, levels=_LEVELS),
    )
}


# Numbers that are decoded at a time: with all temporary arrays they take about 4 MiB, which fits the cache of a core.
AT_ONCE = 1 << 18

Order = NDArray[np.intp]


class StoredRows(NamedTuple):
    """Rows of blocks in a file, in the order of a weight.

    ``raw`` has the bytes of all rows of the stored tensor, (rows, bytes of a row), and ``order`` the position in
    ``raw`` of every row of the weight; None: they are the same.
    """

    raw: LazyArray
    order: Order | None = None

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

    Types without a layout here are left to the package ``gguf``, if it decodes them. ``number`` is ggml's number of the
    type, ``shape`` that of the weight, and ``name`` the stored tensor, for messages.
    """
    layout, width, inner = LAYOUTS.get(number), shape[-1], prod(shape[1:-1])

    def read(start: int, stop: int) -> Singles:
        numbers = np.empty(((stop - start) * inner, width), np.float32)
        step = max(1, AT_ONCE // width)
        for first in range(0, len(numbers), step):
            last = min(first + step, len(numbers))
            raw = rows.read(start * inner + first, start * inner + last)
            decoded = layout.decode(raw.reshape(-1, layout.type.nbytes)) if layout else _by_gguf(number, name, raw)
            numbers[first:last] = decoded.reshape(last - first, width)
        return numbers.reshape(stop - start, *shape[1:])

    return read


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


def _by_gguf(number: int, name: str, raw: Bytes) -> Singles:
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
            blocks = rows.read(start, stop).reshape(-1, type_.nbytes)
            codes, (step, offset) = layout.unpack(blocks), layout.scales(blocks)
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
    read = StoredRows(tensor, order).read
    return LazyArray(lambda: read(0, len(order)), shape=(len(order), *tensor.shape[1:]), dtype=tensor.dtype, rows=read)
