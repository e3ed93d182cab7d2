"""Fused: what an elementwise rule made of a module, and what of it was lost on the way back to low rank."""

from typing import NamedTuple

from loralens.core.lowrank import LowRank


class Fused(NamedTuple):
    """The result of an elementwise rule.

    Attributes
    ----------
    update : LowRank
        Balanced float64 factors, scale 1.
    truncation : float
        ‖F − ΔW‖_F / ‖F‖_F for F, what the rule makes, and ΔW, what of it fits into the rank; 0 but in the full space.
    """

    update: LowRank
    truncation: float
