"""Many small products at once: the bits of each product alone, and what is left to the slower route."""

import ml_dtypes
import numpy as np
import pytest

from loralens.linalg.product import many_singular_values, product_singular_values

SHAPES = [(m, r, n) for r in (1, 2, 3, 8, 17) for m in (1, 4, 16, 33) for n in (2, 17, 40)]
DTYPES = (np.float32, np.float16, np.float64, ml_dtypes.bfloat16)


def drawn(shape, count=5, dtype=np.float32, seed=0):
    """Factors whose columns have lengths of several decades."""
    m, r, n = shape
    rng = np.random.default_rng(seed)
    lengths = 10.0 ** rng.uniform(-3, 2, (count, 1, r))
    B, A = rng.standard_normal((count, m, r)) * lengths, rng.standard_normal((count, r, n))
    return B.astype(dtype), A.astype(dtype)


def check_bits(B, A):
    """The share of products that are settled, after a comparison of their bits with those of each product alone."""
    s, settled = many_singular_values(B, A)
    assert s.shape == (len(B), min(*B.shape[1:], A.shape[2]))
    for i in np.flatnonzero(settled):
        assert s[i].tobytes() == product_singular_values(B[i], A[i]).tobytes(), i
    return settled.mean()


@pytest.mark.parametrize("shape", SHAPES)
def test_each_product_has_the_bits_that_it_has_alone(shape):
    m, r, n = shape
    share = np.mean([check_bits(*drawn(shape, dtype=dtype, seed=k)) for k, dtype in enumerate(DTYPES)])
    # Factors of random numbers are well conditioned where they have clearly more rows than columns.
    assert share == 1 if min(m, n) >= 4 * r else share == 0 if r > min(m, n) else True


def test_what_needs_another_route_is_left_to_it():
    B, A = drawn((16, 4, 16), count=8)
    B[0, :, 1] = 0
    B[1, 3, 2] = np.nan
    A[2, 0, 0] = np.inf
    B[3] *= 1e30
    A[3, 0] *= 1e-30
    B, A = B.astype(np.float64), A.astype(np.float64)
    A[4] *= 1e-120
    B[5, :, 0] *= 1e150
    _, settled = many_singular_values(B, A)
    assert settled.tolist() == [False, False, False, True, False, False, True, True]
    check_bits(B, A)


def test_there_may_be_no_directions_and_no_products():
    assert many_singular_values(np.zeros((3, 4, 0)), np.zeros((3, 0, 5)))[1].tolist() == [False] * 3
    assert many_singular_values(np.zeros((0, 4, 2)), np.zeros((0, 2, 5)))[0].shape == (0, 2)
