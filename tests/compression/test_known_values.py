"""Plans from singular values that are known, and the errors of many modules at once."""

import numpy as np
import pytest

from loralens import Adapter, LowRank
from loralens.compression.plan import TruncationPlan
from loralens.core.lazy import LazyArray
from loralens.core.ranks import Rule
from loralens.errors import FormatError


def drawn(count=5, rank=6, seed=0):
    rng = np.random.default_rng(seed)
    modules = {
        f"layers.{i}.q": LowRank(rng.standard_normal((20, rank)), rng.standard_normal((rank, 30)), -0.5 * i)
        for i in range(count)
    }
    # One direction less than its rank.
    B, A = modules["layers.1.q"].B.copy(), modules["layers.1.q"].A
    B[:, 1] = B[:, 0]
    return Adapter(modules={**modules, "layers.1.q": LowRank(B, A, 2.0)})


def values_of(adapter):
    return {name: module.singular_values() for name, module in adapter.items()}


def without_reading(adapter):
    """The same shapes, with factors that cannot be read."""

    def read():
        raise AssertionError("a factor was read")

    def stub(factor):
        return LazyArray(read, shape=factor.shape, dtype=factor.dtype)

    modules = {
        name: LowRank(stub(module.B), stub(module.A), module.scale, scaling=module.scaling)
        for name, module in adapter.items()
    }
    return Adapter(modules=modules)


def test_the_plan_is_that_of_the_factors_bit_for_bit():
    adapter = drawn()
    plan, other = TruncationPlan.of_values(adapter, values_of(adapter)), TruncationPlan.of(adapter)
    assert list(plan.directions) == list(other.directions)
    for name, directions in other.directions.items():
        assert plan.directions[name].s.tobytes() == directions.s.tobytes(), name
    ranks = plan.ranks(Rule("bytes", adapter.nbytes // 2))
    assert ranks == other.ranks(Rule("bytes", adapter.nbytes // 2))
    for rank in (1, 4, 9):
        ranks = dict.fromkeys(adapter, rank)
        for name, module in plan.at(ranks).items():
            expected = other.at(ranks)[name]
            assert module.B.tobytes() == expected.B.tobytes(), name
            assert module.A.tobytes() == expected.A.tobytes(), name


def test_sizes_and_errors_need_no_factor():
    adapter = drawn()
    plan = TruncationPlan.of_values(without_reading(adapter), values_of(adapter))
    ranks = dict.fromkeys(adapter, 3)
    assert plan.at(ranks).nbytes == TruncationPlan.of(adapter).at(ranks).nbytes == plan.measure("nbytes")(ranks)
    assert plan.losses(ranks) == TruncationPlan.of(adapter).losses(ranks)
    assert plan.bases("layers.0.q") is None


def test_modules_without_values_are_tested_for_numbers_that_are_not_finite():
    adapter, steps = drawn(), []
    values = values_of(adapter)
    del values["layers.3.q"]
    assert list(TruncationPlan.of_values(adapter, values, step=steps.append).directions) == list(values)
    assert sum(steps) == len(adapter)
    B = adapter["layers.3.q"].B.copy()
    B[2, 2] = np.nan
    damaged = Adapter(modules={**adapter.modules, "layers.3.q": LowRank(B, adapter["layers.3.q"].A)})
    with pytest.raises(FormatError, match=r"layers\.3\.q"):
        TruncationPlan.of_values(damaged, values)
