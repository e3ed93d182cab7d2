"""Every elementwise rule in every space, entry by entry against dense float64."""

from functools import partial
from hashlib import sha256

import numpy as np
import pytest

from loralens import Adapter, LowRank, OptionError
from loralens.arithmetic import METHODS, combine_adapters, elementwise
from loralens.arithmetic.elementwise import Modules, entries_in_space, whole_cutoffs
from loralens.arithmetic.elementwise_methods import (
    breadcrumbs,
    dare,
    dare_ties,
    della,
    magnitude,
    sce,
    ties,
)
from loralens.core.joint import Joint
from loralens.linalg.rounding import Draws
from tests import reference
from tests.draws import draw_factors
from tests.tolerances import ELEMENTWISE, RANGE_FINDER, SMALL_SPACE

SEED = np.random.SeedSequence([3, 1])
STRENGTHS = (0.7, -0.4, 1.3)


def words(place_of, shape):
    return Draws.of(SEED, place_of).words(0, shape[0] * shape[1]).reshape(shape)


def drawn(rule, updates, *options):
    return rule(updates, [words(t, D.shape) for t, D in enumerate(updates)], *options)


RULES = {
    "magnitude": (partial(magnitude, density=0.3), lambda Ds: reference.dense_magnitude(Ds, 0.3)),
    "ties": (partial(ties, density=0.3), lambda Ds: reference.dense_ties(Ds, 0.3)),
    "ties at 1": (partial(ties, density=1.0), lambda Ds: reference.dense_ties(Ds, 1.0)),
    "dare": (partial(dare, density=0.6, seed=SEED), lambda Ds: drawn(reference.dense_dare, Ds, 0.6)),
    "dare-ties": (partial(dare_ties, density=0.6, seed=SEED), lambda Ds: drawn(reference.dense_dare, Ds, 0.6, True)),
    "della": (
        partial(della, density=0.6, epsilon=0.3, seed=SEED),
        lambda Ds: drawn(reference.dense_della, Ds, 0.6, 0.3),
    ),
    "breadcrumbs": (
        partial(breadcrumbs, density=0.3, gamma=0.1),
        lambda Ds: reference.dense_breadcrumbs(Ds, 0.3, 0.1),
    ),
    "sce": (partial(sce, density=0.4), lambda Ds: reference.dense_sce(Ds, 0.4)),
    "sce at 1": (sce, lambda Ds: reference.dense_sce(Ds, 1.0)),
}


def test_the_table_has_every_elementwise_method():
    assert {name for name, row in METHODS.items() if row.spaces} <= set(RULES)


def updates(rng, m=9, n=14, ranks=(3, 4, 2)):
    return [LowRank(*draw_factors(rng, m, n, r), s) for r, s in zip(ranks, (2.0, 0.5, 1.0), strict=False)]


def weighted(ups, strengths=STRENGTHS):
    return [w * one.dense() for one, w in zip(ups, strengths, strict=False)]


def assert_close(found, expected, tolerance):
    assert np.linalg.norm(found - expected) <= tolerance * np.linalg.norm(expected)


@pytest.mark.parametrize("name", RULES)
@pytest.mark.parametrize("space", ["full", "knots", "core"])
def test_a_rule_is_what_its_paper_says(name, space):
    rule, dense = RULES[name]
    ups = updates(np.random.default_rng(5))
    Ds = weighted(ups)
    found = rule(Joint.of(ups, STRENGTHS), space=space, lam=0.5)
    if space == "full":  # ranks 3 + 4 + 2 = 9 hold all of 9 × 14
        assert_close(found.update.dense(), 0.5 * dense(Ds), ELEMENTWISE)
        return
    around = reference.dense_knots if space == "knots" else reference.dense_core
    assert_close(found.update.dense(), 0.5 * around(Ds, dense), SMALL_SPACE)
    assert found.truncation == 0


@pytest.mark.parametrize("name", RULES)
@pytest.mark.parametrize("space", ["full", "knots", "core"])
def test_a_weight_is_part_of_the_update_and_rules_are_odd(name, space):
    ups, rule = updates(np.random.default_rng(7)), RULES[name][0]
    scaled = [one.rescaled(w * one.scale, one.scaling) for one, w in zip(ups, STRENGTHS, strict=True)]
    base = rule(Joint.of(ups, STRENGTHS), space=space).update.dense()
    assert_close(rule(Joint.of(scaled, [1, 1, 1]), space=space).update.dense(), base, ELEMENTWISE)
    negative = rule(Joint.of(ups, [-w for w in STRENGTHS]), space=space).update.dense()
    assert_close(negative, -base, ELEMENTWISE)


@pytest.mark.parametrize("name", RULES)
@pytest.mark.parametrize("space", ["full", "knots", "core"])
def test_an_adapter_that_lacks_the_module_counts_as_0(name, space):
    ups, rule = updates(np.random.default_rng(10)), RULES[name][0]
    absent = rule(Joint.of([ups[0], None, ups[2]], STRENGTHS), space=space).update.dense()
    zero = LowRank(np.zeros((9, 1)), np.ones((1, 14)))
    assert_close(rule(Joint.of([ups[0], zero, ups[2]], STRENGTHS), space=space).update.dense(), absent, ELEMENTWISE)
    if space == "full":
        Ds = [weighted(ups)[0], np.zeros((9, 14)), weighted(ups)[2]]
        expected = RULES[name][1](Ds)
        U, s, Vh = np.linalg.svd(expected, full_matrices=False)
        assert_close(absent, (U[:, :5] * s[:5]) @ Vh[:5], ELEMENTWISE)  # rank 3 + 2


@pytest.mark.parametrize("name", RULES)
@pytest.mark.parametrize("space", ["full", "knots", "core"])
def test_nothing_comes_to_exact_zeros(name, space):
    (one, *_) = updates(np.random.default_rng(11))
    found = RULES[name][0](Joint.of([one, None], [0.0, 1.0]), space=space).update
    assert found.rank == 1
    assert not found.B.any()


@pytest.mark.slow
def test_the_mean_of_dare_over_seeds_is_the_sum():
    ups = updates(np.random.default_rng(15))
    joint, expected = Joint.of(ups, STRENGTHS), sum(weighted(ups))
    for space in ("full", "knots", "core"):
        found = [
            dare(joint, density=0.5, space=space, seed=np.random.SeedSequence(i)).update.dense() for i in range(400)
        ]
        spread = np.std(found, axis=0) / np.sqrt(400)
        assert np.all(np.abs(np.mean(found, axis=0) - expected) <= 5 * spread + 1e-6)
        assert np.mean(np.abs(np.mean(found, axis=0) - expected) / (spread + 1e-12)) < 1.1


def test_adapters_have_draws_of_their_own_and_seeds_decide():
    (one, *_) = updates(np.random.default_rng(16))
    joint = Joint.of([one, one], [1.0, 0.0])
    first = dare(joint, density=0.5, seed=SEED).update.dense()
    second = dare(Joint.of([one, one], [0.0, 1.0]), density=0.5, seed=SEED).update.dense()
    assert np.linalg.norm(first - second) > 0.1 * np.linalg.norm(first)
    np.testing.assert_array_equal(dare(joint, density=0.5, seed=SEED).update.dense(), first)
    assert np.any(dare(joint, density=0.5, seed=np.random.SeedSequence(4)).update.dense() != first)


def test_della_asks_for_probabilities():
    joint = Joint.of(updates(np.random.default_rng(18)), STRENGTHS)
    with pytest.raises(OptionError, match=r"is not within \(0, 1\]") as caught:
        della(joint, density=0.9, epsilon=0.2, seed=SEED)
    assert "0.1 or less" in caught.value.fix
    with pytest.raises(OptionError):
        della(joint, density=0.2, epsilon=0.2, seed=SEED)
    assert della(Joint.of(updates(np.random.default_rng(18), n=1), STRENGTHS), density=1.0, epsilon=0.0, seed=SEED)


def test_truncation_is_what_does_not_fit_into_the_ranks():
    ups = updates(np.random.default_rng(19), m=80, n=120, ranks=(3, 4))
    found = ties(Joint.of(ups, (1.0, 1.0)), density=0.2)
    F = reference.dense_ties(weighted(ups, (1.0, 1.0)), 0.2)
    assert found.update.rank == 7
    lost = np.linalg.norm(F - found.update.dense()) / np.linalg.norm(F)
    assert found.truncation == pytest.approx(lost, rel=1e-5)
    smallest = np.linalg.norm(F - reference.best_of_rank(F, 7)) / np.linalg.norm(F)
    assert lost <= smallest * (1 + RANGE_FINDER)


def test_combine_looks_at_the_whole_adapter_for_ties_and_says_what_was_lost():
    rng = np.random.default_rng(24)
    one, two = ({f"model.layers.{b}.q_proj": up for b, up in enumerate(updates(rng))} for _ in range(2))
    names = list(one)
    pair = [(Adapter(modules=one), 0.7), (Adapter(modules=two), -0.4)]
    Ds = [[w * ups[name].dense() for name in names] for ups, w in ((one, 0.7), (two, -0.4))]
    whole = combine_adapters(pair, method="ties", density=0.3, dtype=np.float64)
    cut = [np.sort(np.abs(np.concatenate(D, axis=None)))[::-1][int(0.3 * 3 * 9 * 14) - 1] for D in Ds]
    for b, name in enumerate(names):
        trimmed = [np.where(np.abs(D[b]) >= c * (1 - 1e-6), D[b], 0) for D, c in zip(Ds, cut, strict=True)]
        F, found = reference.elected(trimmed), whole.adapter.modules[name].dense()
        rank = one[name].rank + two[name].rank
        assert_close(found, reference.best_of_rank(F, rank), ELEMENTWISE)
        lost = np.linalg.norm(F - found) / np.linalg.norm(F)
        assert whole.truncation[name] == pytest.approx(lost, rel=1e-4, abs=1e-6)
        assert whole.truncated(name) == pytest.approx(lost, rel=1e-4, abs=1e-6)
        for few in (1, 4):
            less = np.linalg.norm(F - whole.lifts[name].at(few, np.float64).dense()) / np.linalg.norm(F)
            assert whole.truncated(name, few) == pytest.approx(less, rel=1e-4)
    each = combine_adapters(pair, method="ties", density=0.3, dtype=np.float64, whole=0)
    for b, name in enumerate(names):
        F = reference.dense_ties([D[b] for D in Ds], 0.3)
        rank = one[name].rank + two[name].rank
        assert_close(each.adapter.modules[name].dense(), reference.best_of_rank(F, rank), ELEMENTWISE)
    assert not combine_adapters(pair, method="sum").truncation


def counted(m, n, r, step):
    """Factors that no random number generator has a say in."""
    B, A = (((np.arange(rows * cols) * step) % 1021 - 510.0).reshape(rows, cols) for rows, cols in ((m, r), (r, n)))
    return LowRank(B.astype(np.float32) / 64, A.astype(np.float32) / 32, 2.0)


DIGESTS = {  # SHA-256 of all that a rule makes of two counted updates under seed 7: the same on every machine
    "dare": "2f79f61d4928fb4cdeb7307ea2a8a25ff9695a12627910f6c7e41e49c7a1222d",
    "dare-ties": "4e7b6efd1d9600ffadf4b484c5e95e100e5f7c3578ce8189e6240ef489a99433",
    "della": "6333587f171a29e855c3dfc931e501c23abf60553944744c4b8d1991810c706f",
    "ties": "b87d255b501f692eb02307e0d5ccfaaf05bcb89d6f314bd4abff87f68dfa2b9d",
}


@pytest.mark.parametrize("name", DIGESTS)
def test_what_a_rule_makes_is_the_same_to_the_bit_on_every_machine(name, monkeypatch):
    """Masks, signs and means of the full space; only the way back to low rank goes through BLAS and LAPACK."""
    seen, plain = [], elementwise.low_rank_approximation

    def watched(fill, shape, **options):
        out = np.empty(shape, np.float32)
        fill(0, shape[0], out)
        seen.append(out)
        return plain(fill, shape, **options)

    monkeypatch.setattr(elementwise, "low_rank_approximation", watched)
    pair = [Adapter(modules={"layers.3.q_proj": counted(70, 90, 3, step)}) for step in (7919, 104729)]
    combine_adapters([(pair[0], 0.75), (pair[1], -0.5)], method=name, seed=7 if name != "ties" else 0)
    (F,) = seen
    assert F.dtype == np.float32
    # Zeros have either sign; adding 0 makes all of them positive.
    assert sha256((F + np.float32(0)).astype("<f4").tobytes()).hexdigest() == DIGESTS[name]


def test_the_cutoff_of_a_whole_adapter_is_one_of_its_entries():
    """It is found by products in float32, but an order statistic of the exact entries is one of them.

    The second adapter is large in 100 tiny modules. Their share of the sample is too large, so the first pass misses.
    """
    rng = np.random.default_rng(28)
    first, second, tiny = updates(rng, m=300, n=500, ranks=(16, 16, 1))
    tiny = LowRank(np.full((2, 1), 1e3), rng.random((1, 2)))
    joints = {"0": Joint.of([first, second], STRENGTHS[:2])}
    joints |= {str(i): Joint.of([None, tiny], STRENGTHS[:2]) for i in range(1, 101)}
    sizes = [[], []]
    for joint in joints.values():
        entries = entries_in_space(joint, "full").entries
        for t, matrix in zip(entries.places, entries.matrices, strict=True):
            sizes[t].append(np.abs(matrix.product.dense()).ravel())
    ordered = [np.sort(np.concatenate(size))[::-1] for size in sizes]
    found = whole_cutoffs(Modules(list(joints), joints.__getitem__, 150_400), 0.2, space="full")
    assert found == tuple(float(size[int(0.2 * size.size) - 1]) for size in ordered)
