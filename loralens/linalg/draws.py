"""Random numbers that belong to the entries of a matrix: the same on every machine, however the matrix is cut."""

from dataclasses import dataclass
from hashlib import sha256
from typing import Self, final

import numpy as np
from numpy.typing import NDArray

WORDS = 16  # numbers that one step of Philox's counter gives: 4 of 64 bits are 16 of 16
STEPS = 1 << 16  # values that a number can have

Words = NDArray[np.uint16]


@final
@dataclass(frozen=True, slots=True)
class Draws:
    """Whole numbers in [0, 2¹⁶), one for each entry of a matrix in the order of its rows: Philox 4×64.

    Attributes
    ----------
    key : int
        128 bits; two keys are two independent sequences.
    """

    key: int

    @classmethod
    def of(cls, seed: np.random.SeedSequence, index: int) -> Self:
        """The draws of matrix ``index`` under a seed."""
        state = seed.generate_state(4, np.uint64).astype("<u8").tobytes()
        return cls(int.from_bytes(sha256(state + index.to_bytes(8, "little")).digest()[:16], "little"))

    def words(self, offset: int, count: int) -> Words:
        """The numbers of the entries from ``offset`` on, uint16, shape (count,)."""
        first, skipped = divmod(offset, WORDS)
        engine = np.random.Philox(key=self.key, counter=first)
        raw = engine.random_raw(4 * -(-(skipped + count) // WORDS))
        return raw.astype("<u8", copy=False).view("<u2")[skipped : skipped + count]
