"""The entries in which a weight differs from what subtracting an update gives, in memory.

An entry takes two bytes: its place within 256 numbers, and a difference of bits. Each 256 numbers have a count of
entries. That is quick, and little as long as few entries differ. If many differ, a patch as in an undo file takes half
as much or less.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, final

import numpy as np
from numpy.typing import NDArray

from loralens.linalg.order_statistics import few_true

GROUP = 256  # numbers: the place of an entry among them is one byte
# As in undo files, the range without it is symmetric.
ESCAPE = -128  # the difference that means: the bits of W follow


@final
@dataclass(frozen=True, slots=True)
class FewEntries:
    """The entries of W that differ from R, in order.

    Attributes
    ----------
    counts : uint16 array
        The number of entries in each group of 256 numbers.
    places : uint8 array
        Where the entries are in their groups.
    steps : int8 array
        The bits of W minus those of R, as integers, or `ESCAPE`.
    numbers : array of unsigned integers
        The bits of W where the step is `ESCAPE`.
    """

    counts: NDArray[np.uint16]
    places: NDArray[np.uint8]
    steps: NDArray[np.int8]
    numbers: NDArray[Any]

    @property
    def nbytes(self) -> int:
        """Bytes of all arrays."""
        return self.counts.nbytes + self.places.nbytes + self.steps.nbytes + self.numbers.nbytes


@final
class EntryReader:
    """Restores any numbers of W from those of R."""

    __slots__ = ("_entries", "_escaped", "_starts")

    def __init__(self, entries: FewEntries) -> None:
        self._entries = entries
        # The first entry of each group, and the number of all entries.
        self._starts = np.zeros(entries.counts.size + 1, np.int64)
        np.cumsum(entries.counts, out=self._starts[1:])
        self._escaped = np.flatnonzero(entries.steps == ESCAPE)

    def correct(self, r: NDArray[Any], first: int) -> None:
        """Change the `bits` of some numbers of R to those of W, in place; ``first`` is the place of the first one."""
        entries, last = self._entries, first + r.size
        start, stop = self._entries_before(first), self._entries_before(last)
        # The first and the last group may lie partly outside.
        groups = np.arange(first // GROUP, _groups(last))
        bounds = self._starts[groups[0] : groups[-1] + 2].clip(start, stop)
        places = np.repeat(groups * GROUP - first, bounds[1:] - bounds[:-1])
        places += entries.places[start:stop]
        # Unsigned integers wrap around, as they did in the comparison.
        r[places] += entries.steps[start:stop].astype(r.dtype)
        if self._escaped.size:
            escaped = slice(*np.searchsorted(self._escaped, (start, stop)))
            r[places[self._escaped[escaped] - start]] = entries.numbers[escaped]

    def _entries_before(self, number: int) -> int:
        """How many entries lie before a number."""
        group, place = divmod(number, GROUP)
        before = int(self._starts[group])
        if not place:
            return before
        return before + int(np.searchsorted(self._entries.places[before : self._starts[group + 1]], place))


Found = tuple[NDArray[np.int64], NDArray[Any], NDArray[Any]]  # places, and the bits of W and of R there


def find_entries(w: NDArray[Any], r: NDArray[Any], first: int) -> Found:
    """Where the `bits` of W and R differ, since as numbers −0 equals 0; ``first`` is the place of the first number."""
    places = few_true(w != r)
    return places + first, w[places], r[places]


def code_entries(found: Sequence[Found], size: int) -> FewEntries:
    """Code the entries of all blocks of a weight with ``size`` numbers, in order."""
    places, numbers, r = map(np.concatenate, zip(*found, strict=True))
    counts = np.bincount(places >> 8, minlength=_groups(size)).astype(np.uint16)
    exact = (numbers - r).view(f"i{numbers.itemsize}")
    steps = exact.astype(np.int8)
    far = (steps != exact) | (steps == ESCAPE)
    steps[far] = ESCAPE
    # The conversion to bytes keeps the place in the group.
    return FewEntries(counts, places.astype(np.uint8), steps, numbers[far])


def _groups(size: int) -> int:
    """The number of groups of a block; the last one may be smaller."""
    return -(-size // GROUP)


def share_of_entries(share: float, itemsize: int) -> float:
    """The share of different entries for which `FewEntries` takes a ``share`` of the bytes of a weight."""
    # Two bytes for each group, and two for each entry.
    return (share * itemsize - 2 / GROUP) / 2
