"""Charts of a watched run over its steps: size, direction, effective rank, and gradients or the drift of A."""

from collections.abc import Sequence
from math import isfinite, nan
from typing import Protocol

from loralens.charts.axes import line_chart
from loralens.charts.spec import Band, Figure, Line, LineChart


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
