"""Modules whose norm is far from what the other modules of their kind suggest for their depth.

ln ‖ΔW‖ of the modules of one kind and shape is fitted by a straight line over the depth: its slope is the median of the
slopes between all pairs of modules (Theil 1950, Sen 1968). The distances from the line of all shapes of a kind are
compared with their median absolute deviation. Neither median moves if less than a quarter of the modules are odd, so
several odd modules do not mask each other.

The limits were set with 154 adapters of other people. In 151 of them no norm is more than 3.3 times above or below its
line. In the other three, checkpoints of one run whose accuracy is that of chance, one is 7.2 to 9.4 times above it.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import exp, log
from typing import final

import numpy as np

from loralens.analysis.spectrum import Spectrum
from loralens.core.names import is_expert_alone, kind_in_block, natural_key
from loralens.linalg.factor import Floats

LEAST = log(4.0)  # smallest distance from the line that is reported: four times the norm, or a quarter of it
DEVIATIONS = 6.0  # and how many median absolute deviations it is at least
FEWEST = 6  # modules of a kind: of fewer, two odd ones are too large a share
SMALLEST = 5  # modules of one shape: a line through four fits any two of them
SPREAD = 0.02  # smallest deviation that is assumed, so that modules that are equal to rounding are compared with 2 %
LARGEST = 709.0  # the logarithm of the largest float64
ALL_PAIRS = 200  # modules of one shape at most of which all pairs are compared; of more, each with one half as far


@final
@dataclass(frozen=True, slots=True)
class Outlier:
    """A module whose ‖ΔW‖ stands out from the modules of its kind and shape.

    Attributes
    ----------
    name : str
    value, typical : float
        ‖ΔW‖_F, and what the line through its kind and shape gives for its depth.
    deviations : float
        The distance of their logarithms, in median absolute deviations of its kind.
    """

    name: str
    value: float
    typical: float
    deviations: float


def find_outliers(spectra: Mapping[str, Spectrum]) -> list[Outlier]:
    """Find modules whose norm is far above or below the line of their kind and shape; the farthest come first.

    Kinds are those of `kind_in_block`, which are the same in every dialect. Modules with ΔW = 0 are left out, and so
    are single experts, whose norms depend on how many tokens reached them.
    """
    # Shapes separate modules too: in diffusers' files to_q is self-attention and cross-attention of several widths.
    cells: dict[tuple[str, tuple[int, int]], list[str]] = {}
    for name in sorted(spectra, key=natural_key):
        if spectra[name].spectral > 0 and not name.endswith("]") and not is_expert_alone(name):
            cells.setdefault((kind_in_block(name), spectra[name].shape), []).append(name)
    kinds: dict[str, dict[str, float]] = {}
    for (kind, _), names in cells.items():
        if len(names) >= SMALLEST:
            distances = distances_from_line(np.array([_log_norm(spectra[name]) for name in names]))
            kinds.setdefault(kind, {}).update(zip(names, distances.tolist(), strict=True))
    found: list[tuple[float, Outlier]] = []
    for distances_of in kinds.values():
        if len(distances_of) < FEWEST:
            continue
        deviation = max(float(_median(np.abs(list(distances_of.values())))), SPREAD)
        for name, distance in distances_of.items():
            if abs(distance) >= max(LEAST, DEVIATIONS * deviation):
                typical = exp(min(_log_norm(spectra[name]) - distance, LARGEST))
                outlier = Outlier(name, spectra[name].frobenius, typical, abs(distance) / deviation)
                found.append((-abs(distance), outlier))
    return [outlier for _, outlier in sorted(found, key=lambda pair: (pair[0], natural_key(pair[1].name)))]


def distances_from_line(x: Floats) -> Floats:
    """The distances of values from the Theil–Sen line through them.

    Parameters
    ----------
    x : float64 array, shape (n,)
        In the order of depth.

    Returns
    -------
    float64 array, shape (n,)
    """
    n = x.size
    if n > ALL_PAIRS:
        first, second = np.arange(n // 2), np.arange(n // 2) + (n + 1) // 2
    else:
        first, second = np.triu_indices(n, 1)
    depth = np.arange(n)
    rest = x - float(_median((x[second] - x[first]) / (second - first))) * depth
    return np.asarray(rest - _median(rest), dtype=np.float64)


def _log_norm(spectrum: Spectrum) -> float:
    # ‖ΔW‖ itself may underflow or overflow.
    return log(spectrum.spectral) + log(spectrum.stable_rank) / 2


def _median(values: Floats | Sequence[float]) -> float:
    """The median. `numpy.median` gives the same, and loads numpy.ma, which takes 2 MB."""
    ordered = np.sort(np.asarray(values, dtype=np.float64))
    middle = ordered.size // 2
    return float(ordered[middle] if ordered.size % 2 else (ordered[middle - 1] + ordered[middle]) / 2)
