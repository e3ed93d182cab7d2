"""Truncation on the data: directions as combinations of the factors are those of the whitened update."""

import numpy as np
import pytest

from loralens import Adapter, LowRank, MismatchError, Moments, Rule, fingerprint
from loralens.compression.calibration import whitened_svd
from loralens.compression.directions import truncate_pair
from loralens.compression.loss import data_losses, directions_on_data, equalise_units
from loralens.core import Moment
from tests.compression.truncation import total_error, truncate
from tests.draws import draw_factors
from tests.tolerances import TRUNCATED

SEEDS = {"a": 0, "b": 1, "c": 2}


def module(seed, scale=-1.5, rank=5):
    return LowRank(*draw_factors(seed, 14, 11, rank), scale)


def inputs(seed):
    rng = np.random.default_rng(100 + seed)
    return rng.standard_normal((400, 11)) * np.logspace(0, -2, 11)


def moment(one, seed, *, out_side=False):
    z = inputs(seed) @ one.A.T
    g = np.random.default_rng(7).standard_normal((400, 14)) @ one.B
    return Moment(z.T @ z / len(z), len(z), g.T @ g / len(g) if out_side else None)


def measured():
    adapter = Adapter(modules={name: module(seed) for name, seed in SEEDS.items()})
    moments = {name: moment(adapter[name], seed) for name, seed in SEEDS.items()}
    return adapter, Moments(modules=moments, fingerprint=fingerprint(adapter))


def true_error(before, after, seed):
    x = inputs(seed)
    return np.linalg.norm(x @ (before.dense() - after.dense()).T) / np.linalg.norm(x @ before.dense().T)


@pytest.mark.parametrize("out_side", [False, True])
@pytest.mark.parametrize("rank", [1, 2, 4, 5])
def test_combinations_give_the_whitened_truncation(rank, out_side):
    before = module(0)
    one = moment(before, 0, out_side=out_side)
    found = directions_on_data(before, one)
    after = truncate_pair(before, found, rank, whole_alpha=True)
    best = whitened_svd(before, one.K, one.G)
    D = best.Q_B.columns() @ best.X[:, :rank] @ best.Y[:rank] @ before.A
    np.testing.assert_allclose(after.dense(), D, atol=TRUNCATED * 100 * np.abs(D).max())
    assert (after.scale, after.rank) == (round(before.scale * rank) / rank, rank)  # α is whole
    np.testing.assert_allclose(np.linalg.norm(after.B, axis=0), np.linalg.norm(after.A, axis=1))


def test_it_loses_less_on_the_data_and_says_how_much():
    adapter, moments = measured()
    plain, informed = truncate(adapter, Rule("rank", 2)), truncate(adapter, Rule("rank", 2), moments=moments)
    assert total_error(informed.losses) > total_error(plain.losses)  # on the weights
    found = data_losses(adapter, informed.adapter, moments)
    assert total_error(found) < 0.9 * total_error(data_losses(adapter, plain.adapter, moments))
    for name, seed in SEEDS.items():
        assert found[name].relative_error == pytest.approx(true_error(adapter[name], informed.adapter[name], seed))
        assert found[name].frobenius == pytest.approx(
            np.linalg.norm(inputs(seed) @ adapter[name].dense().T) / np.sqrt(400)
        )
        assert found[name].relative_error <= true_error(adapter[name], plain.adapter[name], seed) + 1e-12


def test_a_budget_follows_the_data_too():
    adapter, moments = measured()
    loud = {name: Moment(one.K * (100 if name == "b" else 1), one.count) for name, one in moments.items()}
    after = truncate(
        adapter, Rule("parameters", 0.6), moments=Moments(modules=loud, fingerprint=moments.fingerprint)
    ).adapter
    assert after["b"].rank > max(after["a"].rank, after["c"].rank)


def test_what_the_data_never_reached_gets_the_least_and_what_was_not_measured_its_share():
    adapter, moments = measured()
    some = {"a": moments["a"], "b": Moment(np.zeros((5, 5)), 0)}
    partial = Moments(modules=some, fingerprint=moments.fingerprint, unmeasured={"c": "an embedding"})
    after = truncate(adapter, Rule("parameters", 0.6), moments=partial).adapter
    assert (after["b"].rank, after["a"].rank > 1, after["c"].rank > 1) == (1, True, True)
    assert set(data_losses(adapter, after, partial)) == {"a"}
    found = {name: directions_on_data(adapter[name], some.get(name)) for name in adapter}
    one = equalise_units(found, adapter, partial)
    gain = np.linalg.norm(found["a"].s) / np.linalg.norm(adapter["a"].dense())
    np.testing.assert_allclose(one["c"].s, gain * found["c"].s)
    assert one["a"] is found["a"]


def test_moments_of_another_adapter_are_refused():
    adapter, moments = measured()
    other = adapter.map(lambda m: LowRank(2 * m.B, m.A, m.scale))
    with pytest.raises(MismatchError, match="another adapter"):
        truncate(other, Rule("rank", 2), moments=moments)
