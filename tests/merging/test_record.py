"""What a merge says of itself: against the same in numbers of Python, and predictions against what happened."""

from hashlib import sha256

import ml_dtypes
import numpy as np
import pytest

import loralens
from loralens.merging.codec import prepare_merge
from loralens.merging.merge_record import Hashed, MergeRecorder, model_hash, total_entry
from loralens.merging.merge_rounding import MergeRounding
from loralens.merging.planning import plan_merge
from tests.draws import draw_basis, draw_factors
from tests.merging.made import CASES, Case, Maker, adapter, conv1d, streamed
from tests.reference import rounding_gain_and_errors
from tests.tolerances import MEASURED_FIDELITY

BF16 = ml_dtypes.bfloat16


def records(case, *, dtype=None, mode="nearest", **watching):
    found = {}
    for key, tensor in plan_merge(case.adapters, case.lazy, **case.options).tensors.items():
        watch = MergeRecorder(prepare_merge(tensor, dtype=dtype, rounding=MergeRounding(mode, 1, key)), **watching)
        rows = np.concatenate([rows.copy() for rows in watch.blocks()])
        found[key] = rows, watch.record()
    return found


def gaussian(relative, *, shape=(256, 320), dtype=BF16, rank=4, seed=0, lying=False):
    """W of normal entries and an update of that relative size."""
    rng = np.random.default_rng(seed)
    W = (0.02 * rng.standard_normal(shape[::-1] if lying else shape)).astype(dtype)
    B, A = draw_factors(rng, *shape, rank)
    B *= relative * np.linalg.norm(W.astype(float)) / np.linalg.norm(B @ A)
    one = loralens.LowRank(B.astype(np.float32), A.astype(np.float32), 1.0)
    return Case({"a.weight": W}, [(adapter({"a": one}), 1.0)], {}, {"conv1d": lying})


@pytest.mark.parametrize("relative", [0.002, 0.03])
@pytest.mark.parametrize("lying", [False, True])
@pytest.mark.parametrize("mode", ["nearest", "stochastic", "feedback"])
def test_fidelity_is_what_the_definition_says(relative, lying, mode):
    case = gaussian(relative, lying=lying, shape=(48, 80))
    ((rows, record),) = records(case, mode=mode).values()
    (one,) = record.fidelity
    update = case.adapters[0][0].modules["a"]
    W = case.base["a.weight"]
    V = np.linalg.qr(update.A.T.astype(float))[0]
    W, rows = (W.T, rows.T) if lying else (W, rows)
    gain, error, still, inside = rounding_gain_and_errors(W, rows, update.dense(), V)
    assert one.gain == pytest.approx(gain, rel=MEASURED_FIDELITY)
    assert one.error == pytest.approx(error, rel=MEASURED_FIDELITY)
    assert one.subspace_error == pytest.approx(inside, rel=1e-3)
    assert (one.unmoved, one.entries, one.overflowed) == (still, W.size, 0)
    assert one.norm == pytest.approx(np.linalg.norm(update.dense()), rel=MEASURED_FIDELITY)
    assert one.directions == 4


def test_surviving_directions_stand_above_the_noise_that_was_measured():
    """σ above the root mean square of what was lost, times (m n)^(1/4): two of four, one far below."""
    rng = np.random.default_rng(2)
    W = rng.standard_normal((48, 80)).astype(BF16)
    U, V = (draw_basis(rng, n, 4) for n in (48, 80))
    s = np.array([0.5, 0.2, 4e-3, 1e-3])
    one = loralens.LowRank((U * s).astype(np.float32), V.T.astype(np.float32), 1.0)
    ((rows, record),) = records(Case({"a.weight": W}, [(adapter({"a": one}), 1.0)], {}, {"conv1d": False})).values()
    noise = np.sqrt(np.mean((rows.astype(float) - W.astype(float) - one.dense()) ** 2))
    threshold = noise * W.size**0.25
    assert s[1] > 2 * threshold
    assert noise**2 * W.size**0.25 < s[2] / 2 < threshold / 2  # so that the square of the noise would let it through
    assert record.fidelity[0].surviving == 2


@pytest.mark.parametrize("made", CASES, ids=lambda made: made.__name__)
def test_hashes_are_of_the_bytes_before_and_after(made):
    case = made(Maker(1, np.float16))
    for key, (rows, record) in records(case).items():
        assert record.merged_hash == sha256(rows.tobytes()).hexdigest()
        before = case.base.get(key)
        assert record.base_hash == ("" if before is None else sha256(before.tobytes()).hexdigest())


def test_infinite_and_missing_weights_are_left_out_and_overflow_is_counted():
    make = Maker(1, np.float16, size=1e5)
    case = conv1d(make)
    case.base["a.weight"][3, :2] = [np.inf, np.nan]
    rows, record = records(case)["a.weight"]
    (one,) = record.fidelity
    finite = np.isfinite(case.base["a.weight"].astype(np.float32))
    assert one.overflowed == np.count_nonzero(finite & ~np.isfinite(rows.astype(np.float32))) > 0
    assert np.isfinite([one.gain, one.error, one.norm]).all()


def test_the_hash_of_a_model_knows_every_key_dtype_shape_and_byte():
    one = Hashed(np.dtype(np.float32), (3,), "ab")
    found = {
        model_hash({"n": one}),
        model_hash({"n": one, "o": one}),
        model_hash({"m": one}),
        model_hash({"n": Hashed(np.dtype(np.int32), (3,), "ab")}),
        model_hash({"n": Hashed(np.dtype(np.float32), (3, 1), "ab")}),
        model_hash({"n": Hashed(np.dtype(np.float32), (3,), "ac")}),
    }
    assert len(found) == 6
    assert model_hash({"n": one, "o": one}) == model_hash({"o": one, "n": one})
    assert model_hash({}) is None
    assert model_hash({"n": one, "o": Hashed(np.dtype(np.float32), (3,), "")}) is None
    assert streamed(np.zeros(3)).streams


def test_the_total_of_two_modules_is_that_of_both_matrices_at_once():
    found = [
        next(iter(records(gaussian(relative, seed=seed)).values()))[1] for seed, relative in ((1, 0.002), (2, 0.02))
    ]
    total, parts = total_entry(found), [record.fidelity[0] for record in found]
    energy = sum(one.norm**2 for one in parts)
    assert total["gain"] == pytest.approx(sum(one.gain * one.norm**2 for one in parts) / energy)
    lost = sum((one.error * one.norm) ** 2 for one in parts)
    assert total["relative_error"] == pytest.approx((lost / energy) ** 0.5)
    assert total["unmoved"] == pytest.approx(np.mean([one.unmoved for one in parts]))
