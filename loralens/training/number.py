"""Conversions of numbers: accept those of Python and NumPy, and refuse what only resembles a number."""

from numbers import Integral, Real


def as_int(value: object) -> int | None:
    """A whole number of any type as an int; None for everything else, truth values included."""
    # bool is a subclass of int, but rank=True is a mistake.
    return int(value) if isinstance(value, Integral) and not isinstance(value, bool) else None


def as_float(value: object) -> float | None:
    """A real number of any type as a float; None for everything else, truth values included."""
    if not isinstance(value, Real) or isinstance(value, bool):
        return None
    try:
        return float(value)
    # An int of Python may be larger than the largest float64.
    except OverflowError:
        return None
