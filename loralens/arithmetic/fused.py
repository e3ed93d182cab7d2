"""The result of an elementwise rule, and the error of bringing it back to a low rank."""

from typing import NamedTuple

from loralens.core.lowrank import LowRank


class Fused(NamedTuple):
    """The result of an elementwise rule.

    Attributes
    ----------
    update : LowRank
        Balanced float64 factors, scale 1.
    truncation : float
        ‖F − ΔW‖_F / ‖F‖_F, where F is the result of the rule and ΔW the part of it that fits into the rank. Only the
        full space loses anything.
    """

    update: LowRank
    truncation: float
