"""The figure of spectra holds what it was given, and says in words what it does not show."""

from collections.abc import Iterable, Mapping

import numpy as np
import pytest
from matplotlib.figure import Figure as Drawing

from loralens import OptionError, Spectrum
from loralens.charts.figure_file import check_suffix, save_figure
from loralens.charts.spec import HeatMap, LineChart
from loralens.charts.spectrum_charts import spectrum_figure
from tests.charts.figures import lines_of, maps_of

Spectra = Mapping[str, Spectrum]


def one(*s: float, rank: int | None = None, shape: tuple[int, int] = (64, 64)) -> Spectrum:
    return Spectrum(np.array(s, dtype=np.float64), shape, rank or len(s))


def llama(blocks: Iterable[int] = range(3), kinds: Iterable[str] = ("q_proj", "v_proj"), rank: int = 4) -> Spectra:
    return {
        f"model.layers.{b}.self_attn.{kind}": one(*(np.arange(rank, 0, -1) * (b + 1.5) * (j + 1.25)))
        for b in blocks
        for j, kind in enumerate(kinds)
    }


def curves(chart: LineChart) -> list[list[float]]:
    return [list(line.y) for line in chart.lines]


def labels(chart: HeatMap) -> list[str]:
    return [label for label in chart.columns if label]


def test_a_panel_for_each_kind_and_a_line_for_each_block() -> None:
    spectra = llama()
    figure = spectrum_figure({"mine": spectra})
    shown = lines_of(figure)
    assert list(shown) == ["q_proj", "v_proj"]
    for kind, chart in shown.items():
        given = {name: s.s for name, s in spectra.items() if name.endswith(kind)}
        assert [line.name for line in chart.lines] == list(given)
        for line, s in zip(chart.lines, given.values(), strict=True):
            assert (list(line.x), list(line.y)) == ([1, 2, 3, 4], s.tolist())
        assert chart.log
        assert chart.y_limits[0] < min(s.min() for s in given.values())
        assert chart.y_limits[1] > max(s.max() for s in given.values())
        assert (chart.x_label, chart.y_label) == ("direction i", "σᵢ of ΔW")
    # Of one adapter the name is the title of the figure, which --figure-title replaces.
    assert (figure.title, figure.bands[0].title) == ("mine", "")
    both = spectrum_figure({"mine": spectra, "other": spectra})
    assert (both.title, both.bands[0].title, both.bands[2].title) == ("", "mine", "other")
    inks = [line.ink for line in shown["q_proj"].lines]
    assert inks == ["b0", "b8", "b15"]
    (ramp,) = figure.bands[0].keys
    assert (ramp.label, ramp.first, ramp.last) == ("block of model.layers", "0", "2")


def test_the_map_holds_the_effective_ranks() -> None:
    spectra = llama()
    (chart,) = maps_of(spectrum_figure({"mine": spectra}))
    assert (chart.rows, chart.columns, chart.note) == (["q_proj", "v_proj"], ["0", "1", "2"], "block of model.layers")
    expected = [[spectra[f"model.layers.{b}.self_attn.{k}"].effective_rank for b in range(3)] for k in chart.rows]
    np.testing.assert_allclose(chart.values, expected)
    assert chart.scale.label == "effective rank (of r = 4)"
    assert "effective rank" in chart.tips[0, 0][1]


def test_zero_and_missing_modules_are_told_apart_and_are_named() -> None:
    spectra = {**llama(range(4)), "model.layers.1.self_attn.q_proj": one(0, 0, 0, 0)}
    del spectra["model.layers.2.self_attn.v_proj"]
    figure = spectrum_figure({"mine": spectra})
    (chart,) = maps_of(figure)
    assert (list(chart.zeros), np.argwhere(np.isnan(chart.values)).tolist()) == ([(0, 1)], [[0, 1], [1, 2]])
    assert chart.note == "block of model.layers\ndotted: none; ×: ΔW = 0"
    q, v = lines_of(figure).values()
    assert (q.note, v.note) == ("1 of 4 modules are zero", "")
    assert [len(y) for y in curves(q)] == [4, 4, 4]


def test_stacks_are_told_apart() -> None:
    parts = ("unet.down_blocks.0", "unet.down_blocks.1", "unet.mid_block.attentions.0", "unet.up_blocks.1")
    spectra = {f"{p}.attentions.0.attn{a}.to_q": one(3 * a, 1) for p in parts for a in (1, 2)}
    figure = spectrum_figure({"unet": spectra})
    (chart,) = maps_of(figure)
    names = ["down_blocks.0", "down_blocks.1", "mid_block.attentions.0", "up_blocks.1"]
    (ramp,) = figure.bands[0].keys
    assert (ramp.first, ramp.last) == (names[0], names[-1])
    assert labels(chart) == [names[0], "1", *names[2:]]
    assert len(lines_of(figure)["to_q"].lines) == 8
    mean = (one(3, 1).effective_rank + one(6, 1).effective_rank) / 2
    np.testing.assert_allclose(chart.values, [[mean] * 4])
    assert chart.note == "block\na cell: the mean of its modules, up to 2"
    assert chart.column_edges == [2, 3]


def test_adapters_of_rank_one_are_drawn_against_the_block() -> None:
    figure = spectrum_figure({"one": {f"layers.{b}.q": one(b + 1.0) for b in range(3)}})
    (chart,) = lines_of(figure).values()
    assert [(list(line.x), list(line.y)) for line in chart.lines] == [([0], [1]), ([1], [2]), ([2], [3])]
    assert chart.x_label == "block of layers"


def test_the_kinds_of_least_energy_share_a_panel() -> None:
    spectra = {f"layers.{b}.kind{k}": one((k + 1) * 2.0, k + 1) for b in range(2) for k in range(30)}
    figure = spectrum_figure({"wide": spectra})
    assert list(lines_of(figure)) == [*(f"kind{k}" for k in range(7, 30)), "7 other kinds"]
    assert len(lines_of(figure)["7 other kinds"].lines) == 14
    two = spectrum_figure({"a": spectra, "b": spectra})
    assert len([chart for chart in two.charts if isinstance(chart, LineChart)]) == 24


@pytest.mark.parametrize("name", ["spectra.gif", "spectra", "png"])
def test_another_suffix_is_an_error_that_lists_those_there_are(tmp_path, name):
    with pytest.raises(OptionError) as error:
        check_suffix(tmp_path / name)
    assert ".png, .jpg, .webp, .svg or .pdf" in str(error.value)
    with pytest.raises(OptionError):
        save_figure(Drawing(), tmp_path / name)
    assert not list(tmp_path.iterdir())


def test_the_users_own_settings_change_nothing(tmp_path):
    from matplotlib import rc_context

    save_figure(spectrum_figure({"a$b$\n\udcff_漢": llama()}), tmp_path / "plain.svg")
    with rc_context({"font.size": 20, "svg.hashsalt": "mine", "font.family": ["serif"]}):
        save_figure(spectrum_figure({"a$b$\n\udcff_漢": llama()}), tmp_path / "loud.svg")
    assert (tmp_path / "plain.svg").read_bytes() == (tmp_path / "loud.svg").read_bytes()
