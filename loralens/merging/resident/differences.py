"""The entries in which a weight of 16 bits differs from what subtracting an update gives, in memory.

An entry takes four bytes: its place in its block of rows, and the bits of W. That is quick, and little as long as few
entries differ. If many differ, the patch is coded as in an undo file, which takes half as much or less.
"""

from dataclasses import dataclass
from typing import Any, final

import numpy as np
from numpy.typing import NDArray

from loralens.core.lazy import Array
from loralens.merging.undo.patch import Blob, PatchReader, PatchWriter, bits

# At this share a patch takes a twentieth of the bytes of the weight.
DENSE = 1 / 40  # share of different entries from which on the time to deflate them is worth the memory
BYTES = 2  # of a weight


@final
@dataclass(frozen=True, slots=True)
class FewEntries:
    """The entries of W that differ from R, block by block.

    Attributes
    ----------
    ends : tuple of int
        The number of entries up to the end of each block.
    places : array of uint16 or uint32
        Where the entries are in their blocks.
    numbers : uint16 array
        The bits of W there.
    """

    ends: tuple[int, ...]
    places: NDArray[Any]
    numbers: NDArray[np.uint16]

    @property
    def nbytes(self) -> int:
        """Bytes of both arrays."""
        return self.places.nbytes + self.numbers.nbytes


@final
class EntryReader:
    """Restores W from R. The blocks are those of the comparison."""

    __slots__ = ("_block", "_entries")

    def __init__(self, entries: FewEntries) -> None:
        self._entries, self._block = entries, 0

    def correct(self, r: NDArray[Any]) -> None:
        """Change the `bits` of the next block of R to those of W, in place."""
        entries = self._entries
        block = slice(entries.ends[self._block - 1] if self._block else 0, entries.ends[self._block])
        r[entries.places[block]] = entries.numbers[block]
        self._block += 1

    def finish(self) -> None:
        """Check that all blocks were restored."""
        assert self._block == len(self._entries.ends)


@final
@dataclass(frozen=True, slots=True)
class Patch:
    """Few entries as they are, or many as the patch of an undo file."""

    coded: FewEntries | Blob

    @property
    def nbytes(self) -> int:
        """Bytes in memory."""
        return self.coded.nbytes

    def reader(self) -> EntryReader | PatchReader:
        """What restores W, block by block."""
        return PatchReader(self.coded, BYTES) if isinstance(self.coded, Blob) else EntryReader(self.coded)


@final
class BlockComparison:
    """Compares W and R a block of rows at a time, and collects the entries in which they differ."""

    __slots__ = ("_blocks", "_writer")

    def __init__(self) -> None:
        self._blocks: list[tuple[NDArray[Any], NDArray[np.uint16]]] = []
        self._writer: PatchWriter | None = None

    def compare(self, W: Array, R: Array) -> None:
        """Note where the next rows differ. The bits are compared, since as numbers −0 equals 0."""
        w, r = bits(W), bits(R)
        if self._writer:
            self._writer.block(w, r)
            return
        places = _differing(w, r)
        # As all blocks of a weight are alike, the first one decides.
        if not self._blocks and places.size > DENSE * w.size:
            self._writer = PatchWriter(BYTES)
            self._writer.block(w, r)
            return
        # A block of one long row has places that need 32 bits.
        self._blocks.append((places.astype(np.uint16 if w.size <= 1 << 16 else np.uint32), w[places]))

    def patch(self) -> Patch:
        """The patch of the whole weight."""
        if self._writer:
            return Patch(self._writer.finish())
        places, numbers = zip(*self._blocks, strict=True)
        ends = np.cumsum([block.size for block in places])
        return Patch(FewEntries(tuple(ends.tolist()), np.concatenate(places), np.concatenate(numbers)))


def _differing(w: NDArray[np.uint16], r: NDArray[np.uint16]) -> NDArray[np.int64]:
    """Where w and r differ: four numbers are compared as one, which takes half the time where few differ."""
    if w.size % 4:
        return np.flatnonzero(w != r)
    w_quads, r_quads = w.view(np.uint64), r.view(np.uint64)
    chosen = np.flatnonzero(w_quads != r_quads)
    inside = np.flatnonzero((w_quads[chosen] ^ r_quads[chosen]).view(np.uint16) != 0)
    places: NDArray[np.int64] = chosen[inside >> 2] * 4 + (inside & 3)
    return places
