"""The start sketch: which random numbers A began from.

A stays near its start in training, while B begins at zero. Two adapters whose A are alike in every module therefore
began from the same random numbers: they are checkpoints of one run, or runs with the same seed.
"""

from typing import final

import numpy as np

from loralens.core.lazy import Array
from loralens.fleet.sketching.hashes import bucket_hash
from loralens.fleet.sketching.sketches import START_WIDTH
from loralens.fleet.sketching.tensor_sketch import Floats

NUMBERS = 1024  # numbers of A that are used, from its first row on; they are more than enough to tell starts apart
BITS = 15  # bits to which they are rounded, so that the sum of their squares is an exact integer


@final
class StartSketch:
    """The sum of the count-sketches of the directions of A; every module counts alike."""

    def __init__(self) -> None:
        self.total: Floats = np.zeros(START_WIDTH)

    def add(self, key: str, A: Array) -> None:
        """Add the first numbers of the factor A of the module with this key."""
        rows = -(-NUMBERS // max(1, A.shape[1]))
        numbers = A[:rows].ravel()[:NUMBERS].astype(np.float64)
        largest = float(np.abs(numbers).max(initial=0))
        # NaN is refused elsewhere.
        if not (0 < largest < np.inf):
            return
        # Integers, because the length of a vector of floats would depend on the order in which squares are added.
        whole = np.rint(np.ldexp(numbers, BITS - int(np.frexp(largest)[1]))).astype(np.int64)
        hashed = bucket_hash(key, "start", whole.size, START_WIDTH)
        sums = np.bincount(hashed.positions, whole * hashed.signs.astype(np.int64), START_WIDTH)
        self.total += sums / np.sqrt(float((whole * whole).sum()))
