"""Verdicts: exact, rounded otherwise, partly there, absent; whatever the kind of weight."""

import ml_dtypes
import numpy as np
import pytest

import loralens
from loralens.merging.codec import prepare_merge
from loralens.merging.merge_plan import have_same_values
from loralens.merging.merge_rounding import MergeRounding
from loralens.merging.planning import plan_merge
from loralens.merging.verify import verdicts
from tests.merging.made import CASES, DTYPES, Maker, adapter, linear, resized, streamed, tokens
from tests.merging.merged import merged
from tests.merging.test_record import gaussian

BF16 = np.dtype(ml_dtypes.bfloat16)


def judged(tensor, array, mode="nearest"):
    merge = prepare_merge(tensor, dtype=array.dtype, rounding=MergeRounding(mode, 1, tensor.key))
    return [one.outcome for one in verdicts(merge, streamed(array))]


@pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: np.dtype(dtype).name)
@pytest.mark.parametrize("made", CASES, ids=lambda made: made.__name__)
def test_what_this_merge_writes_is_exact_and_the_base_is_not(made, dtype):
    case = made(Maker(1, dtype))
    for key, tensor in plan_merge(case.adapters, case.lazy, **case.options).tensors.items():
        for one in verdicts(prepare_merge(tensor), streamed(merged(tensor))):
            assert one.different == 0
            assert one.gain == pytest.approx(one.predicted, abs=1e-9)
            assert one.outcome == ("exact" if 0.9 <= one.gain <= 1.1 else "absent" if one.gain < 0.1 else "partial")
            assert one.outcome == "exact" or dtype == ml_dtypes.float8_e4m3fn
        if key in case.base:
            assert set(judged(tensor, case.base[key])) <= {"absent", "partial"}


def the_tensor(relative=0.01, dtype=BF16):
    case = gaussian(relative, shape=(48, 64), dtype=dtype)
    (tensor,) = plan_merge(case.adapters, case.lazy, **case.options).tensors.values()
    W, D = case.base["a.weight"].astype(float), case.adapters[0][0].modules["a"].dense()
    return tensor, W, D


def test_other_roundings_are_rounded():
    tensor, W, D = the_tensor()
    twice = (W.astype(BF16) + D.astype(BF16)).astype(BF16)  # as PEFT does
    assert judged(tensor, twice) == ["rounded"]
    for mode in ("stochastic", "feedback"):
        other = merged(tensor, rounding=MergeRounding(mode, 7, "k"))
        assert judged(tensor, other) == ["rounded"]
        assert judged(tensor, merged(tensor, rounding=MergeRounding(mode, 1, tensor.key)), mode) == ["exact"]


@pytest.mark.parametrize(
    ("strength", "outcome"), [(0.05, "absent"), (0.5, "partial"), (0.95, "partial"), (1.05, "partial"), (2, "partial")]
)
def test_an_update_at_another_strength_is_partial(strength, outcome):
    tensor, W, D = the_tensor(dtype=np.float32)
    assert judged(tensor, (W + strength * D).astype(np.float32)) == [outcome]


def test_what_rounding_enlarges_is_not_exact():
    W, unit = np.ones((4, 4), BF16), np.float32(2**-7)  # one in the last place
    one = loralens.LowRank(np.full((4, 1), 0.6 * unit), np.ones((1, 4), np.float32))
    (tensor,) = plan_merge([(adapter({"a": one}), 1.0)], {"a.weight": streamed(W)}).tensors.values()
    (found,) = verdicts(prepare_merge(tensor), streamed(merged(tensor)))
    assert (found.outcome, found.by_rounding) == ("partial", True)
    assert found.gain == pytest.approx(1 / 0.6)


def test_another_update_is_absent_and_one_more_change_is_counted():
    tensor, W, D = the_tensor()
    assert judged(tensor, (W - D).astype(BF16)) == ["absent"]
    rng = np.random.default_rng(5)
    assert judged(tensor, (W + 1e-4 * rng.standard_normal(W.shape)).astype(BF16)) == ["absent"]
    one = merged(tensor)
    one[3, 3] *= 2
    assert judged(tensor, one) == ["rounded"] or judged(tensor, one) == ["partial"]
    assert verdicts(prepare_merge(tensor), streamed(one))[0].different == 1


def test_replaced_tensors_are_compared_entry_by_entry():
    case = resized(Maker(1, np.float16))
    tensor = plan_merge(case.adapters, case.lazy, **case.options).tensors["e.weight"]
    right = merged(tensor)
    assert judged(tensor, right) == ["exact"]
    wrong = right.copy()
    wrong[0, 0] += 1
    assert judged(tensor, wrong) == ["partial"]
    assert judged(tensor, case.base["e.weight"]) == ["absent"]  # of another shape
    case = tokens(Maker(1, np.float16))
    tensor = plan_merge(case.adapters, case.lazy, **case.options).tensors["e.weight"]
    assert judged(tensor, merged(tensor)) == ["exact"]


def test_same_compares_values_in_the_narrower_dtype():
    W = linear(Maker(1, np.float32)).base["a.weight"]
    assert have_same_values(streamed(W), streamed(W.copy()))
    assert have_same_values(streamed(W), streamed(W.astype(BF16)))
    assert not have_same_values(streamed(W), streamed(W.astype(BF16).astype(np.float32)))
    assert not have_same_values(streamed(W), streamed(W[:-1]))
    assert have_same_values(streamed(np.array(3.0)), streamed(np.array(3.0)))


@pytest.mark.parametrize(("relative", "outcome"), [(0.002, "partial"), (2e-5, "absent")])
def test_what_rounding_swallows_is_not_exact(relative, outcome):
    tensor, _, _ = the_tensor(relative)
    (one,) = verdicts(prepare_merge(tensor), streamed(merged(tensor)))
    assert (one.outcome, one.different, one.by_rounding) == (outcome, 0, True)
    assert one.gain == pytest.approx(one.predicted, abs=1e-12)
    (wide,) = verdicts(prepare_merge(tensor, dtype=np.float32), streamed(merged(tensor, dtype=np.float32)))
    assert (wide.outcome, wide.by_rounding) == ("exact", False)
