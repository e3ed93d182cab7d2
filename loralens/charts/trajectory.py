"""One run over its steps: size, direction, effective rank and loss."""

from collections.abc import Mapping, Sequence
from math import ceil, isfinite, nan

from loralens.analysis.trajectory import SETTLED, Trajectory
from loralens.charts.axes import line_chart
from loralens.charts.names import fit
from loralens.charts.spec import Band, Figure, Line, Lines

NAMES = 8  # checkpoints without steps that are named on the axis
DOTS = 30  # logged losses up to which each has its point
TOP = 1.1  # times the largest value, where an axis ends

Losses = Mapping[str, Sequence[tuple[int, float]]]


def trajectory_figure(run: Trajectory, steps: Sequence[int | None], losses: Losses, names: Sequence[str]) -> Figure:
    """Norm and step length, direction against the last checkpoint, effective rank, and the losses, over the steps.

    Parameters
    ----------
    run : Trajectory
    steps : sequence of int or None
        Of the checkpoints. Where one is missing, checkpoints stand at equal distances under their names.
    losses : mapping of str to sequence of (int, float)
        Name of a loss → step and value; drawn where all steps are known.
    names : sequence of str
        Of the checkpoints.
    """
    title = f"trajectory: {len(steps)} checkpoints, {fit(names[0], 30)} to {fit(names[-1], 30)}"
    return Figure(title, [Band(trajectory_charts(run, steps, losses, names), columns=2)])


def trajectory_charts(
    run: Trajectory, steps: Sequence[int | None], losses: Losses, names: Sequence[str]
) -> list[Lines]:
    """The charts of that figure."""
    known = [step for step in steps if step is not None]
    timed = len(known) == len(steps)
    x: Sequence[float] = known if timed else range(len(steps))
    every = ceil(len(names) / NAMES)
    ticks = None if timed else [(float(i), fit(names[i], 12)) for i in range(0, len(names), every)]
    label = "step" if timed else "checkpoint (not all say their step)"
    points = run.points
    moved = [point.length if point.length is not None else nan for point in points]
    norms, ranks = [point.frobenius for point in points], [point.effective_rank for point in points]
    cosines = [point.cosine for point in points]
    low = min([0.0, *(cosine for cosine in cosines if isfinite(cosine))])
    return [
        line_chart(
            "size of the update",
            [
                Line("‖ΔW‖ here", x, norms, ("series", 0), marker="dot"),
                Line("moved since the one before", x, moved, ("series", 1), marker="square", dashed=True),
            ],
            label, "Frobenius norm", y_range=(0.0, _top([*norms, *moved])), x_ticks=ticks, legend=True,
        ),
        line_chart(
            "direction, against the last",
            [
                Line("cosine of ΔW", x, cosines, ("series", 0), marker="dot"),
                Line("φ, out side", x, [point.phi["out"] for point in points], ("series", 1), marker="square"),
                Line("φ, in side", x, [point.phi["in"] for point in points], ("series", 2), marker="triangle"),
            ],
            label, "cosine, φ", y_range=(low - 0.03, 1.03), x_ticks=ticks, levels=_levels(run), legend=True,
        ),
        line_chart(
            "effective rank",
            [Line("mean over modules", x, ranks, ("series", 0), marker="dot")],
            label, "directions", y_range=(0.0, _top(ranks)), x_ticks=ticks,
        ),
        _losses(losses if timed else {}, "no losses logged" if timed else "not drawn: some steps are unknown"),
    ]  # fmt: skip


def _top(values: Sequence[float]) -> float:
    return TOP * max((value for value in values if isfinite(value)), default=0.0) or 1.0


def _levels(run: Trajectory) -> dict[str, float]:
    """What chance gives of φ, and from where on a direction counts as settled."""
    chance = {f"chance, {side}": value for side, value in run.chance.items() if isfinite(value)}
    if len(set(chance.values())) == 1:
        chance = {"chance": next(iter(chance.values()))}
    return {**chance, f"settled ({SETTLED})": SETTLED}


def _losses(losses: Losses, without: str) -> Lines:
    """The losses over their steps, or in words why there are none."""
    drawn = {name: logged for name, logged in losses.items() if logged}
    lines = [
        Line(
            name,
            [step for step, _ in logged],
            [value for _, value in logged],
            ("series", k % 8),
            marker="dot" if len(logged) < DOTS else "",
        )
        for k, (name, logged) in enumerate(drawn.items())
    ]
    values = [value for line in lines for value in line.y if isfinite(value)]
    margin = 0.05 * (max(values) - min(values)) or 0.5 if values else 0.0
    span = (min(values) - margin, max(values) + margin) if values else (0.0, 1.0)
    return line_chart(
        "loss, as logged", lines, "step", "loss", y_range=span, legend=True, note="" if lines else without
    )
