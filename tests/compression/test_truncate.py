"""Truncation: Eckart–Young, what is reported against what is true, and what must not change."""

import ml_dtypes
import numpy as np
import pytest

from loralens import Adapter, FormatError, LowRank, OptionError, Rule
from loralens.compression import TruncationPlan
from loralens.core import Dense, Extra, Layout, LazyArray, Structured
from tests.compression.truncation import total_error, truncate
from tests.conftest import small_adapter
from tests.draws import draw_factors
from tests.reference import truncated_error
from tests.tolerances import LOSS

BF16 = np.dtype(ml_dtypes.bfloat16)


def graded(rng, out, in_, rank, *, scale=1.0, decades=2.0, dtype=np.float64, **more):
    B, A = draw_factors(rng, out, in_, rank)
    return LowRank((B * np.logspace(0, -decades, rank)).astype(dtype), A.astype(dtype), scale, **more)


@pytest.fixture
def adapter():
    rng = np.random.default_rng(0)
    shapes = {"q_proj": (30, 20), "v_proj": (10, 20), "down_proj": (20, 50)}
    return Adapter(
        modules={
            f"model.layers.{block}.{kind}": graded(rng, *shape, 6, scale=(-1.5, 2.0)[block], decades=1 + block)
            for block in (0, 1)
            for kind, shape in shapes.items()
        }
    )


@pytest.mark.parametrize("rule", [Rule("rank", 3), Rule("energy", 0.9), Rule("error", 0.1), Rule("sv-ratio", 10)])
def test_what_is_reported_is_what_is_true(adapter, rule):
    after, found = truncate(adapter, rule)
    whole = kept = 0.0
    for name, module in adapter.items():
        D, D_ = module.dense(), after[name].dense()
        true = np.linalg.norm(D - D_) / np.linalg.norm(D)
        assert found[name].relative_error == pytest.approx(true, abs=LOSS)
        assert found[name].spectral_error == pytest.approx(np.linalg.norm(D - D_, 2) / np.linalg.norm(D, 2), abs=LOSS)
        assert found[name].energy_kept == pytest.approx(np.sum(D_**2) / np.sum(D**2), abs=LOSS)
        assert (found[name].rank_before, found[name].rank_after) == (6, after[name].rank)
        np.testing.assert_allclose(found[name].frobenius, np.linalg.norm(D))
        whole, kept = whole + np.sum(D**2), kept + np.sum((D - D_) ** 2)
    assert total_error(found) == pytest.approx((kept / whole) ** 0.5, abs=LOSS)


@pytest.mark.parametrize(("dtype", "share"), [(np.float32, 1e-6), (BF16, 8e-3), (np.float16, 1e-3)])
def test_rounding_is_part_of_what_is_reported(adapter, dtype, share):
    after, found = truncate(adapter, Rule("rank", 6), dtype=dtype)
    for name, module in adapter.items():
        D, D_ = module.dense(), after[name].dense()
        assert after[name].dtype == dtype
        true = np.linalg.norm(D - D_) / np.linalg.norm(D)
        assert 0 < true < share
        assert found[name].relative_error == pytest.approx(true, rel=1e-6)


@pytest.mark.parametrize(
    "rule", [Rule("rank", 6), Rule("rank", 99), Rule("energy", 1.0), Rule("error", 0), Rule("parameters", 1)]
)
def test_what_keeps_its_rank_is_the_same_module(adapter, rule):
    after, found = truncate(adapter, rule)
    assert all(after[name] is module for name, module in adapter.items())
    assert total_error(found) == 0


def test_a_budget_is_kept_and_better_than_one_rank_of_its_size(adapter):
    uniform = truncate(adapter, Rule("rank", 3))
    budget = truncate(adapter, Rule("parameters", uniform.adapter.parameters))
    assert budget.adapter.parameters <= uniform.adapter.parameters
    assert total_error(budget.losses) < 0.9 * total_error(uniform.losses)
    half = truncate(adapter, Rule("parameters", 0.5)).adapter
    cost = min(sum(module.shape) for module in adapter.modules.values())
    assert 0.5 * adapter.parameters - cost < half.parameters <= 0.5 * adapter.parameters
    size = truncate(adapter, Rule("bytes", 5000)).adapter
    assert 5000 - 8 * cost < size.nbytes <= 5000


def test_relative_protection_gives_small_modules_their_share(adapter):
    lopsided = adapter.map(lambda module: module.rescaled(module.scale * (100 if module.shape[0] == 30 else 1),
                                                          module.scaling))  # fmt: skip
    rule = Rule("parameters", 0.4)
    plain, fair = (truncate(lopsided, rule, protect=protect) for protect in ("absolute", "relative"))
    assert total_error(plain.losses) < total_error(fair.losses)
    assert max(loss.relative_error for loss in fair.losses.values()) < max(
        loss.relative_error for loss in plain.losses.values()
    )
    heavy = truncate(lopsided, rule, protect={"v_proj": 1e9}).adapter
    assert {heavy[name].rank for name in heavy if name.endswith("v_proj")} == {6}


def test_dead_modules_keep_a_direction_unless_they_may_go():
    adapter = small_adapter()
    dead = "model.layers.10.self_attn.v_proj"
    assert truncate(adapter, Rule("energy", 0.9)).adapter[dead].rank == 1
    after, found = truncate(adapter, Rule("energy", 0.9), drop_dead=True)
    assert set(adapter) - set(after) == {dead}
    assert after.narrowed
    assert (found[dead].rank_after, found[dead].relative_error) == (0, 0.0)
    bound = Adapter(modules=adapter.modules, extra={"m": Extra("magnitude", dead, LazyArray.of(np.ones(6)))})
    assert dead in truncate(bound, Rule("energy", 0.9), drop_dead=True).adapter
    with pytest.raises(OptionError, match="no module is left"):
        truncate(Adapter(modules={dead: adapter[dead]}), Rule("energy", 0.9), drop_dead=True)


def test_experts_of_a_stack_share_a_rank():
    rng = np.random.default_rng(3)
    modules = {f"m.experts.up[{i}]": graded(rng, 8, 6, 4, decades=i, layout=Layout("experts")) for i in range(3)} | {
        "m.q": graded(rng, 8, 6, 4, decades=3)
    }
    for rule in (Rule("energy", 0.9), Rule("parameters", 0.6)):
        after = truncate(Adapter(modules=modules), rule).adapter
        assert len({after[name].rank for name in after if "experts" in name}) == 1
    alone = [truncate(Adapter(modules={"a": m}), Rule("energy", 0.9)).adapter["a"].rank for m in modules.values()]
    together = truncate(Adapter(modules=modules), Rule("energy", 0.9)).adapter
    assert together["m.experts.up[0]"].rank == max(alone[:3]) > min(alone[:3])


def test_a_grouped_convolution_is_kept_and_an_update_without_factors_becomes_a_pair():
    rng = np.random.default_rng(4)
    conv = graded(rng, 8, 18, 4, layout=Layout("conv", kernel=(3, 3), groups=2))
    full = Structured(Dense(LazyArray.of(rng.standard_normal((9, 7)).astype(np.float32))), 0.5)
    after, found = truncate(Adapter(modules={"conv": conv, "full": full}), Rule("rank", 2))
    assert after["conv"] is conv
    assert isinstance(after["full"], LowRank)
    assert (after["full"].rank, after["full"].dtype) == (2, np.float32)
    assert found["full"].relative_error == pytest.approx(truncated_error(full.dense(), 2)[0], rel=1e-6)


def test_numbers_that_do_not_fit_a_dtype_are_refused_not_written_as_infinity():
    B = 1e6 * np.ones((3, 2), np.float32) * np.array([1, 1e-3], np.float32)
    adapter = Adapter(modules={"a": LowRank(B, np.ones((2, 3), np.float32) * np.array([[1e5], [-1]], np.float32))})
    with pytest.raises(FormatError, match="too large for float16"):
        truncate(adapter, Rule("rank", 1), dtype=np.float16)
    after = TruncationPlan.of(adapter, dtype=np.float16).at({"a": 1})
    with pytest.raises(FormatError, match=r"^a: its factors are too large"):
        after["a"].B.sum()
