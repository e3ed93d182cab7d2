"""Each entry of W + D and W' − D, against the definition in numbers of Python."""

import ml_dtypes
import numpy as np
import pytest

from loralens.merging.merge_rounding import MergeRounding, merge_entries, subtract_update

DTYPES = [np.float64, np.float32, np.float16, ml_dtypes.bfloat16, ml_dtypes.float8_e4m3fn, ml_dtypes.float8_e5m2]


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_sum_is_made_in_float32_and_rounded_once_more(dtype):
    rng = np.random.default_rng(1)
    W = rng.standard_normal((5, 7)).astype(dtype)
    D = (0.01 * rng.standard_normal((5, 7))).astype(np.float32)
    wide = np.float64 if dtype is np.float64 else np.float32
    for sign, f in ((1, merge_entries), (-1, subtract_update)):
        found = f(W, D, dtype)
        assert found.dtype == dtype
        for w, d, x in zip(W.ravel(), D.ravel(), found.ravel(), strict=True):
            assert x == np.dtype(dtype).type(wide(w) + wide(sign * d))


def test_d_is_not_rounded_to_the_dtype_of_the_weight():
    W, D = np.array([1.0], ml_dtypes.bfloat16), np.array([0.00390625 * 1.001], np.float32)
    assert merge_entries(W, D, W.dtype)[0] == 1.0078125  # D itself in bf16 is half a unit: a tie, to even, 1.0


def test_overflow_is_infinite_but_in_fp8_the_largest_number():
    big = np.array([6e4, -6e4, np.inf, np.nan], np.float16)
    found = merge_entries(big, np.full(4, 3e4, np.float32), np.float16)
    np.testing.assert_array_equal(found, np.array([np.inf, -3e4, np.inf, np.nan], np.float16))
    fp8 = merge_entries(np.array([400.0, -400.0]).astype(ml_dtypes.float8_e4m3fn), np.float32([1e4, -1e4]), DTYPES[4])
    np.testing.assert_array_equal(fp8.astype(float), [448, -448])


def test_a_gain_multiplies_the_sum_and_is_divided_out_first():
    W, D = np.array([[1.0, 2.0]], np.float32), np.array([[0.5, -1.0]], np.float32)
    gain = np.array([[2.0], [3.0]], np.float32)[:1]
    np.testing.assert_array_equal(merge_entries(W, D, np.float32, dora_factors=gain), [[3.0, 2.0]])
    np.testing.assert_array_equal(subtract_update(np.float32([[3.0, 2.0]]), D, np.float32, dora_factors=gain), W)
    out = np.empty((1, 2), np.float32)
    np.testing.assert_array_equal(
        subtract_update(np.float32([[3.0, 2.0]]), D, np.float16, dora_factors=gain, out=out), W
    )
    np.testing.assert_array_equal(out, W)


def test_a_stochastic_rounding_takes_each_neighbour_as_often_as_it_should():
    W, D = np.zeros(20000, ml_dtypes.bfloat16), np.full(20000, 1 + 2.0**-9, np.float32)
    found = merge_entries(W, D, W.dtype, rounding=MergeRounding("stochastic", 1, "k")).astype(float)
    assert set(found) == {1.0, 1 + 2.0**-7}
    assert np.mean(found > 1) == pytest.approx(0.25, abs=0.015)
    other = merge_entries(W, D, W.dtype, rounding=MergeRounding("stochastic", 2, "k")).astype(float)
    assert np.mean(found != other) > 0.3
    exact = merge_entries(W, np.ones(20000, np.float32), W.dtype, rounding=MergeRounding("stochastic", 1, "k"))
    assert set(exact.astype(float)) == {1.0}
