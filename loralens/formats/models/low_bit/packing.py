"""Codes of a few bits in bytes, without gaps, least significant bit first; a word is its bytes in little-endian order.

Eight codes of b bits fill b bytes. GPTQ, compressed-tensors and MLX pack codes of 1 to 8 bits in this way, some of them
along columns. bitsandbytes alone has the high nibble first.
"""

from math import gcd

import numpy as np
from numpy.typing import NDArray

from loralens.core.lazy import Array, LazyArray

Bytes = NDArray[np.uint8]


def unpack_codes(data: Bytes, bits: int, count: int) -> Bytes:
    """The first ``count`` codes of every row of bytes, uint8.

    Parameters
    ----------
    data : uint8 array, shape (…, bytes)
        The bytes of a row hold at least ``count`` codes.
    bits : int
        1 to 8.
    """
    if bits == 8:
        return np.asarray(data[..., :count])
    if 8 % bits == 0:
        shifts = np.arange(0, 8, bits, dtype=np.uint8)
        codes: Bytes = (data[..., None] >> shifts) & np.uint8((1 << bits) - 1)
        return np.asarray(codes.reshape(*data.shape[:-1], data.shape[-1] * (8 // bits))[..., :count])
    # The shortest run of whole bytes with whole codes becomes one number.
    size, codes_per_run = _run(bits)
    runs = -(-data.shape[-1] // size)
    words = np.zeros((*data.shape[:-1], runs, 8), np.uint8)
    padded = np.zeros((*data.shape[:-1], runs * size), np.uint8)
    padded[..., : data.shape[-1]] = data
    words[..., :size] = padded.reshape(*data.shape[:-1], runs, size)
    places = np.arange(codes_per_run, dtype=np.uint64) * np.uint64(bits)
    wide = (words.view("<u8") >> places) & np.uint64((1 << bits) - 1)
    return np.asarray(wide.astype(np.uint8).reshape(*data.shape[:-1], runs * codes_per_run)[..., :count])


def pack_codes(codes: Array, bits: int, size: int) -> Bytes:
    """The inverse of `unpack_codes`: ``size`` bytes for every row of codes; bits without a code are 0."""
    if 8 % bits == 0:
        codes_per_run = 8 // bits
        narrow = np.zeros((*codes.shape[:-1], size * codes_per_run), np.uint8)
        narrow[..., : codes.shape[-1]] = codes
        shifts = np.arange(0, 8, bits, dtype=np.uint8)
        joined: Bytes = np.bitwise_or.reduce(narrow.reshape(*codes.shape[:-1], size, codes_per_run) << shifts, axis=-1)
        return joined
    run, codes_per_run = _run(bits)
    runs = -(-size // run)
    padded = np.zeros((*codes.shape[:-1], runs * codes_per_run), np.uint64)
    padded[..., : codes.shape[-1]] = codes
    places = np.arange(codes_per_run, dtype=np.uint64) * np.uint64(bits)
    # The bits of different codes do not overlap, so that their sum is their union.
    words = (padded.reshape(*codes.shape[:-1], runs, codes_per_run) << places).sum(axis=-1, dtype=np.uint64)
    data = words.astype("<u8")[..., None].view(np.uint8)[..., :run]
    return np.ascontiguousarray(data.reshape(*codes.shape[:-1], runs * run)[..., :size])


def _run(bits: int) -> tuple[int, int]:
    """The bytes and the codes of the shortest run that has whole numbers of both."""
    common = gcd(bits, 8)
    return bits // common, 8 // common


def bytes_of(array: Array) -> Bytes:
    """The bytes of an array; those of its last axis stay together."""
    return np.ascontiguousarray(array).view(np.uint8)


def stored_bytes(tensor: LazyArray, start: int, stop: int) -> Bytes:
    """Bytes ``start`` to ``stop`` of a stored tensor, read without the others."""
    size = tensor.dtype.itemsize
    first, last = start // size, -(-stop // size)
    data = bytes_of(tensor.reshape(tensor.size).rows(first, last).read())
    return data[start - first * size : stop - first * size]
