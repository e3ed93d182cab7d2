"""The figures of similarity show what they were given, say what they leave out, and give the same bytes."""

from pathlib import Path

import numpy as np
import pytest
from loralens.charts.heat_map import CHANCE, colour_top, ticks
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.collections import QuadMesh
from matplotlib.figure import Figure
from matplotlib.text import Text

import loralens
from loralens.analysis.compare.nested import nesting
from loralens.analysis.compare.similarity import Comparison, compare_subspaces
from loralens.charts.figure import DPI, save
from loralens.charts.similarity import similarity_figure
from loralens.charts.similarity_nested import nesting_figure
from loralens.errors import OptionError

LABELS = ("mine", "yours")


def adapter(seed: int, blocks: int, kinds: tuple[str, ...], rank: int = 3, zero: str = "") -> loralens.Adapter:
    rng = np.random.default_rng(seed)
    names = [f"model.layers.{b}.self_attn.{kind}" for b in range(blocks) for kind in kinds]
    return loralens.Adapter(
        modules={
            name: loralens.LowRank(rng.standard_normal((12, rank)) * (name != zero), rng.standard_normal((rank, 16)))
            for name in names
        }
    )


def compared(blocks: int, *kinds: str, **more: str) -> Comparison:
    return compare_subspaces(adapter(0, blocks, kinds), adapter(1, blocks, kinds, rank=5, **more))


def words(figure: Figure) -> list[str]:
    return [text.get_text() for text in figure.findobj(Text) if text.get_text()]


def meshes(figure: Figure, title: str) -> list[np.ndarray]:
    return [
        np.asarray(next(c for c in axes.collections if isinstance(c, QuadMesh)).get_array())
        for axes in figure.axes
        if axes.get_title().startswith(title)
    ]


def test_a_heat_map_for_each_kind_and_block_and_the_chance_level_beside_them():
    found = compared(3, "q_proj", "v_proj")
    figure = similarity_figure(found, labels=LABELS)
    for b in range(3):
        for kind in ("q_proj", "v_proj"):
            one = found[f"model.layers.{b}.self_attn.{kind}"].overlap
            (values,) = meshes(figure, f"{kind}, block {b}\n")
            np.testing.assert_array_equal(values, one.phi)
            assert f"{kind}, block {b}\nφ(1,1) {one.first:.2f}, φ(3,5) {one.full:.2f}" in words(figure)
    chance = meshes(figure, "chance in 16 dimensions")
    assert len(chance) == 3
    np.testing.assert_array_equal(chance[0], one.chance)
    assert "φ(i, j)\nred: chance 0.062 to 0.31" in words(figure)
    assert "chance in 16 dimensions\nφ(1,1) 0.062, φ(3,5) 0.31" in words(figure)
    assert any("in side of ΔW: directions i of mine\nand j of yours" in text for text in words(figure))
    bar = next(axes for axes in figure.axes if axes.get_ylabel().startswith("φ(i, j)"))
    assert sorted(line.get_ydata()[0] for line in bar.lines if line.get_color() == CHANCE) == [1 / 16, 5 / 16]


def test_rows_are_directions_of_the_first_and_the_first_is_on_top():
    found = compared(1, "q_proj")
    figure = similarity_figure(found, labels=LABELS)
    axes = next(axes for axes in figure.axes if axes.get_title().startswith("q_proj"))
    assert (axes.get_xlim(), axes.get_ylim()) == ((0.5, 5.5), (3.5, 0.5))
    assert (axes.get_xlabel(), axes.get_ylabel()) == ("j", "i")


def test_of_many_blocks_four_are_shown_as_in_the_paper_and_all_at_a_glance():
    found = compared(32, "q_proj", "v_proj")
    figure = similarity_figure(found, labels=LABELS)
    shown = [text.split("\n")[0] for text in words(figure) if text.startswith("q_proj, block")]
    assert shown == [f"q_proj, block {b}" for b in (0, 10, 20, 31)]
    assert any("4 of 32 blocks, evenly spaced" in text for text in words(figure))
    overview = [axes for axes in figure.axes if axes.patch.get_hatch()]
    for axes, pick in zip(overview, ("first", "full"), strict=True):
        values = next(c for c in axes.collections if isinstance(c, QuadMesh)).get_array()
        expected = [
            [getattr(found[f"model.layers.{b}.self_attn.{kind}"].overlap, pick) for b in range(32)]
            for kind in ("q_proj", "v_proj")
        ]
        np.testing.assert_array_equal(values, expected)
        assert [label.get_text() for label in axes.get_yticklabels()] == ["q_proj", "v_proj"]
    assert overview[1].get_xlabel() == "block of model.layers"


@pytest.mark.parametrize(
    ("blocks", "kinds", "overviews"), [(2, 1, 0), (6, 2, 0), (7, 2, 2), (9, 1, 2), (1, 9, 0), (2, 9, 2)]
)
def test_few_modules_that_all_have_a_heat_map_need_no_map_of_all(blocks, kinds, overviews):
    figure = similarity_figure(compared(blocks, *(f"k{i}" for i in range(kinds))), labels=LABELS)
    assert sum(bool(axes.patch.get_hatch()) for axes in figure.axes) == overviews


def test_a_kind_that_none_of_the_blocks_shown_has_takes_no_column():
    first, second = (adapter(seed, 32, ("q_proj", "v_proj")) for seed in (0, 1))
    figure = similarity_figure(compare_subspaces(first, second, modules=["q_proj", "*.2.*"]), labels=LABELS)
    assert not any(text.startswith("v_proj, block") for text in words(figure))
    assert sum(bool(axes.get_title()) for axes in figure.axes) == 8  # four blocks, each beside chance
    assert any("1 of 2 kinds (--modules picks others)" in text for text in words(figure))


def test_of_96_blocks_they_are_the_paper_s_1_32_64_and_96():
    found = compared(96, "q_proj")
    titles = [text.split("\n")[0] for text in words(similarity_figure(found, labels=LABELS)) if "q_proj, " in text]
    assert titles == [f"q_proj, block {b - 1}" for b in (1, 32, 64, 96)]


@pytest.mark.parametrize(("blocks", "kinds", "tail"), [(32, 7, ""), (1, 9, ""), (110, 9, "_with_a_rather_long_name")])
def test_no_panel_title_touches_its_neighbour(blocks, kinds, tail):
    names = [f"{k}_proj{tail}" for k in ("q", "k", "v", "o", "gate", "up", "down", "in", "out")]
    figure = similarity_figure(compared(blocks, *names[:kinds]), labels=LABELS)
    renderer = FigureCanvasAgg(figure).get_renderer()
    boxes = [axes.title.get_window_extent(renderer) for axes in figure.axes if axes.get_title()]
    assert not any(one.overlaps(two) for i, one in enumerate(boxes) for two in boxes[:i])
    if kinds > 8:
        assert any("8 of 9 kinds" in text for text in words(figure))


def test_a_zero_module_leaves_a_hole():
    found = compared(2, "q_proj", "v_proj", zero="model.layers.1.self_attn.q_proj")
    figure = similarity_figure(found, labels=LABELS)
    assert not meshes(figure, "q_proj, block 1")
    assert len(meshes(figure, "v_proj, block 1")) == 1


def test_nothing_to_compare_is_said():
    found = compared(1, "q_proj", zero="model.layers.0.self_attn.q_proj")
    assert any("ΔW is 0 everywhere" in text for text in words(similarity_figure(found, labels=LABELS)))


def test_names_without_blocks_and_several_modules_in_a_cell():
    rng = np.random.default_rng(0)
    names = ["to_q", "head", "down.0.a.to_q", "down.0.b.to_q", "up.0.a.to_q"]
    mine = loralens.Adapter(
        modules={n: loralens.LowRank(rng.standard_normal((6, 2)), rng.standard_normal((2, 7))) for n in names}
    )
    text = "\n".join(words(similarity_figure(compare_subspaces(mine, mine), labels=LABELS)))
    assert "4 of 5 modules: of several of one kind in a block, the first" in text
    assert "to_q, down.0" in text
    assert "to_q, outside" in text
    bare = loralens.Adapter(modules={name: mine[name] for name in ("to_q", "head")})
    assert "head, head" in "\n".join(words(similarity_figure(compare_subspaces(bare, bare), labels=LABELS)))


def test_of_the_paper_s_own_quantity_the_title_says_so():
    found = compare_subspaces(adapter(0, 1, ("q",)), adapter(1, 1, ("q",)), of="A")
    assert any(text.startswith("in side of A: ") for text in words(similarity_figure(found, labels=LABELS, of="A")))


def test_nested_modules_stand_against_each_other():
    mine = adapter(0, 3, ("q_proj", "v_proj"))
    (one,) = nesting(mine)
    figure = nesting_figure([one], label="mine")
    (values,) = meshes(figure, "6 modules of width 16")
    full, first = np.triu_indices(6, 1), np.tril_indices(6, -1)
    np.testing.assert_array_equal(values[full], one.full[full])
    np.testing.assert_array_equal(values[first], one.first[first])
    assert "φ of all directions above, φ(1, 1) below the diagonal\nred: chance 0.19" in words(figure)
    assert "q_proj\n0 to 2" in words(figure)
    assert any(text.startswith("mine: in side of ΔW") for text in words(figure))
    of_B = nesting_figure(nesting(mine, of="B"), label="mine", of="B")
    assert any(text.startswith("mine: out side of B") for text in words(of_B))
    with pytest.raises(OptionError, match="of one width"):
        nesting_figure([], label="mine")


def test_the_same_bytes_every_time(tmp_path: Path):
    for name in ("one", "two"):
        save(similarity_figure(compared(2, "q_proj"), labels=LABELS), tmp_path / f"{name}.svg")
        save(nesting_figure(nesting(adapter(0, 3, ("q", "v"))), label="m"), tmp_path / f"{name}-nested.svg")
    for stem in ("", "-nested"):
        one, two = ((tmp_path / f"{name}{stem}.svg").read_bytes() for name in ("one", "two"))
        assert one == two


def test_colours_end_at_the_largest_tenth_and_ticks_at_the_last_direction():
    assert colour_top([np.array([[0.31, 0.02]]), np.array([[np.nan]])]) == pytest.approx(0.4)
    assert (colour_top([]), colour_top([np.array([[0.001]])]), colour_top([np.array([[1.0]])])) == (0.1, 0.1, 1.0)
    assert [ticks(k) for k in (1, 2, 3, 8, 64)] == [[1], [1, 2], [1, 2, 3], [1, 2, 4, 6, 8], [1, 16, 32, 48, 64]]


@pytest.mark.parametrize("blocks", [32, 10])
def test_no_label_leaves_the_figure(blocks):
    names = [f"{i}_a_kind_with_a_name_that_is_rather_long" for i in range(7)]
    for figure in (
        similarity_figure(compared(blocks, *names), labels=LABELS),
        nesting_figure(nesting(adapter(0, blocks, tuple(names))), label="mine"),
    ):
        figure.set_dpi(DPI)  # as it is saved
        renderer = FigureCanvasAgg(figure).get_renderer()
        width, height = figure.get_size_inches() * DPI
        for axes in figure.axes:
            box = axes.get_tightbbox(renderer)
            assert box is not None
            assert (box.x0 >= 0, box.y0 >= 0, box.x1 <= width, box.y1 <= height) == (True,) * 4


def test_blocks_of_several_stacks_are_told_apart():
    rng = np.random.default_rng(0)
    names = [f"{stack}.layers.{b}.q" for stack in ("text.encoder", "image.decoder") for b in (0, 1)]
    mine = loralens.Adapter(
        modules={n: loralens.LowRank(rng.standard_normal((6, 2)), rng.standard_normal((2, 7))) for n in names}
    )
    titles = [text.split("\n")[0] for text in words(similarity_figure(compare_subspaces(mine, mine), labels=LABELS))]
    shown = [title for title in titles if title.startswith("q, ")]
    assert shown == ["q, image.de…ayers.0", "q, image.de…ayers.1", "q, text.enc…ayers.0", "q, text.enc…ayers.1"]


def test_stacks_that_short_names_would_make_one_are_numbered():
    rng = np.random.default_rng(0)
    names = [f"text_encoder{tail}.text_model.encoder.layers.{b}.q" for tail in ("", "_2") for b in (0, 1)]
    mine = loralens.Adapter(
        modules={n: loralens.LowRank(rng.standard_normal((6, 2)), rng.standard_normal((2, 7))) for n in names}
    )
    titles = [text.split("\n")[0] for text in words(similarity_figure(compare_subspaces(mine, mine), labels=LABELS))]
    shown = [title for title in titles if title.startswith("q, ")]
    assert shown == ["q, (1) text…ayers.0", "q, (1) text…ayers.1", "q, (2) text…ayers.0", "q, (2) text…ayers.1"]
