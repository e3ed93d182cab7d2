"""Numbers as a page writes them."""

from collections.abc import Sequence
from math import isfinite

from loralens.tables import numbers
from loralens.tables.numbers import UNDEFINED

LEAST = 1e-6  # a share below which a page says only that it is below
UNIT = "\u00a0"  # between a number and its unit: a space at which no line ends


def number(value: float | None, digits: int = 4) -> str:
    """So many significant digits; a dash for what is no number."""
    if value is None or value != value:
        return UNDEFINED
    return f"{value:.{digits}g}" if isfinite(value) else "∞" if value > 0 else "−∞"


def fixed(value: float | None, places: int = 2, *, sign: bool = False) -> str:
    """So many places, what is 0 to rounding without a sign."""
    if value is None or not isfinite(value):
        return number(value)
    return f"{round(value, places) + 0.0:{'+' if sign else ''}.{places}f}"


def percent(share: float | None, digits: int = 3) -> str:
    """A share in percent, to so many significant digits, but never 100 % or 0 % where it is not."""
    if share is None or not isfinite(share):
        return number(share)
    value = float(f"{100 * share:.{digits}g}")
    if share < 1 and value >= 100:
        return f"> 99.{'9' * max(digits - 2, 1)}{UNIT}%"
    if 0 < share < LEAST:
        return f"< {100 * LEAST:.4f}{UNIT}%"
    return f"{value:.6f}".rstrip("0").rstrip(".") + UNIT + "%"


def size(count: int) -> str:
    """Bytes, as everywhere: 999 B, 110.2 kB, 1.5 GB; no line of a page ends before the unit."""
    return numbers.size(count).replace(" ", UNIT)


def span(values: Sequence[int]) -> str:
    """``8``, or ``4–16`` of several; a dash of none."""
    low, high = min(values, default=None), max(values, default=None)
    return UNDEFINED if low is None else str(low) if low == high else f"{low}–{high}"


def listed(names: Sequence[str]) -> str:
    """``a``, ``a and b``, ``a, b and c``."""
    return " and ".join([", ".join(names[:-1]), names[-1]]) if len(names) > 1 else "".join(names)
