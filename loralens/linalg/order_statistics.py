"""Exact order statistics of more numbers than fit into memory: a sample brackets them, and one pass finds them."""

from collections.abc import Callable, Iterable, Sequence
from math import sqrt
from threading import Lock

import numpy as np
from numpy.typing import NDArray

from loralens.errors import FormatError
from loralens.linalg.factor import Array, Integers

# 4 MiB of float32; weights of 16 bits have at most 65,536 values, so folding makes any number of them small.
HELD = 1 << 20  # numbers kept one by one; beyond that each distinct value is kept with its count
SPREAD = 4.0  # half width of a bracket in standard deviations of the sample's quantile: it misses once in 15,000 times
WIDER = 4.0  # factor by which a bracket that missed is widened


def kth_largest(
    blocks: Callable[[], Iterable[Array]], ks: Sequence[int], *, size: int, sample: Array
) -> tuple[float, ...]:
    """Find the exact k-th largest of all numbers, for every k.

    Parameters
    ----------
    blocks : callable
        ``blocks()`` yields all numbers in arrays of one float dtype, and the same numbers at each call.
    ks : sequence of int
        From 1 to ``size``.
    size : int
        Count of all numbers.
    sample : float array
        Some of the numbers, drawn at random.

    Raises
    ------
    FormatError
        Fewer than k of them are not NaN.

    Notes
    -----
    In one pass the numbers above a bracket are counted, and those inside it are kept: a share of about
    10/√sample.size. A value that occurs many times takes the space of one number. There is another pass only if the
    bracket missed.
    """
    sought = Selection(ks, size=size, sample=sample)
    while sought.open:
        for block in blocks():
            sought.add(block)
        sought.close()
    return sought.values


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
    """The search of `kth_largest` for callers that make the passes themselves.

    While ``open``, call ``add`` with all numbers, then ``close``. Several threads may call ``add`` at the same time.
    """

    def __init__(self, ks: Sequence[int], *, size: int, sample: Array) -> None:
        self.brackets = [_Bracket(k, size, sample.ravel()) for k in ks]

    @property
    def open(self) -> bool:
        """Whether another pass is needed."""
        return any(not one.closed for one in self.brackets)

    @property
    def values(self) -> tuple[float, ...]:
        """The k-th largest numbers, in the order of ``ks``."""
        return tuple(one.value for one in self.brackets)

    def add(self, block: Array) -> None:
        """Take in some of the numbers of this pass."""
        for bracket in self.brackets:
            if not bracket.closed:
                bracket.add(block)

    def close(self) -> None:
        """End a pass in which all numbers were added. Raises FormatError if too many of them are NaN."""
        for bracket in self.brackets:
            if not bracket.closed:
                bracket.close()


class _Bracket:
    """The interval [low, high] in which the k-th largest is expected, the count above it, and the numbers inside."""

    def __init__(self, k: int, size: int, sample: Array) -> None:
        self.k, self.share, self.sample, self.spread = k, k / size, sample, SPREAD
        self.closed, self.value, self.lock = False, 0.0, Lock()
        self._open()

    def _open(self) -> None:
        """Set the bracket from the sample and reset the counts."""
        n, p = self.sample.size, self.share
        # A binomial count: its standard deviation is √(n p (1 − p)); one more spread covers small samples.
        middle, reach = n * (1 - p), self.spread * sqrt(n * p * (1 - p)) + self.spread
        below, above = int(middle - reach), int(np.ceil(middle + reach))
        # NumPy finds one number of a given rank in a third of the time of sorting; two at once take twice as long.
        numbers = self.sample
        self.low, self.high = -np.inf, np.inf
        if below >= 0:
            numbers, above = np.partition(numbers, below)[below:], above - below
            self.low = float(numbers[0])
        if above < numbers.size:
            self.high = float(np.partition(numbers, above)[above])
        self.above, self.inside = 0, _Tally()

    def add(self, block: Array) -> None:
        above = block > self.high
        count = int(np.count_nonzero(above))
        inside = block >= self.low
        # Above `high` implies at or above `low`, so this leaves low ≤ x ≤ high without a third comparison. NaN is in
        # neither.
        inside ^= above
        # By positions, which takes less time than indexing with a mask.
        found = block.ravel().take(few_true(inside))
        # Comparing and selecting is the costly part and runs in all threads; only the bookkeeping is serialised.
        with self.lock:
            self.above += count
            self.inside.add(found)

    def close(self) -> None:
        """Take the value if the bracket contains it, else widen the bracket for another pass."""
        # The k-th largest is inside if fewer than k are above and enough are inside to reach it.
        if self.above < self.k <= self.above + self.inside.count:
            self.closed, self.value = True, self.inside.largest(self.k - self.above)
        elif self.low == -np.inf and self.high == np.inf:  # all numbers are inside, and they are too few
            raise FormatError("some of the numbers are NaN", fix="give smaller weights: they left the range of float32")
        else:
            self.spread *= WIDER
            self._open()


class _Tally:
    """A multiset of numbers: a list of arrays until there are many, then distinct values with their counts."""

    def __init__(self) -> None:
        self.count, self.fresh = 0, 0
        self.pieces: list[Array] = []
        self.values: Array = np.empty(0)
        self.counts: NDArray[np.int64] = np.empty(0, np.int64)

    def add(self, numbers: Array) -> None:
        self.pieces.append(numbers)
        self.count, self.fresh = self.count + numbers.size, self.fresh + numbers.size
        if self.fresh > HELD:
            self._fold()

    def _fold(self) -> None:
        """Move the numbers of the list into the distinct values and counts."""
        values, counts = np.unique(np.concatenate(self.pieces), return_counts=True)
        merged, place = np.unique(np.concatenate([self.values, values]), return_inverse=True)
        total = np.zeros(merged.size, np.int64)
        np.add.at(total, place, np.concatenate([self.counts, counts]))
        self.values, self.counts, self.pieces, self.fresh = merged, total, [], 0

    def largest(self, k: int) -> float:
        """The k-th largest of the numbers."""
        # Never folded: a partial sort of the numbers is cheaper than sorting out their values.
        if not self.values.size:
            numbers = np.concatenate(self.pieces)
            return float(np.partition(numbers, numbers.size - k)[numbers.size - k])
        if self.pieces:
            self._fold()
        return float(self.values[::-1][np.searchsorted(np.cumsum(self.counts[::-1]), k)])
