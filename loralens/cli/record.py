"""Records: numbers as JSON can say them, which has neither NaN nor infinity."""

from collections.abc import Iterable
from math import isfinite


def known(value: float | None) -> float | None:
    """The number, or None where there is none."""
    return float(value) if value is not None and isfinite(value) else None


def matrix(values: Iterable[Iterable[float]]) -> list[list[float | None]]:
    """Rows of such numbers."""
    return [[known(value) for value in row] for row in values]
