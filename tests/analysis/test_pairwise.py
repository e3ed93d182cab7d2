"""Every adapter against every other: beside dense matrices, and the laws that cosines and φ keep."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import loralens
from loralens import MismatchError, OptionError
from loralens.analysis import pairwise
from loralens.analysis.every_pair import cluster_order, connected_groups
from tests.draws import draw_factors
from tests.reference import first_rows_cosine, subspace_phi, whole_cosine, whole_cosine_spread
from tests.tolerances import COLLECTION

SHAPES = {"layers.0.q": (7, 5), "layers.0.v": (4, 9), "layers.1.q": (7, 5)}


def adapter(rng: np.random.Generator, ranks: dict[str, int]) -> loralens.Adapter:
    modules = {}
    for name, rank in ranks.items():
        out, in_ = SHAPES[name]
        B, A = draw_factors(rng, out, in_, rank)
        modules[name] = loralens.LowRank(B.astype(np.float32), A.astype(np.float32), float(rng.choice([2.0, -0.5])))
    return loralens.Adapter(modules=modules)


def collection(seed: int = 0, count: int = 4) -> list[loralens.Adapter]:
    rng = np.random.default_rng(seed)
    return [adapter(rng, {name: int(rng.integers(1, 4)) for name in SHAPES}) for _ in range(count)]


def dense(one: loralens.Adapter) -> list[np.ndarray]:
    return [one[name].dense() for name in SHAPES]


@settings(max_examples=20, deadline=None)
@given(st.integers(0, 2**32 - 1))
def test_numbers_are_those_of_the_dense_updates(seed: int) -> None:
    adapters = collection(seed)
    found = pairwise(adapters)
    for s, one in enumerate(adapters):
        for t, two in enumerate(adapters):
            cosine = whole_cosine(dense(one), dense(two))
            assert found.cosine[s, t] == pytest.approx(cosine, abs=COLLECTION)
            spread = whole_cosine_spread(dense(one), dense(two))
            assert found.cosine_z[s, t] == pytest.approx(cosine / spread, abs=COLLECTION / spread)
            for m, name in enumerate(SHAPES):
                D, E = one[name].dense(), two[name].dense()
                assert found.cosines[m, s, t] == pytest.approx(whole_cosine([D], [E]), abs=COLLECTION)
                i, j = one[name].rank, two[name].rank
                (U1, _, V1), (U2, _, V2) = (np.linalg.svd(M, full_matrices=False) for M in (D, E))
                assert found.overlaps["out"][m, s, t] == pytest.approx(subspace_phi(U1, U2, i, j), abs=COLLECTION)
                assert found.overlaps["in"][m, s, t] == pytest.approx(subspace_phi(V1.T, V2.T, i, j), abs=COLLECTION)
                assert found.chances["out"][m, s, t] == max(i, j) / D.shape[0]
                assert found.chances["in"][m, s, t] == max(i, j) / D.shape[1]
                initial = first_rows_cosine(one[name].A, two[name].A)
                assert found.initial[m, s, t] == pytest.approx(initial, abs=COLLECTION)
    np.testing.assert_allclose(found.norms[:, 0], [np.linalg.norm(D) for D in dense(adapters[0])])


def test_the_null_of_the_whole_cosine_has_the_spread_that_z_is_measured_in() -> None:
    rng, z = np.random.default_rng(6), []
    for _ in range(40):
        found = pairwise([adapter(rng, dict.fromkeys(SHAPES, 3)) for _ in range(6)])
        z.append(found.cosine_z[np.triu_indices(6, 1)])
    assert np.mean(z) == pytest.approx(0, abs=0.15)
    assert np.std(z) == pytest.approx(1, abs=0.1)


def test_each_pair_is_compared_on_what_both_have() -> None:
    rng = np.random.default_rng(8)
    names = list(SHAPES)
    one, two = adapter(rng, dict.fromkeys(names, 2)), adapter(rng, dict.fromkeys(names[:2], 2))
    three = adapter(rng, dict.fromkeys(names[1:], 2))
    found = pairwise([one, two, three])
    assert found.common.tolist() == [[3, 2, 2], [2, 2, 1], [2, 1, 2]]
    shared = [[one[name].dense(), two[name].dense()] for name in names[:2]]
    assert found.cosine[0, 1] == pytest.approx(whole_cosine(*zip(*shared, strict=True)), abs=COLLECTION)
    assert np.isnan(found.cosines[0, 0, 2])
    assert found.norms[0, 2] == 0
    assert found.ranks[0].tolist() == [2, 2, 0]


def test_a_zero_update_has_no_direction_and_no_cosine() -> None:
    one, two, three = collection(count=3)
    dead = two.map(lambda m: loralens.LowRank(0 * m.B, m.A, m.scale))
    found = pairwise([one, dead, three])
    assert np.isnan(found.cosine[1]).all()
    assert np.isnan(found.phi("in")[1]).all()
    assert np.isnan(found.cosine_z[0, 1])
    assert found.common[0, 1] == 3
    assert found.shared_initialisation[0, 1] == pytest.approx(pairwise([one, two]).shared_initialisation[0, 1])
    assert not np.isnan(found.cosine[0, 2])
    assert cluster_order(found.cosine)[1] in ([0, 1, 2], [0, 2, 1], [1, 0, 2], [1, 2, 0], [2, 0, 1], [2, 1, 0])


@pytest.mark.parametrize(("of", "side"), [("A", "in"), ("B", "out")])
@pytest.mark.parametrize("head", [None, 2])
def test_a_factor_has_as_many_directions_as_are_independent(of: str, side: str, head: int | None) -> None:
    """Columns of B, or rows of A, that repeat add none: φ and its chance count those that there are."""
    rng = np.random.default_rng(12)

    def repeated(m: loralens.LowRank) -> loralens.LowRank:
        again = rng.integers(m.rank, size=2)
        return loralens.LowRank(np.hstack([m.B, m.B[:, again]]), np.vstack([m.A, m.A[again]]), m.scale)

    adapters = collection(count=3)
    adapters = [adapters[0], adapters[1].map(repeated), adapters[2].map(repeated)]  # type: ignore[arg-type]
    found = pairwise(adapters, of=of, phi_rank=head)  # type: ignore[arg-type]
    for m, name in enumerate(SHAPES):
        factors = [(a[name].A.T if of == "A" else a[name].B).astype(np.float64) for a in adapters]
        bases = [np.linalg.svd(F, full_matrices=False)[0] for F in factors]
        counts = [min(head or F.shape[0], int(np.linalg.matrix_rank(F))) for F in factors]
        for s, t in ((0, 1), (1, 2), (0, 2)):
            expected = subspace_phi(bases[s], bases[t], counts[s], counts[t])
            assert found.overlaps[side][m, s, t] == pytest.approx(expected, abs=COLLECTION)  # type: ignore[index]
            chance = max(counts[s], counts[t]) / factors[0].shape[0]
            assert found.chances[side][m, s, t] == chance  # type: ignore[index]


def test_groups_are_connected_through_others() -> None:
    near = np.eye(4)
    near[0, 3] = near[3, 0] = near[3, 1] = near[1, 3] = 0.5
    near[2, 0] = near[0, 2] = 0.49
    near[2, 1] = near[1, 2] = np.nan
    assert connected_groups(near) == [[0, 1, 3], [2]]


def test_leaves_put_near_adapters_side_by_side_and_opposed_ones_too() -> None:
    cosine = np.eye(4)
    cosine[0, 2] = cosine[2, 0] = -0.9
    cosine[1, 3] = cosine[3, 1] = 0.8
    tree, order = cluster_order(cosine)
    assert {frozenset(order[:2]), frozenset(order[2:])} == {frozenset({0, 2}), frozenset({1, 3})}
    np.testing.assert_allclose(tree[:, 2], [0.1, 0.2, 1.0])


def test_what_cannot_be_compared_says_so() -> None:
    one, two = collection(count=2)
    with pytest.raises(OptionError, match="two adapters"):
        pairwise([one])
    other = loralens.Adapter(modules={"elsewhere": one["layers.0.q"]})
    with pytest.raises(MismatchError, match="in common"):
        pairwise([one, other])
    with pytest.raises(OptionError, match="no module matches"):
        pairwise([one, two], modules=["k"])
    assert [module.name for module in pairwise([one, two], modules=["q"]).modules] == ["layers.0.q", "layers.1.q"]
    spoilt = two.map(lambda m: loralens.LowRank(m.B * np.nan, m.A))
    with pytest.raises(loralens.FormatError, match=r"layers\.0\.q: .*NaN"):
        pairwise([one, spoilt])


def test_real_series_have_the_published_numbers(real: object) -> None:
    series = [loralens.load(real / f"sam-vitb-rank{rank}") for rank in (2, 4, 8, 16)]  # type: ignore[operator]
    phi = pairwise(series, phi_rank=1).phi("out")
    assert [phi[0, 1], phi[1, 2], phi[2, 3]] == pytest.approx([0.69459, 0.65118, 0.78546], abs=5e-6)
    seeds = pairwise([loralens.load(real / f"gemma270m-{name}") for name in ("aowei-main", "zouhe0")])  # type: ignore[operator]
    assert (seeds.phi("in")[0, 1], seeds.phi("out")[0, 1]) == pytest.approx((0.93, 0.04), abs=0.005)
    assert seeds.cosine[0, 1] == pytest.approx(0.12, abs=0.005)
    assert connected_groups(seeds.shared_initialisation) == [[0, 1]]
