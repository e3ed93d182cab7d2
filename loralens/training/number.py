"""Checks of numbers: accepts those of Python and NumPy, and refuses what only resembles a number."""

from numbers import Integral, Real


def as_int(value: object) -> int | None:
    """A whole number of any type as Python's own; None for all else, truth values too."""
    return int(value) if isinstance(value, Integral) and not isinstance(value, bool) else None


def as_float(value: object) -> float | None:
    """A number of any type as Python's own; None for all else, truth values and what float64 does not hold too."""
    if not isinstance(value, Real) or isinstance(value, bool):
        return None
    try:
        return float(value)
    except OverflowError:
        return None
