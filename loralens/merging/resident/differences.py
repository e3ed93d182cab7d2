"""The entries in which a weight differs from what subtracting an update gives, in memory.

An entry takes two bytes: its place within 256 numbers, and a difference of bits. Each 256 numbers have a count of
entries. That is quick, and little as long as few entries differ. If many differ, the patch is coded as in an undo file,
which takes half as much or less.
"""

from dataclasses import dataclass
from typing import Any, final

import numpy as np
from numpy.typing import NDArray

from loralens.merging.undo.patch import Blob, PatchReader, PatchWriter, differing

GROUP = 256  # numbers: the place of an entry among them is one byte
BLOCKS = 8  # blocks whose entries are coded together
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
    """Restores W from R, some numbers at a time."""

    __slots__ = ("_entries", "_entry", "_escaped", "_number", "_starts")

    def __init__(self, entries: FewEntries) -> None:
        self._entries = entries
        # The first entry of each group, and the number of all entries.
        self._starts = np.zeros(entries.counts.size + 1, np.int64)
        np.cumsum(entries.counts, out=self._starts[1:])
        # The next number, entry and escaped number.
        self._number = self._entry = self._escaped = 0

    def correct(self, r: NDArray[Any]) -> None:
        """Change the `bits` of the next numbers of R to those of W, in place."""
        entries, first, start = self._entries, self._number, self._entry
        self._number += r.size
        stop = self._entry = self._entries_before(self._number)
        # The first and the last group may lie partly outside.
        groups = np.arange(first // GROUP, _groups(self._number))
        counts = np.diff(self._starts[groups[0] : groups[-1] + 2].clip(start, stop))
        places = np.repeat(groups * GROUP - first, counts)
        places += entries.places[start:stop]
        steps = entries.steps[start:stop]
        # Unsigned integers wrap around, as they did in the comparison.
        r[places] += steps.astype(r.dtype)
        escaped = places[steps == ESCAPE]
        first_escaped, self._escaped = self._escaped, self._escaped + escaped.size
        r[escaped] = entries.numbers[first_escaped : self._escaped]

    def _entries_before(self, number: int) -> int:
        """How many entries lie before a number."""
        group, place = divmod(number, GROUP)
        before = int(self._starts[group])
        if not place:
            return before
        return before + int(np.searchsorted(self._entries.places[before : self._starts[group + 1]], place))

    def finish(self) -> None:
        """Check that all numbers were restored."""
        assert self._entry == self._starts[-1]


@final
@dataclass(frozen=True, slots=True)
class Patch:
    """Few entries as they are, or many as the patch of an undo file; ``itemsize`` is that of the weight."""

    coded: FewEntries | Blob
    itemsize: int

    @property
    def nbytes(self) -> int:
        """Bytes in memory."""
        return self.coded.nbytes

    def reader(self) -> EntryReader | PatchReader:
        """What restores W, block by block."""
        return PatchReader(self.coded, self.itemsize) if isinstance(self.coded, Blob) else EntryReader(self.coded)


@final
class BlockComparison:
    """Compares W and R a block of rows at a time, and collects the entries in which they differ.

    Parameters
    ----------
    size : int
        Numbers in all blocks together.
    itemsize : int
        Bytes of a number of the weight.
    few : float
        The share of different entries up to which they are kept as they are.
    """

    __slots__ = ("_coded", "_counts", "_few", "_found", "_itemsize", "_number", "_writer")

    def __init__(self, size: int, itemsize: int, *, few: float) -> None:
        self._itemsize, self._few = itemsize, few
        self._counts = np.zeros(_groups(size), np.uint16)
        self._number = 0  # the first number of the next block
        # Entries of the last blocks: their places, and the bits of W and of R.
        self._found: list[tuple[NDArray[Any], NDArray[Any], NDArray[Any]]] = []
        # Those of blocks before: places, steps and escaped numbers.
        self._coded: list[tuple[NDArray[Any], NDArray[Any], NDArray[Any]]] = []
        self._writer: PatchWriter | None = None

    def compare(self, w: NDArray[Any], r: NDArray[Any]) -> None:
        """Note where the next rows differ, from their `bits`: as numbers −0 equals 0."""
        places = np.empty(0, np.int64) if self._writer else differing(w, r)
        # As all blocks of a weight are alike, the first one decides.
        if not self._number and places.size > self._few * w.size:
            self._writer = PatchWriter(self._itemsize)
        if self._writer:
            self._writer.block(w, r)
        else:
            self._found.append((places + self._number, w[places], r[places]))
        self._number += w.size
        if len(self._found) == BLOCKS:
            self._code()

    def patch(self) -> Patch:
        """The patch of the whole weight."""
        if self._writer:
            return Patch(self._writer.finish(), self._itemsize)
        self._code()
        return Patch(FewEntries(self._counts, *map(np.concatenate, zip(*self._coded, strict=True))), self._itemsize)

    def _code(self) -> None:
        """Code the entries that were found. Several blocks together take fewer calls of NumPy."""
        if not self._found:
            return
        places, numbers, r = map(np.concatenate, zip(*self._found, strict=True))
        self._found.clear()
        groups = places >> 8
        if groups.size:
            self._counts[groups[0] : groups[-1] + 1] += np.bincount(groups - groups[0]).astype(np.uint16)
        exact = (numbers - r).view(f"i{self._itemsize}")
        steps = exact.astype(np.int8)
        far = (steps != exact) | (steps == ESCAPE)
        steps[far] = ESCAPE
        # The conversion to bytes keeps the place in the group.
        self._coded.append((places.astype(np.uint8), steps, numbers[far]))


def _groups(size: int) -> int:
    """The number of groups of a block; the last one may be smaller."""
    return -(-size // GROUP)


def share_of_entries(share: float, itemsize: int) -> float:
    """The share of different entries for which `FewEntries` takes a ``share`` of the bytes of a weight."""
    # Two bytes for each group, and two for each entry.
    return (share * itemsize - 2 / GROUP) / 2
