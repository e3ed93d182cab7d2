"""Leading singular triplets: within the stated error of the dense ones, on hard and easy spectra, in any shape."""

import ml_dtypes
import numpy as np
import pytest

from loralens.linalg import Device
from loralens.linalg.randomized import CLEAR, ENOUGH, STEPS, copy_dtype, leading_svd
from tests.draws import draw_basis
from tests.linalg.test_device import DEVICES
from tests.tolerances import ORTHONORMAL, SINGLE_COPY

SHAPE = (700, 640)
RNG = np.random.default_rng(0)
LEFT, RIGHT = (draw_basis(RNG, n, 640) for n in SHAPE)
i = np.arange(1, 641)
SPECTRA = {
    "slow": i**-0.25,
    "steep": 1.0 / i,
    "crowded": np.linspace(2, 0, 640),
    "outliers": np.r_[20, 12, np.linspace(2, 0, 638)],
    "equal": np.r_[3, 3, 3, np.linspace(1, 0, 637)],
    "rank 5": np.where(i <= 5, 1.0 / i, 0),
}


@pytest.fixture(params=DEVICES)
def device(request):
    return DEVICES[request.param]()


@pytest.mark.some(6)
@pytest.mark.parametrize("name", SPECTRA)
@pytest.mark.parametrize("k", [1, 12])
def test_within_the_stated_error(name, k, device):
    s = SPECTRA[name]
    for W, U, V in ((LEFT * s @ RIGHT.T, LEFT, RIGHT), (RIGHT * s @ LEFT.T, RIGHT, LEFT)):
        found = leading_svd(device.put(W, "float32"), k, rng=np.random.default_rng(1), device=device)
        assert 1 <= found.steps <= STEPS
        assert np.all(np.abs(found.s - s[:k]) <= found.error)
        assert np.all(found.s <= s[:k] + SINGLE_COPY * s[0])  # never above the true one
        stated = np.linalg.norm(found.error)
        assert abs(np.linalg.norm(found.s) - np.linalg.norm(s[:k])) <= stated
        assert stated <= 2 * ENOUGH * np.linalg.norm(found.s) or found.steps == STEPS or found.steps * (k + 8) > 200
        residual = np.linalg.norm(W.T @ found.U - found.V * found.s, axis=0)
        np.testing.assert_allclose(found.error, residual, atol=2 * SINGLE_COPY * s[0])
        assert np.all(residual <= found.error)
        np.testing.assert_allclose(W @ found.V, found.U * found.s, rtol=0, atol=4 * SINGLE_COPY * s[0])
        for X in (found.U, found.V):
            np.testing.assert_allclose(X.T @ X, np.eye(k), atol=2 * SINGLE_COPY)
        if name == "steep":
            space = np.linalg.norm(U[:, :k].T @ found.U) ** 2, np.linalg.norm(V[:, :k].T @ found.V) ** 2
            assert min(space) > k * (1 - 1e-6)


def test_small_values_have_a_relative_error_of_their_own():
    """The first step already finds σ₁, which is nearly all of ‖σ‖."""
    s = np.r_[1000, np.linspace(2, 0, 639)]
    W = (LEFT * s @ RIGHT.T).astype(np.float32)
    found = leading_svd(W, 4, rng=np.random.default_rng(1), device=Device())
    assert np.all(found.error <= 2 * CLEAR * found.s)
    np.testing.assert_allclose(found.s, s[:4], rtol=CLEAR / 10)


def test_values_that_are_repeated_as_often_as_wanted_are_all_found():
    s = np.r_[np.full(16, 3.0), np.linspace(1, 0, 624)]
    W = (LEFT * s @ RIGHT.T).astype(np.float32)
    found = leading_svd(W, 16, rng=np.random.default_rng(1), device=Device())
    np.testing.assert_allclose(found.s, 3, rtol=1e-5)


def test_a_copy_in_bfloat16_has_the_same_results(device):
    stored = (LEFT * SPECTRA["slow"] @ RIGHT.T).astype(ml_dtypes.bfloat16)
    dtype = copy_dtype(stored.shape, 4, stored=stored.dtype, device=device)
    assert dtype == ("bfloat16" if device.multiplies_bfloat16 else "float32")
    assert copy_dtype(stored.shape, 4, stored=np.dtype("f2"), device=device) == "float32"
    assert copy_dtype(stored.shape, 4, stored=stored.dtype, device=device, exact=True) == "float64"
    if device.torch is None:
        half, whole = (
            leading_svd(W, 4, rng=np.random.default_rng(7), device=device) for W in (stored, stored.astype(np.float32))
        )
        for mine, other in zip(half, whole, strict=True):
            np.testing.assert_array_equal(mine, other)


@pytest.mark.parametrize("name", SPECTRA)
def test_the_kernel_and_numpy_agree(name, monkeypatch):
    W = (LEFT * SPECTRA[name] @ RIGHT.T).astype(np.float32)
    compiled = leading_svd(W, 4, rng=np.random.default_rng(7), device=Device())
    monkeypatch.setattr("loralens.linalg.device.can_multiply_twice", lambda: False)
    by_numpy = leading_svd(W, 4, rng=np.random.default_rng(7), device=Device())
    assert compiled.steps == by_numpy.steps
    np.testing.assert_allclose(compiled.s, by_numpy.s, rtol=0, atol=SINGLE_COPY * compiled.s[0])


def test_same_seed_same_bits_whatever_the_threads():
    W = (LEFT * SPECTRA["slow"] @ RIGHT.T).astype(np.float32)
    one, many = (leading_svd(W, 4, rng=np.random.default_rng(7), device=Device(threads=n)) for n in (1, 3))
    for first, second in zip(one, many, strict=True):
        np.testing.assert_array_equal(first, second)
    other = leading_svd(W, 4, rng=np.random.default_rng(8), device=Device())
    assert not np.array_equal(other.U, one.U)


def test_small_values_of_a_steep_spectrum_are_kept(device):
    """σ₁₆ is σ₁/10⁶, which float32 copies of W keep to 0.1 %, and the square of that is far below their rounding."""
    s = i**-5.0
    W = device.put(LEFT * s @ RIGHT.T, "float32")
    found = leading_svd(W, 16, rng=np.random.default_rng(1), device=device)
    np.testing.assert_allclose(found.s, s[:16], rtol=5e-3)
    assert found.steps < STEPS


@pytest.mark.parametrize("shape", [(20, 30), (30, 20), (1, 9), (9, 1)])
def test_small_matrices_are_decomposed_exactly(shape, device):
    W = np.random.default_rng(2).standard_normal(shape)
    k = min(shape)
    found = leading_svd(device.put(W, "float64"), 50, rng=np.random.default_rng(0), device=device)
    assert found.steps == 0
    np.testing.assert_allclose(found.s, np.linalg.svd(W, compute_uv=False), rtol=1e-12)
    np.testing.assert_allclose(found.U * found.s @ found.V.T, W, atol=1e-13)
    np.testing.assert_allclose(found.U.T @ found.U, np.eye(k), atol=ORTHONORMAL)
    np.testing.assert_array_equal(found.error, np.zeros(k))


def test_a_zero_matrix_has_zero_values():
    found = leading_svd(np.zeros((600, 600), np.float32), 4, rng=np.random.default_rng(0), device=Device())
    np.testing.assert_array_equal(found.s, np.zeros(4))
    np.testing.assert_array_equal(found.error, np.zeros(4))
