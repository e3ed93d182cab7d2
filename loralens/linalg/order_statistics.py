"""Exact order statistics of more numbers than fit into memory: a sample brackets them, and one pass finds them."""

from collections.abc import Callable, Iterable, Sequence
from math import sqrt
from threading import Lock

import numpy as np

from loralens.errors import FormatError
from loralens.linalg.factor import Array, Integers

SPREAD = 4.0  # half width of a bracket in standard deviations of the sample's quantile: it misses once in 15,000 times
WIDER = 4.0  # factor by which a bracket that missed is widened


def kth_largest(
    blocks: Callable[[], Iterable[Array]], ks: Sequence[int], *, size: int, sample: Array
) -> tuple[float, ...]:
    """Find the exact k-th largest of numbers that are not negative, for every k.

    Parameters
    ----------
    blocks : callable
        ``blocks()`` yields the numbers in arrays of any shapes, and the same numbers at each call.
    ks : sequence of int
        From 1 to ``size``. Equal numbers count one by one.
    size : int
        How many numbers there are.
    sample : array
        Numbers drawn at random from them, at least one. A sample that misleads costs another pass, and never changes
        the result.

    Raises
    ------
    FormatError
        Too many of the numbers are NaN, so the k-th largest does not exist. NaN is never counted.
    """
    searches = [Selection(k, size=size, sample=sample) for k in ks]
    while unfinished := [search for search in searches if search.open]:
        for block in blocks():
            for search in unfinished:
                search.add(block)
        for search in unfinished:
            search.close()
    return tuple(search.value for search in searches)


def few_true(mask: Array) -> Integers:
    """The places of the true values of an array in C order, if few of them are true.

    NumPy finds them by a search for each, which a processor cannot predict. It is quicker to find the groups of eight
    that have some first, and then to look into these.
    """
    if mask.size % 8 or not mask.flags.c_contiguous:
        return np.flatnonzero(mask)
    groups = mask.reshape(-1).view(np.uint64)
    chosen = np.flatnonzero(groups != 0)
    inside = np.flatnonzero(groups[chosen].view(np.bool_))
    places: Integers = (chosen[inside >> 3] << 3) + (inside & 7)
    return places


class Selection:
    """The search of `kth_largest` for one k, for callers that make the passes themselves.

    The k-th largest is expected in an interval [low, high]. A pass counts the numbers above it, and keeps those inside.
    """

    def __init__(self, k: int, *, size: int, sample: Array) -> None:
        self.k, self.share, self.sample, self.spread = k, k / size, sample.ravel(), SPREAD
        self.open, self.value, self.lock = True, 0.0, Lock()
        self._bracket()

    def _bracket(self) -> None:
        """Set the interval from the sample and reset the counts."""
        n, p = self.sample.size, self.share
        # A binomial count: its standard deviation is √(n p (1 − p)); one more spread covers small samples.
        middle, reach = n * (1 - p), self.spread * sqrt(n * p * (1 - p)) + self.spread
        below, above = int(middle - reach), int(np.ceil(middle + reach))
        # NumPy finds one number of a given rank in a third of the time of sorting; two at once take twice as long.
        self.low = float(np.partition(self.sample, below)[below]) if below >= 0 else -np.inf
        self.high = float(np.partition(self.sample, above)[above]) if above < n else np.inf
        self.above = self.zeros = 0
        self.inside: list[Array] = []

    def add(self, block: Array) -> None:
        """Take in some of the numbers of this pass; threads may do so at the same time."""
        above = block > self.high
        inside = block >= self.low
        # Above `high` implies at or above `low`, so this leaves low ≤ x ≤ high without a third comparison. NaN is in
        # neither.
        inside ^= above
        # By positions, which takes less time than indexing with a mask.
        found = block.ravel().take(few_true(inside))
        # An update may be 0 in most places, and zeros are not kept.
        kept = found[found != 0]
        # Comparing and selecting is the costly part and runs in all threads; only the bookkeeping is serialised.
        with self.lock:
            self.above += int(np.count_nonzero(above))
            self.zeros += found.size - kept.size
            self.inside.append(kept)

    def close(self) -> None:
        """End a pass: take the value if the interval contains it, else widen the interval for another pass."""
        numbers, place = np.concatenate(self.inside), self.k - self.above
        # The k-th largest is inside if fewer than k are above and enough are inside to reach it.
        if 0 < place <= numbers.size + self.zeros:
            self.open = False
            if place <= numbers.size:
                self.value = float(np.partition(numbers, numbers.size - place)[numbers.size - place])
        elif self.low == -np.inf and self.high == np.inf:  # all numbers are inside, and they are too few
            raise FormatError("some of the numbers are NaN", fix="give smaller weights: they left the range of float32")
        else:
            self.spread *= WIDER
            self._bracket()
