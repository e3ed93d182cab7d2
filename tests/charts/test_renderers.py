"""The same figure on the page and in the picture: limits, ticks, labels, colours and values, read out of both."""

import subprocess
import sys
from functools import cache
from itertools import pairwise
from pathlib import Path
from xml.etree import ElementTree as ET

import numpy as np
import pytest
from matplotlib.axes import Axes
from matplotlib.colors import to_hex
from matplotlib.figure import Figure as Drawing
from matplotlib.text import Text

from loralens.charts.figure import save_figure
from loralens.charts.mpl import draw_figure
from loralens.charts.palette import BLOCKS
from loralens.charts.spec import Chart, ColourScale, HeatMap, LineChart, Overlaps
from loralens.charts.svg_lines import lines_svg
from loralens.charts.svg_maps import heat_svg, key_svg, overlaps_svg
from loralens.errors import OptionError
from tests.charts.figures import FIGURES
from tests.charts.reading import COLOURS, Read, panels, read_axes, read_bar, read_key, read_svg

pytestmark = pytest.mark.slow

PIXEL = 0.06  # of a coordinate that is written to a tenth, in pixels


def svg_of(chart: Chart, *, alone: bool = False) -> str:
    if isinstance(chart, LineChart):
        return "".join(lines_svg(chart, "", alone=alone))
    return "".join(heat_svg(chart, "") if isinstance(chart, HeatMap) else overlaps_svg(chart, ""))


def texts_of(svg: str) -> set[str]:
    return {str(text.text) for text in ET.fromstring(svg).iter("text")}  # our own


@cache
def drawing_named(name: str) -> Drawing:
    """The figure as matplotlib draws it, once for all tests, which only read it; every text has its place."""
    drawing = draw_figure(FIGURES[name]())
    drawing.draw_without_rendering()
    return drawing


def in_picture(name: str) -> list[Read]:
    """What matplotlib drew of each chart, in their order."""
    figure, drawing = FIGURES[name](), drawing_named(name)
    keys = sum(isinstance(key, ColourScale) for band in figure.bands for key in band.keys)
    colours = iter([axes for axes in drawing.axes if axes.get_label() == "<colorbar>"])
    bars: list[Axes | None] = []
    for band in figure.bands:
        bars += [next(colours) if isinstance(chart, HeatMap) else None for chart in band.charts if chart is not None]
        for key in band.keys:
            next(colours) if isinstance(key, ColourScale) else None
    assert not list(colours), keys
    return [read_axes(axes, bar) for axes, bar in zip(panels(drawing), bars, strict=True)]


@pytest.mark.parametrize("name", FIGURES)
def test_a_figure_is_the_same_on_the_page_and_in_the_picture(name: str) -> None:
    figure = FIGURES[name]()
    alone = [len(band.charts) == 1 for band in figure.bands for chart in band.charts if chart is not None]
    assert any(
        (isinstance(chart, LineChart) and chart.lines) or not isinstance(chart, LineChart) for chart in figure.charts
    )
    for chart, by_itself, picture in zip(figure.charts, alone, in_picture(name), strict=True):
        page = read_svg(svg_of(chart, alone=by_itself))
        assert page.title == picture.title
        assert picture.cells == page.cells
        assert picture.numbers == page.numbers
        assert (picture.zeros, picture.edges) == (page.zeros, page.edges)
        assert [text for _, text in picture.x] == [text for _, text in page.x]
        assert [text for _, text in picture.y] == [text for _, text in page.y]
        if isinstance(chart, LineChart):
            _compare_lines(page, picture, chart)
        else:
            assert [place for place, _ in page.x] == pytest.approx([place for place, _ in picture.x])
            assert [place for place, _ in page.y] == pytest.approx([place for place, _ in picture.y])
        if isinstance(chart, Overlaps):  # a direction has its number beside its own cells
            assert all(place == pytest.approx(float(text)) for place, text in [*picture.x, *picture.y])
        if isinstance(chart, HeatMap):
            assert page.bar_label == picture.bar_label == chart.scale.label
            assert [text for _, text in page.bar] == [text for _, text in picture.bar]
            for read in (page.bar, [(x, "") for x in page.chance]), (picture.bar, [(x, "") for x in picture.chance]):
                assert all(0 <= place <= 1.001 for places in read for place, _ in places)
            assert [x for x, _ in page.bar] == pytest.approx([x for x, _ in picture.bar], abs=1e-3)
            assert page.chance == pytest.approx(picture.chance, abs=1e-3)


def _compare_lines(page: Read, picture: Read, chart: LineChart) -> None:
    assert page.labels == picture.labels
    assert page.limits == pytest.approx(picture.limits, rel=1e-8)
    assert page.log == picture.log
    assert page.legend == picture.legend
    assert list(page.lines) == list(picture.lines)
    x0, x1, y0, y1 = picture.limits
    assert [x for x, _ in page.x] == pytest.approx([x for x, _ in picture.x], abs=PIXEL * (x1 - x0) / 178)
    up = [
        [np.log10(y) if picture.log else y for y in read]
        for read in ([y for y, _ in page.y], [y for y, _ in picture.y])
    ]
    span = np.log10(y1) - np.log10(y0) if picture.log else y1 - y0
    assert up[0] == pytest.approx(up[1], abs=PIXEL * span / 120)
    for name, (colour, points) in page.lines.items():
        assert picture.lines[name][0] == colour
        assert np.array(points) == pytest.approx(np.array(picture.lines[name][1]), rel=1e-3)  # four digits on the page
    inside = [level for level in picture.levels if y0 <= level <= y1]
    assert page.levels == pytest.approx(inside, abs=PIXEL * (y1 - y0) / 120)
    assert len(picture.levels) == len(chart.levels)


@pytest.mark.parametrize("name", FIGURES)
def test_every_word_of_the_page_stands_in_the_picture_and_no_other(name: str) -> None:
    figure = FIGURES[name]()
    page: set[str] = set()
    for band in figure.bands:
        for chart in band.charts:
            if chart is not None:
                page |= texts_of(svg_of(chart, alone=len(band.charts) == 1))
        for key in band.keys:
            page |= texts_of("".join(key_svg(key)))
    drawing = drawing_named(name)
    shown = [text for text in drawing.findobj(Text) if text.get_visible() and text.get_text()]
    picture = {line for text in shown for line in text.get_text().split("\n")}
    titles = {line for title in [figure.title, *(band.title for band in figure.bands)] for line in title.split("\n")}
    assert picture - titles == page - titles
    assert titles - {""} <= picture


@pytest.mark.parametrize("name", FIGURES)
def test_shared_colours_are_the_same_on_the_page_and_in_the_picture(name: str) -> None:
    figure = FIGURES[name]()
    drawing = drawing_named(name)
    ramps = iter([axes for axes in drawing.axes if axes.get_label() == "<key>"])
    bars = iter([axes for axes in drawing.axes if axes.get_label() == "<colorbar>"])
    for band in figure.bands:
        for chart in band.charts:
            next(bars) if isinstance(chart, HeatMap) else None
        for key in band.keys:
            root = ET.fromstring("".join(key_svg(key)))  # our own
            if isinstance(key, ColourScale):
                assert read_key(root) == pytest.approx(read_bar(next(bars)), abs=1e-3)
            else:
                page = [COLOURS[str(one.get("class")).split()[1]] for one in root.iter("rect")]
                axes = next(ramps)
                patches = [to_hex(patch.get_facecolor()) for patch in axes.patches]
                picture = patches or [to_hex(axes.images[0].to_rgba(k)) for k in range(BLOCKS)]  # type: ignore[arg-type]
                assert page == picture
    assert not [*ramps, *bars]


@pytest.mark.parametrize("name", FIGURES)
def test_no_text_leaves_the_picture(name: str) -> None:
    drawing = drawing_named(name)
    for text in drawing.findobj(Text):
        if text.get_text() and text.get_visible():
            box = text.get_window_extent()
            assert box.x0 >= -1, text
            assert box.y0 >= -1, text
            assert box.x1 <= drawing.bbox.x1 + 1, text
            assert box.y1 <= drawing.bbox.y1 + 1, text


@pytest.mark.parametrize("name", FIGURES)
def test_no_label_of_an_axis_meets_another(name: str) -> None:
    drawing = drawing_named(name)
    for axes in drawing.axes:
        across = [one.get_window_extent() for one in axes.get_xticklabels() if one.get_text()]
        if not any(one.get_rotation() not in (0.0, 90.0) for one in axes.get_xticklabels()):
            assert all(left.x1 < right.x0 for left, right in pairwise(across)), axes.get_title(loc="left")
        down = sorted((one.get_window_extent() for one in axes.get_yticklabels() if one.get_text()), key=lambda b: b.y0)
        assert all(low.y1 < high.y0 + 1 for low, high in pairwise(down)), axes.get_title(loc="left")


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
        "loralens.charts.similarity, loralens.charts.similarity_nested, loralens.charts.curve, loralens.charts.mpl,"
        "loralens.charts.trajectory, loralens.charts.figure, loralens.charts.svg_maps, loralens.reporting.html;"
        "sys.exit(any(name in sys.modules for name in ('matplotlib', 'scipy')))"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
