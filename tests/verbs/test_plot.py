"""``plot``: the figure of a result, on a figure of its own or in axes that are there."""

import pytest
from matplotlib.figure import Figure as Drawing

import loralens
from loralens import OptionError, spectrum
from loralens.charts.spec import LineChart
from loralens.verbs.pages.plot import figure_of
from tests.draws import draw_adapter


def adapter() -> loralens.Adapter:
    return draw_adapter(0, {f"model.layers.{b}.self_attn.q_proj": (9, 7) for b in range(3)}, 4, dtype="f8")


def test_axes_hold_a_figure_of_one_panel_only() -> None:
    axes = Drawing().subplots()
    with pytest.raises(OptionError, match="this figure has 2 panels, and ax can hold one"):
        loralens.plot(spectrum(adapter()), ax=axes)
    assert not axes.lines


def test_a_curve_is_drawn_into_axes() -> None:
    axes = Drawing().subplots()
    result = loralens.curve(adapter())
    assert loralens.plot(result, ax=axes) is axes.figure
    (chart,) = figure_of(result).charts
    assert isinstance(chart, LineChart)
    assert [line.get_label() for line in axes.lines] == [line.name for line in chart.lines]
    assert axes.get_ylabel() == chart.y_label


def test_what_has_no_figure_is_said() -> None:
    with pytest.raises(OptionError, match="int has no figure"):
        loralens.plot(1)
