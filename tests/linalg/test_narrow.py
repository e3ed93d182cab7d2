"""Coarse products: no order of summation changes them, and they are near the product of the factors."""

import numpy as np
import pytest

from loralens.linalg.exact import NarrowProduct, exact_product


@pytest.mark.parametrize("rank", [0, 1, 3, 16, 100, 512])
def test_the_product_is_exact_in_any_order_and_close(rank):
    rng = np.random.default_rng(rank)
    B = rng.standard_normal((40, rank)) * np.exp(rng.standard_normal((40, 1)) * 3)
    A = rng.standard_normal((rank, 30)) * 1e-3
    narrow = NarrowProduct.rounded(B, A)
    left, right = narrow.factors()
    exact = left.astype(np.float64) @ right.astype(np.float64)
    order = rng.permutation(rank)
    total = np.zeros((40, 30), np.float32)
    for j in order:
        total += left[:, j, None] * right[j]
    assert np.array_equal(total, exact)
    assert np.array_equal(left @ right, exact)
    # Half a unit of an integer is at most this share of the norm of a row of B or a column of A.
    half = 1.01 / (2.0**12 - np.sqrt(rank) / 2 - 1)
    bound = half * np.linalg.norm(B, axis=1)[:, None] * np.abs(A).sum(0)
    bound += half * np.linalg.norm(A, axis=0) * np.abs(B).sum(1)[:, None] * 1.01
    assert (np.abs(exact - B @ A) <= bound).all()
    # Two bytes for a number, and two for the power of two of a row or column.
    assert narrow.nbytes == 2 * (40 + 30) * (rank + 1)


def test_rows_beyond_the_range_of_float32_are_0():
    B, A = np.array([[1e-30], [1.0], [1e30]]), np.ones((1, 2))
    left, right = NarrowProduct.rounded(B, A).factors()
    assert (left @ right).tolist() == [[0, 0], [1, 1], [0, 0]]


@pytest.mark.parametrize("rank", [0, 1, 8, 512])
def test_slices_of_the_exact_product_are_kept_as_they_are(rank):
    rng = np.random.default_rng(rank)
    B = rng.standard_normal((40, rank)) * np.exp(rng.standard_normal((40, 1)) * 50)
    A = rng.standard_normal((rank, 30)) * 1e-200
    piece = exact_product([(1.0, B, A)], slices=2).pieces[0]
    narrow = NarrowProduct.of_slices(piece.B1, piece.A1)
    left, right = narrow.factors()
    assert np.array_equal(left, piece.B1)
    assert np.array_equal(right, piece.A1)
    assert narrow.nbytes == (40 + 30) * (4 * rank + 2)
