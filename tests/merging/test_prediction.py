"""Predictions of what rounding leaves of an update, beside what it did leave: real weights, and weights like theirs."""

from pathlib import Path

import ml_dtypes
import numpy as np
import pytest

import loralens
from loralens.formats import open_checkpoint
from loralens.linalg.rounding import SAMPLE
from loralens.merging.codec import prepare_merge
from loralens.merging.merge_record import MergeRecorder
from loralens.merging.merge_rounding import MergeRounding
from loralens.merging.planning import plan_merge
from tests import bases
from tests.merging.made import streamed
from tests.merging.test_record import gaussian, records
from tests.tolerances import PREDICTED_ROUNDING

BF16 = ml_dtypes.bfloat16
REAL = ["minilm-souravt-ckpt100", "minilm-souravt-ckpt400", "minilm-souravt-ckpt750", "minilm-souravt-finetuned"]


def close(one):
    """Gain and error within 1 % of what happened, and the share that stays within a point."""
    assert one.predicted_gain == pytest.approx(one.gain, rel=PREDICTED_ROUNDING)
    assert one.predicted_error == pytest.approx(one.error, rel=PREDICTED_ROUNDING)
    assert one.predicted_unmoved == pytest.approx(one.unmoved, abs=PREDICTED_ROUNDING)


def fidelities(update, base, dtype, mode="nearest"):
    """Of every module of an adapter merged into weights that are rounded to ``dtype`` first."""
    rounded = {key: streamed(tensor.read().astype(dtype)) for key, tensor in base.items()}
    for key, tensor in plan_merge([(update, 1.0)], rounded).tensors.items():
        watch = MergeRecorder(prepare_merge(tensor, rounding=MergeRounding(mode, 1, key)), hashes=False, undo=False)
        for _ in watch.blocks():
            pass
        yield from watch.record().fidelity


@pytest.mark.some(1)
@pytest.mark.parametrize("dtype", [BF16, np.float16])
@pytest.mark.parametrize("name", REAL)
def test_on_real_weights_it_is_within_one_percent(name: str, dtype, real: Path) -> None:
    """Where every entry is looked at, nothing is off."""
    update, base = loralens.load(real / name), open_checkpoint(bases.real()).tensors
    found = list(fidelities(update, {k: t for k, t in base.items() if t.dtype == np.float32}, dtype))
    assert len(found) == 12
    for one in found:
        close(one)


@pytest.mark.parametrize("relative", [0.002, 0.01])
def test_a_large_matrix_is_sampled_and_within_one_percent(relative: float) -> None:
    shape = (1500, 2000)
    assert shape[0] * shape[1] > 4 * SAMPLE
    ((_, record),) = records(gaussian(relative, shape=shape), hashes=False, undo=False).values()
    close(record.fidelity[0])


def test_a_sample_pairs_every_weight_with_its_own_update() -> None:
    """Each weight is 1,024 times its update, of which no rounding to bfloat16 leaves anything."""
    case = gaussian(0.01, shape=(1500, 2000))
    case.base["a.weight"] = (1024 * case.adapters[0][0].modules["a"].dense()).astype(BF16)
    ((_, record),) = records(case, hashes=False, undo=False).values()
    assert record.fidelity[0].predicted_unmoved == record.fidelity[0].unmoved == 1


@pytest.mark.parametrize("mode", ["nearest", "stochastic"])
@pytest.mark.parametrize("dtype", [BF16, np.float16])
@pytest.mark.parametrize("relative", [0.2, 2.0])
def test_of_an_update_that_moves_weights_into_other_binades(relative: float, dtype, mode: str) -> None:
    """The unit in the last place of W + D is then that of neither W nor D, which moved the error by 3 to 10 %."""
    case = gaussian(relative, shape=(300, 400))
    case.base["a.weight"] = case.base["a.weight"].astype(dtype)
    ((_, record),) = records(case, mode=mode, hashes=False, undo=False).values()
    one = record.fidelity[0]
    tolerance = 3e-6 if mode == "nearest" else PREDICTED_ROUNDING  # drawn numbers are a sample themselves
    assert one.predicted_error == pytest.approx(one.error, rel=tolerance)
    assert one.predicted_gain == pytest.approx(one.gain, abs=1e-6 if mode == "nearest" else 1e-3)
