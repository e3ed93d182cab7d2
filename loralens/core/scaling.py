"""`Scaling`: how the scale of an update was determined, and the α that a file needs to reproduce it."""

from dataclasses import dataclass, replace
from math import sqrt
from typing import Literal

ScaleFormula = Literal["alpha/r", "alpha/sqrt(r)", "given", "unknown"]

TWICE = "twice, as PEFT adds it"  # end of the origin of the scale of an nn.MultiheadAttention's out_proj
CONVENTION = "no alpha in the file"  # beginning of the origin of a scale that follows from a convention


@dataclass(frozen=True, slots=True)
class Scaling:
    """How a scale was determined.

    This is stored in addition to the scale because α cannot be computed from it: (α/r)·r differs from α in float64 for
    7.7 % of all pairs of small integers. A writer of the same dialect uses ``alpha`` again if scale and rank are
    unchanged.

    Attributes
    ----------
    formula : str
        ``alpha/r``, ``alpha/sqrt(r)`` (rsLoRA), ``given`` (the scale itself was given) or ``unknown`` (taken as 1).
    alpha, rank : float, int or None
        The numbers in the formula; None if the scale itself was given, or is unknown.
    origin : str
        The source of the numbers, in words: ``adapter_config.json``, ``alpha_pattern 'q_proj'``, ``--alpha`` …
    """

    formula: ScaleFormula = "given"
    alpha: float | None = None
    rank: int | None = None
    origin: str = ""

    @property
    def stated(self) -> bool:
        """Whether the scale is in the file, so it is neither unknown nor a convention of the dialect."""
        return self.formula != "unknown" and not self.origin.startswith(CONVENTION)

    @property
    def twice(self) -> bool:
        """Whether the scale is twice that of the file, because PEFT adds the update twice (see `doubled`)."""
        return self.origin.endswith(TWICE)

    def doubled(self) -> "Scaling":
        """The scaling of an update that PEFT adds twice, also in training."""
        # α is doubled with the scale, so that the formula still gives it.
        alpha = None if self.alpha is None else 2 * self.alpha
        return replace(self, alpha=alpha, origin=f"{self.origin}, {TWICE}" if self.origin else TWICE)

    def once(self) -> "Scaling":
        """The scaling as the file states it, if the update is `doubled`; unchanged for any other update."""
        if not self.twice:
            return self
        alpha = None if self.alpha is None else self.alpha / 2
        return replace(self, alpha=alpha, origin=self.origin.removesuffix(TWICE).removesuffix(", "))

    @property
    def value(self) -> float:
        """The scale that the formula gives; 1 if it is ``given`` or ``unknown``."""
        # A scale that is unknown, or that was given itself, has no α and r.
        if self.alpha is None or self.rank is None:
            return 1.0
        return scale_of(self.alpha, self.rank, self.formula)

    def alpha_for(self, scale: float, rank: int, formula: ScaleFormula) -> float:
        """The α that gives ``scale`` at ``rank`` by ``formula``; this is the α that was read, if it still applies."""
        # The α that was read is written again to the bit; a computed one may differ in the last place.
        if self.alpha is not None and self.formula == formula and self.rank == rank and self.value == scale:
            return self.alpha
        return alpha_of(scale, rank, formula)

    def __str__(self) -> str:
        if self.formula == "unknown":
            return f"unknown, taken as 1, {TWICE}" if self.twice else "unknown, taken as 1"
        formula = {
            "alpha/r": f"α/r = {self.alpha:g}/{self.rank}" if self.alpha is not None else "α/r",
            "alpha/sqrt(r)": f"α/√r = {self.alpha:g}/√{self.rank}" if self.alpha is not None else "α/√r",
            "given": "given",
        }[self.formula]
        return f"{formula} ({self.origin})" if self.origin else formula


def scale_of(alpha: float, rank: int, formula: ScaleFormula) -> float:
    """α/r, or α/√r for rsLoRA, as the field's software computes it in float64."""
    return alpha / sqrt(rank) if formula == "alpha/sqrt(r)" else alpha / rank


def alpha_of(scale: float, rank: int, formula: ScaleFormula) -> float:
    """The α for which ``scale_of(α, rank, formula)`` is ``scale``, bit for bit if float64 has such an α.

    It is the product scale·r, rounded once. No neighbouring number is better: the α that give a scale lie symmetrically
    around the exact product, unless the scale is a power of two, and then the product is exact.
    """
    return scale * (sqrt(rank) if formula == "alpha/sqrt(r)" else rank)
