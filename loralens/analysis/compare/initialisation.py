"""Signs that two adapters have the same random initialisation, so that their in side shows the seed, not the task."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import isnan, nan
from typing import Literal, final

from loralens.analysis.compare.pairwise import SAME_START
from loralens.analysis.compare.similarity import Comparison
from loralens.choices import Side

SIDES: tuple[Side, Side] = ("in", "out")
Verdict = Literal["shared", "likely", "none", "unknown"]


@final
@dataclass(frozen=True, slots=True)
class SharedInitialisation:
    """Signs of a common initialisation A₀, as means over the modules that both adapters have.

    Attributes
    ----------
    cosine : float
        Cosine of vec(A) between the adapters, including modules with B = 0. It is near 1 if both began from the same A₀
        and training changed A only slightly. It is NaN if there is no A. Random numbers are drawn row by row, so with
        different ranks only the first module can show a common seed.
    alike, compared : int
        The number of modules whose two A have a cosine of at least 0.5, and the number of modules with an A.
    spans, chance : mapping of side to float
        φ(k1, k2) of all directions of ΔW, over modules that are not 0, and its chance level. On the in side this is
        the overlap of the row spaces of the two A in any gauge. NaN if all modules are 0.
    recorded : bool
        Whether the records of both adapters state one A₀. That is decisive, however far training has moved A.
    """

    cosine: float
    alike: int
    compared: int
    spans: Mapping[Side, float]
    chance: Mapping[Side, float]
    recorded: bool = False

    @property
    def one_sided(self) -> bool:
        """Whether the in sides share at least half of their directions, and the out sides less than half of that."""
        # A common task shows on both sides, and a common random A on the in side alone.
        return self.spans["in"] >= SAME_START and self.spans["out"] < self.spans["in"] / 2

    @property
    def both_sided(self) -> bool:
        """Whether the out sides share at least half of what the in sides do, and twice what chance gives."""
        return self.spans["out"] >= max(self.spans["in"] / 2, 2 * self.chance["out"])

    @property
    def verdict(self) -> Verdict:
        """The conclusion from all signs; a record is decisive.

        ``shared``: the A are similar entry by entry (mean cosine ≥ 0.5; independent ones have 0 ± 1/√(r·in)).
        ``likely``: they are not, but the updates agree on the in side alone, which happens if one of the two was
        re-factored. ``unknown``: there is no A and no such sign. ``none``: no sign.
        """
        # The records come first: training may have moved A so far that its numbers no longer show the common start.
        if self.recorded or self.cosine >= SAME_START:
            return "shared"
        if self.one_sided:
            return "likely"
        return "unknown" if isnan(self.cosine) else "none"

    @property
    def text(self) -> str:
        """One sentence for the user; empty if there is no sign of a common initialisation."""
        known_sides = [side for side in SIDES if not isnan(self.spans[side])]
        spans = ", ".join(f"φ_{side} {self.spans[side]:.3g} (chance {self.chance[side]:.2g})" for side in known_sides)
        spans = f"; {spans}" if spans else ""
        if self.recorded and not self.cosine >= SAME_START:
            return f"shared initialisation: both were trained from the same A₀, as their records say{spans}"
        if self.verdict == "shared":
            return (
                f"shared initialisation: the A of {self.alike} of {self.compared} modules are alike entry by entry "
                f"(mean cosine {self.cosine:.2f}){spans}"
            )
        if self.verdict == "likely":
            return f"a shared initialisation is likely: the two agree on the in side alone{spans}"
        return ""

    @property
    def advice(self) -> str:
        """A sentence that says what to do; empty if `text` is."""
        if not self.text:
            return ""
        if isnan(self.spans["in"]):
            return "one of them is 0 in every module, so there are no directions to compare"
        seed = "directions of the in side show the seed, not the task: look at --side out"
        # If both sides agree, the two may be checkpoints of one run, and the out side shows the common run as well.
        return f"{seed}, where these two agree as well" if self.both_sided else seed


def find_shared_initialisation(comparison: Comparison, *, recorded: bool = False) -> SharedInitialisation:
    """Collect the signs of a common initialisation of the two adapters; see `SharedInitialisation`.

    ``recorded`` is the result of `loralens.core.training.same_start` on their records.

    The cosine of vec(A) needs the factors as training left them. It is the only number here that depends on how ΔW is
    factored, because a common seed shows in the factors and not in ΔW. Checkpoints of one run share their A₀ too, and
    they agree on both sides.
    """
    # An update of 0 has no directions. Its A counts nevertheless: no training has moved it.
    alive = [one for one in comparison.modules.values() if not one.zero]
    cosines = [one.initial for one in comparison.modules.values() if not isnan(one.initial)]
    ends: dict[Side, int] = {"in": 1, "out": 0}  # of the shape (out, in): the length of a direction on that side
    return SharedInitialisation(
        _mean(cosines),
        sum(cosine >= SAME_START for cosine in cosines),
        len(cosines),
        {side: _mean([one.spans[side] for one in alive]) for side in SIDES},
        {side: _mean([max(one.directions) / one.shape[end] for one in alive]) for side, end in ends.items()},
        recorded,
    )


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values) if values else nan
