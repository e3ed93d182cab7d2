"""Charts of a training run over its steps: size, direction, effective rank, and loss or drift."""

from collections.abc import Mapping, Sequence
from math import isfinite, nan
from typing import Any

from loralens.analysis.trajectory import SETTLED, Trajectory
from loralens.charts.module_grid import fit_name, thin
from loralens.charts.spec import Band, Figure, Line, LineChart

NAMES = 3  # names of checkpoints that fit under the axis, where steps are unknown
DOTS = 30  # logged losses below which each is marked with a point: closer points would hide the line

Losses = Mapping[str, Sequence[tuple[int, float]]]


def trajectory_figure(run: Trajectory, steps: Sequence[int | None], losses: Losses, names: Sequence[str]) -> Figure:
    """Draw norm and step length, cosine and φ with the last checkpoint, effective rank, and losses over the steps.

    Parameters
    ----------
    run : Trajectory
    steps : sequence of int or None
        The steps of the checkpoints. If one is None, checkpoints stand at equal distances and are labelled with names.
    losses : mapping of str to sequence of (int, float)
        Name of a loss → its steps and values; drawn only if all steps are known.
    names : sequence of str
        The names of the checkpoints.
    """
    title = f"trajectory: {len(steps)} checkpoints, {fit_name(names[0], 30)} to {fit_name(names[-1], 30)}"
    return Figure(title, [Band(trajectory_charts(run, steps, losses, names), columns=2)])


def trajectory_charts(
    run: Trajectory, steps: Sequence[int | None], losses: Losses, names: Sequence[str]
) -> list[LineChart]:
    """Draw the charts of that figure."""
    known = [step for step in steps if step is not None]
    timed = len(known) == len(steps)
    labels = [] if timed else thin([fit_name(name, 10) for name in names], NAMES)
    points = run.points
    charts = _charts(
        known if timed else range(len(steps)),
        [point.frobenius for point in points],
        ("change since the previous one", [nan if point.length is None else point.length for point in points]),
        [point.cosine for point in points],
        [[point.phi[side] for point in points] for side in ("out", "in")],
        {**_chance(run.chance["out"], run.chance["in"]), f"settled ({SETTLED})": SETTLED},
        [point.effective_rank for point in points],
        title="direction vs. last checkpoint",
        label="step" if timed else "checkpoint (some steps are unknown)",
        ticks=[(float(i), name) for i, name in enumerate(labels) if name],
    )
    lines = [
        Line(name, [x for x, _ in logged], [y for _, y in logged], f"c{k % 8}", "o" if len(logged) < DOTS else "")
        for k, (name, logged) in enumerate(losses.items() if timed else ())
        if logged
    ]
    values = [value for line in lines for value in line.y if isfinite(value)]
    # A loss has no natural zero to begin at; 5 % of the range, or 0.5 where all values are equal.
    margin = 0.05 * (max(values) - min(values)) or 0.5 if values else 0.0
    limits = (min(values) - margin, max(values) + margin) if values else (0.0, 1.0)
    reason = "no losses logged" if timed else "not drawn: some steps are unknown"
    loss = LineChart(
        "loss, as logged", lines, "step", "loss", y_range=limits, legend=True, note="" if lines else reason
    )
    return [*charts, loss]


def watched_figure(looks: Sequence[Any], signs: Sequence[str]) -> Figure:
    """Draw a watched run, of which ``looks`` are the rows; ``signs`` are its warnings, each with its step."""
    title = f"watched run: {len(looks)} looks to step {looks[-1].step}"
    return Figure(f"{title}; {', '.join(signs)}" if signs else title, [Band(watched_charts(looks), columns=2)])


def watched_charts(looks: Sequence[Any]) -> list[LineChart]:
    """Draw the charts of that figure."""
    x, last = [look.step for look in looks], looks[-1]
    charts = _charts(
        x,
        [look.frobenius for look in looks],
        ("moved since last look", [look.step_length for look in looks]),
        [look.cosine for look in looks],
        [[look.phi_out for look in looks], [look.phi_in for look in looks]],
        _chance(last.chance_out, last.chance_in),
        # ΔW = 0 has no directions, so no effective rank.
        [look.effective_rank if look.frobenius else nan for look in looks],
        title="direction, look to look",
        label="step",
        ticks=(),
    )
    drift = Line("mean over modules", x, [look.drift for look in looks], "c0", "o")
    return [*charts, LineChart("drift of A", [drift], "step", "‖A − A₀‖/‖A₀‖", x_range=charts[0].x_limits)]


def _charts(
    x: Sequence[float],
    norms: Sequence[float],
    moved: tuple[str, Sequence[float]],
    cosines: Sequence[float],
    phi: Sequence[Sequence[float]],
    levels: Mapping[str, float],
    ranks: Sequence[float],
    *,
    title: str,
    label: str,
    ticks: Sequence[tuple[float, str]],
) -> list[LineChart]:
    """Draw size, direction and effective rank over ``x``."""
    margin = 0.02 * (x[-1] - x[0]) or 0.5
    x_range = (x[0] - margin, x[-1] + margin)
    size = [Line("‖ΔW‖ here", x, norms, "c0", "o"), Line(moved[0], x, moved[1], "c1", "s", "--")]
    direction = [
        Line("cosine of ΔW", x, cosines, "c0", "o"),
        Line("φ, out side", x, phi[0], "c1", "s"),
        Line("φ, in side", x, phi[1], "c2", "^"),
    ]
    # Cosines may be negative; the axis reaches below 0 only where one is.
    y_range = (min([0.0, *filter(isfinite, cosines)]) - 0.03, 1.03)
    mean = [Line("mean over modules", x, ranks, "c0", "o")]
    return [
        LineChart("size of the update", size, label, "Frobenius norm", x_range=x_range, x_ticks=ticks, legend=True),
        LineChart(
            title, direction, label, "cosine, φ", x_range=x_range, y_range=y_range, x_ticks=ticks, levels=levels,
            legend=True,
        ),
        LineChart("effective rank", mean, label, "directions", x_range=x_range, x_ticks=ticks),
    ]  # fmt: skip


def _chance(out: float, in_: float) -> dict[str, float]:
    """The levels of φ by chance; if all weights are square, both sides have one level, which needs one line."""
    levels = {"chance": out} if out == in_ else {"chance, out": out, "chance, in": in_}
    return {name: value for name, value in levels.items() if isfinite(value)}
