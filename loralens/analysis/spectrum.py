"""The singular values of every module, and the ranks, norms and energies that follow from them."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import final

import numpy as np

from loralens.core.adapter import Adapter
from loralens.core.lazy import Array
from loralens.core.lowrank import LowRank, check_float64
from loralens.core.naming.selection import select
from loralens.core.threads import Step, in_threads
from loralens.errors import place
from loralens.linalg import measures
from loralens.linalg.factor import gram
from loralens.linalg.product import Grams, gram_singular_values

# The small matrices of several modules go through each call of NumPy together, since the calls take longer than the
# arithmetic of one module. More of them save nothing, and leave less to divide among threads.
TOGETHER = 16
NUMBERS = 1 << 16  # of a chunk's matrices of one side: 512 KiB, which stay in the cache through all calls


@final
@dataclass(frozen=True)  # without slots, so that what tables, figures and checks ask for is computed once
class Spectrum:
    """The singular values of one update ΔW, with the norms and ranks that follow from them.

    Attributes
    ----------
    s : float64 array, shape (min(out, r, in),)
        Singular values of ΔW = scale·B·A, largest first, in the units of the weight.
    shape : tuple of int
        (out, in) of ΔW.
    rank : int
        Nominal rank r.
    """

    s: Array
    shape: tuple[int, int]
    rank: int

    @cached_property
    def frobenius(self) -> float:
        """‖ΔW‖_F = √Σσ²."""
        return measures.frobenius(self.s)

    @cached_property
    def spectral(self) -> float:
        """‖ΔW‖₂ = σ₁."""
        return measures.spectral(self.s)

    @cached_property
    def nuclear(self) -> float:
        """‖ΔW‖_* = Σσ."""
        return measures.nuclear(self.s)

    @cached_property
    def numerical_rank(self) -> int:
        """Singular values above σ₁ · max(out, in) · ε of float64."""
        return measures.numerical_rank(self.s, self.shape)

    @cached_property
    def stable_rank(self) -> float:
        """Σσ² / σ₁²."""
        return measures.stable_rank(self.s)

    @cached_property
    def effective_rank(self) -> float:
        """exp(−Σ p ln p) with p = σ/Σσ (Roy & Vetterli 2007)."""
        return measures.effective_rank(self.s)

    @cached_property
    def effective_rank_energy(self) -> float:
        """exp(−Σ p ln p) with p = σ²/Σσ², so that strong directions count more."""
        return measures.effective_rank_energy(self.s)

    @cached_property
    def participation_ratio(self) -> float:
        """(Σσ²)² / Σσ⁴."""
        return measures.participation_ratio(self.s)

    def energy_rank(self, fraction: float) -> int:
        """The number of leading directions that hold ``fraction`` of the energy Σσ²."""
        return measures.energy_rank(self.s, fraction, tails=self._energy_tails)

    @cached_property
    def _energy_tails(self) -> Array:
        return measures.energy_tails(self.s)


def measure_spectrum(
    adapter: Adapter, *, modules: Sequence[str] = (), threads: int = 1, step: Step | None = None
) -> dict[str, Spectrum]:
    """Compute the spectrum of every module, in natural module order.

    Parameters
    ----------
    adapter : Adapter
        Its modules are read one after the other and not kept.
    modules : sequence of str
        Globs over module names or kinds; all modules where empty.
    threads : int
        Modules worked on at a time. More than one pays only where BLAS itself uses one thread.
    step : callable, optional
        Called with 1 after every module.

    Raises
    ------
    OptionError
        A glob that matches nothing.
    FormatError
        A module holds NaN or Inf.

    Notes
    -----
    ΔW is never formed: the work is O((out + in)·r²) a module. On factors that are well-conditioned after scaling their
    columns, every singular value has a relative error of at most 1e-10; on any factors, the absolute error is at most
    1e-14·‖B‖₂‖A‖₂.
    """

    def measure(chunk: tuple[str, ...]) -> dict[str, Spectrum]:
        return _measure_chunk(adapter, chunk, step)

    names = select(adapter, modules)
    spectra: dict[str, Spectrum] = {}
    for measured in in_threads(measure, _chunks(adapter, names), threads, few=2).values():
        spectra |= measured
    return {name: spectra[name] for name in names}


def _chunks(adapter: Adapter, names: Sequence[str]) -> list[tuple[str, ...]]:
    """The modules that are measured together: of equal rank, and few enough for their matrices of size r × r."""
    by_rank: dict[int, list[str]] = {}
    for name in names:
        by_rank.setdefault(adapter[name].rank, []).append(name)
    chunks = []
    for rank, chosen in by_rank.items():
        size = max(1, min(TOGETHER, NUMBERS // max(1, rank) ** 2))
        chunks += [tuple(chosen[i : i + size]) for i in range(0, len(chosen), size)]
    return chunks


def _measure_chunk(adapter: Adapter, names: Sequence[str], step: Step | None) -> dict[str, Spectrum]:
    """The spectra of modules of equal rank, with the bits of every module alone."""
    spectra: dict[str, Spectrum] = {}
    pairs: dict[str, LowRank] = {}
    grams: dict[str, Grams] = {}
    for name in names:
        module = adapter[name]
        with place(name):
            if len(names) > 1 and isinstance(module, LowRank) and 0 < module.rank <= min(module.shape):
                pairs[name], grams[name] = module, (gram(module.B), gram(module.A.T))
            else:
                spectra[name] = Spectrum(module.singular_values(), module.shape, module.rank)
        if step:
            step(1)
    if grams:
        values, settled = gram_singular_values(*(np.stack(matrices) for matrices in zip(*grams.values(), strict=True)))
        for i, name in enumerate(grams):
            module = pairs[name]
            with place(name):
                if settled[i]:
                    s = check_float64(abs(module.scale), values[i])
                else:
                    s = module.singular_values(grams=grams[name])
            spectra[name] = Spectrum(s, module.shape, module.rank)
    return spectra
