"""The pictures beside the Markdown: what matplotlib draws is what the page shows, number by number."""

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from loralens.reporting.chart import Cell, Heat, Line, Lines, Overlaps, Scale
from loralens.reporting.drawing import drawn
from matplotlib.axes import Axes
from matplotlib.figure import Figure

import loralens
from loralens.core.lowrank import LowRank
from loralens.reporting.company import company
from loralens.reporting.document import Beside, Part, Picture
from loralens.reporting.markdown import markdown, pictures
from tests.reporting.adapters import drawn as adapter
from tests.reporting.adapters import measured, report

PNG = b"\x89PNG\r\n\x1a\n"


def picture(*charts: Lines | Heat | Overlaps, title: str = "Title") -> Picture:
    return Picture("key", title, charts, "caption", "chance", "source", "alt")


def panels(figure: Figure) -> list[Axes]:
    return [axes for axes in figure.axes if axes.get_label() != "<colorbar>"]


def test_lines_go_through_their_points_and_leave_out_what_is_not_finite() -> None:
    line = Line("one", [1, 2, 3, 4], [4.0, np.nan, 2.0, 1.0], ("series", 0), dots=True)
    chart = Lines("", [line], "x", "y", levels={"half": 2.0}, legend=True)
    (axes,) = panels(drawn(picture(chart)))
    curve, level = axes.lines
    np.testing.assert_array_equal(curve.get_xydata(), [[1, 4], [3, 2], [4, 1]])
    assert curve.get_marker() == "o"
    assert level.get_ydata() == [2.0, 2.0]
    assert axes.get_ylim() == (0.0, 4.0 * 1.05)  # as on the page: a linear axis begins at 0


def test_a_logarithmic_chart_spans_what_it_is_told_to() -> None:
    chart = Lines("", [Line("one", [1, 2], [1.0, 0.01], ("block", 3))], "x", "y", log=True, y_range=(1e-3, 10.0))
    (axes,) = panels(drawn(picture(chart)))
    assert axes.get_yscale() == "log"
    assert axes.get_ylim() == (1e-3, 10.0)
    assert [label.get_text() for label in axes.get_yticklabels()] == ["0.001", "0.01", "0.1", "1", "10"]


def test_a_map_has_its_values_where_they_belong_and_holes_where_there_are_none() -> None:
    cells = {(0, 0): Cell(0.25, "tip"), (1, 2): Cell(1.0, "tip")}
    chart = Heat("", ["q", "v"], ["0", "1", "2"], cells, Scale(0.0, 1.0, "share", chance=0.5, form=".2f"), written=True)
    (axes,) = panels(drawn(picture(chart)))
    values = axes.images[0].get_array()
    np.testing.assert_array_equal(np.ma.filled(values, -1), [[0.25, -1, -1], [-1, -1, 1.0]])
    assert [text.get_text() for text in axes.texts] == ["0.25", "1.00"]
    assert [label.get_text() for label in axes.get_yticklabels()] == ["q", "v"]


def test_overlaps_share_one_bar_with_the_level_of_chance() -> None:
    scale = Scale(0.0, 0.8, "φ(i, j)", chance=0.2, form=".2f")
    charts = [Overlaps(f"chart {k}", [[0.1 * k, 0.2], [0.3, 0.4]], scale, notes=["a note"]) for k in range(5)]
    figure = drawn(picture(*charts))
    *maps, bar = panels(figure)
    for k, axes in enumerate(maps):
        np.testing.assert_array_equal(axes.images[0].get_array(), [[0.1 * k, 0.2], [0.3, 0.4]])
        assert axes.get_xlabel() == "a note"
    assert bar.get_xlabel() == "φ(i, j)\nmark: chance 0.20"


@pytest.mark.parametrize("name", ["$x^{2$", "a_b\\frac{", "<script>"])
def test_no_name_is_read_as_mathematics(name: str) -> None:
    scale = Scale(0.0, 1.0, name)
    drawn(picture(Lines(name, [Line(name, [1], [1.0], ("quiet", 0))], name, name, levels={name: 0.5}, legend=True)))
    drawn(picture(Heat(name, [name], [name], {(0, 0): Cell(0.5, "")}, scale, across=name), title=name))
    drawn(picture(Overlaps(name, [[0.5]], scale, notes=[name])))


@pytest.mark.parametrize("values", [[], [np.nan], [0.0]])
def test_a_chart_of_nothing_is_still_drawn(values: list[float]) -> None:
    lines = [Line("one", range(len(values)), values, ("quiet", 0))]
    drawn(picture(Lines("", lines, "x", "y", log=True)))
    drawn(picture(Lines("", lines, "x", "y")))
    drawn(picture(Heat("", [], [], {}, Scale(0.0, 0.0, "label"))))


def _all(parts: Iterator[Part]) -> Iterator[Picture]:
    for part in parts:
        if isinstance(part, Picture):
            yield part
        if isinstance(part, Beside):
            for _, inner in part.columns:
                yield from _all(iter(inner))


def test_every_picture_of_a_report_has_a_file_that_its_text_names(tmp_path: Path) -> None:
    subjects = measured({"a": adapter(1), "b": adapter(2), "c": adapter(3)})
    found = report(subjects, [], company=company(subjects))
    keys = [one.key for section in found.sections for one in _all(iter(section.parts))]
    assert {"spectra-1", "energy-2", "ranks-3", "shares-1", "curve-1", "pairs", "interference", "conflicts"} < set(keys)
    files, text = pictures(found), markdown(found, "x_files")
    assert list(files) == [f"{key}.png" for key in keys]
    assert all(content.startswith(PNG) for content in files.values())
    assert all(text.count(f"(x_files/{name})") == 1 for name in files)


def test_an_adapter_of_many_kinds_and_long_names_fits_its_picture() -> None:
    rng = np.random.default_rng(0)
    names = [f"encoder.layers.{block}.{'very_' * 8}long_{kind}" for block in range(20) for kind in range(30)]
    B, A = rng.standard_normal((4, 1)), rng.standard_normal((1, 4))
    subjects = measured({"a": loralens.Adapter(modules={name: LowRank(B, A, 1.0) for name in names})})
    for content in pictures(report(subjects, [])).values():
        assert content.startswith(PNG)


def test_notes_under_a_map_stay_clear_of_the_title_below() -> None:
    scale = Scale(0.0, 1.0, "φ(i, j)", chance=0.2, form=".2f")
    charts = [Overlaps(f"chart {k}", np.eye(8).tolist(), scale, notes=["one", "two"]) for k in range(12)]
    figure = drawn(picture(*charts))
    *maps, _ = panels(figure)
    above, below = maps[0], maps[4]
    assert above.xaxis.label.get_window_extent().y0 > below.title.get_window_extent().y1


def test_the_words_under_a_map_stay_inside_the_picture() -> None:
    cells = {(0, 0): Cell(0.5, "")}
    across = "block of transformer.si…former_block"
    figure = drawn(picture(Heat("", ["q"], ["0"], cells, Scale(0.0, 1.0, "share", chance=0.5), across=across)))
    assert figure.axes[0].xaxis.label.get_window_extent().x1 < figure.bbox.x1
