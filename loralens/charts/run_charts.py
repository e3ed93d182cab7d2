"""Charts of a training run over its steps: size, direction, effective rank, and loss or drift."""

from collections.abc import Mapping, Sequence
from math import isfinite, nan
from typing import Any

from loralens.analysis.trajectory import SETTLED, Trajectory
from loralens.charts.module_grid import fit_name
from loralens.charts.spec import Band, Figure, Line, LineChart

DOTS = 30  # logged losses below which each is marked with a point: closer points would hide the line

Losses = Mapping[str, Sequence[tuple[int, float]]]


def trajectory_figure(run: Trajectory, steps: Sequence[int | None], losses: Losses, names: Sequence[str]) -> Figure:
    """Draw norm and step length, cosine and φ with the last checkpoint, effective rank, and losses over the steps.

    Parameters
    ----------
    run : Trajectory
    steps : sequence of int or None
        The steps of the checkpoints. If one is None, checkpoints are numbered and stand at equal distances.
    losses : mapping of str to sequence of (int, float)
        Name of a loss → its steps and values; drawn only if all steps are known.
    names : sequence of str
        The names of the checkpoints.
    """
    title = f"trajectory: {len(steps)} checkpoints, {fit_name(names[0], 30)} to {fit_name(names[-1], 30)}"
    return Figure(title, [Band(trajectory_charts(run, steps, losses), columns=2)])


def trajectory_charts(run: Trajectory, steps: Sequence[int | None], losses: Losses) -> list[LineChart]:
    """Draw the charts of that figure."""
    known = [step for step in steps if step is not None]
    timed = len(known) == len(steps)
    points = run.points
    charts = _charts(
        known if timed else range(1, len(steps) + 1),
        [point.frobenius for point in points],
        ("change since the previous one", [nan if point.length is None else point.length for point in points]),
        [point.cosine for point in points],
        [[point.phi[side] for point in points] for side in ("out", "in")],
        {**_chance(run.chance["out"], run.chance["in"]), f"settled ({SETTLED})": SETTLED},
        [point.effective_rank for point in points],
        title="direction vs. last checkpoint",
        label="step" if timed else "checkpoint (some steps are unknown)",
    )
    lines = [
        Line(name, [x for x, _ in logged], [y for _, y in logged], f"c{k % 8}", "o" if len(logged) < DOTS else "")
        for k, (name, logged) in enumerate(losses.items() if timed else ())
        if logged
    ]
    values = [value for line in lines for value in line.y if isfinite(value)]
    # A loss has no natural zero to begin at; 5 % of the range, or 0.5 where all values are equal.
    margin = 0.05 * (max(values) - min(values)) or 0.5 if values else 0.0
    y_range = (min(values) - margin, max(values) + margin) if values else None
    reason = "no losses logged" if timed else "not drawn: some steps are unknown"
    note = "" if lines else reason
    return [*charts, LineChart("loss, as logged", lines, "step", "loss", y_range=y_range, legend=True, note=note)]


def watched_figure(snapshots: Sequence[Any], warnings: Sequence[str]) -> Figure:
    """Draw a watched run, of which ``snapshots`` are the rows; each of its ``warnings`` has its step."""
    title = f"watched run: {len(snapshots)} snapshots to step {snapshots[-1].step}"
    return Figure("; ".join(filter(None, (title, ", ".join(warnings)))), [Band(watched_charts(snapshots), columns=2)])


def watched_charts(snapshots: Sequence[Any]) -> list[LineChart]:
    """Draw the charts of that figure."""
    x, last = [row.step for row in snapshots], snapshots[-1]
    charts = _charts(
        x,
        [row.frobenius for row in snapshots],
        ("change since the last snapshot", [row.step_length for row in snapshots]),
        [row.cosine for row in snapshots],
        [[row.phi_out for row in snapshots], [row.phi_in for row in snapshots]],
        _chance(last.chance_out, last.chance_in),
        # ΔW = 0 has no directions, so no effective rank.
        [row.effective_rank if row.frobenius else nan for row in snapshots],
        title="direction vs. last snapshot",
        label="step",
    )
    drift = Line("mean over modules", x, [row.drift for row in snapshots], "c0", "o")
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
        LineChart("size of the update", size, label, "Frobenius norm", x_range=x_range, legend=True),
        LineChart(title, direction, label, "cosine, φ", x_range=x_range, y_range=y_range, levels=levels, legend=True),
        LineChart("effective rank", mean, label, "directions", x_range=x_range),
    ]


def _chance(out: float, in_: float) -> dict[str, float]:
    """The levels of φ by chance; if all weights are square, both sides have one level, which needs one line."""
    levels = {"chance": out} if out == in_ else {"chance, out": out, "chance, in": in_}
    return {name: value for name, value in levels.items() if isfinite(value)}
