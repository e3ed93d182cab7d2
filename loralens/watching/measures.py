"""What one look measures in a module: spectrum, directions compared with earlier ones, drift of A, and gradients."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from math import isfinite, nan, sqrt
from typing import Any, final

import numpy as np

from loralens.analysis.spectrum import Spectrum
from loralens.choices import Side
from loralens.core.lazy import Array
from loralens.core.lowrank import LowRank
from loralens.core.structured import Update
from loralens.linalg.measures import frobenius
from loralens.linalg.product import column_basis
from loralens.linalg.quick import QuickSVD, quick_svd
from loralens.linalg.subspace import phi_map, update_cosine
from loralens.tables.numbers import json_number

DIGITS = 6  # significant digits in the log; the numbers are measured about as accurately


@final
@dataclass(frozen=True, slots=True)
class Turn:
    """The directions of a module compared with those of an earlier look.

    Attributes
    ----------
    norm : float
        ‖ΔW‖_F of the earlier look.
    length : float
        ‖ΔW − ΔW of the earlier look‖_F, to 1e-3 of the larger norm.
    cosine : float
        The cosine of the two ΔW, in [−1, 1].
    phi, chance : mapping of side to float
        φ of all directions, and its mean for random ones.
    """

    norm: float
    length: float
    cosine: float
    phi: Mapping[Side, float]
    chance: Mapping[Side, float]

    def record(self) -> dict[str, Any]:
        """The turn as a JSON object."""
        numbers = _numbers({name: getattr(self, name) for name in ("norm", "length", "cosine")})
        return {**numbers, "phi": _numbers(self.phi), "chance": _numbers(self.chance)}


@final
@dataclass(frozen=True, slots=True)
class GradientLook:
    """The gradient of one factor.

    Attributes
    ----------
    norm : float
        The Frobenius norm of the gradient as it is in memory: after clipping, and averaged as the trainer averages it.
    effective_rank : float
        exp(−Σ p ln p), p = σ/Σσ.
    overlap, chance : float
        The share of its energy in the directions of ΔW, on the out side for B and on the in side for A, and the share
        that random directions would have. NaN if the gradient or ΔW is 0.
    """

    norm: float
    effective_rank: float
    overlap: float
    chance: float

    def record(self) -> dict[str, Any]:
        """The gradient as a JSON object."""
        names = ("norm", "effective_rank", "overlap", "chance")
        return _numbers({name: getattr(self, name) for name in names})


@final
@dataclass(frozen=True, slots=True)
class BaseLook:
    """ΔW compared with its weight W in the base.

    Attributes
    ----------
    amplification, excess, z : float
        As in `loralens amplify`: ‖ΔW‖/‖UᵀWV‖, ‖UᵀWV‖ relative to random directions, and its z-score.
    share, chance : mapping of side to float
        The share of the energy of ΔW in as many leading directions of W as ΔW has, and that of random directions.
    """

    amplification: float
    excess: float
    z: float
    share: Mapping[Side, float]
    chance: Mapping[Side, float]

    def record(self) -> dict[str, Any]:
        """The measures as a JSON object."""
        numbers = _numbers({name: getattr(self, name) for name in ("amplification", "excess", "z")})
        return {**numbers, "share": _numbers(self.share), "chance": _numbers(self.chance)}


@final
@dataclass(frozen=True, slots=True)
class ModuleLook:
    """What one look measures in a module.

    Attributes
    ----------
    spectrum : Spectrum
        Singular values above 1e-6 of the first; none if ΔW = 0.
    previous, first : Turn or None
        Compared with the last look, and with the first one in which ΔW was not 0; None before that.
    drift : float
        ‖A − A₀‖_F/‖A₀‖_F, where A₀ is A at the first look. For an embedding it is the drift of B, the factor that
        starts at random there. NaN if the module is not a pair.
    gradients : mapping of str to GradientLook
        The gradients of ``B`` and ``A``; empty if they are not watched.
    base : BaseLook or None
    """

    spectrum: Spectrum
    previous: Turn | None
    first: Turn | None
    drift: float
    gradients: Mapping[str, GradientLook]
    base: BaseLook | None = None

    def record(self) -> dict[str, Any]:
        """The measures as a JSON object."""
        spectrum = self.spectrum
        return {
            "s": [short_number(value) for value in spectrum.s.tolist()],
            **_numbers({name: getattr(spectrum, name) for name in ("frobenius", "stable_rank", "effective_rank")}),
            "previous": self.previous and self.previous.record(),
            "first": self.first and self.first.record(),
            "drift": short_number(self.drift),
            **({"gradients": {name: g.record() for name, g in self.gradients.items()}} if self.gradients else {}),
            **({"base": self.base.record()} if self.base else {}),
        }


@final
@dataclass(slots=True)
class Memory:
    """What a watcher remembers about a module: the first A, and the directions of the first and of the last look."""

    start: Array | None = None
    first: QuickSVD | None = None
    previous: QuickSVD | None = None


def remember_start(module: Update, memory: Memory) -> None:
    """Remember the first A, from which drift is measured."""
    if isinstance(module, LowRank):
        memory.start = _random_factor(module, module.B, module.A).copy()


def measure_module(module: Update, memory: Memory, gradient: LowRank | None) -> ModuleLook:
    """Measure a module, and remember its directions. Each factor is read once.

    Raises
    ------
    FormatError
        A factor holds NaN or Inf.
    """
    drift = nan
    if isinstance(module, LowRank):
        B, A = module.B, module.A
        directions = quick_svd(B, A, module.scale)
        drawn = _random_factor(module, B, A)
        if memory.start is None:
            memory.start = drawn.copy()
        length = float(np.linalg.norm(memory.start))
        drift = float(np.linalg.norm(drawn - memory.start)) / length if length else nan
    else:
        bases = module.bases()
        U, V = (basis.columns().astype(np.float32) for basis in (bases.left, bases.right))
        directions = QuickSVD(U, bases.s, V)
    look = ModuleLook(
        spectrum=Spectrum(directions.s, module.shape, module.rank),
        previous=_turn(directions, memory.previous),
        first=_turn(directions, memory.first),
        drift=drift,
        gradients=_gradients(gradient, directions) if gradient is not None else {},
    )
    memory.previous = directions
    # Before the first step ΔW is 0, and has no directions.
    if memory.first is None and directions.k:
        memory.first = directions
    return look


def _random_factor(module: LowRank, B: Array, A: Array) -> Array:
    """The factor that starts at random numbers: A, and B of an embedding."""
    return np.asarray(B if module.layout.kind == "embedding" else A, dtype=np.float32)


def _turn(now: QuickSVD, before: QuickSVD | None) -> Turn | None:
    """The directions compared with earlier ones; None if one of the two looks has no directions."""
    if before is None or not (now.k and before.k):
        return None
    # Products in float32 are accurate enough, since φ needs three digits.
    left, right = (np.dot(x.T, y).astype(np.float64) for x, y in ((before.U, now.U), (before.V, now.V)))
    phi: dict[Side, float] = {"in": float(phi_map(right)[-1, -1]), "out": float(phi_map(left)[-1, -1])}
    chance: dict[Side, float] = {
        "in": min(max(now.k, before.k) / len(now.V), 1.0),
        "out": min(max(now.k, before.k) / len(now.U), 1.0),
    }
    cosine = update_cosine(before.s, now.s, left, right)
    norm, own = frobenius(before.s), frobenius(now.s)
    # Rounding may make the square of a length of 0 negative.
    length = sqrt(max(norm**2 + own**2 - 2 * cosine * norm * own, 0.0))
    return Turn(norm, length, cosine, phi, chance)


def _gradients(gradient: LowRank, directions: QuickSVD) -> dict[str, GradientLook]:
    """The measures of the gradients of B and A, which are the factors of ``gradient``."""
    sides = {"B": (gradient.B, directions.U), "A": (gradient.A.T, directions.V)}
    return {name: _gradient(factor, columns) for name, (factor, columns) in sides.items()}


def _gradient(factor: Array, columns: Array) -> GradientLook:
    basis, s = column_basis(factor)
    spectrum = Spectrum(s, (factor.shape[0], factor.shape[1]), factor.shape[1])
    overlap = chance = nan
    if s.size and columns.shape[1]:
        inside = np.square(basis.columns().T @ columns).sum(axis=1)
        energy = np.square(s / s[0])
        overlap = float(np.clip(energy @ inside / energy.sum(), 0.0, 1.0))
        chance = columns.shape[1] / len(columns)
    return GradientLook(spectrum.frobenius, spectrum.effective_rank, overlap, chance)


def _numbers(values: Mapping[Any, float]) -> dict[str, float | None]:
    """Numbers with the digits of the log, by their keys in it."""
    return {key: short_number(value) for key, value in values.items()}


def defined_mean(values: Iterable[float]) -> float:
    """The mean of the numbers that are finite; NaN if none is."""
    defined = [value for value in values if isfinite(value)]
    return sum(defined) / len(defined) if defined else nan


def short_number(value: float) -> float | None:
    """A number with the digits of the log; None if it is not defined."""
    number = json_number(value)
    return None if number is None else float(f"{number:.{DIGITS}g}")
