"""Checks against the base: names, sizes, and what a merge would lose."""

from dataclasses import replace

import ml_dtypes
import numpy as np
import pytest

import loralens
from loralens import LowRank
from loralens.analysis import merge_effect
from loralens.analysis.base_checks import FIX
from loralens.analysis.merge_effect import Base
from loralens.core import Extra, LazyArray
from loralens.linalg.rounding import sampled_rounding
from tests.analysis.checks.patients import base, diagnose, healthy, trained
from tests.tolerances import SAMPLED_ROUNDING

FIRST = "model.layers.0.self_attn.q_proj"
BF16 = ml_dtypes.bfloat16


def found(adapter, bed, **options):
    return diagnose({"adapter": adapter}, base=bed, **options)


def test_modules_that_the_base_lacks_are_named_and_hide_no_others():
    lacking = ["model.layers.1.self_attn.v_proj", "model.layers.3.self_attn.q_proj"]
    said = found(healthy(), base(healthy(), prefix="language.", ratio=0.003, leave_out=lacking), dtype="bfloat16")
    strays = [one for one in said if one.code == "base-mismatch"]
    assert [(one.level, one.module) for one in strays] == [("error", name) for name in lacking]
    assert all("no weight of this name and shape (48, 40)" in one.evidence for one in strays)
    lossy = {one.module for one in said if one.code == "merge-lossy"}
    assert lossy == set(healthy()) - set(lacking)


def test_another_shape_is_said_with_both_shapes():
    bed = base(healthy())
    wrong = LazyArray.of(np.ones((48, 41), np.float32))
    (said,) = found(healthy(), Base("b", {**bed.tensors, f"{FIRST}.weight": wrong}))
    assert (said.code, said.module) == ("base-mismatch", FIRST)
    assert said.evidence == "(48, 40) here and (48, 41) in the base"


def test_an_update_larger_than_its_weight():
    said = found(healthy(), base(healthy(), ratio=1.5))
    assert {(one.level, one.code) for one in said} == {("warning", "update-dominates")}
    assert len(said) == 8
    assert said[0].evidence == "‖ΔW‖ is 1.5 times ‖W‖"


@pytest.mark.parametrize(
    ("dtype", "asked", "ratio", "code", "level"),
    [
        (BF16, None, 0.003, "merge-lossy", "warning"),
        (BF16, None, 0.001, "below-rounding", "warning"),
        (np.float16, None, 0.0003, "merge-lossy", "warning"),
        (np.float32, None, 0.003, None, ""),  # merged in its own dtype nothing is lost
        (np.float32, "bfloat16", 0.003, "merge-lossy", "warning"),
        (np.float32, "float8_e4m3fn", 0.01, "below-rounding", "warning"),
    ],
)
def test_updates_that_a_merge_would_swallow(dtype, asked, ratio, code, level):
    said = found(healthy(), base(healthy(), dtype=dtype, ratio=ratio), dtype=asked)
    assert {(one.code, one.level) for one in said} == ({(code, level)} if code else set())
    assert len(said) == (8 if code else 0)
    assert all(one.fix == FIX for one in said)


def test_what_a_merge_makes_of_dora_is_not_foretold_from_its_pair():
    adapter = healthy()
    key = f"base_model.model.{FIRST}.lora_magnitude_vector"
    magnitude = Extra("magnitude", FIRST, LazyArray.of(np.ones(48, np.float32)))
    bent = replace(adapter, extra={key: magnitude})
    bed = base(adapter, dtype=BF16, ratio=0.003)
    lossy = {one.module for one in found(bent, bed) if one.code == "merge-lossy"}
    assert lossy == set(adapter) - {FIRST}


def test_a_landing_is_the_full_prediction_within_its_tolerance():
    rng = np.random.default_rng(0)
    B, A = trained(rng, out=400, in_=300)
    adapter = loralens.Adapter(modules={"m": LowRank(B, A, 0.5)})
    bed = base(adapter, dtype=BF16, ratio=0.002)
    weights, strays = merge_effect.find_weights(adapter.modules, bed)
    assert strays == {}
    from loralens.analysis.spectrum import measure_spectrum

    landing = merge_effect.merge_effects(adapter.modules, measure_spectrum(adapter), weights, bed)[0]["m"]
    W, D = weights["m"].read(), adapter["m"].dense()
    full = sampled_rounding(W.ravel(), D.ravel(), size=W.size, norm=np.linalg.norm(D), dtype=BF16)
    assert landing.ratio == pytest.approx(0.002, rel=0.03)
    assert landing.rounding.error == pytest.approx(full.error, rel=SAMPLED_ROUNDING)
    assert landing.rounding.gain == pytest.approx(full.gain, rel=SAMPLED_ROUNDING)
    assert landing.dtype == "bfloat16"


def test_numbers_that_are_none_in_the_base_are_said_and_foretell_nothing():
    bed = base(healthy(), dtype=BF16, ratio=0.003)
    key = f"{FIRST}.weight"
    W = bed.tensors[key].read().copy()
    W[3, 5], W[4, 0] = np.nan, np.inf
    said = found(healthy(), Base("b", {**bed.tensors, key: LazyArray.of(W)}))
    (one,) = (x for x in said if x.code == "base-non-finite")
    assert (one.level, one.module) == ("error", FIRST)
    assert one.evidence == "its weight in the base holds 2 values that are NaN or Inf, of 1920"
    assert FIRST not in {x.module for x in said if x.code == "merge-lossy"}


def test_a_transposed_weight_is_read_as_out_by_in():
    B, A = trained(np.random.default_rng(0), out=48, in_=40)
    adapter = loralens.Adapter(modules={"m": LowRank(B, A)})
    bed = base(adapter, dtype=BF16, ratio=0.003)
    W = bed.tensors["m.weight"].read()
    lying = Base("b", {"m.weight": LazyArray.of(W.T.copy())})
    assert [one.evidence for one in found(adapter, lying)] == [one.evidence for one in found(adapter, bed)]
