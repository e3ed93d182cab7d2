"""The figure of amplification shows curves, controls, maps and φ as they are."""

from itertools import pairwise

import numpy as np
import pytest

from loralens.analysis.amplification import Amplification, Top
from loralens.charts.amplification import amplification_figure
from loralens.charts.mpl import draw_figure
from loralens.charts.spec import Chart, ColourScale, Figure, HeatMap, LineChart, Overlaps
from loralens.errors import OptionError
from loralens.linalg.randomized import Estimate


def one(k: int = 3, factor: float = 1.0, *, top: bool = True, weight: float = 10.0, n: int = 40) -> Amplification:
    overlap = np.diag(np.arange(k, 0, -1.0)) / factor
    phi = np.full((k, k + 1), 0.25)
    return Amplification(
        (n, n),
        k,
        np.arange(k, 0, -1.0),
        overlap,
        weight,
        Estimate(weight**4 / 9, 0.0),
        Top(np.arange(k + 1, 0, -1.0), np.zeros(k + 1), phi, 2 * phi, exact=True) if top else None,
        (k,),
    )


def llama(blocks: int = 3, **options: object) -> dict[str, Amplification]:
    return {
        f"model.layers.{b}.self_attn.{kind}": one(factor=(b + 1) * (j + 1), **options)  # type: ignore[arg-type]
        for b in range(blocks)
        for j, kind in enumerate(("q_proj", "v_proj"))
    }


def panels(figure: Figure) -> dict[str, Chart]:
    return {chart.title: chart for chart in figure.charts}


def heat(figure: Figure, title: str) -> HeatMap:
    chart = panels(figure)[title]
    assert isinstance(chart, HeatMap)
    return chart


def curves(figure: Figure, title: str) -> LineChart:
    chart = panels(figure)[title]
    assert isinstance(chart, LineChart)
    return chart


EXCESS, Z = "excess of ‖UᵀWV‖ over random", "z-score of ‖UᵀWV‖²"


def test_a_line_for_each_module_over_the_random_control() -> None:
    found = llama()
    chart = curves(amplification_figure(found, title="mine"), "v_proj")
    *lines, chance = chart.lines
    assert (chance.name, chance.dashed) == ("random directions, median", True)
    rows = [found[f"model.layers.{b}.self_attn.v_proj"].curve for b in range(3)]
    np.testing.assert_allclose(chance.y, [row.delta_norm / row.random_norm for row in rows[0]])
    for line, curve in zip(lines, rows, strict=True):
        np.testing.assert_allclose(line.x, [1, 2, 3])
        np.testing.assert_allclose(line.y, [row.amplification for row in curve])
    assert len({line.ink for line in lines}) == 3
    assert chart.y.log
    (area,) = chart.areas
    np.testing.assert_allclose([area.low, area.high], [chance.y, chance.y])  # all three have the same control
    every = [y for line in chart.lines for y in line.y]
    assert chart.y.limits[0] < min(every) < max(every) < chart.y.limits[1]


def test_the_maps_hold_excess_and_z_of_every_block_and_kind() -> None:
    found = llama()
    del found["model.layers.1.self_attn.v_proj"]
    found["model.layers.0.self_attn.q_proj"] = one(0)
    figure = amplification_figure(found)
    excess, z = (heat(figure, title) for title in (EXCESS, Z))
    for chart in (excess, z):
        assert (len(chart.rows), len(chart.columns)) == (2, 3)
        assert chart.holes == [(0, 0), (1, 1)]
        assert (chart.scale.low, chart.scale.levels) == (-chart.scale.high, [0])
    last = found["model.layers.2.self_attn.v_proj"].at_rank(3)
    assert excess.cells[1, 2].value == pytest.approx(np.log2(last.excess))
    assert z.cells[1, 2].value == pytest.approx(last.z)
    assert excess.scale.text(1.0) == "2"
    assert excess.scale.chance_text == "1"


def test_several_modules_of_a_cell_are_their_median() -> None:
    found = {f"blocks.0.experts.w[{i}]": one(factor=i + 1.0) for i in range(3)}
    chart = heat(amplification_figure(found), EXCESS)
    assert chart.cells[0, 0].value == pytest.approx(np.log2(found["blocks.0.experts.w[1]"].at_rank(3).excess))
    assert chart.note == "a cell: the median of its modules"


def test_phi_on_both_sides_with_chance() -> None:
    figure = amplification_figure(llama(), phi_rank=2)
    maps = [chart for chart in figure.charts if isinstance(chart, Overlaps)]
    assert [chart.title for chart in maps] == ["out side of ΔW and W", "in side of ΔW and W"]
    assert [list(chart.notes) for chart in maps] == [["corner 0.25, chance 0.05"], ["corner 0.5, chance 0.05"]]
    for chart, value in zip(maps, (0.25, 0.5), strict=True):
        np.testing.assert_allclose(chart.phi, np.full((2, 2), value))
    (scale,) = figure.bands[-1].keys
    assert isinstance(scale, ColourScale)
    assert scale.levels == [pytest.approx(0.05)]
    assert not [c for c in amplification_figure(llama(top=False)).charts if isinstance(c, Overlaps)]


def test_what_has_no_value_is_left_out_and_nothing_at_all_is_an_error() -> None:
    found = llama() | {"model.layers.3.self_attn.q_proj": one(0), "model.layers.4.self_attn.q_proj": one(weight=0.0)}
    assert len(curves(amplification_figure(found), "q_proj").lines) == 4
    with pytest.raises(OptionError, match="ΔW or W is 0 in every module"):
        amplification_figure({"a": one(0)})


def test_modules_outside_blocks_and_odd_names() -> None:
    found = llama() | {"lm_head": one(), "model.layers.0.a $x$ [red]": one(1), "decoder.layers.0.q_proj": one()}
    figure = amplification_figure(found, title="a $b$ " * 60)
    assert "outside" in heat(figure, Z).columns
    draw_figure(figure)


def test_stacks_with_names_that_are_alike_at_both_ends_stay_apart() -> None:
    stacks = ("text_encoder.text_model.encoder.layers", "text_encoder_2.text_model.encoder.layers")
    figure = amplification_figure({f"{stack}.{b}.q_proj": one() for stack in stacks for b in range(2)})
    labels = [name for _, name in heat(figure, Z).column_texts]
    assert len(set(labels)) == len(labels) == 4


@pytest.mark.slow
def test_no_labels_overlap_at_32_blocks_of_seven_kinds() -> None:
    kinds = [f"self_attn.{x}_proj" for x in "qkvo"] + [f"mlp.{x}_proj" for x in ("gate", "up", "down")]
    found = {f"model.layers.{b}.{kind}": one(8, 1 + b) for b in range(32) for kind in kinds}
    drawing = draw_figure(amplification_figure(found))
    drawing.draw_without_rendering()
    for axes in drawing.axes:
        boxes = [t.get_window_extent() for t in axes.get_xticklabels() if t.get_visible() and t.get_text()]
        assert all(a.x1 < b.x0 for a, b in pairwise(boxes))
