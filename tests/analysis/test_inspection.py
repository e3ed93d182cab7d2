"""What is in an adapter: zeros, NaN and Inf are found in pairs, in forms without a pair, and beside them."""

import ml_dtypes
import numpy as np
import pytest

import loralens
from loralens import OptionError
from loralens.analysis import inspect_adapter
from loralens.analysis.inspection import count_non_finite
from loralens.core import Dense, Extra, Hadamard, Kronecker, LazyArray, Structured
from tests.draws import draw_factors

rng = np.random.default_rng(0)


def dense(array: np.ndarray) -> Dense:
    return Dense(LazyArray.of(array))


def spoilt(array: np.ndarray) -> np.ndarray:
    array = array.copy()
    array[0, 0] = np.nan
    return array


def codes(found: object) -> dict[str, str]:
    return {finding.code: finding.text for finding in found.findings}  # type: ignore[attr-defined]


def test_forms_without_a_pair_are_read_like_pairs() -> None:
    W, small = rng.standard_normal((6, 4)), rng.standard_normal((3, 2))
    pair = loralens.LowRank(*draw_factors(rng, 6, 4, 2))
    dead = loralens.LowRank(0 * pair.B, pair.A)
    modules = {
        "a": Structured(dense(W)),
        "b": Structured(dense(0 * W)),
        "c": Structured(Kronecker(dense(small), dense(0 * small))),
        "d": Structured(Kronecker(dense(spoilt(small)), dense(small))),
        "e": Structured(Hadamard(pair, pair)),
        "f": Structured(Hadamard(pair, dead)),
        "g": pair,
        "h": dead,
        "i": loralens.LowRank(spoilt(pair.B), pair.A),
    }
    found = inspect_adapter(loralens.Adapter(modules=modules))
    assert found.zero == ["b", "c", "f", "h"]
    assert found.parameters == sum(module.parameters for module in modules.values())
    assert codes(found) == {
        "zero-update": "4 of 9 modules do nothing, because their B or A is 0: b, c, f and 1 more",
        "non-finite": "2 hold NaN or Inf: d, i",
    }
    chosen = inspect_adapter(loralens.Adapter(modules=modules), modules=["a", "g"])
    assert (list(chosen.modules), chosen.zero, chosen.findings) == (["a", "g"], [], [])
    with pytest.raises(OptionError, match="no module matches"):
        inspect_adapter(loralens.Adapter(modules=modules), modules=["z"])


def test_tensors_beside_the_pairs_are_read_too() -> None:
    extra = {
        "head": Extra("saved", "head", LazyArray.of(np.array([1, np.inf], np.float16))),
        "ids": Extra("other", "", LazyArray.of(np.array([1, 2]))),
    }
    pair = loralens.LowRank(np.ones((3, 1)), np.ones((1, 2)))
    assert codes(inspect_adapter(loralens.Adapter(modules={"m": pair}, extra=extra))) == {
        "non-finite": "1 hold NaN or Inf: head"
    }


@pytest.mark.parametrize("dtype", [np.float64, np.float16, ml_dtypes.bfloat16, ml_dtypes.float8_e5m2])
def test_values_are_counted_in_any_dtype(dtype: type) -> None:
    assert count_non_finite(np.array([1, np.nan, np.inf, -np.inf, 0], dtype)) == 3
    assert count_non_finite(np.array([1, 0], dtype)) == 0
