"""Shared and private energy beside dense projections, and the blocks in which two adapters conflict or agree."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import loralens
from loralens.analysis import interference, pairwise
from loralens.analysis.interacting_pairs import far_cosine, find_interactions
from loralens.linalg.pairwise import SAME
from tests.draws import draw_factors
from tests.reference import divided_energy


def low_rank(rng: np.random.Generator, shape: tuple[int, int], rank: int) -> loralens.LowRank:
    return loralens.LowRank(*draw_factors(rng, *shape, rank), 0.5)


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 2**32 - 1), st.integers(2, 5), st.booleans())
def test_energy_is_divided_as_dense_projections_divide_it(seed: int, count: int, shares: bool) -> None:
    rng = np.random.default_rng(seed)
    shape = tuple(rng.integers(4, 14, 2))
    updates = [low_rank(rng, shape, int(rng.integers(1, 4))) for _ in range(count)]
    if shares:  # the first again, in another gauge and with a direction more
        extra = low_rank(rng, shape, 1)
        B, A = np.hstack([updates[0].B, extra.B]), np.vstack([updates[0].A, extra.A])
        G = rng.standard_normal((len(A), len(A))) + 3 * np.eye(len(A))
        updates.append(loralens.LowRank(B @ G, np.linalg.solve(G, A)))
    adapters = [loralens.Adapter(modules={"layers.0.q": update}) for update in updates]
    found = interference(adapters, pairwise(adapters).modules)
    dense = [update.dense() for update in updates]
    for t, D in enumerate(dense):
        others = [E for i, E in enumerate(dense) if i != t]
        shared, private, d_U, d_V = divided_energy(D, others, SAME)
        assert found.shared[0, t] == pytest.approx(shared, abs=1e-8)
        assert found.private[0, t] == pytest.approx(private, abs=1e-8)
        assert found.shared_chance[0, t] == pytest.approx(d_U * d_V / D.size)
        assert found.private_chance[0, t] == pytest.approx((1 - d_U / D.shape[0]) * (1 - d_V / D.shape[1]))


KINDS = ("self_attn.q_proj", "self_attn.v_proj", "mlp.down_proj")


def conflicting(
    where: dict[tuple[int, str], float],
    blocks: tuple[int, ...] = tuple(range(12)),
    extra: dict[str, float] | None = None,
    size: int = 40,
) -> list[loralens.Adapter]:
    """Two adapters that are cos alike in some modules, and have orthogonal directions elsewhere."""
    first, second = {}, {}
    names = {f"model.layers.{i}.{kind}": where.get((i, kind), 0.0) for i in blocks for kind in KINDS} | (extra or {})
    for name, cosine in names.items():
        B, A = np.zeros((size, 1)), np.zeros((1, size))
        B[0], A[0, 0] = 1, 1
        C = np.zeros((size, 1))
        C[0], C[1] = cosine, (1 - cosine**2) ** 0.5
        first[name], second[name] = loralens.LowRank(B, A), loralens.LowRank(C, A)
    return [loralens.Adapter(modules=first), loralens.Adapter(modules=second)]


def test_contiguous_blocks_become_one_range_and_kinds_come_together() -> None:
    v, q, down = "self_attn.v_proj", "self_attn.q_proj", "mlp.down_proj"
    where = {(i, v): -0.5 for i in (3, 4, 5, 8)} | {(i, q): -0.5 for i in (3, 4, 5)} | {(9, down): 0.6}
    pairs = pairwise(conflicting(where))
    conflicts = find_interactions(pairs, opposing=True)
    assert [(one.location, one.modules, round(one.cosine, 6)) for one in conflicts] == [
        ("blocks 3–5, q_proj, v_proj", 6, -0.5),
        ("block 8, v_proj", 1, -0.5),
    ]
    assert conflicts[0].weight == pytest.approx(-0.5 * 6 / 36)
    assert [one.location for one in find_interactions(pairs, opposing=False)] == ["block 9, down_proj"]


@pytest.mark.parametrize(
    ("cosine", "counts"), [(-0.5, True), (-1.01 * 4 / 12, True), (-0.99 * 4 / 12, False), (0.5, False)]
)
def test_a_fight_is_far_from_chance(cosine: float, counts: bool) -> None:
    pairs = pairwise(conflicting({(1, "self_attn.v_proj"): cosine}, size=12))
    assert far_cosine(pairs) == 4
    assert bool(find_interactions(pairs, opposing=True)) == counts
