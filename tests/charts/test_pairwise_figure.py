"""The figure of a collection: matrices in the order of the tree, maps of interference, the same every time."""

import io
from pathlib import Path

import numpy as np
import pytest
from matplotlib.figure import Figure

import loralens
from loralens.analysis.compare.interference import interference
from loralens.analysis.compare.pairwise import leaves, pairwise
from loralens.charts.figure import save
from loralens.charts.pairwise import pairwise_figure
from loralens.errors import OptionError

KINDS = ("self_attn.q_proj", "self_attn.v_proj", "mlp.down_proj")


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
    tree, _ = leaves(pairs.cosine)
    energy = interference(adapters, pairs.modules)
    return pairwise_figure([name.format(i) for i in range(len(adapters))], pairs, energy, tree, list(pairs.overlaps))


def titled(drawn: Figure, start: str) -> object:
    return next(axes for axes in drawn.axes if axes.get_title().startswith(start))


def test_matrices_are_in_the_order_of_the_tree_and_say_chance() -> None:
    adapters = collection(4, 3)
    drawn, pairs = figure(adapters), pairwise(adapters)
    order = leaves(pairs.cosine)[1]
    images = [axes.images[0] for axes in drawn.axes if axes.images]
    assert len(images) == 4
    for image, values in zip(
        images, (pairs.cosine, pairs.phi("in"), pairs.phi("out"), pairs.shared_initialisation), strict=True
    ):
        np.testing.assert_array_equal(image.get_array(), values[np.ix_(order, order)])
    beside = [tick.get_text() for tick in images[0].axes.get_yticklabels()]
    assert beside == [f"adapter{t} {place}" for place, t in enumerate(order, start=1)]
    titles = [axes.get_title() for axes in drawn.axes if axes.get_title()]
    assert titles[:4] == [
        "cosine of the updates", "φ, in side (chance 0.143)", "φ, out side (chance 0.111)",
        "cosine of A: one initialisation?",
    ]  # fmt: skip
    assert images[0].axes.texts[0].get_text() == "1.00"
    bars = [axes for axes in drawn.axes if axes.get_label() == "<colorbar>" and axes.lines]
    assert [bar.lines[0].get_xdata()[0] for bar in bars[:2]] == pytest.approx([1 / 7, 1 / 9])


def test_maps_have_the_energies_and_the_worst_cosine() -> None:
    adapters = collection(4, 5)
    drawn, pairs = figure(adapters), pairwise(adapters)
    energy, order = interference(adapters, pairs.modules), leaves(pairs.cosine)[1]
    shared = titled(drawn, "shared energy").collections[0].get_array()  # type: ignore[attr-defined]
    rows = [m for m, module in enumerate(pairs.modules) if ".4." in module.name]
    np.testing.assert_allclose(shared[:, 4], energy.shared[rows].mean(axis=0)[order])
    conflict = titled(drawn, "conflict")
    values = conflict.collections[0].get_array()  # type: ignore[attr-defined]
    assert [tick.get_text() for tick in conflict.get_yticklabels()] == ["down_proj", "q_proj", "v_proj"]  # type: ignore[attr-defined]
    np.testing.assert_allclose(values[2, :3], -1)
    q4 = next(m for m, module in enumerate(pairs.modules) if module.name.endswith("4.self_attn.q_proj"))
    assert values[1, 4] == pairs.cosines[q4][np.triu_indices(4, 1)].min()


def test_what_is_not_there_is_masked() -> None:
    adapters = collection(3, 2)
    short = loralens.Adapter(modules={k: v for k, v in adapters[1].items() if "layers.0" in k and "q_proj" not in k})
    alone = loralens.Adapter(modules={"elsewhere": adapters[0]["model.layers.0.self_attn.q_proj"]})
    drawn = figure([adapters[0], short, alone])
    matrix = next(axes.images[0] for axes in drawn.axes if axes.images).get_array()
    assert matrix.mask.sum() == 5
    values = titled(drawn, "conflict").collections[0].get_array()  # type: ignore[attr-defined]
    assert list(values.mask[:, 0]) == [False, False]


@pytest.mark.parametrize("options", [{"of": "A"}, {"of": "B"}, {"phi_rank": 1}])
def test_one_side_or_two(options: dict[str, object]) -> None:
    drawn = figure(collection(3, 1), **options)
    assert len([axes for axes in drawn.axes if axes.images]) == (4 if "phi_rank" in options else 3)


@pytest.mark.parametrize(("count", "blocks"), [(3, 32), (30, 3)])
def test_no_label_leaves_the_figure_nor_meets_another(count: int, blocks: int) -> None:
    kinds = (*KINDS, "self_attn.k_proj", "self_attn.o_proj", "mlp.gate_proj", "mlp.up_proj")
    drawn = figure(collection(count, blocks, kinds), name="a-rather-long-name-of-an-adapter-{}")
    drawn.savefig(io.BytesIO(), dpi=150)
    width, height = drawn.get_size_inches() * 150
    for axes in drawn.axes:
        box = axes.get_tightbbox()
        if box is None:
            continue
        assert (box.x0 >= -1, box.y0 >= -1, box.x1 <= width + 1, box.y1 <= height + 1) == (True,) * 4
        for ticks in (axes.get_xticklabels(), axes.get_yticklabels()):
            boxes = [tick.get_window_extent() for tick in ticks if tick.get_text() and tick.get_visible()]
            shown = [one for one in boxes if one.width and one.height]
            assert not any(a.overlaps(b) for i, a in enumerate(shown) for b in shown[i + 1 :])


@pytest.mark.parametrize(
    ("count", "numbers"), [(4, ["1", "2", "3", "4"]), (15, ["5", "10", "15"]), (30, ["10", "20", "30"])]
)
def test_adapters_have_their_numbers_under_the_matrix(count: int, numbers: list[str]) -> None:
    axes = next(axes for axes in figure(collection(count, 1, KINDS[:1])).axes if axes.images)
    assert [tick.get_text() for tick in axes.get_xticklabels()] == numbers


def test_the_bytes_are_the_same_every_time(tmp_path: Path) -> None:
    made = []
    for i in range(2):
        drawn = figure(collection(2, 1))
        for suffix in ("png", "svg", "pdf"):
            save(drawn, tmp_path / f"{i}.{suffix}")
            made.append((tmp_path / f"{i}.{suffix}").read_bytes())
    assert made[:3] == made[3:]


def test_one_adapter_has_no_pairs() -> None:
    adapters = collection(2, 1)
    pairs = pairwise(adapters)
    with pytest.raises(OptionError, match="no pairs"):
        pairwise_figure(["a"], pairs, interference(adapters, pairs.modules), leaves(pairs.cosine)[0], ["in"])
