"""The chart of the trade-off between the error and the size of the file, for one rank everywhere and for budgets."""

from collections.abc import Sequence

from loralens.charts.grid import fit_name
from loralens.charts.spec import Band, Figure, Line, LineChart, line_chart
from loralens.compression.plan import CurvePoint
from loralens.tables.numbers import unit_of

LABELS = 10  # ranks that are written next to their points: more would overlap
SPACE = 1.08  # the end of an axis, as a multiple of the largest value: room for the label of the last point

UNIFORM, BUDGET = "one rank everywhere", "best rank for each module, at the same size"


def curve_figure(
    title: str, points: Sequence[CurvePoint], *, chosen: tuple[int, float] | None = None, on_data: bool = False
) -> Figure:
    """Draw the relative error in percent against the bytes of the file; both axes begin at 0.

    Parameters
    ----------
    title : str
    points : sequence of CurvePoint
        As `loralens.compression.plan.rank_curve` returns them.
    chosen : tuple of int and float, optional
        Bytes and error of the file that was written, which is marked on the curve.
    on_data : bool
        Whether errors are measured on real inputs.
    """
    return Figure(fit_name(title, 90), [Band([curve_chart(points, chosen=chosen, on_data=on_data)])])


def curve_chart(
    points: Sequence[CurvePoint], *, chosen: tuple[int, float] | None = None, on_data: bool = False, dialect: str = ""
) -> LineChart:
    """Draw the chart of that figure; ``dialect`` is the format of the file."""
    # All sizes are in the unit that suits the largest file, because an axis has one unit.
    largest = max((point.uniform.bytes for point in points), default=1)
    unit, step = unit_of(largest)
    sizes, errors = [point.uniform.bytes / step for point in points], [100 * point.uniform.error for point in points]
    labels = _rank_labels(points, largest / LABELS)
    lines = [Line(UNIFORM, sizes, errors, ("series", 0), marker="dot", labels=labels)]
    sizes, errors = [point.budget.bytes / step for point in points], [100 * point.budget.error for point in points]
    lines.append(Line(BUDGET, sizes, errors, ("series", 1), marker="square", dashed=True))
    if chosen:
        x, y = [chosen[0] / step], [100 * chosen[1]]
        lines.append(Line("what was written", x, y, ("series", 3), marker="star", unjoined=True))
    highest = max([y for line in lines for y in line.y], default=0.0)
    error = "‖(ΔW−ΔW')x‖ / ‖ΔWx‖" if on_data else "‖ΔW−ΔW'‖ / ‖ΔW‖"
    return line_chart(
        "", lines, f"size of the {dialect} file ({unit})" if dialect else f"size of the file ({unit})",
        f"error {error} (%)", x_range=(0.0, SPACE * largest / step), y_range=(0.0, SPACE * highest or 1.0), legend=True,
    )  # fmt: skip


def _rank_labels(points: Sequence[CurvePoint], room: float) -> list[str]:
    """The label of each point; points less than ``room`` bytes from the last labelled one have an empty label."""
    labelled, labels = float("inf"), []
    for point in points:
        # The points go from the largest file to the smallest, which always has a label.
        if labelled - point.uniform.bytes < room and point is not points[-1]:
            labels.append("")
            continue
        labelled = point.uniform.bytes
        # "r =" at the two ends says what the numbers between them are.
        labels.append(f"r = {point.rank}" if point in (points[0], points[-1]) else str(point.rank))
    return labels
