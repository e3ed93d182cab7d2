"""The figures of similarity hold what they were given, and say what they leave out."""

import numpy as np
import pytest

import loralens
from loralens.analysis.nested import nesting
from loralens.analysis.two_adapters import Comparison, compare_subspaces
from loralens.charts.mpl import draw_figure
from loralens.charts.similarity import colour_top, nesting_figure, similarity_figure
from loralens.charts.spec import ColourScale, Figure, HeatMap, Overlaps
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
    # On the in side, whose width differs from that of the out side: a mistake of side would be seen.
    return compare_subspaces(adapter(0, blocks, kinds), adapter(1, blocks, kinds, rank=5, **more), side="in")


def phis(figure: Figure) -> dict[str, Overlaps]:
    return {chart.title: chart for chart in figure.charts if isinstance(chart, Overlaps)}


def maps(figure: Figure) -> list[HeatMap]:
    return [chart for chart in figure.charts if isinstance(chart, HeatMap)]


def test_a_heat_map_for_each_kind_and_block_and_the_chance_level_beside_them() -> None:
    found = compared(3, "q_proj", "v_proj")
    figure = similarity_figure(found, labels=LABELS)
    for b in range(3):
        for kind in ("q_proj", "v_proj"):
            one = found[f"model.layers.{b}.self_attn.{kind}"].overlap
            chart = phis(figure)[f"{kind}, block {b}"]
            np.testing.assert_array_equal(chart.phi, one.phi)
            assert list(chart.notes) == [f"φ(1,1) {one.first:.2f}", f"all {one.full:.2f} (chance 0.31)"]
    band = figure.bands[0]
    assert (band.columns, len(band.charts)) == (2, 6)
    # All modules have one shape, so there is one map of chance, and not one for each block.
    by_chance = figure.bands[1]
    chance = [chart for chart in by_chance.charts if chart]
    assert [chart.title for chart in chance] == ["chance, n = 16"]
    assert isinstance(chance[0], Overlaps)
    np.testing.assert_array_equal(chance[0].phi, one.chance)
    assert list(chance[0].notes) == ["φ(1,1) 0.062", "all 0.31"]
    assert figure.title == "in side of ΔW: directions i of mine\nand j of yours"
    (scale,) = by_chance.keys
    assert isinstance(scale, ColourScale)
    assert scale.levels == [1 / 16, 5 / 16]
    assert all(chart.scale is scale for chart in phis(figure).values())


def test_of_many_blocks_four_are_shown_as_in_the_paper_and_all_at_a_glance() -> None:
    found = compared(32, "q_proj", "v_proj")
    figure = similarity_figure(found, labels=LABELS)
    assert [title for title in phis(figure) if title.startswith("q_proj")] == [
        f"q_proj, block {b}" for b in (0, 10, 20, 31)
    ]
    assert "4 of 32 blocks, evenly spaced" in figure.title
    for chart, pick in zip(maps(figure), ("first", "full"), strict=True):
        assert chart.rows == ["q_proj", "v_proj"]
        assert chart.across == "block of model.layers"
        for (i, b), cell in chart.cells.items():
            one = found[f"model.layers.{b}.self_attn.{chart.rows[i]}"].overlap
            assert cell.value == getattr(one, pick)
        assert len(chart.cells) == 64


@pytest.mark.parametrize(
    ("blocks", "kinds", "overviews"), [(2, 1, 0), (6, 2, 0), (7, 2, 2), (9, 1, 2), (1, 9, 2), (2, 9, 2)]
)
def test_few_modules_that_all_have_a_heat_map_need_no_map_of_all(blocks: int, kinds: int, overviews: int) -> None:
    figure = similarity_figure(compared(blocks, *(f"k{i}" for i in range(kinds))), labels=LABELS)
    assert len(maps(figure)) == overviews


def test_a_kind_that_none_of_the_blocks_shown_has_takes_no_column() -> None:
    first, second = (adapter(seed, 32, ("q_proj", "v_proj")) for seed in (0, 1))
    figure = similarity_figure(compare_subspaces(first, second, modules=["q_proj", "*.2.*"]), labels=LABELS)
    assert not any(title.startswith("v_proj") for title in phis(figure))
    assert (figure.bands[0].columns, len(figure.bands[0].charts)) == (None, 5)  # four blocks, and chance
    assert "1 of 2 kinds (--modules picks others)" in figure.title


def test_of_96_blocks_they_are_the_paper_s_1_32_64_and_96() -> None:
    titles = [title for title in phis(similarity_figure(compared(96, "q_proj"), labels=LABELS)) if "q_proj, " in title]
    assert titles == [f"q_proj, block {b - 1}" for b in (1, 32, 64, 96)]


@pytest.mark.parametrize(
    ("blocks", "kinds", "tail"),
    [
        (1, 9, ""),
        pytest.param(32, 7, "", marks=pytest.mark.slow),
        pytest.param(110, 9, "_with_a_rather_long_name", marks=pytest.mark.slow),
    ],
)
def test_no_panel_title_touches_its_neighbour(blocks: int, kinds: int, tail: str) -> None:
    names = [f"{k}_proj{tail}" for k in ("q", "k", "v", "o", "gate", "up", "down", "in", "out")]
    figure = similarity_figure(compared(blocks, *names[:kinds]), labels=LABELS)
    drawing = draw_figure(figure)
    drawing.draw_without_rendering()
    boxes = [axes._left_title.get_window_extent() for axes in drawing.axes if axes.get_title(loc="left")]  # type: ignore[attr-defined]
    assert not any(one.overlaps(two) for i, one in enumerate(boxes) for two in boxes[:i])
    assert ("8 of 9 kinds" in figure.title) == (kinds > 8)


def test_a_zero_module_leaves_a_hole() -> None:
    found = compared(2, "q_proj", "v_proj", zero="model.layers.1.self_attn.q_proj")
    figure = similarity_figure(found, labels=LABELS)
    assert figure.bands[0].charts[2] is None
    assert "v_proj, block 1" in phis(figure)
    draw_figure(figure)


def test_nothing_to_compare_is_said() -> None:
    figure = similarity_figure(compared(1, "q_proj", zero="model.layers.0.self_attn.q_proj"), labels=LABELS)
    assert "ΔW is 0 everywhere" in figure.title
    draw_figure(figure)


def test_names_without_blocks_and_several_modules_in_a_cell() -> None:
    rng = np.random.default_rng(0)
    names = ["to_q", "head", "down.0.a.to_q", "down.0.b.to_q", "up.0.a.to_q"]
    mine = loralens.Adapter(
        modules={n: loralens.LowRank(rng.standard_normal((6, 2)), rng.standard_normal((2, 7))) for n in names}
    )
    figure = similarity_figure(compare_subspaces(mine, mine), labels=LABELS)
    assert "4 of 5 modules: the first of each kind in a block" in figure.title
    assert {"to_q, block down.0", "to_q, outside"} <= set(phis(figure))
    bare = loralens.Adapter(modules={name: mine[name] for name in ("to_q", "head")})
    assert "head, head" in phis(similarity_figure(compare_subspaces(bare, bare), labels=LABELS))


def test_a_block_that_has_none_of_the_kinds_shown_is_an_empty_row() -> None:
    rng = np.random.default_rng(0)
    names = [f"layers.0.a{i}" for i in range(8)] + ["layers.1.z"]
    mine = loralens.Adapter(
        modules={n: loralens.LowRank(rng.standard_normal((6, 2)), rng.standard_normal((2, 7))) for n in names}
    )
    figure = similarity_figure(compare_subspaces(mine, mine), labels=LABELS)
    assert list(figure.bands[0].charts[8:]) == [None] * 8
    draw_figure(figure)


def test_of_the_paper_s_own_quantity_the_title_says_so() -> None:
    found = compare_subspaces(adapter(0, 1, ("q",)), adapter(1, 1, ("q",)), of="A")
    assert similarity_figure(found, labels=LABELS, of="A").title.startswith("in side of A: ")


def test_nested_modules_stand_against_each_other() -> None:
    mine = adapter(0, 3, ("q_proj", "v_proj"))
    (one,) = nesting(mine, side="in")
    figure = nesting_figure([one], label="mine", side="in")
    (chart,) = maps(figure)
    assert chart.title == "6 modules of width 16"
    for (i, j), cell in chart.cells.items():
        assert cell.value == (one.full if i < j else one.first)[i, j]
    assert len(chart.cells) == 30  # the diagonal is 1
    assert chart.scale.label == "φ of all above, φ(1, 1) below the diagonal"
    assert chart.scale.chance_text == "0.19"
    assert chart.row_texts == chart.column_texts == [(1, "q_proj 0–2"), (4, "v_proj 0–2")]
    assert chart.row_edges == chart.column_edges == [3]
    assert figure.title.startswith("mine: in side of ΔW")
    assert nesting_figure(nesting(mine, of="B"), label="mine", of="B").title.startswith("mine: out side of B")
    with pytest.raises(OptionError, match="the same width"):
        nesting_figure([], label="mine")


def test_colours_end_at_the_largest_tenth() -> None:
    assert colour_top([0.31, 0.02, float("nan")]) == pytest.approx(0.4)
    assert (colour_top([]), colour_top([0.001]), colour_top([1.0])) == (0.1, 0.1, 1.0)


@pytest.mark.slow
@pytest.mark.parametrize("blocks", [32, 10])
def test_no_label_leaves_the_figure(blocks: int) -> None:
    names = [f"{i}_a_kind_with_a_name_that_is_rather_long" for i in range(7)]
    for figure in (
        similarity_figure(compared(blocks, *names), labels=LABELS),
        nesting_figure(nesting(adapter(0, blocks, tuple(names))), label="mine"),
    ):
        drawing = draw_figure(figure)
        drawing.draw_without_rendering()
        for axes in drawing.axes:
            box = axes.get_tightbbox()
            assert box is not None
            assert box.x0 >= 0
            assert box.y0 >= 0
            assert box.x1 <= drawing.bbox.x1
            assert box.y1 <= drawing.bbox.y1


@pytest.mark.parametrize(
    ("names", "shown"),
    [
        (
            [f"{stack}.layers.{b}.q" for stack in ("text.encoder", "image.decoder") for b in (0, 1)],
            ["image.de…ayers.0", "image.de…ayers.1", "text.enc…ayers.0", "text.enc…ayers.1"],
        ),
        (
            [f"text_encoder{tail}.text_model.encoder.layers.{b}.q" for tail in ("", "_2") for b in (0, 1)],
            ["(1) text…ayers.0", "(1) text…ayers.1", "(2) text…ayers.0", "(2) text…ayers.1"],
        ),
    ],
)
def test_blocks_of_several_stacks_are_told_apart(names: list[str], shown: list[str]) -> None:
    rng = np.random.default_rng(0)
    mine = loralens.Adapter(
        modules={n: loralens.LowRank(rng.standard_normal((6, 2)), rng.standard_normal((2, 7))) for n in names}
    )
    titles = [
        title for title in phis(similarity_figure(compare_subspaces(mine, mine), labels=LABELS)) if "q, " in title
    ]
    assert titles == [f"q, block {name}" for name in shown]
