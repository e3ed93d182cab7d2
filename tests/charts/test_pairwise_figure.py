"""The figure of a collection: matrices in the order of the tree, maps of interference."""

import numpy as np
import pytest

import loralens
from loralens.analysis import interference, pairwise
from loralens.analysis.every_pair import cluster_order
from loralens.charts.pair_charts import pairwise_figure
from loralens.charts.spec import Figure
from tests.charts.figures import KINDS, maps_of


def collection(count: int, blocks: int, kinds: tuple[str, ...] = KINDS) -> list[loralens.Adapter]:
    rng = np.random.default_rng(0)
    made = []
    for t in range(count):
        modules = {}
        for i in range(blocks):
            for kind in kinds:
                B, A = rng.standard_normal((9, 1)), rng.standard_normal((1, 7))
                if t == 2 and i < 3:
                    old = made[0][f"model.layers.{i}.{kind}"]
                    B, A = (-old.B if kind.endswith("v_proj") else old.B), old.A
                modules[f"model.layers.{i}.{kind}"] = loralens.LowRank(B, A)
        made.append(loralens.Adapter(modules=modules))
    return made


def figure(adapters: list[loralens.Adapter], name: str = "adapter{}", **options: object) -> Figure:
    pairs = pairwise(adapters, **options)  # type: ignore[arg-type]
    order = cluster_order(pairs.cosine)[1]
    energy = interference(adapters, pairs.modules)
    return pairwise_figure([name.format(i) for i in range(len(adapters))], pairs, energy, order, list(pairs.overlaps))


def test_matrices_are_in_the_order_of_the_tree_and_say_chance() -> None:
    adapters = collection(4, 3)
    *matrices, _, _ = maps_of(figure(adapters))
    pairs = pairwise(adapters)
    order = cluster_order(pairs.cosine)[1]
    expected = (pairs.cosine, pairs.phi("in"), pairs.phi("out"), pairs.shared_initialisation)
    for chart, matrix in zip(matrices, expected, strict=True):
        np.testing.assert_array_equal(chart.values, matrix[np.ix_(order, order)])
        assert list(chart.rows) == [f"adapter{t} {place}" for place, t in enumerate(order, start=1)]
        assert list(chart.columns) == ["1", "2", "3", "4"]
        assert chart.written
    titles = [chart.title for chart in matrices]
    assert titles == ["cosine of ΔW", "φ, in side", "φ, out side", "cosine of A"]
    chances = [chance for chart in matrices for chance in chart.scale.chance]
    assert chances == [0.0, pytest.approx(1 / 7), pytest.approx(1 / 9), 0.0]
    assert matrices[0].scale.words(matrices[0].values[0, 0]) == "+1.00"


def test_maps_have_the_energies_and_the_worst_cosine() -> None:
    adapters = collection(4, 5)
    *_, shared, conflict = maps_of(figure(adapters))
    pairs = pairwise(adapters)
    energy, order = interference(adapters, pairs.modules), cluster_order(pairs.cosine)[1]
    rows = [m for m, module in enumerate(pairs.modules) if ".4." in module.name]
    np.testing.assert_allclose(shared.values[:, 4], energy.shared[rows].mean(axis=0)[order])
    assert conflict.rows == ["down_proj", "q_proj", "v_proj"]
    np.testing.assert_allclose(conflict.values[2, :3], -1)
    q4 = next(m for m, module in enumerate(pairs.modules) if module.name.endswith("4.self_attn.q_proj"))
    assert conflict.values[1, 4] == pairs.cosines[q4][np.triu_indices(4, 1)].min()
    assert (conflict.scale.low, conflict.scale.high) == (-1, 1)


def test_what_is_not_there_is_left_out() -> None:
    adapters = collection(3, 2)
    short = loralens.Adapter(modules={k: v for k, v in adapters[1].items() if "layers.0" in k and "q_proj" not in k})
    alone = loralens.Adapter(modules={"elsewhere": adapters[0]["model.layers.0.self_attn.q_proj"]})
    matrix, *_, conflict = maps_of(figure([adapters[0], short, alone]))
    assert np.isnan(matrix.values).sum() == 5
    assert conflict.rows == ["down_proj", "v_proj"]
    assert {i for i, _ in conflict.tips} == {0, 1}
