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
    stream = np.unpackbits(packed, axis=1, count=count * bits, bitorder="little").reshape(len(packed), count, bits)
    wide = np.empty((len(packed), count, 16), np.uint8)
    wide[:, :, :bits] = stream
    wide[:, :, bits:] = stream[:, :, -1:]  # sign extension: all higher bits repeat the sign bit
    return np.packbits(wide, axis=2, bitorder="little").view("<i2")[:, :, 0].astype(np.int16, copy=False)
