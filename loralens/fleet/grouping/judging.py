"""Proposing pairs of members that may be copies, and comparing them exactly."""

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from loralens.core.adapter import Adapter
from loralens.core.fingerprint import fingerprint
from loralens.core.messages import progress, warn
from loralens.core.threads import in_threads, processor_count
from loralens.errors import FormatError, LoraLensError
from loralens.fleet.catalogue.members import Member
from loralens.fleet.levels import COPY, COPY_NORM
from loralens.fleet.search.inner import ExactUpdate
from loralens.fleet.search.sameness import TENSORS, Sameness, judge_sameness, known_steps
from loralens.fleet.sketching.sketches import Sketches
from loralens.tables.numbers import count

if TYPE_CHECKING:
    from loralens.fleet.fleet import Fleet

# The sketches of two nearly equal updates differ by their rounding to int8 alone, 1e-4 of the cosine.
SKETCHED_COPY = COPY - 0.01  # smallest cosine by sketches of a pair that is compared exactly
BLOCK = 512  # members of nearly equal norms whose sketches are compared in one product: 8 MiB
KEPT_UPDATES = 8  # updates that are kept in memory, to compare each with several others


def near_pairs(
    sketches: Sketches, norms: np.ndarray[Any, Any], rows: np.ndarray[Any, Any], *, least: float = SKETCHED_COPY
) -> Iterator[tuple[int, int]]:
    """Pairs of rows that may be copies: their norms are within 1 %, and their sketches nearly parallel.

    The rows are sorted by their norms, so that only a narrow band of all pairs is compared.
    """
    order = np.argsort(norms, kind="stable")
    order = order[norms[order] > 0]
    sorted_norms, sorted_rows = norms[order], rows[order]
    for start in range(0, len(order), BLOCK):
        block = slice(start, min(start + BLOCK, len(order)))
        limits = sorted_norms[block] * (1 + 2 * COPY_NORM)
        directions = sketches.directions(rows=sorted_rows[block])
        end = int(np.searchsorted(sorted_norms, limits[-1], side="right"))
        # The band is divided into blocks too, since all norms of a fleet may be nearly equal.
        for first in range(start, end, BLOCK):
            band = slice(first, min(first + BLOCK, end))
            cosines = directions @ sketches.directions(rows=sorted_rows[band]).T
            later = np.arange(band.start, band.stop) > np.arange(block.start, block.stop)[:, None]
            near = later & (cosines >= least) & (sorted_norms[band] <= limits[:, None])
            for i, j in zip(*np.nonzero(near), strict=True):
                pair = int(sorted_rows[start + i]), int(sorted_rows[first + j])
                yield min(pair), max(pair)


class Judge:
    """Compares pairs of members exactly, each once, and keeps the updates that it read last."""

    def __init__(self, fleet: "Fleet", members: Sequence[Member]) -> None:
        self.fleet, self.members = fleet, members
        self.judged: dict[tuple[int, int], Sameness] = {}
        self._updates: dict[int, ExactUpdate] = {}
        self._known_steps: dict[str, set[int]] = {}
        self._by_fingerprint: dict[str, list[Member]] = {}
        for member in members:
            self._by_fingerprint.setdefault(member.fingerprint, []).append(member)
        self._failed: set[str] = set()
        self._widths: dict[int, int] = {}

    def __call__(self, first: int, second: int) -> Sameness:
        """How much two rows are the same; a file that cannot be read any more is the same as nothing."""
        pair = min(first, second), max(first, second)
        if pair not in self.judged:
            self.judged[pair] = self._compare(*pair)
        return self.judged[pair]

    def compare_all(self, pairs: Sequence[tuple[int, int]]) -> None:
        """Compare pairs in threads, as most of the time goes into reading and small products."""
        different = list(dict.fromkeys(pairs))

        def compare(index: str) -> None:
            self(*different[int(index)])

        with progress("comparing", len(different)) as step:
            in_threads(compare, [str(i) for i in range(len(different))], processor_count(), step)

    def same_pairs(self) -> list[tuple[int, int]]:
        """The pairs that are copies."""
        return [pair for pair, sameness in self.judged.items() if sameness.is_copy]

    def width(self, row: int) -> int:
        """The bytes of each number of an adapter; 0 if its file cannot be read any more."""
        if row not in self._widths:
            try:
                self._keep_width(row, self.fleet.adapter(self.members[row]))
            except LoraLensError:  # it has changed, and may be anything now
                return 0
        return self._widths[row]

    def _keep_width(self, row: int, adapter: Adapter) -> None:
        self._widths[row] = min((module.dtype.itemsize for module in adapter.modules.values()), default=0)

    def warn_of_failed(self) -> None:
        """Warn of the files that have changed since they were indexed."""
        if self._failed:
            warn(
                f"{count(len(self._failed), 'file')} not compared, as they have changed since they were indexed: "
                f"{min(self._failed)}",
                fix=f"index the fleet again: {self.fleet.index_command}",
            )

    def _compare(self, first: int, second: int) -> Sameness:
        members = self.members[first], self.members[second]
        # Files with equal fingerprints are read too: users delete copies, and a file may have been removed or replaced
        # since it was indexed.
        same_numbers = members[0].fingerprint == members[1].fingerprint
        updates, adapters = [], []
        for row, member in zip((first, second), members, strict=True):
            try:
                adapters.append(self.fleet.adapter(member))
                self._keep_width(row, adapters[-1])
                if not same_numbers:
                    updates.append(self._update(row, adapters[-1]))
                elif fingerprint(adapters[-1]) != member.fingerprint:
                    raise FormatError(
                        f"{member.path}: does not hold what was indexed",
                        fix=f"index the fleet again: {self.fleet.index_command}",
                    )
            except LoraLensError:  # it has changed, and may be anything now
                self._failed.add(member.name)
                return Sameness("", 0.0, float("inf"))
        if same_numbers:
            return TENSORS
        steps = self._steps(members[0].fingerprint), self._steps(members[1].fingerprint)
        return judge_sameness(adapters[0], adapters[1], (updates[0], updates[1]), steps=steps)

    def _steps(self, fingerprint: str) -> set[int]:
        if fingerprint not in self._known_steps:
            self._known_steps[fingerprint] = known_steps(self._by_fingerprint[fingerprint], fingerprint)
        return self._known_steps[fingerprint]

    def _update(self, row: int, adapter: Adapter) -> ExactUpdate:
        update = self._updates.get(row)
        if update is None:
            # Pairs come in order of norms, so one update is compared with the few that follow.
            if len(self._updates) >= KEPT_UPDATES:
                self._updates = {}
            update = self._updates[row] = ExactUpdate.of(adapter, self.fleet.modules(adapter))
        return update
