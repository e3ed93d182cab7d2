"""Similarity of two adapters against dense matrices, its laws, its null, and what is known of real adapters."""

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import loralens
from loralens import Comparison, MismatchError, OptionError
from loralens.analysis import compare_subspaces
from loralens.analysis.nested import closest, nesting, relations
from loralens.analysis.two_adapters import find_shared_initialisation
from loralens.core import Structured
from loralens.linalg.subspace import update_cosine
from tests import reference
from tests.draws import draw_factors
from tests.marks import examples
from tests.strategies import SCALES
from tests.tolerances import SIMILARITY


def adapter(*modules: loralens.LowRank | Structured, base: str | None = None, **named: loralens.LowRank):
    numbered = {f"model.layers.{i}.self_attn.q_proj": one for i, one in enumerate(modules)}
    return loralens.Adapter(modules={**numbered, **named}, base_model=base)


def random(rng, out=14, in_=11, rank=3, scale=1.0, dtype=np.float64):
    B, A = draw_factors(rng, out, in_, rank)
    return loralens.LowRank(B.astype(dtype), A.astype(dtype), scale)


def only(found: Comparison):
    (one,) = found.modules.values()
    return one


@st.composite
def updates(draw):
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    out, in_ = draw(st.integers(2, 20)), draw(st.integers(2, 20))
    pair = []
    for _ in range(2):
        dtype = draw(st.sampled_from([np.float64, np.float32, ml_dtypes.bfloat16]))
        pair.append(random(rng, out, in_, draw(st.integers(1, 8)), draw(st.sampled_from(SCALES)), dtype))
    return pair


@given(updates())
@examples(40)
def test_all_numbers_are_those_of_the_dense_updates(pair):
    one = only(compare_subspaces(*(adapter(update) for update in pair)))
    D1, D2 = (update.dense() for update in pair)
    k1, k2 = (reference.numerical_rank(np.linalg.svd(D, compute_uv=False), D.shape) for D in (D1, D2))
    assert one.directions == (k1, k2)
    assert one.norms == pytest.approx((np.linalg.norm(D1), np.linalg.norm(D2)))
    assert one.cosine == pytest.approx(reference.dense_cosine(D1, D2), abs=SIMILARITY)
    assert one.cosine_z == pytest.approx(one.cosine * np.sqrt(D1.size), abs=SIMILARITY)
    for side, n in (("in", D1.shape[1]), ("out", D1.shape[0])):
        X, Y = reference.leading_columns(D1, k1, side), reference.leading_columns(D2, k2, side)
        phi = reference.phi_of(X, Y)
        np.testing.assert_allclose(one.overlaps[side].phi, phi, atol=1e-7)  # near-equal σ have no vectors of their own
        assert one.overlaps[side].full == pytest.approx(phi[-1, -1], abs=SIMILARITY)
        assert one.spans[side] == pytest.approx(one.overlaps[side].full, rel=1e-12)
        assert one.overlaps[side].n == n
        strengths = [np.linalg.svd(D, compute_uv=False)[:k] for D, k in ((D1, k1), (D2, k2))]
        expected = np.prod([np.sum(s**2) / np.sqrt(np.sum(s**4)) for s in strengths]) / n
        assert one.cka_chance[side] == pytest.approx(expected)
        assert one.cka[side] == pytest.approx(reference.dense_cka(D1, D2, side), abs=SIMILARITY)


def test_of_A_and_of_B_are_the_factors_own_directions_and_cosine_stays_that_of_the_update():
    rng = np.random.default_rng(1)
    x, y = random(rng, rank=3, scale=2.0), random(rng, rank=4, scale=-1.0)
    plain = only(compare_subspaces(adapter(x), adapter(y), side="in"))
    for of, side, factors in (("A", "in", (x.A, y.A)), ("B", "out", (x.B, y.B))):
        one = only(compare_subspaces(adapter(x), adapter(y), of=of))
        X, Y = (np.linalg.svd(F, full_matrices=False)[2 if of == "A" else 0] for F in factors)
        X, Y = (X.T, Y.T) if of == "A" else (X, Y)
        np.testing.assert_allclose(one.overlap.phi, reference.phi_of(X, Y), atol=SIMILARITY)
        assert (one.side, tuple(one.overlaps)) == (side, (side,))
        assert (one.cosine, one.cka, one.spans) == (plain.cosine, plain.cka, plain.spans)
    assert plain.overlap.full == pytest.approx(only(compare_subspaces(adapter(x), adapter(y), of="A")).overlap.full)


def test_the_null_of_the_cosine_is_the_one_drawn():
    rng = np.random.default_rng(6)
    s1, s2, shape = np.array([3.0, 1.0, 0.2]), np.array([1.0, 0.9]), (40, 25)
    drawn = [update_cosine(s1, s2, *(reference.haar_corner(rng, n, (3, 2)) for n in shape)) for _ in range(4000)]
    x, y = random(rng, *shape), random(rng, *shape)
    one = only(compare_subspaces(adapter(x), adapter(y)))
    assert one.cosine / one.cosine_z == pytest.approx(np.std(drawn), rel=0.05)
    assert abs(np.mean(drawn)) < 4 * np.std(drawn) / np.sqrt(len(drawn))


def test_whole_cosine_and_its_z_weigh_modules_by_their_norms():
    rng = np.random.default_rng(7)
    pairs = [(random(rng, o, i, scale=s), random(rng, o, i)) for o, i, s in ((5, 9, 1.0), (20, 4, 30.0), (6, 6, 0.1))]
    found = compare_subspaces(*(adapter(*side) for side in zip(*pairs, strict=True)))
    flat = [np.concatenate([u.dense().ravel() for u in side]) for side in zip(*pairs, strict=True)]
    assert found.cosine == pytest.approx(reference.dense_cosine(*flat), abs=SIMILARITY)
    squares = [[np.sum(u.dense() ** 2) for u in side] for side in zip(*pairs, strict=True)]
    variance = sum(a * b / u.dense().size for a, b, (u, _) in zip(*squares, pairs, strict=True))
    spread = np.sqrt(variance / sum(squares[0]) / sum(squares[1]))
    assert found.cosine_z == pytest.approx(found.cosine / spread)


def test_what_is_zero_is_said_and_has_no_directions():
    rng = np.random.default_rng(8)
    zero = loralens.LowRank(np.zeros((14, 3)), rng.standard_normal((3, 11)))
    found = compare_subspaces(adapter(zero, random(rng), zero), adapter(random(rng), zero, zero))
    assert [one.zero for one in found.modules.values()] == ["the first is 0", "the second is 0", "both are 0"]
    for one in found.modules.values():
        assert one.cosine == one.cosine_z == 0.0
        assert one.overlap.phi.size == 0
        assert all(np.isnan(value) for value in (*one.cka.values(), *one.spans.values()))
    assert (found.cosine, found.cosine_z) == (0.0, 0.0)
    assert find_shared_initialisation(found).verdict == "none"


def test_what_cannot_be_compared_is_refused_by_name():
    rng = np.random.default_rng(11)
    with pytest.raises(MismatchError, match=r"adapts a/small, and \(16, 12\) .* adapts b/large"):
        compare_subspaces(adapter(random(rng), base="a/small"), adapter(random(rng, 16, 12), base="b/large"))
    two = {"y_proj": random(rng), "z_proj": random(rng)}
    with pytest.raises(MismatchError, match="no module in common: the first has x_proj, the second y_proj and 1 more"):
        compare_subspaces(adapter(x_proj=random(rng)), adapter(**two))
    with pytest.raises(OptionError, match="no module matches"):
        compare_subspaces(adapter(random(rng)), adapter(random(rng)), modules=["k_proj"])


def seeded(rng, A, moved=0.0, gauge=None):
    B, A = rng.standard_normal((40, 4)), A + moved * rng.standard_normal(A.shape)
    return loralens.LowRank(B, A) if gauge is None else loralens.LowRank(B @ np.linalg.inv(gauge), gauge @ A)


def test_a_shared_start_is_seen_through_training_and_through_another_gauge():
    rng = np.random.default_rng(14)
    starts = [rng.standard_normal((4, 60)) for _ in range(5)]
    first = adapter(*(seeded(rng, A) for A in starts))
    moved = find_shared_initialisation(compare_subspaces(first, adapter(*(seeded(rng, A, moved=0.5) for A in starts))))
    assert (moved.verdict, moved.alike, moved.compared) == ("shared", 5, 5)
    assert moved.one_sided
    assert "the A of 5 of 5 modules are alike" in moved.text
    assert moved.advice == "directions of the in side show the seed, not the task: look at --side out"
    turned = adapter(*(seeded(rng, A, gauge=rng.standard_normal((4, 4))) for A in starts))
    likely = find_shared_initialisation(compare_subspaces(first, turned))
    assert (likely.verdict, likely.advice) == ("likely", moved.advice)
    apart = find_shared_initialisation(compare_subspaces(first, adapter(*(seeded(rng, A[::-1, ::-1]) for A in starts))))
    assert (apart.verdict, apart.text, apart.advice) == ("none", "", "")
    assert apart.chance == {"in": 4 / 60, "out": 4 / 40}


def test_modules_of_one_width_are_nested_or_not():
    rng = np.random.default_rng(17)
    v = rng.standard_normal((2, 30))
    modules = {}
    for block in range(3):
        for kind, A in (("q_proj", v), ("k_proj", np.vstack([v, rng.standard_normal((1, 30))]))):
            A = A if block < 2 else rng.standard_normal(A.shape)
            modules[f"layers.{block}.{kind}"] = loralens.LowRank(rng.standard_normal((9, len(A))), A)
    modules["layers.0.down"] = random(rng, 9, 50)
    modules["layers.0.zero"] = loralens.LowRank(np.zeros((9, 2)), rng.standard_normal((2, 30)))
    groups = nesting(loralens.Adapter(modules=modules), side="in")
    assert [(one.width, len(one.names)) for one in groups] == [(30, 7), (50, 1)]
    one = groups[0]
    assert one.names[:3] == ("layers.0.k_proj", "layers.1.k_proj", "layers.2.k_proj")
    for i, first in enumerate(one.names):
        for j, second in enumerate(one.names):
            k1, k2 = one.directions[i], one.directions[j]
            if not (k1 and k2):
                assert np.isnan(one.full[i, j])
                assert np.isnan(one.first[i, j])
                continue
            X, Y = (reference.leading_columns(modules[n].dense(), k, "in") for n, k in ((first, k1), (second, k2)))
            assert one.full[i, j] == pytest.approx(reference.phi_of(X, Y)[-1, -1], abs=SIMILARITY)
            assert one.first[i, j] == pytest.approx(reference.phi_of(X, Y)[0, 0], abs=SIMILARITY)
            assert one.chance[i, j] == pytest.approx(max(k1, k2) / 30)
    q, k = one.names.index("layers.0.q_proj"), one.names.index("layers.1.k_proj")
    assert one.full[q, k] == pytest.approx(1.0)
    assert all("layers.2" not in one.names[i] + one.names[j] for i, j in closest(one, 2))
    both, kq, qq = relations(one)
    assert (both.kinds, kq.kinds, qq.kinds) == (("k_proj", "k_proj"), ("k_proj", "q_proj"), ("q_proj", "q_proj"))
    assert (qq.pairs, kq.pairs) == (3, 9)
    pick = lambda *pair: one.full[tuple(one.names.index(f"layers.{name}") for name in pair)]  # noqa: E731
    assert kq.same == pytest.approx(np.mean([pick(f"{b}.k_proj", f"{b}.q_proj") for b in range(3)]))
    assert qq.next == pytest.approx((pick("0.q_proj", "1.q_proj") + pick("1.q_proj", "2.q_proj")) / 2)
    assert qq.farther == pytest.approx(pick("0.q_proj", "2.q_proj"))
    assert np.isnan(qq.same)


@pytest.mark.parametrize("of", ["update", "A", "B"])
def test_the_same_numbers_are_alike_to_rounding(of):
    rng = np.random.default_rng(5)
    modules = {f"m{i}": random(rng, out=30 + i, in_=40, rank=5, scale=0.3) for i in range(5)}
    twins = {name: loralens.LowRank(m.B.copy(), m.A.copy(), m.scale) for name, m in modules.items()}
    found = compare_subspaces(adapter(**modules), adapter(**twins), of=of)
    assert found.cosine == pytest.approx(1, abs=1e-14)
    for one in found.modules.values():
        assert [one.cosine, one.initial, *one.spans.values(), *one.cka.values()] == pytest.approx([1] * 6, abs=1e-14)
        for each in one.overlaps.values():
            assert [each.first, each.full] == pytest.approx([1, 1], abs=1e-14)
            assert max(each.projection_distance, each.geodesic_distance, each.gap, each.angles.max()) < 1e-14
