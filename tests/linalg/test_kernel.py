"""The compiled pass over a matrix, compared with float64."""

import ml_dtypes
import numpy as np
import pytest

from loralens.linalg import kernel

compiled = pytest.mark.skipif(not kernel.can_multiply_twice(), reason="the kernel was not compiled")


@compiled
@pytest.mark.parametrize("dtype", [ml_dtypes.bfloat16, np.float32])
@pytest.mark.parametrize("shape", [(16, 32), (1, 1), (15, 31), (40, 101), (0, 5), (130, 1000)])
@pytest.mark.parametrize("b", [1, 16, 17, 40])
def test_two_products_of_rows_are_those_of_float64(dtype, shape, b):
    (m, n), rng = shape, np.random.default_rng(shape[1])
    W, X = rng.standard_normal(shape, np.float32).astype(dtype), rng.standard_normal((n, b), np.float32)
    dense = W.astype(np.float64)
    columns, Z = kernel.pad_columns(X), kernel.pad_columns(np.ones((n, b)))
    Y = np.full((m, len(columns) * kernel.PART), np.nan, np.float32)
    kernel.multiply_rows_twice(W, columns, Y, Z)
    np.testing.assert_allclose(Y[:, :b], dense @ X, atol=2e-6 * n)
    np.testing.assert_array_equal(Y[:, b:], 0)
    expected = 1 + dense.T @ Y[:, :b].astype(np.float64)
    np.testing.assert_allclose(kernel.join_parts(Z, n, b).T, expected, rtol=1e-5, atol=1e-5 * n**0.5 * (m + 1))


@compiled
def test_arrays_of_other_sizes_are_refused():
    def floats(*shape):
        return np.zeros(shape, np.float32)

    right = [floats(3, 40), False, 3, 40, floats(1, 64, 16), 16, floats(3, 16), floats(1, 64, 16)]
    assert kernel.compiled.multiply_twice(*right)
    wrong = {
        0: floats(3, 41), 1: True, 2: 4, 3: 2**62, 4: floats(1, 64, 15), 5: 15, 6: floats(2, 16), 7: floats(1, 32, 16),
    }  # fmt: skip
    for place, value in wrong.items():
        with pytest.raises(ValueError, match="sizes"):
            kernel.compiled.multiply_twice(*right[:place], value, *right[place + 1 :])
