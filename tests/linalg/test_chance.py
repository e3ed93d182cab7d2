"""Moments of the random controls against draws of their definition."""

from functools import lru_cache

import numpy as np
import pytest

from loralens.linalg import overlap_chance, projection_moments
from loralens.linalg.chance import cosine_spread, overlap_spread, overlap_tail, projection_beyond
from tests import reference

DRAWS = 20000
MEAN = 4 / DRAWS**0.5  # four standard errors of a mean, in standard deviations
SPREAD = 0.06  # a standard deviation from so many draws of a moderately heavy-tailed number


def haar(rng, n, k, draws=DRAWS):
    """So many orthonormal bases of k uniform directions of R^n, shape (draws, n, k)."""
    Q, R = np.linalg.qr(rng.standard_normal((draws, n, k)))
    return Q * np.sign(np.diagonal(R, axis1=1, axis2=2))[:, None]


def squares(X):
    """‖X‖_F² of each of them."""
    return (X**2).sum(axis=(1, 2))


@pytest.mark.parametrize(("n", "i", "j"), [(12, 3, 5), (12, 1, 1), (6, 3, 5), (9, 4, 4)])
def test_overlap_of_uniform_subspaces(n, i, j):
    rng = np.random.default_rng(1)
    phi = squares(haar(rng, n, i).swapaxes(1, 2) @ haar(rng, n, j)) / min(i, j)
    spread = overlap_spread(i, j, n)
    assert abs(phi.mean() - overlap_chance(i, j, n)[-1, -1]) < MEAN * spread
    assert abs(phi.std() / spread - 1) < SPREAD


def test_chance_of_the_paper_random_64_in_12288():
    assert round(overlap_chance(64, 64, 12288)[-1, -1], 4) == 0.0052


def test_the_whole_space_overlaps_without_spread():
    assert overlap_chance(4, 4, 4)[-1, -1] == 1
    assert overlap_spread(4, 2, 4) == 0


def test_cosine_of_updates_whose_directions_are_uniform():
    rng, s1, s2 = np.random.default_rng(3), np.array([3.0, 1.0]), np.array([1.0, 0.9, 0.1])
    left, right = (reference.haar_corner(rng, n, (2, 3), (DRAWS,)) for n in (9, 7))
    draws = s1 @ (left * right) @ s2 / (np.linalg.norm(s1) * np.linalg.norm(s2))
    assert abs(np.mean(draws)) < MEAN * cosine_spread((9, 7))
    assert abs(np.std(draws) / cosine_spread((9, 7)) - 1) < SPREAD


@pytest.mark.parametrize("shape", [(30, 20), (20, 30), (8, 8)])
@pytest.mark.parametrize("rank", [1, 3, 8])
def test_projection_of_any_weight(shape, rank):
    rng = np.random.default_rng(4)
    W = rng.standard_normal(shape)
    W[0] *= 4
    s = np.linalg.svd(W, compute_uv=False)
    mean, spread = projection_moments(shape, rank, (s**2).sum(), (s**4).sum())
    left, right = (haar(rng, n, rank, draws=4000) for n in shape)
    draws = squares(left.swapaxes(1, 2) @ W @ right)
    assert abs(draws.mean() - mean) <= 4 * spread / 4000**0.5 + 1e-9 * mean
    if rank == 8 and shape == (8, 8):
        assert spread < 1e-5 * mean  # nothing is left to chance
    else:
        assert abs(draws.std() / spread - 1) < 0.15


@lru_cache(maxsize=1)
def far_bases(rank):
    """Left and right bases of `rank` uniform directions, shapes (DRAWS, 40, rank); they are large, so one is kept."""
    rng = np.random.default_rng(rank)
    return haar(rng, 40, rank), haar(rng, 48, rank)[:, :40]


@pytest.mark.some(3)
@pytest.mark.parametrize("rank", [1, 2, 4])
@pytest.mark.parametrize("s", [np.ones(40), np.linspace(1, 0.05, 40), 1 / np.arange(1, 41.0), np.eye(40)[0]])
def test_how_often_chance_is_far_is_that_of_draws(rank, s):
    mean, spread = projection_moments((40, 48), rank, np.sum(s**2), np.sum(s**4))
    U, V = far_bases(rank)
    z = (squares(U.swapaxes(1, 2) @ (s[:, None] * V)) - mean) / spread
    for far in (2.0, 3.0):
        share = np.mean(np.abs(z) > far)
        assert projection_beyond(mean, spread, far) == pytest.approx(share, rel=0.35, abs=4 * (share / DRAWS) ** 0.5)


def test_three_standard_deviations_are_left_in_two_percent_of_cases_at_rank_one():
    assert projection_beyond(1.0, 2**0.5, 3.0) == pytest.approx(0.0220, abs=1e-4)  # P(χ²₁ > 1 + 3√2)
    assert projection_beyond(1.0, 0.01, 3.0) == pytest.approx(0.0027, abs=1e-4)  # of many squares, nearly Gaussian


@pytest.mark.parametrize("far", [1.0, 3.0, 6.0])
def test_the_tails_of_a_gamma_distribution_are_those_of_scipy(far):
    from scipy.special import gammainc, gammaincc

    for shape in np.geomspace(0.1, 1e6, 60):
        above, below = shape + far * shape**0.5, max(shape - far * shape**0.5, 0.0)
        tails = gammaincc(shape, above) + gammainc(shape, below)
        assert projection_beyond(shape, shape**0.5, far) == pytest.approx(tails, rel=1e-12), shape


@pytest.mark.parametrize(("i", "j", "n"), [(1, 1, 30), (1, 4, 30), (2, 5, 30), (4, 4, 16)])
def test_tail_of_the_overlap_of_uniform_subspaces(i, j, n):
    rng = np.random.default_rng(2)
    phi = squares(haar(rng, n, i).swapaxes(1, 2) @ haar(rng, n, j)) / min(i, j)
    for q in (0.5, 0.9, 0.99):
        assert overlap_tail(np.quantile(phi, q), i, j, n) == pytest.approx(1 - q, rel=0.15)
    assert overlap_tail(1.0, i, j, n) == 0
    assert overlap_tail(0.0, i, j, n) == 1
    assert overlap_tail(1.0, n, j, n) == 1
