"""What matplotlib draws of a chart: its points, its cells and its words, and no name as mathematics."""

import numpy as np
import pytest
from matplotlib.figure import Figure as Drawing
from matplotlib.text import Text

from loralens.charts.mpl import draw_figure
from loralens.charts.spec import Band, Cell, Chart, ColourScale, Figure, HeatMap, Key, Line, Overlaps, Ramp, line_chart
from tests.charts.reading import panels


def drawn(*charts: Chart, title: str = "Title", keys: tuple[Key, ...] = ()) -> Drawing:
    return draw_figure(Figure(title, [Band(charts, keys=keys)]))


def test_lines_go_through_their_points_and_leave_out_what_is_not_finite() -> None:
    line = Line("one", [1, 2, 3, 4], [4.0, np.nan, 2.0, 1.0], ("series", 0), marker="dot")
    chart = line_chart("", [line], "x", "y", levels={"half": 2.0}, legend=True)
    (axes,) = panels(drawn(chart))
    curve, level = axes.lines
    np.testing.assert_array_equal(curve.get_xydata(), [[1, 4], [3, 2], [4, 1]])
    assert curve.get_marker() == "o"
    assert level.get_ydata() == [2.0, 2.0]
    assert axes.get_ylim() == (0.0, 4.0 * 1.05)  # as on the page: a linear axis begins at 0


def test_a_logarithmic_chart_spans_what_it_is_told_to() -> None:
    chart = line_chart("", [Line("one", [1, 2], [1.0, 0.01], ("block", 3))], "x", "y", log=True, y_range=(1e-3, 10.0))
    (axes,) = panels(drawn(chart))
    assert axes.get_yscale() == "log"
    assert axes.get_ylim() == (1e-3, 10.0)
    assert axes.yaxis.get_major_formatter()(0.01) == "0.01"  # no power, which would be read as mathematics


def test_a_map_has_its_values_where_they_belong_and_holes_where_there_are_none() -> None:
    cells = {(0, 0): Cell(0.25), (1, 2): Cell(1.0)}
    scale = ColourScale(0.0, 1.0, "share", chance=[0.5], form=".2f")
    chart = HeatMap("", ["q", "v"], ["0", "1", "2"], cells, scale, written=True, zeros=[(1, 0)], column_edges=[2])
    (axes,) = panels(drawn(chart))
    values = axes.collections[0].get_array()
    np.testing.assert_array_equal(np.ma.filled(values, -1), [[0.25, -1, -1], [-1, -1, 1.0]])
    assert [text.get_text() for text in axes.texts] == ["0.25", "1.00"]
    assert [label.get_text() for label in axes.get_yticklabels()] == ["q", "v"]
    cross, edge = axes.lines
    np.testing.assert_array_equal(cross.get_xydata(), [[0.5, 1.5]])
    assert list(edge.get_xdata()) == [2, 2]


@pytest.mark.parametrize(("rows", "raster"), [(32, False), (130, True)])
def test_a_map_of_very_many_cells_is_pixels_in_an_svg(rows: int, raster: bool) -> None:
    names = [str(i) for i in range(rows)]
    cells = {(i, j): Cell(0.5) for i in range(rows) for j in range(rows)}
    (axes,) = panels(drawn(HeatMap("", names, names, cells, ColourScale(0.0, 1.0, "share"))))
    assert bool(axes.collections[0].get_rasterized()) == raster


def test_the_cell_of_a_pair_of_directions_lies_around_its_two_numbers() -> None:
    phi = np.random.default_rng(0).random((3, 5))
    (axes,) = panels(drawn(Overlaps("", phi.tolist(), ColourScale(0.0, 0.7, "φ"))))
    (image,) = axes.images
    assert list(image.get_extent()) == [0.5, 5.5, 3.5, 0.5]
    np.testing.assert_array_equal(image.get_array(), phi)
    assert (axes.get_xlim(), axes.get_ylim()) == ((0.5, 5.5), (3.5, 0.5))


def test_overlaps_share_one_bar_with_the_levels_of_chance() -> None:
    scale = ColourScale(0.0, 0.8, "φ(i, j)", chance=[0.4, 0.2], form=".2f")
    charts = [Overlaps(f"chart {k}", [[0.1 * k, 0.2], [0.3, 0.4]], scale, notes=["a note"]) for k in range(5)]
    figure = drawn(*charts, keys=(scale,))
    for k, axes in enumerate(panels(figure)):
        np.testing.assert_array_equal(axes.images[0].get_array(), [[0.1 * k, 0.2], [0.3, 0.4]])
    (bar,) = [axes for axes in figure.axes if axes.get_label() == "<colorbar>"]
    assert [line.get_xdata()[0] for line in bar.lines] == [0.2, 0.4]  # type: ignore[index]
    assert [axes.get_xlabel() for axes in panels(figure)] == ["a note"] * 5
    assert "0.20 to 0.40" in bar.get_xlabel()


@pytest.mark.some(1)
@pytest.mark.parametrize("name", ["$x^{2$", "a_b\\frac{", "<script>"])
def test_no_name_is_read_as_mathematics(name: str) -> None:
    scale, line = ColourScale(0.0, 1.0, name), Line(name, [1], [1.0], ("quiet", 0), labels=[name])
    ramp = Ramp(name, [(0.0, name), (1.0, name)])
    charts = [
        line_chart(name, [line], name, name, levels={name: 0.5}, legend=True, note=name, x_ticks=[(1.0, name)]),
        HeatMap(name, [name], [name], {(0, 0): Cell(0.5)}, scale, across=name, heads=[(0, 1, name)], note=name),
        Overlaps(name, [[0.5]], scale, notes=[name]),
    ]
    for chart in charts:
        drawing = draw_figure(Figure(name, [Band([chart], name, [ramp, scale])]))
        texts = [text for text in drawing.findobj(Text) if name in text.get_text()]
        assert len(texts) > 4
        assert not any(text.get_parse_math() for text in texts)
        axes = Drawing().subplots()
        draw_figure(Figure(name, [Band([chart])]), ax=axes)
        axes.figure.draw_without_rendering()


@pytest.mark.parametrize("values", [[], [np.nan], [0.0]])
def test_a_chart_of_nothing_is_still_drawn(values: list[float]) -> None:
    lines = [Line("one", range(len(values)), values, ("quiet", 0))]
    drawn(line_chart("", lines, "x", "y", log=True))
    drawn(line_chart("", lines, "x", "y"))
    drawn(HeatMap("", [], [], {}, ColourScale(0.0, 0.0, "label")))
    drawn(HeatMap("", ["q"], ["0"], {}, ColourScale(0.0, 0.0, "label")))
    draw_figure(Figure("", []))


def test_an_axis_of_one_value_has_room() -> None:
    chart = line_chart("", [Line("one", [3], [0.5], ("series", 0))], "x", "y", log=True)
    assert chart.y.limits[0] < 0.5 < chart.y.limits[1]
    assert chart.x.limits == (2.5, 3.5)


def test_letters_that_the_font_lacks_come_out_as_boxes_without_a_warning() -> None:
    drawn(line_chart("漢字 😀", [Line("漢", [1], [1.0], ("quiet", 0))], "x", "y", legend=True))
