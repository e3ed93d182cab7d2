"""The entries in which a weight differs from what subtracting an update gives, in memory.

An entry takes two bytes: its place within 256 numbers, and a difference of bits. Each 256 numbers have a count of
entries. That is quick, and little as long as few entries differ. If many differ, the patch is coded as in an undo file,
which takes half as much or less.
"""

from dataclasses import dataclass
from typing import Any, final

import numpy as np
from numpy.typing import NDArray

from loralens.core.lazy import Array
from loralens.linalg.selection import few_true
from loralens.merging.undo.patch import Blob, PatchReader, PatchWriter, bits

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
        The number of entries in each group of 256 numbers. Each block begins with a group of its own.
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
    """Restores W from R. The blocks are those of the comparison."""

    __slots__ = ("_entries", "_entry", "_escaped", "_group")

    def __init__(self, entries: FewEntries) -> None:
        self._entries = entries
        # The next group, entry and escaped number.
        self._group = self._entry = self._escaped = 0

    def correct(self, r: NDArray[Any]) -> None:
        """Change the `bits` of the next block of R to those of W, in place."""
        entries = self._entries
        group, self._group = self._group, self._group + _groups(r.size)
        counts = entries.counts[group : self._group]
        groups = np.repeat(np.arange(counts.size), counts)
        entry, self._entry = self._entry, self._entry + groups.size
        places, steps = groups * GROUP + entries.places[entry : self._entry], entries.steps[entry : self._entry]
        # Unsigned integers wrap around, as they did in the comparison.
        r[places] += steps.astype(r.dtype)
        escaped = places[steps == ESCAPE]
        first, self._escaped = self._escaped, self._escaped + escaped.size
        r[escaped] = entries.numbers[first : self._escaped]

    def finish(self) -> None:
        """Check that all blocks were restored."""
        assert self._group == self._entries.counts.size


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
    itemsize : int
        Bytes of a number of the weight.
    few : float
        The share of different entries up to which they are kept as they are.
    """

    __slots__ = ("_blocks", "_few", "_itemsize", "_writer")

    def __init__(self, itemsize: int, *, few: float) -> None:
        self._itemsize, self._few = itemsize, few
        self._blocks: list[FewEntries] = []
        self._writer: PatchWriter | None = None

    def compare(self, W: Array, R: Array) -> None:
        """Note where the next rows differ. The bits are compared, since as numbers −0 equals 0."""
        w, r = bits(W), bits(R)
        places = np.empty(0, np.int64) if self._writer else few_true(w != r)
        # As all blocks of a weight are alike, the first one decides.
        if not self._writer and not self._blocks and places.size > self._few * w.size:
            self._writer = PatchWriter(self._itemsize)
        if self._writer:
            self._writer.block(w, r)
            return
        counts = np.bincount(places >> 8, minlength=_groups(w.size)).astype(np.uint16)
        numbers = w[places]
        steps = (numbers - r[places]).view(f"i{self._itemsize}")
        far = (steps <= ESCAPE) | (steps >= -ESCAPE)
        steps[far], numbers = ESCAPE, numbers[far]
        # The conversion to bytes keeps the place in the group.
        self._blocks.append(FewEntries(counts, places.astype(np.uint8), steps.astype(np.int8), numbers))

    def patch(self) -> Patch:
        """The patch of the whole weight."""
        if self._writer:
            return Patch(self._writer.finish(), self._itemsize)
        one = self._blocks[0]
        if len(self._blocks) > 1:
            arrays = zip(*((each.counts, each.places, each.steps, each.numbers) for each in self._blocks), strict=True)
            one = FewEntries(*map(np.concatenate, arrays))
        return Patch(one, self._itemsize)


def _groups(size: int) -> int:
    """The number of groups of a block; the last one may be smaller."""
    return -(-size // GROUP)


def share_of_entries(share: float, itemsize: int) -> float:
    """The share of different entries for which `FewEntries` takes a ``share`` of the bytes of a weight."""
    # Two bytes for each group, and two for each entry.
    return (share * itemsize - 2 / GROUP) / 2
