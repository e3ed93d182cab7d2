"""Chooses the limits and the ticks of the axes of line charts."""

from collections.abc import Mapping, Sequence
from math import ceil, floor, inf, isfinite, log10

from loralens.charts.spec import Area, Axis, Limits, Line, LineChart
from loralens.tables.numbers import MINUS

X_TICKS, Y_TICKS = 6, 5  # most ticks of an axis, for which a panel of 240 × 180 pixels has room
TICK = 13.0  # pixels between the numbers of a map, which are 10 pixels high


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
) -> LineChart:
    """Make a line chart whose axes are chosen so that all lines fit.

    Parameters
    ----------
    title : str
    lines : sequence of Line
    x_label, y_label : str
    log : bool
        Whether y is logarithmic.
    x_range, y_range : tuple of float, optional
        Limits that several charts share. By default x spans the finite points with a margin, and a y axis that is not
        logarithmic begins at 0.
    x_ticks : sequence of (float, str), optional
        By default round numbers, which are integers if every x is an integer.
    levels, legend, areas, note
        As in `LineChart`.
    """
    points = [(x, y) for line in lines for x, y in zip(line.x, line.y, strict=True) if isfinite(y)]
    across = x_range or _x_limits([x for x, _ in points])
    up = y_range or _y_limits([y for _, y in points if y > 0 or not log], log=log)
    if x_ticks is None:
        # Directions, ranks and blocks are counted, so a tick at 2.5 would have no meaning.
        integers = all(float(x).is_integer() for line in lines for x in line.x)
        x_ticks = label_ticks(round_numbers(across, X_TICKS, integers=integers))
    y_ticks = label_ticks(powers_of_ten(up) if log else round_numbers(up, Y_TICKS))
    x, y = Axis(x_label, across, x_ticks), Axis(y_label, up, y_ticks, log)
    return LineChart(title, lines, x, y, levels or {}, legend, areas, note)


def _x_limits(values: Sequence[float]) -> Limits:
    low, high = min(values, default=0.0), max(values, default=1.0)
    margin = (high - low) * 0.02 or 0.5  # a single point stands in the middle of its axis
    return low - margin, high + margin


def _y_limits(values: Sequence[float], *, log: bool) -> Limits:
    if log:
        low, high = min(values, default=0.1), max(values, default=1.0)
        return (low, high) if low < high else (low / 2, high * 2)  # one value: an axis needs two limits
    # From 0, so that heights can be compared as lengths.
    low, high = min([0.0, *values]), max([0.0, *values])
    return low, high * 1.05 or 1.0  # room above the highest point; 1 where all values are 0


def direction_axis(most: int) -> tuple[Limits, list[tuple[float, str]]]:
    """Return limits and ticks of an axis of directions from 1 to ``most``."""
    step = _power_of_two(most)
    margin = max(0.02 * most, 0.1)
    return (1 - margin, most + margin), label_ticks(sorted({1, *range(step, most + 1, step)}))


def _power_of_two(count: int) -> int:
    """The smallest power of two of which at most four multiples reach ``count``; ranks are mostly powers of two."""
    return next(1 << k for k in range(32) if count <= 4 << k)


def map_ticks(count: int, pixels: float = inf) -> list[int]:
    """Return the ticks of a map of ``count`` directions: the first, the last, and at most three between them.

    On a side of so many ``pixels`` the numbers stand at least `TICK` pixels apart: those of a flat map would overlap.
    """
    step = _power_of_two(count)
    # Numbers less than half a step from the first or the last would touch them.
    inner = [i for i in range(step, count, step) if count - i >= step / 2 and (i - 1 >= step / 2 or i == 1)]
    ticks = [1]
    least_step = TICK * count / pixels
    for i in inner:
        if i - ticks[-1] >= least_step and count - i >= least_step:
            ticks.append(i)
    return sorted({*ticks, count})


def label_ticks(values: Sequence[float]) -> list[tuple[float, str]]:
    """Return ticks, which are pairs of a value and its label."""
    return [(float(value), tick_label(value)) for value in values]


def tick_label(value: float) -> str:
    """Return the label of a tick, as short as possible."""
    # From 1e5 on, 1e5 is shorter than 100000.
    text = f"{value:.0f}" if float(value).is_integer() and abs(value) < 1e5 else f"{value:.3g}"
    return text.replace("e-0", f"e{MINUS}").replace("e+0", "e").replace("-", MINUS)


def round_numbers(span: Limits, most: int, *, integers: bool = False) -> list[float]:
    """Return the multiples of 1, 2 or 5 times a power of ten within a span, about ``most`` of them."""
    low, high = span
    if not high > low:
        return [low]
    power = 10.0 ** floor(log10((high - low) / most))
    step = next(power * k for k in (1, 2, 5, 10, 20) if (high - low) / (power * k) <= most)
    step = max(step, 1.0) if integers else step
    # The small tolerance keeps a limit that is itself a multiple, in spite of rounding.
    return [round(k * step, 12) for k in range(ceil(low / step - 1e-9), floor(high / step + 1e-9) + 1)]


def powers_of_ten(span: Limits) -> list[float]:
    """Return the powers of ten within a span; if there is at most one, also 2 and 5 times a power of ten."""
    low, high = span
    first, last = floor(log10(low)), ceil(log10(high))
    tens = [10.0**k for k in range(first, last + 1) if low <= 10.0**k <= high]
    if len(tens) > 1:
        return tens[:: ceil(len(tens) / 6)]  # every second or third of more than six
    finer = [k * 10.0**p for p in range(first, last + 1) for k in (1, 2, 5) if low <= k * 10.0**p <= high]
    return finer or [low, high]
