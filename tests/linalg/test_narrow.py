"""Rounded factors: their product in float32 is exact, and near that of the factors."""

import numpy as np
import pytest

from loralens.linalg.narrow import NarrowProduct


@pytest.mark.parametrize("rank", [0, 1, 3, 16, 100, 512])
def test_the_product_is_exact_in_any_order_and_close(rank):
    rng = np.random.default_rng(rank)
    B = rng.standard_normal((40, rank)) * np.exp(rng.standard_normal((40, 1)) * 3)
    A = rng.standard_normal((rank, 30)) * 1e-3
    narrow = NarrowProduct.of(B, A)
    left, right = narrow.factors()
    exact = left.astype(np.float64) @ right.astype(np.float64)
    order = rng.permutation(rank)
    total = np.zeros((40, 30), np.float32)
    for j in order:
        total += left[:, j, None] * right[j]
    assert np.array_equal(total, exact)
    assert np.array_equal(left @ right, exact)
    bits = (24 - int(np.ceil(np.log2(max(rank, 1))))) // 2
    bound = 2.0**-bits * (np.abs(B).max(1, initial=0)[:, None] * np.abs(A).sum(0) * 1.01)
    bound += 2.0**-bits * np.abs(A).max(0, initial=0) * np.abs(B).sum(1)[:, None] * 1.01
    assert (np.abs(exact - B @ A) <= bound).all()
    # Two bytes for a number, and two for the power of two of a row or column.
    assert narrow.nbytes == 2 * (40 + 30) * (rank + 1)


def test_rows_beyond_the_range_of_float32_are_0():
    B, A = np.array([[1e-30], [1.0], [1e30]]), np.ones((1, 2))
    left, right = NarrowProduct.of(B, A).factors()
    assert (left @ right).tolist() == [[0, 0], [1, 1], [0, 0]]
