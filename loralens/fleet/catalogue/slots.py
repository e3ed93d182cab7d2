"""The file of the sketches: slots of fixed size, which the catalogue names together with a checksum."""

import os
import zlib
from collections.abc import Iterable, Mapping
from heapq import heappop, heappush
from pathlib import Path
from typing import final
from weakref import finalize

import numpy as np
from numpy.typing import NDArray

from loralens.fleet.catalogue.schema import SKETCHES
from loralens.fleet.sketching.sketches import START_WIDTH, WIDTH, Sketch
from loralens.formats.files.disk import disk_errors, lock, sync_folder, write_at

SLOT = WIDTH + START_WIDTH  # bytes: the sketch of the update, then the start sketch


def slot_bytes(sketch: Sketch) -> bytes:
    """The content of the slot of an adapter."""
    return sketch.codes.tobytes() + sketch.start.tobytes()


def checksum(content: bytes | memoryview) -> int:
    """The checksum of a slot."""
    return zlib.crc32(content)


def read_slots(home: Path) -> NDArray[np.int8]:
    """All slots, memory-mapped, shape (slots, 4352). The file never shrinks while it is mapped.

    A slot that no committed row names any more may get new content while it is mapped, unless `SlotHold` is alive.
    """
    file = home / SKETCHES
    count = file.stat().st_size // SLOT if file.exists() else 0
    if not count:
        return np.empty((0, SLOT), np.int8)
    return np.memmap(file, np.int8, "r", shape=(count, SLOT))


@final
class SlotHold:
    """The right of a reader to find slots as they are, as long as this object lives: writers use none of them again.

    Attributes
    ----------
    is_held : bool
        False while a writer is at work, and where the system or the disk has no locks.
    """

    def __init__(self, home: Path) -> None:
        try:
            descriptor = lock(home / SKETCHES, shared=True)
        except BlockingIOError:  # a writer, which uses free slots again
            descriptor = None
        self.is_held = descriptor is not None
        if descriptor is not None:
            finalize(self, os.close, descriptor)


def damaged_slots(slots: NDArray[np.int8], checksums: Mapping[int, int]) -> list[int]:
    """The slots that are not there or do not have the checksum that the catalogue states."""
    # The map is viewed as a plain array, since slicing a memory map takes ten times as long.
    plain = slots.view(np.ndarray)
    return [
        slot for slot, expected in checksums.items() if slot >= len(plain) or checksum(plain[slot].data) != expected
    ]


@final
class SlotWriter:
    """Writes slots, and knows which ones are free."""

    def __init__(self, home: Path, used: Iterable[int]) -> None:
        self._file = home / SKETCHES
        self._used = set(used)
        self._end = max(self._used, default=-1) + 1
        # Slots that were freed, and the first of those that were not looked at yet. A damaged catalogue may name a slot
        # far behind all others, so that the slots between them are not listed.
        self._free: list[int] = []
        self._next = 0
        with disk_errors(self._file):
            # Not through a link: what it leads to would be written to.
            flags = os.O_RDWR | os.O_CREAT | getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_BINARY", 0)
            self._descriptor = os.open(self._file, flags, 0o644)
            sync_folder(home)
        try:
            self._lock, self._reuses = lock(self._file), True
        except BlockingIOError:  # a reader has mapped the slots, also those that are free by now
            self._lock, self._reuses = None, False

    def take(self) -> int:
        """A slot that no committed row names: a free one if no reader may look at it, or a new one at the end."""
        slot = self._free_slot() if self._reuses else None
        if slot is None:
            slot, self._end = self._end, self._end + 1
        self._used.add(slot)
        return slot

    def _free_slot(self) -> int | None:
        if self._free:
            return heappop(self._free)
        while self._next < self._end:
            slot, self._next = self._next, self._next + 1
            if slot not in self._used:
                return slot
        return None

    def free(self, slots: Iterable[int]) -> None:
        """Let slots be used again. The commit that frees them must be on the disk."""
        for slot in slots:
            self._used.discard(slot)
            # Those behind will be found when they are looked at.
            if slot < self._next:
                heappush(self._free, slot)

    def write(self, contents: Mapping[int, bytes]) -> None:
        """Write slots, and wait until they are on the disk."""
        with disk_errors(self._file):
            for slot, content in contents.items():
                assert len(content) == SLOT, len(content)
                write_at(self._descriptor, content, slot * SLOT)
            os.fsync(self._descriptor)

    def close(self) -> None:
        """Close the file."""
        os.close(self._descriptor)
        if self._lock is not None:
            os.close(self._lock)
