"""One run over its steps: size, rank, direction and loss, one panel each."""

from collections.abc import Mapping, Sequence
from itertools import cycle
from math import ceil

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from loralens.analysis.trajectory import SETTLED, Trajectory
from loralens.charts.figure import fit, settle, styled
from loralens.core.lazy import Array

INK, SECOND, THIRD = "#0072B2", "#D55E00", "#009E73"  # told apart by colour-blind eyes
NAMES = 16  # checkpoints without steps that are named on the axis


def trajectory_figure(
    found: Trajectory,
    steps: Sequence[int | None],
    losses: Mapping[str, Sequence[tuple[int, float]]],
    names: Sequence[str],
) -> Figure:
    """Norm and step length, effective rank, direction against the last checkpoint, and the losses, over the steps.

    Parameters
    ----------
    found : Trajectory
    steps : sequence of int or None
        Of the checkpoints. Where one is missing, checkpoints stand at equal distances under their names.
    losses : mapping of str to sequence of (int, float)
        Name of a loss → step and value; drawn where all steps are known.
    names : sequence of str
        Of the checkpoints.

    Returns
    -------
    Figure
    """
    known = [step for step in steps if step is not None]
    timed = len(known) == len(steps)
    x = np.array(known if timed else range(len(steps)), dtype=float)
    panels = [_norms, _ranks, _directions]
    drawn = {name: points for name, points in losses.items() if points} if timed else {}
    with styled():
        figure = Figure(figsize=(8.5, 5.6), layout="constrained")
        figure.suptitle(
            f"trajectory: {len(x)} checkpoints, {fit(names[0], 30)} to {fit(names[-1], 30)}", parse_math=False
        )
        axes = figure.subplots(2, 2, sharex=True)
        for panel, where in zip(panels, axes.flat, strict=False):
            panel(where, found, x)
        _losses(axes[1, 1], drawn, "no losses logged" if timed else "not drawn: some steps are unknown")
        for where in axes.flat:
            where.grid(visible=True, color="0.9", linewidth=0.5)
            where.margins(x=0.03)
        for where in axes[1]:
            _steps(where, x, names, timed=timed)
    return settle(figure)


def _norms(axes: Axes, found: Trajectory, x: Array) -> None:
    points = found.points
    axes.plot(x, [one.frobenius for one in points], marker="o", markersize=4, color=INK, label="‖ΔW‖ here")
    moved = [one.length if one.length is not None else np.nan for one in points]
    axes.plot(x, moved, marker="s", markersize=4, color=SECOND, linestyle="--", label="moved since the one before")
    axes.set_title("size of the update")
    axes.set_ylabel("Frobenius norm")
    _from_zero(axes, [*(one.frobenius for one in points), *moved])
    axes.legend(frameon=False, fontsize=7)


def _ranks(axes: Axes, found: Trajectory, x: Array) -> None:
    axes.plot(x, [one.effective_rank for one in found.points], marker="o", markersize=4, color=INK)
    axes.set_title("effective rank, mean over modules")
    axes.set_ylabel("effective rank (directions)")
    _from_zero(axes, [one.effective_rank for one in found.points])


def _from_zero(axes: Axes, values: Sequence[float]) -> None:
    """A y axis from 0 to a little above the largest finite value."""
    top = max((value for value in values if np.isfinite(value)), default=0.0)
    axes.set_ylim(0, 1.12 * top or 1)


def _directions(axes: Axes, found: Trajectory, x: Array) -> None:
    points = found.points
    for label, values, colour, marker in (
        ("cosine of ΔW", [one.cosine for one in points], INK, "o"),
        ("φ, out side", [one.phi["out"] for one in points], SECOND, "s"),
        ("φ, in side", [one.phi["in"] for one in points], THIRD, "^"),
    ):
        axes.plot(x, values, marker=marker, markersize=4, color=colour, label=label)
    if found.chance["out"] == found.chance["in"]:
        axes.axhline(found.chance["in"], color="0.3", linestyle=":", linewidth=1, label="φ by chance")
    else:
        axes.axhline(found.chance["out"], color=SECOND, linestyle=":", linewidth=1, label="φ by chance, out")
        axes.axhline(found.chance["in"], color=THIRD, linestyle=":", linewidth=1, label="φ by chance, in")
    axes.axhline(SETTLED, color="0.6", linewidth=0.7, label=f"settled ({SETTLED})")
    low = min([0.0, *(one.cosine for one in points if np.isfinite(one.cosine))])
    axes.set_ylim(low - 0.03, 1.03)
    axes.set_title("direction, against the last checkpoint")
    axes.set_ylabel("cosine, φ (0 to 1)")
    axes.legend(frameon=True, framealpha=0.8, edgecolor="none", fontsize=6.5, ncols=2, loc="best")


def _losses(axes: Axes, losses: Mapping[str, Sequence[tuple[int, float]]], without: str) -> None:
    axes.set_title("loss, as logged")
    if not losses:
        axes.set_yticks([])
        axes.text(0.5, 0.5, without, transform=axes.transAxes, ha="center", va="center", color="0.4")
        return
    for (name, points), colour in zip(losses.items(), cycle((INK, SECOND, THIRD)), strict=False):
        steps, values = zip(*points, strict=True)
        axes.plot(steps, values, color=colour, linewidth=1, marker="." if len(points) < 30 else "", label=name)
    axes.set_ylabel("loss")
    axes.legend(frameon=False, fontsize=7)


def _steps(axes: Axes, x: Array, names: Sequence[str], *, timed: bool) -> None:
    """Name the x axis: steps, or the checkpoints one by one where some have none."""
    if timed:
        axes.set_xlabel("step")
        return
    shown = range(0, len(names), ceil(len(names) / NAMES))
    axes.set_xticks(x[list(shown)], [fit(names[i], 24) for i in shown], rotation=30, ha="right", parse_math=False)
    axes.set_xlabel("checkpoint (not all of them say their step)")
