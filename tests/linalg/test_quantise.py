"""Products in whole numbers: their error beside plain rounding's, and factors that are hard to round."""

from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from loralens.errors import FormatError, OptionError
from loralens.linalg.few_bits.quantise import SIDE, _rotation, expected_noise, quantise_product
from tests.marks import examples
from tests.reference import dense_product, gaussian_distortion, size
from tests.strategies import factor_pairs
from tests.tolerances import BACKWARD, FLOAT32_FACTORS, INT4, INT8

RNG = np.random.default_rng(3)


def random(m, n, r, seed=0, spread=1.0):
    """B, A of rank r whose singular values fall from 1 to ``spread``, with Gaussian directions."""
    rng = np.random.default_rng(seed)
    U, V = (np.linalg.qr(rng.standard_normal((k, r)))[0] for k in (m, n))
    return U * np.geomspace(1, spread, r), V.T


def error(B, A, found):
    return np.linalg.norm(dense_product(B, A) - dense_product(found.B, found.A))


def plainly_rounded(B, A, bits):
    """Balanced singular factors divided by their largest values: the error of the product."""
    U, s, Vh = np.linalg.svd(dense_product(B, A), full_matrices=False)
    k, n = min(B.shape[1], s.size), 2 ** (bits - 1) - 1
    sides = []
    for X in (U[:, :k] * np.sqrt(s[:k]), Vh[:k].T * np.sqrt(s[:k])):
        steps = np.abs(X).max(0) / n
        steps[steps == 0] = 1
        sides.append(np.rint(X / steps) * steps)
    return np.linalg.norm(dense_product(B, A) - sides[0] @ sides[1].T)


@pytest.mark.parametrize(("bits", "limit"), [(8, INT8), (4, INT4)])
@pytest.mark.parametrize("spread", [1.0, 0.1, 1e-3])
@pytest.mark.parametrize("r", [1, 2, 3, 8])
def test_error_is_within_what_is_said_and_below_plain_rounding(bits: int, limit: float, spread: float, r: int) -> None:
    B, A = random(200, 310, r, seed=r, spread=spread)
    found = quantise_product(B, A, np.full(r, bits))
    lost = error(B, A, found)
    assert lost <= limit * np.linalg.norm(dense_product(B, A))
    assert lost <= plainly_rounded(B, A, bits) * (
        1.1 if spread == 1 else 1
    )  # equal singular values have any directions
    assert found.bits.tolist() == [bits] * r
    assert np.abs(found.Q_B).max() <= 2 ** (bits - 1) - 1
    assert np.abs(found.Q_A).max() <= 2 ** (bits - 1) - 1


def test_a_graded_spectrum_gains_most() -> None:
    B, A = random(300, 200, 8, spread=0.03)
    assert error(B, A, quantise_product(B, A, np.full(8, 4))) < 0.52 * plainly_rounded(B, A, 4)


PARTS = {  # what it does without one of its parts
    "rotation": ("_rotation", lambda bits: np.eye(bits.size), 1.3),
    "clips": ("CLIPS", np.ones(1), 1.02),
    "errors made up for": ("RIDGE", 1e9, 1.1),
}


@pytest.mark.parametrize(("name", "without", "worse"), PARTS.values(), ids=PARTS)
def test_every_part_earns_its_place(name: str, without: object, worse: float, monkeypatch: pytest.MonkeyPatch) -> None:
    B, A = random(300, 200, 8, spread=0.03)
    whole = error(B, A, quantise_product(B, A, np.full(8, 4)))
    monkeypatch.setattr(f"loralens.linalg.few_bits.quantise.{name}", without)
    assert error(B, A, quantise_product(B, A, np.full(8, 4))) > worse * whole


def test_fitting_the_second_side_to_the_first_earns_its_place() -> None:
    B, A = random(300, 200, 8, spread=0.03)
    assert error(B, A, quantise_product(B, A, np.full(8, 2))) < 0.525  # without: 0.543


def test_fitting_both_sides_again_earns_its_place(monkeypatch: pytest.MonkeyPatch) -> None:
    B, A = random(300, 200, 8, spread=0.03)
    whole = error(B, A, quantise_product(B, A, np.full(8, 2)))
    monkeypatch.setattr("loralens.linalg.few_bits.quantise.ROUNDS", 0)
    assert error(B, A, quantise_product(B, A, np.full(8, 2))) > 1.01 * whole


def test_only_directions_of_equal_bits_are_mixed() -> None:
    bits = np.array([8, 8, 8, 4, 4, 3])
    R = _rotation(bits)
    np.testing.assert_allclose(R @ R.T, np.eye(6), atol=1e-14)
    assert not R[bits[:, None] != bits].any()
    assert (np.abs(R) <= np.sqrt(2 / np.array([3, 3, 3, 2, 2, 1])) + 1e-15).all()
    assert np.count_nonzero(R) == 9 + 4 + 1


def test_sparse_factors_are_left_unrotated_and_exact() -> None:
    B, A = np.zeros((9, 3)), np.zeros((3, 7))
    B[[0, 4, 5], [0, 1, 2]], A[[0, 1, 2], [1, 2, 6]] = (3.0, 0.5, -1e-3), (1.0, 7.0, 2.0)
    found = quantise_product(B, A, np.full(3, 4))
    assert error(B, A, found) <= FLOAT32_FACTORS * np.linalg.norm(dense_product(B, A))
    assert np.count_nonzero(found.B) == np.count_nonzero(found.A) == 3


@pytest.mark.slow
@examples(150)
@given(factor_pairs(), st.integers(2, 16))
def test_any_factors(pair, bits: int) -> None:
    """Never worse than plain rounding but for the float32 of the scales, and never worse than nothing."""
    B, A = pair
    k = min(*B.shape, A.shape[1])
    before = B.copy(), A.copy()
    found = quantise_product(B, A, np.full(k, bits))
    whole = np.linalg.norm(dense_product(B, A))
    lost = error(B, A, found)
    near = FLOAT32_FACTORS * whole + BACKWARD * size(B, A)
    assert lost <= whole + near
    assert lost <= plainly_rounded(B, A, bits) * 1.35 + near  # small matrices: luck counts
    assert found.B.dtype == found.A.dtype == np.float32
    assert (found.B.shape, found.A.shape) == ((B.shape[0], k), (k, A.shape[1]))
    np.testing.assert_array_equal(B, before[0])
    np.testing.assert_array_equal(A, before[1])


def test_bits_of_each_direction_and_directions_left_out() -> None:
    B, A = random(150, 120, 4, spread=0.01)
    found = quantise_product(B, A, np.array([16, 0, 8]))
    assert found.bits.tolist() == [16, 8]
    U, s, Vh = np.linalg.svd(dense_product(B, A), full_matrices=False)
    kept = (U[:, [0, 2]] * s[[0, 2]]) @ Vh[[0, 2]]
    near = np.linalg.norm(kept - dense_product(found.B, found.A))
    assert near <= 1e-4 * s[0] + INT8 * s[2]
    fewer = quantise_product(B, A, np.array([8, 8]))
    assert error(B, A, fewer) == pytest.approx(np.sqrt(s[2] ** 2 + s[3] ** 2), rel=0.03)


def test_more_bits_lose_less() -> None:
    B, A = random(120, 90, 5, spread=0.2)
    lost = [error(B, A, quantise_product(B, A, np.full(5, bits))) for bits in range(2, 17)]
    assert all(more < 0.7 * fewer for fewer, more in pairwise(lost))


@pytest.mark.parametrize("factor", [2.0**-280, 2.0**-120, 2.0**60])
def test_sizes_that_float32_can_hold_change_nothing(factor: float) -> None:
    B, A = random(60, 50, 3)
    whole = np.linalg.norm(dense_product(B, A)) * factor
    small = quantise_product(B * factor, A, np.full(3, 8))
    if factor < 2.0**-250:  # scales of √σ/127 reach float32's denormals, of few bits themselves, and then 0
        assert np.isfinite(small.B).all()
        return
    one = quantise_product(B, A, np.full(3, 8))
    assert error(B * factor, A, small) == pytest.approx(error(B, A, one) * factor, rel=1e-3)
    assert error(B * factor, A, small) <= INT8 * whole


def test_denormal_scales_are_rounded_to_the_scale_there_is() -> None:
    B, A = random(60, 50, 1)
    found = quantise_product(B * 2.0**-280, A, np.array([8]))  # scales of about 2**-149: one or two steps of float32
    lost, whole = error(B * 2.0**-280, A, found), np.linalg.norm(dense_product(B, A)) * 2.0**-280
    assert lost <= whole


def test_what_cannot_be_held_is_refused() -> None:
    B, A = random(6, 5, 2)
    with pytest.raises(FormatError, match="no float32 scale"):
        quantise_product(B * 1e200, A, np.full(2, 8))
    with pytest.raises(FormatError, match="NaN"):
        quantise_product(B * np.nan, A, np.full(2, 8))
    for bits in ([1, 8], [17], [8, 8, 8], [-8], [[8]]):
        with pytest.raises(OptionError, match="are not the bit widths of at most 2 directions"):
            quantise_product(B, A, np.array(bits))


def test_nothing_is_nothing() -> None:
    found = quantise_product(np.zeros((6, 3)), RNG.standard_normal((3, 5)), np.full(3, 4))
    assert not found.B.any()
    assert not found.A.any()
    assert found.B.shape == (6, 3)


@pytest.mark.some(3)
@pytest.mark.parametrize("bits", range(2, 13))
def test_the_table_is_the_best_uniform_quantiser_of_gaussian_numbers(bits: int) -> None:
    levels = 2 ** (bits - 1) - 1
    best = min(gaussian_distortion(clip / levels, levels) for clip in np.linspace(1.2, 5.2, 33))
    assert SIDE[bits - 2] <= best * 1.001
    assert best <= SIDE[bits - 2] * 1.02
    assert expected_noise(bits) == pytest.approx(2 * SIDE[bits - 2] - SIDE[bits - 2] ** 2)


def test_expected_noise_is_what_one_long_direction_loses() -> None:
    B, A = RNG.standard_normal((2500, 1)), RNG.standard_normal((1, 2000))
    whole = np.linalg.norm(B) * np.linalg.norm(A)
    for bits in (2, 3, 4, 6):
        assert (error(B, A, quantise_product(B, A, np.array([bits]))) / whole) ** 2 == pytest.approx(
            expected_noise(bits), rel=0.1
        )
    assert expected_noise(0) == 1.0
