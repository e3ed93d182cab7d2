"""What truncated factors have inside and outside of the directions of their module, noted while they are computed.

The error of a truncation needs it, and to compute it later would take another pass over the old factors. A factor that
is read back from a file counts as the one that was computed if its bytes have the same check sum.
"""

from typing import Literal, NamedTuple, final
from zlib import adler32

import numpy as np

from loralens.core.lazy import Array
from loralens.core.lowrank import LowRank
from loralens.linalg.difference import SplitFactor, singular_values_from_splits
from loralens.linalg.factor import Floats
from loralens.linalg.measures import spectral

Side = Literal["B", "A"]
SIDES: tuple[Side, Side] = ("B", "A")


class _Note(NamedTuple):
    """The split of a factor, and what the factor has to be for it to count."""

    check_sum: int
    scale: float  # of the module
    split: SplitFactor


@final
class FactorSplits:
    """The splits of the factors that were computed so far, by the name of their module."""

    def __init__(self) -> None:
        self._notes: dict[tuple[str, Side], _Note] = {}

    def note(self, name: str, side: Side, factor: Array, scale: float, split: SplitFactor) -> None:
        """Keep the split of a factor of a module with this scale."""
        self._notes[name, side] = _Note(_check_sum(factor), scale, split)

    def lost(self, name: str, s: Floats, after: LowRank) -> Floats | None:
        """Singular values of the difference of the module and ``after``, divided by the largest of ``s``.

        None if a factor of ``after`` is not the one that was noted. ``s`` are the singular values of the module.
        """
        B, A = (self._notes.get((name, side)) for side in SIDES)
        if B is None or A is None:
            return None
        for note, factor in ((B, after.B), (A, after.A)):
            # In another memory order, sums would be rounded differently in their last bit.
            if note.scale != after.scale or not factor.flags.c_contiguous or note.check_sum != _check_sum(factor):
                return None
        return singular_values_from_splits(s / safe_unit(s), B.split, A.split)


def safe_unit(s: Floats) -> float:
    """A unit in which no square of these singular values overflows or underflows."""
    return spectral(s) or 1.0


def _check_sum(factor: Array) -> int:
    return adler32(np.ascontiguousarray(factor).reshape(-1).view(np.uint8).data)
