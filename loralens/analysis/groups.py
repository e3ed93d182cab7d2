"""Spectra gathered by kind or by block, and the modules that stand out of their kind."""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from math import log, sqrt
from typing import final

from loralens.analysis.spectrum import Spectrum
from loralens.core.names import block, kind, natural_key

FAR = 3.5  # robust z beyond which a module stands out (Iglewicz & Hoaglin 1993)
LEAST = log(1.1)  # and by how much at least, so that near-equal modules are left alone
FEWEST = 5  # modules of a kind below which a median says nothing


@final
@dataclass(frozen=True, slots=True)
class Group:
    """Modules that belong together.

    Attributes
    ----------
    name : str
    modules : int
    frobenius : float
        √Σ‖ΔW‖_F² over the group.
    share : float
        Its part of the adapter's energy, in [0, 1].
    effective_rank : float
        Mean over the group's non-zero modules; 0 where there are none.
    zero : int
        Modules whose ΔW is 0.
    """

    name: str
    modules: int
    frobenius: float
    share: float
    effective_rank: float
    zero: int


def by_kind(spectra: Mapping[str, Spectrum]) -> list[Group]:
    """One group for each kind of module: ``q_proj``, ``v_proj`` …"""
    return _group(spectra, kind)


def by_block(spectra: Mapping[str, Spectrum]) -> list[Group]:
    """One group for each block; modules outside any block come as one group, ``outside``."""

    def label(name: str) -> str:
        found = block(name)
        return f"{found.stack}.{found.number}" if found else "outside"

    return _group(spectra, label)


def total(spectra: Iterable[Spectrum]) -> float:
    """‖ΔW‖_F of several modules together: √Σ‖ΔW‖_F²."""
    return sqrt(sum(s.frobenius**2 for s in spectra))


def mean_effective_rank(spectra: Iterable[Spectrum]) -> float:
    """Effective rank, mean over the modules that are not 0; 0 where all are."""
    ranks = [s.effective_rank for s in spectra if s.spectral > 0]
    return sum(ranks) / len(ranks) if ranks else 0.0


def _group(spectra: Mapping[str, Spectrum], label: Callable[[str], str]) -> list[Group]:
    members: dict[str, list[Spectrum]] = {}
    for name, one in spectra.items():
        members.setdefault(label(name), []).append(one)
    whole = total(spectra.values())
    return [_summary(name, members[name], whole) for name in sorted(members, key=natural_key)]


def _summary(name: str, members: list[Spectrum], whole: float) -> Group:
    norm = total(members)
    share = (norm / whole) ** 2 if whole else 0.0
    zero = sum(s.spectral == 0 for s in members)
    return Group(name, len(members), norm, share, mean_effective_rank(members), zero)


@final
@dataclass(frozen=True, slots=True)
class Outlier:
    """A module far from the others of its kind.

    ``z`` is the robust z-score 0.6745·(x − median)/MAD of x = ln(quantity) within the kind.
    """

    name: str
    quantity: str
    value: float
    typical: float
    z: float


def outliers(spectra: Mapping[str, Spectrum]) -> list[Outlier]:
    """Modules whose norm or effective rank stands out of their kind (|z| > 3.5 and 10 % off), farthest first."""
    kinds: dict[str, dict[str, Spectrum]] = {}
    for name, one in spectra.items():
        if one.spectral > 0:
            kinds.setdefault(kind(name), {})[name] = one
    found = [
        outlier
        for members in kinds.values()
        if len(members) >= FEWEST
        for quantity in ("frobenius", "effective_rank")
        for outlier in _far({name: getattr(s, quantity) for name, s in members.items()}, quantity)
    ]
    return sorted(found, key=lambda o: -abs(o.z))


def _far(values: Mapping[str, float], quantity: str) -> list[Outlier]:
    logs = {name: log(value) for name, value in values.items()}
    centre = _median(logs.values())
    spread = _median(abs(x - centre) for x in logs.values())
    if spread < 1e-12:
        return []
    z = {name: 0.6745 * (x - centre) / spread for name, x in logs.items()}
    typical = _median(values.values())
    far = [name for name, x in logs.items() if abs(z[name]) > FAR and abs(x - centre) > LEAST]
    return [Outlier(name, quantity, values[name], typical, z[name]) for name in far]


def _median(values: Iterable[float]) -> float:
    """The middle value, or the mean of the two; `statistics` takes 4 ms to import."""
    ordered = sorted(values)
    middle = len(ordered) // 2
    return ordered[middle] if len(ordered) % 2 else (ordered[middle - 1] + ordered[middle]) / 2
