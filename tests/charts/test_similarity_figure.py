"""The figures of similarity hold what they were given, and say what they leave out."""

import numpy as np
import pytest

from loralens import Comparison, OptionError
from loralens.analysis import compare_subspaces
from loralens.analysis.nested import nesting
from loralens.charts.mpl import draw_figure
from loralens.charts.pair_charts import nesting_figure, similarity_figure
from loralens.charts.spec import ColourScale, Figure, HeatMap
from tests.charts.figures import adapter, maps_of

LABELS = ("mine", "yours")


ATTENTION = ("self_attn.q_proj", "self_attn.v_proj")


def phis(figure: Figure) -> dict[str, HeatMap]:
    return {chart.title: chart for chart in maps_of(figure, small=True)}


def compared(blocks: int, **more: str) -> Comparison:
    # On the in side, whose width differs from that of the out side: a mistake of side would be seen.
    return compare_subspaces(
        adapter(0, blocks, kinds=ATTENTION), adapter(1, blocks, 5, kinds=ATTENTION, **more), side="in"
    )


def test_a_heat_map_for_each_kind_and_block_and_the_chance_level_beside_them() -> None:
    found = compared(3)
    figure = similarity_figure(found, labels=LABELS)
    for b in range(3):
        for kind in ("q_proj", "v_proj"):
            one = found[f"model.layers.{b}.self_attn.{kind}"].overlap
            chart = phis(figure)[f"{kind}, block {b}"]
            np.testing.assert_array_equal(chart.values, one.phi)
            assert chart.note == f"φ(1,1) {one.first:.2f}\nall {one.full:.2f} (chance 0.31)"
    band = figure.bands[0]
    assert (band.columns, len(band.charts)) == (2, 6)
    assert figure.title == "in side of ΔW: directions i of mine\nand j of yours"
    (scale,) = band.keys
    assert isinstance(scale, ColourScale)
    assert scale.levels == [1 / 16, 5 / 16]
    assert all(chart.scale is scale for chart in phis(figure).values())


def test_of_many_blocks_four_are_shown_as_in_the_paper_and_all_at_a_glance() -> None:
    found = compared(32)
    figure = similarity_figure(found, labels=LABELS)
    assert [title for title in phis(figure) if title.startswith("q_proj")] == [
        f"q_proj, block {b}" for b in (0, 10, 20, 31)
    ]
    assert "4 of 32 blocks, evenly spaced" in figure.title
    for chart, pick in zip(maps_of(figure), ("first", "full"), strict=True):
        assert chart.rows == ["q_proj", "v_proj"]
        assert chart.note == "block of model.layers"
        for (i, b), value in np.ndenumerate(chart.values):
            one = found[f"model.layers.{b}.self_attn.{chart.rows[i]}"].overlap
            assert value == getattr(one, pick)
        assert chart.values.shape == (2, 32)


def test_a_zero_module_leaves_a_hole() -> None:
    found = compared(2, zero="model.layers.1.self_attn.q_proj")
    figure = similarity_figure(found, labels=LABELS)
    assert figure.bands[0].charts[2] is None
    assert "v_proj, block 1" in phis(figure)
    draw_figure(figure)


def test_nested_modules_stand_against_each_other() -> None:
    mine = adapter(0, 3, kinds=ATTENTION)
    (one,) = nesting(mine, side="in")
    figure = nesting_figure([one], label="mine", side="in")
    (chart,) = maps_of(figure)
    assert chart.title == "6 modules of width 16"
    for (i, j), value in np.ndenumerate(chart.values):
        assert np.isnan(value) if i == j else value == (one.full if i < j else one.first)[i, j]
    assert len(chart.tips) == 30
    assert chart.scale.label == "φ of all above, φ(1, 1) below the diagonal"
    assert chart.scale.chance_text == "0.19"
    assert list(chart.rows) == list(chart.columns) == ["", "q_proj 0–2", "", "", "v_proj 0–2", ""]
    assert chart.row_edges == chart.column_edges == [3]
    assert figure.title.startswith("mine: in side of ΔW")
    assert nesting_figure(nesting(mine, of="B"), label="mine", of="B").title.startswith("mine: out side of B")
    with pytest.raises(OptionError, match="the same width"):
        nesting_figure([], label="mine")
