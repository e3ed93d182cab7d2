"""Modules that are read together have the bits that each of them has alone."""

from dataclasses import fields

import ml_dtypes
import numpy as np
import pytest

from loralens import LowRank
from loralens.analysis.checks.blocks import _cuts, _with_steps
from loralens.analysis.readings.batches import NUMBERS, read_modules
from loralens.analysis.readings.module import Factor, ModuleReading, read_module
from loralens.core.lazy import LazyArray
from loralens.errors import FormatError


def drawn(count, m=16, r=4, n=24, dtype=np.float32, seed=0):
    rng = np.random.default_rng(seed)
    return {
        f"layers.{i}.q": LowRank(
            (rng.standard_normal((m, r)) * rng.uniform(0.01, 1, r)).astype(dtype),
            rng.standard_normal((r, n)).astype(dtype),
            float(rng.uniform(-2, 2)),
        )
        for i in range(count)
    }


def bits(factor):
    return [np.asarray(getattr(factor, field.name)).tobytes() for field in fields(Factor)]


def check_same(together: ModuleReading, alone: ModuleReading):
    assert together.module is alone.module
    assert (together.spectrum is None) == (alone.spectrum is None)
    assert (together.B is None, together.A is None) == (alone.B is None, alone.A is None)
    if alone.spectrum:
        assert together.spectrum.s.tobytes() == alone.spectrum.s.tobytes()
        assert (together.spectrum.shape, together.spectrum.rank) == (alone.spectrum.shape, alone.spectrum.rank)
    if alone.B:
        assert bits(together.B) == bits(alone.B)
        assert bits(together.A) == bits(alone.A)


def check_all(modules):
    readings = read_modules(modules)
    assert list(readings) == list(modules)
    for name, module in modules.items():
        check_same(readings[name], read_module(module))


@pytest.mark.parametrize("dtype", [np.float32, np.float16, ml_dtypes.bfloat16, np.float64])
@pytest.mark.parametrize(("m", "r", "n"), [(16, 4, 16), (40, 1, 9), (33, 8, 130), (5, 3, 5), (2, 8, 16)])
def test_readings_have_the_bits_of_each_module_alone(dtype, m, r, n):
    check_all(drawn(9, m, r, n, dtype))


def test_shapes_may_alternate_and_fill_several_batches():
    small, other, large = drawn(3 * NUMBERS // 160), drawn(20, 8, 2, 24, seed=1), drawn(2, 400, 16, 400, seed=2)
    names = [f"m{i}" for i in range(len(small) + len(other) + len(large))]
    check_all(dict(zip(names, [*other.values(), *small.values(), *large.values()], strict=True)))


def test_odd_modules_are_measured_alone():
    modules = drawn(12)
    B, A = (next(iter(modules.values())).B, next(iter(modules.values())).A)

    def unreadable():
        raise FormatError("a damaged file", fix="none")

    nan, dead = B.copy(), B.copy()
    nan[0, 0] = np.nan
    dead[:, 1] = 0
    modules |= {
        "nan": LowRank(nan, A),
        "dead": LowRank(dead, A),
        "zero": LowRank(np.zeros_like(B), A),
        "too large": LowRank(B, A, 1e200),
        "nothing": LowRank(B, A, 0.0),
        "in another order": LowRank(np.asfortranarray(B), A),
        "sparse": LowRank(np.where(np.abs(B) < 0.1, 0, B), np.where(np.abs(A) < 0.3, 0, A)),
        "unreadable": LowRank(LazyArray(unreadable, shape=B.shape, dtype=B.dtype), A),
    }
    check_all(modules)
    assert read_modules({}) == {}


def test_every_module_is_counted_once():
    steps = []
    read_modules(drawn(30) | {"large": next(iter(drawn(1, 400, 16, 400).values()))}, step=steps.append)
    assert sum(steps) == 31


def test_rows_without_steps_are_found_for_all_modules_at_once():
    rng = np.random.default_rng(0)
    lengths = [np.exp(rng.normal(0, 0.15, size=rng.integers(1, 6))) for _ in range(300)]
    lengths += [np.zeros(3), np.array([1.0, 0.0, 1.0])]
    stepped = _with_steps(lengths)
    assert 30 < len(stepped) < 270
    assert not any(_cuts(rows) for i, rows in enumerate(lengths) if i not in stepped)
