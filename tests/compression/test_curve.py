"""The trade-off: what is on the curve is what truncation gives."""

import numpy as np
import pytest

from loralens import Adapter, LowRank, Rule
from loralens.compression import TruncationPlan
from loralens.compression.truncation_plan import rank_curve
from tests.compression.truncation import total_error, truncate
from tests.tolerances import LOSS


@pytest.fixture
def adapter():
    rng = np.random.default_rng(0)
    modules = {}
    for i, (out, in_) in enumerate([(20, 12), (9, 30), (16, 16)]):
        B = rng.standard_normal((out, 6)) * np.logspace(0, -i, 6)
        modules[f"m.{i}.q_proj"] = LowRank(B, rng.standard_normal((6, in_)), 2.0)
    return Adapter(modules=modules)


def size(adapter):
    return 1000 + adapter.nbytes


def test_points_are_truncations(adapter):
    points = rank_curve(TruncationPlan.of(adapter), size=size)
    assert [point.rank for point in points] == [6, 5, 4, 3, 2, 1]
    for point in points:
        after, found = truncate(adapter, Rule("rank", point.rank))
        assert point.uniform.error == pytest.approx(total_error(found), abs=LOSS)
        assert (point.uniform.parameters, point.uniform.bytes) == (after.parameters, size(after))
        assert point.uniform.ranks == (point.rank, point.rank)
        assert point.budget.bytes <= point.uniform.bytes
        assert point.budget.error <= point.uniform.error + LOSS
    assert points[3].budget.error < points[3].uniform.error
    assert points[3].budget.ranks[0] < 3 < points[3].budget.ranks[1]
