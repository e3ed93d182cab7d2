"""Exact cosines of updates, over all modules and over the common ones, and the spread that chance would give."""

from collections.abc import Mapping
from dataclasses import dataclass
from math import hypot, prod, sqrt
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

    __slots__ = ("_bases", "_length", "_pair", "_update", "norm")

    def __init__(self, update: Update) -> None:
        self._update = update.load()
        self._pair: LowRank | None = None
        self._bases: Bases | None = None
        if isinstance(self._update, LowRank):
            pair = self._update
            of_B, of_A = gram(pair.B), gram(pair.A.T)
            lengths, energy = float(of_B.trace()) * float(of_A.trace()), float(np.vdot(of_B, of_A))
            # The comparison is false for NaN too, which `bases` refuses with a message.
            if SQUARES[0] < KEPT * lengths < energy < SQUARES[1] and abs(pair.scale) * sqrt(energy) < LARGEST:
                # The length leaves out the scale, so that an inner product divided by it cannot overflow.
                self._length = sqrt(energy)
                self._pair, self.norm = pair, abs(pair.scale) * self._length
                return
        self.norm = frobenius(self.bases().s)

    def bases(self) -> Bases:
        """The singular directions."""
        if self._bases is None:
            self._bases = self._update.bases()
        return self._bases

    def cosine(self, other: "ExactModule") -> float:
        """The cosine with a module of the same shape; neither of the two is 0."""
        if self._pair and other._pair:
            first, second = self._pair, other._pair
            products = float(np.vdot(cross_gram(first.B, second.B), cross_gram(first.A.T, second.A.T)))
            cosine = products / (self._length * other._length)
            return cosine if (first.scale < 0) == (second.scale < 0) else -cosine
        one, two = self.bases(), other.bases()
        return update_cosine(one.s, two.s, one.left.cross(two.left), one.right.cross(two.right))

    def difference(self, other: "ExactModule") -> float | None:
        """‖ΔW₁ − ΔW₂‖/max(‖ΔW₁‖, ‖ΔW₂‖) with a module of the same shape; None where it is too small to be told."""
        largest = max(self.norm, other.norm)
        if not (self._pair and other._pair and self.norm and other.norm):
            return None
        one, two = self.norm / largest, other.norm / largest
        square = one**2 + two**2 - 2 * one * two * self.cosine(other)
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
        return hypot(*(module.norm for module in self.modules.values()))


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
    """The cosines of two updates; 0 where one of them is 0."""
    inner = variance = 0.0
    norms = first.norm or 1.0, second.norm or 1.0
    pairs: list[tuple[float, float]] = []
    shared = [key for key in first.modules if key in second.modules]
    for key in shared:
        one, other = first.modules[key], second.modules[key]
        # Shares of the norms of whole updates have products that neither overflow nor underflow.
        shares = one.norm / norms[0], other.norm / norms[1]
        if all(shares):
            inner += shares[0] * shares[1] * one.cosine(other)
            # Directions of different modules are independent, so their variances add up.
            variance += (shares[0] * shares[1] * cosine_spread(key[1])) ** 2
        pairs.append(shares)
    common = prod(hypot(*side) for side in zip(*pairs, strict=True)) if pairs else 0.0
    return ExactCosine(_ratio(inner, 1.0), _ratio(inner, common), len(shared), sqrt(variance))


def _ratio(inner: float, norms: float) -> float:
    """A cosine, which rounding may not carry beyond ±1."""
    return float(np.clip(inner / norms, -1.0, 1.0)) if norms else 0.0
