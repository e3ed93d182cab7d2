"""Packing of integers of a few bits into bytes.

The integers of one line form a stream of bits. Integer j takes bits j·b to j·b + b − 1, in two's complement, least
significant bit first, and bit t of the stream is bit t mod 8 of byte ⌊t/8⌋. Each line is padded with zeros to a whole
byte. So 8-bit integers are plain int8, 16-bit integers are little-endian int16, and of two 4-bit integers the first is
the low half of the byte.
"""

from typing import Any

import numpy as np
from numpy.typing import NDArray

Bytes = NDArray[np.uint8]
Numbers = NDArray[np.int16]

# One bit leaves no symmetric range besides 0, and numbers are int16 in memory.
FEWEST, MOST = 2, 16  # bits of one number


def packed_length(count: int, bits: int) -> int:
    """Number of bytes of a packed line of ``count`` integers: ⌈count·bits/8⌉."""
    return -(-count * bits // 8)


def pack(lines: NDArray[Any], bits: int) -> Bytes:
    """Pack lines of integers into bytes.

    Parameters
    ----------
    lines : integer array, shape (lines, count)
        In [−2^(bits−1), 2^(bits−1) − 1].
    bits : int
        2 to 16.

    Returns
    -------
    uint8 array, shape (lines, ⌈count·bits/8⌉)
    """
    little = np.ascontiguousarray(lines, "<i2")
    # The two usual widths are plain NumPy dtypes and need no shuffling of bits.
    if bits == 16:
        return little.view(np.uint8)
    if bits == 8:
        return little.astype(np.int8).view(np.uint8)
    if bits < 8:
        return _pack_words(little, bits)
    stream = np.unpackbits(little.view(np.uint8), axis=1, bitorder="little")
    low_bits = stream.reshape(*little.shape, 16)[:, :, :bits]
    return np.packbits(low_bits.reshape(len(little), little.shape[1] * bits), axis=1, bitorder="little")


def unpack(packed: Bytes, bits: int, count: int) -> Numbers:
    """Unpack the integers that `pack` packed.

    Parameters
    ----------
    packed : uint8 array, shape (lines, ⌈count·bits/8⌉)
    bits, count : int
        Bits of an integer, integers of a line.

    Returns
    -------
    int16 array, shape (lines, count)
    """
    packed = np.ascontiguousarray(packed)
    if bits == 16:
        return packed.view("<i2").astype(np.int16, copy=False)
    if bits == 8:
        return packed.view(np.int8).astype(np.int16)
    if bits < 8:
        return _unpack_words(packed, bits, count)
    stream = np.unpackbits(packed, axis=1, count=count * bits, bitorder="little").reshape(len(packed), count, bits)
    wide = np.empty((len(packed), count, 16), np.uint8)
    wide[:, :, :bits] = stream
    wide[:, :, bits:] = stream[:, :, -1:]  # sign extension: all higher bits repeat the sign bit
    return np.packbits(wide, axis=2, bitorder="little").view("<i2")[:, :, 0].astype(np.int16, copy=False)


def _pack_words(lines: NDArray[Any], bits: int) -> Bytes:
    """`pack` for fewer than 8 bits: eight integers take ``bits`` whole bytes, which fit into one 64-bit word."""
    count, words = lines.shape[1], -(-lines.shape[1] // 8)
    fields = np.zeros((len(lines), words * 8), "<u8")
    # Two's complement of so many bits: the higher bits of negative integers are cleared.
    fields[:, :count] = lines.astype(np.int64).view(np.uint64) & np.uint64(2**bits - 1)
    fields = fields.reshape(len(lines), words, 8) << _shifts(bits)
    packed = np.bitwise_or.reduce(fields, axis=2).astype("<u8")[:, :, None].view(np.uint8)[:, :, :bits]
    return np.ascontiguousarray(packed.reshape(len(lines), words * bits)[:, : packed_length(count, bits)])


def _unpack_words(packed: Bytes, bits: int, count: int) -> Numbers:
    """`unpack` for fewer than 8 bits, a word of eight integers at a time."""
    words, length = -(-count // 8), packed_length(count, bits)
    padded = np.zeros((len(packed), words * bits), np.uint8)
    padded[:, :length] = packed[:, :length]
    word_bytes = np.zeros((len(packed), words, 8), np.uint8)
    word_bytes[:, :, :bits] = padded.reshape(len(packed), words, bits)
    fields = (word_bytes.view("<u8") >> _shifts(bits)) & np.uint64(2**bits - 1)
    # The highest bit of a field is its sign.
    half = np.int16(2 ** (bits - 1))
    return ((fields.astype(np.int16) ^ half) - half).reshape(len(packed), words * 8)[:, :count]


def _shifts(bits: int) -> NDArray[np.uint64]:
    """The positions of eight integers in a word."""
    return np.arange(8, dtype=np.uint64) * np.uint64(bits)
