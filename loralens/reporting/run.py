"""The section of a run: one adapter growing and turning from checkpoint to checkpoint."""

from collections.abc import Sequence
from math import isfinite

from loralens.analysis.trajectory import SETTLED
from loralens.charts.trajectory import trajectory_charts
from loralens.reporting.company import Course
from loralens.reporting.document import PageTable, Picture, Section, Text
from loralens.reporting.result_tables import ResultTables
from loralens.reporting.subject import Subject
from loralens.tables.numbers import number

STUCK = 0.9  # cosine of A with the last checkpoint from which φ of the in side shows the start


def section(subjects: Sequence[Subject], course: Course, tables: ResultTables) -> Section:
    """The run, its steps across."""
    labels = [one.label for one in subjects]
    lead = "These are checkpoints of one run: they began from the same random A. Directions are compared with the last."
    return Section(
        "run",
        "The run",
        lead,
        [Text(sentence(course)), _picture(course), PageTable(tables.checkpoints(labels, course))],
    )


def sentence(course: Course) -> str:
    """When the direction settled, and what the in side says."""
    found, steps = course.found, course.steps
    before = found.points[-2].cosine
    if not found.points[-1].frobenius:
        return "The last checkpoint is 0, so there is no direction to compare the others with."
    if found.settled is not None:
        said = f"The direction is settled from step {steps[found.settled]} on (of {steps[-1]}): "
        said += f"from there every cosine with the last is at least {SETTLED:g}."
    elif isfinite(before):
        said = f"The direction was still turning: cosine {before:.3f} between steps {steps[-2]} and {steps[-1]}."
    else:
        said = "The checkpoint before the last is 0: whether the direction settled cannot be told."
    first = found.points[0]
    if first.initial >= STUCK and first.phi["in"] > first.phi["out"]:
        said += " A stays near its random beginning, so φ of the in side is high throughout: read the out side."
    return said


def _picture(course: Course) -> Picture:
    found = course.found
    points = found.points
    charts = trajectory_charts(found, list(course.steps), course.losses, [])
    charts = [chart for chart in charts if chart.lines]
    return Picture(
        "run",
        "From checkpoint to checkpoint",
        charts,
        "How far the update went, where to, and in how many directions; beside the loss where it was logged.",
        "cosine 0; φ " + ", ".join(f"{number(value, 3)} ({side} side)" for side, value in found.chance.items()),
        "Hu et al. 2021, §7.2, over training steps",
        f"Curves over {len(points)} checkpoints; cosine with the last from {points[0].cosine:.2f} to 1.",
    )
