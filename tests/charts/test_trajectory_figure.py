"""The figure of a run: what is in it."""

import numpy as np

from loralens.charts.run_charts import trajectory_figure
from loralens.charts.spec import LineChart
from tests.charts.figures import LOSSES, checkpoints, lines_of


def lines(chart: LineChart) -> dict[str, list[float]]:
    return {line.name: list(line.y) for line in chart.lines}


def test_every_panel_has_its_line_its_title_and_its_units() -> None:
    run = checkpoints()
    size, direction, rank, loss = lines_of(trajectory_figure(run, [10, 50, 100], LOSSES, list("abc"))).values()
    assert [list(line.x) for line in size.lines] == [[10, 50, 100]] * 2
    assert lines(size)["‖ΔW‖ here"] == [point.frobenius for point in run.points]
    assert np.isnan(lines(size)["change since the previous one"][0])
    assert lines(size)["change since the previous one"][1:] == [point.length for point in run.points[1:]]
    assert lines(rank) == {"mean over modules": [point.effective_rank for point in run.points]}
    assert lines(direction)["cosine of ΔW"] == [point.cosine for point in run.points]
    for side in ("out", "in"):
        assert lines(direction)[f"φ, {side} side"] == [point.phi[side] for point in run.points]
    assert run.points[0].phi["out"] != run.points[0].phi["in"]
    assert direction.levels == {"chance, out": 2 / 8, "chance, in": 2 / 9, "settled (0.9)": 0.9}
    assert lines(loss) == {"loss": [3.0, 2.0, 1.5], "eval loss": [1.75]}
    assert all(chart.title and chart.y_label and chart.x_label == "step" for chart in (size, rank, direction, loss))
    assert size.y_limits[0] == rank.y_limits[0] == 0
    assert loss.y_limits[0] > 1  # a loss far from 0 shows how it falls


def test_without_steps_checkpoints_are_numbered() -> None:
    names = ["a", "b", "a $very$ long name of a checkpoint indeed"]
    *panels, loss = trajectory_figure(checkpoints(), [10, 50, None], LOSSES, names).charts
    for chart in panels:
        assert isinstance(chart, LineChart)
        assert list(chart.lines[0].x) == [1, 2, 3]
    assert isinstance(loss, LineChart)
    assert loss.note == "not drawn: some steps are unknown"
