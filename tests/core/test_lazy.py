"""LazyArray: shape, dtype and views are known before anything is read; every read reads."""

import numpy as np
import pytest

from loralens.core.lazy import LazyArray, Recent, concatenate

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


@pytest.mark.parametrize(("start", "stop"), [(-1, 2), (3, 2), (0, 5), (5, 6)])
def test_rows_beyond_the_end_are_a_bug(start, stop):
    with pytest.raises(AssertionError):
        counted(rows=lambda start, stop: NUMBERS)[0].rows(start, stop)


@pytest.mark.parametrize("wrong", [{"shape": (2, 12), "dtype": np.float32}, {"shape": (4, 3, 2), "dtype": np.float64}])
def test_a_read_that_is_not_what_was_promised_is_a_bug(wrong):
    with pytest.raises(AssertionError):
        LazyArray(lambda: NUMBERS, **wrong).read()


def test_a_shape_of_another_size_is_a_bug():
    with pytest.raises(AssertionError):
        counted()[0].reshape(5, 5)


def test_of_takes_what_is_there():
    lazy = LazyArray.of(NUMBERS)
    assert lazy.read() is NUMBERS
    assert LazyArray.of(lazy) is lazy


def test_numpy_reads_it():
    array, reads = counted()
    assert np.asarray(array) is NUMBERS
    assert np.asarray(array, dtype=np.float64).dtype == np.float64
    assert (np.asarray(array) @ np.ones(2)).shape == (4, 3)
    assert not np.shares_memory(np.array(array), NUMBERS)
    assert len(reads) == 4


def test_a_zero_dimensional_array():
    zero = LazyArray.of(np.array(5.0))
    assert (zero.shape, zero.ndim, zero.size, zero.nbytes) == ((), 0, 1, 8)
    assert zero.reshape(1, 1).read() == 5
    assert repr(zero) == "LazyArray(shape=(), dtype=float64)"


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


def test_two_big_arrays_are_read_once_while_their_parts_are_asked_for_in_turn():
    arrays = [counted() for _ in range(3)]
    recent = Recent(2)
    kept = [recent.keep(array) for array, _ in arrays]
    for _ in range(3):
        kept[0].read()
        kept[1].read()
    assert [len(reads) for _, reads in arrays] == [1, 1, 0]
    kept[2].read()
    kept[1].read()
    kept[0].read()
    assert [len(reads) for _, reads in arrays] == [2, 1, 1]


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


@pytest.mark.parametrize("name", VIEWS)
def test_numbers_alone_are_enough(name):
    lazy, dense = VIEWS[name]
    flat, asked = NUMBERS.ravel(), []
    array = LazyArray(
        None,
        shape=NUMBERS.shape,
        dtype=NUMBERS.dtype,
        numbers=lambda first, last: asked.append((first, last)) or flat[first:last],
    )
    view = lazy(array)
    assert not asked
    assert np.array_equal(view.read(), dense(NUMBERS))
    assert len(asked) == 1
    if name == "rows":
        assert asked == [(6, 18)]


def test_a_single_number_has_no_rows():
    array = LazyArray(None, shape=(), dtype=np.float32, numbers=lambda first, last: NUMBERS.ravel()[first:last])
    assert array.read() == 0
    assert not array.streams
    assert array.reshape(1).streams
