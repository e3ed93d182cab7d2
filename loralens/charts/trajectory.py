"""Charts of a training run over its steps: size, direction, effective rank and loss."""

from collections.abc import Mapping, Sequence
from math import ceil, isfinite, nan
from typing import Protocol

from loralens.analysis.trajectory import SETTLED, Trajectory
from loralens.charts.grid import fit_name
from loralens.charts.spec import Band, Figure, Line, LineChart, line_chart

NAMES = 8  # names of checkpoints that fit under the axis, where steps are unknown
DOTS = 30  # logged losses below which each is marked with a point: closer points would hide the line
TOP = 1.1  # the end of an axis, as a multiple of the largest value

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
    known_steps = [step for step in steps if step is not None]
    timed = len(known_steps) == len(steps)
    x: Sequence[float] = known_steps if timed else range(len(steps))
    every = ceil(len(names) / NAMES)
    ticks = [] if timed else [(float(i), fit_name(names[i], 12)) for i in range(0, len(names), every)]
    label = "step" if timed else "checkpoint (some steps are unknown)"
    points = run.points
    moved = [nan if point.length is None else point.length for point in points]  # the first has none before
    norms, ranks = [point.frobenius for point in points], [point.effective_rank for point in points]
    cosines = [point.cosine for point in points]
    # Cosines may be negative; the axis reaches below 0 only where one is.
    low = min([0.0, *(cosine for cosine in cosines if isfinite(cosine))])
    return [
        line_chart(
            "size of the update",
            [
                Line("‖ΔW‖ here", x, norms, ("series", 0), marker="dot"),
                Line("change since the previous one", x, moved, ("series", 1), marker="square", dashed=True),
            ],
            label, "Frobenius norm", y_range=(0.0, _top([*norms, *moved])), x_ticks=ticks, legend=True,
        ),
        line_chart(
            "direction vs. last checkpoint",
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
    """The end of an axis that begins at 0; 1 if all values are 0, as an axis needs two limits."""
    return TOP * max((value for value in values if isfinite(value)), default=0.0) or 1.0


def _levels(run: Trajectory) -> dict[str, float]:
    """The levels of φ by chance, and the cosine from which on a direction counts as settled."""
    chance = {f"chance, {side}": value for side, value in run.chance.items() if isfinite(value)}
    # If all weights are square, both sides have one level, which needs one line.
    if len(set(chance.values())) == 1:
        chance = {"chance": next(iter(chance.values()))}
    return {**chance, f"settled ({SETTLED})": SETTLED}


def _losses(losses: Losses, without: str) -> LineChart:
    """The chart of losses over their steps, or an empty chart with the reason."""
    drawn = {name: logged for name, logged in losses.items() if logged}
    lines = []
    for k, (name, logged) in enumerate(drawn.items()):
        steps, values = zip(*logged, strict=True)
        # The palette has eight colours of series.
        lines.append(Line(name, steps, values, ("series", k % 8), marker="dot" if len(logged) < DOTS else ""))
    finite = [value for line in lines for value in line.y if isfinite(value)]
    # A loss has no natural zero to begin at; 5 % of the range, or 0.5 where all values are equal.
    margin = 0.05 * (max(finite) - min(finite)) or 0.5 if finite else 0.0
    span = (min(finite) - margin, max(finite) + margin) if finite else (0.0, 1.0)
    return line_chart(
        "loss, as logged", lines, "step", "loss", y_range=span, legend=True, note="" if lines else without
    )


class WatchedPoint(Protocol):
    """What is drawn of one look."""

    @property
    def step(self) -> int: ...  # noqa: D102
    @property
    def frobenius(self) -> float: ...  # noqa: D102
    @property
    def effective_rank(self) -> float: ...  # noqa: D102
    @property
    def drift(self) -> float: ...  # noqa: D102
    @property
    def step_length(self) -> float: ...  # noqa: D102
    @property
    def cosine(self) -> float: ...  # noqa: D102
    @property
    def phi_out(self) -> float: ...  # noqa: D102
    @property
    def phi_in(self) -> float: ...  # noqa: D102
    @property
    def chance_out(self) -> float: ...  # noqa: D102
    @property
    def chance_in(self) -> float: ...  # noqa: D102


def watched_figure(looks: Sequence[WatchedPoint], signs: Sequence[str]) -> Figure:
    """Draw a watched run; ``signs`` are its warnings, each with its step, for the title."""
    title = f"watched run: {len(looks)} looks to step {looks[-1].step}"
    return Figure(f"{title}; {', '.join(signs)}" if signs else title, [Band(watched_charts(looks), columns=2)])


def watched_charts(looks: Sequence[WatchedPoint]) -> list[LineChart]:
    """Draw the charts of that figure."""
    x = [look.step for look in looks]
    margin = 0.02 * (x[-1] - x[0]) or 0.5
    x_range = (x[0] - margin, x[-1] + margin)
    # ΔW = 0 has no directions, so no effective rank.
    ranks = [look.effective_rank if look.frobenius else nan for look in looks]
    cosines = [look.cosine for look in looks]
    low = min([0.0, *(cosine for cosine in cosines if isfinite(cosine))])
    last = looks[-1]
    sides = (("out", last.chance_out), ("in", last.chance_in))
    chance = {f"chance, {side}": value for side, value in sides if isfinite(value)}
    # If all weights are square, both sides have one level, which needs one line.
    if len(set(chance.values())) == 1:
        chance = {"chance": next(iter(chance.values()))}
    return [
        line_chart(
            "size of the update",
            [
                Line("‖ΔW‖ here", x, [look.frobenius for look in looks], ("series", 0), marker="dot"),
                Line(
                    "moved since last look", x, [look.step_length for look in looks], ("series", 1),
                    marker="square", dashed=True,
                ),
            ],
            "step", "Frobenius norm", x_range=x_range, legend=True,
        ),
        line_chart(
            "direction, look to look",
            [
                Line("cosine of ΔW", x, cosines, ("series", 0), marker="dot"),
                Line("φ, out side", x, [look.phi_out for look in looks], ("series", 1), marker="square"),
                Line("φ, in side", x, [look.phi_in for look in looks], ("series", 2), marker="triangle"),
            ],
            "step", "cosine, φ", x_range=x_range, y_range=(low - 0.03, 1.03), levels=chance, legend=True,
        ),
        line_chart(
            "effective rank",
            [Line("mean over modules", x, ranks, ("series", 0), marker="dot")],
            "step", "directions", x_range=x_range,
        ),
        line_chart(
            "drift of A",
            [Line("mean over modules", x, [look.drift for look in looks], ("series", 0), marker="dot")],
            "step", "‖A − A₀‖/‖A₀‖", x_range=x_range,
        ),
    ]  # fmt: skip
