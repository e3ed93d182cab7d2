"""The thresholds of Gavish & Donoho against their definitions, and against noise."""

import numpy as np
import pytest

from loralens.merging.checkpoint_difference import (
    known_threshold,
    marchenko_pastur_median,
    median_threshold,
    sampled_threshold,
)
from tests import reference
from tests.tolerances import NOISE_EDGE


@pytest.mark.some(1)
@pytest.mark.parametrize("beta", [1.0, 0.5, 0.25, 0.01])
def test_thresholds_are_those_of_the_paper(beta):
    shape = (round(1000 * beta), 1000)
    assert marchenko_pastur_median(beta) == pytest.approx(reference.marchenko_pastur_middle(beta), rel=NOISE_EDGE)
    best = reference.best_threshold(beta)
    assert known_threshold(0.3, shape) == pytest.approx(best * 0.3 * 1000**0.5, rel=NOISE_EDGE)
    assert known_threshold(0.3, shape[::-1]) == known_threshold(0.3, shape)
    middle = reference.marchenko_pastur_middle(beta) ** 0.5
    assert median_threshold(2.0, shape) == pytest.approx(2 * best / middle, rel=NOISE_EDGE)
    largest = 0.3 * sum(side**0.5 for side in shape)  # σ₁ of white noise in a large matrix
    assert sampled_threshold(largest, shape) == pytest.approx(known_threshold(0.3, shape), rel=NOISE_EDGE)


def test_white_noise_stays_below_every_threshold_and_a_direction_above_it_is_seen():
    rng = np.random.default_rng(1)
    N = 0.2 * rng.standard_normal((300, 500))
    s = np.linalg.svd(N, compute_uv=False)
    edges = (known_threshold(0.2, N.shape), median_threshold(np.median(s), N.shape), sampled_threshold(s[0], N.shape))
    for edge in edges:
        assert s[0] < edge < 1.3 * s[0]
    u, v = rng.standard_normal(300), rng.standard_normal(500)
    seen = np.linalg.svd(N + 1.3 * edges[0] * np.outer(u, v) / np.linalg.norm(u) / np.linalg.norm(v), compute_uv=False)
    assert [int((seen > edge).sum()) for edge in edges] == [1, 1, 1]
