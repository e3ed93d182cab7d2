"""Intruder dimensions beside the dense definition, and the edit that shrinks them."""

import numpy as np
import pytest

import loralens
from loralens.analysis import find_intruders, remove_intruders
from loralens.analysis.intruders import replace_modules
from loralens.core import Layout, Scaling
from loralens.linalg.lanczos import Decomposed, decompose
from tests.draws import draw_factors
from tests.reference import intruder_scores, intruders_scaled
from tests.tolerances import SCORE, UPDATED_VALUE

LowRank = loralens.LowRank


def made(shape, r=3, size=0.3, seed=0, **options):
    """W with a falling spectrum, and an update of ``size`` times its norm."""
    rng = np.random.default_rng(seed)
    out, in_ = shape
    W = rng.standard_normal(shape) * np.linspace(3, 1, in_)
    B, A = draw_factors(rng, out, in_, r)
    B *= size * np.linalg.norm(W) / np.linalg.norm(B @ A)
    return W, LowRank(B / 2, A, 2.0, **options)


def assert_as_dense(found, W, module, top=10):
    s, scores = intruder_scores(W, module.dense(), top)
    np.testing.assert_allclose(found.s, s, atol=UPDATED_VALUE * s[0])
    np.testing.assert_allclose(found.scores, scores, atol=SCORE)
    assert found.count == np.count_nonzero(scores < found.threshold)
    share = np.sum(s[scores < found.threshold] ** 2) / np.sum(s**2)
    assert found.energy_share == pytest.approx(share, abs=1e-6)


@pytest.mark.parametrize("shape", [(40, 40), (60, 25), (25, 60), (40, 3), (3, 40)], ids=str)
@pytest.mark.parametrize("size", [1e-3, 0.3, 1.0, 100.0])
@pytest.mark.parametrize("threshold", [0.3, 0.5, 0.9])
def test_counts_and_scores_are_those_of_the_definition(shape, size, threshold):
    W, module = made(shape, size=size)
    assert_as_dense(find_intruders(module, decompose(W), threshold=threshold), W, module)


def test_chance_is_that_of_random_directions():
    W, module = made((60, 25))
    found = find_intruders(module, decompose(W), threshold=0.35)
    rng = np.random.default_rng(0)
    y = rng.standard_normal((4000, 60))
    y /= np.linalg.norm(y, axis=1, keepdims=True)
    scores = np.abs(y @ np.linalg.svd(W, full_matrices=False)[0]).max(axis=1)
    assert found.chance == pytest.approx((scores < 0.35).mean(), abs=0.03)
    assert found.random_score == pytest.approx(np.median(scores), abs=0.01)


# ---------------------------------------------------------------- the edit


def exact(W):
    U, s, Vh = np.linalg.svd(W, full_matrices=False)
    return Decomposed(U, s, Vh.T)


@pytest.mark.parametrize("shape", [(40, 40), (60, 25), (25, 60)], ids=str)
@pytest.mark.parametrize("strength", [0.0, 0.3, 1.7, -1.0])
@pytest.mark.parametrize("scale", [2.0, -0.3, 1e-6])
def test_the_edit_scales_the_intruders_and_nothing_else(shape, strength, scale):
    W, module = made(shape, size=1.0)
    module = LowRank(module.B * 2 / scale, module.A, scale)
    found = find_intruders(module, exact(W))
    assert 0 < found.count < 10
    new = remove_intruders(module, found, strength=strength, dtype=np.float64)
    expected = intruders_scaled(W, module.dense(), found.indices, strength)
    np.testing.assert_allclose(W + new.dense(), expected, atol=1e-11 * found.s[0])
    assert (new.rank, new.scale) == (module.rank + found.count, scale)
    np.testing.assert_array_equal(new.B[:, :3], module.B)


def test_a_module_without_intruders_or_at_full_strength_stays_itself():
    W, module = made((40, 40), size=1e-3)
    assert remove_intruders(module, find_intruders(module, decompose(W)), strength=0.0) is module
    W, module = made((40, 40), size=1.0)
    assert remove_intruders(module, find_intruders(module, decompose(W)), strength=1.0) is module


def test_one_rank_where_one_is_needed():
    small, large = made((6, 5), r=2)[1], made((6, 5), r=4)[1]
    experts = [LowRank(m.B, m.A, m.scale, layout=Layout(kind="experts")) for m in (small, small)]
    adapter = loralens.Adapter(modules={"x[0]": experts[0], "x[1]": experts[1], "y": small, "z": small})
    wide = LowRank(large.B.astype(np.float64), large.A, 2.0, layout=Layout(kind="experts"), scaling=Scaling("given"))
    new = replace_modules(adapter, {"x[1]": wide})
    assert {name: m.rank for name, m in new.items()} == {"x[0]": 4, "x[1]": 4, "y": 2, "z": 2}
    assert new["y"] is small
    np.testing.assert_array_equal(new["x[0]"].dense(), small.dense())
