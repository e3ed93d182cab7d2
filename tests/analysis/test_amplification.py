"""Amplification beside dense literal formulas, the paper's arithmetic, random controls and a real trajectory."""

from math import isnan, nan

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import loralens
from loralens import Amplification, FormatError, OptionError, ShapeError
from loralens.analysis import measure_amplification
from loralens.analysis.amplification import count_far
from loralens.core import Weight, weights_of
from loralens.linalg import projection_moments
from loralens.linalg.randomized import Estimate
from tests import bases, strategies
from tests.draws import draw_basis, draw_factors
from tests.formats.files import weights as base_of
from tests.linalg.test_device import torch_device
from tests.marks import examples
from tests.merging.made import streamed
from tests.reference import amplification_row, subspace_phi
from tests.tolerances import AMPLIFIED, SINGLE

CASES = (strategies.plain, strategies.zero_B, strategies.zero_columns, strategies.repeated_columns)


def weight(W, *, transposed=False):
    return Weight("w", streamed(np.ascontiguousarray(W.T) if transposed else W), transposed)


def one(B, A, W, *, scale=1.0, transposed=False, **options) -> Amplification:
    adapter = loralens.Adapter(modules={"m": loralens.LowRank(B, A, scale)})
    return measure_amplification(adapter, {"m": weight(W, transposed=transposed)}, **options)["m"]


@examples(60)
@given(strategies.factor_pairs(cases=CASES), st.sampled_from(strategies.SCALES), st.booleans(), st.integers(0, 99))
def test_every_row_is_that_of_the_dense_formulas(factors, scale, transposed, seed):
    B, A = factors
    W = np.random.default_rng(seed).standard_normal((B.shape[0], A.shape[1])).astype(np.float32)
    found = one(B, A, W, scale=scale, transposed=transposed)
    k, squares = found.s.size, float(np.sum(W.astype(np.float64) ** 2))
    fourths = float(np.sum(np.linalg.svd(W.astype(np.float64), compute_uv=False) ** 4))
    assert len(found.curve) == k <= min(*found.shape, B.shape[1])
    for row in found.curve if k and (np.diff(found.s) < -1e-3 * found.s[0]).all() else found.curve[-1:]:
        delta, projected, top, random = amplification_row(B, A, scale, W, row.rank)
        assert row.delta_norm == pytest.approx(delta, rel=AMPLIFIED)
        assert row.projected_norm == pytest.approx(projected, rel=AMPLIFIED, abs=AMPLIFIED * random)
        assert row.top_norm == pytest.approx(top, rel=AMPLIFIED)
        assert row.random_norm == pytest.approx(random, rel=AMPLIFIED)
        assert row.amplification == pytest.approx(delta / projected, rel=1e3 * AMPLIFIED * max(1, random / projected))
        assert row.excess == pytest.approx(projected / random, rel=AMPLIFIED, abs=AMPLIFIED)
        mean, spread = projection_moments(found.shape, row.rank, squares, fourths)
        if spread > 1e-6 * mean:
            assert row.z == pytest.approx((projected**2 - mean) / spread, rel=1e-6, abs=1e-6)
        assert (row.top_error, row.z_error == 0 or isnan(row.z)) == (0, True)


def test_figure_8_on_both_sides_beside_the_dense_one():
    rng = np.random.default_rng(1)
    W, (B, A) = rng.standard_normal((40, 30)), draw_factors(rng, 40, 30, 4)
    found = one(B, A, W, directions=7)
    top = found.top
    assert top is not None
    U, sigma, Vh = np.linalg.svd(B @ A, full_matrices=False)
    np.testing.assert_allclose(found.directions, sigma[:4] / np.abs(np.diag(U[:, :4].T @ W @ Vh[:4].T)))
    X, s, Yh = np.linalg.svd(W, full_matrices=False)
    assert top.out.shape == top.in_.shape == (4, 7)
    np.testing.assert_allclose(top.s, s[:7], rtol=AMPLIFIED)
    for i in range(1, 5):
        for j in range(1, 8):
            assert top.out[i - 1, j - 1] == pytest.approx(subspace_phi(U, X, i, j), abs=AMPLIFIED)
            assert top.in_[i - 1, j - 1] == pytest.approx(subspace_phi(Vh.T, Yh.T, i, j), abs=AMPLIFIED)
    out, in_ = top.chance((40, 30))
    assert (out[1, 6], in_[3, 2]) == (7 / 40, 4 / 30)


def paper(rank, delta, projected):
    s, overlap = np.zeros(rank), np.zeros((rank, rank))
    s[0], overlap[0, 0] = delta, projected
    return Amplification((12288, 12288), rank, s, overlap, 61.95, Estimate(1.0, 0.0), None, (rank,)).at_rank(rank)


def test_table_7_of_the_paper():
    small, large = paper(4, 6.91, 0.32), paper(64, 3.57, 1.90)
    assert round(small.amplification, 1) == 21.6  # printed 21.5
    assert round(large.amplification, 2) == 1.88  # "around 2"
    assert round(small.random_norm, 4) == 0.0202
    assert round(large.random_norm, 4) == 0.3227  # printed 0.33
    assert round(small.excess, 1) == 15.9
    assert round(large.excess, 1) == 5.9


def test_far_from_chance_is_far_on_both_sides():
    rng = np.random.default_rng(2)
    B, A = (draw_basis(rng, 40, 4) for _ in range(2))
    inside, outside = B @ A.T, np.eye(40) - B @ B.T
    rows = [one(B, A.T, W).at_rank(4) for W in (inside, outside, rng.standard_normal((40, 40)))]
    assert rows[1].z < -3 < 3 < rows[0].z
    assert count_far(rows)[0] == 2


def test_what_is_zero_has_no_factor():
    rng = np.random.default_rng(6)
    (B, A), W = draw_factors(rng, 20, 30, 5), rng.standard_normal((20, 30))
    for top in (True, False):
        nothing = one(0 * B, A, W, top=top)
        assert nothing.curve == ()
        (row,) = nothing.rows
        assert (row.rank, row.delta_norm, row.projected_norm, row.random_norm) == (0, 0, 0, 0)
        assert all(map(isnan, (row.amplification, row.excess, row.z)))
        assert nothing.weight_norm == pytest.approx(np.linalg.norm(W))
        dead = one(B, A, 0 * W, top=top).at_rank(5)
        assert dead.amplification == np.inf
        assert isnan(dead.excess)
        assert isnan(dead.z)
    assert one(0 * B, A, W).top is not None
    assert one(B, A, W, top=False).top is None


@pytest.mark.some(1)
@pytest.mark.parametrize("shape", [(900, 640), (640, 900)])
def test_a_big_weight_within_the_stated_errors(shape):
    """The sketch and the randomised SVD beside the exact path, on NumPy and on torch."""
    rng = np.random.default_rng(8)
    U, _, Vh = np.linalg.svd(rng.standard_normal(shape), full_matrices=False)
    W = (U * 5 * np.arange(1, 641) ** -0.7 @ Vh).astype(ml_dtypes.bfloat16)
    B, A = draw_factors(rng, *shape, 6)
    exact, quick, light = (one(B, A, W, **how) for how in ({"exact": True}, {}, {"top": False}))
    assert (exact.top.exact, quick.top.exact) == (True, False)
    for i in (1, 6):
        truth, row, rough = exact.at_rank(i), quick.at_rank(i), light.at_rank(i)
        assert abs(row.top_norm - truth.top_norm) <= row.top_error < 2e-3 * truth.top_norm
        assert row[:3] == pytest.approx(truth[:3], rel=AMPLIFIED)
        assert abs(row.z - truth.z) <= max(4 * row.z_error, 1e-3 * abs(truth.z))
        assert row.z_error < 0.02 * abs(row.z)  # the leading values are known
        assert abs(rough.z - truth.z) <= 4 * rough.z_error + 0.1 * abs(truth.z)  # few σ hold most of the energy
    np.testing.assert_allclose(quick.top.out, exact.top.out, atol=1e-3)
    np.testing.assert_allclose(quick.top.in_, exact.top.in_, atol=1e-3)
    same = one(B, A, W, threads=3)
    assert same.at_rank(6) == quick.at_rank(6)
    there = one(B, A, W, device=torch_device())
    for first, second in zip(quick.curve, there.curve, strict=True):
        assert first[:2] == pytest.approx(second[:2], rel=SINGLE)
        assert first[2] == pytest.approx(second[2], abs=SINGLE * first.random_norm)
        assert first.z == pytest.approx(second.z, rel=1e-3, abs=1e-3)
    np.testing.assert_allclose(quick.top.out, there.top.out, atol=10 * SINGLE)


@pytest.mark.gpu
def test_on_a_gpu():
    torch = pytest.importorskip("torch")
    if not torch.cuda.is_available():
        pytest.skip("no GPU")
    rng = np.random.default_rng(9)
    for shape in ((900, 640), (300, 200)):
        W, (B, A) = rng.standard_normal(shape).astype(np.float32), draw_factors(rng, *shape, 6)
        for here, there in zip(one(B, A, W).curve, one(B, A, W, device="cuda").curve, strict=True):
            assert here[:3] == pytest.approx(there[:3], rel=SINGLE)
            assert here[5:7] == pytest.approx(there[5:7], rel=SINGLE)


def test_what_is_wrong_says_where():
    rng = np.random.default_rng(13)
    (B, A), W = draw_factors(rng, 20, 30, 5), rng.standard_normal((20, 30))
    with pytest.raises(ShapeError, match="m: "):
        one(B, A, W.T)
    W[3, 4] = nan
    with pytest.raises(FormatError, match="m: the weight holds NaN"):
        one(B, A, W)
    with pytest.raises(OptionError, match="no module matches"):
        one(B, A, W, modules=("other",))
    with pytest.raises(OptionError, match="no device"):
        one(B, A, W, device="tpu")


@pytest.mark.parametrize(
    ("step", "least", "most"), [(100, 0.0845, 0.3384), (400, 0.2374, 1.5243), (750, 0.2886, 2.1009)]
)
def test_a_real_trajectory_rises_without_a_direction(step, least, most, real):
    adapter = loralens.load(real / f"minilm-souravt-ckpt{step}")
    found = measure_amplification(adapter, weights_of(adapter.modules, base_of(bases.real())).modules, top=False)
    rows = [one.at_rank(8) for one in found.values()]
    assert round(min(row.amplification for row in rows), 4) == least
    assert round(max(row.amplification for row in rows), 4) == most
    excess = [row.excess for row in rows]
    assert 0.705 < min(excess) < max(excess) < 1.325
    assert sum(abs(row.z) < 2.5 for row in rows) >= 10
