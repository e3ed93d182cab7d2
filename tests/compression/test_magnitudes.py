"""DoRA's magnitudes: the nearest merged weight for a truncated direction, on both axes and both ways W may lie."""

import numpy as np
import pytest

from loralens import Adapter, LowRank, Rule
from loralens.compression.truncation_plan import solve_magnitudes
from loralens.core import Extra, Layout, LazyArray, Weight
from loralens.core.together import magnitudes
from tests import reference
from tests.compression.truncation import truncate
from tests.draws import draw_factors
from tests.merging.made import streamed


def dora(*, role="magnitude", transposed=False, kernel=(), dtype=np.float64, flat=False):
    rng = np.random.default_rng(0)
    out, in_ = 7, 6 * max(1, int(np.prod(kernel)))
    W = rng.standard_normal((out, in_))
    layout = Layout("conv", kernel=kernel) if kernel and not flat else Layout()
    module = LowRank(*draw_factors(rng, out, in_, 4), 0.7, layout=layout)
    m = 1 + rng.random(out if role == "magnitude" else 6)
    adapter = Adapter(modules={"a": module}, extra={"a.m": Extra(role, "a", LazyArray.of(m.astype(dtype)))})
    stored = np.ascontiguousarray(W.T) if transposed else W
    return adapter, {"a": Weight("a.weight", streamed(stored), transposed)}, W, m


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize(("role", "axis"), [("magnitude", 0), ("magnitude_in", 1)])
def test_no_other_magnitude_is_nearer(role, axis, transposed, monkeypatch):
    monkeypatch.setattr("loralens.core.weights.BLOCK", 14)
    adapter, weights, W, m = dora(role=role, transposed=transposed)
    after = truncate(adapter, Rule("rank", 1)).adapter
    solved = solve_magnitudes(adapter, after, weights).extra["a.m"].tensor.read()
    old = reference.dora_weight(W + adapter["a"].dense(), m, axis)

    def distance(magnitude):
        return np.linalg.norm(old - reference.dora_weight(W + after["a"].dense(), magnitude, axis))

    assert distance(solved) < distance(m)
    for i in range(m.size):
        for step in (-1e-4, 1e-4):
            other = solved.copy()
            other[i] += step
            assert distance(other) > distance(solved)


@pytest.mark.parametrize("flat", [False, True])  # as LyCORIS stores some kernels
def test_columns_of_a_kernel_belong_to_their_channel(flat):
    adapter, weights, W, m = dora(role="magnitude_in", kernel=(3,), flat=flat)
    after = truncate(adapter, Rule("rank", 1)).adapter
    solved = solve_magnitudes(adapter, after, weights).extra["a.m"].tensor.read()
    first, second = (W + one["a"].dense() for one in (adapter, after))
    V, V_ = (X.reshape(7, 6, 3).transpose(1, 0, 2).reshape(6, -1) for X in (first, second))
    cosine = np.sum(V * V_, 1) / np.linalg.norm(V, axis=1) / np.linalg.norm(V_, axis=1)
    np.testing.assert_allclose(solved, m * cosine, rtol=1e-12)


def test_what_is_the_same_module_keeps_its_magnitude_and_the_dtype_stays():
    adapter, weights, _, _ = dora(dtype=np.float32)
    assert solve_magnitudes(adapter, adapter, {}).extra["a.m"] is adapter.extra["a.m"]
    after = solve_magnitudes(adapter, truncate(adapter, Rule("rank", 1)).adapter, weights)
    assert after.extra["a.m"].tensor.dtype == np.float32
    assert magnitudes(after) == {"a": "a.m"}
