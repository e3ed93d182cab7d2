"""The singular values of every module, and the ranks, norms and energies that follow from them."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import final

from loralens.core.adapter import Adapter
from loralens.core.lazy import Array
from loralens.core.naming.selection import select
from loralens.core.threads import Step, in_threads
from loralens.errors import place
from loralens.linalg import measures


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

    def measure(name: str) -> Spectrum:
        module = adapter[name]
        with place(name):
            return Spectrum(module.singular_values(), module.shape, module.rank)

    return in_threads(measure, select(adapter, modules), threads, step)
