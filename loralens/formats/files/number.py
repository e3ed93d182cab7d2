"""Numbers as JSON may have them: where anything may stand, and whole numbers of any length."""

from math import isfinite
from typing import Any


def finite(value: Any) -> float | None:
    """The number as float64; None if it is no number, is not finite, or is a whole number beyond float64."""
    if type(value) not in (int, float):  # isinstance would accept true and false
        return None
    try:
        number = float(value)
    except OverflowError:
        return None
    return number if isfinite(number) else None
