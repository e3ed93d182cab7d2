"""Axes of a chart of lines: what they span, and round numbers beside them."""

from collections.abc import Mapping, Sequence
from math import ceil, floor, isfinite, log10

from loralens.charts.spec import Area, Axis, Limits, Line, Lines

X_TICKS, Y_TICKS = 6, 5  # at most, about


def line_chart(
    title: str,
    lines: Sequence[Line],
    x_label: str,
    y_label: str,
    *,
    log: bool = False,
    x_range: Limits | None = None,
    y_range: Limits | None = None,
    x_ticks: Sequence[tuple[float, str]] | None = None,
    levels: Mapping[str, float] | None = None,
    legend: bool = False,
    areas: Sequence[Area] = (),
    note: str = "",
) -> Lines:
    """A chart of lines with axes that hold them.

    Parameters
    ----------
    title : str
    lines : sequence of Line
    x_label, y_label : str
    log : bool
        Whether y is logarithmic.
    x_range, y_range : tuple of float, optional
        Where charts beside each other share them; else x spans the finite points with a margin, and y, if it is not
        logarithmic, begins at 0.
    x_ticks : sequence of (float, str), optional
        Else round numbers, whole ones where every x is.
    levels, legend, areas, note
        As in `Lines`.
    """
    points = [(x, y) for line in lines for x, y in zip(line.x, line.y, strict=True) if isfinite(y)]
    across = x_range or _x_limits([x for x, _ in points])
    up = y_range or _y_limits([y for _, y in points if y > 0 or not log], log=log)
    if x_ticks is None:
        whole = all(float(x).is_integer() for line in lines for x in line.x)
        x_ticks = labelled(round_numbers(across, X_TICKS, whole=whole))
    y_ticks = labelled(powers(up) if log else round_numbers(up, Y_TICKS))
    x, y = Axis(x_label, across, x_ticks), Axis(y_label, up, y_ticks, log)
    return Lines(title, lines, x, y, levels or {}, legend, areas, note)


def _x_limits(values: Sequence[float]) -> Limits:
    low, high = min(values, default=0.0), max(values, default=1.0)
    margin = (high - low) * 0.02 or 0.5
    return low - margin, high + margin


def _y_limits(values: Sequence[float], *, log: bool) -> Limits:
    if log:
        low, high = min(values, default=0.1), max(values, default=1.0)
        return (low, high) if low < high else (low / 2, high * 2)
    low, high = min([0.0, *values]), max([0.0, *values])
    return low, high * 1.05 or 1.0


def direction_axis(most: int) -> tuple[Limits, list[tuple[float, str]]]:
    """Limits and ticks of an axis of directions from 1 to ``most``."""
    step = next((2**k for k in range(32) if most <= 4 * 2**k), most)
    shown = sorted({1, *range(step, most + 1, step)})
    margin = max(0.02 * most, 0.1)
    return (1 - margin, most + margin), labelled(shown)


def map_ticks(count: int) -> list[int]:
    """Ticks of a map of ``count`` directions: 1, the last, and at most three round numbers between."""
    step = next((2**k for k in range(32) if count <= 4 * 2**k), count) if count > 1 else 1
    inner = [i for i in range(step, count, step) if count - i >= step / 2 and (i - 1 >= step / 2 or i == 1)]
    return sorted({1, *inner, count})


def labelled(values: Sequence[float]) -> list[tuple[float, str]]:
    """Ticks and what they say."""
    return [(float(value), tick_label(value)) for value in values]


def tick_label(value: float) -> str:
    """A number beside an axis, as short as it can be."""
    text = f"{value:.0f}" if float(value).is_integer() and abs(value) < 1e5 else f"{value:.3g}"
    return text.replace("e-0", "e−").replace("e+0", "e").replace("-", "−")


def round_numbers(span: Limits, most: int, *, whole: bool = False) -> list[float]:
    """Multiples of 1, 2 or 5 times a power of ten, at most so many."""
    low, high = span
    if not high > low:
        return [low]
    power = 10.0 ** floor(log10((high - low) / most))
    step = next(power * k for k in (1, 2, 5, 10, 20) if (high - low) / (power * k) <= most)
    step = max(step, 1.0) if whole else step
    return [round(k * step, 12) for k in range(ceil(low / step - 1e-9), floor(high / step + 1e-9) + 1)]


def powers(span: Limits) -> list[float]:
    """Powers of ten; of less than two of them also 2 and 5 times one."""
    low, high = span
    first, last = floor(log10(low)), ceil(log10(high))
    tens = [10.0**k for k in range(first, last + 1) if low <= 10.0**k <= high]
    if len(tens) > 1:
        return tens[:: ceil(len(tens) / 6)]
    finer = [k * 10.0**p for p in range(first, last + 1) for k in (1, 2, 5) if low <= k * 10.0**p <= high]
    return finer or [low, high]
