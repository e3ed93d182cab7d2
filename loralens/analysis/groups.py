"""Summaries of spectra by kind of module or by block."""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from math import sqrt
from typing import final

import numpy as np

from loralens.analysis.spectrum import Spectrum
from loralens.core.names import block, kind, natural_key


@final
@dataclass(frozen=True, slots=True)
class Group:
    """A summary of modules of one kind, or of one block.

    Attributes
    ----------
    modules : int
        The number of modules.
    frobenius : float
        √Σ‖ΔW‖_F² over the group.
    share : float
        Its share of the energy of the adapter, in [0, 1].
    effective_rank : float
        Mean over the modules with ΔW ≠ 0; 0 if there are none.
    zero : int
        The number of modules with ΔW = 0.
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
    """One group for each block; modules outside any block form the group ``outside``."""

    def label(name: str) -> str:
        place = block(name)
        return f"{place.stack}.{place.number}" if place else "outside"

    return _group(spectra, label)


def total_norm(spectra: Iterable[Spectrum]) -> float:
    """‖ΔW‖_F of several modules together: √Σ‖ΔW‖_F²."""
    return sqrt(sum(s.frobenius**2 for s in spectra))


def mean_effective_rank(spectra: Iterable[Spectrum]) -> float:
    """The mean effective rank over the modules that are not 0; 0 if all are."""
    # ΔW = 0 has no distribution of singular values, so no effective rank; a 0 in its place would lower the mean.
    ranks = [s.effective_rank for s in spectra if s.spectral > 0]
    return sum(ranks) / len(ranks) if ranks else 0.0


def uniform_rank(spectra: Iterable[Spectrum], fraction: float) -> tuple[int, float]:
    """The lowest rank that, given to every module, keeps a fraction of the energy of all modules, and what it keeps.

    (0, 1.0) if every ΔW is 0.
    """
    values = [spectrum.s for spectrum in spectra]
    # In one unit for all modules, so that no square overflows.
    top = max((float(s[0]) for s in values if s.size), default=0.0)
    if not top:
        return 0, 1.0
    by_rank = np.zeros(max(s.size for s in values))
    for s in values:
        by_rank[: s.size] += (s / top) ** 2
    shares = np.cumsum(by_rank) / by_rank.sum()
    # The sum of all directions may come out below 1 by rounding.
    rank = min(int(np.searchsorted(shares, fraction * (1 - 1e-12))), shares.size - 1)
    return rank + 1, float(shares[rank])


def _group(spectra: Mapping[str, Spectrum], label: Callable[[str], str]) -> list[Group]:
    members: dict[str, list[Spectrum]] = {}
    for name, spectrum in spectra.items():
        members.setdefault(label(name), []).append(spectrum)
    adapter_norm = total_norm(spectra.values())
    groups = []
    for name in sorted(members, key=natural_key):
        norm = total_norm(members[name])
        share = (norm / adapter_norm) ** 2 if adapter_norm else 0.0
        zero = sum(s.spectral == 0 for s in members[name])
        groups.append(Group(name, len(members[name]), norm, share, mean_effective_rank(members[name]), zero))
    return groups
