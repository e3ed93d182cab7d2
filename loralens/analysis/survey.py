"""A survey of a collection: one summary for each adapter, and duplicates among the adapters."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal, final

from loralens.analysis.compare.equality import differences
from loralens.analysis.groups import mean_effective_rank, total_norm
from loralens.analysis.spectrum import measure_spectrum
from loralens.core.adapter import Adapter
from loralens.core.fingerprint import fingerprint

# Largest ‖ΔW₁ − ΔW₂‖/‖ΔW‖ of any module of a duplicate. A copy in bfloat16 differs by 2.3e-3, so
# two such copies of one adapter, at most 4.6e-3 apart, are found too.
SAME = 5e-3


@final
@dataclass(frozen=True, slots=True)
class Summary:
    """The summary of one adapter.

    Attributes
    ----------
    modules, zero : int
        The number of modules, and of modules with ΔW = 0.
    ranks : tuple of int
        The nominal ranks that occur, increasing.
    scales : tuple of float
        The scales that occur, increasing.
    parameters : int
        The number of parameters in pairs.
    frobenius : float
        ‖ΔW‖_F of the whole update.
    norms : tuple of float
        ‖ΔW‖_F of the modules, increasing.
    effective_rank : float
        Mean over the modules that are not 0; 0 if all are.
    fingerprint : str
        See `loralens.core.fingerprint`.
    """

    modules: int
    zero: int
    ranks: tuple[int, ...]
    scales: tuple[float, ...]
    parameters: int
    frobenius: float
    norms: tuple[float, ...]
    effective_rank: float
    fingerprint: str


def summarise_adapter(adapter: Adapter) -> Summary:
    """Summarise one adapter; its numbers are read twice and not kept.

    Raises
    ------
    FormatError
        A module holds NaN or Inf.
    """
    spectra = measure_spectrum(adapter)
    return Summary(
        modules=len(adapter),
        zero=sum(one.spectral == 0 for one in spectra.values()),
        ranks=tuple(sorted({one.rank for one in spectra.values()})),
        scales=tuple(sorted({module.scale for module in adapter.modules.values()})),
        parameters=adapter.parameters,
        frobenius=total_norm(spectra.values()),
        norms=tuple(sorted(one.frobenius for one in spectra.values())),
        effective_rank=mean_effective_rank(spectra.values()),
        fingerprint=fingerprint(adapter),
    )


@final
@dataclass(frozen=True, slots=True)
class Duplicate:
    """An adapter that is a copy of an earlier one.

    Attributes
    ----------
    index, original : int
        The index of the copy, and of the first adapter that it is a copy of.
    kind : str
        ``tensors``: the same numbers, under any names and in any dialect. ``update``: the same ΔW up to rounding, in
        another dtype, gauge or rank; heads and biases are not compared.
    difference : float
        ‖ΔW₁ − ΔW₂‖/‖ΔW‖ of the worst module; 0 for ``tensors``.
    """

    index: int
    original: int
    kind: Literal["tensors", "update"]
    difference: float = 0.0


def duplicates(adapters: Sequence[Adapter], summaries: Sequence[Summary]) -> list[Duplicate]:
    """Find the adapters that are copies of earlier ones, by index.

    Equal fingerprints are found first. Of the other adapters only pairs with nearly equal norms are compared module by
    module (`differences`), so a large collection does not need a comparison for every pair. A copy never counts as an
    original, so that many small differences cannot add up.
    """
    first: dict[str, int] = {}
    firsts = [first.setdefault(one.fingerprint, i) for i, one in enumerate(summaries)]
    by_index: dict[int, Duplicate] = {}
    # In this order, so that an adapter is known to be a copy before anything is compared with it.
    for late, early in _pairs_of_equal_norms(sorted(first.values()), summaries):
        if late not in by_index and early not in by_index:
            off = _difference(adapters[early], adapters[late])
            if off <= SAME:
                by_index[late] = Duplicate(late, early, "update", off)
    for i, original in enumerate(firsts):
        if i != original:
            # If the adapter with the same tensors is itself a copy of an earlier one, this one is a copy of that too.
            same = by_index.get(original, Duplicate(i, original, "tensors"))
            by_index[i] = replace(same, index=i)
    return [by_index[i] for i in sorted(by_index)]


def _pairs_of_equal_norms(indices: Sequence[int], summaries: Sequence[Summary]) -> list[tuple[int, int]]:
    """Pairs (later, earlier) of adapters whose norms are nearly equal and not 0, sorted.

    If no module differs by more than `SAME`, then the sorted norms of both do not differ by more either.
    """
    by_norm = sorted((summaries[i].frobenius, i) for i in indices if summaries[i].frobenius > 0)
    pairs = []
    for place, (norm, i) in enumerate(by_norm):
        for larger, j in by_norm[place + 1 :]:
            # The norms of duplicates differ by SAME of the larger one; the factor 2 leaves room for rounding.
            if larger > norm * (1 + 2 * SAME):
                break  # the list is sorted, so all later norms are larger still
            first, second = summaries[i].norms, summaries[j].norms
            close = (abs(a - b) <= SAME * max(a, b) for a, b in zip(first, second, strict=False))
            if len(first) == len(second) and all(close):
                pairs.append((max(i, j), min(i, j)))
    return sorted(pairs)


def _difference(first: Adapter, second: Adapter) -> float:
    """The difference of the worst module; infinite if the shapes differ, which needs no numbers."""
    shapes = [sorted(module.shape for module in one.modules.values()) for one in (first, second)]
    if shapes[0] != shapes[1]:
        return float("inf")
    return max((one.relative for one in differences(first, second)), default=0.0)
