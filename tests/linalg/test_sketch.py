"""The leading part of a matrix that comes in blocks, against its SVD."""

import numpy as np
import pytest

from loralens import FormatError
from loralens.linalg import randomized as sketch
from loralens.linalg.product import column_basis
from loralens.linalg.randomized import low_rank_approximation
from tests.draws import draw_factors
from tests.reference import best_of_rank
from tests.tolerances import ELEMENTWISE, RANGE_FINDER, SMALL_SPACE


def approximation(F, rank, start):
    def fill(first, last, out):
        out[:] = F[first:last]

    return low_rank_approximation(fill, F.shape, rank=rank, start=start, dtype=F.dtype)


def masked(rng, m, n, r, falling):
    B, A = rng.standard_normal((m, r)) * falling ** np.arange(r), rng.standard_normal((r, n))
    D = B @ A
    return np.where(np.abs(D) > np.quantile(np.abs(D), 0.7), D, 0), column_basis(A.T)[0]


@pytest.mark.parametrize("falling", [1.0, 0.7, 0.3])
@pytest.mark.parametrize("shape", [(150, 200), (200, 150), (40, 300), (300, 40)])
def test_the_error_is_nearly_the_smallest_and_is_stated(falling, shape):
    F, start = masked(np.random.default_rng(1), *shape, 12, falling)
    found = approximation(F, 12, start)
    error = np.linalg.norm(F - found.B @ found.A) / np.linalg.norm(F)
    smallest = np.linalg.norm(F - best_of_rank(F, 12)) / np.linalg.norm(F)
    assert found.B.shape == (shape[0], 12)
    assert found.error == pytest.approx(error, rel=1e-9)
    assert smallest * (1 - 1e-9) <= error <= smallest * (1 + RANGE_FINDER)


@pytest.mark.parametrize("shape", [(150, 200), (200, 150)])
def test_more_directions_than_the_start_has(shape):
    F, start = masked(np.random.default_rng(1), *shape, 8, 0.8)
    found = approximation(F, 40, start)
    error, smallest = (np.linalg.norm(F - G) / np.linalg.norm(F) for G in (found.B @ found.A, best_of_rank(F, 40)))
    assert found.B.shape == (shape[0], 40)
    assert found.error == pytest.approx(error, rel=1e-9)
    assert smallest * (1 - 1e-9) <= error <= smallest * (1 + RANGE_FINDER)


def test_a_narrow_matrix_gets_its_svd():
    F, start = masked(np.random.default_rng(2), 60, 30, 8, 1.0)
    found = approximation(F, 8, start)
    np.testing.assert_allclose(found.B @ found.A, best_of_rank(F, 8), atol=SMALL_SPACE * np.linalg.norm(F))
    np.testing.assert_allclose(np.linalg.norm(found.B, axis=0), np.linalg.norm(found.A, axis=1))


@pytest.mark.parametrize("dtype", [np.float64, np.float32])
def test_a_matrix_of_low_rank_comes_back_whole_at_its_rank(dtype):
    rng = np.random.default_rng(3)
    B, A = rng.standard_normal((90, 5)) * 10.0 ** -np.arange(5), rng.standard_normal((5, 120))
    F = (B @ A).astype(dtype)
    found = approximation(F, 20, column_basis(A.T)[0])
    tolerance = SMALL_SPACE if dtype is np.float64 else ELEMENTWISE
    assert found.B.shape[1] == 5
    assert np.linalg.norm(F - found.B @ found.A) <= tolerance * np.linalg.norm(F)
    assert found.error <= tolerance  # measured on the rest, not by a difference of squares


@pytest.mark.parametrize("panel", [1 << 24, 1 << 12])
def test_what_is_left_of_a_matrix_of_many_panels_is_that_of_all_of_them(panel, monkeypatch):
    """Where the rest is too small for a difference of squares it is measured, panel by panel, and added up."""
    monkeypatch.setattr(sketch, "PANEL", panel)  # the second: 20 rows, of 150
    rng = np.random.default_rng(4)
    B, A = draw_factors(rng, 150, 200, 5)
    F = B @ A + 1e-5 * rng.standard_normal((150, 200))
    found = approximation(F, 5, column_basis(A.T)[0])
    error = np.linalg.norm(F - found.B @ found.A) / np.linalg.norm(F)
    assert 0 < error < 1e-4
    assert found.error == pytest.approx(error, rel=1e-9)


def test_zeros_and_numbers_out_of_range():
    start = column_basis(np.ones((100, 1)))[0]
    none = approximation(np.zeros((30, 100), np.float32), 3, start)
    assert (none.B.shape, none.A.shape, none.error) == ((30, 0), (0, 100), 0.0)
    with np.errstate(all="ignore"), pytest.raises(FormatError, match="range"):
        approximation(np.full((30, 100), np.inf, np.float32), 3, start)
