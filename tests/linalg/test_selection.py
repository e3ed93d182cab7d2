"""The k-th largest of many numbers, against a sort."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from loralens import FormatError
from loralens.linalg.order_statistics import few_true, kth_largest

CASES = ("normal", "equal", "few", "zeros", "heavy")


def numbers(case, size, rng):
    x = rng.standard_normal(size)
    return {
        "normal": np.abs(x),
        "equal": np.ones(size),
        "few": np.round(np.abs(x)),
        "zeros": np.where(x > 1, x, 0.0),
        "heavy": np.exp(4 * x),
    }[case].astype(np.float32)


@given(st.sampled_from(CASES), st.integers(1, 3000), st.floats(0.0005, 1), st.integers(1, 500), st.integers(0, 2**20))
def test_it_is_exact_whatever_the_sample(case, size, share, sampled, seed):
    rng = np.random.default_rng(seed)
    x = numbers(case, size, rng)
    ks = [max(1, int(share * size)), 1, size]
    found = kth_largest(lambda: np.array_split(x, 4), ks, size=size, sample=rng.choice(x, sampled).astype(float))
    assert list(found) == [float(np.sort(x)[::-1][k - 1]) for k in ks]


def test_a_sample_that_misleads_costs_another_pass():
    x, passes = np.arange(10_000, dtype=np.float32), []

    def blocks():
        passes.append(1)
        return [x]

    assert kth_largest(blocks, [5000], size=x.size, sample=np.linspace(0, 100, 2000)) == (5000.0,)
    assert len(passes) > 1
    passes.clear()
    assert kth_largest(blocks, [5000], size=x.size, sample=np.linspace(0, 9999, 2000)) == (5000.0,)
    assert len(passes) == 1


def test_a_bracket_that_ends_just_below_is_a_miss():
    x = np.arange(10_000, dtype=np.float32)
    for value in (4999.0, 5000.0, 5001.0):  # above them are k, k − 1 and k − 2 numbers
        assert kth_largest(lambda: [x], [5000], size=x.size, sample=np.full(100, value)) == (5000.0,)


def test_what_is_no_number_ends_the_search():
    x = np.array([1.0, np.nan, 3.0], np.float32)
    assert kth_largest(lambda: [x], [2], size=3, sample=np.array([1.0])) == (1.0,)
    with pytest.raises(FormatError, match="NaN"):
        kth_largest(lambda: [x], [3], size=3, sample=np.array([1.0]))


@given(st.integers(0, 200), st.floats(0, 1), st.integers(0, 2**20))
def test_few_true_values_are_found_like_many(size, share, seed):
    mask = np.random.default_rng(seed).random(size) < share
    np.testing.assert_array_equal(few_true(mask), np.flatnonzero(mask))
    tall = np.resize(mask, (8, max(1, size)))
    np.testing.assert_array_equal(few_true(tall), np.flatnonzero(tall))
    np.testing.assert_array_equal(few_true(tall.T), np.flatnonzero(tall.T))
