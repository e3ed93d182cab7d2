"""LazyArray: an array whose numbers stay where they are until somebody asks for them."""

from bisect import bisect_right
from collections.abc import Callable, Sequence
from itertools import accumulate
from math import prod
from typing import Any, final

import numpy as np
from numpy.typing import DTypeLike, NDArray

Array = NDArray[Any]


@final
class LazyArray:
    """An array of known shape and dtype that is read, or computed, each time it is asked for.

    Nothing is kept: two reads do the work twice, and what a read returned is freed as soon as the caller lets it go.
    That is what lets a 300 MB adapter stream through 50 MB of memory.

    Parameters
    ----------
    read : callable
        Takes nothing, returns the array. Callers never write into what it returns.
    shape : tuple of int
    dtype : dtype
        What ``read`` will return; anything else is a bug and fails an assertion.
    rows : callable, optional
        Takes start and stop, returns those rows without reading the others.
    numbers : callable, optional
        Takes start and stop in the order in which the numbers lie, returns those in one dimension without reading the
        others: rows of every shape can then be read alone. Instead of ``rows``.
    """

    __slots__ = ("_numbers", "_read", "_rows", "dtype", "shape")

    def __init__(
        self,
        read: Callable[[], Array],
        *,
        shape: tuple[int, ...],
        dtype: DTypeLike,
        rows: Callable[[int, int], Array] | None = None,
        numbers: Callable[[int, int], Array] | None = None,
    ) -> None:
        self._read = read
        self._rows = rows
        self._numbers = numbers
        if numbers and shape:
            # Rows are consecutive numbers in C order.
            self._rows = _rows_of(numbers, shape[1:])
        self.shape = shape
        self.dtype: np.dtype[Any] = np.dtype(dtype)

    @classmethod
    def of(cls, array: "Array | LazyArray") -> "LazyArray":
        """``array`` itself where it is lazy already, else a LazyArray that returns it."""
        return array if isinstance(array, LazyArray) else cls(lambda: array, shape=array.shape, dtype=array.dtype)

    @property
    def ndim(self) -> int:
        """Number of dimensions."""
        return len(self.shape)

    @property
    def size(self) -> int:
        """Number of elements."""
        return prod(self.shape)

    @property
    def nbytes(self) -> int:
        """Bytes that the numbers take, in memory and in the file alike."""
        return self.size * self.dtype.itemsize

    def read(self) -> Array:
        """The array, read or computed now."""
        array = self._read()
        # A wrong shape here is a bug of a reader, and would show up far away from its cause.
        assert array.shape == self.shape, (array.shape, self.shape)
        assert array.dtype == self.dtype, (array.dtype, self.dtype)
        return array

    def __array__(self, dtype: DTypeLike | None = None, copy: bool | None = None) -> Array:
        return self.read().astype(self.dtype if dtype is None else dtype, copy=bool(copy))

    def map(
        self, f: Callable[[Array], Array], *, shape: tuple[int, ...], dtype: DTypeLike | None = None
    ) -> "LazyArray":
        """``f`` of this array, computed when it is read."""
        return LazyArray(lambda: f(self.read()), shape=shape, dtype=self.dtype if dtype is None else dtype)

    def rows(self, start: int, stop: int) -> "LazyArray":
        """Rows ``start`` to ``stop``; the others are not read where the array stands in a file as it is."""
        assert 0 <= start <= stop <= self.shape[0], (start, stop, self.shape)
        rows, numbers, shape = self._rows, self._numbers, (stop - start, *self.shape[1:])
        if rows is None:
            return self.map(lambda array: array[start:stop], shape=shape)
        first = start * prod(self.shape[1:])
        inside = None if numbers is None else lambda a, b: numbers(first + a, first + b)
        return LazyArray(lambda: rows(start, stop), shape=shape, dtype=self.dtype, numbers=inside)

    @property
    def streams(self) -> bool:
        """Whether some rows can be read without the others."""
        return self._rows is not None

    def reshape(self, *shape: int) -> "LazyArray":
        """The same numbers in another shape.

        Rows can still be read alone where single numbers can, as in a file, or where the first dimension stays.
        """
        assert prod(shape) == self.size, (shape, self.shape)
        # Rows of another first dimension are other rows; only single numbers can then still be read alone.
        rows = self._rows if shape and self.shape and shape[0] == self.shape[0] else None
        return LazyArray(
            lambda: self.read().reshape(shape),
            shape=shape,
            dtype=self.dtype,
            rows=None if rows is None else lambda start, stop: rows(start, stop).reshape(stop - start, *shape[1:]),
            numbers=self._numbers,
        )

    @property
    def T(self) -> "LazyArray":
        """The transpose."""
        return self.map(lambda array: array.T, shape=self.shape[::-1])

    def __deepcopy__(self, memo: dict[int, Any]) -> "LazyArray":
        return self  # nobody writes into what it returns

    def __reduce__(self) -> tuple[Any, ...]:  # what reads it cannot be pickled; its numbers can
        return LazyArray.of, (self.read(),)

    def __repr__(self) -> str:
        return f"LazyArray(shape={self.shape}, dtype={self.dtype})"


def _rows_of(numbers: Callable[[int, int], Array], inner: tuple[int, ...]) -> Callable[[int, int], Array]:
    """Rows of that inner shape, read as the numbers that they are."""
    size = prod(inner)
    return lambda start, stop: numbers(start * size, stop * size).reshape(stop - start, *inner)


def joined(parts: Sequence[LazyArray]) -> LazyArray:
    """Arrays of one dimension and one dtype, one after the other: only those that are asked for are read."""
    stops = list(accumulate(part.size for part in parts))
    size, dtype = (stops[-1], parts[0].dtype) if parts else (0, np.dtype(np.uint8))

    def numbers(start: int, stop: int) -> Array:
        pieces = [np.empty(0, dtype)]
        first = bisect_right(stops, start)
        while start < stop:
            offset = stops[first] - parts[first].size
            last = min(stop, stops[first])
            pieces.append(parts[first].rows(start - offset, last - offset).read())
            start, first = last, first + 1
        return pieces[1] if len(pieces) == 2 else np.concatenate(pieces)

    return LazyArray(lambda: numbers(0, size), shape=(size,), dtype=dtype, numbers=numbers)


def below(parts: Sequence[LazyArray]) -> LazyArray:
    """Matrices of one width as one, the next below the last: only those that are asked for are read.

    In their dtype; in float32 where they have several.
    """
    stops = list(accumulate(part.shape[0] for part in parts))
    width, dtypes = parts[0].shape[1], {part.dtype for part in parts}
    dtype = dtypes.pop() if len(dtypes) == 1 else np.dtype(np.float32)

    def rows(start: int, stop: int) -> Array:
        pieces = [np.empty((0, width), dtype)]
        first = bisect_right(stops, start)
        while start < stop:
            offset = stops[first] - parts[first].shape[0]
            last = min(stop, stops[first])
            pieces.append(parts[first].rows(start - offset, last - offset).read().astype(dtype, copy=False))
            start, first = last, first + 1
        return pieces[1] if len(pieces) == 2 else np.concatenate(pieces)

    return LazyArray(
        lambda: np.concatenate([part.read().astype(dtype, copy=False) for part in parts]),
        shape=(stops[-1], width),
        dtype=dtype,
        rows=rows if all(part.streams for part in parts) else None,
    )


@final
class Recent:
    """Keeps the last arrays read through it, for many small parts asked for one after the other from a big tensor.

    Parameters
    ----------
    count : int
        How many: 2 where parts of two tensors are asked for in turn.
    """

    __slots__ = ("_count", "_held")

    def __init__(self, count: int = 1) -> None:
        self._count = count
        self._held: tuple[tuple[LazyArray, Array], ...] = ()  # the last one read last

    def keep(self, array: LazyArray) -> LazyArray:
        """``array``, read once while it is among the last ones read."""

        def read() -> Array:
            earlier = tuple(held for held in self._held if held[0] is not array)
            hit = next((held for held in self._held if held[0] is array), None)
            if hit is None:
                earlier = earlier[max(0, len(earlier) - self._count + 1) :]  # before one more is read
                self._held = earlier
                hit = array, array.read()
            self._held = (*earlier, hit)
            return hit[1]

        return LazyArray(read, shape=array.shape, dtype=array.dtype)
