"""NF4: sixteen levels between −1 and 1, and a scale for every 64 numbers; quantised as bitsandbytes does it.

The levels are quantiles of the normal distribution (Dettmers et al. 2023, arXiv 2305.14314, appendix E).
"""

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
