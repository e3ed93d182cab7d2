"""Exact order statistics of more numbers than one wants to hold: a sample brackets them, a pass decides."""

from collections.abc import Callable, Iterable, Sequence
from math import sqrt
from threading import Lock

import numpy as np
from numpy.typing import NDArray

from loralens.errors import FormatError
from loralens.linalg.factor import Array, Floats

HELD = 1 << 20  # numbers that are held as they are; of more, each value and how often it came
SPREAD = 5.0  # standard deviations of the sample's quantile on either side: it misses once in a million
WIDER = 4.0  # times, after a miss


def kth_largest(
    blocks: Callable[[], Iterable[Array]], ks: Sequence[int], *, size: int, sample: Floats
) -> tuple[float, ...]:
    """The k-th largest of all numbers, for every k: exact, not of the sample.

    Parameters
    ----------
    blocks : callable
        ``blocks()`` gives all numbers, in arrays of one float dtype; the same ones each time it is called.
    ks : sequence of int
        From 1 to ``size``.
    size : int
        How many numbers there are.
    sample : float64 array
        Some of them, drawn independently.

    Raises
    ------
    FormatError
        Fewer than k are numbers: the others are NaN.

    Notes
    -----
    One pass, in which the numbers above a bracket are counted and those inside it held: about 10/√sample.size of all. A
    value that comes many times costs one number. Another pass only where the bracket missed.
    """
    sought = Selection(ks, size=size, sample=sample)
    while sought.open:
        for block in blocks():
            sought.add(block)
        sought.close()
    return sought.values


class Selection:
    """The search of `kth_largest`, fed by the caller: while ``open``, ``add`` all numbers, then ``close``.

    Several threads may add at a time.
    """

    def __init__(self, ks: Sequence[int], *, size: int, sample: Floats) -> None:
        ordered = np.sort(sample, axis=None)
        self.brackets = [_Bracket(k, size, ordered) for k in ks]

    @property
    def open(self) -> bool:
        """Whether another pass is needed."""
        return any(not one.closed for one in self.brackets)

    @property
    def values(self) -> tuple[float, ...]:
        """What was found, in the order of ``ks``."""
        return tuple(one.value for one in self.brackets)

    def add(self, block: Array) -> None:
        """Some of the numbers."""
        for one in self.brackets:
            if not one.closed:
                one.add(block)

    def close(self) -> None:
        """All numbers were added. FormatError where too many are NaN."""
        for one in self.brackets:
            if not one.closed:
                one.close()


class _Bracket:
    """The interval [low, high] in which the k-th largest is sought, how many are above it, and what is inside."""

    def __init__(self, k: int, size: int, sample: Floats) -> None:
        self.k, self.share, self.sample, self.spread = k, k / size, sample, SPREAD
        self.closed, self.value, self.lock = False, 0.0, Lock()
        self._open()

    def _open(self) -> None:
        """A bracket from the sample, with nothing counted yet."""
        n, p = self.sample.size, self.share
        middle, reach = n * (1 - p), self.spread * sqrt(n * p * (1 - p)) + self.spread
        below, above = int(middle - reach), int(np.ceil(middle + reach))
        self.low = float(self.sample[below]) if below >= 0 else -np.inf
        self.high = float(self.sample[above]) if above < n else np.inf
        self.above, self.inside = 0, _Tally()

    def add(self, block: Array) -> None:
        above = block > self.high
        count = int(np.count_nonzero(above))
        inside = block >= self.low
        inside ^= above
        numbers = block[inside]
        with self.lock:
            self.above += count
            self.inside.add(numbers)

    def close(self) -> None:
        """The value, if the bracket holds it; else a wider bracket."""
        if self.above < self.k <= self.above + self.inside.count:
            self.closed, self.value = True, self.inside.largest(self.k - self.above)
        elif self.low == -np.inf and self.high == np.inf:  # all numbers are inside, and they are too few
            raise FormatError("some of the numbers are NaN", fix="give smaller weights: they left the range of float32")
        else:
            self.spread *= WIDER
            self._open()


class _Tally:
    """Numbers, held as they came until there are many, then as values with their counts."""

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
        """Count the pieces among the values."""
        values, counts = np.unique(np.concatenate(self.pieces), return_counts=True)
        merged, place = np.unique(np.concatenate([self.values, values]), return_inverse=True)
        total = np.zeros(merged.size, np.int64)
        np.add.at(total, place, np.concatenate([self.counts, counts]))
        self.values, self.counts, self.pieces, self.fresh = merged, total, [], 0

    def largest(self, k: int) -> float:
        """The k-th largest of them."""
        if not self.values.size:
            numbers = np.concatenate(self.pieces)
            return float(np.partition(numbers, numbers.size - k)[numbers.size - k])
        if self.pieces:
            self._fold()
        return float(self.values[::-1][np.searchsorted(np.cumsum(self.counts[::-1]), k)])
