"""What rounding costs: against every representable number, against real merges, against the tables of the theory."""

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from loralens import OptionError
from loralens.linalg import product_norm
from loralens.linalg.rounding import (
    product_entries,
    sample_entries,
    sampled_rounding,
    survivors,
    ulp,
)
from tests import reference
from tests.draws import draw_basis, draw_factors
from tests.marks import examples
from tests.tolerances import PREDICTED_ROUNDING, SAMPLED_ROUNDING

NARROW = (np.float16, ml_dtypes.bfloat16, ml_dtypes.float8_e4m3fn, ml_dtypes.float8_e5m2)


def predicted(W, D, dtype):
    """From every entry, which is then no sample any more."""
    return sampled_rounding(W.ravel(), D.ravel(), size=W.size, norm=np.linalg.norm(D.astype(float)), dtype=dtype)


def realised(W, merged, D):
    """Gain, error and share unmoved of what was written."""
    W, merged, D = (x.astype(np.float64) for x in (W, merged, D))
    gain, error = np.sum((merged - W) * D) / np.sum(D**2), np.linalg.norm(merged - W - D) / np.linalg.norm(D)
    return gain, error, np.mean(merged == W)


@pytest.mark.parametrize("dtype", NARROW)
def test_ulp_is_the_gap_to_the_next_number_for_every_number(dtype):
    held = reference.representable(dtype)
    np.testing.assert_array_equal(ulp(held[:-1], dtype), np.diff(held))
    np.testing.assert_array_equal(ulp(-held[:-1].astype(dtype), dtype), np.diff(held))


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_ulp_of_wide_dtypes_is_numpys_spacing(dtype):
    info = np.finfo(dtype)
    x = np.array([0, info.smallest_subnormal, info.tiny, 1 - info.epsneg, 1, 1.5, 2, 3e30, info.max / 2], dtype)
    np.testing.assert_array_equal(ulp(x, dtype), np.spacing(x))


def test_ulp_refuses_what_has_none():
    with pytest.raises(OptionError, match="is not a floating-point dtype"):
        ulp(np.ones(2), np.int8)


@examples(50)
@given(
    st.sampled_from(NARROW),
    st.booleans(),
    st.integers(0, 2**32 - 1),
    st.integers(1, 9),
    st.integers(1, 9),
    st.floats(-5, 0.5),
)
def test_from_all_entries_it_is_what_merging_them_gives(dtype, own, seed, m, n, decades):
    """Of weights in the dtype that is written, and of float32 weights that become it."""
    rng = np.random.default_rng(seed)
    W, D = rng.normal(size=(m, n)).astype(np.float32), (10.0**decades * rng.normal(size=(m, n))).astype(np.float32)
    W[0, 0] = 0
    W = W.astype(dtype) if own else W
    merged = (W.astype(np.float32) + D).astype(dtype)
    found = predicted(W, D, dtype)
    gain, error, unmoved, _ = reference.rounding_gain_and_errors(W, merged, D)
    assert (found.gain, found.error, found.unmoved) == pytest.approx((gain, error, unmoved), rel=1e-9, abs=1e-9)


@pytest.mark.parametrize("dtype", NARROW)
@pytest.mark.parametrize("own", [True, False])
def test_stochastic_rounding_is_told_by_its_mean(dtype, own):
    """Against many draws: each entry on one of its two neighbours, the mean exact."""
    rng = np.random.default_rng(0)
    W, D = rng.normal(size=(20, 30)).astype(np.float32), (0.02 * rng.normal(size=(20, 30))).astype(np.float32)
    W = W.astype(dtype) if own else W
    found = sampled_rounding(W.ravel(), D.ravel(), size=W.size, norm=np.linalg.norm(D), dtype=dtype, stochastic=True)
    held = reference.representable(dtype)
    held = np.concatenate([-held[::-1], held])
    held = np.unique(held[np.isfinite(held)])
    total = (W.astype(np.float32) + D).astype(np.float64)
    above = np.clip(np.searchsorted(held, total), 1, len(held) - 1)
    low, high = held[above - 1], held[above]
    share = (total - low) / (high - low)
    draws = [realised(W, np.where(rng.random(W.shape) < share, high, low), D) for _ in range(300)]
    squares = np.mean([error**2 for _, error, _ in draws])
    assert found.gain == 1
    assert found.error == pytest.approx(np.sqrt(squares), rel=0.02)
    assert found.unmoved == pytest.approx(np.mean([still for *_, still in draws]), abs=0.01)
    wide = sampled_rounding(W.ravel(), D.ravel(), size=W.size, norm=1.0, dtype=np.float32, stochastic=True)
    assert wide.error < 1e-4  # float32 is rounded to the nearest, as merging does it


def test_float8_under_scales_is_rounded_between_them():
    rng = np.random.default_rng(1)
    dtype, scale = ml_dtypes.float8_e4m3fn, np.repeat(rng.uniform(0.01, 3, (8, 1)), 16, axis=1).astype(np.float32)
    stored = rng.normal(size=(8, 16)).astype(dtype)
    W, D = stored.astype(np.float32) * scale, (0.1 * rng.normal(size=(8, 16))).astype(np.float32)
    merged = ((W + D) / scale).astype(dtype)
    found = sampled_rounding(
        W.ravel(), D.ravel(), size=W.size, norm=np.linalg.norm(D), dtype=dtype, scale=scale.ravel()
    )
    gain, error, *_ = realised(W, merged.astype(np.float32) * scale, D)
    assert (found.gain, found.error) == pytest.approx((gain, error), rel=1e-6)
    assert found.unmoved == np.mean(merged == stored)


def test_what_is_infinite_is_left_out():
    W = np.array([[60000.0, 1.0], [2.0, 3.0]], np.float16)
    D = np.full((2, 2), 10000.0, np.float32)
    found = predicted(W, D, np.float16)
    assert np.isfinite([found.gain, found.error, found.noise]).all()


def gaussian(ratio, n=1024, r=16):
    """W ~ N(0, 0.02²) and factors of an update with ‖D‖/‖W‖ = ratio."""
    rng = np.random.default_rng(7)
    W = rng.normal(0, 0.02, (n, n)).astype(np.float32)
    B, A = draw_factors(rng, n, n, r)
    return W, B * (ratio * np.linalg.norm(W) / product_norm(B, A)), A


# dtype, ‖D‖/‖W‖ → error, gain, unmoved: the tables of the theory
TABLE = [
    (ml_dtypes.bfloat16, 0.002, 0.611, 0.817, 0.607),
    (ml_dtypes.bfloat16, 0.01, 0.166, 1.0, 0.181),
    (ml_dtypes.bfloat16, 0.03, 0.055, 1.0, 0.063),
    (np.float16, 0.002, 0.104, 1.0, 0.116),
    (np.float16, 0.01, 0.021, 1.0, 0.023),
]


@pytest.mark.some(2)
@pytest.mark.parametrize(("dtype", "ratio", "error", "gain", "unmoved"), TABLE)
def test_the_table_is_reproduced_by_prediction_sample_and_merge(dtype, ratio, error, gain, unmoved):
    W, B, A = gaussian(ratio)
    W = W.astype(dtype)
    D = (B @ A).astype(np.float32)
    merged = (W.astype(np.float32) + D).astype(dtype)
    true = realised(W, merged, D)
    assert true == pytest.approx((gain, error, unmoved), abs=4e-3)
    whole = predicted(W, D, dtype)
    assert (whole.gain, whole.error) == pytest.approx(true[:2], rel=PREDICTED_ROUNDING)
    entries = sample_entries(W.shape)
    sampled = sampled_rounding(
        W[entries], product_entries(B, A, *entries), size=W.size, norm=product_norm(B, A), dtype=dtype
    )
    assert sampled.error == pytest.approx(whole.error, rel=SAMPLED_ROUNDING)
    assert sampled.gain == pytest.approx(whole.gain, rel=SAMPLED_ROUNDING)
    assert sampled.unmoved == pytest.approx(whole.unmoved, abs=SAMPLED_ROUNDING)


def test_the_noise_is_that_of_the_law():
    W = gaussian(0.01)[0].astype(ml_dtypes.bfloat16)
    noise = predicted(W, np.zeros(W.shape), W.dtype).noise
    rms = np.sqrt(np.mean(W.astype(np.float64) ** 2))
    assert noise == pytest.approx(0.425 * 2**-8 * rms, rel=5e-3)
    wide = np.random.default_rng(3).normal(0, 0.02, (1024, 1024)).astype(np.float32)
    E = wide.astype(ml_dtypes.bfloat16).astype(np.float64) - wide
    assert np.sqrt(np.mean(E**2)) == pytest.approx(noise, rel=5e-3)
    assert np.linalg.norm(E[:, :64], 2) == pytest.approx(noise * (32 + 8), rel=0.02)  # noise·(√m + √n)


def test_survivors_are_those_that_noise_does_not_hide():
    m, n, noise = 160, 120, 0.1
    edge = noise * (m * n) ** 0.25
    assert survivors(np.array([3 * edge, 1.01 * edge, 0.99 * edge, 0.0]), noise, (m, n)) == 2
    rng = np.random.default_rng(0)
    u, v = (draw_basis(rng, k, 1) for k in (m, n))
    for factor, seen in ((3, True), (0.3, False)):
        top = np.linalg.svd(factor * edge * u @ v.T + noise * rng.normal(size=(m, n)))[0][:, 0]
        assert (abs(top @ u[:, 0]) > 0.5) == seen


def test_nothing_moves_and_the_sample_says_exactly_so():
    W, B, A = gaussian(1e-5, n=512)
    W = W.astype(ml_dtypes.bfloat16)
    D, entries = B @ A, sample_entries(W.shape)
    for found in (
        predicted(W, D, ml_dtypes.bfloat16),
        sampled_rounding(W[entries], D[entries], size=W.size, norm=np.linalg.norm(D), dtype=ml_dtypes.bfloat16),
    ):
        assert found.error == pytest.approx(1, abs=0.01)
        assert found.gain == pytest.approx(0, abs=0.01)


@pytest.mark.parametrize("seed", range(3))
def test_a_sample_of_heavy_tails_is_corrected_to_the_norm(seed):
    """Of few entries, whose mean of D² is far from the true one: exactly 1 where all is lost, whatever was drawn."""
    rng = np.random.default_rng(seed)
    W = rng.uniform(1, 2, (300, 200)).astype(ml_dtypes.bfloat16)
    D = 1e-8 * rng.standard_normal(W.shape) * np.exp(2 * rng.standard_normal(W.shape))
    entries = sample_entries(W.shape, count=500, seed=seed)
    norm = np.linalg.norm(D)
    assert abs(np.mean(D[entries] ** 2) * D.size / norm**2 - 1) > 0.1
    assert np.array_equal((W.astype(np.float32) + D.astype(np.float32)).astype(W.dtype), W)
    found = sampled_rounding(W[entries], D[entries], size=W.size, norm=norm, dtype=W.dtype)
    assert (found.gain, found.error, found.unmoved) == pytest.approx((0, 1, 1), abs=1e-9)


def test_entries_are_all_of_a_small_matrix_and_seeded_of_a_large_one():
    rows, columns = sample_entries((3, 4))
    assert sorted(zip(rows, columns, strict=True)) == [(i, j) for i in range(3) for j in range(4)]
    first, second = sample_entries((300, 100), count=50), sample_entries((300, 100), count=50)
    np.testing.assert_array_equal(first, second)
    assert first[0].max() > 100 > 99 >= first[1].max()
    B, A = np.random.default_rng(0).normal(size=(300, 5)), np.random.default_rng(1).normal(size=(5, 100))
    np.testing.assert_allclose(product_entries(B, A, *first), (B @ A)[first], rtol=1e-12)
