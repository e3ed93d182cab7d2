"""Modules separated from others of their kind by a gap in the sorted values, with a bound on the rate of false alarms.

Each module is compared with the four modules of its kind and shape that are nearest in depth. In trained adapters,
whose norms rise from block to block, these differences spread three to five times less than the norms themselves.

The null hypothesis. The modules of one kind and shape are exchangeable: their values are independent draws from one
distribution. Only one thing is assumed about it: its density is log-concave on the scale used (ln of a norm, logit of
an effective rank). This holds for normal, logistic, Laplace and Gumbel distributions, and for the exponential
distribution. The latter has the heaviest tail of them; the logarithm of a quantity with a power law is exponential. The
difference from a median of four others is log-concave too.

The test. Of an exponential distribution the normalised spacings D_k = k·(x_(k) − x_(k+1)), counted from the largest,
are independent and exponential with one scale (Sukhatme 1937). D_k therefore exceeds R times the mean of D_j, k < j ≤
m, with the probability (1 + R/(m−k))^−(m−k). A log-concave x is a concave increasing function of an exponential
variable (Barlow & Proschan 1966). Its upper spacings are shorter relative to its lower ones, so the same value is an
upper bound. Only the m spacings above the median are used, so that outliers at one end do not hide those at the other.

Two steps are approximate. Neighbours share members. If the adapter has other kinds, the larger of the kind's own scale
and the median scale of the other kinds is used, and is treated as better known (`AGREED`).
`tests/analysis/test_outliers.py` holds the rate of false flags to `PER_MODULE` by simulation.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import log, nan
from typing import NamedTuple, final

import numpy as np

from loralens.analysis.spectrum import Spectrum
from loralens.core.names import kind_in_block, natural_key
from loralens.linalg.factor import Floats

PER_MODULE = 0.01  # bound on the share of modules that are flagged by chance; half of it is spent
SURE = 0.03  # largest chance of a gap that is reported; this limit takes effect from 24 modules of a kind on
NEIGHBOURS = 4  # the median of four tolerates one outlier among them
FEWEST = 6  # modules of a kind at least: with five, only one spacing is left to compare the widest with
# Where all other modules are alike, a small difference may not be chance and still means nothing to the user.
LEAST = log(2.0)  # smallest distance that is reported: twice the norm, or twice the odds of the effective rank
SPREAD = 0.01  # added to the mean spacing, so that modules that are equal to rounding are compared with 1 %
NEAR = 1e-9  # smallest distance of the share of the rank from 0 and 1; below it lies rounding
AGREED = 3  # weight of the spacings if there are other kinds, whose scales make the scale better known
QUANTITIES = {"frobenius": "‖ΔW‖", "effective_rank": "effective rank"}


@final
@dataclass(frozen=True, slots=True)
class Outlier:
    """A module that stands out from the modules of its kind and shape.

    Attributes
    ----------
    name : str
    quantity : str
        ``frobenius`` or ``effective_rank``.
    value, typical : float
        Its value, and the median of the four nearest modules of its kind and shape.
    chance : float
        Upper bound on the probability of such a gap if the modules of the kind are exchangeable.
    """

    name: str
    quantity: str
    value: float
    typical: float
    chance: float


class _Member(NamedTuple):
    """A module with its value, the median of its neighbours, and the distance of both on the unbounded scale."""

    name: str
    value: float
    typical: float
    distance: float


def find_outliers(spectra: Mapping[str, Spectrum]) -> list[Outlier]:
    """Find modules whose norm or effective rank stands out from their kind and shape; the least likely come first.

    Kinds are those of `kind_in_block`, which are the same in every dialect. Modules with ΔW = 0 are left out, and so
    are kinds of fewer than `FEWEST` modules, in which no gap is wide enough to exclude chance.
    """
    # Shapes separate modules too: in diffusers' files to_q is self-attention and cross-attention of several widths.
    cells: dict[tuple[str, tuple[int, int]], dict[str, Spectrum]] = {}
    for name in sorted(spectra, key=natural_key):
        if spectra[name].spectral > 0:
            cells.setdefault((kind_in_block(name), spectra[name].shape), {})[name] = spectra[name]
    results = [outlier for quantity in QUANTITIES for outlier in _outliers_in(cells, quantity)]
    return sorted(results, key=lambda o: (o.chance, natural_key(o.name)))


def _outliers_in(cells: Mapping[tuple[str, tuple[int, int]], Mapping[str, Spectrum]], quantity: str) -> list[Outlier]:
    kinds: dict[str, list[_Member]] = {}
    for (kind, _), spectra in cells.items():
        kinds.setdefault(kind, []).extend(_members(spectra, quantity))
    # Differences from neighbours are comparable between all shapes of a kind. They are pooled, because more are better.
    kinds = {kind: members for kind, members in kinds.items() if len(members) >= FEWEST}
    distances = {kind: np.array([member.distance for member in members]) for kind, members in kinds.items()}
    # ln 2 is the median of an exponential of scale 1: robust, so an odd module in one kind spoils no other.
    scales = {kind: float(_medians(np.abs(x - _medians(x)))) / log(2) for kind, x in distances.items()}
    results = []
    for kind, members in kinds.items():
        other_scales = [scale for other, scale in scales.items() if other != kind]
        x, agreed = distances[kind], float(_medians(np.array(other_scales))) if other_scales else None
        # The false alarms allowed for one end of one quantity: a quarter of all, as two quantities have two ends each.
        level = min(SURE, PER_MODULE / 2 * x.size / 4)
        for end in (1, -1):  # unusually large values, then unusually small ones
            for i, chance in upper_outliers(end * x, level, agreed):
                member = members[i]
                results.append(Outlier(member.name, quantity, member.value, member.typical, chance))
    return results


def _members(spectra: Mapping[str, Spectrum], quantity: str) -> list[_Member]:
    """The modules of one kind and shape, in the order of their blocks; none if there are too few neighbours."""
    # The effective rank of an update with one direction is always 1.
    names = [name for name, s in spectra.items() if quantity == "frobenius" or _directions(s) > 1]
    if len(names) <= NEIGHBOURS:
        return []
    values = np.array([getattr(spectra[name], quantity) for name in names])
    x = np.array([_unbounded_value(spectra[name], quantity) for name in names])
    # Two neighbours on either side; at the ends of a stack more of them are on one side.
    own = np.arange(len(names))
    starts = np.clip(own - NEIGHBOURS // 2, 0, len(names) - NEIGHBOURS - 1)
    near = starts[:, None] + np.arange(NEIGHBOURS)
    near += near >= own[:, None]  # without the module itself
    typical, distances = _medians(values[near]), x - _medians(x[near])
    return [_Member(name, float(values[i]), float(typical[i]), float(distances[i])) for i, name in enumerate(names)]


def _medians(values: Floats) -> Floats:
    """The medians along the last axis. `numpy.median` gives the same, and loads numpy.ma, which takes 2 MB."""
    ordered = np.sort(values, axis=-1)
    middle, odd = divmod(ordered.shape[-1], 2)
    upper = ordered[..., middle]
    medians = upper if odd else (ordered[..., middle - 1] + upper) / 2
    # NaN is sorted behind all numbers.
    return np.where(np.isnan(ordered[..., -1]), nan, medians)


def _directions(spectrum: Spectrum) -> int:
    """The largest number of directions that an update can have."""
    return min(spectrum.rank, *spectrum.shape)


def _unbounded_value(spectrum: Spectrum, quantity: str) -> float:
    """The quantity on an unbounded scale: ln ‖ΔW‖, or the logit of (effective rank − 1)/(k − 1) with k directions."""
    if quantity == "frobenius":  # ‖ΔW‖ itself may underflow or overflow
        return log(spectrum.spectral) + log(spectrum.stable_rank) / 2
    share = min(max((spectrum.effective_rank - 1) / (_directions(spectrum) - 1), NEAR), 1 - NEAR)
    return log(share / (1 - share))


def upper_outliers(x: Floats, level: float, agreed: float | None = None) -> Sequence[tuple[int, float]]:
    """Indices of the values that a gap separates from all others below, with the chance of that gap, largest first.

    Parameters
    ----------
    x : float64 array, shape (n,)
        n at least `FEWEST`.
    level : float
        Bound on the expected number of flagged values if all come from one log-concave distribution. Half of it
        (all of it if n < 16) is spent on the gap below the largest value. The other half is divided equally among the
        2nd to (n/8)-th gaps. The part of the k-th gap is divided by k, because this gap flags k values.
    agreed : float, optional
        Mean spacing of other kinds, which is used if it is larger than that of these values.
    """
    order = np.argsort(-x, kind="stable")
    x = x[order] - _medians(x)
    half = x.size // 2
    # Times k, all spacings of exponential variables have one mean.
    spacings = np.arange(1, half + 1) * (x[:half] - x[1 : half + 1])
    most = max(1, x.size // 8)
    flagged, chance = 0, 1.0
    for k in range(1, most + 1):
        below = half - k
        scale = max(float(spacings[k:].mean()) + SPREAD, agreed or 0.0)
        weight = below if agreed is None else AGREED * below
        p = float((1 + spacings[k - 1] / (weight * scale)) ** -weight)
        share = 1.0 if most == 1 else 0.5 if k == 1 else 0.5 / (most - 1)
        if p <= level * share / k and x[k - 1] >= LEAST:  # the loop goes on: a later gap includes the earlier ones
            flagged, chance = k, p
    return [(int(i), chance) for i in order[:flagged]]
