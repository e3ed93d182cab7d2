"""One pass over a matrix: norm, projection and sketch, on NumPy and torch, in any blocks."""

import ml_dtypes
import numpy as np
import pytest

from loralens import FormatError
from loralens.linalg import Device
from loralens.linalg.randomized import SKETCH, exact_fourth_powers, fourth_powers, gaussian, project
from tests.draws import draw_basis
from tests.linalg.test_device import DEVICES
from tests.tolerances import AMPLIFIED, SINGLE

SHAPES = [(30, 21), (21, 30), (24, 24)]


def blocks(S, rows):
    return ((slice(i, min(i + rows, len(S))), S[i : i + rows]) for i in range(0, len(S), rows))


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", [np.float64, np.float32, np.float16, ml_dtypes.bfloat16])
@pytest.mark.parametrize("device", DEVICES)
def test_it_is_what_it_says_for_any_blocks(shape, dtype, device):
    device = DEVICES[device]()
    rng = np.random.default_rng(0)
    S, L, R = rng.standard_normal(shape).astype(dtype), draw_basis(rng, shape[0], 3), draw_basis(rng, shape[1], 5)
    sketch, dense = gaussian(rng, shape[1]), S.astype(np.float64)
    tolerance = AMPLIFIED if device.torch is None else SINGLE
    for rows in (1, 7, 100):
        whole = device.empty(shape, "float32")
        found = project(blocks(S, rows), L, R, sketch, device=device, out=whole)
        assert found.squares == pytest.approx(np.sum(dense**2), rel=tolerance)
        np.testing.assert_allclose(found.product, L.T @ dense @ R, rtol=tolerance, atol=tolerance)
        np.testing.assert_allclose(
            found.gram, (dense @ sketch).T @ dense @ sketch, rtol=tolerance, atol=100 * tolerance
        )
        np.testing.assert_array_equal(device.numpy(whole), S.astype(np.float32))
    if device.torch is None:
        copy = np.empty(shape, dtype)
        project(blocks(S, 7), L, R, sketch, device=device, out=copy)
        np.testing.assert_array_equal(copy, S)


def test_the_result_does_not_depend_on_the_threads():
    rng = np.random.default_rng(1)
    S = rng.standard_normal((64, 48), np.float32)
    arguments = draw_basis(rng, 64, 4), draw_basis(rng, 48, 4), gaussian(rng, 48)
    one, many = (project(blocks(S, 5), *arguments, device=Device(threads=n)) for n in (1, 4))
    assert one.squares == many.squares
    np.testing.assert_array_equal(one.product, many.product)
    np.testing.assert_array_equal(one.gram, many.gram)


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("threads", [1, 2])
def test_nan_is_refused(bad, threads):
    S = np.ones((4, 4), np.float32)
    S[3, 1], S[3, 2] = bad, -bad
    with pytest.raises(FormatError, match="NaN or Inf"):
        project(blocks(S, 2), np.eye(4)[:, :1], np.eye(4)[:, :1], np.eye(4), device=Device(threads=threads))


def sketched(S, rng):
    nothing = np.zeros((len(S), 0)), np.zeros((S.shape[1], 0))
    sketch = gaussian(rng, S.shape[1])
    return project(blocks(S, 100), *nothing, sketch, device=Device()), sketch


def test_fourth_powers_are_unbiased_with_the_stated_error():
    rng, stated, draws = np.random.default_rng(2), 2 / (SKETCH * (SKETCH + 1)) ** 0.5, 600
    s = np.linspace(0, 2, 300)
    S = draw_basis(rng, 310, 300) * s @ draw_basis(rng, 320, 300).T
    found = [fourth_powers(sketched(S, rng)[0], S.shape) for _ in range(draws)]
    values, truth = np.array([one.value for one in found]), float(np.sum(s**4))
    assert values.std() / truth == pytest.approx(stated, rel=0.2)
    assert values.mean() / truth == pytest.approx(1, abs=4 * stated / draws**0.5)
    errors = np.array([one.error for one in found]) / truth
    assert 1 < truth * np.sqrt(np.mean(errors**2)) / values.std() < 1.5  # a jackknife is on the safe side
    assert np.mean(np.abs(values - truth) < 3 * errors * truth) > 0.97


def test_fourth_powers_stay_within_what_a_spectrum_allows():
    rng, squares = np.random.default_rng(2), 9**2 + 19
    S = draw_basis(rng, 33, 20) * np.r_[9, np.ones(19)] @ draw_basis(rng, 40, 20).T
    values = np.array([fourth_powers(sketched(S, rng)[0], S.shape).value for _ in range(300)])
    assert squares**2 / 33 * (1 - 1e-12) <= values.min() < values.max() <= squares**2 * (1 + 1e-12)


def test_leading_values_take_the_error_away():
    rng = np.random.default_rng(3)
    s = np.r_[9, 7, 5, np.linspace(1, 0.1, 17)]
    V = draw_basis(rng, 40, 20)
    S = draw_basis(rng, 33, 20) * s @ V.T
    found, sketch = sketched(S, rng)
    truth = float(np.sum(s**4))
    estimate = fourth_powers(found, S.shape, leading=(s[:3], V[:, :3].T @ sketch))
    assert estimate.value == pytest.approx(truth, rel=2e-3)
    assert estimate.error < 2e-3 * truth
    everything = fourth_powers(found, (20, 40), leading=(s, V.T @ sketch))
    assert everything.value == pytest.approx(truth, rel=1e-12)
    assert everything.error == 0


@pytest.mark.parametrize("shape", SHAPES)
def test_exact_fourth_powers(shape):
    S = np.random.default_rng(4).standard_normal(shape)
    truth = np.sum(np.linalg.svd(S, compute_uv=False) ** 4)
    for make in DEVICES.values():
        device = make()
        assert exact_fourth_powers(device.put(S, "float64"), device=device) == pytest.approx(truth, rel=1e-12)
