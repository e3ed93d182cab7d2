"""‖W‖ and σ₁(W), in either orientation, within the stated error."""

import numpy as np
import pytest

from loralens import FormatError
from loralens.analysis.amplification import weight_norms
from loralens.linalg import Device
from tests.analysis.test_amplification import weight
from tests.linalg.test_device import torch_device
from tests.tolerances import SINGLE


@pytest.mark.parametrize("shape", [(30, 20), (700, 600)])
@pytest.mark.parametrize("transposed", [False, True])
def test_norms_beside_the_dense_ones(shape, transposed):
    W = np.random.default_rng(0).standard_normal(shape)
    told: list[int] = []
    weights = {"a": weight(W, transposed=transposed), "b": weight(0 * W)}
    found = weight_norms(weights, step=told.append)
    assert told == [1] * len(weights)
    one = found["a"]
    assert one.frobenius == pytest.approx(np.linalg.norm(W), rel=1e-12)
    assert abs(one.spectral - np.linalg.norm(W, 2)) <= one.spectral_error + 1e-12
    assert (one.spectral_error == 0) == (min(shape) <= 512)
    assert (found["b"].frobenius, found["b"].spectral, found["b"].spectral_error) == (0, 0, 0)
    assert weight_norms(weights, device=Device(threads=3)) == found
    there = weight_norms(weights, device=torch_device())["a"]
    assert there.frobenius == pytest.approx(one.frobenius, rel=SINGLE)
    assert there.spectral == pytest.approx(one.spectral, rel=SINGLE)


def test_nan_is_refused_with_its_place():
    with pytest.raises(FormatError, match="a: the weight holds NaN"):
        weight_norms({"a": weight(np.full((3, 3), np.nan))})
