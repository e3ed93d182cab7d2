"""LazyArray: shape, dtype and views are known before anything is read; every read reads."""

import numpy as np
import pytest

from loralens.core import LazyArray
from loralens.core.lazy import Recent, concatenate

NUMBERS = np.arange(24, dtype=np.float32).reshape(4, 3, 2)


def counted(array=NUMBERS, **options):
    """A lazy array, and the list of its reads."""
    reads = []
    return LazyArray(lambda: reads.append(1) or array, shape=array.shape, dtype=array.dtype, **options), reads


VIEWS = {
    "itself": (lambda x: x, lambda x: x),
    "rows": (lambda x: x.rows(1, 3), lambda x: x[1:3]),
    "no rows": (lambda x: x.rows(2, 2), lambda x: x[2:2]),
    "all rows": (lambda x: x.rows(0, 4), lambda x: x),
    "rows of rows": (lambda x: x.rows(1, 4).rows(1, 3), lambda x: x[2:4]),
    "reshape": (lambda x: x.reshape(6, 4), lambda x: x.reshape(6, 4)),
    "transpose": (lambda x: x.T, lambda x: x.T),
    "map": (lambda x: x.map(lambda a: a[0] > 1, shape=(3, 2), dtype=bool), lambda x: x[0] > 1),
    "map in the same dtype": (lambda x: x.map(lambda a: -a, shape=x.shape), lambda x: -x),
    "all of them": (lambda x: x.rows(1, 3).reshape(3, 4).T.map(lambda a: 2 * a, shape=(4, 3)), lambda x: x),
}
VIEWS["all of them"] = (VIEWS["all of them"][0], lambda x: 2 * x[1:3].reshape(3, 4).T)


@pytest.mark.parametrize("name", VIEWS)
def test_a_view_is_what_numpy_makes_of_it(name):
    lazy, dense = VIEWS[name]
    array, reads = counted()
    view, expected = lazy(array), dense(NUMBERS)
    assert (view.shape, view.dtype) == (expected.shape, expected.dtype)
    assert (view.ndim, view.size, view.nbytes) == (expected.ndim, expected.size, expected.nbytes)
    assert not reads
    assert np.array_equal(view.read(), expected)
    assert len(reads) == 1


def test_every_read_reads_and_nothing_is_kept():
    array, reads = counted()
    for _ in range(3):
        array.read()
    assert len(reads) == 3


def test_rows_ask_for_rows_where_they_can():
    asked = []
    array, reads = counted(rows=lambda start, stop: asked.append((start, stop)) or NUMBERS[start:stop])
    assert np.array_equal(array.rows(1, 3).read(), NUMBERS[1:3])
    assert (asked, reads) == ([(1, 3)], [])


def test_recent_keeps_the_last_array_and_only_that():
    recent = Recent()
    (first, first_reads), (second, second_reads) = counted(), counted()
    kept = recent.keep(first), recent.keep(second), recent.keep(first)
    assert kept[0].read() is kept[0].read() is kept[2].read() is NUMBERS
    assert (len(first_reads), len(second_reads)) == (1, 0)
    kept[1].read()
    kept[1].rows(0, 2).read()
    kept[0].read()
    assert (len(first_reads), len(second_reads)) == (2, 1)


@pytest.mark.parametrize("sizes", [(5, 3, 4), (1, 0, 6, 0, 2), (7,), ()])
def test_joined_arrays_are_one_and_only_those_that_are_asked_for_are_read(sizes):
    arrays = [np.arange(size) + 100 * i for i, size in enumerate(sizes)]
    whole, asked = np.concatenate([*arrays, np.zeros(0, int)]), []

    def part(i, array):
        def numbers(start, stop):
            asked.append((i, start, stop))
            return array[start:stop]

        return LazyArray(lambda: array, shape=array.shape, dtype=array.dtype, numbers=numbers)

    one = concatenate([part(i, array) for i, array in enumerate(arrays)])
    assert one.shape == whole.shape
    np.testing.assert_array_equal(one.read(), whole)
    for start in range(whole.size + 1):
        for stop in range(start, whole.size + 1):
            asked.clear()
            np.testing.assert_array_equal(one.rows(start, stop).read(), whole[start:stop])
            assert sum(last - first for _, first, last in asked) == stop - start


def test_a_single_number_has_no_rows():
    array = LazyArray(None, shape=(), dtype=np.float32, numbers=lambda first, last: NUMBERS.ravel()[first:last])
    assert array.read() == 0
    assert not array.streams
    assert array.reshape(1).streams
