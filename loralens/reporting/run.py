"""The section of a run: one adapter growing and turning from checkpoint to checkpoint."""

from collections.abc import Sequence
from math import isfinite

from loralens.analysis.trajectory import SETTLED
from loralens.reporting.chart import Chart, Line, Lines
from loralens.reporting.company import Course
from loralens.reporting.document import PageTable, Picture, Section, Text
from loralens.reporting.result_tables import ResultTables
from loralens.reporting.subject import Subject
from loralens.reporting.words import number

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
    found, x = course.found, list(course.steps)
    points = found.points
    moved = [one.length if one.length is not None else float("nan") for one in points]
    level = {f"chance, {side}": value for side, value in found.chance.items() if isfinite(value)}
    if len(set(level.values())) == 1:
        level = {"chance": next(iter(level.values()))}
    charts: list[Chart] = [
        Lines(
            "size of the update",
            [
                Line("‖ΔW‖ here", x, [one.frobenius for one in points], ("series", 0), dots=True),
                Line("moved since the one before", x, moved, ("series", 1), dots=True, dashed=True),
            ],
            "step",
            "Frobenius norm",
            y_range=(0.0, 1.1 * max([one.frobenius for one in points] + [v for v in moved if isfinite(v)] + [1e-12])),
            legend=True,
        ),
        Lines(
            "direction, against the last",
            [
                Line("cosine of ΔW", x, [one.cosine for one in points], ("series", 0), dots=True),
                Line("φ, out side", x, [one.phi["out"] for one in points], ("series", 1), dots=True),
                Line("φ, in side", x, [one.phi["in"] for one in points], ("series", 2), dots=True),
            ],
            "step",
            "cosine, φ",
            y_range=(min([0.0, *(one.cosine for one in points if isfinite(one.cosine))]), 1.0),
            levels=level,
            legend=True,
        ),
        Lines(
            "effective rank",
            [Line("mean over modules", x, [one.effective_rank for one in points], ("series", 0), dots=True)],
            "step",
            "directions",
            y_range=(0.0, 1.1 * max([one.effective_rank for one in points] + [1.0])),
        ),
    ]
    losses = [
        Line(name, [s for s, _ in logged], [v for _, v in logged], ("series", k), dots=len(logged) < 30)
        for k, (name, logged) in enumerate(course.losses.items())
        if logged
    ]
    if losses:
        charts.append(Lines("loss, as logged", losses, "step", "loss", legend=True))
    return Picture(
        "run",
        "From checkpoint to checkpoint",
        charts,
        "How far the update went, where to, and in how many directions; beside the loss where it was logged.",
        "cosine 0; φ " + ", ".join(f"{number(value, 3)} ({side} side)" for side, value in found.chance.items()),
        "Hu et al. 2021, §7.2, over training steps",
        f"Curves over {len(x)} checkpoints; cosine with the last from {points[0].cosine:.2f} to 1.",
    )
