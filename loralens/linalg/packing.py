"""Whole numbers of a few bits, side by side in bytes.

The numbers of one line are a stream of bits: number j takes bits j·b to j·b + b − 1, in two's complement, least
significant bit first, and bit t of the stream is bit t mod 8 of byte ⌊t/8⌋. The line ends at a whole byte, filled up
with zeros. So 8 bits are plain int8, 16 bits little-endian int16, and of 4 bits the first number is the low half of a
byte.
"""

from typing import Any

import numpy as np
from numpy.typing import NDArray

Bytes = NDArray[np.uint8]
Numbers = NDArray[np.int16]

FEWEST, MOST = 2, 16  # bits of one number


def packed_length(count: int, bits: int) -> int:
    """Bytes that a line of ``count`` numbers takes: ⌈count·bits/8⌉."""
    return -(-count * bits // 8)


def pack(lines: NDArray[Any], bits: int) -> Bytes:
    """Lines of whole numbers as bytes.

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
    if bits == 16:
        return little.view(np.uint8)
    if bits == 8:
        return little.astype(np.int8).view(np.uint8)
    stream = np.unpackbits(little.view(np.uint8), axis=1, bitorder="little")
    kept = stream.reshape(*little.shape, 16)[:, :, :bits]
    return np.packbits(kept.reshape(len(little), little.shape[1] * bits), axis=1, bitorder="little")


def unpack(packed: Bytes, bits: int, count: int) -> Numbers:
    """The numbers that `pack` made ``packed`` of.

    Parameters
    ----------
    packed : uint8 array, shape (lines, ⌈count·bits/8⌉)
    bits, count : int
        Bits of a number, numbers of a line.

    Returns
    -------
    int16 array, shape (lines, count)
    """
    packed = np.ascontiguousarray(packed)
    if bits == 16:
        return packed.view("<i2").astype(np.int16, copy=False)
    if bits == 8:
        return packed.view(np.int8).astype(np.int16)
    stream = np.unpackbits(packed, axis=1, count=count * bits, bitorder="little").reshape(len(packed), count, bits)
    wide = np.empty((len(packed), count, 16), np.uint8)
    wide[:, :, :bits] = stream
    wide[:, :, bits:] = stream[:, :, -1:]  # the sign goes all the way up
    return np.packbits(wide, axis=2, bitorder="little").view("<i2")[:, :, 0].astype(np.int16, copy=False)
