"""Random numbers for the entries of a matrix that are the same on every machine and for every division into blocks."""

from dataclasses import dataclass
from typing import Self, final

import numpy as np
from numpy.typing import NDArray

WORDS = 16  # numbers per step of Philox's counter: four words of 64 bits are 16 numbers of 16 bits
WIDE_WORDS = 8  # numbers of 32 bits per step of the counter
STEPS = 1 << 16  # number of values that a number of 16 bits can have
WIDE_STEPS = 1 << 32  # number of values that a number of 32 bits can have

Words = NDArray[np.uint16]
WideWords = NDArray[np.uint32]


@final
@dataclass(frozen=True, slots=True)
class Draws:
    """Random integers of 16 or 32 bits from Philox 4×64, one for each entry of a matrix, row by row.

    Attributes
    ----------
    key : int
        128 bits. Two keys give two independent sequences.
    """

    key: int

    @classmethod
    def of(cls, seed: "np.random.SeedSequence", index: int) -> Self:
        """The random integers of matrix number ``index`` under a seed."""
        from hashlib import sha256  # it loads OpenSSL, and merges that draw nothing import this module

        # A hash of the seed's state and the index: independent for each matrix, with no state shared between them.
        state = seed.generate_state(4, np.uint64).astype("<u8").tobytes()
        return cls(int.from_bytes(sha256(state + index.to_bytes(8, "little")).digest()[:16], "little"))

    @classmethod
    def named(cls, seed: int, name: str) -> Self:
        """The random integers of the matrix with this name under a seed."""
        from hashlib import sha256

        # A hash spreads seed and name over the 128 bits of a Philox key, so that matrices have independent numbers.
        return cls(int.from_bytes(sha256(f"{seed}:{name}".encode()).digest()[:16], "little"))

    def words(self, offset: int, count: int) -> Words:
        """The 16-bit integers of ``count`` entries, beginning with entry ``offset``; uint16, shape (count,)."""
        return self._raw(offset, count, WORDS).view("<u2")[offset % WORDS :][:count]

    def wide_words(self, offset: int, count: int) -> WideWords:
        """The 32-bit integers of ``count`` entries, beginning with entry ``offset``; uint32, shape (count,)."""
        return self._raw(offset, count, WIDE_WORDS).view("<u4")[offset % WIDE_WORDS :][:count]

    def _raw(self, offset: int, count: int, width: int) -> NDArray[np.uint64]:
        """The output of the counter for these entries. One step of the counter serves ``width`` entries."""
        # Philox is based on a counter, so the number of any entry is computed without those before it.
        first, skipped = divmod(offset, width)
        engine = np.random.Philox(key=self.key, counter=first)
        # Little-endian on every machine, so the same entry has the same number everywhere.
        return engine.random_raw(4 * -(-(skipped + count) // width)).astype("<u8", copy=False)
