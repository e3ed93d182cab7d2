"""W + B A as a diagonal plus a product, and all of its leading triplets."""

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from loralens.linalg import Device, lanczos, leading_triplets
from loralens.linalg.lanczos import Decomposed, RankUpdate, decompose, rank_update
from tests.draws import draw_basis, draw_factors
from tests.marks import examples
from tests.tolerances import LANCZOS, ORTHONORMAL, SCORE

SHAPES = [(30, 30), (50, 30), (30, 50), (1, 7), (7, 1), (40, 3), (3, 40)]


def exact(W):
    """The SVD of W with its vectors in float64."""
    U, s, Vh = np.linalg.svd(W, full_matrices=False)
    return Decomposed(U, s, Vh.T)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("r", [1, 4])
def test_the_identity_holds_in_every_shape(shape, r):
    rng = np.random.default_rng(0)
    W, (B, A) = rng.standard_normal(shape), draw_factors(rng, *shape, r)
    seen = rank_update(exact(W), B, A)
    left, right = (side.columns(np.eye(n)) for side, n in zip(seen[1:], seen.matrix.shape, strict=True))
    np.testing.assert_allclose(left @ seen.matrix.dense() @ right.T, W + B @ A, atol=1e-13)
    for X in (left, right):
        np.testing.assert_allclose(X.T @ X, np.eye(X.shape[1]), atol=ORTHONORMAL)
    assert sum(seen.matrix.shape) <= sum(min(shape) + np.array([0, min(r, abs(shape[0] - shape[1]))]))


def test_what_lies_in_the_span_already_extends_nothing():
    rng = np.random.default_rng(0)
    W = rng.standard_normal((50, 20))
    inside = W @ rng.standard_normal((20, 2))
    B = np.hstack([inside, rng.standard_normal((50, 1)), inside[:, :1]])
    seen = rank_update(exact(W), B, rng.standard_normal((4, 20)))
    assert seen.left.extension.shape == (50, 1)
    assert np.abs(seen.left.basis.T @ seen.left.extension).max() < ORTHONORMAL


def test_a_basis_rounded_to_float32_still_gives_the_update_back():
    rng = np.random.default_rng(0)
    basis = draw_basis(rng, 300, 100).astype(np.float32)
    W = Decomposed(basis, np.linspace(2, 1, 100), np.eye(100, dtype=np.float32))
    B = rng.standard_normal((300, 4))
    seen = rank_update(W, B, rng.standard_normal((4, 100)))
    np.testing.assert_allclose(seen.left.columns(seen.matrix.P), B, atol=1e-13)
    assert np.abs(basis.T @ seen.left.extension).max() < ORTHONORMAL


@pytest.mark.parametrize("shape", SHAPES[:3], ids=str)
def test_products_and_counts_are_those_of_the_dense_matrix(shape):
    rng = np.random.default_rng(1)
    m, n = shape
    M = RankUpdate(np.sort(rng.random(25))[::-1], *draw_factors(rng, m, n, 3))
    dense = np.pad(np.diag(M.s), [(0, m - 25), (0, n - 25)]) + M.P @ M.Q
    np.testing.assert_allclose(M.dense(), dense, atol=1e-14)
    x, y = rng.standard_normal(n), rng.standard_normal(m)
    np.testing.assert_allclose(M.times(x), dense @ x, atol=1e-13)
    np.testing.assert_allclose(M.adjoint(y), dense.T @ y, atol=1e-13)
    s = np.linalg.svd(dense, compute_uv=False)
    for value in np.linspace(1e-3, 1.1 * s[0], 60):
        assert M.above(value) == np.count_nonzero(s > value)


@pytest.mark.parametrize("dtype", [np.float64, np.float32, ml_dtypes.bfloat16], ids=str)
def test_torch_finds_the_same(dtype):
    torch = pytest.importorskip("torch")
    W = np.random.default_rng(0).standard_normal((20, 30)).astype(dtype)
    assert_same_svd(W, Device("cuda", torch=torch.device("cpu")))


@pytest.mark.gpu
def test_a_gpu_finds_the_same():
    torch = pytest.importorskip("torch")
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device here")
    assert_same_svd(np.random.default_rng(0).standard_normal((300, 200)).astype(np.float32), Device.of("cuda"))


def assert_same_svd(W, device):
    one, two = decompose(W), decompose(W, device)
    assert [part.dtype for part in one] == [part.dtype for part in two]
    np.testing.assert_allclose(two.s, one.s, rtol=1e-12)
    signs = np.sign(np.sum(one.U * two.U, axis=0))
    np.testing.assert_allclose(two.U * signs, one.U, atol=SCORE)
    np.testing.assert_allclose(two.V * signs, one.V, atol=SCORE)


@st.composite
def updates(draw):
    """A diagonal plus a product: spectra with ties, zeros and outliers, updates from nothing to a hundredfold."""
    m, n = draw(st.integers(1, 40)), draw(st.integers(1, 40))
    r = draw(st.integers(0, 6))
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    kind = draw(st.sampled_from(["random", "equal", "deficient", "outliers", "zero"]))
    s = np.sort(rng.random(min(m, n)))[::-1]
    s = {
        "random": s,
        "equal": np.ones_like(s),
        "deficient": np.where(np.arange(s.size) < 3, s, 0.0),
        "outliers": np.where(np.arange(s.size) < 2, 100 * s, s),
        "zero": 0 * s,
    }[kind]
    size = draw(st.sampled_from([0.0, 1e-9, 1e-2, 1.0, 100.0]))
    P, Q = draw_factors(rng, m, n, r)
    return RankUpdate(s, size * P, Q)


@examples(150)
@given(updates(), st.integers(1, 12))
def test_leading_triplets_are_all_there_and_satisfy_their_equations(M, k):
    k = min(k, *M.shape)
    found = leading_triplets(M, k)
    dense = M.dense()
    size = max(np.linalg.norm(dense, 2), 1e-300)
    np.testing.assert_allclose(found.s, np.linalg.svd(dense, compute_uv=False)[:k], atol=LANCZOS * size)
    assert np.abs(dense @ found.Z - found.Y * found.s).max() <= LANCZOS * size
    assert np.abs(dense.T @ found.Y - found.Z * found.s).max() <= LANCZOS * size
    for X in (found.Y, found.Z):
        np.testing.assert_allclose(X.T @ X, np.eye(k), atol=1e-12)


@pytest.mark.some(2)
@pytest.mark.parametrize("shape", [(700, 700), (700, 900), (900, 700)], ids=str)
@pytest.mark.parametrize(("copies", "k"), [(1, 8), (8, 4), (8, 5), (8, 8)])
def test_large_ones_converge_before_the_end_and_miss_no_copy(shape, copies, k):
    """A repeated value is what Lanczos alone misses; the count finds it."""
    s = np.linspace(1, 0, 700)
    s[:copies] = 2.0
    P, Q = draw_factors(0, *shape, 2)
    M = RankUpdate(s, 0.02 * P, Q)
    expected = np.linalg.svd(M.dense(), compute_uv=False)
    found = leading_triplets(M, k)
    assert copies > 1 or found.method == "lanczos"
    assert found.tied == (copies > 5)  # an update of rank 2 moves two copies up and two down, and leaves the others
    np.testing.assert_allclose(found.s, expected[:k], atol=LANCZOS * expected[0])


def test_a_tie_counts_with_the_next_value_too():
    P, Q = np.zeros((20, 1)), np.zeros((1, 20))
    P[10:], Q[:, 10:] = 0.1, 0.1
    M = RankUpdate(np.concatenate([[3, 2, 2], np.linspace(1, 0.1, 17)]), P, Q)
    assert [leading_triplets(M, k).tied for k in (1, 2, 3, 4)] == [False, True, True, True]


def test_many_directions_are_dense(monkeypatch):
    monkeypatch.setattr(lanczos, "PATIENCE", 100)
    P, Q = draw_factors(0, 600, 600, 2)
    M = RankUpdate(np.linspace(1, 0.999, 600), 1e-3 * P, Q)
    found = leading_triplets(M, 10)
    assert found.method == "dense"
    np.testing.assert_allclose(found.s, np.linalg.svd(M.dense(), compute_uv=False)[:10], atol=LANCZOS)
