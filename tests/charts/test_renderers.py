"""What pages and matplotlib draw of a chart: its numbers and words; no text leaves a picture or meets another."""

import re
from functools import cache
from pathlib import Path
from xml.etree import ElementTree as ET

import numpy as np
import pytest
from matplotlib.axes import Axes
from matplotlib.figure import Figure as Drawing
from matplotlib.text import Text

from loralens import OptionError
from loralens.charts.figure_file import save_figure
from loralens.charts.mpl import draw_figure
from loralens.charts.palette import level
from loralens.charts.spec import Band, Chart, ColourScale, Figure, HeatMap, Key, Line, LineChart, Ramp
from loralens.reporting.document import Panel, Picture, Report, Section
from loralens.reporting.report_files import report_html
from tests.charts.figures import FIGURES


def panels(drawing: Drawing) -> list[Axes]:
    """The axes of charts, without those of colour bars."""
    return [axes for axes in drawing.axes if not str(axes.get_label()).startswith("<")]


def drawn(*charts: Chart, title: str = "Title", keys: tuple[Key, ...] = ()) -> Drawing:
    return draw_figure(Figure(title, [Band(charts, keys=keys)]))


@cache
def drawing_named(name: str) -> Drawing:
    """The figure as matplotlib draws it, once for all tests, which only read it; every text has its place."""
    drawing = draw_figure(FIGURES[name]())
    drawing.draw_without_rendering()
    return drawing


def on_page(*charts: Chart, keys: tuple[Key, ...] = ()) -> list[ET.Element]:
    """The pictures of a page with these charts, without the keys."""
    panel = Panel("key", charts, "alt", keys=keys)
    text = report_html(Report("t", "", "h", [Section("s", "S", "", [Picture("P", "c", "no", "us", [panel])])]))
    found = [ET.fromstring(one) for one in re.findall(r"<svg.*?</svg>", text, flags=re.DOTALL)]  # our own
    return [one for one in found if one.get("class") != "key"]


@pytest.mark.slow
@pytest.mark.parametrize("name", FIGURES)
def test_the_page_and_the_picture_show_the_numbers_of_the_chart(name: str) -> None:
    figure = FIGURES[name]()
    for chart, axes in zip(figure.charts, panels(drawing_named(name)), strict=True):
        (page,) = on_page(chart)
        if isinstance(chart, LineChart):
            groups = {str(one.get("data-n")): one for one in page.iter("g") if one.get("data-n") is not None}
            lines = {str(line.get_label()): line for line in axes.lines}
            for line in chart.lines:
                if points := [(x, y) for x, y, _ in chart.points(line)]:
                    ys = [float(y) for y in str(groups[line.name].get("data-y")).split()]
                    np.testing.assert_allclose(ys, [y for _, y in points], rtol=1e-3)  # four digits on the page
                    np.testing.assert_array_equal(lines[line.name].get_xydata(), points)
            assert (axes.get_xlim(), axes.get_ylim()) == (chart.x_limits, chart.y_limits)
            legend = axes.get_legend()
            assert not legend or [x.get_text() for x in legend.get_texts()] == [line.name for line in chart.named]
            continue
        np.testing.assert_array_equal(np.ma.filled(axes.collections[0].get_array(), np.nan), chart.values)
        if not chart.small:
            shown = {(str(one.get("data-n")), str(one.get("data-t"))): one for one in page.iter("rect")}
            for (i, j), tip in chart.tips.items():
                share = chart.scale.share(chart.values[i, j])
                assert shown[tip].get("class") == level(share, diverging=chart.scale.diverging)
            continue
        (group,) = [one for one in page.iter("g") if one.get("data-phi")]
        digits = [[int(row[k : k + 2]) for k in range(0, len(row), 2)] for row in str(group.get("data-phi")).split()]
        np.testing.assert_allclose(digits, np.minimum(100 * chart.values, 99), atol=0.5001)
        # A number stands below the middle of its column of cells.
        left, _, wide, _ = map(float, re.findall(r"[\d.]+", str(group.get("transform"))))
        below = [one for one in page.iter("text") if one.get("class") == "num mid"]
        assert below
        for one in below:
            assert float(str(one.get("x"))) == pytest.approx(left + wide * (int(str(one.text)) - 0.5), abs=0.1)


@pytest.mark.slow
@pytest.mark.parametrize("name", FIGURES)
def test_nothing_leaves_the_picture_and_titles_stay_clear_of_each_other(name: str) -> None:
    drawing = drawing_named(name)
    for axes in drawing.axes:
        box = axes.get_tightbbox()
        assert box is not None
        assert min(box.x0, box.y0) >= -1
        assert (box.x1 <= drawing.bbox.x1 + 1, box.y1 <= drawing.bbox.y1 + 1) == (True, True)
    titles = [axes._left_title for axes in drawing.axes if axes.get_title(loc="left")]  # type: ignore[attr-defined]
    boxes = [title.get_window_extent() for title in titles]
    assert not any(one.overlaps(other) for i, one in enumerate(boxes) for other in boxes[:i])


# What a format adds, such as dates and names of its own, is in every figure, and what a figure adds in every format.
@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "suffix"), [("curve", ".png"), ("curve", ".svg"), ("curve", ".pdf"), ("spectrum", ".svg")]
)
def test_the_same_bytes_every_time(name: str, suffix: str, tmp_path: Path) -> None:
    figure = FIGURES[name]()
    once, again = (tmp_path / f"{word}{suffix}" for word in ("once", "again"))
    save_figure(figure, once)
    save_figure(draw_figure(figure), again)
    assert once.read_bytes() == again.read_bytes()
    # The time is written to the second, and two files of one second would not differ by it.
    assert not any(date in once.read_bytes() for date in (b"CreationDate", b"dc:date"))


def test_a_figure_of_one_panel_is_drawn_into_axes_of_the_caller_s() -> None:
    drawing = Drawing()
    left, right = drawing.subplots(1, 2)
    assert draw_figure(FIGURES["curve"](), ax=left) is drawing
    assert draw_figure(FIGURES["nesting"](), ax=right) is drawing
    (chart,) = FIGURES["curve"]().charts
    assert isinstance(chart, LineChart)
    assert (left.get_xlim(), left.get_ylim()) == (chart.x_limits, chart.y_limits)
    assert left.get_title() == "an [adapter] $x$"
    assert right.collections
    with pytest.raises(OptionError, match="panels, and ax can hold one"):
        draw_figure(FIGURES["spectrum"](), ax=left)


def test_lines_go_through_their_points_and_leave_out_what_is_not_finite() -> None:
    line = Line("one", [1, 2, 3, 4], [4.0, np.nan, 2.0, 1.0], "c0", "o")
    (axes,) = panels(drawn(LineChart("", [line], "x", "y", levels={"half": 2.0}, legend=True)))
    curve, half = axes.lines
    np.testing.assert_array_equal(curve.get_xydata(), [[1, 4], [3, 2], [4, 1]])
    assert curve.get_marker() == "o"
    assert half.get_ydata() == [2.0, 2.0]
    assert axes.get_ylim() == (0.0, 4.0 * 1.05)  # a linear axis begins at 0


@pytest.mark.parametrize("log", [False, True])
def test_names_of_levels_that_are_close_stand_above_all_of_them(log: bool) -> None:
    levels = {"out": 0.11, "in": 0.105, "far": 0.8}
    (axes,) = panels(drawn(LineChart("", [], "x", "y", log=log, y_range=(0.01, 1.0), levels=levels)))
    assert [name.xy[1] for name in axes.texts if name.get_text() in levels] == [0.11, 0.11, 0.8]


def test_a_logarithmic_chart_spans_what_it_is_told_to() -> None:
    chart = LineChart("", [Line("one", [1, 2], [1.0, 0.01], "b3")], "x", "y", log=True, y_range=(1e-3, 10.0))
    (axes,) = panels(drawn(chart))
    assert axes.get_yscale() == "log"
    assert axes.get_ylim() == (1e-3, 10.0)
    assert axes.yaxis.get_major_formatter()(0.01) == "0.01"  # no power, which would be read as mathematics
    (page,) = on_page(chart)
    ticks = {str(one.text): float(str(one.get("y"))) for one in page.iter("text") if one.get("class") == "num end"}
    heights = [ticks[text] for text in ("10", "1", "0.1", "0.01", "0.001")]
    np.testing.assert_allclose(np.diff(heights), np.diff(heights)[0], atol=0.2)


def test_a_map_has_its_values_where_they_belong_and_holes_where_there_are_none() -> None:
    values = np.array([[0.25, np.nan, np.nan], [np.nan, np.nan, 1.0]])
    scale = ColourScale(0.0, 1.0, "share", "{:.2f}".format, chance=[0.5])
    chart = HeatMap("", ["q", "v"], ["0", "1", "2"], values, scale, written=True, zeros=[(1, 0)], column_edges=[2])
    (axes,) = panels(drawn(chart))
    np.testing.assert_array_equal(np.ma.filled(axes.collections[0].get_array(), np.nan), values)
    assert [(x.get_text(), x.get_position()) for x in axes.texts] == [
        ("×", (0.5, 1.5)), ("0.25", (0.5, 0.5)), ("1.00", (2.5, 1.5)),
    ]  # fmt: skip
    assert [label.get_text() for label in axes.get_yticklabels()] == ["q", "v"]
    (edge,) = axes.lines
    assert list(edge.get_xdata()) == [2, 2]
    (page,) = on_page(chart)
    assert [str(one.get("class")) for one in page.iter("rect")] == ["s6", "hole", "hole", "hole", "hole", "s24"]
    assert {"×", "0.25", "1.00"} < {str(one.text) for one in page.iter("text")}


@pytest.mark.some(1)
@pytest.mark.parametrize("name", ["$x^{2$", "a_b\\frac{", "<script>"])
def test_no_name_is_read_as_mathematics_or_markup(name: str) -> None:
    scale, line = ColourScale(0.0, 1.0, name), Line(name, [1], [1.0], labels=[name])
    one = np.array([[0.5]])
    charts = [
        LineChart(name, [line], name, name, levels={name: 0.5}, legend=True, note=name),
        HeatMap(name, [name], [name], one, scale, {(0, 0): (name, name)}, note=name),
        HeatMap(name, ["1"], ["1"], one, scale, note=name, small=True, name=name),
    ]
    for chart in charts:
        drawing = draw_figure(Figure(name, [Band([chart], name, [Ramp(name, name, name), scale])]))
        texts = [text for text in drawing.findobj(Text) if name in text.get_text()]
        assert len(texts) > 4
        assert not any(text.get_parse_math() for text in texts)
        axes = Drawing().subplots()
        draw_figure(Figure(name, [Band([chart])]), ax=axes)
        axes.figure.draw_without_rendering()
        (page,) = on_page(chart, keys=(Ramp(name, name, name), scale))
        assert name in {one.text for one in page.iter("text")}
        assert not list(page.iter("script"))


@pytest.mark.parametrize("values", [[], [np.nan], [0.0]])
def test_a_chart_of_nothing_is_still_drawn(values: list[float]) -> None:
    lines, scale = [Line("one", range(len(values)), values)], ColourScale(0.0, 0.0, "label")
    charts = [
        LineChart("", lines, "x", "y", log=True),
        LineChart("", lines, "x", "y"),
        HeatMap("", [], [], np.empty((0, 0)), scale),
        HeatMap("", ["q"], ["0"], np.full((1, 1), np.nan), scale),
    ]
    drawn(*charts)
    assert len(on_page(*charts)) == 4
    draw_figure(Figure("", []))
