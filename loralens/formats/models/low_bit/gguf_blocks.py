"""ggml's types whose numbers are stored in blocks of codes with scales; each is a `BlockLayout`.

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
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from loralens.formats.files.gguf_file import TENSOR_TYPES, TensorType
from loralens.linalg.exact import Singles

Bytes = NDArray[np.uint8]


class Blocks(NamedTuple):
    """The content of n blocks.

    Attributes
    ----------
    codes : uint8 array, shape (n, numbers of a block)
        Counted from 0: the code of a number minus ``lowest`` of the layout.
    step : float32 array, shape (n, groups of a block)
    offset : float32 array of the same shape, or None
        None stands for 0.
    """

    codes: Bytes
    step: Singles
    offset: Singles | None


@dataclass(frozen=True)
class BlockLayout:
    """A type of ggml: w = step · level(code) + offset, in the order of operations of ggml, in float32.

    Attributes
    ----------
    number
        ggml's number of the type.
    lowest, highest
        The range of the codes.
    groups
        The groups of a block; each has a step and an offset of its own.
    unpack
        Takes blocks (n, bytes of a block) and returns their content.
    pack
        Takes the same blocks and other codes, counted from 0, and returns the blocks with these codes. Scales stay.
    levels
        The level of every code, not decreasing; None: the level is the code.
    """

    number: int
    lowest: int
    highest: int
    groups: int
    unpack: Callable[[Bytes], Blocks]
    pack: Callable[[Bytes, Bytes], Bytes]
    levels: Singles | None = None

    @cached_property
    def type(self) -> TensorType:
        """The name, the numbers and the bytes of a block."""
        return TENSOR_TYPES[self.number]

    def decode(self, blocks: Bytes) -> Singles:
        """The numbers of blocks, shape (n, numbers of a block), bit for bit as ggml's own Python package."""
        # A damaged or odd file may hold an infinite scale, and inf · 0 is NaN in ggml as well.
        with np.errstate(invalid="ignore", over="ignore"):
            codes, step, offset = self.unpack(blocks)
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


def half(packed: Bytes) -> Singles:
    """The float16 of two bytes of each block as float32, shape (n, 1)."""
    return np.ascontiguousarray(packed).view(np.float16).astype(np.float32)


def low_and_high(packed: Bytes) -> Bytes:
    """The low nibbles of the bytes of each row, then their high nibbles."""
    return np.concatenate([packed & np.uint8(15), packed >> np.uint8(4)], axis=-1)


def as_nibbles(codes: Bytes) -> Bytes:
    """The inverse of `low_and_high`."""
    middle = codes.shape[-1] // 2
    return codes[..., :middle] | (codes[..., middle:] << np.uint8(4))


def planes(packed: Bytes, bits: int, count: int) -> Bytes:
    """Fields of ``bits`` bits of the bytes (…, k), lowest first: shape (…, count, k)."""
    shifts = np.arange(0, bits * count, bits, dtype=np.uint8)[:, None]
    return (packed[..., None, :] >> shifts) & np.uint8((1 << bits) - 1)


def from_planes(fields: Bytes, bits: int) -> Bytes:
    """The inverse of `planes`."""
    shifts = np.arange(0, bits * fields.shape[-2], bits, dtype=np.uint8)[:, None]
    packed: Bytes = np.bitwise_or.reduce(fields << shifts, axis=-2)
    return packed


def _unpack_q4_0(blocks: Bytes) -> Blocks:
    return Blocks(low_and_high(blocks[:, 2:]), half(blocks[:, :2]), None)


def _pack_q4_0(blocks: Bytes, codes: Bytes) -> Bytes:
    return np.concatenate([blocks[:, :2], as_nibbles(codes)], axis=1)


def _unpack_q4_1(blocks: Bytes) -> Blocks:
    return Blocks(low_and_high(blocks[:, 4:]), half(blocks[:, :2]), half(blocks[:, 2:4]))


def _pack_q4_1(blocks: Bytes, codes: Bytes) -> Bytes:
    return np.concatenate([blocks[:, :4], as_nibbles(codes)], axis=1)


def _fifth_bits(packed: Bytes) -> Bytes:
    """32 bits in 4 bytes, the lowest bit of the first byte first."""
    return np.unpackbits(packed, axis=1, bitorder="little")


def _unpack_q5_0(blocks: Bytes) -> Blocks:
    codes = low_and_high(blocks[:, 6:]) | (_fifth_bits(blocks[:, 2:6]) << np.uint8(4))
    return Blocks(codes, half(blocks[:, :2]), None)


def _pack_q5_0(blocks: Bytes, codes: Bytes) -> Bytes:
    bits = np.packbits(codes >> np.uint8(4), axis=1, bitorder="little")
    return np.concatenate([blocks[:, :2], bits, as_nibbles(codes & np.uint8(15))], axis=1)


def _unpack_q5_1(blocks: Bytes) -> Blocks:
    codes = low_and_high(blocks[:, 8:]) | (_fifth_bits(blocks[:, 4:8]) << np.uint8(4))
    return Blocks(codes, half(blocks[:, :2]), half(blocks[:, 2:4]))


def _pack_q5_1(blocks: Bytes, codes: Bytes) -> Bytes:
    bits = np.packbits(codes >> np.uint8(4), axis=1, bitorder="little")
    return np.concatenate([blocks[:, :4], bits, as_nibbles(codes & np.uint8(15))], axis=1)


# Flipping the highest bit of an int8 adds 128 to it, so −128 becomes the code 0.
def _unpack_q8_0(blocks: Bytes) -> Blocks:
    return Blocks(blocks[:, 2:] ^ np.uint8(0x80), half(blocks[:, :2]), None)


def _pack_q8_0(blocks: Bytes, codes: Bytes) -> Bytes:
    return np.concatenate([blocks[:, :2], codes ^ np.uint8(0x80)], axis=1)


Q4_0 = BlockLayout(2, -8, 7, 1, _unpack_q4_0, _pack_q4_0)
Q4_1 = BlockLayout(3, 0, 15, 1, _unpack_q4_1, _pack_q4_1)
Q5_0 = BlockLayout(6, -16, 15, 1, _unpack_q5_0, _pack_q5_0)
Q5_1 = BlockLayout(7, 0, 31, 1, _unpack_q5_1, _pack_q5_1)
Q8_0 = BlockLayout(8, -128, 127, 1, _unpack_q8_0, _pack_q8_0)


def _unpack_q2_k(blocks: Bytes) -> Blocks:
    scales = blocks[:, :16]
    codes = planes(blocks[:, 16:80].reshape(-1, 2, 32), 2, 4)
    step = half(blocks[:, 80:82]) * (scales & np.uint8(15)).astype(np.float32)
    minimum = half(blocks[:, 82:84]) * (scales >> np.uint8(4)).astype(np.float32)
    return Blocks(codes.reshape(-1, 256), step, -minimum)


def _pack_q2_k(blocks: Bytes, codes: Bytes) -> Bytes:
    packed = from_planes(codes.reshape(-1, 2, 4, 32), 2).reshape(-1, 64)
    return np.concatenate([blocks[:, :16], packed, blocks[:, 80:]], axis=1)


def _unpack_q3_k(blocks: Bytes) -> Blocks:
    high = planes(blocks[:, :32], 1, 8).reshape(-1, 256)
    low = planes(blocks[:, 32:96].reshape(-1, 2, 32), 2, 4).reshape(-1, 256)
    # The low 4 bits of 16 scales in 8 bytes, and their upper 2 bits in 4 bytes.
    scales = low_and_high(blocks[:, 96:104]) | (planes(blocks[:, 104:108], 2, 4).reshape(-1, 16) << np.uint8(4))
    step = half(blocks[:, 108:110]) * (scales.astype(np.float32) - np.float32(32))
    return Blocks(low | (high << np.uint8(2)), step, None)


def _pack_q3_k(blocks: Bytes, codes: Bytes) -> Bytes:
    high = from_planes((codes >> np.uint8(2)).reshape(-1, 8, 32), 1)
    low = from_planes((codes & np.uint8(3)).reshape(-1, 2, 4, 32), 2).reshape(-1, 64)
    return np.concatenate([high, low, blocks[:, 96:]], axis=1)


def _steps_and_minima(blocks: Bytes) -> tuple[Singles, Singles]:
    """The 8 steps and minima of Q4_K and Q5_K, from their first 16 bytes."""
    # 12 bytes follow d and dmin. The low 6 bits of bytes 0 to 3 are the first four scales, and those of bytes 4 to 7
    # the first four minima. The last four are divided. Their low 4 bits are in bytes 8 to 11, scales in low nibbles,
    # minima in high ones. Their upper 2 bits are the upper 2 bits of bytes 0 to 3 (scales) and 4 to 7 (minima).
    scale, minimum, low_bits = blocks[:, 4:8], blocks[:, 8:12], blocks[:, 12:16]
    scales = np.concatenate(
        [scale & np.uint8(63), (low_bits & np.uint8(15)) | ((scale >> np.uint8(6)) << np.uint8(4))], axis=1
    )
    minima = np.concatenate(
        [minimum & np.uint8(63), (low_bits >> np.uint8(4)) | ((minimum >> np.uint8(6)) << np.uint8(4))], axis=1
    )
    return half(blocks[:, :2]) * scales.astype(np.float32), half(blocks[:, 2:4]) * minima.astype(np.float32)


def _unpack_q4_k(blocks: Bytes) -> Blocks:
    step, minimum = _steps_and_minima(blocks)
    # Each 32 bytes hold two groups: the low nibbles one, the high nibbles the next.
    codes = low_and_high(blocks[:, 16:].reshape(-1, 4, 32))
    return Blocks(codes.reshape(-1, 256), step, -minimum)


def _pack_q4_k(blocks: Bytes, codes: Bytes) -> Bytes:
    return np.concatenate([blocks[:, :16], as_nibbles(codes.reshape(-1, 4, 64)).reshape(-1, 128)], axis=1)


def _unpack_q5_k(blocks: Bytes) -> Blocks:
    step, minimum = _steps_and_minima(blocks)
    # Bit j of byte i is the fifth bit of number i of group j.
    fifth = planes(blocks[:, 16:48], 1, 8).reshape(-1, 256)
    codes = low_and_high(blocks[:, 48:].reshape(-1, 4, 32)).reshape(-1, 256)
    return Blocks(codes | (fifth << np.uint8(4)), step, -minimum)


def _pack_q5_k(blocks: Bytes, codes: Bytes) -> Bytes:
    fifth = from_planes((codes >> np.uint8(4)).reshape(-1, 8, 32), 1)
    nibbles = as_nibbles((codes & np.uint8(15)).reshape(-1, 4, 64)).reshape(-1, 128)
    return np.concatenate([blocks[:, :16], fifth, nibbles], axis=1)


def _unpack_q6_k(blocks: Bytes) -> Blocks:
    # Two halves of 128 numbers. In each, 64 bytes hold the low 4 bits, two numbers in a byte, and 32 bytes hold the
    # upper 2 bits, four numbers in a byte.
    low = low_and_high(blocks[:, :128].reshape(-1, 2, 64)).reshape(-1, 256)
    upper = planes(blocks[:, 128:192].reshape(-1, 2, 32), 2, 4).reshape(-1, 256)
    step = half(blocks[:, 208:210]) * blocks[:, 192:208].view(np.int8).astype(np.float32)
    return Blocks(low | (upper << np.uint8(4)), step, None)


def _pack_q6_k(blocks: Bytes, codes: Bytes) -> Bytes:
    low = as_nibbles((codes & np.uint8(15)).reshape(-1, 2, 128)).reshape(-1, 128)
    upper = from_planes((codes >> np.uint8(4)).reshape(-1, 2, 4, 32), 2).reshape(-1, 64)
    return np.concatenate([low, upper, blocks[:, 192:]], axis=1)


Q2_K = BlockLayout(10, 0, 3, 16, _unpack_q2_k, _pack_q2_k)
Q3_K = BlockLayout(11, -4, 3, 16, _unpack_q3_k, _pack_q3_k)
Q4_K = BlockLayout(12, 0, 15, 8, _unpack_q4_k, _pack_q4_k)
Q5_K = BlockLayout(13, 0, 31, 8, _unpack_q5_k, _pack_q5_k)
Q6_K = BlockLayout(14, -32, 31, 16, _unpack_q6_k, _pack_q6_k)


_POSITIVE = np.array([0, 1, 2, 3, 4, 6, 8, 12], np.float32)
# Codes are counted by their level: 0 to 7 are the nibbles 15 to 8 (−12 … 0), and 8 to 15 the nibbles 0 to 7.
_LEVELS = np.concatenate([-_POSITIVE[:0:-1], [np.float32(0)], _POSITIVE]).astype(np.float32)


_CODES = np.concatenate([np.arange(8, 16), np.arange(7, -1, -1)]).astype(np.uint8)  # of every nibble
_NIBBLES = np.argsort(_CODES).astype(np.uint8)  # of every code


def _unpack(blocks: Bytes) -> Blocks:
    exponents = blocks[:, :1].astype(np.int32)
    return Blocks(_CODES[low_and_high(blocks[:, 1:])], np.ldexp(np.float32(1), exponents - 128), None)


def _pack(blocks: Bytes, codes: Bytes) -> Bytes:
    return np.concatenate([blocks[:, :1], as_nibbles(_NIBBLES[codes])], axis=1)


MXFP4 = BlockLayout(39, 0, 15, 1, _unpack, _pack, _LEVELS)
