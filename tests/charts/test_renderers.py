"""Both renderers show the numbers of a chart, and no text leaves a picture or meets another."""

import re
import subprocess
import sys
from functools import cache
from pathlib import Path
from xml.etree import ElementTree as ET

import numpy as np
import pytest
from matplotlib.axes import Axes
from matplotlib.figure import Figure as Drawing

from loralens.charts.figure import save_figure
from loralens.charts.mpl import draw_figure
from loralens.charts.palette import level
from loralens.charts.spec import Chart, HeatMap, Line, LineChart
from loralens.charts.svg import heat_svg, lines_svg, overlaps_svg
from loralens.errors import OptionError
from tests.charts.figures import FIGURES
from tests.charts.reading import panels

pytestmark = pytest.mark.slow


@cache
def drawing_named(name: str) -> Drawing:
    """The figure as matplotlib draws it, once for all tests, which only read it; every text has its place."""
    drawing = draw_figure(FIGURES[name]())
    drawing.draw_without_rendering()
    return drawing


def on_page(chart: Chart, *, alone: bool) -> ET.Element:
    pieces = (
        lines_svg(chart, "", alone=alone)
        if isinstance(chart, LineChart)
        else heat_svg(chart, "")
        if isinstance(chart, HeatMap)
        else overlaps_svg(chart, "")
    )
    return ET.fromstring("".join(pieces))  # our own


def points_of(line: Line, chart: LineChart) -> list[tuple[float, float]]:
    return [(x, y) for x, y in zip(line.x, line.y, strict=True) if chart.y.shows(y)]


@pytest.mark.parametrize("name", FIGURES)
def test_the_page_and_the_picture_show_the_numbers_of_the_chart(name: str) -> None:
    figure = FIGURES[name]()
    alone = [len(band.charts) == 1 for band in figure.bands for chart in band.charts if chart is not None]
    for chart, by_itself, axes in zip(figure.charts, alone, panels(drawing_named(name)), strict=True):
        page = on_page(chart, alone=by_itself)
        assert axes.get_title(loc="left") == chart.title
        if isinstance(chart, LineChart):
            _check_lines(chart, page, axes)
        elif isinstance(chart, HeatMap):
            classes = {
                level(cell.value, chart.scale.low, chart.scale.high, diverging=chart.scale.diverging)
                for cell in chart.cells.values()
            }
            shown = [one for one in page.iter("rect") if one.get("data-t") is not None]
            assert {one.get("class") for one in shown} == classes
            assert [one.get("data-t") for one in shown] == [chart.cells[place].tip for place in sorted(chart.cells)]
            values = np.ma.masked_invalid(axes.collections[0].get_array())  # type: ignore[no-untyped-call]
            assert {place: values[place] for place in chart.cells} == {k: cell.value for k, cell in chart.cells.items()}
            assert values.count() == len(chart.cells)
        else:
            digits = next(str(one.get("data-phi")) for one in page.iter("g") if one.get("data-phi"))
            shown_phi = [[int(row[k : k + 2]) for k in range(0, len(row), 2)] for row in digits.split()]
            np.testing.assert_allclose(shown_phi, np.minimum(100 * np.array(chart.phi), 99), atol=0.5001)
            np.testing.assert_array_equal(axes.images[0].get_array(), chart.phi)
            # A number stands below the middle of its column of cells.
            group = next(str(one.get("transform")) for one in page.iter("g") if one.get("data-phi"))
            left, _, wide, _ = map(float, re.findall(r"[\d.]+", group))
            below = [one for one in page.iter("text") if one.get("class") == "num mid"]
            assert below
            assert all(
                float(str(one.get("x"))) == pytest.approx(left + wide * (int(str(one.text)) - 0.5), abs=0.1)
                for one in below
            )


def _check_lines(chart: LineChart, page: ET.Element, axes: Axes) -> None:
    groups = {str(one.get("data-n")): one for one in page.iter("g") if one.get("data-n") is not None}
    drawn = {str(line.get_label()): line for line in axes.lines}
    for line in chart.lines:
        points = points_of(line, chart)
        if not points:
            continue
        ys = [float(y) for y in str(groups[line.name].get("data-y")).split()]
        np.testing.assert_allclose(ys, [y for _, y in points], rtol=1e-3)  # four digits on the page
        np.testing.assert_array_equal(drawn[line.name].get_xydata(), points)
    assert (axes.get_xlim(), axes.get_ylim()) == (chart.x.limits, chart.y.limits)
    legend = axes.get_legend()
    assert [one.get_text() for one in legend.get_texts()] == [line.name for line in chart.named] if legend else True


@pytest.mark.parametrize("name", FIGURES)
def test_nothing_leaves_the_picture(name: str) -> None:
    drawing = drawing_named(name)
    for axes in drawing.axes:
        box = axes.get_tightbbox()
        assert box is not None
        assert box.x0 >= -1
        assert box.y0 >= -1
        assert box.x1 <= drawing.bbox.x1 + 1
        assert box.y1 <= drawing.bbox.y1 + 1


@pytest.mark.parametrize("name", FIGURES)
def test_titles_stay_clear_of_each_other(name: str) -> None:
    drawing = drawing_named(name)
    titles = [axes._left_title for axes in drawing.axes if axes.get_title(loc="left")]  # type: ignore[attr-defined]
    boxes = [title.get_window_extent() for title in titles]
    assert not any(one.overlaps(other) for i, one in enumerate(boxes) for other in boxes[:i])


# What a format adds, such as dates and names of its own, is in every figure, and what a figure adds in every format.
@pytest.mark.parametrize(
    ("name", "suffix"),
    [("curve", ".png"), ("curve", ".svg"), ("curve", ".pdf"), ("spectrum", ".svg"), ("pairs", ".png")],
)
def test_the_same_bytes_every_time(name: str, suffix: str, tmp_path: Path) -> None:
    figure = FIGURES[name]()
    once, again, drawn = (tmp_path / f"{word}{suffix}" for word in ("once", "again", "drawn"))
    save_figure(figure, once)
    save_figure(figure, again)
    save_figure(draw_figure(figure), drawn)
    assert once.read_bytes() == again.read_bytes() == drawn.read_bytes()
    # The time is written to the second, and two files of one second would not differ by it.
    assert not any(date in once.read_bytes() for date in (b"CreationDate", b"dc:date"))


def test_a_figure_of_one_panel_is_drawn_into_axes_of_the_caller_s() -> None:
    drawing = Drawing()
    left, right = drawing.subplots(1, 2)
    assert draw_figure(FIGURES["curve"](), ax=left) is drawing
    assert draw_figure(FIGURES["nesting"](), ax=right) is drawing
    (chart,) = FIGURES["curve"]().charts
    assert isinstance(chart, LineChart)
    assert (left.get_xlim(), left.get_ylim()) == (chart.x.limits, chart.y.limits)
    assert left.get_title() == "an [adapter] $x$"
    assert right.collections
    with pytest.raises(OptionError, match="panels, and ax can hold one"):
        draw_figure(FIGURES["spectrum"](), ax=left)


def test_a_builder_and_the_page_need_no_matplotlib() -> None:
    code = (
        "import sys, loralens.charts.spectrum, loralens.charts.amplification, loralens.charts.pairwise,"
        "loralens.charts.similarity, loralens.charts.similarity, loralens.charts.curve, loralens.charts.mpl,"
        "loralens.charts.trajectory, loralens.charts.figure, loralens.charts.svg, loralens.reporting.html;"
        "sys.exit(any(name in sys.modules for name in ('matplotlib', 'scipy')))"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
