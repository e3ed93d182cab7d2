"""The figure of amplification shows curves, controls, maps and φ as they are."""

import numpy as np
import pytest

from loralens import Amplification, OptionError
from loralens.analysis.amplification import Top
from loralens.charts.amplification_charts import amplification_figure
from loralens.charts.spec import ColourScale, Figure, HeatMap
from loralens.linalg.randomized import Estimate
from tests.charts.figures import lines_of, maps_of


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


def heat(figure: Figure, title: str) -> HeatMap:
    return next(chart for chart in maps_of(figure) if chart.title == title)


EXCESS, Z = "excess of ‖UᵀWV‖ over random", "z-score of ‖UᵀWV‖²"


def test_a_line_for_each_module_over_the_random_control() -> None:
    found = llama()
    chart = lines_of(amplification_figure(found, title="mine"))["v_proj"]
    *lines, chance = chart.lines
    assert (chance.name, chance.style) == ("random directions, median", "--")
    rows = [found[f"model.layers.{b}.self_attn.v_proj"].curve for b in range(3)]
    np.testing.assert_allclose(chance.y, [row.delta_norm / row.random_norm for row in rows[0]])
    for line, curve in zip(lines, rows, strict=True):
        np.testing.assert_allclose(line.x, [1, 2, 3])
        np.testing.assert_allclose(line.y, [row.amplification for row in curve])
    assert len({line.ink for line in lines}) == 3
    assert chart.log
    np.testing.assert_allclose(
        chart.area, [(x, y, y) for x, y in zip(chance.x, chance.y, strict=True)]
    )  # all three have the same control
    every = [y for line in chart.lines for y in line.y]
    assert chart.y_limits[0] < min(every) < max(every) < chart.y_limits[1]


def test_the_maps_hold_excess_and_z_of_every_block_and_kind() -> None:
    found = llama()
    del found["model.layers.1.self_attn.v_proj"]
    found["model.layers.0.self_attn.q_proj"] = one(0)
    figure = amplification_figure(found)
    excess, z = (heat(figure, title) for title in (EXCESS, Z))
    for chart in (excess, z):
        assert (len(chart.rows), len(chart.columns)) == (2, 3)
        assert np.argwhere(np.isnan(chart.values)).tolist() == [[0, 0], [1, 1]]
        assert (chart.scale.low, chart.scale.levels) == (-chart.scale.high, [0])
    last = found["model.layers.2.self_attn.v_proj"].at_rank(3)
    assert excess.values[1, 2] == pytest.approx(np.log2(last.excess))
    assert z.values[1, 2] == pytest.approx(last.z)
    assert excess.scale.words(1.0) == "2"
    assert excess.scale.chance_text == "1"


def test_phi_on_both_sides_with_chance() -> None:
    figure = amplification_figure(llama(), phi_rank=2)
    maps = maps_of(figure, small=True)
    assert [chart.title for chart in maps] == ["out side of ΔW and W", "in side of ΔW and W"]
    assert [chart.note for chart in maps] == ["corner 0.25, chance 0.05", "corner 0.5, chance 0.05"]
    for chart, value in zip(maps, (0.25, 0.5), strict=True):
        np.testing.assert_allclose(chart.values, np.full((2, 2), value))
    (scale,) = figure.bands[-1].keys
    assert isinstance(scale, ColourScale)
    assert scale.levels == [pytest.approx(0.05)]
    assert not maps_of(amplification_figure(llama(top=False)), small=True)


def test_what_has_no_value_is_left_out_and_nothing_at_all_is_an_error() -> None:
    found = llama() | {"model.layers.3.self_attn.q_proj": one(0), "model.layers.4.self_attn.q_proj": one(weight=0.0)}
    assert len(lines_of(amplification_figure(found))["q_proj"].lines) == 4
    with pytest.raises(OptionError, match="ΔW or W is 0 in every module"):
        amplification_figure({"a": one(0)})
