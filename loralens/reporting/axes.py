"""Axes of a chart of lines: what they span, and the numbers beside them."""

from math import ceil, floor, isfinite, log10

from loralens.reporting.chart import Lines

Span = tuple[float, float]


def spans(chart: Lines) -> tuple[Span, Span]:
    """What x and y span: the finite points, x with a margin, a linear y from 0; or the chart's own range of y."""
    xs = [x for line in chart.lines for x, y in zip(line.x, line.y, strict=True) if isfinite(y)] or [0, 1]
    ys = [y for line in chart.lines for y in line.y if isfinite(y) and (y > 0 or not chart.log)]
    low, high = chart.y_range or ((min(ys), max(ys)) if ys else (0.1, 1.0))
    if not chart.y_range and not chart.log:
        low, high = min(low, 0.0), high * 1.05 or 1.0
    margin = (max(xs) - min(xs)) * 0.02 or 0.5
    return (min(xs) - margin, max(xs) + margin), (low, high)


def empty(chart: Lines) -> bool:
    """Whether there is no point to draw."""
    return not any(isfinite(y) for line in chart.lines for y in line.y)


def x_ticks(chart: Lines, span: Span) -> list[float]:
    """Round numbers on the x axis, whole ones where every x is."""
    whole = all(float(x).is_integer() for line in chart.lines for x in line.x)
    return _round_numbers(span, 6, whole=whole)


def y_ticks(chart: Lines, span: Span) -> list[float]:
    """Round numbers on the y axis, or powers of ten on a logarithmic one."""
    return _powers(span) if chart.log else _round_numbers(span, 5)


def tick_label(value: float) -> str:
    """A number beside an axis, as short as it can be."""
    return f"{value:.3g}".replace("e-0", "e−").replace("e+0", "e").replace("-", "−")


def _round_numbers(span: Span, most: int, *, whole: bool = False) -> list[float]:
    """Multiples of 1, 2 or 5 times a power of ten, at most so many."""
    low, high = span
    if not high > low:
        return [low]
    power = 10.0 ** floor(log10((high - low) / most))
    step = next(power * k for k in (1, 2, 5, 10, 20) if (high - low) / (power * k) <= most)
    step = max(step, 1.0) if whole else step
    return [round(k * step, 12) for k in range(ceil(low / step - 1e-9), floor(high / step + 1e-9) + 1)]


def _powers(span: Span) -> list[float]:
    """Powers of ten; of less than two of them also 2 and 5 times one."""
    low, high = span
    first, last = floor(log10(low)), ceil(log10(high))
    tens = [10.0**k for k in range(first, last + 1) if low <= 10.0**k <= high]
    if len(tens) > 1:
        return tens[:: ceil(len(tens) / 6)]
    finer = [k * 10.0**p for p in range(first, last + 1) for k in (1, 2, 5) if low <= k * 10.0**p <= high]
    return finer or [low, high]
