"""The figure of the trade-off: error against the size of the file, for one rank everywhere and for a budget."""

from collections.abc import Sequence

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from loralens.charts.figure import fit, settle, styled
from loralens.compression.curve import Point

UNIFORM, BUDGET, FEW = "#D55E00", "#0072B2", "#009E73"  # told apart by colour-blind eyes, and by their markers
CHOSEN = "black"
LABELS = 12  # ranks that fit beside their points
UNITS = (("B", 1), ("kB", 1000), ("MB", 1000**2), ("GB", 1000**3))


def curve_figure(
    title: str, points: Sequence[Point], *, chosen: tuple[int, float] | None = None, on_data: bool = False
) -> Figure:
    """Relative error in percent over bytes of the file, both from 0.

    Parameters
    ----------
    title : str
    points : sequence of Point
        Of `loralens.compression.curve.rank_curve`.
    chosen : tuple of int and float, optional
        Bytes and error of what was written, marked on the curve.
    on_data : bool
        Errors are those on real inputs.
    """
    with styled():
        figure = Figure(figsize=(6.4, 4.0), layout="constrained")
        axes = figure.add_subplot()
        largest = max((point.uniform.bytes for point in points), default=1)
        unit, step = next((u, s) for u, s in reversed(UNITS) if largest >= s)
        for name, marker, colour, label in (
            ("uniform", "o", UNIFORM, "one rank everywhere"),
            ("budget", "s", BUDGET, "ranks where they save most, at the same size"),
        ):
            choices = [getattr(point, name) for point in points]
            axes.plot(
                [one.bytes / step for one in choices],
                [100 * one.error for one in choices],
                marker=marker,
                markersize=4,
                linewidth=1.2,
                color=colour,
                label=label,
            )
        few = [(point.uniform.bytes / step, 100 * point.few_bits) for point in points if point.few_bits is not None]
        if few:
            label = "ranks and bits, at the same size (loralens-q, expected)"
            axes.plot(*zip(*few, strict=True), marker="^", markersize=4, linewidth=1.2, color=FEW, label=label)
        _label_ranks(axes, points, step, room=largest / LABELS)
        if chosen:
            axes.plot(
                chosen[0] / step, 100 * chosen[1], "*", markersize=11, color=CHOSEN, label="what was written", zorder=5
            )
        error = "√(E‖(ΔW − ΔW')x‖² / E‖ΔWx‖²)" if on_data else "‖ΔW − ΔW'‖ / ‖ΔW‖"
        _finish(axes, unit, 1.08 * largest / step, error)
        axes.set_title(fit(title, 90), parse_math=False)
    return settle(figure)


def _label_ranks(axes: Axes, points: Sequence[Point], step: int, *, room: float) -> None:
    """The rank beside the points, those left out that are less than ``room`` bytes from the one before."""
    before = float("inf")
    for point in points:
        if before - point.uniform.bytes < room and point is not points[-1]:
            continue
        before = point.uniform.bytes
        axes.annotate(
            f"r = {point.rank}" if point in (points[0], points[-1]) else str(point.rank),
            (point.uniform.bytes / step, 100 * point.uniform.error),
            xytext=(4, 4),
            textcoords="offset points",
            fontsize=7,
            color=UNIFORM,
        )


def _finish(axes: Axes, unit: str, right: float, error: str) -> None:
    """Axes from 0, named, and the legend where falling curves leave room."""
    axes.set_xlabel(f"size of the file [{unit}]")
    axes.set_ylabel(f"{error} over all modules [%]")
    axes.set(xlim=(0, right), ylim=(0, 1.08 * max(axes.get_ylim()[1], 1e-9)))
    axes.grid(visible=True, linewidth=0.3, color="0.85")
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False, loc="upper right")
