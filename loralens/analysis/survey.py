"""A whole collection at a glance: one summary an adapter, and which of them are the same."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal, final

from loralens.analysis.compare.equality import differences
from loralens.analysis.groups import mean_effective_rank, total
from loralens.analysis.spectrum import measure_spectrum
from loralens.core.adapter import Adapter
from loralens.core.fingerprint import fingerprint

SAME = 5e-3  # ‖ΔW₁ − ΔW₂‖/‖ΔW‖ of the worst module up to which two are one: a copy in bfloat16 is 2.3e-3 away


@final
@dataclass(frozen=True, slots=True)
class Summary:
    """One adapter in a line.

    Attributes
    ----------
    modules, zero : int
        Modules, and those of them whose ΔW is 0.
    ranks : tuple of int
        Nominal ranks that come up, rising.
    scales : tuple of float
        Scales that come up, rising.
    parameters : int
        Numbers stored in pairs.
    frobenius : float
        ‖ΔW‖_F of the whole update.
    norms : tuple of float
        ‖ΔW‖_F of the modules, rising.
    effective_rank : float
        Mean over the modules that are not 0; 0 where all are.
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


def summary(adapter: Adapter) -> Summary:
    """One adapter in a line; its numbers are read twice and not kept.

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
        frobenius=total(spectra.values()),
        norms=tuple(sorted(one.frobenius for one in spectra.values())),
        effective_rank=mean_effective_rank(spectra.values()),
        fingerprint=fingerprint(adapter),
    )


@final
@dataclass(frozen=True, slots=True)
class Duplicate:
    """An adapter that is there already.

    Attributes
    ----------
    index, original : int
        It, and the first adapter of which it is a copy.
    kind : str
        ``tensors``: the same numbers, whatever the names and the dialect. ``update``: the same ΔW to rounding, in
        another dtype, gauge or rank; heads and biases are not compared.
    difference : float
        ‖ΔW₁ − ΔW₂‖/‖ΔW‖ of the worst module; 0 for ``tensors``.
    """

    index: int
    original: int
    kind: Literal["tensors", "update"]
    difference: float = 0.0


def duplicates(adapters: Sequence[Adapter], summaries: Sequence[Summary]) -> list[Duplicate]:
    """The adapters that came up before, by index.

    Equal fingerprints first; of the rest, those whose norms allow it are compared module by module (`differences`), so
    a large collection does not cost a comparison a pair. Only what is no copy itself counts as an original: small steps
    do not add up.
    """
    first: dict[str, int] = {}
    firsts = [first.setdefault(one.fingerprint, i) for i, one in enumerate(summaries)]
    by_index: dict[int, Duplicate] = {}
    for late, early in _near(sorted(first.values()), summaries):
        if late not in by_index and early not in by_index:
            off = _difference(adapters[early], adapters[late])
            if off <= SAME:
                by_index[late] = Duplicate(late, early, "update", off)
    for i, original in enumerate(firsts):
        if i != original:
            same = by_index.get(original, Duplicate(i, original, "tensors"))
            by_index[i] = replace(same, index=i)
    return [by_index[i] for i in sorted(by_index)]


def _near(indices: Sequence[int], summaries: Sequence[Summary]) -> list[tuple[int, int]]:
    """Pairs, the later first, whose norms are near and not 0; in order of the later, then of the earlier.

    Where no module is further off than `SAME`, neither is the k-th largest norm of one from that of the other.
    """
    by_norm = sorted((summaries[i].frobenius, i) for i in indices if summaries[i].frobenius > 0)
    pairs = []
    for place, (norm, i) in enumerate(by_norm):
        for larger, j in by_norm[place + 1 :]:
            if larger > norm * (1 + 2 * SAME):
                break
            norms = summaries[i].norms, summaries[j].norms
            if len(norms[0]) == len(norms[1]) and all(
                abs(a - b) <= SAME * max(a, b) for a, b in zip(*norms, strict=True)
            ):
                pairs.append((max(i, j), min(i, j)))
    return sorted(pairs)


def _difference(first: Adapter, second: Adapter) -> float:
    """Of the worst module; adapters of other shapes are told apart before any number is read."""
    shapes = [sorted(module.shape for module in one.modules.values()) for one in (first, second)]
    if shapes[0] != shapes[1]:
        return float("inf")
    return max((one.relative for one in differences(first, second)), default=0.0)
