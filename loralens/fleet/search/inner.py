"""Exact cosines of updates, over all modules and over the common ones, and the spread that chance would give."""

from collections.abc import Mapping
from dataclasses import dataclass
from math import sqrt
from typing import NamedTuple, final

import numpy as np

from loralens.core.adapter import Adapter
from loralens.core.lowrank import LARGEST, Bases, LowRank
from loralens.core.structured import Update
from loralens.errors import place
from loralens.linalg.chance import cosine_spread
from loralens.linalg.factor import SQUARES, cross_gram, gram
from loralens.linalg.measures import frobenius
from loralens.linalg.subspace import update_cosine

ModuleKey = tuple[str, tuple[int, int]]

# Inner products from Gram matrices err by about ε‖B‖²‖A‖², which is then less than 1e-12 of ‖ΔW‖².
KEPT = 1e-3  # ‖ΔW‖² over ‖B‖²‖A‖² below which too much of a product cancels
# Such a square is the difference of numbers near 1, with an error of 1e-15 for most factors.
TELLING = 1e-8  # square of a relative difference below which it is computed from the stacked factors


@final
class ExactModule:
    """One module of an update, whose numbers are in memory.

    Inner products come from Gram matrices of the factors. Where columns of B cancel in the product, they come from
    singular directions, in which nothing cancels and which take several times as long.

    Attributes
    ----------
    norm : float
        ‖ΔW‖_F.
    """

    __slots__ = ("_bases", "_pair", "_update", "norm")

    def __init__(self, update: Update) -> None:
        self._update = update.load()
        self._pair: LowRank | None = None
        self._bases: Bases | None = None
        if isinstance(self._update, LowRank):
            pair = self._update
            of_B, of_A = gram(pair.B), gram(pair.A.T)
            lengths, energy = float(of_B.trace()) * float(of_A.trace()), float(np.vdot(of_B, of_A))
            # False for NaN too, which `bases` refuses with a message.
            if SQUARES[0] < KEPT * lengths < energy < SQUARES[1] and abs(pair.scale) * sqrt(energy) < LARGEST:
                self._pair, self.norm = pair, abs(pair.scale) * sqrt(energy)
                return
        self.norm = frobenius(self.bases().s)

    def bases(self) -> Bases:
        """The singular directions."""
        if self._bases is None:
            self._bases = self._update.bases()
        return self._bases

    def inner(self, other: "ExactModule") -> float:
        """⟨ΔW₁, ΔW₂⟩ with a module of the same shape."""
        if not (self.norm and other.norm):
            return 0.0
        if self._pair and other._pair:
            first, second = self._pair, other._pair
            products = np.vdot(cross_gram(first.B, second.B), cross_gram(first.A.T, second.A.T))
            return first.scale * second.scale * float(products)
        one, two = self.bases(), other.bases()
        cosine = update_cosine(one.s, two.s, one.left.cross(two.left), one.right.cross(two.right))
        return self.norm * other.norm * cosine

    def difference(self, other: "ExactModule") -> float | None:
        """‖ΔW₁ − ΔW₂‖/max(‖ΔW₁‖, ‖ΔW₂‖) with a module of the same shape; None where it is too small to be told."""
        largest = max(self.norm, other.norm)
        if not (self._pair and other._pair):
            return None
        square = (self.norm**2 + other.norm**2 - 2 * self.inner(other)) / largest**2
        return sqrt(square) if square > TELLING else None


@final
@dataclass(frozen=True, slots=True)
class ExactUpdate:
    """Every module of one update.

    Attributes
    ----------
    modules : mapping of (normalised name, shape) to ExactModule
        Modules are the same only if their shapes are equal too.
    """

    modules: Mapping[ModuleKey, ExactModule]

    @classmethod
    def of(cls, adapter: Adapter, modules: Mapping[str, str]) -> "ExactUpdate":
        """Read an adapter; ``modules`` maps normalised names to the names in it.

        Raises
        ------
        FormatError
            A module holds NaN or Inf.
        """
        exact: dict[ModuleKey, ExactModule] = {}
        for key, name in modules.items():
            update = adapter[name]
            with place(name):
                exact[key, update.shape] = ExactModule(update)
        return cls(exact)

    @property
    def norm(self) -> float:
        """‖ΔW‖_F of the whole update."""
        return sqrt(sum(module.norm * module.norm for module in self.modules.values()))


class ExactCosine(NamedTuple):
    """The exact cosines of two updates.

    Attributes
    ----------
    whole : float
        ⟨ΔW₁, ΔW₂⟩/(‖ΔW₁‖‖ΔW₂‖), where a module that one of them lacks counts as 0 there.
    common : float
        The same over the modules that both have; 0 if there is none.
    modules : int
        The number of common modules.
    spread : float
        Standard deviation of ``whole`` if the directions were random in every common module.
    """

    whole: float
    common: float
    modules: int
    spread: float


def exact_cosine(first: ExactUpdate, second: ExactUpdate) -> ExactCosine:
    """The cosines of two updates; 0 where one of them is 0."""
    inner = variance = 0.0
    squares = [0.0, 0.0]
    shared = [key for key in first.modules if key in second.modules]
    for key in shared:
        one, other = first.modules[key], second.modules[key]
        inner += one.inner(other)
        # Directions of different modules are independent, so their variances add up.
        variance += (one.norm * other.norm * cosine_spread(key[1])) ** 2
        squares = [total + norm * norm for total, norm in zip(squares, (one.norm, other.norm), strict=True)]
    wholes, parts = first.norm * second.norm, sqrt(squares[0] * squares[1])
    return ExactCosine(_ratio(inner, wholes), _ratio(inner, parts), len(shared), sqrt(variance) / (wholes or 1.0))


def _ratio(inner: float, norms: float) -> float:
    """A cosine, which rounding may not carry beyond ±1."""
    return float(np.clip(inner / norms, -1.0, 1.0)) if norms else 0.0
