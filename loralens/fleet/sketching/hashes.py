"""The hash functions of sketches: random positions and signs that are the same on every machine."""

from collections.abc import Sequence
from functools import lru_cache
from hashlib import blake2b
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from loralens.linalg.rounding import Draws

# The version is part of every key: sketches of two versions must not be compared.
VERSION = "loralens-fleet-1"
# Those of small groups of modules are kept in the form in which they are used, 16 bytes for each index, and those of
# large ones in 3 bytes. A model of 32 blocks with 7 modules each, of which two are read together, needs 336 of them.
SMALL, SMALL_CACHED = 4096, 256  # indices of a small group, and how many hashes are kept: at most 16 MiB
LARGE, LARGE_CACHED = 16_384, 512  # the same for large ones: at most 24 MiB

Positions = NDArray[np.intp] | NDArray[np.uint16]
Signs = NDArray[np.float64] | NDArray[np.int8]


class BucketHash(NamedTuple):
    """A position and a sign for each index of one side of a module; ``most`` indices at most have the same position."""

    positions: Positions
    signs: Signs
    most: int


def bucket_hash(key: str, side: str, size: int, width: int) -> BucketHash:
    """The hash of the indices 0 … size−1 of a side of a module into ``width`` buckets.

    Parameters
    ----------
    key : str
        The key of the module.
    side : str
        ``out``, ``in`` or ``start``.
    size : int
    width : int
        A power of two up to 4096.
    """
    positions, signs, most = bucket_hashes([key], side, size, width)
    return BucketHash(positions[0], signs[0], most)


def bucket_hashes(keys: Sequence[str], side: str, size: int, width: int) -> BucketHash:
    """The hashes of several modules as rows; ``most`` is the largest of all."""
    numbers = len(keys) * size
    draw = _small_hashes if numbers <= SMALL else _large_hashes if numbers <= LARGE else _draw_rows
    return draw(tuple(keys), side, size, width)


def _draw_rows(keys: tuple[str, ...], side: str, size: int, width: int) -> BucketHash:
    hashes = [_draw(key, side, size, width) for key in keys]
    positions, signs, most = zip(*hashes, strict=True)
    return BucketHash(np.stack(positions), np.stack(signs), max(most))


@lru_cache(maxsize=SMALL_CACHED)
def _small_hashes(keys: tuple[str, ...], side: str, size: int, width: int) -> BucketHash:
    positions, signs, most = _draw_rows(keys, side, size, width)
    return BucketHash(positions.astype(np.intp), signs.astype(np.float64), most)


def _draw(key: str, side: str, size: int, width: int) -> BucketHash:
    assert width <= 4096, width
    text = f"{VERSION}|{key}|{side}|{size}"
    digest = blake2b(text.encode("utf-8", "backslashreplace"), digest_size=16).digest()
    # 12 bits of each number are the position and one is the sign.
    numbers = Draws(int.from_bytes(digest, "little")).words(0, size)
    signs = (1 - 2 * ((numbers >> 12) & 1).astype(np.int8)).astype(np.int8)
    positions = (numbers % width).astype(np.uint16)
    return BucketHash(positions, signs, int(np.bincount(positions).max(initial=0)))


_large_hashes = lru_cache(maxsize=LARGE_CACHED)(_draw_rows)
