"""The figure of the trade-off: what it shows."""

import pytest

from loralens.charts.mpl import draw_figure
from loralens.charts.spec import LineChart
from loralens.charts.spectrum_charts import curve_figure
from loralens.compression.truncation_plan import Choice, CurvePoint


def points(count: int = 8) -> list[CurvePoint]:
    return [
        CurvePoint(
            rank,
            Choice((rank, rank), 1000 * rank, 40_000 * rank, 1 - rank / count),
            Choice((1, rank), 1000 * rank, 40_000 * rank, 0.9 * (1 - rank / count)),
        )
        for rank in range(count, 0, -1)
    ]


def test_axes_lines_and_labels() -> None:
    figure = curve_figure("an [adapter] $x$", points(), chosen=(100_000, 0.5))
    (chart,) = figure.charts
    assert isinstance(chart, LineChart)
    lines = {line.name: line for line in chart.lines}
    assert list(lines) == [line.name for line in chart.named] == [
        "one rank everywhere", "best rank for each module, at the same size", "what was written",
    ]  # fmt: skip
    assert (chart.x_label, chart.y_label) == ("size of the file (kB)", "error ‖ΔW−ΔW'‖ / ‖ΔW‖ (%)")
    assert figure.title == "an [adapter] $x$"
    uniform = lines["one rank everywhere"]
    assert (uniform.x[0], uniform.y[-1]) == (pytest.approx(320), pytest.approx(87.5))
    assert (list(lines["what was written"].x), list(lines["what was written"].y)) == ([100], [50])
    assert (chart.x_limits, chart.y_limits) == ((0, pytest.approx(1.08 * 320)), (0, pytest.approx(1.08 * 87.5)))
    assert len({(line.ink, line.marker) for line in chart.lines}) == 3


@pytest.mark.parametrize("count", [1, 64])
def test_rank_labels_do_not_overlap(count: int) -> None:
    drawing = draw_figure(curve_figure("", points(count)))
    drawing.draw_without_rendering()
    boxes = [text.get_window_extent() for text in drawing.axes[0].texts if text.get_text()]
    assert boxes
    assert not any(a.overlaps(b) for i, a in enumerate(boxes) for b in boxes[:i])
