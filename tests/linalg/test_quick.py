"""The quick SVD beside the careful one, on factors of every condition."""

import numpy as np
import pytest

from loralens import FormatError
from loralens.linalg import product_svd
from loralens.linalg.product import DIRECTION_FLOOR, quick_svd
from tests.draws import draw_basis


@pytest.mark.parametrize("decades", [0, 2, 4])
@pytest.mark.parametrize("shape", [(60, 40, 8), (5, 40, 8), (40, 5, 8)])
@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_it_agrees_with_the_careful_svd(decades: int, shape: tuple[int, int, int], dtype: str) -> None:
    out, in_, r = shape
    rng = np.random.default_rng(decades)
    mix = draw_basis(rng, r, r)
    B = (rng.standard_normal((out, r)) * np.logspace(0, -decades, r) @ mix).astype(dtype)
    A = rng.standard_normal((r, in_)).astype(dtype)
    U, s, V = quick_svd(B, A, -0.5)
    full = product_svd(B, A)
    expected = 0.5 * full[1][: s.size]
    assert np.allclose(s, expected, atol=1e-7 * expected[0], rtol=0)
    assert s.size == np.count_nonzero(full[1] > DIRECTION_FLOOR * full[1][0])
    for columns in (U, V):
        assert columns.dtype == np.float32
        assert np.allclose(columns.T @ columns, np.eye(s.size), atol=1e-5)
    assert np.allclose((U * s) @ V.T, -0.5 * B.astype("f8") @ A.astype("f8"), atol=1e-5 * s[0])


def test_zero_has_no_directions_and_nan_is_refused() -> None:
    A = np.ones((3, 5), np.float32)
    assert quick_svd(np.zeros((4, 3), np.float32), A).k == 0
    assert quick_svd(np.zeros((4, 3), np.float32), A).U.shape == (4, 0)
    # B and A that are not 0 with a product of 0.
    B, A = np.array([[1.0, 1.0]]), np.array([[1.0, 1.0], [-1.0, -1.0]])
    assert quick_svd(B, A).k == 0 or quick_svd(B, A).s[0] < 1e-7
    with pytest.raises(FormatError, match="NaN or Inf"):
        quick_svd(np.full((4, 3), np.nan), np.ones((3, 5)))
