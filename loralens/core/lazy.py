"""`LazyArray`: an array of known shape and dtype whose numbers are read or computed on demand."""

from bisect import bisect_right
from collections.abc import Callable, Iterator, Sequence
from itertools import accumulate
from math import prod
from threading import RLock
from typing import Any, final

import numpy as np
from numpy.typing import DTypeLike, NDArray

Array = NDArray[Any]


@final
class LazyArray:
    """An array of known shape and dtype that is read or computed each time its numbers are needed.

    Nothing is kept: two reads do the work twice, and the result is freed as soon as the caller drops it. So a 300 MB
    adapter can be processed in 50 MB of memory.

    Parameters
    ----------
    read : callable or None
        Takes nothing and returns the array. Callers must not modify the result. It may be None if ``numbers`` is given.
    shape : tuple of int
    dtype : dtype
        Shape and dtype of the result of ``read``. Any other result is a bug and fails an assertion.
    rows : callable, optional
        Takes start and stop, and returns these rows without reading the others.
    numbers : callable, optional
        Takes start and stop in the order in which the numbers are stored, and returns these numbers in one dimension
        without reading the others. Rows can then be read separately after any reshaping. Use it instead of ``rows``.
    """

    __slots__ = ("_numbers", "_read", "_rows", "dtype", "shape")

    def __init__(
        self,
        read: Callable[[], Array] | None,
        *,
        shape: tuple[int, ...],
        dtype: DTypeLike,
        rows: Callable[[int, int], Array] | None = None,
        numbers: Callable[[int, int], Array] | None = None,
    ) -> None:
        assert read or numbers, "nothing gives the numbers"
        self._read = read
        self._rows = rows
        self._numbers = numbers
        self.shape = shape
        self.dtype: np.dtype[Any] = np.dtype(dtype)

    @classmethod
    def of(cls, array: "Array | LazyArray") -> "LazyArray":
        """``array`` itself if it is lazy, else a LazyArray that returns it."""
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
        """Size of the numbers in bytes, in memory and in the file."""
        return self.size * self.dtype.itemsize

    def read(self) -> Array:
        """The array, read or computed now."""
        if self._read:
            array = self._read()
        else:
            assert self._numbers
            array = self._numbers(0, self.size).reshape(self.shape)
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
        """Rows ``start`` to ``stop``. The others are not read if ``streams`` is true."""
        assert 0 <= start <= stop <= self.shape[0], (start, stop, self.shape)
        rows, numbers, shape = self._rows, self._numbers, (stop - start, *self.shape[1:])
        if numbers is not None:
            # Rows are consecutive numbers in C order.
            first = start * prod(self.shape[1:])
            return LazyArray(None, shape=shape, dtype=self.dtype, numbers=lambda a, b: numbers(first + a, first + b))
        if rows is None:
            return self.map(lambda array: array[start:stop], shape=shape)
        return LazyArray(lambda: rows(start, stop), shape=shape, dtype=self.dtype)

    @property
    def numbers(self) -> Callable[[int, int], Array] | None:
        """What gives the numbers in the order in which they are stored, if single ones can be read."""
        return self._numbers

    @property
    def streams(self) -> bool:
        """Whether rows can be read without the others."""
        return self._rows is not None or (self._numbers is not None and bool(self.shape))

    def reshape(self, *shape: int) -> "LazyArray":
        """The same numbers in another shape.

        Rows can still be read separately if single numbers can, as in a file, or if the first dimension is the same.
        """
        assert prod(shape) == self.size, (shape, self.shape)
        if self._numbers is not None:
            read = None if self._read is None else lambda: self.read().reshape(shape)
            return LazyArray(read, shape=shape, dtype=self.dtype, numbers=self._numbers)
        # If the first dimension changes, the rows hold other numbers. They can then be read only as ranges of numbers.
        rows = self._rows if shape and self.shape and shape[0] == self.shape[0] else None
        return LazyArray(
            lambda: self.read().reshape(shape),
            shape=shape,
            dtype=self.dtype,
            rows=None if rows is None else lambda start, stop: rows(start, stop).reshape(stop - start, *shape[1:]),
        )

    @property
    def T(self) -> "LazyArray":
        """The transpose."""
        return self.map(lambda array: array.T, shape=self.shape[::-1])

    def __deepcopy__(self, memo: dict[int, Any]) -> "LazyArray":
        return self  # a copy is not needed, since results are never modified

    def __reduce__(self) -> tuple[Any, ...]:  # functions that read files cannot be pickled, but the numbers can
        return LazyArray.of, (self.read(),)

    def __repr__(self) -> str:
        return f"LazyArray(shape={self.shape}, dtype={self.dtype})"


def without_numbers(shape: tuple[int, ...], dtype: DTypeLike) -> LazyArray:
    """A LazyArray for code that needs only a shape and a dtype, such as matching. Reading it is a bug."""

    def read() -> Array:
        raise AssertionError("an array without numbers was read")

    return LazyArray(read, shape=shape, dtype=dtype)


def row_blocks(tensor: LazyArray, numbers: int) -> Iterator[tuple[slice, Array]]:
    """Yield a tensor in blocks of rows with about ``numbers`` numbers each, but at least one row, with their slice.

    If single rows cannot be read, the tensor is read once and kept until the end.
    """
    count, width = tensor.shape[0], prod(tensor.shape[1:])
    step = max(1, numbers // max(1, width))
    # Reading it again for every block would compute a lazy transpose or conversion each time.
    array = None if tensor.streams else tensor.read()
    for start in range(0, count, step):
        part = slice(start, min(start + step, count))
        yield part, tensor.rows(part.start, part.stop).read() if array is None else array[part]


def concatenate(parts: Sequence[LazyArray]) -> LazyArray:
    """The concatenation of one-dimensional arrays of one dtype; only parts that are needed are read."""
    dtype = parts[0].dtype if parts else np.dtype(np.uint8)
    size = sum(part.size for part in parts)
    return LazyArray(None, shape=(size,), dtype=dtype, numbers=_rows_of_parts(parts, (), dtype))


def stack_rows(parts: Sequence[LazyArray]) -> LazyArray:
    """Matrices of the same width stacked below each other; only parts that are needed are read.

    The dtype is that of the matrices, or float32 if they differ in dtype.
    """
    count, width, dtypes = sum(part.shape[0] for part in parts), parts[0].shape[1], {part.dtype for part in parts}
    dtype = dtypes.pop() if len(dtypes) == 1 else np.dtype(np.float32)
    rows = _rows_of_parts(parts, (width,), dtype)
    streamed = rows if all(part.streams for part in parts) else None
    return LazyArray(lambda: rows(0, count), shape=(count, width), dtype=dtype, rows=streamed)


def _rows_of_parts(
    parts: Sequence[LazyArray], row: tuple[int, ...], dtype: np.dtype[Any]
) -> Callable[[int, int], Array]:
    """A function that reads some rows, each of this shape, of parts that lie below each other."""
    stops = list(accumulate(part.shape[0] for part in parts))

    def rows(start: int, stop: int) -> Array:
        pieces = [np.empty((0, *row), dtype)]
        first = bisect_right(stops, start)
        while start < stop:
            offset, last = stops[first] - parts[first].shape[0], min(stop, stops[first])
            pieces.append(parts[first].rows(start - offset, last - offset).read().astype(dtype, copy=False))
            start, first = last, first + 1
        return pieces[1] if len(pieces) == 2 else np.concatenate(pieces)

    return rows


@final
class Recent:
    """A cache of the last arrays that were read, for callers that need many small parts of a big tensor in turn.

    A thread that needs an array while another thread computes it waits for it.

    Parameters
    ----------
    count : int
        Number of arrays to keep: 2 if parts of two tensors are needed alternately.
    """

    __slots__ = ("_count", "_held", "_lock")

    def __init__(self, count: int = 1) -> None:
        self._count = count
        self._lock = RLock()  # an array may be computed from another one of the same cache
        self._held: tuple[tuple[LazyArray, Array], ...] = ()  # in the order of reading

    def keep(self, array: LazyArray) -> LazyArray:
        """``array`` as a LazyArray that does not read again while the array is in the cache."""

        def read() -> Array:
            with self._lock:
                earlier = tuple(held for held in self._held if held[0] is not array)
                hit = next((held for held in self._held if held[0] is array), None)
                if hit is None:
                    earlier = earlier[max(0, len(earlier) - self._count + 1) :]  # before one more is read
                    self._held = earlier
                    hit = array, array.read()
                self._held = (*earlier, hit)
                return hit[1]

        return LazyArray(read, shape=array.shape, dtype=array.dtype)
