"""The largest entry of a random direction, against drawn ones and against what is known in closed form."""

from math import acos, asin, pi

import numpy as np
import pytest

from loralens.linalg.chance import largest_entry_chance, largest_entry_median

DRAWS = 10_000


@pytest.mark.some(2)
@pytest.mark.parametrize(("n", "k"), [(3, 3), (5, 2), (8, 8), (30, 10), (100, 100), (384, 384)])
def test_it_is_what_drawing_gives(n, k):
    z = np.random.default_rng(0).standard_normal((DRAWS, n))
    scores = np.abs(z[:, :k]).max(axis=1) / np.linalg.norm(z, axis=1)
    for quantile in (0.05, 0.3, 0.5, 0.9):
        threshold = float(np.quantile(scores, quantile))
        assert largest_entry_chance(n, k, threshold) == pytest.approx(quantile, abs=4 / (2 * DRAWS**0.5))
    assert largest_entry_median(n, k) == pytest.approx(np.median(scores), rel=1e-2)


@pytest.mark.parametrize("threshold", [0.1, 0.5, 0.9])
def test_in_closed_form(threshold):
    assert largest_entry_chance(3, 1, threshold) == pytest.approx(threshold, abs=1e-5)  # Archimedes
    assert largest_entry_chance(2, 1, threshold) == pytest.approx(2 / pi * asin(threshold), abs=1e-3)
    circle = 1 - 4 / pi * acos(threshold) if threshold > 0.5**0.5 else 0.0
    assert largest_entry_chance(2, 2, threshold) == pytest.approx(circle, abs=1e-3)


def test_the_ends():
    assert largest_entry_chance(1, 1, 0.5) == 0.0  # the only direction there is, is W's
    assert largest_entry_chance(1, 1, 1.0) == 0.0
    assert largest_entry_chance(9, 4, 1.0) == 1.0
    assert largest_entry_chance(9, 9, 1 / 3) == pytest.approx(0, abs=1e-9)  # some entry is 1/√n at least
    assert largest_entry_chance(4096, 4096, 0.5) == pytest.approx(1, abs=1e-10)


def test_a_random_direction_of_4096_scores_about_0_059():
    assert largest_entry_median(4096, 4096) == pytest.approx(0.059, abs=0.0005)
