"""Error feedback, against the same recursion with every matrix inverted by itself."""

import ml_dtypes
import numpy as np
import pytest

from loralens.merging.feedback import DAMPING, Feedback, corrections, input_directions
from tests.merging.made import Maker
from tests.reference import feedback_rounding
from tests.tolerances import FEEDBACK


def directions(seed, count, rank):
    return np.linalg.qr(np.random.default_rng(seed).standard_normal((count, rank)))[0]


@pytest.mark.parametrize(("count", "rank"), [(20, 1), (40, 5), (6, 6)])
def test_corrections_are_rows_of_the_inverses(count, rank):
    V = directions(1, count, rank)
    found = corrections(V)
    for j in range(count):
        S = V[j:].T @ V[j:] + DAMPING * np.eye(rank)
        np.testing.assert_allclose(found[j], np.linalg.solve(S, V[j]), **FEEDBACK)


@pytest.mark.parametrize("transposed", [False, True])
def test_columns_are_rounded_in_order_with_what_was_lost_before(transposed):
    V = directions(2, 30, 3)
    t = np.random.default_rng(3).standard_normal((8, 30)).astype(np.float32)
    bf16 = np.dtype(ml_dtypes.bfloat16)
    dense = feedback_rounding(t.astype(float), V, lambda x: x.astype(np.float32).astype(bf16).astype(float))
    state = Feedback(V, transposed=transposed)
    rows = t.T if transposed else t
    blocks = [state.round_rows(rows[i : i + 7], i, bf16) for i in range(0, len(rows), 7)]
    found = np.concatenate(blocks)
    found = (found.T if transposed else found).astype(float)
    assert np.mean(found != dense) < 0.01  # float32 sums: a near tie may fall to the other side
    assert np.linalg.norm((found - t) @ V) < 0.2 * np.linalg.norm((t.astype(bf16).astype(float) - t) @ V)


def test_infinite_weights_stay_and_poison_nothing():
    V = directions(4, 10, 2)
    t = np.ones((3, 10), np.float32)
    t[0, 2], t[1, 3] = np.inf, np.nan
    found = Feedback(V, transposed=False).round_rows(t, 0, np.dtype(np.float16)).astype(float)
    assert np.isinf(found[0, 2])
    assert np.isnan(found[1, 3])
    assert np.isfinite(found).sum() == 28


def test_directions_are_those_of_the_inputs():
    make = Maker(1, np.float32)
    one, two = make.pair(6, 20), make.pair(6, 20, rank=3)
    V = input_directions([(1.0, one), (0.5, two)])
    assert V.shape == (20, 5)
    A = np.vstack([one.A, two.A]).astype(float)
    np.testing.assert_allclose(A @ V @ V.T, A, atol=1e-6)
    twice = input_directions([(1.0, one), (1.0, one)])
    assert twice.shape == (20, 2)
