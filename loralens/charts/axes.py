"""Line charts whose limits fit their lines."""

from collections.abc import Mapping, Sequence
from math import isfinite

from loralens.charts.spec import Area, Axis, Limits, Line, LineChart


def line_chart(
    title: str,
    lines: Sequence[Line],
    x_label: str,
    y_label: str,
    *,
    log: bool = False,
    x_range: Limits | None = None,
    y_range: Limits | None = None,
    x_ticks: Sequence[tuple[float, str]] = (),
    levels: Mapping[str, float] | None = None,
    legend: bool = False,
    areas: Sequence[Area] = (),
    note: str = "",
) -> LineChart:
    """Make a line chart whose axes are chosen so that all lines fit.

    Parameters
    ----------
    title : str
    lines : sequence of Line
    x_label, y_label : str
    log : bool
        Whether y is logarithmic.
    x_range, y_range : tuple of float, optional
        Limits that several charts share. By default x spans the finite points with a margin, and a y axis that is not
        logarithmic begins at 0.
    x_ticks : sequence of (float, str)
        Values and texts; empty where the renderer chooses round numbers.
    levels, legend, areas, note
        As in `LineChart`.
    """
    points = [(x, y) for line in lines for x, y in zip(line.x, line.y, strict=True) if isfinite(y)]
    across = x_range or _x_limits([x for x, _ in points])
    up = y_range or _y_limits([y for _, y in points if y > 0 or not log], log=log)
    x, y = Axis(x_label, across, x_ticks), Axis(y_label, up, log=log)
    return LineChart(title, lines, x, y, levels or {}, legend, areas, note)


def direction_limits(most: int) -> Limits:
    """Return the limits of an axis of directions from 1 to ``most``."""
    margin = max(0.02 * most, 0.1)
    return 1 - margin, most + margin


def _x_limits(values: Sequence[float]) -> Limits:
    low, high = min(values, default=0.0), max(values, default=1.0)
    margin = (high - low) * 0.02 or 0.5  # a single point stands in the middle of its axis
    return low - margin, high + margin


def _y_limits(values: Sequence[float], *, log: bool) -> Limits:
    if log:
        low, high = min(values, default=0.1), max(values, default=1.0)
        return (low, high) if low < high else (low / 2, high * 2)  # one value: an axis needs two limits
    # From 0, so that heights can be compared as lengths.
    low, high = min([0.0, *values]), max([0.0, *values])
    return low, high * 1.05 or 1.0  # room above the highest point; 1 where all values are 0
