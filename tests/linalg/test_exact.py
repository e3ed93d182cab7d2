"""The product whose bits depend on nothing but its factors."""

from fractions import Fraction
from math import ceil, log2

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from loralens import FormatError, ShapeError
from loralens.linalg.exact import WIDEST, exact_product
from tests import reference
from tests.marks import examples
from tests.strategies import factor_pairs


def graded(seed, m, n, r, decades):
    rng = np.random.default_rng(seed)
    grade = np.logspace(0, -decades, r)
    return (rng.standard_normal((m, r)) * grade).astype(np.float32), (
        rng.standard_normal((r, n)) / grade[:, None]
    ).astype(np.float32)


def by_fractions(s, B, A, slices):
    """The definition in rational arithmetic, entry by entry."""
    B, A = s * B.astype(np.float64), A.astype(np.float64)
    m, r, n = B.shape[0], B.shape[1], A.shape[1]
    t = (53 - ceil(log2(r))) // 2

    def exponent(values):
        return int(np.frexp(max(abs(x) for x in values))[1])

    for k in range(r):
        p = (exponent(B[:, k]) - exponent(A[k])) // 2
        B[:, k], A[k] = B[:, k] / 2.0**p, A[k] * 2.0**p

    def cut(row):
        unit = Fraction(2) ** (exponent(row) - t)
        first = [unit * round(Fraction(x) / unit) for x in row]
        unit /= 2**t
        return first, [unit * round((Fraction(x) - f) / unit) for x, f in zip(row, first, strict=True)]

    rows, columns = [cut(B[i]) for i in range(m)], [cut(A[:, j]) for j in range(n)]

    def dot(x, y):
        return sum((a * b for a, b in zip(x, y, strict=True)), Fraction(0))

    D = np.zeros((m, n))
    for i, (b1, b2) in enumerate(rows):
        for j, (a1, a2) in enumerate(columns):
            total = float(dot(b1, a1))
            if slices == 2:
                total += float(dot(b1, a2) + dot(b2, a1))
            D[i, j] = total
    return D.astype(np.float32)


@pytest.mark.parametrize("slices", [1, 2])
@pytest.mark.parametrize(("r", "decades"), [(1, 0), (3, 0), (8, 3), (9, 12)])
def test_every_bit_is_that_of_the_definition(slices, r, decades):
    B, A = graded(1, 6, 5, r, decades)
    B[2] = 0
    D = exact_product([(-0.7, B, A)], slices=slices).dense()
    assert D.dtype == np.float32
    np.testing.assert_array_equal(D, by_fractions(-0.7, B, A, slices))


@pytest.mark.parametrize("slices", [1, 2])
def test_the_bits_depend_on_no_order_no_block_and_no_library(slices):
    torch = pytest.importorskip("torch")
    B, A = graded(2, 70, 90, 64, 2)
    product = exact_product([(1.3, B, A)], slices=slices)
    D = product.dense()
    np.testing.assert_array_equal(np.vstack([product.rows(i, min(i + 7, 70)) for i in range(0, 70, 7)]), D)
    np.testing.assert_array_equal(product.T.dense().T, D)
    np.testing.assert_array_equal(np.hstack([product.T.rows(i, i + 1).T for i in range(90)]), D)
    mixed = np.random.default_rng(3).permutation(64)
    np.testing.assert_array_equal(exact_product([(1.3, B[:, mixed], A[mixed])], slices=slices).dense(), D)
    (piece,) = product.pieces
    by_torch = torch.from_numpy(piece.B1) @ torch.from_numpy(piece.A1)
    by_hand = np.zeros((70, 90))
    for k in mixed:
        by_hand += np.outer(piece.B1[:, k], piece.A1[k])
    np.testing.assert_array_equal(by_torch.numpy(), by_hand)


@pytest.mark.parametrize(("slices", "error"), [(1, 1e-6), (2, 3e-8)])
def test_opposite_grading_over_twelve_decades_is_kept(slices, error):
    B, A = graded(4, 60, 50, 8, 12)
    exact = reference.dense_product(B, A)
    D = exact_product([(1.0, B, A)], slices=slices).dense()
    assert np.linalg.norm(D - exact) < error * np.linalg.norm(exact)


@given(factor_pairs())
@examples(60)
def test_the_error_of_an_entry_is_what_is_promised(pair):
    B, A = (X.astype(np.float64) for X in pair)
    t = (53 - ceil(log2(B.shape[1]))) // 2
    D = exact_product([(1.0, *pair)]).dense().astype(np.float64)
    b, a = (np.frexp(np.abs(X).max(axis=axis))[1].astype(int) for X, axis in ((B, 0), (A, 1)))
    p = (b - a) // 2
    B, A = np.ldexp(B, -p), np.ldexp(A, p[:, None])
    bound = 2.0**-t * (
        np.abs(B).max(axis=1)[:, None] * np.abs(A).sum(axis=0) + np.abs(B).sum(axis=1)[:, None] * np.abs(A).max(axis=0)
    )
    assert (np.abs(D - B @ A) <= 1.01 * bound + 2.0**-23 * np.abs(B @ A) + 2.0**-149).all()


@pytest.mark.parametrize("slices", [1, 2])
def test_a_rank_index_that_is_zero_on_one_side_changes_no_bit(slices):
    rng = np.random.default_rng(5)
    B, A = 1e-4 * rng.standard_normal((7, 3)), 1e-4 * rng.standard_normal((3, 9))
    alone = exact_product([(1.0, B, A)], slices=slices)
    wider = np.insert(B, 1, 0.0, axis=1), np.insert(A, 1, 1000.0 * rng.standard_normal(9), axis=0)
    with_zero = exact_product([(1.0, *wider)], slices=slices)
    np.testing.assert_array_equal(with_zero.rows(0, 7), alone.rows(0, 7))


def test_several_adapters_are_one_sum():
    first, second = graded(5, 20, 30, 4, 0), graded(6, 20, 30, 7, 0)
    D = exact_product([(2.0, *first), (-0.5, *second)], slices=2).dense()
    exact = 2 * reference.dense_product(*first) - 0.5 * reference.dense_product(*second)
    assert np.linalg.norm(D - exact) < 3e-8 * np.linalg.norm(exact)
    none = exact_product([(1.0, *first), (-1.0, *first)]).dense()
    assert not none.any()


def test_more_rank_than_one_block_holds():
    B, A = graded(7, 12, 11, WIDEST + 3, 0)
    product = exact_product([(1.0, B, A)], slices=2)
    assert len(product.pieces) == 2
    exact = reference.dense_product(B, A)
    assert np.linalg.norm(product.dense() - exact) < 3e-8 * np.linalg.norm(exact)
    np.testing.assert_array_equal(product.T.dense().T, product.dense())


@given(st.integers(0, 2**32 - 1), st.floats(-1e30, 1e30))
@examples(30)
def test_zero_stays_zero_whatever_the_scale(seed, scale):
    rng = np.random.default_rng(seed)
    A = rng.standard_normal((3, 5)).astype(np.float32)
    assert not exact_product([(scale, np.zeros((4, 3), np.float32), A)]).dense().any()


def test_factors_that_do_not_multiply_or_are_not_finite_are_refused():
    B, A = graded(8, 4, 5, 2, 0)
    with pytest.raises(ShapeError, match="cannot be added"):
        exact_product([(1.0, B, A[:1])])
    with pytest.raises(ShapeError, match="cannot be added"):
        exact_product([(1.0, B, A), (1.0, B[:3], A)])
    with pytest.raises(FormatError, match="NaN or Inf"):
        exact_product([(1.0, np.full_like(B, np.inf), A)])


def test_factors_near_the_limits_of_float64_lose_nothing() -> None:
    draws = np.random.default_rng(5)
    B, A = draws.integers(-15, 16, (6, 3)).astype(np.float64), draws.standard_normal((3, 5))
    for slices in (1, 2):
        plain = exact_product([(1.0, B, A)], slices=slices).dense()
        # Subnormal numbers beside some of the largest: 2^-1060 · 2^1020.
        far = exact_product([(1.0, np.ldexp(B, -1060), np.ldexp(A, 1020))], slices=slices).dense()
        assert np.array_equal(far, np.ldexp(plain, -40))
