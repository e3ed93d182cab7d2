"""How well a combined module represents the exact sum and every adapter, at every rank to which it may be cut."""

from collections.abc import Iterable
from dataclasses import dataclass
from math import sqrt
from typing import Self, final

import numpy as np

from loralens.core.joint import Core, Joint
from loralens.linalg.factor import Floats


@final
@dataclass(frozen=True, slots=True)
class Quality:
    """Squares and inner products of the result R, the sum S = Σ w_t ΔW_t and the updates ΔW_t of one module.

    In ``errors``, ``inner`` and ``retained`` the last axis is the rank j = 0 … k to which R = U diag(s) Vᵀ is cut. All
    arrays are float64.

    Attributes
    ----------
    s : array, shape (k,)
        Singular values of R, largest first; its rank is k.
    strengths : array, shape (T,)
        w_t.
    energies : array, shape (T,)
        ‖ΔW_t‖².
    sum_energy : float
        ‖S‖².
    sum_inner : array, shape (T,)
        ⟨S, ΔW_t⟩.
    errors : array, shape (k + 1,)
        ‖R_j − S‖².
    inner : array, shape (T, k + 1)
        ⟨R_j, ΔW_t⟩.
    retained : array, shape (T, k + 1)
        ‖U_j U_jᵀ ΔW_t V_j V_jᵀ‖²: the energy of an update within the directions of the result.
    """

    s: Floats
    strengths: Floats
    energies: Floats
    sum_energy: float
    sum_inner: Floats
    errors: Floats
    inner: Floats
    retained: Floats

    @classmethod
    def of(cls, joint: Joint, core: Core, count: int) -> Self:
        """Measure the result ``core`` against the first ``count`` updates of a joint space.

        No difference of nearly equal squares is taken, so an exact sum has an error of a few ε and not of √ε.
        """
        U, s, Vh = core
        # If the result left the space of the adapters, it comes after them in the joint space, with weight 0.
        cores, strengths = joint.cores[:count], joint.strengths[:count]  # (T, p, q), (T,)
        S = sum_above_rounding(strengths, cores, joint.floor)
        inside = U.T @ cores @ Vh.T  # (T, k, k)
        along = np.diagonal(inside, axis1=1, axis2=2)  # uᵢᵀ M_t vᵢ
        of_sum = np.sum(U.T @ S * Vh, axis=1)
        residual = np.sum((U * s @ Vh - S) ** 2)
        lost = of_sum**2 - (s - of_sum) ** 2  # the increase of the squared error when direction i is cut
        # Added up from the last direction, as cutting to rank j loses all directions after j.
        after = np.append(lost[::-1].cumsum()[::-1], 0.0)
        # The energy of the leading j × j block of UᵀM_tV, for every j.
        blocks = np.diagonal((inside**2).cumsum(1).cumsum(2), axis1=1, axis2=2)
        zero = np.zeros((count, 1))
        return cls(
            s,
            strengths,
            np.sum(cores**2, axis=(1, 2)),
            float(np.sum(S**2)),
            np.sum(S * cores, axis=(1, 2)),
            np.maximum(residual + after, 0.0),
            np.append(zero, (s * along).cumsum(1), axis=1),
            np.append(zero, blocks, axis=1),
        )

    def error_to_sum(self, rank: int | None = None) -> float | None:
        """Return ‖R − S‖_F/‖S‖_F with R cut to ``rank``; 0 if both are 0, and None if only S is 0."""
        return relative(self.errors[self._at(rank)], self.sum_energy)

    def truncation(self, rank: int | None = None, before: float = 0.0) -> tuple[float, float]:
        """Return ‖F − R‖² and ‖F‖², where F is the result of the method and R is that result cut to ``rank``.

        ``before`` is the relative error that F had already lost when it was brought to low rank. The squares add up,
        because what is cut, what remains and what was lost before are orthogonal to each other.
        """
        # ‖R‖² is the part 1 − before² of ‖F‖², from which ‖F‖² follows.
        full = float(self.s @ self.s) / (1 - before**2) if before < 1 else 0.0
        cut = self.s[self._at(rank) :]
        return before**2 * full + float(cut @ cut), full

    def _at(self, rank: int | None) -> int:
        return self.s.size if rank is None else min(rank, self.s.size)


@final
@dataclass(frozen=True, slots=True)
class AdapterShare:
    """How much of one adapter the result contains, over all its modules; all values are None if the adapter is 0.

    Attributes
    ----------
    retained : float or None
        The share of its energy that lies within the directions of the result on both sides, in [0, 1].
    gain : float or None
        ⟨R, ΔW⟩/‖ΔW‖²: how strongly the result acts along the adapter; 1 is full strength.
    interference_before, interference_after : float or None
        The gain minus the weight of the adapter, in the exact sum and in the result: what the other adapters, and the
        method, add to the adapter or take from it.
    """

    retained: float | None
    gain: float | None
    interference_before: float | None
    interference_after: float | None


@final
@dataclass(frozen=True, slots=True)
class CombinationQuality:
    """The quality of a whole combination.

    Attributes
    ----------
    error_to_sum : float or None
        ‖R − S‖/‖S‖ over all modules.
    truncation : float
        ‖F − R‖/‖F‖ over all modules, where F is the result of the method and R the part that fits into the ranks. For
        DoRA only the pairs are counted.
    shares : tuple of AdapterShare
        One for each adapter.
    """

    error_to_sum: float | None
    truncation: float
    shares: tuple[AdapterShare, ...]


def total_quality(modules: Iterable[tuple[Quality, int | None, float]]) -> CombinationQuality:
    """Return the quality over several modules.

    Parameters
    ----------
    modules : iterable of (Quality, int or None, float)
        Of each module the quality, the rank to which it is cut (None for its own), and the relative error that its
        result lost when it was brought to low rank.
    """
    modules = list(modules)
    if not modules:
        return CombinationQuality(0.0, 0.0, ())
    # Squares and inner products are added before they are divided, so large modules count for more.
    cuts = [(quality, quality._at(rank)) for quality, rank, _ in modules]
    lost, full = np.sum([quality.truncation(rank, before) for quality, rank, before in modules], axis=0)
    error = relative(sum(quality.errors[j] for quality, j in cuts), sum(quality.sum_energy for quality, _ in cuts))
    energy = np.sum([quality.energies for quality, _ in cuts], axis=0)
    expected = np.sum([quality.strengths * quality.energies for quality, _ in cuts], axis=0)
    before = np.sum([quality.sum_inner for quality, _ in cuts], axis=0)
    after = np.sum([quality.inner[:, j] for quality, j in cuts], axis=0)
    inside = np.sum([quality.retained[:, j] for quality, j in cuts], axis=0)
    # An adapter that is 0 has no energy, so it has no shares.
    shares = [
        AdapterShare(*(float(x) for x in (i / e, a / e, (b - w) / e, (a - w) / e)))
        if e
        else AdapterShare(None, None, None, None)
        for e, w, b, a, i in zip(energy, expected, before, after, inside, strict=True)
    ]
    return CombinationQuality(error, relative(lost, full) or 0.0, tuple(shares))


def sum_above_rounding(strengths: Floats, cores: Floats, floor: float) -> Floats:
    """Return Σ w_t M_t, or 0 if its norm is at most ``floor``: then it is the rounding error of updates that cancel."""
    S = np.tensordot(strengths, cores, 1)
    return np.zeros_like(S) if np.linalg.norm(S) <= floor else S


def relative(part: float, reference: float) -> float | None:
    """Return √(part/reference) of two squared norms; 0 if both are 0, and None if only the reference is 0."""
    # A change of nothing has no relative size, and JSON has no infinity.
    if reference > 0:
        return sqrt(float(part) / float(reference))
    return None if part > 0 else 0.0
