"""The leading directions of base weights in the folder in which whole SVDs are kept too."""

from collections.abc import Iterable, Iterator
from threading import Lock
from typing import final

from loralens.core.messages import warn
from loralens.core.weights import Weight
from loralens.errors import FormatError
from loralens.formats.records.cache import LEADING_VERSION, SvdCache, WeightHash
from loralens.linalg.projection import Block
from loralens.linalg.randomized import Leading


@final
class LeadingCache:
    """Reads and writes leading directions of weights; the first failure to write is reported, and ends the writing."""

    def __init__(self, cache: SvdCache) -> None:
        self.cache = cache
        self.writable = True
        self.lock = Lock()  # two weights with the same numbers have one file

    def of(self, weight: Weight, count: int, method: str) -> "LeadingEntry":
        """The place of the ``count`` leading directions of a weight, computed by a method with its random numbers."""
        return LeadingEntry(self, weight, count, f"{LEADING_VERSION} {count} {method}")


@final
class LeadingEntry:
    """The leading directions of one weight in a `LeadingCache`."""

    def __init__(self, store: LeadingCache, weight: Weight, count: int, version: str) -> None:
        self._store, self._weight, self._count = store, weight, count
        self._hash = WeightHash(weight, version)

    def follow(self, blocks: Iterable[Block]) -> Iterator[Block]:
        """Yield the blocks of the weight, and take the hash of their numbers."""
        return self._hash.follow(blocks)

    def read(self) -> Leading | None:
        """The directions of the weight whose blocks have passed; None if there are none, or their file is damaged."""
        rows, columns = self._weight.stored.shape
        return self._store.cache.read_leading(self._hash.hexdigest(), (rows, columns), self._count)

    def write(self, leading: Leading) -> None:
        """Keep the directions, if the disk allows it."""
        with self._store.lock:
            if not self._store.writable:
                return
            try:
                self._store.cache.write_leading(self._hash.hexdigest(), leading)
            except FormatError as error:  # the next run has to compute them again, and this one goes on
                error.at("the directions of W are not kept")
                warn(": ".join((*error.where, error.what)), error.fix)
                self._store.writable = False
