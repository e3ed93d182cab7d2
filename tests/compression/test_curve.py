"""The trade-off: what is on the curve is what truncation gives."""

import numpy as np
import pytest

from loralens.compression.bits import allocate_bits, tradeoff
from loralens.compression.curve import curve_ranks, rank_curve
from loralens.compression.loss import total_error
from loralens.compression.plan import TruncationPlan
from loralens.core.adapter import Adapter
from loralens.core.few_bits.quantised import direction_bytes
from loralens.core.lowrank import Layout, LowRank
from loralens.core.ranks import Rule
from loralens.linalg.few_bits.quantise import expected_noise
from tests.compression.truncation import truncate
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


def test_ranks_shown():
    assert curve_ranks(0) == []
    assert curve_ranks(3) == [1, 2, 3]
    assert curve_ranks(40)[-6:] == [16, 20, 24, 28, 32, 40]
    assert curve_ranks(100)[-4:] == [64, 80, 96, 100]


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
        assert point.few_bits is None
    assert points[3].budget.error < points[3].uniform.error
    assert points[3].budget.ranks[0] < 3 < points[3].budget.ranks[1]


def test_bits_buy_more_than_rank_alone(adapter):
    points = rank_curve(TruncationPlan.of(adapter), size=size, header=1000)
    for point in points[1:]:
        assert point.few_bits < point.budget.error
    assert rank_curve(TruncationPlan.of(adapter), size=size, header=10**6)[0].few_bits is None


def test_few_bits_begin_where_one_direction_of_two_bits_for_each_module_fits(adapter):
    spectra = {name: np.linalg.svd(m.dense(), compute_uv=False)[:6] for name, m in adapter.items()}
    least = sum(direction_bytes(m.shape, 2) for m in adapter.modules.values())
    kept = {name: s[0] ** 2 * (1 - expected_noise(2)) for name, s in spectra.items()}
    whole = sum(float(s @ s) for s in spectra.values())
    lowest = rank_curve(TruncationPlan.of(adapter), size=size)[-1].uniform.bytes
    fits = rank_curve(TruncationPlan.of(adapter), size=size, header=lowest - least)
    assert fits[-1].few_bits == pytest.approx(np.sqrt(1 - sum(kept.values()) / whole), rel=LOSS)
    assert rank_curve(TruncationPlan.of(adapter), size=size, header=lowest - least + 1)[-1].few_bits is None
    shapes = {name: m.shape for name, m in adapter.items()}
    for point in fits:
        room = point.uniform.bytes - (lowest - least)
        step = max(direction_bytes(shape, 16) for shape in shapes.values())
        near = 1 + 1e-6  # the curve takes what is saved off the whole, of which little is left at 16 bits
        assert allocate_bits(spectra, shapes, room).error <= point.few_bits * near
        assert room - least < step or point.few_bits <= allocate_bits(spectra, shapes, room - step).error * near


@pytest.mark.parametrize("protect", ["absolute", "relative"])
@pytest.mark.parametrize("kind", ["linear", "experts"])
def test_few_bits_are_weighted_and_shared_as_ranks_are(adapter, protect, kind):
    """Relative: every module counts as if its norm were 1. The experts of a stack have the same bits."""
    names = [f"mlp.experts.up[{i}]" for i in range(3)]
    modules = {
        name: LowRank(m.B * 10.0**i, m.A, m.scale, layout=Layout(kind))
        for i, (name, m) in enumerate(zip(names, adapter.modules.values(), strict=True))
    }
    spectra = {name: np.linalg.svd(m.dense(), compute_uv=False)[:6] for name, m in modules.items()}
    steps = tradeoff(
        spectra,
        {name: m.shape for name, m in modules.items()},
        weights={name: 1 / float(s @ s) for name, s in spectra.items()} if protect == "relative" else None,
        shared=dict.fromkeys(names, "mlp.experts.up") if kind == "experts" else None,
    )
    for point in rank_curve(TruncationPlan.of(Adapter(modules=modules)), protect=protect, size=size, header=1000)[1:]:
        expected = steps.error[steps.nbytes <= point.uniform.bytes - 1000][-1]
        assert point.few_bits == pytest.approx(expected, rel=1e-6)
