"""The start sketch: which random numbers A began from.

A stays near its start in training, while B begins at zero. Two adapters whose A are alike in every module therefore
began from the same random numbers: they are checkpoints of one run, or runs with the same seed.
"""

from collections.abc import Sequence
from typing import final

import numpy as np

from loralens.core.lazy import Array
from loralens.fleet.sketching.hashes import bucket_hashes
from loralens.fleet.sketching.sketches import START_WIDTH
from loralens.fleet.sketching.tensor_sketch import Floats

NUMBERS = 1024  # numbers of A that are used, from its first row on; they are more than enough to tell starts apart
BITS = 15  # bits to which they are rounded, so that the sum of their squares is an exact integer


@final
class StartSketch:
    """The sum of the count-sketches of the directions of A; every module counts alike."""

    def __init__(self) -> None:
        self.total: Floats = np.zeros(START_WIDTH)

    def add(self, keys: Sequence[str], A: Array) -> None:
        """Add the first numbers of the factors A of modules of one shape; A has the shape (modules, rank, in)."""
        numbers = A.reshape(len(keys), -1)[:, :NUMBERS].astype(np.float64)
        largest = np.abs(numbers).max(axis=1, initial=0)
        # Integers, because the length of a vector of floats would depend on the order in which squares are added.
        shifts = BITS - np.frexp(largest)[1].astype(np.int32)
        integers = np.rint(numbers * np.ldexp(1.0, shifts)[:, None])
        lengths = np.sqrt((integers * integers).sum(axis=1))
        # An A of zeros has no direction.
        directions = integers / np.where(lengths > 0, lengths, 1)[:, None]
        hashed = bucket_hashes(keys, "start", numbers.shape[1], START_WIDTH)
        directions *= hashed.signs
        # bincount adds in the order of the numbers, so that the bits of the sums do not depend on the machine.
        self.total += np.bincount(hashed.positions.ravel(), directions.ravel(), START_WIDTH)
