"""What is written for every kind of weight: the dense W' of float64, to one rounding."""

import ml_dtypes
import numpy as np
import pytest

from loralens.linalg.rounding import ulp
from loralens.merging import merge_plan as matrix
from loralens.merging.merge_rounding import MergeRounding
from tests.merging.made import CASES, DTYPES, Maker, adapter, streamed
from tests.merging.merged import merged, plan_merge
from tests.tolerances import MERGED_SINGLE, MERGED_UNITS


def planned(case):
    return plan_merge(case.adapters, case.lazy, **case.options)


def check(found, expected, dtype):
    assert found.shape == expected.shape
    unit = ulp(expected, dtype)
    apart = np.abs(found.astype(np.float64) - expected)
    limit = MERGED_UNITS * unit + MERGED_SINGLE * np.abs(expected).max()
    assert (apart <= limit).all(), float((apart / limit).max())


@pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: np.dtype(dtype).name)
@pytest.mark.parametrize("made", CASES, ids=lambda made: made.__name__)
def test_every_kind_of_weight_is_the_dense_sum_rounded_once(made, dtype):
    case = made(Maker(1, dtype))
    tensors = planned(case).tensors
    assert set(tensors) == set(case.expected)
    for key, tensor in tensors.items():
        found = merged(tensor)
        assert found.dtype == (tensor.base.dtype if tensor.base else tensor.source.dtype)
        check(found, case.expected[key], found.dtype)


@pytest.mark.parametrize("made", CASES, ids=lambda made: made.__name__)
@pytest.mark.parametrize("mode", ["nearest", "stochastic"])
def test_the_cut_into_blocks_changes_no_bit(made, mode, monkeypatch):
    case = made(Maker(3, ml_dtypes.bfloat16))
    rounding = MergeRounding(mode, 5, "key")
    whole = {key: merged(tensor, rounding=rounding) for key, tensor in planned(case).tensors.items()}
    monkeypatch.setattr(matrix, "row_ranges", lambda rows, columns: [(i, i + 1) for i in range(rows)])
    for key, tensor in planned(case).tensors.items():
        np.testing.assert_array_equal(merged(tensor, rounding=rounding), whole[key])


def test_float8_under_scales_is_merged_in_real_numbers_and_rounded_under_the_same_scales():
    make = Maker(5, ml_dtypes.float8_e4m3fn)
    W, one = make.weight(6, 10), make.pair(6, 10, scale=1e-3)
    scale = np.repeat(2.0 ** np.arange(-12.0, -6)[:, None], 10, axis=1).astype(np.float32) * np.float32(1.1)
    adapters = [(adapter({"a": one}), 1.0)]
    tensor = plan_merge(adapters, {"a.weight": streamed(W)}, scales={"a.weight": streamed(scale)}).tensors["a.weight"]
    real = W.astype(np.float64) * scale + one.dense()
    found = merged(tensor)
    assert found.dtype == W.dtype
    limit = 448 * scale.astype(np.float64)
    inside = np.clip(real, -limit, limit)
    unit = ulp(inside / scale, W.dtype) * scale
    assert (np.abs(found.astype(np.float64) * scale - inside) <= 0.51 * unit).all()
    check(merged(tensor, dtype=np.float32), real, np.float32)
    check(merged(tensor, dtype=ml_dtypes.bfloat16), real, ml_dtypes.bfloat16)
