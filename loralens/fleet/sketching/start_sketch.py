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
MOST_SHIFT = 1023  # exponent of the largest power of two; an A of numbers below 2⁻¹⁰⁰⁸ is rounded to fewer bits
WAITING = 1 << 14  # numbers that are sketched together, because each step takes longer to call than to do: 128 KiB


@final
class StartSketch:
    """The sum of the count-sketches of the directions of A, which `total` returns; every module counts alike."""

    def __init__(self) -> None:
        self._total: Floats = np.zeros(START_WIDTH)
        # Keys of modules and the first numbers of their A, as they were added.
        self._waiting: list[tuple[Sequence[str], Floats]] = []

    def add(self, keys: Sequence[str], A: Array) -> None:
        """Add the first numbers of the factors A of modules of one shape; A has the shape (modules, rank, in)."""
        numbers = A.reshape(len(keys), -1)[:, :NUMBERS].astype(np.float64)
        waiting = self._waiting
        if waiting and (
            numbers.shape[1] != waiting[0][1].shape[1] or sum(one.size for _, one in waiting) + numbers.size > WAITING
        ):
            self._sketch()
        self._waiting.append((keys, numbers))

    def _sketch(self) -> None:
        waiting, self._waiting = self._waiting, []
        if not waiting:
            return
        numbers = np.concatenate([numbers for _, numbers in waiting])
        largest = np.abs(numbers).max(axis=1, initial=0)
        # Integers, because the length of a vector of floats would depend on the order in which squares are added.
        shifts = np.minimum(BITS - np.frexp(largest)[1].astype(np.int32), MOST_SHIFT)
        numbers *= np.ldexp(1.0, shifts)[:, None]
        np.rint(numbers, out=numbers)
        lengths = np.sqrt(np.einsum("mn,mn->m", numbers, numbers))
        # An A of zeros has no direction.
        numbers /= np.where(lengths > 0, lengths, 1)[:, None]
        hashes = [bucket_hashes(keys, "start", numbers.shape[1], START_WIDTH) for keys, _ in waiting]
        numbers *= np.concatenate([hashed.signs for hashed in hashes])
        places = [hashed.positions.astype(np.intp, copy=False) + i * START_WIDTH for i, hashed in enumerate(hashes)]
        # bincount adds in the order of the numbers, so that the bits of the sums do not depend on the machine.
        sums = np.bincount(np.concatenate(places).ravel(), numbers.ravel(), len(waiting) * START_WIDTH)
        for one in sums.reshape(len(waiting), START_WIDTH):
            self._total += one

    def total(self) -> Floats:
        """The start sketch of all modules, shape (256,)."""
        self._sketch()
        return self._total
