"""The entries of several weighted updates of one module, read a block of rows at a time."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import cached_property, partial
from math import ceil, prod
from math import pow as power
from typing import Any, NamedTuple, Protocol, final

import numpy as np
from numpy.typing import DTypeLike, NDArray

from loralens.core.lazy import Array
from loralens.core.lowrank import LowRank
from loralens.linalg.blocks import aligned
from loralens.linalg.exact import ExactProduct, QuickProduct, Tile, exact_product, quick_product
from loralens.linalg.factor import Floats
from loralens.linalg.selection import Inexact, kth_largest

BLOCK = 1 << 18  # entries of one update in a block: 64 rows of 4096, of which products are computed fastest
SAMPLED = 8  # times size^(2/3): the number of entries that are sampled for an order statistic of one update
FEWER = 1 / 32  # part of this number, where every sampled entry is computed by itself
FEWEST = 8  # rows of a block at least: BLAS is slow on products of fewer rows

Fuse = Callable[[slice, Array], Array]
Integers = NDArray[np.int64]


class Fused(NamedTuple):
    """The result of an elementwise rule.

    Attributes
    ----------
    update : LowRank
        Balanced float64 factors, scale 1.
    truncation : float
        ‖F − ΔW‖_F / ‖F‖_F, where F is the result of the rule and ΔW the part of it that fits into the rank. Only the
        full space loses anything.
    """

    update: LowRank
    truncation: float


class Matrix(Protocol):
    """One weighted update in some space."""

    @property
    def shape(self) -> tuple[int, int]:
        """(m, n)."""

    def fill(self, start: int, stop: int, out: Array) -> None:
        """Write the rows ``start`` to ``stop`` into ``out``."""

    def at(self, i: Integers, j: Integers) -> Array:
        """Single entries, with the bits that ``fill`` gives them."""

    def sample(self, count: int) -> Array:
        """About so many entries at random places."""

    def magnitudes(self) -> Iterator[Inexact]:
        """All |entries|, some at a time. The next ones may overwrite them."""


@final
@dataclass(frozen=True)
class Product:
    """w·ΔW as `loralens.linalg.exact` defines it: float32, with the same bits on every machine and in every block."""

    product: ExactProduct

    @cached_property
    def quick(self) -> QuickProduct:
        """The same matrix where a bound of the error is enough."""
        return quick_product(self.product)

    @classmethod
    def of(cls, update: LowRank, strength: float) -> "Product":
        """Multiply an update by its weight."""
        return cls(exact_product([(strength * update.scale, update.B, update.A)]))

    @property
    def shape(self) -> tuple[int, int]:
        """(out, in)."""
        return self.product.shape

    def fill(self, start: int, stop: int, out: Array) -> None:
        """Write the rows ``start`` to ``stop`` into ``out``."""
        self.product.rows(start, stop, out)

    def at(self, i: Integers, j: Integers) -> Array:
        """Single entries, by their inner products."""
        return self.quick.at(i, j)

    def sample(self, count: int) -> Array:
        """About so many entries at random places, nearly exact."""
        return self.quick.sample(count)

    def magnitudes(self) -> Iterator[Inexact]:
        """All |entries|, a tile at a time."""

        def exact(tile: Tile, places: Integers) -> Array:
            # Half the time of `divmod`.
            i = places // tile.numbers.shape[1]
            return np.abs(self.at(i + tile.rows.start, places - i * tile.numbers.shape[1] + tile.columns.start))

        for tile in self.quick.tiles():
            np.abs(tile.numbers, out=tile.numbers)
            yield Inexact(tile.numbers, tile.error, partial(exact, tile))


@final
@dataclass(frozen=True, slots=True)
class DenseMatrix:
    """A small float64 matrix in memory."""

    array: Floats

    @property
    def shape(self) -> tuple[int, int]:
        """(m, n)."""
        return self.array.shape[0], self.array.shape[1]

    def fill(self, start: int, stop: int, out: Array) -> None:
        """Write the rows ``start`` to ``stop`` into ``out``."""
        out[:] = self.array[start:stop]

    def at(self, i: Integers, j: Integers) -> Array:
        """Single entries."""
        return self.array[i, j]

    def sample(self, count: int) -> Array:
        """So many entries at random places."""
        return self.at(*_random_places(self.shape, count))

    def magnitudes(self) -> Iterator[Inexact]:
        """All |entries| at once."""
        size = np.abs(self.array)
        yield Inexact(size, 0.0, size.ravel().take)


@final
@dataclass(frozen=True, slots=True)
class Entries:
    """The entries of the weighted updates of one module.

    Attributes
    ----------
    matrices : tuple of Matrix
        All of one shape. Updates that are 0 or missing are left out.
    places : tuple of int
        The index of the adapter that each matrix belongs to.
    adapters : int
        The number T of adapters, those without a matrix included.
    dtype : dtype
        The dtype of the blocks.
    """

    matrices: tuple[Matrix, ...]
    places: tuple[int, ...]
    adapters: int
    dtype: np.dtype[Any]

    @property
    def shape(self) -> tuple[int, int]:
        """(m, n)."""
        return self.matrices[0].shape

    @property
    def size(self) -> int:
        """m·n."""
        return self.shape[0] * self.shape[1]

    @property
    def sampled(self) -> int:
        """The number of entries to sample for an order statistic of one update.

        A larger sample brackets the statistic more closely, and fewer entries have to be looked at singly.
        """
        return max(1, round(SAMPLED * power(self.size, 2 / 3)))

    def blocks(self, numbers: int = BLOCK) -> Iterator[tuple[slice, Array]]:
        """Yield blocks of rows of all updates with their slice, shape (updates, rows, n).

        The caller may write into a block. Its memory is used again for the next one.
        """
        m, n = self.shape
        # Rows are never divided, as DELLA ranks the entries of a row.
        step = min(m, max(FEWEST, numbers // n))
        # One buffer for all blocks: a new one each time would be fresh memory pages (see `Workspace`).
        buffer = aligned(len(self.matrices) * step * n, self.dtype).reshape(len(self.matrices), step, n)
        for start in range(0, m, step):
            stop = min(start + step, m)
            block = buffer[:, : stop - start]
            for matrix, part in zip(self.matrices, block, strict=True):
                matrix.fill(start, stop, part)
            yield slice(start, stop), block

    def count(self, share: float) -> int:
        """Return the number of entries that is this share of all: rounded down, at least 1."""
        return max(1, int(share * self.size))

    def split(self) -> "Iterator[Entries]":
        """Yield the entries of every update alone."""
        for t, matrix in zip(self.places, self.matrices, strict=True):
            yield replace(self, matrices=(matrix,), places=(t,))

    def cutoffs(self, *ks: int) -> list[tuple[float, ...]]:
        """Return for every update its k-th largest |entry| for every k in ``ks``; exact for the numbers of `blocks`."""
        samples = [np.abs(matrix.sample(self.sampled)) for matrix in self.matrices]
        return [
            kth_largest(matrix.magnitudes, ks, size=self.size, sample=sample)
            for matrix, sample in zip(self.matrices, samples, strict=True)
        ]

    def cutoff_of(self, measure: Callable[[Array], Array], k: int) -> float:
        """Return the k-th largest value of ``measure``, which maps entries of all updates, (updates, …), to (…)."""
        # The same places in every update.
        places = _random_places(self.shape, ceil(FEWER * self.sampled))
        sample = measure(np.array([matrix.at(*places) for matrix in self.matrices]))
        return kth_largest(lambda: (measure(x) for _, x in self.blocks()), [k], size=self.size, sample=sample)[0]


def _random_places(shape: tuple[int, int], count: int) -> tuple[Integers, Integers]:
    """So many places in a matrix, the same ones each time."""
    # A fixed seed, so that the same passes are made each time. The result is exact whatever the sample is.
    rng = np.random.default_rng(0)
    return rng.integers(shape[0], size=count), rng.integers(shape[1], size=count)


class Workspace:
    """Arrays for intermediate results, which are used again: fresh memory pages cost ten times the arithmetic."""

    def __init__(self) -> None:
        self.arrays: dict[tuple[str, np.dtype[Any]], Array] = {}
        self.views: dict[tuple[str, tuple[int, ...], DTypeLike], Array] = {}

    def of(self, name: str, shape: tuple[int, ...], dtype: DTypeLike) -> Array:
        """Return the array of this name, with undefined contents."""
        # Most calls ask for what an earlier one has made.
        view = self.views.get((name, shape, dtype))
        if view is not None:
            return view
        size, key = prod(shape), (name, np.dtype(dtype))
        # The last block of a matrix may have fewer rows, and takes the beginning of the same memory.
        if key not in self.arrays or self.arrays[key].size < size:
            self.arrays[key] = aligned(size, dtype)
        view = self.views[name, shape, dtype] = self.arrays[key][:size].reshape(shape)
        return view
