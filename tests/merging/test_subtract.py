"""Subtracting without a patch: the base but for what rounding leaves open, and that is counted."""

import numpy as np

from loralens.merging.codec import prepare_merge
from loralens.merging.planning import plan_merge
from loralens.merging.undo import Doubt, subtract_tensor
from tests.merging.made import streamed
from tests.merging.merged import merged
from tests.merging.test_record import gaussian


def restored(case, array):
    (tensor,) = plan_merge(case.adapters, {"a.weight": streamed(array)}, **case.options).tensors.values()
    doubt = Doubt()
    rows = [rows.copy() for rows in subtract_tensor(prepare_merge(tensor), doubt)]
    return np.concatenate(rows), doubt


def merged_of(case):
    (tensor,) = plan_merge(case.adapters, case.lazy, **case.options).tensors.values()
    return merged(tensor)


def test_the_doubts_are_those_found_by_trying_every_float16():
    case = gaussian(0.05, shape=(12, 16), dtype=np.float16)
    everything = np.arange(1 << 16, dtype=np.uint16).view(np.float16)
    everything = everything[np.isfinite(everything)]
    W1 = merged_of(case)
    D = case.adapters[0][0].modules["a"].dense().astype(np.float32)
    _, doubt = restored(case, W1)
    with np.errstate(over="ignore"):
        preimages = np.array([
            len(np.unique(everything[(everything.astype(np.float32) + d).astype(np.float16) == w] + np.float16(0)))
            for w, d in zip(W1.ravel(), D.ravel(), strict=True)
        ])  # fmt: skip
    assert doubt.several == np.count_nonzero(preimages > 1)


def test_another_model_has_entries_that_no_weight_leads_to():
    case = gaussian(0.3, dtype=np.float16)
    _, doubt = restored(case, case.base["a.weight"])
    assert doubt.none > 0
