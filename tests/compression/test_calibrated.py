"""Whitened truncation: against full whitening, beside plain truncation, and where moments are singular."""

import numpy as np
import pytest

from loralens import LowRank
from loralens.compression.calibration import data_error, data_norm, whitened_svd
from tests import reference
from tests.draws import draw_factors
from tests.tolerances import WHITENED


def case(seed, out=14, in_=18, r=5, inputs=200, scale=-1.7, decades=2):
    """A module, inputs of graded directions, gradients."""
    rng = np.random.default_rng(seed)
    module = LowRank(*draw_factors(rng, out, in_, r), scale)
    X = rng.standard_normal((inputs, in_)) * np.logspace(0, -decades, in_)
    g = rng.standard_normal((inputs, out)) * np.logspace(0, -1, out)
    return module, X, g


def moments(module, X, g):
    z, b = X @ module.A.T, g @ module.B
    return z.T @ z / len(X), b.T @ b / len(g)


def plain(module, k):
    U, s, Vh = module.svd()
    return (U[:, :k] * s[:k]) @ Vh[:k]


def best(module, whitened, k):
    """The update of rank k that is nearest on the data."""
    return LowRank(whitened.Q_B.columns() @ whitened.X[:, :k], whitened.Y[:k] @ module.A)


def errors(module, K, update):
    """On the data, of the updates of rank 0, 1, …"""
    return np.array([data_error(module, update(k), K) for k in range(min(module.rank, module.shape[0]) + 1)])


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("two_sided", [False, True])
def test_it_is_full_whitening(seed, two_sided):
    module, X, g = case(seed)
    D, C, G_full = module.dense(), X.T @ X / len(X), g.T @ g / len(g)
    K, G = moments(module, X, g)
    whitened = whitened_svd(module, K, G if two_sided else None)
    for k in range(module.rank + 1):
        expected, s = reference.whitened_truncation(D, C, k, G_full if two_sided else None)
        smaller = best(module, whitened, k)
        assert np.linalg.norm(smaller.dense() - expected) <= WHITENED * np.linalg.norm(D)
        assert whitened.s == pytest.approx(s[: module.rank], rel=WHITENED)
        error = reference.on_data(D - expected, X) / reference.on_data(D, X)
        assert data_error(module, smaller, K) == pytest.approx(error, abs=1e-12)
    assert data_norm(module, K) == pytest.approx(reference.on_data(D, X) / np.sqrt(len(X)))
    assert (whitened.X.shape, whitened.Y.shape, whitened.R_A.shape) == ((5, 5), (5, 5), (5, 5))
    lengths = np.linalg.norm(whitened.Y @ whitened.R_A.T, axis=1)
    np.testing.assert_allclose(lengths, np.linalg.norm(whitened.Y @ module.A, axis=1))


def test_the_error_of_any_other_update():
    module, X, g = case(12)
    K, _ = moments(module, X, g)
    whole = reference.on_data(module.dense(), X)
    for k in range(1, 5):
        smaller = best(module, whitened_svd(module, K), k)
        other = LowRank(smaller.B.astype(np.float32), smaller.A.astype(np.float32), smaller.scale)
        expected = reference.on_data(module.dense() - other.dense(), X) / whole
        assert data_error(module, other, K) == pytest.approx(expected, rel=1e-5)
        usual = LowRank(plain(module, k), np.eye(18))
        expected = reference.on_data(module.dense() - usual.dense(), X) / whole
        assert data_error(module, usual, K) == pytest.approx(expected, rel=1e-10)
    assert data_error(module, module, K) <= 1e-15
    nothing = LowRank(0 * module.B, module.A)
    assert data_error(module, nothing, K) == pytest.approx(1)
    assert data_error(nothing, module, K) == np.inf


@pytest.mark.parametrize("decades", [0, 2])
def test_what_rounding_puts_beside_the_rows_of_a_counts_by_the_length_of_the_inputs(decades):
    """White noise on A: E‖(ΔW − ΔW')x‖² over the noise is that of inputs of the same length, graded or not."""
    module, X, _ = case(16, out=10, in_=300, r=4, inputs=500, decades=decades)
    K, trace = moments(module, X, np.zeros((1, 10)))[0], np.sum(X**2) / len(X)
    rng = np.random.default_rng(17)
    whole, errors = reference.on_data(module.dense(), X), []
    for _ in range(20):
        other = LowRank(module.B, module.A + 0.05 * rng.standard_normal(module.A.shape), module.scale)
        true = reference.on_data(module.dense() - other.dense(), X) / whole
        errors.append((data_error(module, other, K, trace=trace) / true, data_error(module, other, K) / true))
    counted, not_counted = np.sqrt(np.mean(np.square(errors), axis=0))
    assert counted == pytest.approx(1, rel=0.08)
    assert not_counted < 0.4
    seen = LowRank(np.eye(3, 2), np.eye(2, 4))  # of inputs with C = diag(9, 4, 1, 1)
    beside = LowRank(np.eye(3, 2), np.array([[1, 0, 0.5, 0], [0, 1, 0, 2.0]]))
    expected = np.sqrt((0.5**2 + 2**2) / (9 + 4))
    assert data_error(seen, beside, np.diag([9.0, 4.0]), trace=15.0) == pytest.approx(expected, rel=1e-12)
