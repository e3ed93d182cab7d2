"""`SplitUpdate`: the update of a module as the two sides of its singular value decomposition."""

from dataclasses import dataclass
from typing import Self, final

import numpy as np

from loralens.core.lazy import Array
from loralens.core.lowrank import LowRank
from loralens.linalg.factor import Floats


@final
@dataclass(frozen=True, slots=True)
class SplitUpdate:
    """ΔW = left · rightᵀ; the columns of ``right`` are orthonormal, and those of ``left`` are orthogonal.

    Attributes
    ----------
    left : float64 array, shape (out, r)
        Left singular vectors times singular values.
    right : float64 array, shape (in, r)
    """

    left: Floats
    right: Floats

    @classmethod
    def of(cls, module: LowRank) -> Self:
        """Split an update; its scale goes into ``left``."""
        U, s, Vh = module.svd()
        # Directions without energy would only make the stacks of a group wider.
        k = max(1, int(np.count_nonzero(s > s.max(initial=0.0) * 1e-12)))
        return cls(U[:, :k] * s[:k], np.ascontiguousarray(Vh[:k].T))

    @property
    def shape(self) -> tuple[int, int]:
        """(out, in)."""
        return len(self.left), len(self.right)

    @property
    def singular_values(self) -> Floats:
        """The lengths of the columns of ``left``, largest first."""
        return np.asarray(np.linalg.norm(self.left, axis=0), np.float64)

    @property
    def energy(self) -> float:
        """‖ΔW‖²."""
        return float(np.sum(self.left**2))

    def divided(self, norm: float) -> "SplitUpdate":
        """ΔW / norm."""
        return SplitUpdate(self.left / norm, self.right)

    def squared_distance(self, B: Array, A: Array) -> float:
        """‖ΔW − B·A‖² for other factors, at least 0; accurate to ε·‖ΔW‖²."""
        B, A = B.astype(np.float64), A.astype(np.float64)
        crossed = float(np.sum((self.left.T @ B) * (A @ self.right).T))
        return max(0.0, self.energy - 2 * crossed + float(np.sum((B.T @ B) * (A @ A.T))))
