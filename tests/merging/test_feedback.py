"""Error feedback, against the same recursion with every matrix inverted by itself."""

import ml_dtypes
import numpy as np
import pytest

from loralens.merging.merge_rounding import DAMPING, Feedback, corrections
from tests.draws import draw_basis
from tests.reference import feedback_rounding
from tests.tolerances import FEEDBACK


@pytest.mark.parametrize(("count", "rank"), [(20, 1), (40, 5), (6, 6)])
def test_corrections_are_rows_of_the_inverses(count, rank):
    V = draw_basis(1, count, rank)
    found = corrections(V)
    for j in range(count):
        S = V[j:].T @ V[j:] + DAMPING * np.eye(rank)
        np.testing.assert_allclose(found[j], np.linalg.solve(S, V[j]), **FEEDBACK)


@pytest.mark.parametrize("transposed", [False, True])
def test_columns_are_rounded_in_order_with_what_was_lost_before(transposed):
    V = draw_basis(2, 30, 3)
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
