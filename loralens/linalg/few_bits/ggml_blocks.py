"""ggml's types Q4_1 and Q8_0: blocks of 32 numbers, quantised bit for bit as ggml's own Python package does it."""

from collections.abc import Callable
from typing import NamedTuple, final

import numpy as np
from numpy.typing import NDArray

from loralens.linalg.exact import Singles

BLOCK = 32  # numbers that share a scale

Bytes = NDArray[np.uint8]


class QuantisedBlocks(NamedTuple):
    """Numbers after quantisation.

    Attributes
    ----------
    stored : uint8 array, shape (blocks, bytes of a block)
    numbers : float32 array, shape (blocks, 32)
        The numbers that the stored blocks stand for.
    """

    stored: Bytes
    numbers: Singles


@final
class BlockType(NamedTuple):
    """A type of ggml in which a merge can store new numbers.

    Attributes
    ----------
    name
    number
        ggml's number of the type.
    nbytes
        The bytes of a block.
    quantise
        Takes blocks of 32 numbers, float32, and quantises each.
    """

    name: str
    number: int
    nbytes: int
    quantise: Callable[[Singles], QuantisedBlocks]


def _quantise_q4_1(blocks: Singles) -> QuantisedBlocks:
    """Codes from 0 to 15 between the least and the largest number of a block: w = d·q + m."""
    least, largest = blocks.min(axis=1, keepdims=True), blocks.max(axis=1, keepdims=True)
    d = (largest - least) / np.float32(15)
    with np.errstate(invalid="ignore"):
        codes = np.trunc((blocks - least) * _inverse(d) + np.float32(0.5)).astype(np.uint8).clip(0, 15)
    # The low nibbles are the first 16 numbers of a block.
    packed = codes[:, :16] | (codes[:, 16:] << np.uint8(4))
    # Scales beyond float16 become infinite, as with ggml. The merge refuses them.
    with np.errstate(over="ignore", invalid="ignore"):
        step, offset = d.astype(np.float16), least.astype(np.float16)
        numbers = codes * step.astype(np.float32) + offset.astype(np.float32)
    return QuantisedBlocks(np.concatenate([step.view(np.uint8), offset.view(np.uint8), packed], axis=1), numbers)


def _quantise_q8_0(blocks: Singles) -> QuantisedBlocks:
    """Codes from −127 to 127: w = d·q."""
    d = np.abs(blocks).max(axis=1, keepdims=True) / np.float32(127)
    with np.errstate(invalid="ignore"):
        scaled = blocks * _inverse(d)
        # Halves are rounded away from 0, as C's roundf does; NumPy's own rounding goes to the even number.
        size = np.abs(scaled)
        floor = np.floor(size)
        codes = (np.sign(scaled) * (floor + np.floor(2 * (size - floor)))).astype(np.int8)
    with np.errstate(over="ignore", invalid="ignore"):  # as above
        step = d.astype(np.float16)
        numbers = codes * step.astype(np.float32)
    return QuantisedBlocks(np.concatenate([step.view(np.uint8), codes.view(np.uint8)], axis=1), numbers)


def _inverse(d: Singles) -> Singles:
    # The inverse of a tiny scale is infinite, and its product with 0 is NaN: ggml's package ignores that too.
    with np.errstate(over="ignore"):
        return np.divide(np.float32(1), d, out=np.zeros_like(d), where=d != 0)


Q4_1 = BlockType("Q4_1", 3, 20, _quantise_q4_1)
Q8_0 = BlockType("Q8_0", 8, 34, _quantise_q8_0)
BLOCK_TYPES = {each.number: each for each in (Q4_1, Q8_0)}
