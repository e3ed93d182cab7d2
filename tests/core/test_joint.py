"""Joint: cores are the updates, lifting is exact at every rank, nothing is left of what cancels."""

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from loralens import FormatError, LowRank, ShapeError
from loralens.core import Layout
from loralens.core.joint import Joint
from loralens.linalg.factor import BLOCK, gram, side_by_side, times
from tests import reference
from tests.marks import examples
from tests.strategies import CASES, DTYPES
from tests.tolerances import COMBINED


@st.composite
def updates(draw, most=4):
    """Several updates of one shape, of any ranks, scales, dtypes and awkward factors; some may be missing."""
    m, n = draw(st.integers(1, 20)), draw(st.integers(1, 20))
    found = []
    for _ in range(draw(st.integers(1, most))):
        rng, r = np.random.default_rng(draw(st.integers(0, 2**32 - 1))), draw(st.integers(1, 6))
        B, A = draw(st.sampled_from(CASES))(rng, rng.standard_normal((m, r)), rng.standard_normal((r, n)))
        k = min(B.shape[1], A.shape[0])
        dtype = draw(st.sampled_from(DTYPES))
        scale = draw(st.sampled_from((1.0, 2.0, -0.5, 0.0)))
        found.append(LowRank(B[:, :k].astype(dtype), A[:k].astype(dtype), scale))
    return found


@pytest.mark.slow
@given(updates(), st.integers(0, 2**32 - 1))
@examples(150)
def test_cores_and_lift_are_the_weighted_sum(found, seed):
    w = np.random.default_rng(seed).choice([0.7, -1.0, 2.5, 0.0], len(found))
    joint = Joint.of([*found, None], [*w, 1.0])
    size = sum(np.linalg.norm(u.B.astype(float)) * np.linalg.norm(u.A.astype(float)) * abs(u.scale) for u in found)
    tolerance = COMBINED * max(size, 1e-300)
    Q_B, Q_A = joint.left.columns(), joint.right.columns()
    for update, M in zip(found, joint.cores[:-1], strict=True):
        assert np.linalg.norm(Q_B @ M @ Q_A.T - update.dense()) <= tolerance
    assert not joint.cores[-1].any()
    expected = reference.dense_sum([u.dense() for u in found], w)
    lifted = joint.lift(joint.total(), np.float64)
    assert np.linalg.norm(lifted.dense() - expected) <= tolerance * 3 + joint.floor * len(expected)
    assert lifted.rank <= max(1, sum(u.rank for u in found))


def pair(rng, shape=(30, 20), ranks=(4, 3), dtype=np.float64):
    return [
        LowRank(rng.standard_normal((shape[0], r)).astype(dtype), rng.standard_normal((r, shape[1])).astype(dtype), s)
        for r, s in zip(ranks, (2.0, -0.5), strict=True)
    ]


def test_lift_at_a_lower_rank_is_the_best_and_balanced():
    first, second = pair(np.random.default_rng(0))
    joint = Joint.of([first, second], [0.7, 0.3])
    whole = 0.7 * first.dense() + 0.3 * second.dense()
    lift = joint.to_lift(joint.total())
    assert lift.s.size == 7
    np.testing.assert_allclose(lift.s, np.linalg.svd(whole, compute_uv=False)[:7], rtol=1e-12)
    for k in (1, 3, 7):
        cut = lift.at(k)
        np.testing.assert_allclose(cut.dense(), reference.best_of_rank(whole, k), atol=1e-12)
        np.testing.assert_allclose(np.linalg.norm(cut.B, axis=0), np.linalg.norm(cut.A, axis=1), rtol=1e-12)
    assert not lift.at(9).B[:, 7:].any()


@pytest.mark.parametrize("dtype", [np.float32, ml_dtypes.bfloat16, np.float16])
def test_what_cancels_is_exactly_zero_of_rank_one(dtype):
    update = pair(np.random.default_rng(1), dtype=dtype)[0]
    lifted = (joint := Joint.of([update, update], [0.3, -0.3])).lift(joint.total())
    assert (lifted.rank, lifted.dtype, lifted.scale) == (1, dtype, 1.0)
    assert not lifted.B.any()
    assert not lifted.A.any()


def lengths(update):
    return abs(update.scale) * np.linalg.norm(update.B, axis=0) @ np.linalg.norm(update.A, axis=1)


def test_rank_counts_against_what_was_added_not_against_what_is_left():
    rng = np.random.default_rng(2)
    first, second = pair(rng)
    tiny = LowRank(1e-4 * second.B, second.A)
    joint = Joint.of([first, first, tiny], [1.0, -1.0, 1.0])
    assert joint.decompose(joint.total()).s.size == second.rank
    assert joint.floor == pytest.approx(64 * 2.0**-52 * (2 * lengths(first) + lengths(tiny)), rel=1e-12)


def test_layout_stays_and_inputs_are_not_written_to():
    first, second = pair(np.random.default_rng(4))
    first = LowRank(first.B, first.A, first.scale, layout=Layout("embedding"))
    before = [x.copy() for u in (first, second) for x in (u.B, u.A)]
    joint = Joint.of([None, first, second], [1, 1, 1])
    assert joint.lift(joint.total()).layout == Layout("embedding")
    assert all(np.array_equal(x, y) for x, y in zip(before, (first.B, first.A, second.B, second.A), strict=True))


def test_refusals():
    first, second = pair(np.random.default_rng(5))
    with pytest.raises(ShapeError):
        Joint.of([first, LowRank(second.B[:-1], second.A)], [1, 1])
    huge = LowRank(1e6 * first.B, 1e6 * first.A)
    joint = Joint.of([huge], [1])
    with pytest.raises(FormatError, match="too large"):
        joint.lift(joint.total(), np.float16).B  # noqa: B018
    first.B[0, 0] = np.nan
    with pytest.raises(FormatError, match="NaN"):
        Joint.of([first], [1])


def test_factors_side_by_side_keep_their_memory_order():
    rng = np.random.default_rng(0)
    parts = [rng.standard_normal((BLOCK // 4, r)).astype(t) for r, t in ((5, np.float32), (3, ml_dtypes.bfloat16))]
    expected, T = np.hstack([part.astype(np.float64) for part in parts]), rng.standard_normal((8, 4))
    for factors in (parts, [np.asfortranarray(part) for part in parts], [parts[0], np.asfortranarray(parts[1])]):
        stack = side_by_side(factors)
        assert np.array_equal(stack, expected)
        assert stack.flags.f_contiguous == all(part.flags.f_contiguous for part in factors)
        np.testing.assert_allclose(times(stack, T, np.dtype(np.float64)), expected @ T, atol=1e-12)
        np.testing.assert_allclose(gram(stack), expected.T @ expected, rtol=1e-10, atol=1e-9)
