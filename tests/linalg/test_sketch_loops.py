"""The compiled loops for sketches against NumPy; nothing is compared where they were not compiled."""

import ml_dtypes
import numpy as np
import pytest

from loralens.fleet.sketching.stacking import stack
from loralens.linalg.compiled import loops
from loralens.linalg.compiled.loops import kernel
from loralens.linalg.compiled.sketch_loops import (
    BUCKETS,
    MOST_RANKS,
    SketchSide,
    _turns,
    stack_factors,
    sum_of_squares,
)

compiled = pytest.mark.skipif(kernel() is None, reason="the kernel was not compiled")


@compiled
@pytest.mark.parametrize("dtype", [ml_dtypes.bfloat16, np.float16, np.float32])
@pytest.mark.parametrize("size", [1, 7, 64, 129, 600])
@pytest.mark.parametrize("rank", [1, 4, 7, 8, 11, 16])
def test_stacked_rows_have_the_bits_of_numpy(rank, size, dtype, monkeypatch):
    rng = np.random.default_rng(size)
    scales = [2.0, -0.3, 1e-30]
    numbers = rng.standard_normal((3, size, rank)) * 10.0 ** rng.integers(-7, 3, (3, 1, rank))
    numbers[0, 0, 0], numbers[1, -1, 0] = 0, -0.0
    B = [one.astype(dtype) for one in numbers]
    A = [np.ascontiguousarray(one.T) for one in B]
    for factors, by in ((B, scales), (A, None)):
        stacked = stack_factors(factors, by)
        assert stacked is not None
        with monkeypatch.context() as without:
            without.setattr(loops, "_loops", None)
            assert stack_factors(factors, by) is None
            expected = stack(factors, by)
        np.testing.assert_array_equal(stacked.rows, expected.rows)
        np.testing.assert_array_equal(stacked.peaks, expected.peaks)
        lengths = np.sqrt(np.diagonal(expected.grams, axis1=1, axis2=2))
        lengths[lengths == 0] = 1
        errors = (stacked.grams - expected.grams) / lengths[:, :, None] / lengths[:, None]
        assert np.abs(errors).max() < 1e-13
        assert stacked.grams.tobytes() == np.swapaxes(stacked.grams, 1, 2).tobytes()


@compiled
@pytest.mark.parametrize("dtype", [ml_dtypes.bfloat16, np.float16])
def test_stacked_rows_of_all_numbers_of_16_bits(dtype):
    bits = np.arange(1 << 16, dtype=np.uint16).view(dtype)
    with np.errstate(invalid="ignore"):  # some bits mean NaN that signal
        expected = bits.astype(np.float64)
    stacked = stack_factors([bits[None]], None)
    np.testing.assert_array_equal(stacked.rows[0, 0], expected)
    if dtype == np.float16:  # the two things in which the bits are not those of NumPy
        assert not np.signbit(stacked.rows[0, 0, expected == 0]).any()
        assert len({number.tobytes() for number in stacked.rows[0, 0, np.isnan(expected)]}) == 1
    assert np.isnan(stacked.peaks).all()
    finite = bits[np.isfinite(expected)]
    turned = stack_factors([finite[:, None]], [3.0])
    np.testing.assert_array_equal(turned.rows[0, 0], 3 * finite.astype(np.float64))
    assert turned.peaks[0, 0] == 3 * float(np.abs(finite).max())


@compiled
@pytest.mark.parametrize("number", [np.inf, -np.inf, np.nan])
def test_infinity_and_nan_reach_peaks_and_gram_matrices(number):
    A = np.ones((8, 40), np.float32)
    A[3, 39] = number
    stacked = stack_factors([np.ones((8, 40), np.float32), A], None)
    assert np.isfinite(stacked.grams[0]).all()
    np.testing.assert_array_equal(stacked.peaks[1], np.abs(A).max(axis=1))
    assert not np.isfinite(stacked.grams[1, 3]).any()
    assert np.isfinite(np.delete(np.delete(stacked.grams[1], 3, 0), 3, 1)).all()


@compiled
def test_factors_that_are_left_to_numpy():
    A = np.ones((4, 10), np.float32)
    assert stack_factors([A, A.astype(np.float16)], None) is None
    assert stack_factors([A.astype(np.float64)], None) is None
    assert stack_factors([np.ones((10, 4), np.float32).T], None) is None
    assert stack_factors([np.ones((MOST_RANKS + 1, 10), np.float32)], None) is None
    assert stack_factors([np.ones((0, 10), np.float32)], None) is None
    assert stack_factors([np.ones((4, 0), np.float32)], None) is None


@compiled
def test_stacking_refuses_arrays_of_other_sizes():
    A, rows, grams, peaks, scales = np.ones((4, 10), np.float32), np.ones(80), np.ones(32), np.ones(8), np.ones(2)
    fit = [[A, A], 2, 4, 10, False, scales, rows, grams, peaks]
    kernel().stack_factors(*fit)
    others = [
        *((place, fit[place][:-1]) for place in (5, 6, 7, 8)),
        (0, [A]),
        (0, []),
        (0, (A, A)),
        (0, [A, A[:3]]),
        (1, 1),
        (1, 3),
        (1, -1),
        (2, 0),
        (2, -4),
        (2, 17),
        (3, -10),
        (3, 1 << 60),  # bytes that are 0 modulo 2⁶⁴
        (3, 9),
    ]
    for place, other in others:
        with pytest.raises(ValueError, match="sizes"):
            kernel().stack_factors(*fit[:place], other, *fit[place + 1 :])
    with pytest.raises(TypeError):
        kernel().stack_factors([A, None], *fit[1:])
    with pytest.raises(ValueError, match="contiguous"):
        kernel().stack_factors([A, np.ones((10, 4), np.float32).T[:, ::2]], *fit[1:])


def _side(rng, modules, rank, size):
    numbers = rng.standard_normal((modules, rank, size)) * 1e3
    numbers[0, 0, :4] = [0.5, 1.5, -2.5, -0.0]  # ties are rounded to even
    factors = np.ldexp(1.0, rng.integers(-2, 3, (modules, rank)))
    factors[0, 0] = 1
    positions = rng.integers(BUCKETS, size=(modules, size))
    return SketchSide(numbers, factors, positions, rng.choice([-1.0, 1.0], (modules, size)))


@compiled
@pytest.mark.parametrize(("modules", "rank"), [(1, 1), (1, 8), (3, 3), (4, 8), (2, 12), (1, 32), (31, 1)])
def test_the_sum_of_squared_transforms_is_that_of_numpy(modules, rank):
    rng = np.random.default_rng(rank)
    sides = [_side(rng, modules, rank, size) for size in (50, 5000)]
    expected = np.zeros(BUCKETS, np.complex128)
    for module in range(modules):
        for row in range(rank):
            z = np.zeros(BUCKETS, np.complex128)
            for side, unit in zip(sides, (1, 1j), strict=True):
                rounded = np.rint(side.numbers[module, row] * side.factors[module, row]) * side.signs[module]
                np.add.at(z, side.positions[module], unit * rounded)
            expected += np.fft.fft(z) ** 2
    result = sum_of_squares(*sides)
    assert np.abs(result - expected).max() < 1e-13 * np.abs(expected).max()
    # The inverse transform consists of integers, which are those of NumPy.
    halves = [np.fft.ifft(sums).imag / 2 for sums in (result, expected)]
    assert np.array_equal(*map(np.rint, halves))
    assert np.abs(halves[0] - np.rint(halves[0])).max() < 0.01
    # Rows that do not follow each other in memory are copied.
    apart = [side._replace(numbers=np.repeat(side.numbers, 2, axis=2)[..., ::2]) for side in sides]
    assert np.array_equal(sum_of_squares(*apart), result)


@compiled
def test_nan_reaches_the_sum_of_squared_transforms():
    sides = [_side(np.random.default_rng(0), 1, 2, 50) for _ in range(2)]
    for number in (np.nan, np.inf):
        sides[1].numbers[0, 1, 7] = number
        assert not np.isfinite(sum_of_squares(*sides)).any()


@compiled
def test_buckets_outside_of_the_sketch_leave_no_array():
    sides = [_side(np.random.default_rng(0), 1, 2, 50) for _ in range(2)]
    expected = sum_of_squares(*sides)
    sides[0].positions[0, ::2] += 1000 * BUCKETS
    sides[1].positions[0, ::3] -= 2000 * BUCKETS
    assert np.array_equal(sum_of_squares(*sides), expected)


@compiled
@pytest.mark.parametrize("place", range(11))
def test_the_transform_refuses_arrays_of_other_sizes(place):
    B, A = (_side(np.random.default_rng(0), 2, 3, size) for size in (5, 6))
    total = np.zeros(BUCKETS, complex)
    arguments = [*B, *A, 3, _turns(), total]
    # The order of the arguments is that of the kernel: numbers, factors, positions and signs of both sides.
    kernel().convolve(*arguments)
    for other in (4, 0, -3) if place == 8 else (arguments[place].ravel()[:-1].copy(), bytearray()):
        with pytest.raises(ValueError, match="sizes"):
            kernel().convolve(*arguments[:place], other, *arguments[place + 1 :])
