"""ggml's types with blocks of 32 numbers and one scale for each block: Q4_0, Q4_1, Q5_0, Q5_1 and Q8_0.

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
"""

import numpy as np

from loralens.formats.models.low_bit.gguf_block import BlockLayout, Blocks, Bytes, as_nibbles, half, low_and_high


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
