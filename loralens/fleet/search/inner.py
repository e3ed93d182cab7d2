"""Exact cosines of updates, over all modules and over the common ones, and the spread that chance would give."""

from collections.abc import Mapping
from dataclasses import dataclass
from math import hypot, prod, sqrt
from typing import NamedTuple, final

import numpy as np

from loralens.core.adapter import Adapter
from loralens.core.lowrank import Bases
from loralens.errors import place
from loralens.linalg.chance import cosine_spread
from loralens.linalg.measures import frobenius
from loralens.linalg.subspace import update_cosine

ModuleKey = tuple[str, tuple[int, int]]


@final
@dataclass(frozen=True, slots=True)
class ExactUpdate:
    """The directions and norms of every module of one update.

    Attributes
    ----------
    bases : mapping of (normalised name, shape) to Bases
        Modules are the same only if their shapes are equal too.
    norms : mapping of the same keys to float
        ‖ΔW‖_F.
    """

    bases: Mapping[ModuleKey, Bases]
    norms: Mapping[ModuleKey, float]

    @classmethod
    def of(cls, adapter: Adapter, modules: Mapping[str, str]) -> "ExactUpdate":
        """Read an adapter; ``modules`` maps normalised names to the names in it.

        Raises
        ------
        FormatError
            A module holds NaN or Inf.
        """
        bases: dict[ModuleKey, Bases] = {}
        for key, name in modules.items():
            update = adapter[name]
            with place(name):
                bases[key, update.shape] = update.bases()
        return cls(bases, {key: frobenius(one.s) for key, one in bases.items()})

    @property
    def norm(self) -> float:
        """‖ΔW‖_F of the whole update."""
        return hypot(*self.norms.values())


class ExactCosine(NamedTuple):
    """The exact cosines of two updates.

    Attributes
    ----------
    cosine : float
        ⟨ΔW₁, ΔW₂⟩/(‖ΔW₁‖‖ΔW₂‖), where a module that one of them lacks counts as 0 there.
    common_cosine : float
        The same over the modules that both have; 0 if there is none.
    common_modules : int
        The number of these.
    spread : float
        Standard deviation of ``cosine`` if the directions were random in every common module.
    """

    cosine: float
    common_cosine: float
    common_modules: int
    spread: float


def exact_cosine(first: ExactUpdate, second: ExactUpdate) -> ExactCosine:
    """The cosines of two updates from orthonormal bases, in which nothing cancels; 0 where one of them is 0."""
    inner = variance = 0.0
    wholes = first.norm or 1.0, second.norm or 1.0
    parts: list[tuple[float, float]] = []
    shared = [key for key in first.bases if key in second.bases]
    for key in shared:
        one, other = first.bases[key], second.bases[key]
        # Shares of the whole norms, whose products neither overflow nor underflow.
        shares = first.norms[key] / wholes[0], second.norms[key] / wholes[1]
        if all(shares):
            cosine = update_cosine(one.s, other.s, one.left.cross(other.left), one.right.cross(other.right))
            inner += shares[0] * shares[1] * cosine
            # Directions of different modules are independent, so their variances add up.
            variance += (shares[0] * shares[1] * cosine_spread(key[1])) ** 2
        parts.append(shares)
    common = prod(hypot(*side) for side in zip(*parts, strict=True)) if parts else 0.0
    return ExactCosine(_ratio(inner, 1.0), _ratio(inner, common), len(shared), sqrt(variance))


def _ratio(inner: float, norms: float) -> float:
    """A cosine, which rounding may not carry beyond ±1."""
    return float(np.clip(inner / norms, -1.0, 1.0)) if norms else 0.0
