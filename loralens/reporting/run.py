"""The section of a training run: how size and direction of ΔW change from checkpoint to checkpoint."""

from collections.abc import Sequence
from math import isfinite

from loralens.analysis.trajectory import SETTLED
from loralens.charts.trajectory import trajectory_charts
from loralens.reporting.collection import CheckpointRun
from loralens.reporting.document import PageTable, Paragraph, Picture, Section
from loralens.reporting.result_tables import ResultTables
from loralens.reporting.subject import Subject
from loralens.tables.numbers import fixed, number

# If the A of the first checkpoint and that of the last have at least this cosine, φ of the in side shows the common
# initialisation and not the training. `loralens trajectory` has the same limit.
STUCK = 0.9


def run_section(subjects: Sequence[Subject], run: CheckpointRun, tables: ResultTables) -> Section:
    """The section of the run: a sentence, curves over the steps, and a table of checkpoints."""
    checkpoints = PageTable(tables.checkpoints([subject.label for subject in subjects], run))
    lead = "These are checkpoints of one training run. The direction of each is compared with that of the last."
    return Section("run", "The run", lead, [Paragraph(run_sentence(run)), _picture(run), checkpoints])


def run_sentence(run: CheckpointRun) -> str:
    """From which step on the direction of ΔW has settled, and whether φ of the in side means anything, in words."""
    settled = settled_sentence(run)
    text = f"{settled[0].upper()}{settled[1:]}"
    trajectory = run.trajectory
    if trajectory.settled is not None and trajectory.points[-1].frobenius:
        text += f": from there on every cosine with the last checkpoint is at least {SETTLED:g}"
    text += "."
    if not trajectory.points[-1].frobenius:
        return text
    # The first checkpoint is the farthest from the last. If even its A is close to the last A, all others are too.
    first = trajectory.points[0]
    if first.initial >= STUCK and first.phi["in"] > first.phi["out"]:
        text += " A stays close to its random initialisation, so φ of the in side is high throughout: "
        text += "judge by the out side."
    return text


def settled_sentence(run: CheckpointRun) -> str:
    """A clause that says whether the direction of ΔW has settled, without a capital and without a full stop."""
    trajectory, steps = run.trajectory, run.steps
    before = trajectory.points[-2].cosine
    if not trajectory.points[-1].frobenius:
        return "the last checkpoint is 0, so there is no direction to compare the others with"
    if trajectory.settled is not None:
        return f"the direction is settled from step {steps[trajectory.settled]} on (of {steps[-1]})"
    if isfinite(before):
        return (
            f"the direction was still turning: cosine {fixed('.3f')(before)} between steps {steps[-2]} and {steps[-1]}"
        )
    return "the checkpoint before the last is 0, so it is unknown whether the direction has settled"


def _picture(run: CheckpointRun) -> Picture:
    points, chance = run.trajectory.points, run.trajectory.chance
    charts = trajectory_charts(run.trajectory, list(run.steps), run.losses, [])
    return Picture(
        "run",
        "From checkpoint to checkpoint",
        [chart for chart in charts if chart.lines],  # the chart of losses has no lines if no loss was logged
        "Norm, direction and effective rank of ΔW over the steps, and the loss where it was logged.",
        "cosine 0; φ " + ", ".join(f"{number(value, 3)} ({side} side)" for side, value in chance.items()),
        "Hu et al. 2021, §7.2, over training steps",
        f"Curves over {len(points)} checkpoints; cosine with the last from {fixed('.2f')(points[0].cosine)} to 1.",
    )
