"""Every best approximation of a product, and how far a product is from one of known directions."""

import numpy as np
import pytest
from hypothesis import given

from loralens.linalg import product_bases, product_svd
from loralens.linalg.product import difference_singular_values, truncating_maps, truncation
from tests import strategies
from tests.draws import draw_factors
from tests.marks import examples
from tests.reference import dense_product, size
from tests.tolerances import ANY_FACTORS, LOSS


@given(strategies.factor_pairs())
@examples(80)
def test_every_head_is_the_best_of_its_rank(pair):
    B, A = pair
    L, s, R = truncating_maps(B, A)
    P, unit = dense_product(B, A), max(size(B, A), 1e-300)
    expected = np.linalg.svd(P, compute_uv=False)
    for k in range(s.size + 1):
        rest = P - (B.astype(np.float64) @ L[:, :k]) @ (R[:k] @ A.astype(np.float64))
        assert abs(np.linalg.norm(rest) - np.linalg.norm(expected[k:])) <= 10 * ANY_FACTORS * unit
        assert abs(np.linalg.norm(rest, 2) - (expected[k] if k < expected.size else 0)) <= 10 * ANY_FACTORS * unit


@given(strategies.factor_pairs(cases=(strategies.plain, strategies.zero_columns, strategies.equal_singular_values)))
@examples(40)
def test_factors_are_balanced(pair):
    B, A = pair
    L, s, R = truncating_maps(B, A)
    for lengths in (np.linalg.norm(B.astype(np.float64) @ L, axis=0), np.linalg.norm(R @ A.astype(np.float64), axis=1)):
        np.testing.assert_allclose(lengths**2, s, rtol=1e-9, atol=1e-13 * size(B, A))


@given(strategies.factor_pairs())
@examples(60)
def test_the_bases_of_a_truncation_are_those_of_the_product_bit_for_bit(pair):
    B, A = pair
    small = truncation(B, A, bases=True).bases
    left, s, right = product_bases(B, A)
    # None where a basis does not refer to the factor, as for badly conditioned factors.
    if small is None:
        return
    assert left.X is B
    np.testing.assert_array_equal(right.X, A.T)
    np.testing.assert_array_equal(small[0], left.T)
    np.testing.assert_array_equal(small[1], right.T)
    np.testing.assert_array_equal(s, truncation(B, A).s)


@pytest.mark.parametrize("exponent", [-301, -300, 0, 299, 300])
def test_any_size_of_factors(exponent):
    rng = np.random.default_rng(0)
    B, A = np.ldexp(rng.standard_normal((9, 3)), exponent), np.ldexp(rng.standard_normal((3, 7)), -exponent // 2)
    L, s, R = truncating_maps(B, A)
    np.testing.assert_allclose(s, product_svd(B, A)[1], rtol=1e-12)
    np.testing.assert_allclose((B @ L) @ (R @ A), B @ A, rtol=1e-9, atol=1e-12 * np.abs(B @ A).max())


def test_nothing_is_left_of_a_product_that_is_zero():
    L, s, R = truncating_maps(np.zeros((5, 2)), np.ones((2, 4)))
    assert (L.shape, s.shape, R.shape) == ((2, 0), (0,), (0, 2))


@given(strategies.factor_pairs(dtypes=(np.float64,)), strategies.factor_pairs(dtypes=(np.float64,), largest=1))
@examples(60)
def test_difference_of_any_two_products(pair, seed):
    B, A = pair
    rng = np.random.default_rng(int(abs(seed[0][0, 0]) * 1e6) % 2**31)
    k = rng.integers(1, 5)
    X, Y = draw_factors(rng, B.shape[0], A.shape[1], k)
    found = difference_singular_values(*product_bases(B, A), X, Y)
    expected = np.linalg.svd(B @ A - X @ Y, compute_uv=False)
    unit = size(B, A) + size(X, Y)
    assert abs(np.linalg.norm(found) - np.linalg.norm(expected)) <= 20 * ANY_FACTORS * unit
    assert abs(found[0] - expected[0]) <= 20 * ANY_FACTORS * unit


@pytest.mark.parametrize("share", [1.0, 1e-3, 1e-7, 1e-12])
def test_near_products_do_not_cancel(share):
    rng = np.random.default_rng(1)
    B, A = draw_factors(rng, 40, 30, 6)
    E = share * rng.standard_normal(B.shape)
    found = difference_singular_values(*product_bases(B, A), B + E, A)
    exact = np.linalg.norm(((B + E) - B) @ A)  # the E that was added, not the one that was drawn
    assert abs(np.linalg.norm(found) - exact) <= 1e-9 * exact + LOSS * 1e-2 * np.linalg.norm(B @ A)
