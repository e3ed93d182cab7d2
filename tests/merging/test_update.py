"""D of pairs and of products in their own form: float64's value to a rounding, and the same bits however it is cut."""

import numpy as np
import pytest

import loralens
from loralens.core import Dense, Hadamard, Kronecker, LazyArray, Structured
from loralens.merging.merge_plan import update_matrix
from tests.draws import draw_factors

SINGLE = 2.0**-23


def pair(seed, out, in_, rank=3, scale=0.7):
    return loralens.LowRank(*draw_factors(seed, out, in_, rank, "f4"), scale)


def full(seed, *shape):
    return Dense(LazyArray.of(np.random.default_rng(seed).standard_normal(shape).astype(np.float32)))


CASES = {
    "pair": pair(1, 12, 10),
    "kronecker": Structured(Kronecker(full(2, 3, 2), pair(3, 4, 5)), -1.5),
    "kronecker of full": Structured(Kronecker(full(2, 3, 2), full(4, 4, 5)), 0.3),
    "hadamard": Structured(Hadamard(pair(5, 12, 10), pair(6, 12, 10)), 2.0),
    "difference": Structured(full(7, 12, 5, 2), 0.25),
}


@pytest.mark.parametrize("update", CASES.values(), ids=CASES)
@pytest.mark.parametrize("slices", [1, 2])
def test_d_is_the_update_and_its_bits_do_not_depend_on_the_cut(update, slices):
    D = update_matrix([(0.5, update)], slices=slices)
    whole = D.rows(0, 12)
    assert whole.dtype == np.float32
    exact = 0.5 * update.dense()
    assert np.abs(whole - exact).max() < 8 * SINGLE * np.abs(exact).max()
    np.testing.assert_array_equal(np.vstack([D.rows(i, i + 1) for i in range(12)]), whole)
    np.testing.assert_array_equal(np.vstack([D.rows(0, 5), D.rows(5, 12)]), whole)
    np.testing.assert_array_equal(D.T.rows(0, 10).T, whole)
    np.testing.assert_array_equal(np.hstack([D.T.rows(i, i + 1).T for i in range(10)]), whole)
    out = np.full((4, 10), np.nan, np.float32)
    assert D.rows(3, 7, out=out) is out
    np.testing.assert_array_equal(out, whole[3:7])


def test_terms_add_up():
    terms = [(1.0, CASES["pair"]), (-2.0, CASES["hadamard"]), (0.5, pair(9, 12, 10)), (3.0, CASES["difference"])]
    D = update_matrix(terms, slices=2).rows(0, 12)
    exact = sum(weight * one.dense() for weight, one in terms)
    assert np.abs(D - exact).max() < 16 * SINGLE * np.abs(exact).max()
    np.testing.assert_array_equal(update_matrix(terms, slices=2).T.rows(0, 10).T, D)
