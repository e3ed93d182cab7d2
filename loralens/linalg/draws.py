"""Random numbers for the entries of a matrix that are the same on every machine and for every division into blocks."""

from dataclasses import dataclass
from hashlib import sha256
from typing import Self, final

import numpy as np
from numpy.typing import NDArray

WORDS = 16  # numbers per step of Philox's counter: four words of 64 bits are 16 numbers of 16 bits
STEPS = 1 << 16  # number of values that a number can have

Words = NDArray[np.uint16]


@final
@dataclass(frozen=True, slots=True)
class Draws:
    """Random integers in [0, 2¹⁶) from Philox 4×64, one for each entry of a matrix, row by row.

    Attributes
    ----------
    key : int
        128 bits. Two keys give two independent sequences.
    """

    key: int

    @classmethod
    def of(cls, seed: np.random.SeedSequence, index: int) -> Self:
        """The random integers of matrix number ``index`` under a seed."""
        # A hash of the seed's state and the index: independent for each matrix, with no state shared between them.
        state = seed.generate_state(4, np.uint64).astype("<u8").tobytes()
        return cls(int.from_bytes(sha256(state + index.to_bytes(8, "little")).digest()[:16], "little"))

    def words(self, offset: int, count: int) -> Words:
        """The integers of ``count`` entries from entry ``offset`` on, uint16, shape (count,)."""
        # Philox is counter based, so the numbers of any entry are computed without those before it.
        first, skipped = divmod(offset, WORDS)
        engine = np.random.Philox(key=self.key, counter=first)
        raw = engine.random_raw(4 * -(-(skipped + count) // WORDS))
        # Little-endian on every machine, so the same entry has the same number everywhere.
        return raw.astype("<u8", copy=False).view("<u2")[skipped : skipped + count]
