"""NF4: sixteen levels between −1 and 1, and a scale for every 64 numbers; quantised as bitsandbytes does it.

The levels are quantiles of the normal distribution (Dettmers et al. 2023, arXiv 2305.14314, appendix E).
"""

from collections.abc import Callable
from typing import NamedTuple, final

import numpy as np
from numpy.typing import NDArray

from loralens.linalg.exact import Singles

LEVELS: Singles = np.array(
    [-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635,
     -0.18477343022823334, -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725, 0.24611230194568634,
     0.33791524171829224, 0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0],
    np.float32,
)  # fmt: skip
BLOCK = 64  # numbers that share a scale
# bitsandbytes divides by at least this number, so that a block of zeros gets the level 0.
LEAST = np.float32(1e-38)


def quantise_nf4(numbers: Singles) -> tuple[NDArray[np.uint8], Singles]:
    """The codes of numbers in order, and the scales of their blocks of 64, bit for bit as bitsandbytes makes them.

    Parameters
    ----------
    numbers : float32 array
        In the order of the weight; only its last block may have fewer than 64.

    Returns
    -------
    codes : uint8 array, shape (numbers,)
    absmax : float32 array, shape (blocks,)
    """
    flat = np.ascontiguousarray(numbers, np.float32).reshape(-1)
    full = flat.size // BLOCK * BLOCK
    blocks, last_block = flat[:full].reshape(-1, BLOCK), flat[full:]
    absmax = np.abs(blocks).max(axis=1, initial=0.0)
    # Multiplied by the reciprocal, as bitsandbytes does it, because a quotient would be rounded differently.
    scaled = np.clip(blocks * (np.float32(1) / np.maximum(absmax, LEAST))[:, None], -1, 1).reshape(-1)
    if last_block.size:
        scale = np.maximum(np.abs(last_block).max(), LEAST)
        absmax, scaled = np.append(absmax, scale), np.append(scaled, np.clip(last_block / scale, -1, 1))
    between = (LEVELS[:-1] + LEVELS[1:]) / np.float32(2)
    # A number half between two levels gets the lower one.
    return np.searchsorted(between, scaled, side="left").astype(np.uint8), absmax.astype(np.float32)


def dequantise_nf4(codes: NDArray[np.uint8], absmax: Singles) -> Singles:
    """The numbers of codes in order, float32."""
    return np.asarray(LEVELS[codes] * np.repeat(absmax, BLOCK)[: codes.size])


GGML_BLOCK = 32  # numbers that share a scale

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
